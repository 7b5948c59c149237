"""What a run says about itself while it trains: losses per source, speed, MFU, waiting, memory.

Counts are plain numbers from the data plan; losses stay on the device until a log line is due, then travel
in one reduction and one transfer.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from collections.abc import Sequence

import torch
from accelerate import Accelerator

# Dense bf16 peak in FLOP/s by device name, from the makers' data sheets (H100, H200: SXM). Others have no MFU.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12, "B200": 2250e12}
_COUNTED = ("samples", "tokens", "targets", "images")


def peak_flops(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


class Window:
    """Everything counted since the last log line, on this process."""

    def __init__(self, sources: tuple[str, ...], accelerator: Accelerator):
        self._sources, self._accelerator = sources, accelerator
        self._peak = peak_flops(accelerator.device)
        self._open()

    def _open(self) -> None:
        device = self._accelerator.device
        self._loss = torch.zeros(len(self._sources), device=device)  # summed loss per source
        self._targets = [0.0] * len(self._sources)  # supervised tokens per source
        self._counts: Counter[str] = Counter()
        self._flops = 0.0
        self._waited = 0.0
        self._started = time.perf_counter()

    def add_row(
        self, losses: torch.Tensor, sources: Sequence[int], targets: Sequence[int], stats: dict[str, int]
    ) -> None:
        """One row's summed loss (G,), source and number of targets, by source. No transfer from the device."""
        for source, count, loss in zip(sources, targets, losses.detach(), strict=True):
            self._loss[source] += loss
            self._targets[source] += count
        self._counts.update({name: stats[name] for name in _COUNTED})

    def add_flops(self, flops: float) -> None:
        self._flops += flops

    def add_wait(self, seconds: float) -> None:
        self._waited += seconds

    def close(self) -> dict[str, float]:
        """Totals over all processes since the last call. Every process must call it at the same step."""
        seconds = time.perf_counter() - self._started
        device = self._accelerator.device
        local = [*self._targets, *(float(self._counts[name]) for name in _COUNTED), self._flops, self._waited]
        # The device clocks float32 at best: FLOPs are carried in units of 1e12.
        local[-2] /= 1e12
        packed = torch.cat([self._loss, torch.tensor(local, device=device)])
        total = self._accelerator.reduce(packed, reduction="sum").tolist()
        losses, rest = total[: len(self._sources)], total[len(self._sources) :]
        targets, (samples, _, supervised, images, tera_flops, waited) = rest[: len(self._sources)], rest[-6:]
        processes = self._accelerator.num_processes
        values = {
            f"loss/{source}": loss / count
            for source, loss, count in zip(self._sources, losses, targets, strict=True)
            if count and len(self._sources) > 1
        }
        values |= {
            "supervised_tokens_per_second": supervised / seconds,
            "samples_per_second": samples / seconds,
            "images_per_second": images / seconds,
            "data_wait_share": waited / (seconds * processes),
            "peak_memory_gib": _peak_memory(device) / 2**30,
        }
        if self._peak is not None:
            values["mfu"] = tera_flops * 1e12 / (seconds * processes * self._peak)
        self._open()
        return values


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Peak resident memory of this process; macOS counts bytes, Linux KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

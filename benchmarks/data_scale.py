"""Speed and memory of the data builder's stages on many rows: python -m benchmarks.data_scale --rows 10000 100000

Rows are made on the spot: small pictures unlike each other, or (--pictures FOLDER) the JPEG files of a folder, mixed
two by two so that no two rows are the same, and captions of random vocabulary entries. Every stage is a process of
its own with one worker; its memory is the process's peak, and its time is the processor time of its one thread, less
that of starting Python (measured by running the completed stage once more), so that what else the machine does matters
little. The stage reformat asks data.stand_in, in this process: what is measured is the builder's share alone.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image
from rich.console import Console
from rich.table import Table

from data.filters.text import OWN_VOCABULARY, read_entries
from data.stand_in import MODEL, serve

STAGES = ("ingest", "text-filter", "image-filter", "dedup", "balance", "reformat", "assemble")
ROWS_A_FILE = 5000


def make_source(folder: Path, rows: int, side: int, pictures: Sequence[Path]) -> int:
    """Parquet files of pairs with embedded pictures; returns the pictures' bytes."""
    entries = [spellings[0] for spellings in read_entries(OWN_VOCABULARY)]
    folder.mkdir(parents=True)
    total = 0
    for start in range(0, rows, ROWS_A_FILE):
        made = []
        for number in range(start, min(rows, start + ROWS_A_FILE)):
            rng = np.random.default_rng(number)
            data = _mixed(pictures, rng) if pictures else _drawn(rng, side)
            total += len(data)
            words = rng.choice(entries, 60)
            caption, context = " ".join(words[:20]), [" ".join(words[20:40]), " ".join(words[40:])]
            made.append({"id": f"r{number}", "image": data, "caption": caption, "context": context, "licence": "made"})
        pq.write_table(pa.Table.from_pylist(made), folder / f"{start:08d}.parquet", row_group_size=500)
    return total


def _drawn(rng: np.random.Generator, side: int) -> bytes:
    blobs = Image.fromarray(rng.integers(0, 256, (7, 7, 3), np.uint8)).resize((side, side))
    return _jpeg(blobs)


def _mixed(pictures: Sequence[Path], rng: np.random.Generator) -> bytes:
    """Two pictures in one, each turned some way: as heavy as they are, and unlike any other such."""
    first, second = (Image.open(pictures[k]).convert("RGB") for k in rng.choice(len(pictures), 2, replace=False))
    first, second = (image.transpose(Image.Transpose(rng.integers(7))) for image in (first, second))
    return _jpeg(Image.blend(first, second.resize(first.size), rng.uniform(0.4, 0.6)))


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def measure(rows: int, side: int, pictures: Sequence[Path], work: Path) -> Iterator[dict[str, Any]]:
    """One entry a stage, with the run folder's size after it."""
    source, out, config = work / "source", work / "run", work / "config.yaml"
    made = make_source(source, rows, side, pictures)
    classifier = {"encoder": "small-v1", "weights": [0.0] * 109, "bias": 3.0, "threshold": 0.5, "labels": {}}
    (work / "classifier.json").write_text(json.dumps(classifier | {"rows_sha256": "", "validation": {}}))
    settings = {
        "name": "scale",
        "ingest": {"kind": "pairs", "shard_size": 1000},
        "image_filter": {"min_side": 32, "encoder": {"kind": "small"}, "classifier": str(work / "classifier.json")},
        "reformat": {"method": "mllm_reformatted", "model": MODEL, "concurrency": 64},
        "executor": {"workers": 1},
    }
    config.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "data.build", "--config", config, "--source", source, "--out", out, "--step"]
    for stage in STAGES:
        with serve() as url:
            seconds, peak = _run([*map(str, command), stage], url)
            start, _ = _run([*map(str, command), stage], url)
        funnel = json.loads((out / "funnel.json").read_text())["stages"][-1]
        rate = funnel["rows_in"] / max(seconds - start, 1e-3)
        yield {
            "rows": rows,
            "stage": stage,
            "rows_in": funnel["rows_in"],
            "rows_out": funnel["rows_out"],
            "seconds": round(max(seconds - start, 1e-3), 2),
            "rows_per_second": round(rate),
            "core_hours_for_ten_million": round(1e7 / rate / 3600, 1),
            "peak_mib": round(peak / 1024),
            "folder_bytes_a_row": sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) // rows,
            "picture_bytes": made // rows,
        }


# Its parent's peak memory would be the least that a process can report, so a small one starts it.
LAUNCHER = """
import os, sys
process = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, used = os.wait4(process, 0)
print(os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, used.ru_maxrss)
"""


def _run(command: list[str], endpoint: str) -> tuple[float, int]:
    """Processor seconds and peak memory in KiB of a command that must succeed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENAI_BASE_URL": endpoint}
    launch = [sys.executable, "-I", "-S", "-c", LAUNCHER, *command]
    said = subprocess.run(launch, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    code, seconds, peak = said.split()[-3:]
    if code != "0":
        raise SystemExit(f"failed: {' '.join(command)}")
    return float(seconds), int(peak)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_scale", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--side", type=int, default=96, help="pixels of the drawn pictures")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="JPEG files to take in place of drawn ones")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="where the run folders are made (default: a temporary)"
    )
    parser.add_argument("--out", type=Path, metavar="JSONL", help="where the figures are appended")
    arguments = parser.parse_args()
    pictures = sorted(arguments.pictures.glob("*.jpg")) if arguments.pictures else []
    columns = {
        "rows": "rows",
        "stage": "stage",
        "rows_per_second": "rows/s of a core",
        "core_hours_for_ten_million": "core hours for 10 M",
        "peak_mib": "peak MiB",
        "picture_bytes": "bytes a picture",
        "folder_bytes_a_row": "run folder, bytes a row",
    }
    table = Table(*columns.values(), title="one worker, one thread")
    for rows in arguments.rows:
        work = Path(tempfile.mkdtemp(dir=arguments.work))
        try:
            for found in measure(rows, arguments.side, pictures, work):
                table.add_row(*(f"{found[c]:,}" if c != "stage" else found[c] for c in columns))
                if arguments.out:
                    with arguments.out.open("a") as file:
                        file.write(json.dumps(found) + "\n")
        finally:
            shutil.rmtree(work)
    Console().print(table)


if __name__ == "__main__":
    main()

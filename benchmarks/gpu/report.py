"""The results as people read them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from benchmarks.gpu.steps import BAR, GOAL

# What a line says of a case that timed no steps.
_SHOWN = (
    "card",
    "matmul_tflops",
    "relative_error",
    "fp32",
    "bf16_packed",
    "bf16_alone",
    "data_wait_share",
    "ratio",
    "loss_difference",
)


def line_of(result: dict[str, Any]) -> str:
    """One case in one line, as it ends."""
    parts = [result["status"] + (f" ({result['reason']})" if "reason" in result else "")]
    if "tflops" in result:
        parts += [f"{result['tokens_per_s']:,.0f} tokens/s", f"MFU {_share(result['mfu'])}", _gib(result["peak_gib"])]
        parts.append(f"host waits {_waits(result) or 'none seen'}")
    parts += [f"{key} {_short(result[key])}" for key in _SHOWN if key in result]
    return f"{result['started_s']:6.1f} s  {result['case']}: {', '.join(part for part in parts if part)}"


def tables(results: list[dict[str, Any]]) -> Iterator[Table]:
    """Steps, waiting, padded peer and what was not measured; only those that have rows."""
    for title, columns, rows in (
        (
            f"Optimizer steps (bar {BAR:.0%}, goal {GOAL:.0%} MFU of 989 TFLOP/s)",
            ("case", "tokens/s", "supervised/s", "step s", "MFU", "", "of ceiling", "peak", "estimate", "host waits"),
            [_step_row(result) for result in results if "tflops" in result],
        ),
        (
            "Waiting for data (goal: below 2 % of the time)",
            ("case", "share", "windows of 4 steps", "images/s", "images/s per core", "MFU"),
            [_waiting_row(result) for result in results if "data_wait_share" in result],
        ),
        (
            "Seconds of the same optimizer step, as a multiple of ours",
            ("case", "peer", "ratio", "range", "padding", "peak, ours", "peak, peer", "loss differs by"),
            [row for result in results if "ratio" in result for row in _peer_rows(result)],
        ),
        (
            "Not measured",
            ("case", "why"),
            [(r["case"], f"{r['status']} {r.get('reason', '')}") for r in results if r["status"] != "ok"],
        ),
    ):
        if rows:
            table = Table(title=title, title_justify="left")
            for column in columns:
                table.add_column(column, justify="left" if column in ("case", "", "peer", "why") else "right")
            for row in rows:
                table.add_row(*row)
            yield table


def _step_row(result: dict[str, Any]) -> tuple[str, ...]:
    return (
        result["case"],
        f"{result['tokens_per_s']:,.0f}",
        f"{result['supervised_tokens_per_s']:,.0f}",
        f"{result['step_s']:.3f}",
        _share(result["mfu"]),
        "goal" if result["mfu"] >= GOAL else "bar" if result["mfu"] >= BAR else "below",
        _share(result["of_ceiling"]),
        _gib(result["peak_gib"]),
        _gib(result["estimated_gib"]),
        _waits(result),
    )


def _waiting_row(result: dict[str, Any]) -> tuple[str, ...]:
    return (
        result["case"],
        f"{result['data_wait_share']:.2%}",
        ", ".join(f"{share:.2%}" for share in result["data_wait_shares"]),
        f"{result['images_per_s']:.1f}",
        f"{result['images_per_core_s']:.1f}",
        _share(result["mfu"]),
    )


def _peer_rows(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for peer, (median, least, most) in result["ratio"].items():
        yield (
            result["case"],
            peer,
            f"{median:.2f}",
            f"{least:.2f} to {most:.2f}",
            _share(result.get("padding", {}).get(peer)),
            _gib(result["peak_gib"].get("ours")),
            _gib(result["peak_gib"].get(peer)),
            f"{result['loss_difference']:.1e}",
        )


def _waits(result: dict[str, Any]) -> str:
    return ", ".join(f"{place} x{count}" for place, count in result["host_waits_per_step"].items())


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _gib(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} GiB"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} {_short(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "/".join(_short(item) for item in value)
    return str(value)

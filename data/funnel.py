"""What came in, what went out and why the rest did not, stage by stage: as JSON, a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data.tables import Counts, RunFolder, write_json

# Stages that write rows, in their order.
ROW_STAGES = ("ingest", "text-filter", "image-filter", "dedup", "balance", "reformat")
FUNNEL_FILE = "funnel.json"


@dataclass(frozen=True, slots=True)
class StageCounts:
    stage: str
    counts: Counts


def funnel(run: RunFolder) -> list[StageCounts]:
    """The complete stages from the first on. Every row is in it: each stage's input is its predecessor's output."""
    rows: list[StageCounts] = []
    for stage in ROW_STAGES:
        if not run.is_complete(stage):
            break
        counts = run.counts(stage)
        assert counts.rows_in == counts.rows_out + sum(counts.dropped.values()), (stage, counts)
        assert not rows or rows[-1].counts.rows_out == counts.rows_in, (stage, counts)
        rows.append(StageCounts(stage, counts))
    return rows


def write_funnel(run: RunFolder, rows: Sequence[StageCounts]) -> Path:
    path = run.path / FUNNEL_FILE
    write_json(path, {"schema": 1, "stages": [{"stage": row.stage, **asdict(row.counts)} for row in rows]})
    return path


def print_funnel(rows: Sequence[StageCounts], console: Console) -> None:
    table = Table("stage", "reason", title="From source to data set")
    for heading in ("in", "out", "dropped"):
        table.add_column(heading, justify="right")
    for row in rows:
        counts = row.counts
        table.add_section()
        dropped = sum(counts.dropped.values())
        table.add_row(row.stage, "", f"{counts.rows_in:,}", f"{counts.rows_out:,}", f"{dropped:,}", style="bold")
        for reason, number in sorted(counts.dropped.items(), key=lambda item: (-item[1], item[0])):
            table.add_row("", reason, "", "", f"{number:,}")
    console.print(table)


def draw_funnel(rows: Sequence[StageCounts], path: Path) -> None:
    """A bar for each stage's input: what went on, then what was dropped by reason. PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    reasons = sorted({reason for row in rows for reason in row.counts.dropped})
    colours = dict(zip(reasons, pyplot.get_cmap("tab20").colors * (len(reasons) // 20 + 1), strict=False))
    height = 0.7 * len(rows) + 1 + 0.25 * (1 + len(reasons) // 4)
    figure, axes = pyplot.subplots(figsize=(9, height), layout="constrained")
    shown: set[str] = set()
    for place, row in enumerate(rows):
        counts = row.counts
        axes.barh(place, counts.rows_out, color="#2f6f4f", label="kept" if place == 0 else None, height=0.62)
        left = counts.rows_out
        for reason, number in sorted(counts.dropped.items(), key=lambda item: -item[1]):
            label = reason.replace("_", " ") if reason not in shown else None
            axes.barh(place, number, left=left, color=colours[reason], label=label, height=0.62)
            shown.add(reason)
            left += number
        axes.text(left, place, f"  {counts.rows_out:,} of {counts.rows_in:,}", va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [row.stage for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, max((row.counts.rows_in for row in rows), default=1) * 1.22 or 1)
    axes.set_xlabel("rows")
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(pyplot.MaxNLocator(integer=True, nbins=6))
    figure.legend(ncols=4, fontsize=8, frameon=False, loc="outside lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)

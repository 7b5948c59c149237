"""What people read of a set: tables on the console, report.md, a plot, and one self-contained page."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console
from rich.table import Table
from rich.text import Text

from huatuo_vision.ablate.results import RESULTS_FILE
from huatuo_vision.evaluation.report import (
    FILTERS,
    magnitude,
    p_value,
    percent,
    points,
    points_interval,
    render_markdown,
)
from huatuo_vision.evaluation.responses import write_whole
from huatuo_vision.html import render_page

HERE = Path(__file__).parent
PLOT_FILE = "differences.png"


def write_reports(out: Path, results: Mapping[str, Any]) -> None:
    """Write results.json, differences.png, report.md and report.html into `out`, which is made."""
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / RESULTS_FILE, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    plot_differences(results, out / PLOT_FILE)
    values = {"results": results, "overview": overview(results), "printed": printed, "has_printed": has_printed}
    values["unsure"] = unsure_over_seeds(results)
    values["on_own_benchmarks"] = results["paper"] is not None and not shares_benchmarks(results)
    write_whole(out / "report.md", render_markdown(HERE / "report.md.jinja", plot=PLOT_FILE, **values))
    picture = base64.b64encode((out / PLOT_FILE).read_bytes()).decode()
    page = render_page(
        HERE / "report.html.jinja",
        title=results["title"],
        filters=FILTERS,
        plot=Markup(f"data:image/png;base64,{picture}"),
        **values,
    )
    write_whole(out / "report.html", page)


def show(results: Mapping[str, Any], out: Path, console: Console) -> None:
    """The tables, no wider than a terminal of 110 columns, and where the rest is."""
    if (all_benchmarks := overview(results)) is not None:
        header, lines = all_benchmarks
        of_paper = "" if results["paper"] is None else " (in brackets: the paper)"
        table = Table(title=Text(results["title"] + of_paper), title_justify="left")
        for name in header:
            table.add_column(Text(name), justify="left" if name == header[0] else "right")
        for line in lines:
            table.add_row(*map(Text, line))
        console.print(table)
    for name, entry in results["benchmarks"].items():
        console.print(_table(name, entry, results))
    for sentence in unsure_over_seeds(results):
        console.print(Text(sentence), style="bold yellow")
    if results["note"]:
        console.print(Text(results["note"]), style="bold")
    console.print(
        "difference: to the base with the same seed, in points; 95 %: over questions; seeds: each seed's difference; "
        "Holm: p of the exact paired test, corrected over the table; detectable: the smallest difference, in points, "
        "that so many answers show four times out of five.",
        highlight=False,
    )
    console.print(f"report {out / 'report.html'}   plot {out / PLOT_FILE}", highlight=False, soft_wrap=True)


def _table(name: str, entry: Mapping[str, Any], results: Mapping[str, Any]) -> Table:
    title = f"{results['title']}\n{name}: {entry['n']:,} questions, seeds {', '.join(map(str, results['seeds']))}"
    table = Table(title=Text(title), title_justify="left")
    table.add_column("row")
    for column in ("accuracy", "difference", "95 %", "seeds", "Holm", "detectable"):
        table.add_column(column, justify="right")
    has_paper = has_printed(results, name)
    if has_paper:
        table.add_column("paper", justify="right")
    for label, row in entry["rows"].items():
        cells = [percent(row["accuracy"]), *_difference_cells(row["versus_base"])]
        if has_paper:
            paper = printed(results, name, label)
            cells.append(paper.cell if paper else "–")
        table.add_row(Text(label), *cells)
        if row["blind"]:
            empty = [""] * (len(table.columns) - 2)
            table.add_row(Text(f"{label}, blind"), percent(row["blind"]["accuracy"]), *empty, style="dim")
    return table


def _difference_cells(versus: Mapping[str, Any] | None) -> list[str]:
    if versus is None:
        return [""] * 5
    return [
        points(versus["difference"]),
        points_interval(versus["ci95"]),
        "  ".join(points(one) for one in versus["seeds"]),
        p_value(versus["p_holm"]),
        magnitude(versus["smallest_detectable_difference"]),
    ]


@dataclass(frozen=True, slots=True)
class Printed:
    """The paper's number for a row, in percent, and its difference to the paper's base, in points."""

    value: float
    difference: float | None  # None for the base itself

    @property
    def cell(self) -> str:
        return f"{self.value:.1f}" if self.difference is None else points(self.difference / 100)


def printed(results: Mapping[str, Any], benchmark: str, label: str) -> Printed | None:
    """The paper's number on this benchmark; on the mean of its own ones, where it has none of the set's."""
    rows, base = results["benchmarks"][benchmark]["rows"], results["base"]
    value, base_value = rows[label]["paper"], rows[base]["paper"]
    if value is None or base_value is None:
        paper = results["paper"]
        if paper is None or label not in paper["rows"] or shares_benchmarks(results):
            return None
        value, base_value = paper["rows"][label]["mean"], paper["rows"][base]["mean"]
    return Printed(value, None if label == base else value - base_value)


def shares_benchmarks(results: Mapping[str, Any]) -> bool:
    """Whether the paper's numbers are of benchmarks of the set."""
    return results["paper"] is not None and bool(set(results["paper"]["benchmarks"]) & set(results["benchmarks"]))


def has_printed(results: Mapping[str, Any], benchmark: str) -> bool:
    return any(printed(results, benchmark, label) for label in results["benchmarks"][benchmark]["rows"])


def overview(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]] | None:
    """Header and rows of all benchmarks beside each other, as the paper's tables are; None for a single benchmark."""
    names = list(results["benchmarks"])
    if len(names) < 2:
        return None
    header = ["row", *(f"{name}, n = {results['benchmarks'][name]['n']:,}" for name in names), "mean"]
    lines = []
    for label in results["benchmarks"][names[0]]["rows"]:
        rows = [results["benchmarks"][name]["rows"][label] for name in names]
        papers = [row["paper"] for row in rows]
        mean = sum(papers) / len(papers) if None not in papers else None
        cells = [*zip([row["accuracy"] for row in rows], papers, strict=True)]
        cells.append((sum(row["accuracy"] for row in rows) / len(rows), mean))
        beside = [percent(own) + ("" if paper is None else f" ({paper:.1f})") for own, paper in cells]
        lines.append([label, *beside])
    return header, lines


def unsure_over_seeds(results: Mapping[str, Any]) -> list[str]:
    """The differences that other questions would hardly undo and another training might, in words."""
    sentences = []
    for name, entry in results["benchmarks"].items():
        for label, row in entry["rows"].items():
            versus = row["versus_base"]
            if versus is None or versus["ci95_seeds"] is None or _contains_zero(versus["ci95"]):
                continue
            if _contains_zero(versus["ci95_seeds"]):
                sentences.append(
                    f"{label} on {name}: {points(versus['difference'])} for these trainings, but "
                    f"{points_interval(versus['ci95_seeds'])} over seeds: another training may undo it."
                )
    return sentences


def _contains_zero(bounds: Sequence[float]) -> bool:
    return bounds[0] <= 0 <= bounds[1]


def plot_differences(results: Mapping[str, Any], target: Path) -> None:
    """Each row's difference to the base with its interval over questions, seeds as dots, the paper's as a diamond."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # of others' names with dollars in them
    from matplotlib import pyplot

    labels = [label for label in results["benchmarks"][next(iter(results["benchmarks"]))]["rows"]]
    labels.remove(results["base"])
    names = list(results["benchmarks"])
    figure, axes = pyplot.subplots(
        1,
        len(names),
        figsize=(max(6.4, 3.6 * len(names) + 2.2), 1.7 + 0.5 * len(labels)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, name in zip(axes[0], names, strict=True):
        rows = results["benchmarks"][name]["rows"]
        for place, label in enumerate(reversed(labels)):
            versus = rows[label]["versus_base"]
            low, high = (100 * bound for bound in versus["ci95"])
            middle = 100 * versus["difference"]
            axis.plot([low, high], [place, place], color="#2a6ca8", linewidth=2, solid_capstyle="butt")
            axis.plot(middle, place, "o", color="#2a6ca8", markersize=8, label="mean, 95 % over questions")
            if len(versus["seeds"]) > 1:
                each = [100 * one for one in versus["seeds"]]
                axis.plot(each, [place + 0.22] * len(each), ".", color="#566370", markersize=6, label="one seed")
            if (paper := printed(results, name, label)) is not None:
                of = "the paper" if shares_benchmarks(results) else "the paper, on its own benchmarks"
                axis.plot(paper.difference, place - 0.22, "D", mfc="none", color="#b25a12", markersize=6, label=of)
        axis.axvline(0, color="#566370", linewidth=1)
        axis.set_yticks(range(len(labels)), list(reversed(labels)))
        axis.set_ylim(-0.6, len(labels) - 0.4)
        axis.set_xlabel(f"points above {results['base']!r}")
        axis.set_title(f"{name}, n = {results['benchmarks'][name]['n']:,}", loc="left", fontsize="medium")
        axis.grid(axis="x", alpha=0.25)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    shown = dict(zip(*reversed(axes[0][0].get_legend_handles_labels()), strict=True))
    figure.legend(shown.values(), shown.keys(), loc="outside lower left", ncols=3, frameon=False, fontsize="small")
    figure.suptitle(results["title"], x=0.01, horizontalalignment="left", fontsize="medium")
    temporary = target.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=130)
    pyplot.close(figure)
    temporary.replace(target)

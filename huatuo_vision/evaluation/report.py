"""What people read: scores.json as Markdown, as one self-contained page, and as tables on the console.

`python -m huatuo_vision.evaluation.report --sighted DIR --blind DIR` sets two results side by side. No torch here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from huatuo_vision.cli import run_command
from huatuo_vision.evaluation.benchmarks import Benchmark
from huatuo_vision.evaluation.protocols import Protocol
from huatuo_vision.evaluation.responses import Header, Response, json_lines, write_whole
from huatuo_vision.evaluation.scorers import Verdict, score_benchmark
from huatuo_vision.schema import UserError

SCORES_FILE = "scores.json"
VERDICTS_FILE = "verdicts.jsonl"


def percent(rate: float | None) -> str:
    return "–" if rate is None else f"{100 * rate:.1f} %"


def interval(bounds: tuple[float, float] | None) -> str:
    return "–" if bounds is None else f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f} %"


def comparability(entry: Mapping[str, Any]) -> str | None:
    """The sentence that goes with a number that must not be compared, None where it may be."""
    if entry["comparable"]:
        return None
    return f"Not comparable: {entry['n'] + entry['ungraded']} rows answered, the benchmark has {entry['expected_n']}."


def summarise(
    header: Header,
    protocol: Protocol,
    benchmarks: Sequence[Benchmark],
    answers: Sequence[Response],
    verdicts: Sequence[Verdict],
) -> dict[str, Any]:
    """The content of scores.json."""
    entries = {}
    for benchmark in benchmarks:
        own = [pair for pair in zip(answers, verdicts, strict=True) if pair[1].benchmark == benchmark.name]
        scores = score_benchmark(*zip(*own, strict=True), expected_n=benchmark.expected_n, limit=header.limit)
        entries[benchmark.name] = scores | {"protocol_hash": header.protocols[benchmark.name], "note": benchmark.note}
    return {
        "schema": 1,
        "model": header.model,
        "weights": header.weights,
        "precision": header.precision,
        "blind": header.blind,
        "limit": header.limit,
        "protocol": {"name": protocol.name, "hash": protocol.hash},
        "benchmarks": entries,
    }


def write_reports(out: Path, scores: Mapping[str, Any], verdicts: Sequence[Verdict]) -> None:
    """`verdicts.jsonl`, `scores.json`, and `report.md` and `report.html` from the same values."""
    write_whole(out / VERDICTS_FILE, json_lines([asdict(verdict) for verdict in verdicts]))
    write_whole(out / SCORES_FILE, json.dumps(scores, indent=2, ensure_ascii=False) + "\n")
    for template in ("report.md", "report.html"):
        templates = Environment(
            loader=FileSystemLoader(Path(__file__).parent),
            # Names and replies are other people's text: none of it may become markup.
            autoescape=template.endswith(".html"),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        templates.filters |= {"percent": percent, "interval": interval, "comparability": comparability}
        write_whole(out / template, templates.get_template(f"{template}.jinja").render(scores=scores))


def show(scores: Mapping[str, Any], out: Path) -> None:
    """The result on the console, and where its pages are."""
    console = Console()
    for name, entry in scores["benchmarks"].items():
        console.print(score_table(name, entry, blind=scores["blind"]))
    console.print(f"{out / 'report.html'}", highlight=False, soft_wrap=True)


def score_table(name: str, entry: Mapping[str, Any], *, blind: bool) -> Group:
    """Accuracy by subject, and overall."""
    table = Table(title=f"{name}{', blind' if blind else ''}")
    table.add_column("subject")
    for column in ("n", "accuracy", "95 % interval", "unparsed"):
        table.add_column(column, justify="right")
    subjects = entry["groups"].get("subject", {})
    for subject, tally in subjects.items():
        table.add_row(subject, *_cells(tally))
    table.add_section()
    table.add_row("all", *_cells(entry), style="bold")
    if entry["macro"] is not None:
        table.add_row("mean of subjects", "", percent(entry["macro"]), "", "")
    return _with_notes(table, entry)


def _with_notes(table: Table, entry: Mapping[str, Any]) -> Group:
    warning = comparability(entry)
    return Group(table, *([Text(warning, style="bold yellow")] if warning else []), Text(entry["note"]))


def _cells(tally: Mapping[str, Any]) -> tuple[str, str, str, str]:
    return str(tally["n"]), percent(tally["accuracy"]), interval(tally["ci95"]), str(tally["unparsed"])


def read_scores(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / SCORES_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} has no {SCORES_FILE}; eval.py --out {folder} writes it when it is done") from None


def compare_table(sighted_dir: Path, blind_dir: Path) -> list[Group]:
    """One table per benchmark: how much of the accuracy comes from seeing the pictures.

    Raises UserError where the two are not one model under one protocol, with and without images.
    """
    sighted, blind = read_scores(sighted_dir), read_scores(blind_dir)
    if sighted["blind"] or not blind["blind"]:
        raise UserError(f"--sighted {sighted_dir} must hold a result with images and --blind {blind_dir} one without")
    for key in ("weights", "limit"):
        if sighted[key] != blind[key]:
            raise UserError(f"{sighted_dir} and {blind_dir} differ in {key}: {sighted[key]} and {blind[key]}")
    hashes = [{name: e["protocol_hash"] for name, e in scores["benchmarks"].items()} for scores in (sighted, blind)]
    if hashes[0] != hashes[1]:
        raise UserError(f"{sighted_dir} and {blind_dir} differ in benchmarks or protocol: {hashes[0]} and {hashes[1]}")
    return [_gain_table(name, entry, blind["benchmarks"][name]) for name, entry in sighted["benchmarks"].items()]


def _gain_table(name: str, sighted: Mapping[str, Any], blind: Mapping[str, Any]) -> Group:
    table = Table(title=f"{name}: with and without the picture")
    table.add_column("subject")
    for column in ("n", "sighted", "blind", "gain"):
        table.add_column(column, justify="right")
    for subject, seen in sighted["groups"].get("subject", {}).items():
        unseen = blind["groups"]["subject"][subject]
        gain = f"{100 * (seen['accuracy'] - unseen['accuracy']):+.1f}"
        table.add_row(subject, str(seen["n"]), percent(seen["accuracy"]), percent(unseen["accuracy"]), gain)
    table.add_section()
    gain = f"{100 * (sighted['accuracy'] - blind['accuracy']):+.1f}"
    table.add_row(
        "all", str(sighted["n"]), percent(sighted["accuracy"]), percent(blind["accuracy"]), gain, style="bold"
    )
    table.add_row("95 % interval", "", interval(sighted["ci95"]), interval(blind["ci95"]), "")
    return _with_notes(table, sighted)


def shortfall(sighted_dir: Path, blind_dir: Path, accuracy: float, gain: float) -> str | None:
    """The sentence that says which required accuracy or gain over blind was missed, None where none was."""
    sighted, blind = read_scores(sighted_dir)["benchmarks"], read_scores(blind_dir)["benchmarks"]
    for name, entry in sighted.items():
        seen = entry["accuracy"]
        # Rounded, so that 0.95 - 0.40 is not below 0.55.
        difference = round(seen - blind[name]["accuracy"], 9)
        if seen < accuracy:
            return f"{name}: accuracy {percent(seen)} is below the required {percent(accuracy)}."
        if difference < gain:
            return (
                f"{name}: the gain over blind, {100 * difference:.1f} points, is below the required {100 * gain:.1f}."
            )
    return None


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m huatuo_vision.evaluation.report", description="Set a result beside the same model's blind one."
    )
    parser.add_argument("--sighted", type=Path, required=True, metavar="DIR", help="an eval.py --out folder")
    parser.add_argument("--blind", type=Path, required=True, metavar="DIR", help="an eval.py --blind --out folder")
    parser.add_argument(
        "--require-accuracy", type=float, default=0.0, metavar="A", help="exit with 1 below it (0 to 1)"
    )
    parser.add_argument("--require-gain", type=float, default=-1.0, metavar="G", help="exit with 1 below it (0 to 1)")
    args = parser.parse_args()
    console = Console()
    for table in compare_table(args.sighted, args.blind):
        console.print(table)
    missed = shortfall(args.sighted, args.blind, args.require_accuracy, args.require_gain)
    if missed:
        console.print(missed, style="bold red", highlight=False, soft_wrap=True)
    return 1 if missed else 0


if __name__ == "__main__":
    run_command(main)

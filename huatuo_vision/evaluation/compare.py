"""Two evaluation folders row by row: two models, or one model with and without the pictures. No torch here.

Both answered the same questions, so what counts are the rows that only one of them has right: exact McNemar test,
paired bootstrap over clusters of rows, Holm's correction over the benchmarks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from huatuo_vision.evaluation import statistics
from huatuo_vision.evaluation.reasoning import with_labels
from huatuo_vision.evaluation.responses import RESPONSES_FILE, Response, read_responses, write_whole
from huatuo_vision.evaluation.scorers import Verdict
from huatuo_vision.evaluation.scores import group_indices
from huatuo_vision.evaluation.variants import is_original
from huatuo_vision.schema import UserError

COMPARISON_FILE = "comparison.json"
SCORES_FILE = "scores.json"
VERDICTS_FILE = "verdicts.jsonl"
SHOWN_FLIPS = 10

Comparison = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Result:
    """A finished evaluation folder, read back."""

    folder: Path
    scores: Mapping[str, Any]
    answers: Sequence[Response]
    verdicts: Sequence[Verdict]  # one for each answer

    @property
    def rows(self) -> dict[str, dict[str, tuple[Response, str]]]:
        """benchmark -> id -> answer and verdict. Variants are left out: they repeat others."""
        found: dict[str, dict[str, tuple[Response, str]]] = {}
        for answer, verdict in zip(self.answers, self.verdicts, strict=True):
            if is_original(answer):
                found.setdefault(answer["benchmark"], {})[answer["id"]] = (answer, verdict.verdict)
        return found

    @property
    def whose(self) -> str:
        """What tells models apart: the weights, or the name where the weights are not known."""
        return self.scores.get("weights") or self.scores["model"]

    @property
    def heading(self) -> dict[str, Any]:
        protocol = {key: self.scores["protocol"][key] for key in ("name", "hash")}
        keys = ("model", "weights", "blind", "limit")
        return {"folder": str(self.folder), **{key: self.scores.get(key) for key in keys}, "protocol": protocol}


@dataclass(frozen=True, slots=True)
class Paired:
    """Graded rows that both have."""

    rows: Sequence[
        Mapping[str, Any]
    ]  # a's answers, also for the pictures: a blind row belongs to those it was not shown
    a: Sequence[str]  # verdicts
    b: Sequence[str]

    @property
    def right(self) -> tuple[list[bool], list[bool]]:
        return [verdict == "correct" for verdict in self.a], [verdict == "correct" for verdict in self.b]


def compare(a: Result, b: Result) -> Comparison:
    """The content of comparison.json. Differences are a - b.

    Raises:
        UserError where a is the blind one, where both the model and the blindness differ, and where the two have no
        benchmark in common or differ in protocol, rows, options or gold answers.
    """
    results, paired = (a, b), pair(a, b)
    entries = {name: _entry(rows) | {"groups": _groups(rows)} for name, rows in paired.items()}
    corrected = statistics.holm([entry["p"] for entry in entries.values()])
    for (name, entry), p in zip(entries.items(), corrected, strict=True):
        entry["p_holm"] = p
        scored = [result.scores["benchmarks"][name] for result in results]
        entry |= {key: scored[0].get(key) for key in ("macro_over", "note")}
        reasons = dict.fromkeys(filter(None, (one.get("why_not_comparable") for one in scored)))
        entry["why_not_comparable"] = " ".join(reasons) or None
    pooled = Paired(
        [row for rows in paired.values() for row in rows.rows],
        [verdict for rows in paired.values() for verdict in rows.a],
        [verdict for rows in paired.values() for verdict in rows.b],
    )
    everything = {name: None for result in results for name in result.scores["benchmarks"]}
    return {
        "schema": 1,
        "a": results[0].heading,
        "b": results[1].heading,
        "kind": _kind(*results),
        "benchmarks": entries,
        "not_compared": [name for name in everything if name not in entries],
        # One test of its own: no family to correct for.
        "pooled": _entry(pooled) | {"p_holm": None},
        "flips": [flip for rows in paired.values() for flip in _flips(rows)],
    }


def pair(a: Result, b: Result) -> dict[str, Paired]:
    """The graded rows that both have, by benchmark. Raises UserError as `compare` does."""
    _kind(a, b)
    names = [name for name in a.scores["benchmarks"] if name in b.scores["benchmarks"]]
    if not names:
        said = [", ".join(result.scores["benchmarks"]) or "none" for result in (a, b)]
        raise UserError(f"{a.folder} and {b.folder} have no benchmark in common: {said[0]} there, {said[1]} here")
    for name in names:
        _require_same_protocol(name, a, b)
    rows_a, rows_b = a.rows, b.rows
    paired = {name: _pair(name, a, b, rows_a.get(name, {}), rows_b.get(name, {})) for name in names}
    paired = {name: rows for name, rows in paired.items() if rows.rows}
    if not paired:
        raise UserError(f"{a.folder} and {b.folder} have no graded row in common; their benchmarks hide the answers")
    return paired


def read(folder: Path) -> Result:
    """A finished evaluation folder. Raises UserError where a file is missing or broken."""
    for name in (SCORES_FILE, RESPONSES_FILE, VERDICTS_FILE):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}; eval.py --out {folder} writes it when it is done")
    scores = _read_scores(folder / SCORES_FILE)
    answers = with_labels(folder, read_responses(folder / RESPONSES_FILE))
    verdicts = _read_verdicts(folder / VERDICTS_FILE)
    keys = [(answer["benchmark"], answer["id"]) for answer in answers]
    if missing := [key for key in keys if key not in verdicts]:
        name, row_id = missing[0]
        raise UserError(
            f"{folder / VERDICTS_FILE} has no verdict on {len(missing)} answers, first {name} row {row_id!r}; "
            f"score {folder} again"
        )
    return Result(folder, scores, answers, [verdicts[key] for key in keys])


def _read_scores(path: Path) -> Mapping[str, Any]:
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        scores = None
    if not isinstance(scores, dict) or not {"model", "protocol", "benchmarks"} <= scores.keys():
        raise UserError(f"{path} is not the scores of an evaluation; score {path.parent} again")
    return scores


def _read_verdicts(path: Path) -> dict[tuple[str, str], Verdict]:
    verdicts = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line:
            continue
        try:
            verdict = Verdict(**json.loads(line))
            verdicts[verdict.benchmark, verdict.id] = verdict
        except (ValueError, TypeError):
            raise UserError(
                f"{path}, line {number}: no verdict (benchmark, id, verdict); score {path.parent} again"
            ) from None
    return verdicts


def _kind(a: Result, b: Result) -> str:
    blind_a, blind_b = bool(a.scores.get("blind")), bool(b.scores.get("blind"))
    if blind_a == blind_b:
        return "models"
    if a.whose != b.whose:
        raise UserError(
            f"{a.folder} and {b.folder} differ in weights ({a.whose} and {b.whose}) and in --blind at once; "
            "compare one model with and without pictures, or two models asked alike"
        )
    if blind_a:
        raise UserError(f"{a.folder} was asked blind and {b.folder} with pictures; name the one with pictures first")
    return "blind"


def _require_same_protocol(name: str, a: Result, b: Result) -> None:
    hashes = [result.scores["benchmarks"][name]["protocol_hash"] for result in (a, b)]
    if hashes[0] != hashes[1]:
        protocols = [result.scores["protocol"]["name"] for result in (a, b)]
        raise UserError(
            f"{a.folder} and {b.folder} differ in protocol or data on {name}: {protocols[0]} ({hashes[0]}) and "
            f"{protocols[1]} ({hashes[1]}); evaluate both under one --protocol and one data revision"
        )
    scoring = [result.scores.get("scoring") for result in (a, b)]
    if scoring[0] != scoring[1]:
        raise UserError(
            f"{a.folder} and {b.folder} differ in --scoring: {scoring[0]} and {scoring[1]}; evaluate both alike"
        )


def _pair(name: str, a: Result, b: Result, rows_a: Mapping[str, Any], rows_b: Mapping[str, Any]) -> Paired:
    """The graded rows of one benchmark that both have, in a's order. rows: id -> answer and verdict."""
    limited = any(result.scores.get("limit") is not None for result in (a, b))
    common = [row_id for row_id in rows_a if row_id in rows_b]
    if (rows_a.keys() != rows_b.keys() and not limited) or not common:
        raise UserError(
            f"{a.folder} and {b.folder} differ in the rows of {name}: {len(rows_a)} and {len(rows_b)}, of which "
            f"{len(common)} are in both; evaluate both on the same rows"
        )
    for row_id in common:
        for key in ("answer", "options"):
            one, other = rows_a[row_id][0][key], rows_b[row_id][0][key]
            if one != other:
                said = "gold answer" if key == "answer" else key
                raise UserError(
                    f"{a.folder} and {b.folder} differ in the {said} of {name} row {row_id!r}: {one!r} and {other!r}; "
                    "evaluate both on the same data"
                )
    graded = [row_id for row_id in common if rows_a[row_id][1] != "ungraded"]
    return Paired(
        [rows_a[row_id][0] for row_id in graded],
        [rows_a[row_id][1] for row_id in graded],
        [rows_b[row_id][1] for row_id in graded],
    )


def _entry(paired: Paired) -> dict[str, Any]:
    """Everything of one comparison but its groups and the correction for many."""
    n, cluster = len(paired.rows), statistics.clusters(paired.rows)
    a, b = paired.right
    a_only = sum(one and not other for one, other in zip(a, b, strict=True))
    b_only = sum(other and not one for one, other in zip(a, b, strict=True))
    clustered = len(set(cluster.tolist())) < n
    return {
        "n": n,
        "a": _rate(a, cluster),
        "b": _rate(b, cluster),
        "difference": (a_only - b_only) / n,
        "ci95": list(statistics.difference_interval(a, b, cluster)),
        "ci_method": "paired bootstrap"
        + (f" clustered by {statistics.cluster_kind(paired.rows)}" if clustered else ""),
        "discordant": {"a_only": a_only, "b_only": b_only},
        "p": statistics.mcnemar_p(a_only, b_only),
        "smallest_detectable_difference": statistics.smallest_detectable_difference(n, (a_only + b_only) / n),
    }


def _rate(right: Sequence[bool], cluster: statistics.Integers) -> dict[str, Any]:
    return {"accuracy": sum(right) / len(right), "ci95": list(statistics.rate_interval(right, cluster)[0])}


def _groups(paired: Paired) -> dict[str, dict[str, dict[str, Any]]]:
    a, b = paired.right
    return {
        group: {value: _difference([a[i] for i in own], [b[i] for i in own]) for value, own in values.items()}
        for group, values in group_indices(paired.rows).items()
    }


def _difference(a: Sequence[bool], b: Sequence[bool]) -> dict[str, Any]:
    n = len(a)
    return {"n": n, "a": sum(a) / n, "b": sum(b) / n, "difference": (sum(a) - sum(b)) / n}


def _flips(paired: Paired) -> list[dict[str, str]]:
    """The rows that just one of the two has right."""
    return [
        {"benchmark": row["benchmark"], "id": row["id"], "a": a, "b": b}
        for row, a, b in zip(paired.rows, paired.a, paired.b, strict=True)
        if (a == "correct") != (b == "correct")
    ]


def write_comparison(out: Path, comparison: Comparison) -> None:
    """Write `comparison.json` into the folder, which is made."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: no folder can be made there ({error.strerror})") from None
    write_whole(out / COMPARISON_FILE, json.dumps(comparison, indent=2, ensure_ascii=False) + "\n")


def shortfall(comparison: Comparison, accuracy: float, gain: float) -> str | None:
    """The sentence that says which required accuracy of a, or gain of a over b, was missed; None where none was."""
    over = "blind" if comparison["kind"] == "blind" else comparison["b"]["model"]
    for name, entry in comparison["benchmarks"].items():
        reached = entry["a"]["accuracy"]
        if reached < accuracy:
            return f"{name}: accuracy {_percent(reached)} is below the required {_percent(accuracy)}."
        if entry["difference"] < gain:
            return (
                f"{name}: the gain over {over}, {100 * entry['difference']:.1f} points, is below the required "
                f"{100 * gain:.1f}."
            )
    return None


def show(comparison: Comparison, console: Console) -> None:
    """The comparison as tables, no wider than a terminal of 80 columns."""
    benchmarks = comparison["benchmarks"]
    if comparison["kind"] == "blind":
        for name, entry in benchmarks.items():
            console.print(_gain_table(name, entry))
    else:
        _show_models(comparison, console)
    if comparison["kind"] != "blind" or len(benchmarks) > 1:
        console.print(_difference_table(comparison))
    console.print(_test_table(comparison))
    for name, entry in benchmarks.items():
        of = f"{name}: " if len(benchmarks) > 1 else ""
        if entry["why_not_comparable"]:
            console.print(Text(f"{of}{entry['why_not_comparable']}", style="bold yellow"))
        if entry["note"]:
            console.print(Text(f"{of}{entry['note']}"))
    if comparison["not_compared"]:
        console.print(Text(f"In one of the two only, or without answers: {', '.join(comparison['not_compared'])}."))
    _show_flips(comparison, console)


def _show_models(comparison: Comparison, console: Console) -> None:
    for side in ("a", "b"):
        about = comparison[side]
        blind = ", blind" if about["blind"] else ""
        line = f"{side}: {about['model']}{blind} (protocol {about['protocol']['name']}; {about['folder']})"
        console.print(Text(line), soft_wrap=True)


def _gain_table(name: str, entry: Mapping[str, Any]) -> Table:
    """How much of the accuracy comes from seeing the pictures."""
    group = entry["macro_over"] or "question_type"
    table = Table(title=Text(f"{name}: with and without the picture"))
    table.add_column(Text(group))
    for column in ("n", "sighted", "blind", "gain"):
        table.add_column(column, justify="right")
    for value, row in entry["groups"].get(group, {}).items():
        table.add_row(Text(value), str(row["n"]), _percent(row["a"]), _percent(row["b"]), _points(row["difference"]))
    table.add_section()
    a, b = entry["a"], entry["b"]
    table.add_row(
        "all", str(entry["n"]), _percent(a["accuracy"]), _percent(b["accuracy"]), _points(entry["difference"]),
        style="bold",
    )  # fmt: skip
    table.add_row("95 % interval", "", _interval(a["ci95"]), _interval(b["ci95"]), _points_interval(entry["ci95"]))
    return table


def _sides(comparison: Comparison) -> tuple[str, str]:
    return ("sighted", "blind") if comparison["kind"] == "blind" else ("a", "b")


def _difference_table(comparison: Comparison) -> Table:
    """How large the differences are."""
    a, b = _sides(comparison)
    difference = "gain" if comparison["kind"] == "blind" else f"{a} - {b}"
    table = Table(title=f"{a} against {b}")
    _add_rows(table, comparison, ("n", a, b, difference, "95 % interval"), _difference_cells)
    return table


def _difference_cells(entry: Mapping[str, Any]) -> tuple[str, ...]:
    a, b = (_percent(entry[side]["accuracy"]) for side in ("a", "b"))
    return str(entry["n"]), a, b, _points(entry["difference"]), _points_interval(entry["ci95"])


def _test_table(comparison: Comparison) -> Table:
    """Whether chance alone would make such differences."""
    a, b = _sides(comparison)
    table = Table(
        title="Row by row",
        caption="p: exact McNemar test; Holm: corrected over the benchmarks; detectable: the smallest difference, in "
        "points, that so many rows show four times out of five",
    )
    _add_rows(table, comparison, (f"only {a}", f"only {b}", "p", "p (Holm)", "detectable"), _test_cells)
    return table


def _test_cells(entry: Mapping[str, Any]) -> tuple[str, ...]:
    discordant, smallest = entry["discordant"], entry["smallest_detectable_difference"]
    return (
        str(discordant["a_only"]),
        str(discordant["b_only"]),
        _p(entry["p"]),
        _p(entry["p_holm"]),
        # Above 1 so few rows show nothing.
        "–" if smallest is None or smallest > 1 else f"{100 * smallest:.1f}",
    )


def _add_rows(
    table: Table,
    comparison: Comparison,
    columns: Sequence[str],
    cells: Callable[[Mapping[str, Any]], tuple[str, ...]],
) -> None:
    """A row for each benchmark, and one for all their rows where there are several."""
    table.add_column("benchmark", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right")
    for name, entry in comparison["benchmarks"].items():
        table.add_row(Text(name), *cells(entry))
    if len(comparison["benchmarks"]) > 1:
        table.add_section()
        table.add_row("all rows", *cells(comparison["pooled"]), style="bold")


def _show_flips(comparison: Comparison, console: Console) -> None:
    flips = comparison["flips"]
    console.print(Text(f"{len(flips)} of {comparison['pooled']['n']} rows are right in one of the two only."))
    for flip in flips[:SHOWN_FLIPS]:
        console.print(Text(f"  {flip['benchmark']} {flip['id']}: {flip['a']} / {flip['b']}"), soft_wrap=True)
    if len(flips) > SHOWN_FLIPS:
        console.print(Text(f"  and {len(flips) - SHOWN_FLIPS} more, all in {COMPARISON_FILE} (--out)"))


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f} %"


def _interval(bounds: Sequence[float]) -> str:
    return f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f} %"


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f}"


def _points_interval(bounds: Sequence[float]) -> str:
    return f"{100 * bounds[0]:+.1f} to {100 * bounds[1]:+.1f}"


def _p(value: float | None) -> str:
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"

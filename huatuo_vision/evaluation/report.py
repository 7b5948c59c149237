"""What people read: a result as Markdown, as one self-contained page, and as tables on the console. No torch here."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich.console import Console
from rich.table import Table
from rich.text import Text

from huatuo_vision.evaluation import pictures as stored_pictures
from huatuo_vision.evaluation.published import (
    HEADLINE,
    MEANS,
    RUBRIC_SCORES,
    Published,
    Standing,
    Target,
    cell,
    published_for,
)
from huatuo_vision.evaluation.report_samples import ROWS_PER_BENCHMARK, Answer, Answered, choose, describe, picture_uris
from huatuo_vision.evaluation.responses import write_whole
from huatuo_vision.evaluation.rubric import COMPONENTS, MOST_MARKS
from huatuo_vision.evaluation.variants import CONTROLS, WHOLE, is_original
from huatuo_vision.html import encodable, render_page

if TYPE_CHECKING:
    from huatuo_vision.evaluation.scorers import Verdict

HERE = Path(__file__).parent
OPEN_METRICS = {
    "exact_match": "exact match",
    "token_recall": "token recall",
    "token_f1": "token F1",
    "bleu": "BLEU",
}
# A longer breakdown than this is folded away.
LONG_GROUP = 8


@dataclass(frozen=True, slots=True)
class GroupLine:
    value: str
    tally: Mapping[str, Any]
    pair: Mapping[str, Any] | None  # the comparison's entry for this value: n, a, b, difference
    printed: tuple[float | None, ...]  # the paper's cells, in the order of the section's `cell_models`


@dataclass(frozen=True, slots=True)
class GroupTable:
    name: str
    lines: tuple[GroupLine, ...]
    cell_models: tuple[str, ...]  # short names of the models whose printed cells stand beside
    folded: bool


@dataclass(frozen=True, slots=True)
class ConditionLine:
    """What is reached on clinical cases, by choice and by explanation: asked whole, or with less to see."""

    name: str
    tally: Mapping[str, Any] | None  # None where its answers have no gold
    gain: Mapping[str, Any] | None  # of a control: how much the whole question adds
    marks: Mapping[str, Any] | None  # a condition of the rubric
    overlap: Mapping[str, Any] | None  # a condition of the concepts


@dataclass(frozen=True, slots=True)
class SetLine:
    """The mean over several benchmarks, and what was printed of it."""

    name: str
    mean: Mapping[str, Any]
    targets: tuple[Target, ...]


@dataclass(frozen=True, slots=True)
class Section:
    """One benchmark, as the tables show it."""

    name: str
    entry: Mapping[str, Any]
    pair: Mapping[str, Any] | None  # the comparison's entry
    majority: Mapping[str, Any] | None
    letter: tuple[str, float] | None  # the best constant letter
    longest: float | None
    best_prior: float | None  # the best of the three
    published: tuple[Published, ...]
    standing: Standing | None
    headline: tuple[tuple[str, Published], ...]  # short name, number
    tables: tuple[GroupTable, ...]
    conditions: tuple[ConditionLine, ...]  # of clinical cases; none elsewhere
    targets: tuple[Target, ...]  # printed rubric scores


def write_reports(
    out: Path,
    scores: Mapping[str, Any],
    answers: Sequence[Answer],
    verdicts: Sequence[Verdict],
    comparison: Mapping[str, Any] | None = None,
    other: Answered | None = None,
    *,
    picture_folders: Sequence[Path] | None = None,
    marks: Mapping[tuple[str, str], Mapping[str, float]] | None = None,
) -> None:
    """Write `report.md` and `report.html` into `out`.

    Args:
        scores: the content of scores.json; with a comparison, that of its first result.
        answers, verdicts: the rows behind it, rotated ones included.
        comparison: the content of comparison.json.
        other: answers and verdicts of the comparison's second result.
        picture_folders: where <sha256>.jpg are looked for; without it, `<out>/images`.
        marks: benchmark, id -> what a judge and a list of terms gave to that answer.
    """
    values = {
        "scores": scores,
        "sections": sections(scores, comparison),
        "comparison": comparison,
        "labels": labels(comparison),
        "open_metrics": OPEN_METRICS,
        "components": COMPONENTS,
        "sets": set_lines(scores),
    }
    write_whole(out / "report.md", render_markdown(HERE / "report.md.jinja", **values))
    rows = describe(choose(answers, verdicts, comparison, other), answers, verdicts, comparison, other, marks)
    folders = [out / stored_pictures.FOLDER] if picture_folders is None else picture_folders
    samples = {
        "rows": rows,
        "titles": {name: entry["title"] for name, entry in scores["benchmarks"].items()},
        "labels": labels(comparison),
        "compared": comparison is not None,
    }
    page = render_page(
        HERE / "report.html.jinja",
        title=f"Evaluation of {scores['model']}",
        data={"samples": samples, "pictures": picture_uris(rows, folders)},
        filters=FILTERS,
        shown=_shown(rows, answers),
        most_rows=ROWS_PER_BENCHMARK,
        difference_scale=_difference_scale(comparison),
        **values,
    )
    write_whole(out / "report.html", page)


def labels(comparison: Mapping[str, Any] | None) -> tuple[str, str]:
    """What the two results of a comparison are called in its tables."""
    return ("sighted", "blind") if comparison and comparison["kind"] == "blind" else ("A", "B")


# What a result of an earlier version does not have.
_LATER = dict.fromkeys(("controls", "rubric", "concepts", "reasoning"))


def sections(scores: Mapping[str, Any], comparison: Mapping[str, Any] | None = None) -> tuple[Section, ...]:
    pairs = comparison["benchmarks"] if comparison else {}
    protocol = scores["protocol"]["name"]
    entries = {name: _LATER | entry for name, entry in scores["benchmarks"].items()}
    return tuple(_section(name, entry, pairs.get(name), protocol) for name, entry in entries.items())


def set_lines(scores: Mapping[str, Any]) -> tuple[SetLine, ...]:
    return tuple(SetLine(name, mean, MEANS.get(name, ())) for name, mean in scores.get("sets", {}).items())


def _conditions(entry: Mapping[str, Any]) -> tuple[ConditionLine, ...]:
    controls = entry.get("controls") or {}
    rubric = (entry.get("rubric") or {}).get("conditions", {})
    concepts = (entry.get("concepts") or {}).get("conditions", {})
    names = [name for name in (WHOLE, *CONTROLS) if name in controls or name in rubric or name in concepts]
    if controls and WHOLE not in names:
        names.insert(0, WHOLE)
    return tuple(
        ConditionLine(
            name=name,
            tally=entry if name == WHOLE else controls.get(name),
            gain=controls.get(name),
            marks=rubric.get(name),
            overlap=concepts.get(name),
        )
        for name in names
    )


def _section(name: str, entry: Mapping[str, Any], pair: Mapping[str, Any] | None, protocol: str) -> Section:
    baselines = entry["baselines"] or {}  # none where no row has options
    majority, longest = baselines.get("majority"), baselines.get("longest_option")
    letter = max((baselines.get("constant_letter") or {}).items(), key=lambda item: item[1], default=None)
    priors = majority and majority["accuracy"], letter and letter[1], longest
    published, standing = published_for(name, protocol, whole=entry["comparable"]) or ((), None)
    by_model = {number.model: number for number in published}
    headline = tuple((short, by_model[model]) for model, short in HEADLINE.items() if model in by_model)
    return Section(
        name=name,
        entry=entry,
        pair=pair,
        majority=majority,
        letter=letter,
        longest=longest,
        best_prior=max((prior for prior in priors if prior is not None), default=None),
        published=published,
        standing=standing,
        headline=headline,
        tables=tuple(_group_tables(entry, pair, headline)),
        conditions=_conditions(entry),
        targets=RUBRIC_SCORES.get(name, ()),
    )


def _group_tables(
    entry: Mapping[str, Any], pair: Mapping[str, Any] | None, headline: Sequence[tuple[str, Published]]
) -> list[GroupTable]:
    """The breakdowns, the one of the macro average first; one that has a single value says nothing."""
    groups = {name: values for name, values in entry["groups"].items() if len(values) > 1}
    order = sorted(groups, key=lambda name: (name != entry["macro_over"], name == "question_type"))
    compared = pair["groups"] if pair else {}
    return [
        _group_table(
            name,
            groups[name],
            compared.get(name, {}),
            [item for item in headline if item[1].groups] if name == entry["macro_over"] else [],
            folded=name != entry["macro_over"] and len(groups[name]) > LONG_GROUP,
        )
        for name in order
    ]


def _group_table(
    name: str,
    values: Mapping[str, Any],
    compared: Mapping[str, Any],
    headline: Sequence[tuple[str, Published]],
    *,
    folded: bool,
) -> GroupTable:
    if not any(cell(number, value) is not None for _, number in headline for value in values):
        headline = []
    lines = tuple(
        GroupLine(value, tally, compared.get(value), tuple(cell(number, value) for _, number in headline))
        for value, tally in values.items()
    )
    return GroupTable(name, lines, tuple(short for short, _ in headline), folded)


def _shown(rows: Sequence[Mapping[str, Any]], answers: Sequence[Answer]) -> dict[str, tuple[int, int]]:
    """benchmark -> (rows in the page, rows in all)."""
    originals = [answer["benchmark"] for answer in answers if is_original(answer)]
    inside = [row["benchmark"] for row in rows]
    return {name: (inside.count(name), originals.count(name)) for name in dict.fromkeys(originals)}


def _difference_scale(comparison: Mapping[str, Any] | None) -> float:
    """Half the width of the axis of differences: the next tenth that all intervals fit in."""
    if comparison is None:
        return 1.0
    entries = [*comparison["benchmarks"].values(), comparison["pooled"] or {}]
    bounds = [abs(bound) for entry in entries for bound in entry.get("ci95") or ()]
    return max(math.ceil(10 * max(bounds, default=1.0)) / 10, 0.1)


# -- words for numbers -------------------------------------------------------------------------------------------


def percent(rate: float | None) -> str:
    return "–" if rate is None else f"{100 * rate:.1f} %"


def interval(bounds: Sequence[float] | None) -> str:
    return "–" if bounds is None else f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f} %"


def points(difference: float | None) -> str:
    """A difference of two rates in percentage points, with its sign."""
    if difference is None:
        return "–"
    text = f"{100 * difference:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def magnitude(difference: float | None) -> str:
    """The size of a difference in percentage points; more than all of them is more than can be."""
    return "–" if difference is None or difference > 1 else f"{100 * difference:.1f}"


def points_interval(bounds: Sequence[float] | None) -> str:
    return "–" if bounds is None else f"{points(bounds[0])} to {points(bounds[1])}"


def count(number: int | None) -> str:
    return "–" if number is None else f"{number:,}"


def mark(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def mark_interval(bounds: Sequence[float] | None) -> str:
    return "–" if bounds is None else f"{bounds[0]:.2f} to {bounds[1]:.2f}"


def states(component: Mapping[str, Any]) -> str:
    """What became of the replies that are no mark; nothing where all were one."""
    said = {"empty": "empty answer (0)", "no_list": "no list", "prose": "no number", "out_of_range": "out of range"}
    found = [f"{component['states'][state]} {text}" for state, text in said.items() if component["states"].get(state)]
    return ", ".join(found)


def p_value(p: float | None) -> str:
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def words(name: object) -> str:
    """A key of the data as a reader's words."""
    return str(name).replace("_", " ")


def _along(rate: float) -> str:
    """A place on an axis from 0 to 1, for SVG."""
    return f"{100 * min(max(rate, 0.0), 1.0):.2f}%"


FILTERS = {
    "percent": percent,
    "interval": interval,
    "points": points,
    "magnitude": magnitude,
    "points_interval": points_interval,
    "mark": mark,
    "mark_interval": mark_interval,
    "states": states,
    "p_value": p_value,
    "count": count,
    "words": words,
    "along": _along,
}


def render_markdown(template: Path, **values: Any) -> str:
    """A Markdown template with what it prints escaped for Markdown, and the filters of the reports."""
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        # Names and notes are other people's text: none of it may leave its cell or become markup.
        finalize=_inline,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    environment.filters |= FILTERS
    return encodable(environment.get_template(template.name).render(**values))


def _inline(value: object) -> str:
    """A value as inline Markdown that stays in its line and cell, and starts neither markup nor a link."""
    if isinstance(value, Markup):
        return value
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_\[\]|#~$@])", r"\\\1", text)
    return re.sub(r"(?i)\b(https?|ftp)(?=:)|\bwww(?=\.)", lambda match: f"{match[0][:-1]}<!-- -->{match[0][-1]}", text)


# -- the console ---------------------------------------------------------------------------------------------------


def show(scores: Mapping[str, Any], out: Path, console: Console) -> None:
    """The result on the console, and where its page is."""
    found = sections(scores)
    console.print(_overview(scores, found))
    if (priors := _priors_table(found)) is not None:
        console.print(priors)
    for section in found:
        for table in section.tables:
            if table.name == section.entry["macro_over"]:
                console.print(_breakdown(section, table))
        if section.conditions:
            console.print(_choice_table(section))
            if (explanation := _explanation_table(section)) is not None:
                console.print(explanation)
    tables = _open_table(found), _rotation_table(found), _calibration_table(found), _reasoning_table(found)
    for table in (*tables, _set_table(set_lines(scores))):
        if table is not None:
            console.print(table)
    for section in found:
        if section.entry["why_not_comparable"]:
            sentence = f"{section.name}: {section.entry['why_not_comparable']}"
            console.print(Text(sentence, style="bold yellow"), soft_wrap=True)
        if section.entry["note"]:
            console.print(Text(f"{section.name}: {section.entry['note']}"), soft_wrap=True)
    console.print(str(out / "report.html"), highlight=False, markup=False, soft_wrap=True)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=Text(title))
    for position, column in enumerate(columns):
        table.add_column(Text(column), justify="right" if position else "left", overflow="fold")
    return table


def _add(table: Table, *cells: object, style: str | None = None) -> None:
    # Text, so that a bracket in a name is no markup.
    table.add_row(*(Text(str(value)) for value in cells), style=style)


def _overview(scores: Mapping[str, Any], found: Sequence[Section]) -> Table:
    title = f"{scores['model']}, protocol {scores['protocol']['name']}" + (", blind" if scores["blind"] else "")
    table = _table(title, "benchmark", "n", "accuracy", "95 % interval", "macro", "unparsed")
    for section in found:
        entry = section.entry
        _add(
            table,
            section.name + ("" if entry["comparable"] else " (!)"),
            count(entry["n"]),
            percent(entry["accuracy"]),
            interval(entry["ci95"]),
            percent(entry["macro"]),
            entry["unparsed"],
        )
    return table


def _priors_table(found: Sequence[Section]) -> Table | None:
    """What a model reaches that looks at no picture and reads no question."""
    with_priors = [section for section in found if section.best_prior is not None]
    if not with_priors:
        return None
    table = _table(
        "accuracy of a constant choice", "benchmark", "the majority's text", "one letter", "the longest option"
    )
    for section in with_priors:
        _add(
            table,
            section.name,
            percent(section.majority and section.majority["accuracy"]),
            f"{section.letter[0]} {percent(section.letter[1])}" if section.letter else "–",
            percent(section.longest),
        )
    return table


def _breakdown(section: Section, groups: GroupTable) -> Table:
    table = _table(section.name, words(groups.name), "n", "accuracy", "95 % interval", "unparsed")
    for line in groups.lines:
        tally = line.tally
        cells = count(tally["n"]), percent(tally["accuracy"]), interval(tally["ci95"]), tally["unparsed"]
        _add(table, line.value, *cells)
    return table


def _open_table(found: Sequence[Section]) -> Table | None:
    entries = [(section.name, section.entry["open"]) for section in found if section.entry["open"]]
    if not entries:
        return None
    table = _table("open questions", "benchmark", "n", *OPEN_METRICS.values())
    for name, entry in entries:
        _add(table, name, entry["n"], *(percent(entry[metric]["mean"]) for metric in OPEN_METRICS))
    return table


def _choice_table(section: Section) -> Table:
    """Cases asked whole and with less to see, by the option chosen."""
    table = _table(f"{section.name}: choice", "asked", "n", "accuracy", "95 % interval", "whole gains, points")
    for line in section.conditions:
        tally = line.tally or {"n": None, "accuracy": None, "ci95": None}
        gain = points(line.gain["gain"]) if line.gain else "–"
        _add(table, line.name, count(tally["n"]), percent(tally["accuracy"]), interval(tally["ci95"]), gain)
    return table


def _explanation_table(section: Section) -> Table | None:
    """The same cases, by what is made of the explanation."""
    rubric, concepts = section.entry["rubric"], section.entry["concepts"]
    if not rubric and not concepts:
        return None
    columns = [*COMPONENTS.values(), "mean of these"] if rubric else []
    table = _table(f"{section.name}: explanation", "asked", *columns, *(["concept F1"] if concepts else []))
    table.columns[0].no_wrap = True
    if rubric:
        table.caption = f"marks of 0 to {MOST_MARKS:g} by {rubric['model']}; the mean of the three is ours"
    for line in section.conditions:
        cells = []
        if rubric:
            components = line.marks["components"] if line.marks else {}
            cells = [mark(components.get(component, {}).get("mean")) for component in COMPONENTS]
            cells.append(mark(line.marks["mean"]["mean"] if line.marks else None))
        if concepts:
            cells.append(percent(_f1(line.overlap)))
        _add(table, line.name, *cells)
    return table


def _f1(overlap: Mapping[str, Any] | None) -> float | None:
    return overlap["f1"]["mean"] if overlap and overlap["f1"] else None


def _reasoning_table(found: Sequence[Section]) -> Table | None:
    entries = [(section.name, section.entry["reasoning"]) for section in found if section.entry.get("reasoning")]
    if not entries:
        return None
    table = _table("knowledge and inference", "benchmark", "n", "inference", "95 % interval", "unsorted")
    for name, entry in entries:
        _add(table, name, count(entry["n"]), percent(entry["inference"]), interval(entry["ci95"]), entry["unlabelled"])
    return table


def _set_table(lines: Sequence[SetLine]) -> Table | None:
    if not lines:
        return None
    table = _table("means over benchmarks", "set", "benchmarks", "mean", "95 % interval")
    for line in lines:
        _add(table, line.name, len(line.mean["members"]), percent(line.mean["mean"]), interval(line.mean["ci95"]))
    return table


def _rotation_table(found: Sequence[Section]) -> Table | None:
    entries = [(section.name, section.entry["rotation"]) for section in found if section.entry["rotation"]]
    if not entries:
        return None
    table = _table("options in every order", "benchmark", "rows", "mean accuracy", "95 % interval", "consistent")
    for name, entry in entries:
        cells = percent(entry["mean_accuracy"]), interval(entry["ci95"]), percent(entry["consistency"])
        _add(table, name, entry["rows"], *cells)
    return table


def _calibration_table(found: Sequence[Section]) -> Table | None:
    entries = [(section.name, section.entry["calibration"]) for section in found if section.entry["calibration"]]
    if not entries:
        return None
    table = _table("likelihood of the options", "benchmark", "scored by", "accuracy", "ECE", "Brier")
    for name, entry in entries:
        for kind in ("letter", "text"):
            found_by = entry[kind]
            _add(table, name, kind, percent(found_by["accuracy"]), f"{found_by['ece']:.3f}", f"{found_by['brier']:.3f}")
    return table

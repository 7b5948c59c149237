"""What preparation found: every row accounted for, what must stop the run, and the tables people read."""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from huatuo_vision.inputs.mixture import over_limits, select_rows
from huatuo_vision.recipe import PhaseSpec, Recipe
from huatuo_vision.schema import UserError


@dataclass(frozen=True, slots=True)
class PrepareReport:
    """What report.json says: counts per source and per phase, and every refused id with its reason."""

    path: Path
    sources: Mapping[str, dict]
    phases: Mapping[str, dict]
    dropped_ids: Mapping[str, dict[str, list[tuple[str, str]]]]

    def json(self) -> str:
        values = {"sources": self.sources, "phases": self.phases, "dropped_ids": self.dropped_ids}
        return json.dumps(values, indent=1, ensure_ascii=False)


def account_for(
    recipe: Recipe, phases: Sequence[str], verdicts: Mapping[str, pa.Table], path: Path
) -> tuple[PrepareReport, list[UserError]]:
    """The report, and what must stop the run, most useful first."""
    report = PrepareReport(path, {}, {}, {name: {} for name in verdicts})
    for name, table in verdicts.items():
        report.sources[name] = _source_account(table, recipe.data[name].expected_rows)
        refused = table.filter(pc.not_equal(table["reason"], ""))
        columns = (refused[column].to_pylist() for column in ("id", "reason", "explanation"))
        for id_, reason, explanation in zip(*columns, strict=True):
            report.dropped_ids[name].setdefault(reason, []).append((id_, explanation))
    problems = list(_source_problems(report, recipe.on_bad_sample))
    for phase in phases:
        report.phases[phase], phase_problems = _phase_account(phase, recipe, verdicts, report)
        problems += phase_problems
    return report, problems


def _counts(column: pa.ChunkedArray | pa.Array) -> dict[str, int]:
    return {entry["values"]: entry["counts"] for entry in sorted(pc.value_counts(column).to_pylist(), key=str)}


def _source_account(table: pa.Table, expected_rows: int | None) -> dict:
    kept = table.filter(pc.equal(table["reason"], ""))
    tokens = kept["tokens"].to_numpy()
    p50, p95 = np.percentile(tokens, (50, 95), method="lower").tolist() if len(tokens) else (None, None)
    return {
        "rows": len(table),
        "expected_rows": expected_rows,
        "kept": len(kept),
        "dropped": _counts(table["reason"].filter(pc.not_equal(table["reason"], ""))),
        "notes": _counts(pc.list_flatten(kept["notes"])),
        "tokens": {
            "mean": round(float(tokens.mean()), 1) if len(tokens) else None,
            "p50": p50,
            "p95": p95,
            "max": int(tokens.max()) if len(tokens) else None,
        },
        "images": int(kept["images"].to_numpy().sum()),
    }


def _source_problems(report: PrepareReport, on_bad_sample: str) -> Iterator[UserError]:
    dropped: Counter[str] = Counter()
    for account in report.sources.values():
        dropped.update(account["dropped"])
    if dropped and on_bad_sample == "stop":
        name = next(name for name, account in report.sources.items() if account["dropped"])
        id_, explanation = next(iter(report.dropped_ids[name].values()))[0]
        rows = sum(account["rows"] for account in report.sources.values())
        yield UserError(
            f"{dropped.total():,} of {rows:,} samples can't be trained on ({_by_reason(dropped)}); the first is sample "
            f"{id_!r} of source {name!r}: {explanation}; all are listed in {report.path}; mend them, or set "
            "on_bad_sample: drop to go on without them"
        )
    for name, account in report.sources.items():
        if account["kept"] == 0:
            why = f"all {account['rows']:,} rows are refused ({_by_reason(account['dropped'])})"
            yield UserError(
                f"source {name!r}: nothing is left to train on, {why if account['rows'] else 'it has no rows'}; "
                f"see {report.path}"
            )


def _phase_account(
    name: str, recipe: Recipe, verdicts: Mapping[str, pa.Table], report: PrepareReport
) -> tuple[dict[str, dict], list[UserError]]:
    """Every row of each source (rows = kept + dropped; `selected` is one epoch's share of kept), and what must stop."""
    phase = recipe.phases[name]
    account, problems = {}, []
    for entry in phase.data:
        source, table = report.sources[entry.source], verdicts[entry.source]
        passed = pc.equal(table["reason"], "").to_numpy()
        tokens, images = table["tokens"].to_numpy(), table["images"].to_numpy()
        dropped = dict(source["dropped"])
        for reason, over in over_limits(tokens, images, phase).items():
            rows = np.flatnonzero(over & passed)
            if len(rows):
                dropped[reason] = len(rows)
                report.dropped_ids[entry.source].setdefault(reason, []).extend(
                    (id_, f"{tokens[row]} tokens and {images[row]} images in phase {name}, {_limits(phase)}")
                    for row, id_ in zip(rows.tolist(), table["id"].take(pa.array(rows)).to_pylist(), strict=True)
                )
        kept = len(table) - sum(dropped.values())
        account[entry.source] = {"rows": len(table), "kept": kept, "dropped": dropped, "selected": None}
        if kept == 0 < source["kept"]:
            problems.append(
                UserError(
                    f"phases.{name}.data: no sample of source {entry.source!r} fits the phase ({_by_reason(dropped)}; "
                    f"{_limits(phase)}); raise these limits or remove the source from the phase"
                )
            )
    if all(counts["kept"] for counts in account.values()):
        try:
            selected = select_rows(
                phase.data, {source: counts["kept"] for source, counts in account.items()}, recipe.seed
            )
        except UserError as error:
            problems.append(UserError(f"phases.{name}.data: {error}"))
        else:
            for source, positions in selected:
                account[source]["selected"] = len(positions)
    return account, problems


def _limits(phase: PhaseSpec) -> str:
    return f"max_sample_tokens is {phase.max_sample_tokens} and max_row_images is {phase.max_row_images}"


def _by_reason(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in dropped.items())


def markdown(report: PrepareReport) -> str:
    """report.md: the tables, and the first refused samples of each reason."""
    page = Console(file=StringIO(), width=10_000, force_terminal=False, emoji=False, highlight=False)
    page.print("# Preparation\n")
    for table in tables(report, box.MARKDOWN):
        page.print(table)
    for sentence, _ in remarks(report):
        page.print(f"\n- {html.escape(sentence, quote=False)}", markup=False)
    for source, reasons in report.dropped_ids.items():
        for reason, samples in reasons.items():
            first = "; ".join(f"{id_}: {explanation}" for id_, explanation in samples[:3])
            # Ids and names are the data's: no markup, and no line of their own.
            first = html.escape(" ".join(first.split()), quote=False)
            page.print(f"\n- {source}, {reason}, {len(samples):,}: {first}", markup=False)
    return page.file.getvalue()


def tables(report: PrepareReport, style: box.Box) -> Iterator[Table]:
    """Numbers only, so that they fit a terminal of 80 columns; `remarks` has the words."""
    sources = _table(("source",), ("rows", "kept", "images", "tokens p50 / p95 / max"), style)
    for name, account in report.sources.items():
        numbers = (account["rows"], account["kept"], account["images"])
        tokens = " / ".join(_number(account["tokens"][key]) for key in ("p50", "p95", "max"))
        sources.add_row(escape(name), *map(_number, numbers), tokens)
    yield sources
    phases = _table(("phase", "source"), ("rows", "kept", "dropped", "in one epoch"), style)
    for phase, accounts in report.phases.items():
        for name, account in accounts.items():
            numbers = (account["rows"], account["kept"], sum(account["dropped"].values()), account["selected"])
            phases.add_row(phase, escape(name), *map(_number, numbers))
    yield phases


def _table(words: Sequence[str], numbers: Sequence[str], style: box.Box) -> Table:
    counted = (Column(name, justify="right", no_wrap=True) for name in numbers)
    return Table(*(Column(name, overflow="fold") for name in words), *counted, box=style)


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def remarks(report: PrepareReport) -> Iterator[tuple[str, bool]]:
    """(sentence, whether it is a warning): why rows were dropped, what was converted, and rows that are not there."""
    for name, account in report.sources.items():
        expected = account["expected_rows"]
        if expected is not None and expected != account["rows"]:
            yield f"source {name!r} holds {account['rows']:,} rows; the recipe expects {expected:,}", True
        if account["dropped"]:
            yield f"source {name!r} dropped {_by_reason(account['dropped'])}", True
        if account["notes"]:
            yield f"source {name!r} converted images: {_by_reason(account['notes'])}", False
    for phase, accounts in report.phases.items():
        for name, account in accounts.items():
            longer = {why: n for why, n in account["dropped"].items() if why not in report.sources[name]["dropped"]}
            if longer:
                yield f"phase {phase} dropped of source {name!r}: {_by_reason(longer)}", True

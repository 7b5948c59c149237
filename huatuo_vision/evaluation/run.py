"""The stages of eval.py: answer, score, report. Each reads and writes the evaluation folder; torch only to answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from huatuo_vision.evaluation import (
    compare,
    concepts,
    hub_results,
    human_marks,
    judge_client,
    judges,
    pictures,
    reasoning,
    report,
    report_samples,
    responses,
    rubric,
    scorers,
    scores,
    self_test,
)
from huatuo_vision.evaluation.answers import check_images, response_of
from huatuo_vision.evaluation.benchmarks import BENCHMARKS, SETS
from huatuo_vision.evaluation.judge_client import Judge
from huatuo_vision.evaluation.protocols import PROTOCOLS, Protocol
from huatuo_vision.evaluation.rows import HIDDEN, Benchmark, Loaded, Row
from huatuo_vision.evaluation.variants import OPTIONS_ONLY, TEXT_ONLY, is_original, with_controls, with_rotations
from huatuo_vision.schema import UserError

# What the rubric leaves in the evaluation folder: every mark, and the prompts that it was made with.
RUBRIC_FILE = "rubric.jsonl"
PROMPTS_FILE = "judge-prompts.json"


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of whom: the command line of an evaluation, checked."""

    model: str
    benchmarks: Mapping[str, Path | None]  # name -> its local data; None for the Hub
    protocol: Protocol
    out: Path
    blind: bool
    limit: int | None
    backend: str
    base_url: str | None
    batch_size: int
    rotate_options: bool
    scoring: str
    controls: bool = True  # ask those benchmarks that have them with less to see too


def prove_rules(benchmarks: Mapping[str, Path | None], console: Console) -> bool:
    """Try every protocol's rules on the rows of benchmarks, or on rows made for it; whether the default ones passed."""
    rows = None
    if benchmarks:
        rows = {
            name: [response_of(row, "") for row in BENCHMARKS[name].load(path).rows]
            for name, path in benchmarks.items()
        }
    result = self_test.run(rows)
    self_test.show(result, console)
    return result.passed


def show_benchmarks(console: Console) -> None:
    table = Table("name", "rows", "what", title="benchmarks")
    for benchmark in BENCHMARKS.values():
        n = "–" if benchmark.expected_n is None else f"{benchmark.expected_n:,}"
        table.add_row(benchmark.name, n, benchmark.title)
    for name, members in SETS.items():
        table.add_row(name, f"{sum(BENCHMARKS[member].expected_n for member in members):,}", ", ".join(members))
    console.print(table)


def answer(question: Question) -> list[Row] | None:
    """Ask every open row; all rows on the process that goes on to score, None on the others."""
    return (_answer_by_endpoint if question.backend == "openai" else _answer_by_transformers)(question)


def _answer_by_transformers(question: Question) -> list[Row] | None:
    from huatuo_vision.evaluation import generate, likelihood
    from huatuo_vision.inference import precision_on
    from huatuo_vision.launch import start_processes
    from huatuo_vision.model.folder import find_model

    # At the last barrier the slowest process may be hours behind; a backend's own limit is minutes.
    world = start_processes(timeout=timedelta(days=7))
    with world.main_process_first():
        folder = find_model(question.model)
        loaded = _load(question)
    rows = _rows(question, loaded)
    if question.scoring == "likelihood":
        likelihood.check_rows(rows, question.protocol)
    header = _header(
        question,
        loaded,
        weights=generate.weights_fingerprint(folder),
        precision=str(precision_on(world.device)).removeprefix("torch."),
    )
    if world.is_main_process:
        responses.claim_folder(question.out, header)
        responses.drop_torn_lines(question.out)
        check_images([] if question.blind else rows)
    world.wait_for_everyone()
    open_rows = _open_rows(question.out, rows)
    world.wait_for_everyone()  # nobody writes an answer before all have read which are finished

    if open_rows:
        backend = likelihood if question.scoring == "likelihood" else generate
        backend.answer(
            open_rows,
            folder,
            question.protocol,
            world,
            question.out,
            blind=question.blind,
            batch_size=question.batch_size,
        )
    world.wait_for_everyone()
    if world.is_main_process:
        responses.merge(question.out, [(row.benchmark, row.id) for row in rows])
    world.destroy_process_group()
    return rows if world.is_main_process else None


def _answer_by_endpoint(question: Question) -> list[Row]:
    from huatuo_vision.evaluation import endpoint
    from huatuo_vision.openai_endpoint import check_address

    check_address(question.base_url)  # before gigabytes of data are fetched
    loaded = _load(question)
    rows = _rows(question, loaded)
    header = _header(question, loaded, weights=None, precision=None)
    responses.claim_folder(question.out, header)
    responses.drop_torn_lines(question.out)
    check_images([] if question.blind else rows)
    open_rows = _open_rows(question.out, rows)
    if open_rows:
        endpoint.answer(
            open_rows, question.protocol, question.model, question.base_url, question.out, blind=question.blind
        )
    responses.merge(question.out, [(row.benchmark, row.id) for row in rows])
    return rows


def _load(question: Question) -> dict[str, Loaded]:
    return {name: BENCHMARKS[name].load(path) for name, path in question.benchmarks.items()}


def _rows(question: Question, loaded: Mapping[str, Loaded]) -> list[Row]:
    rows = [row for name in loaded for row in _rows_of(question, name, loaded[name].rows[: question.limit])]
    return with_rotations(rows) if question.rotate_options else rows


def _rows_of(question: Question, name: str, rows: Sequence[Row]) -> list[Row]:
    controls = list(BENCHMARKS[name].controls) if question.controls else []
    if question.blind and TEXT_ONLY in controls:
        controls.remove(TEXT_ONLY)  # the whole question is its text already
    if question.protocol.withhold_options and OPTIONS_ONLY in controls:
        controls.remove(OPTIONS_ONLY)
    return [question.protocol.asked(row) for row in with_controls(rows, controls)]


def _open_rows(out: Path, rows: Sequence[Row]) -> list[Row]:
    finished = responses.finished(out)
    return [row for row in rows if (row.benchmark, row.id) not in finished]


def _header(
    question: Question, loaded: Mapping[str, Loaded], weights: str | None, precision: str | None
) -> responses.Header:
    model = question.model
    if question.backend == "openai":
        from huatuo_vision.evaluation import endpoint

        model = endpoint.identity(question.model, question.base_url)
    return responses.Header(
        model=model,
        weights=weights,
        precision=precision,
        backend=question.backend,
        protocol=question.protocol.name,
        protocols={name: question.protocol.hash_on(BENCHMARKS[name], found.revision) for name, found in loaded.items()},
        revisions={name: found.revision for name, found in loaded.items()},
        blind=question.blind,
        limit=question.limit,
        scoring=question.scoring,
        rotated=question.rotate_options,
        controls=question.controls and any(BENCHMARKS[name].controls for name in question.benchmarks),
    )


@dataclass(frozen=True, slots=True)
class Extras:
    """What is said of the answers beside their grades; none of it changes one."""

    judge: str | None = None  # name of the judge model
    judge_url: str | None = None
    judge_cache: Path | None = None  # None: in the evaluation folder
    judge_repeats: int = 1  # of the rubric
    human_sheet: Path | None = None
    concepts: Path | None = None
    reasoning: str | None = None  # a sheet's path, or reasoning.BY_JUDGE

    def judge_in(self, out: Path) -> Judge | None:
        if self.judge is None:
            return None
        return Judge(self.judge, self.judge_url, self.judge_cache or out / judge_client.JUDGE_FILE)


def score(out: Path, protocol: Protocol, rows: Sequence[Row] = (), extras: Extras | None = None) -> dict[str, Any]:
    """Grade `out`/responses.jsonl by the protocol's rules and write verdicts, scores and reports.

    rows: where the pictures of what was asked are to be had, for the report; none for answers from elsewhere.
    """
    answers = responses.read_responses(out / responses.RESPONSES_FILE)
    if not answers:
        raise UserError(f"{out / responses.RESPONSES_FILE} holds no answers, so there is nothing to score")
    extras = extras or Extras()
    header, judge = responses.read_header(out), extras.judge_in(out)
    verdicts = [scorers.judge(answer, protocol) for answer in answers]
    if extras.reasoning is not None:
        reasoning.label(out, answers, extras.reasoning, judge)
    answers = reasoning.with_labels(out, answers)
    facts = {name: _facts(name, header, protocol) for name in dict.fromkeys(answer["benchmark"] for answer in answers)}
    result = scores.summarise(asdict(header), protocol, answers, verdicts, facts, SETS)
    result["reasoning"] = reasoning.source_of(out)
    marks: dict[tuple[str, str], dict[str, float]] = {}
    if extras.concepts is not None:
        entries, overlaps = concepts.measure(answers, extras.concepts)
        _add(result, "concepts", entries)
        marks |= {key: {f"concept_{name}": value for name, value in own.items()} for key, own in overlaps.items()}
    if judge is not None:
        _add(result, "judge", judges.judge_answers(answers, verdicts, judge))
        for key, own in _mark_explanations(out, protocol, answers, judge, extras, result).items():
            marks[key] = own | marks.get(key, {})
    responses.write_whole(out / compare.VERDICTS_FILE, responses.json_lines([_verdict_line(v) for v in verdicts]))
    responses.write_whole(out / compare.SCORES_FILE, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    pictures.save_pictures(out, rows, report_samples.choose(answers, verdicts))
    report.write_reports(out, result, answers, verdicts, marks=marks)
    _write_submissions(out, answers, verdicts)
    return result


def _mark_explanations(
    out: Path,
    protocol: Protocol,
    answers: Sequence[Mapping[str, Any]],
    judge: Judge,
    extras: Extras,
    result: dict[str, Any],
) -> dict[tuple[str, str], dict[str, float]]:
    """Mark what has a reference by the rubric; the marks of each answer."""
    names = list(dict.fromkeys(answer["benchmark"] for answer in answers if answer.get("reference")))
    if not names:
        return {}
    if not protocol.explains:
        said = f"{', '.join(names)}: protocol {protocol.name} asks for no explanation, so there is none to mark; for "
        said += "the rubric, ask with --protocol explain"
        Console(stderr=True).print(said, highlight=False, soft_wrap=True)
        return {}
    sheet = human_marks.read_human_sheet(extras.human_sheet) if extras.human_sheet is not None else None
    marked = rubric.mark_answers(answers, judge, extras.judge_repeats)
    entries = rubric.entries(marked)
    for name, entry in entries.items():
        if sheet is not None:
            entry["human"] = human_marks.agreement(marked, sheet, name)
    if sheet is not None and all(entry["human"] is None for entry in entries.values()):
        raise UserError(
            f"--human-sheet {extras.human_sheet} marks none of these answers; check its columns benchmark and id"
        )
    _add(result, "rubric", entries)
    responses.write_whole(out / RUBRIC_FILE, responses.json_lines(rubric.lines(marked)))
    responses.write_whole(out / PROMPTS_FILE, json.dumps(rubric.prompts(), indent=2, ensure_ascii=False) + "\n")
    human_marks.write_human_sheet(out, marked)
    return rubric.metrics(marked)


def _add(result: dict[str, Any], key: str, entries: Mapping[str, Any]) -> None:
    for name, entry in entries.items():
        result["benchmarks"][name][key] = entry


def add_to_card(model: str, result: Mapping[str, Any]) -> None:
    """Scores that may be compared go into the card of the model folder that they are of, to be pushed with it."""
    folder = Path(model)
    if result["weights"] is not None and (folder / "run.json").is_file():
        hub_results.write_results(folder, result)


def _facts(name: str, header: responses.Header, protocol: Protocol) -> scores.BenchmarkFacts:
    benchmark: Benchmark | None = BENCHMARKS.get(name)
    if benchmark is None:
        return scores.BenchmarkFacts.unknown(name, protocol)
    return scores.BenchmarkFacts.of(benchmark, header.revisions.get(name, "not recorded"), protocol)


def _write_submissions(out: Path, answers: Sequence[Mapping[str, Any]], verdicts: Sequence[scorers.Verdict]) -> None:
    """`submission-<benchmark>.json`, id -> answer, as the official servers of hidden answers take it."""
    hidden: dict[str, dict[str, str]] = {}
    for row, verdict in zip(answers, verdicts, strict=True):
        if row["answer"] == HIDDEN and is_original(row):
            hidden.setdefault(row["benchmark"], {})[row["id"]] = verdict.parsed or ""
    for name, content in hidden.items():
        path = out / f"submission-{name}.json"
        responses.write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        empty = sum(not text for text in content.values())
        Console(stderr=True).print(
            f"{path}: {len(content):,} answers to send to the benchmark's server, {empty:,} of them empty because the "
            "reply could not be parsed",
            highlight=False,
            soft_wrap=True,
        )


def take_responses(file: Path, out: Path, protocol: Protocol) -> None:
    """Make `out` the evaluation folder of a responses file that came from anywhere; the file itself stays as it is."""
    answers = responses.read_responses(file)
    if not answers:
        raise UserError(f"{file} holds no answers, so there is nothing to score")
    # Before they are taken, so that a mended file can be given with the same --out.
    for answer in answers:
        scorers.check(answer)
        scores.check_extras(answer)
    beside = responses.read_header(file.parent) if (file.parent / responses.HEADER_FILE).exists() else None
    if beside and out.resolve() == file.parent.resolve():
        # Graded where they lie: the folder stays the evaluation that it is, and can be gone on with.
        if beside.protocol != protocol.name:
            raise UserError(
                f"{out} holds answers asked under protocol {beside.protocol}; give --out a new folder to grade them by "
                f"--protocol {protocol.name}"
            )
        return
    header = responses.Header(
        model=beside.model if beside else file.name,
        weights=beside.weights if beside else None,
        precision=beside.precision if beside else None,
        # Answers asked under another protocol's prompt are no result of this one.
        backend=beside.backend if beside and beside.protocol == protocol.name else None,
        protocol=protocol.name,
        protocols={},
        revisions=beside.revisions if beside else {},
        blind=beside.blind if beside else False,
        limit=beside.limit if beside else None,
        scoring=beside.scoring if beside else "generate",
        rotated=any("rotation" in answer for answer in answers),
        controls=any("control" in answer for answer in answers),
    )
    responses.take(out, header, answers, source=file)


def compare_folders(a: Path, b: Path, out: Path | None, console: Console) -> compare.Comparison:
    """Set two results side by side; with `out`, write the comparison and the report of `a` with `b` beside it."""
    first, second = compare.read(a), compare.read(b)
    comparison = compare.compare(first, second)
    if out is not None:
        compare.write_comparison(out, comparison)
        report.write_reports(
            out,
            first.scores,
            first.answers,
            first.verdicts,
            comparison=comparison,
            other=(second.answers, second.verdicts),
            picture_folders=[folder / pictures.FOLDER for folder in (a, b)],
        )
    compare.show(comparison, console)
    return comparison


def _verdict_line(verdict: scorers.Verdict) -> dict[str, Any]:
    """A line of verdicts.jsonl; what only some rows have stands only there."""
    line = asdict(verdict)
    return {key: value for key, value in line.items() if value is not None or key == "parsed"}


def protocol_named(name: str) -> Protocol:
    if name not in PROTOCOLS:
        raise UserError(f"--protocol {name}: no such protocol; expected one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]

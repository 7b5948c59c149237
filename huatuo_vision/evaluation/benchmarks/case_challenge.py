"""Clinical cases: a history, its pictures, options, and an expert's discussion to hold explanations against. No torch.

Design decisions:

- Three benchmarks of one form. medthinkvqa: the 720 test cases of bio-nlp-umass/MedThinkVQA (Eurorad; CC BY-NC-SA 4.0,
  research and education only), from the Hub or a copy. jama-clinical-challenge: what a licence holder has fetched;
  nothing of it is or may be redistributed, so there is no download, and a folder must be given. case-challenge: any
  other cases, in the layout of README.md ("Cases of your own").
- All rows are multiple choice, gold is a letter. The discussion is kept under `reference` in the responses file, the
  case under `case`: the folder of an evaluation holds the publisher's text, and is to be kept as the data are.
- JAMA: rows as HanjieChen/ChallengeClinicalQA's scraper writes them (jama_raw.json or .csv: link, question, opa to opd,
  answer_idx, explanation, field). It saves no pictures; those of a case lie in images/<number of the article>/, shown
  in the order of their names. A case without any is refused: without them the question is another one. The id is the
  number at the end of the link, since the scraper's ids are positions that change with every scrape.
- MedThinkVQA: images in the order of their slots, without their captions and without IMAGING_FINDINGS, which say what
  is to be seen. The question is ours: the data set has a clinical history and options only.
- Trap: options alone are guessed far above chance (51.66 % of JAMA's four, a published audit), text alone reaches
  70.16 %. Every row is therefore also asked as both controls.
- Trap: how many JAMA cases SemiHVision scored is unknown (1,519 to 1,621 exist by four counts), so no number of rows
  makes a result comparable with the paper's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path, PurePosixPath

from huatuo_vision.evaluation.benchmarks import gold
from huatuo_vision.evaluation.benchmarks.sources import Record, Repository, Source, shown
from huatuo_vision.evaluation.rows import INFERENCE, KNOWLEDGE, REASONING, Benchmark, Loaded, Row
from huatuo_vision.evaluation.variants import CONTROLS
from huatuo_vision.schema import ImageRef

JAMA_OPTIONS = {"A": "opa", "B": "opb", "C": "opc", "D": "opd"}
MEDTHINKVQA_QUESTION = "What is the most likely diagnosis?"
MEDTHINKVQA_GROUPS = {"chapter": "ICD Chapter", "longitudinal": "is_longitudinal"}
MEDTHINKVQA_TABLE = "test.jsonl"
# The published table has so many places for images.
_SLOTS = tuple(f"image_{slot:02d}_path" for slot in range(1, 50))
OWN_GROUPS = ("field", "modality", REASONING)

# Links that were copied from a search go on behind it: ?resultClick=1
_NUMBER_AT_THE_END = re.compile(r"(\d+)/?(?:[?#].*)?\s*$")


def load_cases(repository: Repository, path: Path | None) -> Loaded:
    with repository.open(path) as source:
        records = source.records(("id", "question", "options", "answer"), (*OWN_GROUPS, "images", "discussion"))
        return source.loaded(_own(record, source) for record in records)


def _own(record: Record, source: Source) -> Row:
    options = gold.options_of(record.get("options"), record)
    names = record.get("images")
    names = [part.strip() for part in names.split(";") if part.strip()] if isinstance(names, str) else names or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise record.error(f"images is {shown(record.get('images'))}; expected a list of file names")
    groups = {name: record.text(name) for name in OWN_GROUPS if record.get(name)}
    if groups.get(REASONING, KNOWLEDGE) not in (KNOWLEDGE, INFERENCE):
        raise record.error(f"reasoning is {shown(groups[REASONING])}; expected {KNOWLEDGE} or {INFERENCE}, or nothing")
    return _case(
        source,
        record.text("id"),
        record.text("question"),
        options,
        gold.letter_of_letter(record.text("answer"), gold.published_letters(options), record),
        tuple(source.images.named(name) for name in names) or _in_folder(source, record.text("id"), record),
        groups,
        record,
        reference="discussion",
    )


def load_jama(repository: Repository, path: Path | None) -> Loaded:
    columns = ("link", "question", *JAMA_OPTIONS.values(), "answer_idx", "explanation")
    with repository.open(path) as source:
        return source.loaded(_jama(record, source) for record in source.records(columns, ("field",)))


def _jama(record: Record, source: Source) -> Row:
    found = _NUMBER_AT_THE_END.search(record.text("link"))
    if not found:
        raise record.error(f"the link is {shown(record.get('link'))}; expected one that ends in the article's number")
    letters, options = gold.options_by_letter(
        [(letter, record.get(column)) for letter, column in JAMA_OPTIONS.items()], record
    )
    # The site's own texts may begin with their letter.
    options = tuple(re.sub(rf"^{letter}\s*[.):]\s+", "", text) for letter, text in zip(letters, options, strict=True))
    return _case(
        source,
        found[1],
        record.text("question"),
        options,
        gold.letter_of_letter(record.get("answer_idx"), letters, record),
        _in_folder(source, found[1], record),
        {"field": record.text("field")} if record.get("field") else {},
        record,
        reference="explanation",
        collection="jama/",
    )


def load_medthinkvqa(repository: Repository, path: Path | None) -> Loaded:
    with repository.open(path) as source:
        records = source.records(
            ("title", "CLINICAL_HISTORY", "options", "correct_answer"),
            ("discussion", *MEDTHINKVQA_GROUPS.values(), *_SLOTS),
        )
        return source.loaded(_medthinkvqa(record, source) for record in records)


def _medthinkvqa(record: Record, source: Source) -> Row:
    found = _NUMBER_AT_THE_END.search(record.text("title"))
    if not found:
        raise record.error(f"the title is {shown(record.get('title'))}; expected one like 'Case number 19254'")
    value = record.get("options")
    value = gold.literal(value) if isinstance(value, str) else value
    if not isinstance(value, Mapping):
        raise record.error(f"the options are {shown(value)}; expected an object of letters and texts")
    letters, options = gold.options_by_letter(sorted(value.items()), record)
    groups = {name: str(record.get(column)) for name, column in MEDTHINKVQA_GROUPS.items()}
    names = [record.get(slot) for slot in _SLOTS if record.get(slot)]
    if not names:
        raise record.error("it has no image; download the data set again")
    return _case(
        source,
        f"eurorad/{found[1]}",
        f"{record.text('CLINICAL_HISTORY')}\n\n{MEDTHINKVQA_QUESTION}",
        options,
        gold.letter_of_letter(record.get("correct_answer"), letters, record),
        tuple(source.images.named(name) for name in names),
        groups,
        record,
        reference="discussion",
    )


def _case(
    source: Source,
    case: str,
    question: str,
    options: tuple[str, ...],
    answer: str,
    images: tuple[ImageRef, ...],
    groups: Mapping[str, str],
    record: Record,
    *,
    reference: str,
    collection: str = "",
) -> Row:
    """A case's row. reference: the column of its discussion; collection: what its number is one of."""
    text = record.get(reference)
    # Without a discussion the choice can be graded, the explanation can't: the rubric counts such cases.
    extra = {"reference": text.strip()} if isinstance(text, str) and text.strip() else {}
    return Row(
        benchmark=source.benchmark,
        id=case,
        question=question,
        question_type="multiple-choice",
        options=options,
        answer=answer,
        images=images,
        groups=groups,
        extra={"case": f"{collection}{case}", **extra},
    )


def _in_folder(source: Source, case: str, record: Record) -> tuple[ImageRef, ...]:
    """The pictures in images/<case>/, by name."""
    folder = f"images/{case}"
    names = source.images.names_in(folder)
    if not names:
        raise record.error(f"case {case} has no picture; put its pictures into {folder}/ beside the table")
    return tuple(source.images.named(name) for name in names)


def _medthinkvqa_pictures(folder: Path) -> list[str]:
    """The folders of the test cases' images: those of the 7,347 training cases are not wanted."""
    names = set()
    with (folder / MEDTHINKVQA_TABLE).open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line) if line.strip() else {}
            names |= {PurePosixPath(row[slot]).parent for slot in _SLOTS if isinstance(row.get(slot), str)}
    return sorted(f"{name}/*" for name in names)


_GUESSED = "Options alone are guessed far above chance, so read both controls first."

BENCHMARKS = (
    Benchmark(
        name="case-challenge",
        title="Cases of one's own",
        row_filter="all rows of the given table",
        expected_n=None,
        macro_over="question_type",
        note=f"The user's own cases. {_GUESSED}",
        load=partial(load_cases, Repository("case-challenge", None, ("cases.jsonl",))),
        controls=CONTROLS,
    ),
    Benchmark(
        name="jama-clinical-challenge",
        title="JAMA Clinical Challenge (the user's licence)",
        row_filter="all rows of the given table",
        expected_n=None,
        macro_over="field",
        note=(
            f"{_GUESSED} The texts and pictures are the publisher's: this folder holds them, so keep it to yourself."
        ),
        load=partial(load_jama, Repository("jama-clinical-challenge", None, ("jama_raw.json",))),
        controls=CONTROLS,
    ),
    Benchmark(
        name="medthinkvqa",
        title="MedThinkVQA",
        row_filter="all test rows; history and images without captions and findings",
        expected_n=720,
        macro_over="chapter",
        note=(
            f"Eurorad cases, CC BY-NC-SA 4.0. Block training on Eurorad by case number (python -m data.overlap). "
            f"{_GUESSED}"
        ),
        load=partial(
            load_medthinkvqa,
            Repository(
                "medthinkvqa",
                "bio-nlp-umass/MedThinkVQA",
                (MEDTHINKVQA_TABLE,),
                folders=("images",),
                named_files=_medthinkvqa_pictures,
            ),
        ),
        controls=CONTROLS,
    ),
)

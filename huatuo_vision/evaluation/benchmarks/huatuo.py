"""The HuatuoGPT-Vision bundle: the 17,303 rows on which the paper's tables 2, 3 and 8 were made. No torch here.

Design decisions:

- Rows: medical_multimodel_evaluation_data.json (its spelling), split by its column `dataset` into six benchmarks;
  `huatuo-bundle` runs all six. The id is the position in the whole file. Pictures are named in the list `image`, lie
  in images.zip, are read in place, and are all shown.
- `options` is a list, or a list written as a Python literal, also for yes/no rows: the bundle's own options and their
  order are kept. Gold is the option's TEXT: the first option that equals it counts, as in the official scorer
  (`options.index`), and a row with equal options says so in `notes`.
- huatuo-mmmu-val has 150 rows; its 5 open ones have no options. The official code neither asks nor counts them: the
  paper divides by 145. They are kept as open rows with hidden gold, so that they are answered, never graded, and n is
  145; mmmu-medical-val grades them.
- huatuo-omnimedvqa is a sample of 11,124 open-access questions: MR 4,040, CT 1,991, Ultrasound 1,354, X-Ray 1,019,
  Dermoscopy 796, Microscopy 728, Fundus Photography 626, OCT 570. Its modalities stand under clean names (the bundle
  writes "MR (Mag-netic Resonance Imaging)", "OCT (Optical Coherence Tomography"), and the macro average goes over
  them: the paper's table 3 is macro for all rows but one.
- Trap: 223 pictures are TIFF; the official code answers without what it cannot open. Trap: a gold "?" counts as wrong
  there; here it is hidden and not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from huatuo_vision.evaluation.benchmarks import gold
from huatuo_vision.evaluation.benchmarks.omnimedvqa import modality_name
from huatuo_vision.evaluation.benchmarks.sources import Record, Repository, Source
from huatuo_vision.evaluation.rows import HIDDEN, Benchmark, Loaded, Row
from huatuo_vision.schema import ImageRef

HUB_ID = "FreedomIntelligence/Medical_Multimodal_Evaluation_Data"
TABLE = "medical_multimodel_evaluation_data.json"
OMNIMEDVQA, MMMU, PMC_VQA = "OmniMedVQA", "MMMU_Medical_Validation", "PMC-VQA_test"


def load(repository: Repository, part: str, path: Path | None) -> Loaded:
    with repository.open(path) as source:
        return source.loaded(_rows(source, part))


def _rows(source: Source, part: str) -> Iterator[Row]:
    for record in source.records(("question", "answer", "image", "dataset"), ("options", "subset", "question_type")):
        if record.get("dataset") != part:
            continue
        if _is_open(record, part):
            options, answer, extra = None, HIDDEN, {"notes": ["the paper does not score this open question"]}
        else:
            options = gold.options_of(record.get("options"), record)
            answer, extra = gold.letter_of_text(record.text("answer"), options, record)
        yield Row(
            benchmark=source.benchmark,
            id=str(record.index),
            question=record.text("question"),
            question_type="open" if options is None else "multiple-choice",
            options=options,
            answer=answer,
            images=_pictures(source, record),
            groups=_groups(record, part),
            extra=extra,
        )


def _is_open(record: Record, part: str) -> bool:
    # Only MMMU has open questions: elsewhere, options that are missing are a damaged row.
    return part == MMMU and (record.get("question_type") == "open" or record.get("options") in (None, "", "[]", []))


def _pictures(source: Source, record: Record) -> tuple[ImageRef, ...]:
    value = record.get("image")
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise record.error("its image is no list of names; check that it is the right file")
    return tuple(source.images.named(name) for name in names)


def _groups(record: Record, part: str) -> dict[str, str]:
    if part == OMNIMEDVQA:
        return {"modality": modality_name(record.text("subset"))}
    if part == MMMU:
        return {"subject": record.text("subset").replace("_", " ")}
    return {} if part == PMC_VQA else {"answer_type": "closed"}


def _part(name: str, part: str, title: str, expected_n: int, macro_over: str, note: str) -> Benchmark:
    files = Repository(name, HUB_ID, (TABLE,), archives=("images.zip",), folders=("images",))
    row_filter = f"rows of the bundle with dataset {part}"
    return Benchmark(name, title, row_filter, expected_n, macro_over, note, partial(load, files, part))


BENCHMARKS = (
    _part(
        "huatuo-vqa-rad",
        "VQA-RAD_test",
        "VQA-RAD (HuatuoGPT-Vision's rows)",
        251,
        "answer_type",
        "The yes/no rows among VQA-RAD's 451 test rows.",
    ),
    _part(
        "huatuo-slake",
        "SLAKE_test",
        "SLAKE (HuatuoGPT-Vision's rows)",
        416,
        "answer_type",
        "The English closed rows of SLAKE: 355 yes/no and 61 others.",
    ),
    _part(
        "huatuo-pathvqa",
        "PathVQA_test",
        "PathVQA (HuatuoGPT-Vision's rows)",
        3_362,
        "answer_type",
        "The yes/no rows among PathVQA's 6,719 test rows.",
    ),
    _part(
        "huatuo-pmc-vqa",
        PMC_VQA,
        "PMC-VQA (HuatuoGPT-Vision's rows)",
        2_000,
        "question_type",
        "The clean test set, all of it.",
    ),
    _part(
        "huatuo-omnimedvqa",
        OMNIMEDVQA,
        "OmniMedVQA (HuatuoGPT-Vision's rows)",
        11_124,
        "modality",
        "An eighth of the open-access questions. The paper's averages are macro over the modalities, but for one row.",
    ),
    _part(
        "huatuo-mmmu-val",
        MMMU,
        "MMMU Health & Medicine, validation (HuatuoGPT-Vision's rows)",
        150,
        "subject",
        "145 of the 150 rows are scored; the 5 open ones are not, as in the paper.",
    ),
)

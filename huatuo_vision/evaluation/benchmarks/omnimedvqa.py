"""OmniMedVQA: questions made from the labels of 42 open-access data sets. No torch here.

Design decisions:

- Rows: every file of QA_information/Open-access in foreverbeliever/OmniMedVQA, in the order of the file names, all
  multiple choice. The id is "<file>/<position in it>": it depends on no listing order of a disk and stays the same
  when files are missing; the data set's `question_id` is kept beside it. One zip of 10.7 GB holds tables and
  pictures; both are read in place, or from its unpacked folder. Every picture is hashed, so loading reads all of it.
- Two to four options, in option_A to option_D, empty ones left out. Gold is a TEXT: the first option that equals it
  counts, and a row with equal options says so in `notes`.
- Groups: modality (eight, under the names of the paper's table), task (the data set's question_type), dataset.
- Trap: 127,995 questions with the restricted part; 88,995 to 89,195 open-access ones, depending on who counts. Trap:
  VLMEvalKit reads 14 of 30 parts, HuatuoGPT-Vision a sample of 11,124 (huatuo-omnimedvqa). Trap: macro over
  modalities and micro differ by 3 to 4 points.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from huatuo_vision.evaluation.benchmarks import gold
from huatuo_vision.evaluation.benchmarks.sources import Repository, Source
from huatuo_vision.evaluation.rows import Benchmark, Loaded, Row

NAME = "omnimedvqa"
FILES = Repository(
    NAME,
    "foreverbeliever/OmniMedVQA",
    tables=("QA_information/Open-access/*.json",),
    archives=("*.zip",),
    folders=("Images", "OmniMedVQA"),
    packed=True,
)
LETTERS = "ABCD"
COLUMNS = ("question", "option_A", "option_B", "gt_answer", "modality_type", "image_path")

# How a modality's published name begins, without case -> its name here.
MODALITIES = {
    "mr": "MR",
    "ct": "CT",
    "ultrasound": "Ultrasound",
    "x-ray": "X-Ray",
    "dermoscopy": "Dermoscopy",
    "microscopy": "Microscopy",
    "fundus": "Fundus Photography",
    "oct": "OCT",
}


def modality_name(published: str) -> str:
    """One name for the irregular ones: "CT(Computed Tomography)" is "CT"; an unknown one stays as it is."""
    start = published.strip().casefold()
    return next((name for prefix, name in MODALITIES.items() if start.startswith(prefix)), published.strip())


def load(path: Path | None) -> Loaded:
    with FILES.open(path) as source:
        return source.loaded(_rows(source))


def _rows(source: Source) -> Iterator[Row]:
    position: Counter[str] = Counter()
    for record in source.records(COLUMNS, ("option_C", "option_D", "question_type", "dataset", "question_id")):
        part = PurePosixPath(record.table).stem
        columns = [(letter, record.get(f"option_{letter}")) for letter in LETTERS]
        _, options = gold.options_by_letter(columns, record)
        answer, extra = gold.letter_of_text(record.text("gt_answer"), options, record)
        groups = {"modality": modality_name(record.text("modality_type"))}
        for group, column in {"task": "question_type", "dataset": "dataset"}.items():
            if record.get(column):
                groups[group] = record.text(column)
        yield Row(
            benchmark=NAME,
            id=f"{part}/{position[part]}",
            question=record.text("question"),
            question_type="multiple-choice",
            options=options,
            answer=answer,
            images=(source.images.named(record.text("image_path")),),
            groups=groups,
            extra=extra | ({"question_id": record.get("question_id")} if record.get("question_id") else {}),
        )
        position[part] += 1


OMNIMEDVQA = Benchmark(
    name=NAME,
    title="OmniMedVQA (open access)",
    row_filter="all rows of QA_information/Open-access",
    expected_n=88_996,
    macro_over="modality",
    note=(
        "Sources give 88,995 to 89,195 open-access questions; 88,996 is expected here. HuatuoGPT-Vision's numbers are "
        "on a sample of 11,124 (huatuo-omnimedvqa), and mix macro and micro averages."
    ),
    load=load,
)

"""Tiny data sets in the layouts in which the benchmarks are published, written on the spot.

`LAYOUTS[benchmark](folder)` writes a few rows for that benchmark and returns what to give to its `load`. Rows can be
changed: each writer takes the rows to write.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

Rows = Sequence[Mapping[str, Any]]

SUBJECTS = (
    "Basic_Medical_Science",
    "Clinical_Medicine",
    "Diagnostics_and_Laboratory_Medicine",
    "Pharmacy",
    "Public_Health",
)


def picture(shade: int, size: int = 4, kind: str = "PNG") -> bytes:
    """An encoded picture; other shades are other bytes."""
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (shade, 0, 255 - shade)).save(buffer, kind)
    return buffer.getvalue()


def cell(shade: int) -> dict[str, Any]:
    """A picture as a column of a Parquet file has it."""
    return {"bytes": picture(shade), "path": None}


def write_parquet(file: Path, rows: Rows, schema: pa.Schema | None = None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), file)


def write_json(file: Path, rows: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")


def write_lines(file: Path, rows: Rows) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_table(file: Path, rows: Rows, delimiter: str = ",") -> None:
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, list(dict.fromkeys(key for row in rows for key in row)), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write_zip(file: Path, members: Mapping[str, bytes]) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


# VQA-RAD and PathVQA: Parquet with the picture in a column.

SHORT_ANSWERS: Rows = (
    {"image": cell(1), "question": "is there a fracture?", "answer": "yes"},
    {"image": cell(1), "question": "which organ is shown? ", "answer": "the liver"},
    {"image": cell(2), "question": "are the lungs normal?", "answer": "No"},
    {"image": cell(3), "question": "left or right?", "answer": "left"},
)


def short_answers(folder: Path, rows: Rows = SHORT_ANSWERS) -> Path:
    half = (len(rows) + 1) // 2
    for number, part in enumerate((rows[:half], rows[half:])):
        if part:
            write_parquet(folder / "data" / f"test-0000{number}-of-00002-0123456789abcdef.parquet", part)
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", [SHORT_ANSWERS[0] | {"answer": "training"}])
    return folder


# SLAKE: test.json and imgs.zip.


def _slake_row(number: int, **change: Any) -> dict[str, Any]:
    return {
        "img_id": number, "img_name": f"xmlab{number}/source.jpg", "question": "What is this?", "answer": "Liver",
        "q_lang": "en", "location": "Abdomen", "modality": "CT", "answer_type": "OPEN", "base_type": "vqa",
        "triple": ["vhead", "_", "_"], "qid": 9000 + number, "content_type": "Organ",
    } | change  # fmt: skip


SLAKE: Rows = (
    _slake_row(1),
    _slake_row(1, question="这是什么?", answer="肝脏", q_lang="zh", qid=9101),
    _slake_row(2, question="Is it healthy?", answer="Yes", answer_type="CLOSED"),
    _slake_row(2, question="CT or MRI?", answer="MRI", answer_type="CLOSED", qid=9102),
    _slake_row(3, question="健康吗?", answer="是", q_lang="zh", answer_type="CLOSED"),
    _slake_row(3, question="Is it open?", answer="No", qid=9103),
)


def slake(folder: Path, rows: Rows = SLAKE, unpacked: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "test.json", list(rows))
    pictures = {f"imgs/xmlab{number}/source.jpg": picture(number) for number in (1, 2, 3)}
    if unpacked:
        for name, data in pictures.items():
            (folder / name).parent.mkdir(parents=True)
            (folder / name).write_bytes(data)
    else:
        write_zip(folder / "imgs.zip", {"__MACOSX/imgs/xmlab1/source.jpg": b"no picture"} | pictures)
    return folder


# PMC-VQA: a CSV and a zip.

PMC_VQA: Rows = (
    {
        "index": 0, "Figure_path": "PMC1_F1.jpg", "Question": "Which organ?", "Choice A": "A: Liver",
        "Choice B": " B:Spleen", "Choice C": "C: A. fumigatus, in red", "Choice D": "D: Heart", "Answer": "B",
    },
    {
        "index": 1, "Figure_path": "PMC1_F1.jpg", "Question": "Which stain?", "Choice A": " A: H&E",
        "Choice B": " B: PAS", "Choice C": " C: Silver", "Choice D": " D: Congo red", "Answer": "D",
    },
)  # fmt: skip
PMC_VQA_V1: Rows = tuple(
    {key: value for key, value in row.items() if key != "index"} | {"Answer": text, "Answer_label": row["Answer"]}
    for row, text in zip(PMC_VQA, ("Spleen", "Congo red"), strict=True)
)


def pmc_vqa(folder: Path, table: str, archive: str, rows: Rows) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_table(folder / table, rows)
    write_zip(folder / archive, {"figures/PMC1_F1.jpg": picture(7)})
    return folder


# OmniMedVQA: one zip that holds JSON files and pictures.


def omni_row(number: int, **change: Any) -> dict[str, Any]:
    return {
        "dataset": "Chest CT Scan", "question_id": f"Chest CT Scan_{number:04}", "question_type": "Disease Diagnosis",
        "question": "What is seen?", "gt_answer": "A cyst", "image_path": f"Images/Chest/{number}.png",
        "option_A": "A tumour", "option_B": "A cyst", "option_C": "Nothing", "option_D": "A stone",
        "modality_type": "CT(Computed Tomography)",
    } | change  # fmt: skip


def _without(row: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in keys}


OMNIMEDVQA: Mapping[str, Rows] = {
    "Chest CT Scan": (omni_row(0), omni_row(1, option_A="A cyst", gt_answer="A cyst")),
    "ACRIMA": (
        _without(omni_row(2, dataset="ACRIMA", modality_type="Fundus Photography"), "option_C", "option_D"),
        omni_row(3, dataset="ACRIMA", modality_type="OCT (Optical Coherence Tomography", gt_answer="a  STONE"),
    ),
}


def omnimedvqa(folder: Path, parts: Mapping[str, Rows] = OMNIMEDVQA, unpacked: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    restricted = json.dumps([omni_row(9, gt_answer="restricted")]).encode()
    members = {"OmniMedVQA/QA_information/Restricted-access/AIDA.json": restricted}
    for part, rows in parts.items():
        members[f"OmniMedVQA/QA_information/Open-access/{part}.json"] = json.dumps(list(rows)).encode()
    members |= {f"OmniMedVQA/Images/Chest/{number}.png": picture(number) for number in range(4)}
    if unpacked:
        for name, data in members.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
    else:
        write_zip(folder / "OmniMedVQA.zip", members)
    return folder


# MMMU and MMMU-Pro: Parquet with seven columns of pictures.

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
MMMU_SCHEMA = pa.schema(
    [(n, pa.string()) for n in ("id", "question", "options", "explanation")]
    + [(f"image_{n}", _IMAGE) for n in range(1, 8)]
    + [(n, pa.string()) for n in ("img_type", "answer", "topic_difficulty", "question_type", "subfield")]
)
PRO_SCHEMA = pa.schema(
    [(n, pa.string()) for n in ("id", "question", "options", "explanation")]
    + [(f"image_{n}", _IMAGE) for n in range(1, 8)]
    + [(n, pa.string()) for n in ("img_type", "answer", "topic_difficulty", "subject")]
)
VISION_SCHEMA = pa.schema(
    [("id", pa.string()), ("image", _IMAGE)] + [(n, pa.string()) for n in ("options", "answer", "subject")]
)


def mmmu_row(split: str, subject: str, number: int, **change: Any) -> dict[str, Any]:
    return {
        "id": f"{split}_{subject}_{number}", "question": "What does <image 1> show?",
        "options": "['Liver', \"Crohn's\", '<image 2>']", "explanation": "", "image_1": cell(10 + number),
        "img_type": "['CT']", "answer": "?" if split == "test" else "B", "topic_difficulty": "Easy",
        "question_type": "multiple-choice", "subfield": "Anatomy",
    } | change  # fmt: skip


def mmmu_rows(split: str, subject: str) -> Rows:
    hidden = split == "test"
    return (
        mmmu_row(split, subject, 1),
        mmmu_row(split, subject, 2, image_2=cell(99)),
        mmmu_row(
            split, subject, 3, question_type="open", options="[]", answer="?" if hidden else "['24/7', '3.429']"
        ),
    )  # fmt: skip


def mmmu(folder: Path, split: str, rows: Callable[[str, str], Rows] = mmmu_rows) -> Path:
    for subject in SUBJECTS:
        write_parquet(folder / subject / f"{split}-00000-of-00001.parquet", rows(split, subject), MMMU_SCHEMA)
    return folder


def pro_row(number: int, subject: str = "Pharmacy", **change: Any) -> dict[str, Any]:
    row = mmmu_row("test", subject, number, options=str([f"option {n}" for n in range(10)]), answer="J")
    return _without(row, "question_type", "subfield") | {"subject": subject} | change


PRO: Rows = (pro_row(1), pro_row(2, "History"), pro_row(3, "Public_Health", image_2=cell(98)))


def mmmu_pro(folder: Path, config: str, rows: Rows = PRO) -> Path:
    file = folder / config / "test-00000-of-00002.parquet"
    if config == "vision":
        vision = [
            {**{key: row[key] for key in ("id", "options", "answer", "subject")}, "image": row["image_1"]}
            for row in rows
        ]
        write_parquet(file, vision, VISION_SCHEMA)
    else:
        write_parquet(file, rows, PRO_SCHEMA)
    return folder


# MedXpertQA: JSON Lines and a zip.


def medxpert_row(number: int, **change: Any) -> dict[str, Any]:
    return {
        "id": f"MM-{number}", "question": "What is it?\nAnswer Choices: (A) Cyst (B) Stone (C) Clot (D) Scar (E) Gas",
        "options": {"A": "Cyst", "B": "Stone", "C": "Clot", "D": "Scar", "E": "Gas"}, "label": "E",
        "images": ["MM-0-a.jpeg"], "medical_task": "Diagnosis", "body_system": "Digestive",
        "question_type": "Reasoning",
    } | change  # fmt: skip


MEDXPERTQA: Rows = (
    medxpert_row(26),
    medxpert_row(27, images=["MM-0-b.jpeg", "MM-0-a.jpeg"], question_type="Understanding"),
)


def medxpertqa(folder: Path, rows: Rows = MEDXPERTQA) -> Path:
    write_lines(folder / "MM" / "test.jsonl", rows)
    write_lines(folder / "MM" / "dev.jsonl", [medxpert_row(0)])
    write_lines(folder / "Text" / "test.jsonl", [medxpert_row(1)])
    write_zip(
        folder / "images.zip", {f"images/MM-0-{letter}.jpeg": picture(ord(letter), kind="JPEG") for letter in "ab"}
    )
    return folder


# GMAI-MMBench: a TSV with base64 pictures.


def gmai_row(number: int, **change: Any) -> dict[str, Any]:
    return {
        "index": number, "image": base64.b64encode(picture(number)).decode(), "question": "What is\tthis?",
        "A": "Lung", "B": "Heart", "C": "Bone", "D": "", "E": "Eye", "answer": "E", "category": "x", "l2-category": "y",
        "split": "val", "clinical vqa task": "Organ Recognition", "department": "Surgery",
        "perceptual granularity": "image",
    } | change  # fmt: skip


# Larger than the CSV reader's usual limit of a cell.
LARGE = base64.b64encode(picture(5, size=4, kind="BMP") + bytes(200_000)).decode()
GMAI: Rows = (gmai_row(0, image="2"), gmai_row(1, image=LARGE), gmai_row(2, C="", E="", answer="B"))


def gmai(folder: Path, rows: Rows = GMAI) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_table(folder / "GMAI-MMBench_VAL.tsv", rows, delimiter="\t")
    return folder


# The HuatuoGPT-Vision bundle: one JSON file and images.zip.


def bundle_row(dataset: str, **change: Any) -> dict[str, Any]:
    return {
        "question": "What is it?", "options": ["Cyst", "Stone"], "answer": "Stone", "image": ["images/a.png"],
        "dataset": dataset, "subset": "",
    } | change  # fmt: skip


BUNDLE: Rows = (
    bundle_row("VQA-RAD_test", options=["yes", "no"], answer="no"),
    bundle_row("OmniMedVQA", subset="MR (Mag-netic Resonance Imaging)", image=["images/b.tif"]),
    bundle_row("SLAKE_test", options="['No', 'Yes']", answer="Yes"),
    bundle_row("OmniMedVQA", subset="ultrasound", options=["Stone", "Cyst", "Stone"]),
    bundle_row("PathVQA_test", options=["yes", "no"], answer="yes"),
    bundle_row("PMC-VQA_test"),
    bundle_row("MMMU_Medical_Validation", subset="Basic_Medical_Science", image=["images/a.png", "images/b.tif"]),
    bundle_row("MMMU_Medical_Validation", subset="Pharmacy", question_type="open", options=[], answer="7"),
    bundle_row("MMMU_Medical_Validation", subset="Pharmacy", answer="?"),
)


def bundle(folder: Path, rows: Rows = BUNDLE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "medical_multimodel_evaluation_data.json", list(rows))
    write_zip(folder / "images.zip", {"images/a.png": picture(20), "images/b.tif": picture(21, kind="TIFF")})
    return folder


# Clinical cases: a licence holder's scrape, MedThinkVQA, and cases of one's own.


def jama_row(number: int, **change: Any) -> dict[str, Any]:
    return {
        "id": number, "link": f"https://jamanetwork.com/journals/jama/fullarticle/28{number:05}",
        "question": f"A woman in her {2 + number}0s has a rash. What would you do next?",
        "opa": "Biopsy", "opb": "Wait", "opc": "C. Give steroids", "opd": "Amputate", "diagnosis": "Rash",
        "answer_idx": "ABCD"[number % 4], "answer": "",
        "explanation": f"The rash of case {number} is itchy. Biopsy shows spongiosis.",
        "field": ("Dermatology", "Neurology")[number % 2],
    } | change  # fmt: skip


JAMA: Rows = tuple(map(jama_row, range(3)))


def jama(folder: Path, rows: Rows = JAMA, pictures: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "jama_raw.json", list(rows))
    for number, row in enumerate(rows) if pictures else ():
        of_case = folder / "images" / str(row["link"]).rpartition("/")[2]
        of_case.mkdir(parents=True, exist_ok=True)
        for place in range(1 + number % 2):
            (of_case / f"{place}.png").write_bytes(picture(40 + 2 * number + place))
    return folder


def medthinkvqa_row(number: int, **change: Any) -> dict[str, Any]:
    return {
        "title": f"Case number {19250 + number}", "CLINICAL_HISTORY": f"A {40 + number}-year-old with hand pain.",
        "IMAGING_FINDINGS": "Oedema that must not be told.", "discussion": f"Case {number}: oedema suggests myositis.",
        "options": {"A": "Arthritis", "B": "Myositis", "C": "Sclerosis", "D": "Gout", "E": "Sprain"},
        "correct_answer": "ABCDE"[number % 5], "correct_answer_text": "", "ICD Chapter": "Chapter XIII",
        "is_longitudinal": False, "image_count": 2, "image_01_path": f"images/case{19250 + number}/a.jpg",
        "image_01_caption": "Oedema that must not be told.", "image_02_path": f"images/case{19250 + number}/b.jpg",
    } | change  # fmt: skip


MEDTHINKVQA: Rows = tuple(map(medthinkvqa_row, range(2)))


def medthinkvqa(folder: Path, rows: Rows = MEDTHINKVQA) -> Path:
    write_lines(folder / "test.jsonl", rows)
    for number, row in enumerate(rows):
        for name in (row["image_01_path"], row["image_02_path"]):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(picture(60 + 2 * number + name.endswith("b.jpg"), kind="JPEG"))
    return folder


def case_row(number: int, **change: Any) -> dict[str, Any]:
    return {
        "id": f"case-{number}", "question": f"Patient {number} coughs. Which diagnosis?",
        "options": ["Pneumonia", "Cancer", "Asthma"], "answer": "ABC"[number % 3],
        "images": [f"images/{number}.png"], "discussion": f"Patient {number} has fever and consolidation.",
        "reasoning": ("inference", "knowledge")[number % 2],
    } | change  # fmt: skip


CASES: Rows = tuple(map(case_row, range(3)))


def cases(folder: Path, rows: Rows = CASES) -> Path:
    write_lines(folder / "cases.jsonl", rows)
    (folder / "images").mkdir()
    for number in range(len(rows)):
        (folder / "images" / f"{number}.png").write_bytes(picture(80 + number))
    return folder


# The demonstration's own.


def phantom(folder: Path) -> Path:
    row = {
        "id": "phantom_test_1", "image": ["images/1.png"], "question": "Which?", "options": ["yes", "no"],
        "answer": "B", "answer_text": "no", "question_type": "multiple-choice", "groups": {"subject": "finding"},
    }  # fmt: skip
    write_json(folder / "phantom_test.json", [row])
    write_json(folder / "manifest.json", {"generator_version": 3})
    (folder / "images").mkdir()
    (folder / "images" / "1.png").write_bytes(picture(1))
    return folder


def phantom_follow_up(folder: Path) -> Path:
    row = {
        "id": "follow_up_1", "image": ["images/1.png"], "question": "Which?", "options": ["yes", "no"], "answer": "B",
        "groups": {"modality": "CT"},
    }  # fmt: skip
    write_json(folder / "phantom_follow_up.json", [row])
    (folder / "images").mkdir()
    (folder / "images" / "1.png").write_bytes(picture(1))
    return folder


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "phantom": phantom,
    "phantom-large": phantom,
    "phantom-follow-up": phantom_follow_up,
    "vqa-rad": short_answers,
    "slake-en": slake,
    "slake-zh": slake,
    "pathvqa": short_answers,
    "pmc-vqa": partial(pmc_vqa, table="test_clean.csv", archive="images.zip", rows=PMC_VQA),
    "pmc-vqa-v1": partial(pmc_vqa, table="test.csv", archive="images.zip", rows=PMC_VQA_V1),
    "pmc-vqa-v2": partial(pmc_vqa, table="test_2.csv", archive="images_2.zip", rows=PMC_VQA),
    "omnimedvqa": omnimedvqa,
    "mmmu-medical-dev": partial(mmmu, split="dev"),
    "mmmu-medical-val": partial(mmmu, split="validation"),
    "mmmu-medical-test": partial(mmmu, split="test"),
    "mmmu-pro-medical": partial(mmmu_pro, config="standard (10 options)"),
    "mmmu-pro-medical-4": partial(mmmu_pro, config="standard (4 options)"),
    "mmmu-pro-medical-vision": partial(mmmu_pro, config="vision"),
    "medxpertqa-mm": medxpertqa,
    "gmai-mmbench-val": gmai,
    "jama-clinical-challenge": jama,
    "medthinkvqa": medthinkvqa,
    "case-challenge": cases,
} | {f"huatuo-{part}": bundle for part in ("vqa-rad", "slake", "pathvqa", "pmc-vqa", "omnimedvqa", "mmmu-val")}


def many(row: Callable[[int], Mapping[str, Any]], numbers: Iterable[int]) -> Rows:
    return tuple(row(number) for number in numbers)

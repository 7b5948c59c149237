"""Every benchmark from the layout in which it is published, and a clear sentence for everything that is not so."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from huatuo_vision.evaluation.benchmarks import BENCHMARKS, SETS, gold, phantom
from huatuo_vision.evaluation.benchmarks.omnimedvqa import modality_name
from huatuo_vision.evaluation.rows import HIDDEN, Loaded, Row
from huatuo_vision.inputs.images import load_image
from huatuo_vision.schema import ImageRef, UserError
from tests.evaluation import layouts
from tests.fake_hub import Blob, FakeHub, Refusal

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HOME", str(tmp_path_factory.mktemp("home")))
        yield Path(constants.HF_HOME)


def load(name: str, path: Path) -> Loaded:
    return BENCHMARKS[name].load(path)


def refusal(name: str, path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load(name, path)
    text = str(caught.value)
    assert text.startswith(f"{name}: ") and "\n" not in text and "Traceback" not in text, text
    return text


def encoded(ref: ImageRef) -> bytes:
    if ref.data is not None:
        return ref.data
    if ref.path is not None:
        return Path(ref.path).read_bytes()
    with zipfile.ZipFile(ref.archive) as archive:
        return archive.read(ref.member)


def shades(row: Row) -> list[int]:
    """Which of the layouts' pictures a row shows: their red."""
    return [load_image(ref, row.id).image.getpixel((0, 0))[0] for ref in row.images]


# All of them


def test_every_benchmark_has_a_layout_here():
    assert set(layouts.LAYOUTS) == set(BENCHMARKS)
    assert all(name == benchmark.name for name, benchmark in BENCHMARKS.items())
    assert all(set(names) <= set(BENCHMARKS) for names in SETS.values())


@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_rows_are_whole(name: str, tmp_path: Path):
    benchmark = BENCHMARKS[name]
    loaded = load(name, layouts.LAYOUTS[name](tmp_path / "data"))
    assert loaded.rows
    assert len({row.id for row in loaded.rows}) == len(loaded.rows)
    for row in loaded.rows:
        assert row.benchmark == name and row.question == row.question.strip() != ""
        assert row.images and all(ref.sha256 == hashlib.sha256(encoded(ref)).hexdigest() for ref in row.images)
        if not name.startswith("gmai"):  # one picture there is stuffed to be large
            assert len(shades(row)) == len(row.images)
        json.dumps([row.groups, row.extra])
        # scores.py adds the group question_type to every row.
        assert benchmark.macro_over in {*row.groups, "question_type"}
        if row.question_type == "multiple-choice":
            assert isinstance(row.options, tuple) and all(isinstance(option, str) for option in row.options)
            assert row.answer == HIDDEN or row.answer in "ABCDEFGHIJ"[: len(row.options)]
        else:
            assert row.question_type == "open" and row.options is None and row.answer


@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_the_same_data_elsewhere_is_the_same_benchmark(name: str, tmp_path: Path):
    first = load(name, layouts.LAYOUTS[name](tmp_path / "one"))
    second = load(name, layouts.LAYOUTS[name](tmp_path / "other" / "place"))
    assert first.revision == second.revision and "sha256:" in first.revision
    for a, b in zip(first.rows, second.rows, strict=True):
        assert (a.id, a.question, a.options, a.answer, a.groups) == (b.id, b.question, b.options, b.answer, b.groups)
        assert [ref.sha256 for ref in a.images] == [ref.sha256 for ref in b.images]


def test_expected_counts_are_the_published_ones():
    expected = {
        "phantom": 600, "phantom-large": 1_800, "phantom-follow-up": 600,
        "vqa-rad": 451, "slake-en": 645 + 416, "slake-zh": 613 + 420, "pathvqa": 6_719,
        "pmc-vqa": 2_000, "pmc-vqa-v1": 50_000, "pmc-vqa-v2": 33_430, "omnimedvqa": 88_996, "mmmu-medical-dev": 25,
        "mmmu-medical-val": 150, "mmmu-medical-test": 326 + 325 + 162 + 430 + 509, "mmmu-pro-medical": 286,
        "mmmu-pro-medical-4": 286, "mmmu-pro-medical-vision": 286, "medxpertqa-mm": 2_000, "gmai-mmbench-val": 4_550,
        "huatuo-vqa-rad": 251, "huatuo-slake": 416, "huatuo-pathvqa": 3_362, "huatuo-pmc-vqa": 2_000,
        "huatuo-omnimedvqa": 4_040 + 1_991 + 1_354 + 1_019 + 796 + 728 + 626 + 570, "huatuo-mmmu-val": 145 + 5,
        "case-challenge": None, "jama-clinical-challenge": None, "medthinkvqa": 720,
    }  # fmt: skip
    assert {name: benchmark.expected_n for name, benchmark in BENCHMARKS.items()} == expected
    assert SETS["huatuo-bundle"] == tuple(name for name in expected if name.startswith("huatuo-"))
    assert sum(expected[name] for name in SETS["huatuo-bundle"]) == 17_303


def test_another_number_of_rows_is_no_error(tmp_path: Path):
    assert len(load("vqa-rad", layouts.short_answers(tmp_path)).rows) != BENCHMARKS["vqa-rad"].expected_n


def test_loading_needs_neither_torch_nor_datasets(tmp_path: Path):
    for name in ("vqa-rad", "medxpertqa-mm"):
        layouts.LAYOUTS[name](tmp_path / name)
    code = (
        "import sys; from pathlib import Path; from huatuo_vision.evaluation.benchmarks import BENCHMARKS\n"
        f"[BENCHMARKS[n].load(Path({str(tmp_path)!r}) / n) for n in ('vqa-rad', 'medxpertqa-mm')]\n"
        "assert not {'torch', 'transformers', 'datasets', 'accelerate'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# One by one


@pytest.mark.parametrize("name", ["vqa-rad", "pathvqa"])
def test_short_answers(name: str, tmp_path: Path):
    rows = load(name, layouts.short_answers(tmp_path)).rows
    assert [(row.id, row.options, row.answer, row.groups["answer_type"]) for row in rows] == [
        ("0", ("Yes", "No"), "A", "closed"),
        ("1", None, "the liver", "open"),
        ("2", ("Yes", "No"), "B", "closed"),
        ("3", None, "left", "open"),
    ]
    assert [shades(row) for row in rows] == [[1], [1], [2], [3]]
    # Equal pictures are one object in memory.
    assert rows[0].images[0] is rows[1].images[0]


@pytest.mark.parametrize("unpacked", [False, True])
def test_slake_by_language(unpacked: bool, tmp_path: Path):
    folder = layouts.slake(tmp_path, unpacked=unpacked)
    english = load("slake-en", folder).rows
    assert [(row.id, row.question_type, row.answer, row.groups["answer_type"]) for row in english] == [
        ("0", "open", "Liver", "open"),
        ("2", "multiple-choice", "A", "closed"),
        ("3", "open", "MRI", "closed"),
        ("5", "open", "No", "open"),
    ]
    assert [shades(row) for row in english] == [[1], [2], [2], [3]]
    assert english[0].groups == {
        "answer_type": "open",
        "modality": "CT",
        "location": "Abdomen",
        "content_type": "Organ",
    }
    assert english[0].extra == {"qid": 9001}
    assert (english[0].images[0].archive is None) == unpacked
    chinese = load("slake-zh", folder).rows
    assert [(row.id, row.question_type, row.answer, row.groups["answer_type"]) for row in chinese] == [
        ("1", "open", "肝脏", "open"),
        ("4", "open", "是", "closed"),
    ]


@pytest.mark.parametrize("name", ["pmc-vqa", "pmc-vqa-v1", "pmc-vqa-v2"])
def test_pmc_vqa_loses_its_prefixes(name: str, tmp_path: Path):
    rows = load(name, layouts.LAYOUTS[name](tmp_path)).rows
    assert rows[0].options == ("Liver", "Spleen", "A. fumigatus, in red", "Heart")
    assert [(row.id, row.answer) for row in rows] == [("0", "B"), ("1", "D")]
    assert rows[0].images[0].member == "figures/PMC1_F1.jpg"


def test_pmc_vqa_gold_as_text(tmp_path: Path):
    rows = [row | {"Answer": text} for row, text in zip(layouts.PMC_VQA, (" B:Spleen ", "congo red"), strict=True)]
    loaded = load("pmc-vqa", layouts.LAYOUTS["pmc-vqa"](tmp_path, rows=rows))
    assert [row.answer for row in loaded.rows] == ["B", "D"]


def test_pmc_vqa_traps(tmp_path: Path):
    choices = {"Choice A": "A. fumigatus", "Choice B": "B: Yeast", "Choice C": "C: Yeast", "Choice D": "D:"}
    rows = [layouts.PMC_VQA_V1[0] | choices | {"Answer": "Yeast", "Answer_label": "C"}]
    (row,) = load("pmc-vqa-v1", layouts.LAYOUTS["pmc-vqa-v1"](tmp_path, rows=rows)).rows
    # A genus is no prefix, the label wins over the text, and a choice that is nothing but its prefix stays a choice.
    assert row.options == ("A. fumigatus", "Yeast", "Yeast", "D:") and row.answer == "C"


@pytest.mark.parametrize("unpacked", [False, True])
def test_omnimedvqa(unpacked: bool, tmp_path: Path):
    folder = layouts.omnimedvqa(tmp_path, unpacked=unpacked)
    rows = load("omnimedvqa", folder).rows
    # Files by name, without the restricted ones.
    assert [(row.id, row.answer, row.groups["modality"]) for row in rows] == [
        ("ACRIMA/0", "B", "Fundus Photography"),
        ("ACRIMA/1", "D", "OCT"),
        ("Chest CT Scan/0", "B", "CT"),
        ("Chest CT Scan/1", "A", "CT"),
    ]
    assert rows[0].options == ("A tumour", "A cyst")
    assert [shades(row) for row in rows] == [[2], [3], [0], [1]]
    assert rows[3].extra["notes"] == ["the options A and B are equal; A counts as the right one"]
    assert "case and spacing" in rows[1].extra["notes"][0] and "notes" not in rows[2].extra
    assert rows[2].groups == {"modality": "CT", "task": "Disease Diagnosis", "dataset": "Chest CT Scan"}


def test_omnimedvqa_by_its_archive_or_one_part(tmp_path: Path):
    folder = layouts.omnimedvqa(tmp_path / "a")
    (folder / "other.zip").write_bytes(b"of no concern")
    assert len(load("omnimedvqa", folder / "OmniMedVQA.zip").rows) == 4
    part = layouts.omnimedvqa(tmp_path / "b", unpacked=True) / "OmniMedVQA/QA_information/Open-access/ACRIMA.json"
    # Its pictures lie two folders above.
    assert [row.id for row in load("omnimedvqa", part).rows] == ["ACRIMA/0", "ACRIMA/1"]


@pytest.mark.parametrize(
    ("published", "name"),
    [
        ("MR (Mag-netic Resonance Imaging)", "MR"), ("CT(Computed Tomography)", "CT"), ("ultrasound", "Ultrasound"),
        ("OCT (Optical Coherence Tomography", "OCT"), ("X-Ray", "X-Ray"), ("Fundus Photography", "Fundus Photography"),
        ("Microscopy Images", "Microscopy"), ("Dermoscopy", "Dermoscopy"), ("Endoscopy", "Endoscopy"),
    ],
)  # fmt: skip
def test_modalities_have_clean_names(published: str, name: str):
    assert modality_name(published) == name


def test_mmmu(tmp_path: Path):
    rows = load("mmmu-medical-val", layouts.mmmu(tmp_path, "validation")).rows
    assert [row.id for row in rows[::3]] == [f"validation_{subject}_1" for subject in layouts.SUBJECTS]
    choice, several, opened = rows[:3]
    assert choice.options == ("Liver", "Crohn's", "<image 2>") and choice.answer == "B"
    assert choice.question == "What does <image 1> show?"
    assert (shades(choice), shades(several)) == ([11], [12, 99])
    assert (opened.question_type, opened.options, opened.answer) == ("open", None, ("24/7", "3.429"))
    assert choice.groups == {"subject": "Basic Medical Science", "topic_difficulty": "Easy", "subfield": "Anatomy"}


def test_mmmu_of_other_subjects_is_left_out(tmp_path: Path):
    rows = [layouts.mmmu_row("dev", subject, 1) for subject in ("History", "Pharmacy")]
    layouts.write_parquet(tmp_path / "all.parquet", rows, layouts.MMMU_SCHEMA)
    assert [row.id for row in load("mmmu-medical-dev", tmp_path / "all.parquet").rows] == ["dev_Pharmacy_1"]


def test_mmmu_test_hides_its_answers(tmp_path: Path):
    rows = load("mmmu-medical-test", layouts.mmmu(tmp_path, "test")).rows
    assert {row.answer for row in rows} == {HIDDEN}
    assert [row.question_type for row in rows[:3]] == ["multiple-choice", "multiple-choice", "open"]


def test_mmmu_pro_keeps_the_medical_subjects(tmp_path: Path):
    rows = load("mmmu-pro-medical", layouts.mmmu_pro(tmp_path, "standard (10 options)")).rows
    assert [(row.id, row.answer, len(row.options), row.groups["subject"]) for row in rows] == [
        ("test_Pharmacy_1", "J", 10, "Pharmacy"),
        ("test_Public_Health_3", "J", 10, "Public Health"),
    ]
    assert [shades(row) for row in rows] == [[11], [13, 98]]


def test_mmmu_pro_vision_says_where_its_options_are(tmp_path: Path):
    rows = load("mmmu-pro-medical-vision", layouts.mmmu_pro(tmp_path, "vision")).rows
    assert [(row.extra, len(row.options), shades(row)) for row in rows] == [
        ({"options_in_image": True}, 10, [11]),
        ({"options_in_image": True}, 10, [13]),
    ]


def test_medxpertqa(tmp_path: Path):
    rows = load("medxpertqa-mm", layouts.medxpertqa(tmp_path)).rows
    assert [row.id for row in rows] == ["MM-26", "MM-27"]
    assert rows[0].question == "What is it?"
    assert rows[0].options == ("Cyst", "Stone", "Clot", "Scar", "Gas") and rows[0].answer == "E"
    assert rows[0].groups == {"task": "Diagnosis", "body_system": "Digestive", "skill": "Reasoning"}
    assert [ref.member for ref in rows[1].images] == ["images/MM-0-b.jpeg", "images/MM-0-a.jpeg"]


def test_medxpertqa_cuts_only_the_choices(tmp_path: Path):
    listed = [{"letter": letter, "content": text} for letter, text in zip("ABCDE", "vwxyz", strict=True)]
    question = "Which 'Answer Choices: (A)' is meant? Answer Choices: (A) v (B) w"
    row = layouts.medxpert_row(1, question=question, options=listed)
    (loaded,) = load("medxpertqa-mm", layouts.medxpertqa(tmp_path, [row])).rows
    assert loaded.question == "Which 'Answer Choices: (A)' is meant?"
    assert loaded.options == ("v", "w", "x", "y", "z")


def test_jama_cases_are_found_by_their_articles(tmp_path: Path):
    loaded = load("jama-clinical-challenge", layouts.jama(tmp_path))
    assert [row.id for row in loaded.rows] == ["2800000", "2800001", "2800002"]
    second = loaded.rows[1]
    assert (second.options, second.answer) == (("Biopsy", "Wait", "Give steroids", "Amputate"), "B")
    assert shades(second) == [42, 43] and second.groups == {"field": "Neurology"}
    assert second.extra == {
        "case": "jama/2800001",
        "reference": "The rash of case 1 is itchy. Biopsy shows spongiosis.",
    }
    file = load("jama-clinical-challenge", tmp_path / "jama_raw.json")
    assert [row.id for row in file.rows] == [row.id for row in loaded.rows]
    searched = [row | {"link": f"{row['link']}?resultClick=1"} for row in layouts.JAMA]
    layouts.write_json(tmp_path / "jama_raw.json", searched)
    assert load("jama-clinical-challenge", tmp_path).rows == loaded.rows
    without = layouts.jama(tmp_path / "bare", pictures=False)
    assert "case 2800000 has no picture; put its pictures into images/2800000/" in refusal(
        "jama-clinical-challenge", without
    )


@pytest.mark.parametrize("name", ["jama-clinical-challenge", "case-challenge"])
def test_what_nobody_may_hand_on_is_not_downloaded(name: str, tmp_path: Path):
    with pytest.raises(UserError, match=f"{name}: it can't be downloaded; give the folder .* {name}=PATH"):
        BENCHMARKS[name].load(None)
    assert "expected" in refusal(name, tmp_path) and "evaluation/README.md" in refusal(name, tmp_path)


def test_medthinkvqa_shows_neither_captions_nor_findings(tmp_path: Path):
    first, second = load("medthinkvqa", layouts.medthinkvqa(tmp_path)).rows
    assert first.id == first.extra["case"] == "eurorad/19250"
    assert first.question == "A 40-year-old with hand pain.\n\nWhat is the most likely diagnosis?"
    assert (second.options[1], second.answer, shades(second)) == ("Myositis", "B", [62, 63])
    assert first.groups == {"chapter": "Chapter XIII", "longitudinal": "False"}
    assert "must not be told" not in json.dumps([first.question, first.options, first.extra])


def test_own_cases(tmp_path: Path):
    rows = [layouts.case_row(0), layouts.case_row(1, images=None, discussion=""), layouts.case_row(2, reasoning=None)]
    folder = layouts.cases(tmp_path, rows)
    (folder / "images" / "case-1").mkdir()
    for name in ("b.png", "a.png", ".hidden"):
        (folder / "images" / "case-1" / name).write_bytes(layouts.picture(ord(name[0])))
    first, second, third = load("case-challenge", folder).rows
    assert first.groups == {"reasoning": "inference"} and third.groups == {}
    assert shades(second) == [ord("a"), ord("b")] and "reference" not in second.extra
    for change, said in (
        ({"reasoning": "guessing"}, "reasoning is 'guessing'; expected knowledge or inference"),
        ({"answer": "D"}, "the letter of one of its options, A, B, C"),
        ({"images": [1]}, "expected a list of file names"),
        ({"id": "../x", "images": []}, "case ../x has no picture"),
    ):
        layouts.write_lines(folder / "cases.jsonl", [layouts.case_row(0, **change)])
        assert said in refusal("case-challenge", folder)


def test_gmai(tmp_path: Path, home: Path):
    rows = load("gmai-mmbench-val", layouts.gmai(tmp_path)).rows
    assert [row.id for row in rows] == ["0", "1", "2"]
    # Column E is the fourth option where D is empty.
    assert [(row.options, row.answer) for row in rows[1:]] == [
        (("Lung", "Heart", "Bone", "Eye"), "D"),
        (("Lung", "Heart"), "B"),
    ]
    assert rows[0].question == "What is\tthis?"
    # The first row's picture is the third's, by its index; the second's is a cell of more than 131,072 characters.
    assert shades(rows[0]) == shades(rows[2]) == [2] and len(encoded(rows[1].images[0])) > 200_000
    # In files, not in memory; what a killed run left half written is mended.
    (kept,) = (Path(ref.path) for ref in rows[1].images)
    assert kept.is_relative_to(home) and hashlib.sha256(kept.read_bytes()).hexdigest() == rows[1].images[0].sha256
    kept.write_bytes(b"half")
    assert encoded(load("gmai-mmbench-val", tmp_path).rows[1].images[0]) != b"half"
    assert rows[0].groups == {"task": "Organ Recognition", "department": "Surgery", "granularity": "image"}


def test_the_bundle(tmp_path: Path):
    folder = layouts.bundle(tmp_path)
    rows = {name: load(name, folder).rows for name in SETS["huatuo-bundle"]}
    found = {name: [(row.id, row.answer, row.options) for row in part] for name, part in rows.items()}
    assert found == {
        "huatuo-vqa-rad": [("0", "B", ("yes", "no"))],
        "huatuo-slake": [("2", "B", ("No", "Yes"))],
        "huatuo-pathvqa": [("4", "A", ("yes", "no"))],
        "huatuo-pmc-vqa": [("5", "B", ("Cyst", "Stone"))],
        "huatuo-omnimedvqa": [("1", "B", ("Cyst", "Stone")), ("3", "A", ("Stone", "Cyst", "Stone"))],
        "huatuo-mmmu-val": [("6", "B", ("Cyst", "Stone")), ("7", HIDDEN, None), ("8", HIDDEN, ("Cyst", "Stone"))],
    }
    assert [row.groups["modality"] for row in rows["huatuo-omnimedvqa"]] == ["MR", "Ultrasound"]
    assert [row.groups["subject"] for row in rows["huatuo-mmmu-val"]] == ["Basic Medical Science", *["Pharmacy"] * 2]
    assert "A and C are equal" in rows["huatuo-omnimedvqa"][1].extra["notes"][0]
    assert rows["huatuo-mmmu-val"][1].question_type == "open"
    # The TIFF is there, and so are both pictures of a row with two.
    assert [shades(row) for row in rows["huatuo-mmmu-val"]] == [[20, 21], [20], [20]]


def test_the_bundle_with_one_image_as_text(tmp_path: Path):
    (row,) = load(
        "huatuo-slake", layouts.bundle(tmp_path, [layouts.bundle_row("SLAKE_test", image="images/a.png")])
    ).rows
    assert shades(row) == [20]


def test_the_bundle_by_its_file(tmp_path: Path):
    file = layouts.bundle(tmp_path) / "medical_multimodel_evaluation_data.json"
    assert load("huatuo-slake", file) == load("huatuo-slake", tmp_path)


def test_phantom_is_drawn_where_no_path_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = layouts.phantom(tmp_path / "made")
    asked = []
    monkeypatch.setattr(phantom, "make_phantom", lambda cache, **arguments: asked.append(arguments) or folder)
    loaded = BENCHMARKS["phantom"].load(None)
    assert asked == [{"train": 0, "test": 600, "seed": 0}]
    assert loaded == load("phantom", folder) and loaded.revision.startswith("generator 3, sha256:")
    (row,) = loaded.rows
    assert (row.id, row.options, row.answer, row.groups) == (
        "phantom_test_1",
        ("yes", "no"),
        "B",
        {"subject": "finding"},
    )


# Where the files lie


@pytest.mark.parametrize(
    ("name", "table"),
    [("slake-en", "test.json"), ("medxpertqa-mm", "MM/test.jsonl"), ("pmc-vqa", "test_clean.csv")],
)
def test_a_table_file_is_enough_with_its_images_beside_it(name: str, table: str, tmp_path: Path):
    folder = layouts.LAYOUTS[name](tmp_path)
    assert load(name, folder / table) == load(name, folder)


def test_one_parquet_file_of_several(tmp_path: Path):
    file = layouts.mmmu(tmp_path, "validation") / "Pharmacy" / "validation-00000-of-00001.parquet"
    assert {row.groups["subject"] for row in load("mmmu-medical-val", file).rows} == {"Pharmacy"}


def test_other_rows_are_another_revision(tmp_path: Path):
    first = load("medxpertqa-mm", layouts.medxpertqa(tmp_path / "a")).revision
    changed = load("medxpertqa-mm", layouts.medxpertqa(tmp_path / "b", layouts.MEDXPERTQA[:1])).revision
    assert first != changed and len(first) == len("sha256:") + 16


def test_pictures_outside_the_folder_are_not_read(tmp_path: Path):
    (tmp_path / "secret.png").write_bytes(layouts.picture(1))
    for name in ("../secret.png", str(tmp_path / "secret.png")):
        rows = [layouts.medxpert_row(1, images=[name])]
        assert "images are missing" in refusal("medxpertqa-mm", layouts.medxpertqa(tmp_path / "data", rows))


def test_an_image_is_never_another_one_of_the_same_name(tmp_path: Path):
    folder = layouts.medxpertqa(tmp_path)
    layouts.write_zip(folder / "images.zip", {f"{n}/MM-0-a.jpeg": layouts.picture(n) for n in (1, 2)})
    rows = [layouts.medxpert_row(1)]
    layouts.write_lines(folder / "MM" / "test.jsonl", rows)
    assert "the image MM-0-a.jpeg is ambiguous" in refusal("medxpertqa-mm", folder)
    layouts.write_zip(folder / "images.zip", {f"{n}/MM-0-a.jpeg": layouts.picture(1) for n in (1, 2)})
    assert len(load("medxpertqa-mm", folder).rows) == 1


# Mistakes


def _bundle(**change: object) -> Callable[[Path], Path]:
    return lambda folder: layouts.bundle(folder, [layouts.BUNDLE[5], layouts.bundle_row("PMC-VQA_test", **change)])


def _omni(**change: object) -> Callable[[Path], Path]:
    return lambda folder: layouts.omnimedvqa(folder, {"ACRIMA": [layouts.omni_row(0), layouts.omni_row(1, **change)]})


def _medxpert(*rows: dict) -> Callable[[Path], Path]:
    return lambda folder: layouts.medxpertqa(folder, rows)


def _gmai(**change: object) -> Callable[[Path], Path]:
    return lambda folder: layouts.gmai(folder, [layouts.gmai_row(0), layouts.gmai_row(1, **change)])


def _slake(**change: object) -> Callable[[Path], Path]:
    return lambda folder: layouts.slake(folder, [layouts.SLAKE[0], {**layouts.SLAKE[2], **change}])


def _short(row: dict) -> Callable[[Path], Path]:
    return lambda folder: layouts.short_answers(folder, [row])


BUNDLE_FILE = "medical_multimodel_evaluation_data.json"
MISTAKES = {
    "gold text is no option": (
        "huatuo-pmc-vqa", _bundle(answer="Clot"),
        f"row 2 of {BUNDLE_FILE}: the gold answer 'Clot' is none of its options (Cyst; Stone)",
    ),
    "gold text is no option of a packed part": (
        "omnimedvqa", _omni(gt_answer="Gas"),
        "row 2 of OmniMedVQA/QA_information/Open-access/ACRIMA.json: the gold answer 'Gas' is none of its options",
    ),
    "options are a sentence": ("huatuo-pmc-vqa", _bundle(options="A or B"), "row 2", "expected a list of texts"),
    "options are missing": ("huatuo-pmc-vqa", _bundle(options=None), "row 2", "expected a list of texts"),
    "options are an object": (
        "huatuo-pmc-vqa", _bundle(options={"A": "Stone"}), "row 2", "expected a list of texts",
    ),
    "no options": ("huatuo-pmc-vqa", _bundle(options=[]), "it has 0 options; expected 1 to 26"),
    "options without letters": (
        "medxpertqa-mm", _medxpert(layouts.medxpert_row(1, options="Cyst")), "row 1 of MM/test.jsonl", "no object",
    ),
    "gold letter beyond the options": (
        "medxpertqa-mm", _medxpert(layouts.medxpert_row(1, label="F")),
        "row 1", "the gold answer is 'F'", "A, B, C, D, E",
    ),
    "gold letter of an empty option": ("gmai-mmbench-val", _gmai(answer="D"), "row 2", "'D'", "A, B, C, E"),
    "image is not base64": ("gmai-mmbench-val", _gmai(image="?" * 80), "row 2", "not base64"),
    "image is that of no row": (
        "gmai-mmbench-val", _gmai(image="77"), "row 2", "neither base64 nor the index of a row",
    ),
    "duplicate ids": (
        "medxpertqa-mm", _medxpert(layouts.medxpert_row(1), layouts.medxpert_row(1)), "two rows have the id 'MM-1'",
    ),
    "no rows": ("medxpertqa-mm", _medxpert(), "MM/test.jsonl holds no rows"),
    "no row of that part": ("huatuo-slake", _bundle(), "no row of", "belongs to it"),
    "unknown columns": (
        "vqa-rad", _short({"picture": b"x", "text": "q", "label": "a"}),
        "has the columns picture, text, label; expected also image, question, answer",
    ),
    "a row without a key": (
        "slake-en", lambda folder: layouts.slake(folder, [{"question": "q"}]),
        "row 1 of test.json has the columns question; expected also img_name, answer, q_lang, answer_type",
    ),
    "empty question": ("slake-en", _slake(question="  "), "row 2 of test.json: the column 'question' holds '  '"),
    "unknown answer type": ("slake-en", _slake(answer_type="MAYBE"), "row 2", "the answer_type is 'maybe'"),
    "open gold is nothing": (
        "mmmu-medical-val",
        lambda folder: layouts.mmmu(folder, "validation", lambda split, subject: [
            layouts.mmmu_row(split, subject, 1, question_type="open", answer=""),
        ]),
        "row 1 of Basic_Medical_Science/validation-00000-of-00001.parquet: the gold answer is ''",
    ),
    "unknown kind of question": (
        "mmmu-medical-val",
        lambda folder: layouts.mmmu(folder, "validation", lambda split, subject: [
            layouts.mmmu_row(split, subject, 1, question_type="essay"),
        ]),
        "the question_type is 'essay'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_data_names_its_row(mistake: str, tmp_path: Path):
    name, write, *expected = MISTAKES[mistake]
    text = refusal(name, write(tmp_path / "data"))
    assert all(part in text for part in expected), text


def test_all_missing_images_at_once(tmp_path: Path):
    rows = layouts.many(
        lambda number: layouts.medxpert_row(number, images=["MM-0-a.jpeg", f"lost-{number}.jpeg"]), range(20)
    )
    folder = layouts.medxpertqa(tmp_path, rows)
    text = refusal("medxpertqa-mm", folder)
    assert "20 images are missing: lost-0.jpeg, lost-1.jpeg, " in text
    assert "lost-7.jpeg, ...;" in text and "lost-8" not in text
    assert f"looked in {tmp_path}, images.zip;" in text
    (folder / "images.zip").unlink()
    assert "21 images are missing" in refusal("medxpertqa-mm", folder)
    assert "images.zip (not there)" in refusal("medxpertqa-mm", folder)


@pytest.mark.parametrize("lost", [None, {"bytes": b"", "path": None}])
def test_a_table_without_its_pictures(lost: dict | None, tmp_path: Path):
    rows = [row | {"image": lost} if number else row for number, row in enumerate(layouts.SHORT_ANSWERS)]
    text = refusal("vqa-rad", layouts.short_answers(tmp_path, rows))
    assert "3 images are missing: the picture of row 2 of data/test-00000" in text


def test_a_parquet_that_names_its_pictures(tmp_path: Path):
    rows = [row | {"image": {"bytes": None, "path": "pictures/1.png"}} for row in layouts.SHORT_ANSWERS]
    folder = layouts.short_answers(tmp_path, rows)
    (folder / "pictures").mkdir()
    (folder / "pictures" / "1.png").write_bytes(layouts.picture(1))
    assert shades(load("vqa-rad", folder).rows[3]) == [1]


def test_damaged_files(tmp_path: Path):
    folder = layouts.slake(tmp_path / "slake")
    (folder / "imgs.zip").write_bytes((folder / "imgs.zip").read_bytes()[:100])
    assert "is not a whole zip archive" in refusal("slake-en", folder)
    (folder / "test.json").write_text('[{"question": ')
    assert "test.json is not JSON" in refusal("slake-en", folder)
    (folder / "test.json").write_text('{"question": 1}')
    assert "test.json is no list of objects" in refusal("slake-en", folder)
    (folder / "test.json").write_bytes(b'["\xff\xfe"]')
    assert "test.json is not" in refusal("slake-en", folder)

    folder = layouts.medxpertqa(tmp_path / "medxpert")
    (folder / "MM" / "test.jsonl").write_text('{"id": "1"}\n{oops\n')
    assert "MM/test.jsonl" in refusal("medxpertqa-mm", folder)
    (folder / "MM" / "test.jsonl").write_text("\n{oops\n")
    assert "MM/test.jsonl, line 2, is not JSON" in refusal("medxpertqa-mm", folder)
    (folder / "MM" / "test.jsonl").write_text("[]\n")
    assert "MM/test.jsonl, line 1, is no object" in refusal("medxpertqa-mm", folder)

    folder = layouts.short_answers(tmp_path / "rad")
    next((folder / "data").glob("test-00001*")).write_bytes(b"PAR1 no more")
    assert "cannot be read as Parquet" in refusal("vqa-rad", folder)

    folder = layouts.gmai(tmp_path / "gmai")
    with (folder / "GMAI-MMBench_VAL.tsv").open("a") as file:
        file.write("3\tonly two cells\n")
    assert "GMAI-MMBench_VAL.tsv, line 5, has another number of cells" in refusal("gmai-mmbench-val", folder)


def test_a_damaged_member_is_no_picture(tmp_path: Path):
    folder = layouts.slake(tmp_path)
    content = (folder / "imgs.zip").read_bytes()
    start = content.index(layouts.picture(2))
    (folder / "imgs.zip").write_bytes(content[: start + 30] + b"\0\0\0" + content[start + 33 :])
    assert "imgs/xmlab2/source.jpg cannot be unpacked" in refusal("slake-en", folder)


def test_wrong_places(tmp_path: Path):
    assert "does not exist; correct the path" in refusal("slake-en", tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("hello")
    assert "notes.txt is no table by its name" in refusal("slake-en", tmp_path / "notes.txt")
    assert "holds notes.txt; expected test.json as in https://huggingface.co/datasets/BoKelvin/SLAKE" in refusal(
        "slake-en", tmp_path
    )
    folder = layouts.mmmu(tmp_path / "mmmu", "validation")
    shutil.rmtree(folder / "Pharmacy")
    assert "expected Pharmacy/validation-*.parquet" in refusal("mmmu-medical-val", folder)
    layouts.write_zip(tmp_path / "x.zip", {"a.json": b"[]"})
    assert "x.zip holds other files; expected QA_information/Open-access/*.json" in refusal(
        "omnimedvqa", tmp_path / "x.zip"
    )


def test_two_copies_are_not_mixed(tmp_path: Path):
    for copy in ("one", "two"):
        layouts.medxpertqa(tmp_path / copy)
    assert "give the folder of one copy" in refusal("medxpertqa-mm", tmp_path)


@pytest.mark.parametrize(
    ("answer", "letter"), [("yes", "A"), ("Yes.", "A"), (" NO ", "B"), ("none", None), ("normal", None), ("", None)]
)
def test_yes_and_no_are_whole_answers(answer: str, letter: str | None):
    assert gold.yes_no_letter(answer) == letter


# The Hub


class GatedHub(FakeHub):
    """Shows its data sets' names, and no file before their terms are accepted."""

    def _download(self, *arguments):
        raise Refusal(403, "Access to this dataset is restricted; accept its terms", "GatedRepo")


def publish(hub: FakeHub, repo: str, folder: Path) -> str:
    """Puts a folder's files there as one commit; returns it."""
    owner, name = repo.split("/")
    hub._create_repo({"type": "dataset", "name": name, "organization": owner})
    files = {
        path.relative_to(folder).as_posix(): Blob(path.read_bytes(), large=path.suffix in (".zip", ".parquet"))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    return hub.repos["datasets", repo].add_commit("main", "data", files).id


def on_hub(name: str, hub: FakeHub, home: Path) -> dict:
    """What loading without a path gives, in a process that takes `hub` for the Hub."""
    code = (
        "import json, sys\n"
        "from huatuo_vision.evaluation.benchmarks import BENCHMARKS\n"
        "from huatuo_vision.schema import UserError\n"
        "try:\n"
        "    loaded = BENCHMARKS[sys.argv[1]].load(None)\n"
        "    ids = [row.id for row in loaded.rows]\n"
        "    sys.stdout.write(json.dumps({'revision': loaded.revision, 'ids': ids}))\n"
        "except UserError as error:\n"
        "    sys.stdout.write(json.dumps({'error': str(error)}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, name],
        cwd=ROOT,
        env=hub.environment(home),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_from_the_hub_at_its_commit_and_again_without_it(tmp_path: Path):
    folder = layouts.slake(tmp_path / "slake")
    (folder / "KG.zip").write_bytes(b"not needed")
    with FakeHub() as hub:
        commit = publish(hub, "BoKelvin/SLAKE", folder)
        assert on_hub("slake-en", hub, tmp_path / "home") == {"revision": commit, "ids": ["0", "2", "3", "5"]}
        assert hub.sent("GET", "imgs.zip") and not hub.sent(path="KG.zip")
    # The server is gone: the copy in the cache serves, under the same commit.
    assert on_hub("slake-en", hub, tmp_path / "home")["revision"] == commit


def test_of_medthinkvqa_only_the_test_cases_pictures_are_fetched(tmp_path: Path):
    folder = layouts.medthinkvqa(tmp_path / "set")
    for name in ("images/case1/train.jpg", "train.jsonl"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not needed")
    with FakeHub() as hub:
        commit = publish(hub, "bio-nlp-umass/MedThinkVQA", folder)
        loaded = on_hub("medthinkvqa", hub, tmp_path / "home")
        assert loaded == {"revision": commit, "ids": ["eurorad/19250", "eurorad/19251"]}
        assert hub.sent("GET", "images/case19250/a.jpg") and not hub.sent(path="train")
    assert on_hub("medthinkvqa", hub, tmp_path / "home") == loaded


def test_gated_unknown_and_unreachable_data_sets(tmp_path: Path):
    with GatedHub() as hub:
        publish(hub, "VLMEval/GMAI-MMBench", layouts.gmai(tmp_path / "gmai"))
        gated = on_hub("gmai-mmbench-val", hub, tmp_path / "home")["error"]
        unknown = on_hub("slake-en", hub, tmp_path / "home")["error"]
    unreachable = on_hub("slake-en", hub, tmp_path / "home")["error"]
    assert "is gated: accept its terms at https://huggingface.co/datasets/VLMEval/GMAI-MMBench" in gated
    assert "`hf auth login`" in gated
    assert "BoKelvin/SLAKE was not found at https://huggingface.co/datasets/BoKelvin/SLAKE" in unknown
    assert "cannot be downloaded" in unreachable and "slake-en=PATH" in unreachable
    assert not any("\n" in text for text in (gated, unknown, unreachable))

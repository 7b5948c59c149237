"""Several sources in one build: case folders, CSV tables with boxes, volumes, and each row called by its source."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("datatrove")

from PIL import Image

from data.config import Ingest, load_config
from data.phantom_cases import FOLLOW_UPS, RULES, guidelines, make_cases, rule_in, stated
from data.sources.volumes import evenly
from data.tables import Pair, RunFolder
from huatuo_vision.schema import UserError
from tests.data.test_ingest import ingest, picture, put, reasons, rows

OPEN = {"licence": "CC0-1.0"}


def case(**changed: object) -> bytes:
    values = {
        "title": "A case", "history": "Pain for a week.", "findings": "A cyst.", "discussion": "Cysts are common.",
        "diagnosis": "Cyst.", "modality": "CT",
        "figures": [
            {"images": ["a.png"], "caption": "CT with a cyst."},
            {"images": ["a.png", "b.png"], "caption": "Later.", "modality": "MRI"},
        ],
    }  # fmt: skip
    return json.dumps(values | changed).encode()


def notes(run: RunFolder) -> dict[str, int]:
    return dict(run.counts("ingest").notes)


def shown(run: RunFolder, pair: Pair, rank: int = 0) -> np.ndarray:
    with run.images(rank) as images:
        return np.asarray(Image.open(io.BytesIO(images.get(pair.image_ids[0]))))


# Cases ---------------------------------------------------------------------------------------------------------------


def test_each_figure_of_a_case_is_a_row_and_its_texts_are_told_apart(tmp_path: Path) -> None:
    pictures = {"a.png": picture(1), "b.png": picture(2)}
    put(tmp_path / "s" / "c1", {"case.json": case(), **pictures})
    run = ingest(tmp_path / "run", tmp_path / "s", kind="cases", **OPEN)
    first, second = rows(run).values()
    assert (first.id, first.article, first.modality) == ("c1_1", "c1", "Computed Tomography")
    assert dict(zip(first.sections, first.context, strict=True)) == {
        "history": "Pain for a week.", "findings": "A cyst.", "discussion": "Cysts are common. Cyst.",
    }  # fmt: skip
    assert second.sections == ("history", "findings") and len(second.image_ids) == 2
    assert second.modality == "Magnetic Resonance Imaging" and second.article == first.article


def test_what_is_wrong_with_a_case_is_counted(tmp_path: Path) -> None:
    bare = {"history": "", "findings": "", "discussion": "", "diagnosis": ""}
    figure = {"images": ["a.png"]}
    files = {
        "c1/case.json": b"{",
        "c2/case.json": case(figures=[]),
        "c3/case.json": case(figures=[{"images": "a.png"}]),
        "c4/case.json": case(figures=[figure], **bare),
        "c5/case.json": case(figures=[figure]),
        "c6/case.json": case(figures=[{"images": ["../c1/case.json"]}]),
        "c7/case.json": case(figures=[{"images": ["a.png"]}]),
        "c7/a.png": picture(3),
        "c8/case.json": b"[" * 100_000,
    }
    put(tmp_path / "s", files)
    run = ingest(tmp_path / "run", tmp_path / "s", kind="cases", **OPEN)
    assert reasons(run) == {
        "c1": "broken_case", "c2": "broken_case", "c3_1": "malformed_row", "c4_1": "no_text", "c5_1": "missing_image",
        "c6_1": "unsafe_path", "c8": "broken_case",
    }  # fmt: skip
    assert list(rows(run)) == ["c7_1"]
    unlicensed = ingest(tmp_path / "other", tmp_path / "s", kind="cases")
    assert reasons(unlicensed)["c7"] == "no_licence"


# Tables --------------------------------------------------------------------------------------------------------------


def test_a_csv_with_line_breaks_is_cut_like_any_table(tmp_path: Path) -> None:
    lines = ['id,image,caption,modality,box\n'] + [
        f'r{n},{n}.jpg,"CT of number {n},\nsecond line",{"" if n else "ct"},"{n}, 2.4, 30, 40"\n' for n in range(5)
    ]  # fmt: skip
    put(
        tmp_path / "s",
        {"t.csv": "\ufeff".encode() + "".join(lines).encode()} | {f"{n}.jpg": picture(n) for n in range(5)},
    )
    run = ingest(tmp_path / "run", tmp_path / "s", kind="pairs", shard_size=2, modality="X-Ray", **OPEN)
    found = rows(run)
    assert run.tasks("ingest") == 3 and list(found) == [f"r{n}" for n in range(5)]
    assert found["r3"].caption == "CT of number 3, second line"
    assert found["r3"].sections == ("boxes",) and "(3, 2, 30, 40)" in found["r3"].context[0]
    assert [found[id_].modality for id_ in ("r0", "r1")] == ["Computed Tomography", "X-Ray"]


@pytest.mark.parametrize("box", ["1, 2, 3", "a b c d", "1 2 3 4 5"])
def test_a_box_of_another_form_is_a_malformed_row(tmp_path: Path, box: str) -> None:
    put(tmp_path / "s", {"t.csv": f'id,image,caption,box\nr,a.jpg,CT,"{box}"\nq,a.jpg\n'.encode(), "a.jpg": picture()})
    run = ingest(tmp_path / "run", tmp_path / "s", kind="pairs", **OPEN)
    assert reasons(run) == {"r": "malformed_row", "t.csv:2": "broken_csv"}


def test_a_row_of_another_encoding_is_counted(tmp_path: Path) -> None:
    table = "id,image,caption\n1,a.jpg,t\u00f3rax\n".encode() + "2,a.jpg,t\u00f3rax\n".encode("latin-1")
    put(tmp_path / "s", {"t.csv": table, "a.jpg": picture()})
    run = ingest(tmp_path / "run", tmp_path / "s", kind="pairs", **OPEN)
    assert rows(run)["1"].caption == "t\u00f3rax" and reasons(run) == {"t.csv:2": "broken_csv"}


def test_a_csv_without_a_column_is_one_sentence(tmp_path: Path) -> None:
    put(tmp_path / "s", {"t.csv": b"id,file\n1,a.jpg\n"})
    with pytest.raises(UserError, match="expected also image, caption, so name yours in ingest.columns"):
        ingest(tmp_path / "run", tmp_path / "s", kind="pairs")


def test_a_modality_of_another_name_is_counted_and_not_taken_over(tmp_path: Path) -> None:
    put(tmp_path / "s", {"t.csv": b"id,image,caption,modality\n1,a.jpg,x,smell\n", "a.jpg": picture()})
    run = ingest(tmp_path / "run", tmp_path / "s", kind="pairs", **OPEN)
    assert rows(run)["1"].modality is None and notes(run)["modality_of_another_name"] == 1


def test_sixteen_bits_are_seen_through_the_window(tmp_path: Path) -> None:
    values = np.tile(np.array([-1000, -150, 50, 250, 1000]), (4, 4)).astype(np.int32)
    file = io.BytesIO()
    Image.fromarray((values + 32768).astype(np.uint16)).save(file, "PNG")
    put(tmp_path / "s", {"t.csv": b"id,image,caption\n1,a.png,x\n", "a.png": file.getvalue()})
    run = ingest(tmp_path / "run", tmp_path / "s", kind="pairs", window=(50, 400), intercept=-32768, **OPEN)
    assert shown(run, rows(run)["1"])[0, :5].tolist() == [0, 0, 128, 255, 255]
    assert notes(run)["image_deep_window_given"] == 1


# Volumes -------------------------------------------------------------------------------------------------------------


def test_even_slices_are_the_middles_of_equal_parts() -> None:
    assert evenly(10, 2) == [2, 7] and evenly(3, 5) == [0, 1, 2] and evenly(1, 4) == [0] and evenly(9, 3) == [1, 4, 7]


def nifti(path: Path, values: np.ndarray, spacing: tuple[float, float, float] = (1, 1, 3), **flipped: bool) -> Path:
    nibabel = pytest.importorskip("nibabel")
    affine = np.diag([*spacing, 1.0])
    if flipped:
        affine[0, 0] *= -1
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values.astype(np.float32), affine), path)
    return path


def marked_volume(depth: int = 6) -> np.ndarray:
    """Noise, with a bright lump at the patient's right front (x from 15, y from 24) of slices 2 and 3."""
    values = np.random.default_rng(0).normal(0, 1, (20, 30, depth))
    values[15:18, 24:28, 2:4] = 50
    return values


def test_slices_with_a_lesion_are_taken_and_its_box_is_where_it_is_seen(tmp_path: Path) -> None:
    values = marked_volume()
    nifti(tmp_path / "s/v.nii.gz", values)
    nifti(tmp_path / "s/v_mask.nii.gz", values > 40)
    run = ingest(tmp_path / "run", tmp_path / "s", kind="volumes", modality="X-Ray", **OPEN)
    found = rows(run)
    assert list(found) == ["v_0002", "v_0003"] and {pair.article for pair in found.values()} == {"v"}
    # The right is on the left, the front on top: x 15 to 17 of 20 is columns 2 to 4, y 24 to 27 of 30 rows 2 to 5.
    assert "(2, 2, 5, 6)" in found["v_0002"].context[0]
    seen = shown(run, found["v_0002"])
    assert seen.shape == (30, 20) and (seen[2:6, 2:5] == 255).all() and (seen == 255).sum() < 30
    assert notes(run)["volumes_with_lesions"] == 1


def test_a_flipped_file_shows_the_same_picture(tmp_path: Path) -> None:
    values = marked_volume()
    nifti(tmp_path / "a/v.nii", values)
    nifti(tmp_path / "b/v.nii", values[::-1], flipped=True)
    pictures = []
    for name in ("a", "b"):
        run = ingest(tmp_path / f"run-{name}", tmp_path / name, kind="volumes", slices=1, **OPEN)
        (pair,) = rows(run).values()
        pictures.append(shown(run, pair))
    assert (pictures[0] == pictures[1]).all()


def test_a_volume_is_cut_across_its_thickest_spacing(tmp_path: Path) -> None:
    nifti(tmp_path / "s/v.nii", np.random.default_rng(0).normal(size=(5, 30, 20)), spacing=(4, 1, 1))
    run = ingest(tmp_path / "run", tmp_path / "s", kind="volumes", slices=2, **OPEN)
    assert list(rows(run)) == ["v_0001", "v_0003"] and shown(run, rows(run)["v_0001"]).shape == (20, 30)


def test_volumes_of_one_slice_and_masks_without_a_lesion_are_counted(tmp_path: Path) -> None:
    values = marked_volume()
    nifti(tmp_path / "s/one.nii", values[..., :1])
    nifti(tmp_path / "s/clean.nii", values)
    nifti(tmp_path / "s/masks/clean.nii.gz", np.zeros(values.shape))
    run = ingest(tmp_path / "run", tmp_path / "s", kind="volumes", slices=3, **OPEN)
    assert list(rows(run)) == ["clean_0001", "clean_0003", "clean_0005", "one_0000"]
    assert notes(run) == {"volumes": 2, "empty_masks": 1, "volumes_of_one_slice": 1}


def test_a_fourth_axis_of_one_is_none_and_no_number_is_no_lesion(tmp_path: Path) -> None:
    values = marked_volume()
    mask = np.full(values.shape, np.nan)
    mask[3:6, 4:7, 2] = 1
    nifti(tmp_path / "s/v.nii", values[..., None])
    nifti(tmp_path / "s/v_mask.nii", mask[..., None])
    run = ingest(tmp_path / "run", tmp_path / "s", kind="volumes", slices=9, **OPEN)
    assert list(rows(run)) == ["v_0002"] and notes(run) == {"volumes": 1, "volumes_with_lesions": 1}


def test_what_is_no_volume_is_counted_by_its_name(tmp_path: Path) -> None:
    values = marked_volume()
    nifti(tmp_path / "s/four.nii", values[..., None].repeat(2, -1))
    nifti(tmp_path / "s/mismatch.nii", values)
    nifti(tmp_path / "s/mismatch_mask.nii", np.ones((4, 4, 4)))
    nifti(tmp_path / "s/outside.nii", values)
    nifti(tmp_path / "s/nan.nii", values * np.nan)
    colours = np.zeros((4, 5, 6), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    pytest.importorskip("nibabel").Nifti1Image(colours, np.eye(4)).to_filename(tmp_path / "s/colours.nii")
    put(
        tmp_path / "s",
        {"broken.nii.gz": b"\x1f\x8b no gzip", "text.nii": b"x" * 400, "d/a.dcm": b"no dicom", "empty.nii": b""},
    )
    put(tmp_path / "s", {"lesions.csv": b"volume,slice\noutside.nii,9\n"})
    run = ingest(tmp_path / "run", tmp_path / "s", kind="volumes", **OPEN)
    assert reasons(run) == {
        "broken": "unreadable_volume", "four": "not_a_volume", "mismatch": "mask_mismatch", "outside": "lesion_outside",
        "text": "unreadable_volume", "d": "unreadable_volume", "nan": "not_a_volume", "colours": "not_a_volume",
        "empty": "unreadable_volume",
    }  # fmt: skip
    assert rows(run) == {}


def test_a_series_is_put_in_order_by_position_and_marks_name_its_slices(tmp_path: Path) -> None:
    pytest.importorskip("nibabel")
    make_cases(tmp_path / "s", cases=0, pictures=0, test=0, volumes=1, seed=0)
    folder = tmp_path / "s/volumes/series-0"
    for number, path in enumerate(sorted(folder.glob("*.dcm"))):
        path.rename(folder / f"1.2.840.{number}")
    (folder / "README").write_text("not a slice")
    (tmp_path / "s/volumes/lesions.csv").write_text("volume,slice,x0,y0,x1,y1\nseries-0,1,2,3,4,5\nseries-0,6,,,,\n")
    run = ingest(tmp_path / "run", tmp_path / "s/volumes", kind="volumes", **OPEN)
    series = {id_: pair for id_, pair in rows(run).items() if id_.startswith("series")}
    assert list(series) == ["series-0_0001", "series-0_0006"] and notes(run)["image_dicom_window_of_file"] == 2
    assert "(2, 3, 4, 5)" in series["series-0_0001"].context[0] and series["series-0_0006"].context == ()
    # The body narrows towards both ends: slices 1 and 6 of 8 lie as far from the middle as each other.
    bright = [int((shown(run, pair) > 60).sum()) for pair in series.values()]
    assert abs(bright[0] - bright[1]) < 0.1 * bright[0]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"volume,slice\nv.nii,first\n", "lesions.csv, line 2"),
        (b"volume,slice\nv\xe9.nii,1\n", "lesions.csv is not UTF-8"),
        (b"volume,slice\nv,1\nw,2\n", "names 'v' and 1 others, none of which is beside it"),
    ],
)
def test_a_file_of_marks_of_another_form_is_one_sentence(tmp_path: Path, content: bytes, expected: str) -> None:
    nifti(tmp_path / "s/v.nii", marked_volume())
    put(tmp_path / "s", {"lesions.csv": content})
    with pytest.raises(UserError, match=expected):
        ingest(tmp_path / "run", tmp_path / "s", kind="volumes", **OPEN)


# Several sources -----------------------------------------------------------------------------------------------------


def test_rows_are_called_by_their_source(tmp_path: Path) -> None:
    put(tmp_path / "s/a", {"t.csv": b"id,image,caption\n1,a.jpg,x\n2,b.jpg,y\n", "a.jpg": picture()})
    put(tmp_path / "s/b/1", {"case.json": case(figures=[{"images": ["a.png"], "caption": "c"}]), "a.png": picture(2)})
    sources = {
        "tags": {"kind": "pairs", "folder": "a", "annotated": False, **OPEN},
        "told": {"kind": "cases", "folder": "b", **OPEN},
    }
    run = ingest(tmp_path / "run", tmp_path / "s", sources=sources)
    found = rows(run)
    assert list(found) == ["tags-1", "told-1_1"] and reasons(run) == {"tags-2": "missing_image"}
    assert [(pair.collection, pair.annotated, pair.article) for pair in found.values()] == [
        ("tags", False, "tags-1"),
        ("told", True, "told-1"),
    ]


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ({"x": {"kind": "pairs", "folder": "gone"}}, "ingest.sources.x: gone is not in"),
        (
            {"x": {"kind": "cases", "folder": "a"}},
            "holds no folder with a case.json; check the folder and ingest.sources.x",
        ),
    ],
)
def test_a_source_that_is_not_there_is_one_sentence(tmp_path: Path, sources: dict, expected: str) -> None:
    put(tmp_path / "s/a", {"t.txt": b""})
    with pytest.raises(UserError, match=expected):
        ingest(tmp_path / "run", tmp_path / "s", sources=sources)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"kind": "pairs", "sources": {"x": {"folder": "x"}}}, "kind stands beside sources"),
        ({"sources": {"a b": {"folder": "x"}}}, "a name is of letters"),
        ({"sources": {"x": {"kind": "volumes", "folder": "x", "window": [50, -1]}}}, "greater than 0"),
        ({"sources": {"x": {"folder": "x", "kind": "pairs", "modality": "CT"}}}, "modality is 'CT'"),
        ({"sources": {"x": {"folder": "x", "foldr": "y"}}}, "foldr"),
    ],
)
def test_sources_that_contradict_are_refused(values: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Ingest.model_validate(values)


# The synthetic sources -----------------------------------------------------------------------------------------------


def test_neither_modality_nor_size_alone_gives_the_follow_up_away() -> None:
    assert Counter(RULES.values()) == dict.fromkeys(FOLLOW_UPS, 3)
    for place in (0, 1):
        for value in {cell[place] for cell in RULES}:
            answers = Counter(answer for cell, answer in RULES.items() if cell[place] == value)
            assert max(answers.values()) <= sum(answers.values()) / (2 if place == 0 else 3)


def test_the_guideline_and_the_tags_name_the_same_cells() -> None:
    rules = dict(filter(None, (rule_in(row["clean_text"] or "") for row in guidelines())))
    assert rules == RULES
    assert stated("MRI, knee: two large findings on the left side") == ("MRI", "large")
    assert stated("MRI, knee: no finding") is None


def test_no_case_tells_the_follow_up_and_the_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    arguments = {"cases": 8, "pictures": 12, "test": 24, "volumes": 0, "seed": 3}
    assert make_cases(tmp_path / "a", **arguments) and make_cases(tmp_path / "b", **arguments)
    assert not make_cases(tmp_path / "a", **arguments)

    def files(folder: Path) -> dict[Path, bytes]:
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    assert files(tmp_path / "a") == files(tmp_path / "b")
    told = "".join(path.read_text() for path in (tmp_path / "a").rglob("*") if path.suffix in (".json", ".csv"))
    test = (tmp_path / "a/test/phantom_follow_up.json").read_text()
    assert all(words in test and words not in told.replace(test, "") for words in FOLLOW_UPS)
    assert Counter(row["answer"] for row in json.loads(test)) == dict.fromkeys("ABCD", 6)
    with pytest.raises(UserError, match="holds something else"):
        make_cases(tmp_path / "a", **arguments | {"seed": 4})


def test_the_two_builds_of_the_ablation_differ_in_retrieval_alone() -> None:
    root = Path(__file__).parents[2] / "data"
    configs = [load_config(root / f"evidence-{name}.yaml").model_dump() for name in ("with", "without")]
    assert {key for key in configs[0] if configs[0][key] != configs[1][key]} == {"name", "retrieve"}
    assert configs[1]["retrieve"] is None


@pytest.mark.parametrize("name", ["semihvision", "semihvision-demo", "evidence-with", "evidence-without"])
def test_shipped_configurations_are_read(name: str) -> None:
    assert load_config(Path(__file__).parents[2] / f"data/{name}.yaml").ingest.sources

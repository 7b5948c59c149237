"""Sources in the manner of SemiHVision's, drawn and written by a program: for demonstrations, tests and one ablation.

    python -m data.phantom_cases --out DIR --cases N --pictures N --test N --volumes N --seed S

    cases/        folders with case.json: pictures that "people" described, history, findings, discussion
    slices/       pictures that nobody described: rows.csv with tags and a box, as of a lesion data set
    captions/     captions without a report (rows.csv), as of a set of histology videos
    reports/      radiographs with a report each (rows.csv), two pictures in some
    volumes/      NIfTI with and without a mask, one of a single slice, and a DICOM series with lesions.csv
    guidelines.jsonl   OpenGuidelines' layout; some without text, one twice
    test/         held-out questions on pictures of their own (benchmark phantom-follow-up)

The invented "phantom guideline" says which follow-up a finding calls for, by modality and size of the finding. No
picture shows it and no case tells it: the text of the guideline alone does. So whoever writes questions about follow-up
in its light can be right, and whoever writes without it must guess. That is so by construction, and no medical result.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from data.phantom.drawing import draw_picture
from data.phantom.facts import BODY_PARTS_OF, COUNTS, MODALITIES, SIDES, SIZES, Facts
from huatuo_vision.cli import run_command
from huatuo_vision.schema import UserError

# Goes up whenever the same arguments would give other files.
GENERATOR_VERSION = 1
MANIFEST_FILE = "manifest.json"
TEST_FILE = "phantom_follow_up.json"
LICENCE = "CC0-1.0"
SIDE = 64  # pictures measure 7/8 to 3/2 of it a side

FOLLOW_UPS = ("none at all", "a second image after six weeks", "a second image after six months", "a tissue sample")
QUESTION = "Which follow-up does the phantom guideline ask for here?"
# Each follow-up is right in three of the twelve cells, and neither modality nor size alone says which one is.
RULES: dict[tuple[str, str], str] = {
    (modality, size): FOLLOW_UPS[number]
    for size, numbers in zip(SIZES, ((0, 1, 2, 3, 0, 1), (2, 3, 1, 0, 3, 2)), strict=True)
    for modality, number in zip(MODALITIES, numbers, strict=True)
}

_LABELS = {
    "X-ray": "X-Ray", "CT": "Computed Tomography", "MRI": "Magnetic Resonance Imaging", "ultrasound": "Ultrasound",
    "histology": "Microscopy Images", "fundus": "Fundus Photography",
}  # fmt: skip
_STATED = re.compile(rf"\b({'|'.join(MODALITIES)})\b.*?\b({'|'.join(SIZES)}) findings?\b", re.DOTALL)
_RULE = re.compile(
    rf"\b({'|'.join(SIZES)}) findings on ({'|'.join(MODALITIES)}) call for ({'|'.join(FOLLOW_UPS)})\b", re.IGNORECASE
)
# Random streams: their keys have three numbers, data.phantom's four and data.phantom_articles' one or two.
_CASE, _SLICE, _CAPTION, _REPORT, _VOLUME, _TEST = range(6)


def stated(text: str) -> tuple[str, str] | None:
    """Modality and size of the finding that a row's tags name, if they name one."""
    found = _STATED.search(text)
    return (found[1], found[2]) if found else None


def rule_in(text: str) -> tuple[tuple[str, str], str] | None:
    """What a text of the guideline rules on, and the follow-up that it asks for."""
    found = _RULE.search(text)
    return ((found[2], found[1].lower()), found[3]) if found else None


def _rng(seed: int, kind: int, index: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1_000 + kind, index, 0)))


def _facts(
    rng: np.random.Generator, cell: int, modalities: Sequence[str] = MODALITIES, *, finding: bool = True
) -> Facts:
    """Facts of cell `cell` of modality and size, all else by chance."""
    modality, size = modalities[cell % len(modalities)], SIZES[cell // len(modalities) % len(SIZES)]
    parts = BODY_PARTS_OF[modality]
    count = int(rng.integers(1, len(COUNTS) + 1)) if finding else 0
    return Facts(modality, parts[rng.integers(len(parts))], count, size, SIDES[rng.integers(len(SIDES))])


def _findings(facts: Facts) -> str:
    if not facts.count:
        return "no finding"
    noun = "finding" if facts.count == 1 else "findings"
    return f"{COUNTS[facts.count - 1]} {facts.size} {noun} on the {facts.side} side"


def _examination(facts: Facts) -> str:
    return f"{'a' if facts.modality in ('CT', 'histology', 'fundus') else 'an'} {facts.modality} examination"


def _save(image: Image.Image, path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, compress_level=1)
    return path.name


def _write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    if rows:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_cases(folder: Path, n: int, seed: int) -> None:
    for index in range(n):
        rng = _rng(seed, _CASE, index)
        case = folder / f"case-{index:05d}"
        figures = []
        facts = _facts(rng, index, finding=index % 4 != 3)
        for number in range(1 + index % 2):
            # The second figure shows the same examination without its findings.
            shown = facts if number == 0 else Facts(facts.modality, facts.body_part, 0, facts.size, facts.side)
            name = _save(draw_picture(shown, rng, SIDE), case / f"figure-{number + 1}.png")
            caption = f"{shown.modality} of the {shown.body_part} with {_findings(shown)}."
            figures.append({"images": [name], "caption": caption})
        _write_json(
            case / "case.json",
            {
                "title": f"Phantom case {index}",
                "history": f"Phantom {index} came for {_examination(facts)} of the {facts.body_part}.",
                "findings": f"The {facts.modality} examination shows {_findings(facts)}.",
                "discussion": f"What is seen in the {facts.body_part} is drawn by a program and has no cause.",
                "diagnosis": f"Phantom {facts.body_part}, {_findings(facts)}.",
                "modality": _LABELS[facts.modality],
                "figures": figures,
            },
        )


def _write_slices(folder: Path, n: int, seed: int) -> None:
    rows = []
    for index in range(n):
        rng = _rng(seed, _SLICE, index)
        facts = _facts(rng, index)
        image = draw_picture(facts, rng, SIDE)
        left = 0 if facts.side == "left" else image.width // 2
        rows.append(
            {
                "id": f"slice-{index:05d}",
                "image": f"images/{_save(image, folder / 'images' / f'{index:05d}.png')}",
                "tags": f"{facts.modality}, {facts.body_part}: {_findings(facts)}",
                "patient": f"p{index}",
                "modality": _LABELS[facts.modality],
                "box": f"{left}, 0, {left + image.width // 2}, {image.height}",
            }
        )
    _write_csv(folder / "rows.csv", rows)


def _write_captions(folder: Path, n: int, seed: int) -> None:
    rows = []
    for index in range(n):
        rng = _rng(seed, _CAPTION, index)
        facts = _facts(rng, index, ("histology",), finding=index % 3 != 2)
        name = _save(draw_picture(facts, rng, SIDE), folder / "images" / f"{index:05d}.png")
        said = f"so here we look at {facts.body_part}, and you can see {_findings(facts)}"
        rows.append({"id": f"frame-{index:05d}", "image_path": f"images/{name}", "caption": said})
    _write_csv(folder / "rows.csv", rows)


def _write_reports(folder: Path, n: int, seed: int) -> None:
    rows = []
    for index in range(n):
        rng = _rng(seed, _REPORT, index)
        facts = _facts(rng, index, ("X-ray",), finding=index % 2 == 0)
        for view in range(1 + index % 2):
            name = _save(draw_picture(facts, rng, SIDE), folder / "images" / f"{index:05d}_{view}.png")
            report = f"Radiograph of the {facts.body_part}. There is {_findings(facts)}. Compared with none before."
            rows.append(
                {"ImageID": f"{index:05d}_{view}", "file": f"images/{name}", "Report": report, "StudyID": f"s{index}"}
            )
    _write_csv(folder / "rows.csv", rows)


def _volume(rng: np.random.Generator, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """Values and mask, of shape (48, 48, depth): a body of two densities, and a bright lump in some of the slices."""
    x, y = np.meshgrid(np.linspace(-1, 1, 48), np.linspace(-1, 1, 48), indexing="ij")
    turns = np.linspace(-1, 1, depth) if depth > 1 else np.zeros(1)
    values = np.zeros((48, 48, depth), np.float32)
    mask = np.zeros(values.shape, np.uint8)
    at, where = rng.uniform(-0.35, 0.35, 2), rng.uniform(-0.4, 0.4)
    for z, turn in enumerate(turns):
        body = (x / 0.85) ** 2 + (y / 0.7) ** 2 < 1 - 0.3 * turn**2
        core = (x / 0.4) ** 2 + ((y + 0.1) / 0.3) ** 2 < 1 - 0.6 * turn**2
        lump = (x - at[0]) ** 2 + (y - at[1]) ** 2 + (1.5 * (turn - where)) ** 2 < 0.06
        values[..., z] = 300 * body + 150 * core + 350 * lump + rng.normal(0, 15, x.shape)
        mask[..., z] = lump
    return values, mask


def _write_volumes(folder: Path, n: int, seed: int) -> None:
    import nibabel

    folder.mkdir(parents=True)
    lesions = []
    for index in range(n):
        values, mask = _volume(_rng(seed, _VOLUME, index), 16)
        affine = np.diag([1.0, 1.0, 3.0, 1.0])
        nibabel.save(nibabel.Nifti1Image(values, affine), folder / f"volume-{index}.nii.gz")
        if index % 2 == 0:
            nibabel.save(nibabel.Nifti1Image(mask, affine), folder / f"volume-{index}_mask.nii.gz")
        series = folder / f"series-{index}"
        _write_series(series, _rng(seed, _VOLUME, 1000 + index))
        lesions.append({"volume": series.name, "slice": 3, "x0": 10, "y0": 12, "x1": 20, "y1": 22})
    values, _ = _volume(_rng(seed, _VOLUME, 5000), 1)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), folder / "single.nii")
    _write_csv(folder / "lesions.csv", lesions)


def _write_series(folder: Path, rng: np.random.Generator) -> None:
    """Eight slices under names that say nothing of their order."""
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    folder.mkdir()
    values, _ = _volume(rng, 8)
    uid = generate_uid(entropy_srcs=[folder.name, str(rng.integers(2**31))])
    for number in range(8):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
        meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[uid, str(number)])
        name = folder / f"{(number * 5) % 8}.dcm"
        data = FileDataset(str(name), {}, file_meta=meta, preamble=b"\0" * 128)
        data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        data.SeriesInstanceUID, data.Modality, data.InstanceNumber = uid, "CT", 8 - number
        data.ImagePositionPatient, data.ImageOrientationPatient = [0, 0, 5 * number], [1, 0, 0, 0, 1, 0]
        data.Rows = data.Columns = 48
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
        data.WindowCenter, data.WindowWidth = 300, 800
        data.PixelData = np.ascontiguousarray(values[..., number].T.astype(np.int16)).tobytes()
        pydicom.dcmwrite(name, data, enforce_file_format=True)


def guidelines() -> list[dict[str, object]]:
    """The twelve rules, among texts on other things; one without text, one twice."""
    rows: list[dict[str, object]] = []

    def add(title: str, text: str | None) -> None:
        number = len(rows)
        rows.append({"id": f"phantom-{number:03d}", "source": "phantom", "title": title, "clean_text": text})

    for (modality, size), follow_up in RULES.items():
        text = f"Invented for a demonstration. {size.capitalize()} findings on {modality} call for {follow_up}."
        add(f"Phantom guideline: {size} findings on {modality}", text)
    for modality in MODALITIES:
        add(
            f"Phantom guideline: quality of {modality} images",
            f"Invented for a demonstration. What is seen on {modality} is repeated where the subject moved. The device "
            "is checked every morning by whoever is first in the room, and the check is written into the book beside "
            "it. Nothing is said here of what an image shows. " * 2,
        )
        add(f"Phantom guideline: reporting on {modality}", f"A report on {modality} names the body part first.")
    add("Phantom guideline: left empty", "")
    add("Phantom guideline: never written", None)
    return [*rows, rows[0]]


def _write_test(folder: Path, n: int, seed: int) -> None:
    rows = []
    for index in range(n):
        rng = _rng(seed, _TEST, index)
        facts = _facts(rng, index)
        name = _save(draw_picture(facts, rng, SIDE), folder / "images" / f"{index:05d}.png")
        follow_up = RULES[facts.modality, facts.size]
        rows.append(
            {
                "id": f"follow_up_{index + 1}",
                "image": [f"images/{name}"],
                "question": QUESTION,
                "options": list(FOLLOW_UPS),
                "answer": "ABCD"[FOLLOW_UPS.index(follow_up)],
                "groups": {"modality": facts.modality, "size": facts.size},
            }
        )
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / TEST_FILE, rows)


def make_cases(out: Path, *, cases: int, pictures: int, test: int, volumes: int, seed: int) -> bool:
    """Write everything under `out`; False where it is there already. Raises UserError for a folder of other things."""
    asked = {"cases": cases, "pictures": pictures, "test": test, "volumes": volumes, "seed": seed}
    if negative := [name for name, value in asked.items() if value < 0]:
        raise UserError(f"--{negative[0]} {asked[negative[0]]}: expected a number of at least 0")
    manifest = {"synthetic": "drawn by data/phantom_cases.py; no medical data", "generator_version": GENERATOR_VERSION}
    manifest["arguments"] = asked
    if out.exists():
        try:
            if json.loads((out / MANIFEST_FILE).read_text(encoding="utf-8")) == manifest:
                return False
        except (OSError, ValueError):
            pass
        raise UserError(f"{out} holds something else than these sources; delete it or give --out a new folder")
    unfinished = out.parent / f".{out.name}.{uuid.uuid4().hex[:12]}.unfinished"
    try:
        unfinished.mkdir(parents=True)
        _write_cases(unfinished / "cases", cases, seed)
        for name, write, number in (
            ("slices", _write_slices, pictures),
            ("captions", _write_captions, pictures // 10),
            ("reports", _write_reports, pictures // 10),
            ("volumes", _write_volumes, volumes),
            ("test", _write_test, test),
        ):
            if number:
                write(unfinished / name, number, seed)
        lines: Iterable[str] = (json.dumps(row) + "\n" for row in guidelines())
        (unfinished / "guidelines.jsonl").write_text("".join(lines), encoding="utf-8")
        _write_json(unfinished / MANIFEST_FILE, manifest)
        unfinished.rename(out)
    except OSError as error:
        raise UserError(f"{out} can't be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.phantom_cases", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new folder")
    parser.add_argument("--cases", type=int, default=300, metavar="N", help="cases that people described (300)")
    parser.add_argument("--pictures", type=int, default=1500, metavar="N", help="pictures that nobody described (1500)")
    parser.add_argument("--test", type=int, default=600, metavar="N", help="held-out questions (600)")
    parser.add_argument("--volumes", type=int, default=0, metavar="N", help="NIfTI volumes and DICOM series each (0)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="the same seed gives the same sources")
    arguments = vars(parser.parse_args())
    made = make_cases(**arguments)
    text = "made" if made else "was there already"
    Console().print(f"{arguments['out']}: {text} (synthetic, no medical data)", markup=False, soft_wrap=True)


if __name__ == "__main__":
    run_command(main)

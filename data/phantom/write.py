"""Writing the set: rows in PubMedVision's layout, pictures, checksums; whole or not at all."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data.phantom.descriptions import INVENTED, METHODS, MISREAD, STATED, describe
from data.phantom.drawing import picture
from data.phantom.facts import BODY_PARTS, MODALITIES, Facts
from data.phantom.records import Record, make_test_record, make_train_record, render_multiple_choice
from data.phantom.streams import HIGHEST_SEED, TEST, TRAIN
from huatuo_vision.schema import UserError

# Goes up whenever the same arguments would give other bytes.
GENERATOR_VERSION = 5

ALIGNMENT_FILE = "PubMedVision_Alignment_VQA.json"
INSTRUCTION_FILE = "PubMedVision_InstructionTuning_VQA.json"
# The four ways of describing the same pictures (descriptions.py).
DESCRIPTION_FILES = {method: f"{method}.json" for method in METHODS}
TEST_FILE = "phantom_test.json"
MANIFEST_FILE = "manifest.json"
README_FILE = "README.md"
SAMPLES_FILE = "samples.png"

Row = dict[str, object]


def _conversation(pairs: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [
        {"from": speaker, "value": text}
        for question, answer in pairs
        for speaker, text in (("human", question), ("gpt", answer))
    ]


def _train_rows(record: Record, seed: int, index: int, images: list[str]) -> dict[str, Row]:
    """The record's row of each training file. What has no picture has no place among the descriptions."""
    number = index + 1
    about = {
        # Of a record with several images: the first image's.
        "modality": record.pictures[0].modality if record.pictures else "",
        "body_part": record.pictures[0].body_part if record.pictures else "",
    }
    turns = [
        (render_multiple_choice(turn.question, turn.options), turn.letter)
        if turn.options
        else (turn.question, turn.answer)
        for turn in record.turns
    ]

    def row(prefix: str, pairs: Sequence[tuple[str, str]]) -> Row:
        return {"id": f"{prefix}_{number}", "image": images, "conversations": _conversation(pairs), **about}

    rows = {
        ALIGNMENT_FILE: row("Alignment_VQA", [record.description]),
        INSTRUCTION_FILE: row("Instruction-Tuning_VQA", turns),
    }
    if record.pictures:
        request = record.description[0]
        for method, description in describe(seed, index, record).items():
            rows[DESCRIPTION_FILES[method]] = row(method, [(request, description)])
    return rows


def _test_row(record: Record, number: int, images: list[str]) -> Row:
    turn = record.turns[0]
    asked = record.pictures[turn.image]
    return {
        "id": f"phantom_test_{number}",
        "image": images,
        "question": turn.question,
        "options": list(turn.options),
        "answer": turn.letter,
        "answer_text": turn.answer,
        "question_type": "multiple-choice",
        "groups": {"subject": turn.subject, "modality": asked.modality, "body_part": asked.body_part},
    }


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Consecutive records of one split, made by one worker."""

    folder: Path
    split: int
    start: int
    stop: int
    seed: int
    size: int


def _make_chunk(chunk: _Chunk) -> list[dict[str, Row]]:
    """Write the chunk's pictures and return each record's rows by file."""
    name, make = ("pmc", make_train_record) if chunk.split == TRAIN else ("test", make_test_record)
    rows: list[dict[str, Row]] = []
    for index in range(chunk.start, chunk.stop):
        record = make(chunk.seed, index)
        images = []
        for k, facts in enumerate(record.pictures):
            images.append(f"images/{name}_{index + 1}_{k}.png")
            drawn = picture(chunk.seed, chunk.split, index, k, facts, chunk.size)
            drawn.save(chunk.folder / images[-1], compress_level=1)
        if chunk.split == TRAIN:
            rows.append(_train_rows(record, chunk.seed, index, images))
        else:
            rows.append({TEST_FILE: _test_row(record, index + 1, images)})
    return rows


_CHUNK_RECORDS = 64
# Below this many records, starting worker processes takes longer than drawing.
_PARALLEL_FROM = 1024


def _run(chunks: Sequence[_Chunk], n_records: int, workers: int) -> Iterator[list[dict[str, Row]]]:
    if workers == 1 or n_records < _PARALLEL_FROM:
        yield from map(_make_chunk, chunks)
        return
    # Spawned, since forking a process that has threads (a progress bar's, a library's) can hang.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as executor:
        yield from executor.map(_make_chunk, chunks)


def _write_array(path: Path, rows: Sequence[Row]) -> str:
    """Write a JSON array, a row to a line, and return the file's sha256."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    data = (f"[\n{lines}\n]\n" if rows else "[]\n").encode()
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


_SHEET_SIDE, _SHEET_CELL, _SHEET_TEXT = 6, 132, 30


def _contact_sheet(seed: int, split: int, n_records: int, size: int) -> Image.Image:
    """A grid of the split's first pictures with their facts, for a person to look at."""
    make = make_train_record if split == TRAIN else make_test_record
    shown: list[tuple[Image.Image, Facts]] = []
    for index in range(n_records):
        record = make(seed, index)
        shown += [(picture(seed, split, index, k, f, size), f) for k, f in enumerate(record.pictures[:1])]
        if len(shown) == _SHEET_SIDE**2:
            break
    n_columns, step = _SHEET_SIDE, _SHEET_CELL + 8
    n_rows = max(1, -(-len(shown) // n_columns))
    sheet = Image.new("RGB", (n_columns * step, n_rows * (step + _SHEET_TEXT)), (245, 245, 245))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for place, (drawn, facts) in enumerate(shown):
        left, top = place % n_columns * step + 4, place // n_columns * (step + _SHEET_TEXT) + 4
        scale = _SHEET_CELL / max(drawn.size)
        shape = (round(drawn.width * scale), round(drawn.height * scale))
        enlarged = drawn.convert("RGB").resize(shape, Image.Resampling.NEAREST)
        sheet.paste(enlarged, (left + (_SHEET_CELL - shape[0]) // 2, top + (_SHEET_CELL - shape[1]) // 2))
        finding = f"{facts.count} {facts.size}, {facts.side}" if facts.count else "no finding"
        pen.text((left, top + _SHEET_CELL), f"{facts.modality}, {facts.body_part}\n{finding}", (20, 20, 20), font)
    return sheet


_README = """# Phantom: synthetic pictures for a demonstration

Every picture in this folder is drawn by a program (`data/phantom/`). None is a medical image, none comes from a
person, and nothing here says anything about medicine or about how well a model does on real images. The set shows
that a training run learns to see: its questions can't be answered without the pictures.

| file | content |
|---|---|
| `PubMedVision_Alignment_VQA.json` | {train} training records: a request to describe, and a caption with every fact |
| `PubMedVision_InstructionTuning_VQA.json` | the same {train} records: questions, multiple-choice and open |
| `native_caption.json` and three more | four other descriptions of the same pictures, see below |
| `phantom_test.json` | {test} held-out multiple-choice questions about {test_images} pictures of their own |
| `images/` | {images} pictures, PNG |
| `samples.png` | a few of the pictures with their facts |
| `manifest.json` | arguments, counts, checksums |

Each picture imitates one of: {modalities}. It shows one body part or tissue ({body_parts}) and either no finding or
one to three findings, all small or all large and all on the left or on the right of the picture (not of a patient).
For a record with several images, `modality` and `body_part` are the first image's. Over each kind of question the
right answers, and the letters of the right options, are balanced: a guess from the text alone is right for about
39 % of the test questions.

Four more files describe the training pictures as data-construction methods would, at stated shares (choices, measured
on nothing real): `native_caption.json` states modality, body part, finding, side, count and size in {stated} of the
captions (the last three: of those that state a finding) among text on other things; `llm_reformatted.json` is that
caption rewritten without seeing the picture, what is missing invented at {invented}; `mllm_distill.json` is read from
the picture alone, misread at {misread}; `mllm_reformatted.json` takes what the caption states and reads the rest.

Made with `python -m data.phantom --train {train} --test {test} --seed {seed} --size {size}` (generator version
{version}); the same arguments give the same bytes.
"""


def _percentages(shares: Iterable[float]) -> str:
    return ", ".join(f"{100 * share:.0f}" for share in shares) + " %"


def _arguments(train: int, test: int, seed: int, size: int) -> dict[str, int]:
    for name, value, low, high in (
        ("--train", train, 0, 10_000_000),
        ("--test", test, 0, 10_000_000),
        ("--seed", seed, 0, HIGHEST_SEED),
        ("--size", size, 32, 1024),
    ):
        if not low <= value <= high:
            raise UserError(f"{name} must be between {low} and {high}, not {value}.")
    if train == test == 0:
        raise UserError("--train and --test are both 0, so there is nothing to make; give at least one of them.")
    return {"train": train, "test": test, "seed": seed, "size": size}


def _is_there(out: Path, arguments: dict[str, int]) -> bool:
    """Whether `out` already holds, whole, what the arguments ask for. Raises UserError if it holds anything else."""
    if not out.exists() and not out.is_symlink():
        return False
    if not out.is_dir():
        raise UserError(f"{out} is not a folder; give --out a new folder.")
    remedy = "delete it or give --out a new folder"
    try:
        if not os.listdir(out):
            return False
        manifest = json.loads((out / MANIFEST_FILE).read_bytes())
        same = manifest["generator_version"] == GENERATOR_VERSION and manifest["arguments"] == arguments
        if same:
            whole = len(os.listdir(out / "images")) == manifest["counts"]["images"] and all(
                hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
                for name, digest in manifest["sha256"].items()
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{out} holds something other than a whole phantom data set; {remedy}.") from None
    if not same:
        raise UserError(f"{out} holds a phantom data set made with other arguments; {remedy}.")
    if not whole:
        raise UserError(f"{out} holds a phantom data set whose files were changed or removed; {remedy}.")
    return True


def _write(folder: Path, arguments: dict[str, int], workers: int, advance: Callable[[int], None]) -> None:
    train, test, seed, size = (arguments[name] for name in ("train", "test", "seed", "size"))
    (folder / "images").mkdir(parents=True)
    chunks = [
        _Chunk(folder, split, start, min(start + _CHUNK_RECORDS, n), seed, size)
        for split, n in ((TRAIN, train), (TEST, test))
        for start in range(0, n, _CHUNK_RECORDS)
    ]
    files = (ALIGNMENT_FILE, INSTRUCTION_FILE, *DESCRIPTION_FILES.values(), TEST_FILE)
    rows: dict[str, list[Row]] = {name: [] for name in files}
    # Closed on the way out, so that no worker still writes into a folder that is being removed.
    with closing(_run(chunks, train + test, workers)) as results:
        for made in results:
            for record_rows in made:
                for name, row in record_rows.items():
                    rows[name].append(row)
            advance(len(made))
    digests = {name: _write_array(folder / name, content) for name, content in rows.items()}
    train_images, test_images = (sum(len(row["image"]) for row in rows[name]) for name in (ALIGNMENT_FILE, TEST_FILE))
    manifest = {
        "generator": "phantom",
        "generator_version": GENERATOR_VERSION,
        "arguments": arguments,
        "counts": {
            **{name: len(content) for name, content in rows.items()},
            "images": train_images + test_images,
            "train_images": train_images,
            "test_images": test_images,
        },
        "sha256": digests,
    }
    readme = _README.format(
        **arguments,
        images=train_images + test_images,
        test_images=test_images,
        modalities=", ".join(MODALITIES),
        body_parts=", ".join(BODY_PARTS),
        version=GENERATOR_VERSION,
        stated=_percentages(STATED.values()),
        invented=_percentages([INVENTED]),
        misread=_percentages(MISREAD.values()),
    )
    (folder / README_FILE).write_text(readme, encoding="utf-8")
    shown, n_shown = (TEST, test) if test else (TRAIN, train)
    _contact_sheet(seed, shown, n_shown, size).save(folder / SAMPLES_FILE)
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def make_phantom(
    out: Path,
    train: int,
    test: int,
    seed: int,
    size: int = 64,
    workers: int | None = None,
    advance: Callable[[int], None] = lambda n_records: None,
) -> bool:
    """Make the data set in `out`; False where it is there already. `advance` is told of each lot of records made.

    It is written into a folder beside `out` and renamed when whole, so that `out` never holds half of it.
    """
    arguments = _arguments(train, test, seed, size)
    if _is_there(out, arguments):
        return False
    out = Path(os.path.abspath(out))
    unfinished = out.parent / f".{out.name}.{uuid.uuid4().hex[:12]}.unfinished"
    try:
        _write(unfinished, arguments, workers or os.cpu_count() or 1, advance)
        unfinished.rename(out)
    except OSError as error:
        raise UserError(f"{out} can't be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return True

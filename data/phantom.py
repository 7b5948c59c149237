"""A procedural demonstration data set: synthetic pictures in the manner of medical images, with exact ground truth.

`python -m data.phantom --out DIR --train N --test N --seed S` draws pictures that look roughly like X-ray, CT,
MRI, ultrasound, histology and fundus images, and writes captions and questions about them in PubMedVision's own
layout plus a held-out multiple-choice test. Nothing in it is medical data or says anything about medicine; it is
there so that a training run can be shown to learn to see. No question can be answered from its text: over each
kind of question the answers, and the letters of the right options, are balanced.

Record i of a split is a pure function of (seed, split, i), so records can be drawn in parallel and a larger
number keeps the smaller one's records as its beginning.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from huatuo_vision.schema import UserError

# Goes up whenever the same arguments would give other bytes.
GENERATOR_VERSION = 4

ALIGNMENT_FILE = "PubMedVision_Alignment_VQA.json"
INSTRUCTION_FILE = "PubMedVision_InstructionTuning_VQA.json"
TEST_FILE = "phantom_test.json"
MANIFEST_FILE = "manifest.json"
README_FILE = "README.md"
SAMPLES_FILE = "samples.png"

BODY_PARTS_OF = {
    "X-ray": ("chest", "hand", "knee"),
    "CT": ("chest", "brain", "abdomen"),
    "MRI": ("brain", "knee", "spine"),
    "ultrasound": ("kidney", "heart", "thyroid"),
    "histology": ("gland", "skin"),
    "fundus": ("retina",),
}
MODALITIES = tuple(BODY_PARTS_OF)
BODY_PARTS = tuple(dict.fromkeys(part for parts in BODY_PARTS_OF.values() for part in parts))
SIDES = ("left", "right")
SIZES = ("small", "large")
COUNTS = ("one", "two", "three")

SUBJECTS = ("modality", "body_part", "finding", "side", "count", "size")
# What can only be asked of a picture that shows a finding.
DETAILS = ("side", "count", "size")
ANSWERS: dict[str, tuple[str, ...]] = {
    "modality": MODALITIES,
    "body_part": BODY_PARTS,
    "finding": ("yes", "no"),
    "side": SIDES,
    "count": COUNTS,
    "size": SIZES,
}
# The options a question offers, always in this order: which letter is right depends on the picture alone, and every
# letter is right equally often because every answer is. A question about the body part offers the four of its group.
OPTIONS = {subject: (answers,) for subject, answers in ANSWERS.items()} | {
    "body_part": tuple(BODY_PARTS[i : i + 4] for i in range(0, len(BODY_PARTS), 4))
}
LETTERS = "ABCDEF"
ORDINALS = ("first", "second", "third")

OPTION_INSTRUCTION = "Answer with the option's letter from the given choices directly."

QUESTIONS: dict[str, tuple[str, ...]] = {
    "modality": (
        "What is the imaging modality?",
        "Which imaging modality was used?",
        "What kind of imaging is shown?",
    ),
    "body_part": (
        "Which body part or tissue is shown?",
        "What body part or tissue can be seen?",
        "What is the body part or tissue?",
    ),
    "finding": ("Is there a finding?", "Is a finding present?", "Can a finding be seen?"),
    "side": (
        "On which side is the finding?",
        "Which side shows the finding?",
        "Is the finding on the left or on the right?",
    ),
    "count": ("How many findings are there?", "What is the number of findings?", "How many findings can be seen?"),
    "size": ("What size is the finding?", "How large is the finding?", "Is the finding small or large?"),
    "comparison": ("Which image shows a finding?", "In which image is a finding present?"),
}
DESCRIBE_ONE = ("Describe the image.", "What does the image show?", "Please give a short report of the image.")
DESCRIBE_SEVERAL = (
    "Describe the images in order.",
    "What do the images show?",
    "Please give a short report of each image.",
)
# (question, answer, a wrong answer) for the rows without an image.
TEXT_ONLY = (
    ("What does CT stand for?", "computed tomography", "magnetic resonance imaging"),
    ("What does MRI stand for?", "magnetic resonance imaging", "computed tomography"),
    ("Which side is the opposite of left?", "right", "left"),
    ("Which side is the opposite of right?", "left", "right"),
    ("Which size is the opposite of small?", "large", "small"),
    ("Which size is the opposite of large?", "small", "large"),
    ("Which number comes after one?", "two", "three"),
    ("Which number comes after two?", "three", "one"),
    ("Which imaging modality uses sound waves?", "ultrasound", "X-ray"),
    ("Which imaging modality uses a microscope?", "histology", "MRI"),
    ("Which imaging modality shows the retina?", "fundus", "CT"),
)

# Tags of the random streams. A stream's spawn key is (split, purpose, index, index), always four numbers, so that
# no two streams coincide: a test picture is never a training picture, whatever the seeds and the numbers of records.
TRAIN, TEST = 0, 1
_CONTENT, _PICTURE, _SUBJECT, _KIND, _TURNS, _PAIR, _ANSWER = range(7)
_HIGHEST_SEED = 2**32 - 1


# ---------------------------------------------------------------------------------------------------------------
# Ground truth


@dataclass(frozen=True, slots=True)
class Facts:
    """What one picture shows: `count` findings (0: none), all of one size class and on one side of the picture."""

    modality: str
    body_part: str
    count: int
    size: str
    side: str

    def answer(self, subject: str) -> str:
        """The right answer to a question about `subject`."""
        if subject == "finding":
            return "yes" if self.count else "no"
        if subject == "count":
            return COUNTS[self.count - 1]
        return getattr(self, subject)

    def caption(self) -> str:
        """Every fact in one clause, beginning in lower case."""
        article = "an" if self.modality in ("X-ray", "MRI", "ultrasound") else "a"
        picture = f"{article} {self.modality} image of the {self.body_part}"
        if not self.count:
            return f"this is {picture} with no finding."
        noun = "finding" if self.count == 1 else "findings"
        return f"this is {picture} with {COUNTS[self.count - 1]} {self.size} {noun} on the {self.side} side."


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and its answer. `options` is empty for an open question; else one of them is the answer."""

    subject: str
    image: int  # the image asked about
    question: str
    answer: str
    options: tuple[str, ...] = ()

    @property
    def letter(self) -> str:
        return LETTERS[self.options.index(self.answer)]


@dataclass(frozen=True, slots=True)
class Record:
    """The pictures of one record and the conversation about them."""

    pictures: tuple[Facts, ...]
    turns: tuple[Turn, ...]
    description: tuple[str, str]  # the request to describe and its answer; of a test record: empty


def render_multiple_choice(question: str, options: Sequence[str]) -> str:
    """The multiple-choice form of a question, as training rows hold it and as an evaluation should ask it."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question, *lines, OPTION_INSTRUCTION])


def _rng(seed: int, split: int, purpose: int, index: int, part: int = 0) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(split, purpose, index, part)))


@lru_cache(maxsize=4096)
def _permutation(seed: int, split: int, purpose: int, part: int, block: int, length: int) -> tuple[int, ...]:
    return tuple(_rng(seed, split, purpose, block, part).permutation(length).tolist())


def _stratified(seed: int, split: int, purpose: int, index: int, length: int, part: int = 0) -> int:
    """A number below `length` that takes each value once in every `length` consecutive indices, in seeded order."""
    return _permutation(seed, split, purpose, part, index // length, length)[index % length]


def _pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]


@dataclass(frozen=True, slots=True)
class _Lead:
    """The first question of a record: its subject, and the answer it shall have."""

    subject: str
    answer: str


def _lead(seed: int, split: int, index: int) -> _Lead:
    """Subject and answer of record `index`, each balanced over the records.

    Every six records hold every subject once, so index // 6 counts the records of one subject.
    """
    number = _stratified(seed, split, _SUBJECT, index, len(SUBJECTS))
    subject, rank = SUBJECTS[number], index // len(SUBJECTS)
    answers = ANSWERS[subject]
    return _Lead(subject, answers[_stratified(seed, split, _ANSWER, rank, len(answers), number)])


def _draw_facts(rng: np.random.Generator, anatomy: str, present: bool, given: dict[str, str]) -> Facts:
    """Random facts that agree with `given`. `anatomy` names which of modality and body part is drawn evenly."""
    if anatomy == "body_part":
        body_part = given.get("body_part") or _pick(rng, BODY_PARTS)
        modality = _pick(rng, [name for name, parts in BODY_PARTS_OF.items() if body_part in parts])
    else:
        modality = given.get("modality") or _pick(rng, MODALITIES)
        body_part = _pick(rng, BODY_PARTS_OF[modality])
    count = COUNTS.index(given.get("count") or _pick(rng, COUNTS)) + 1
    size = given.get("size") or _pick(rng, SIZES)
    side = given.get("side") or _pick(rng, SIDES)
    return Facts(modality, body_part, count if present else 0, size, side)


def _options(subject: str, answer: str) -> tuple[str, ...]:
    """The options of a multiple-choice question about `subject` of which `answer` is one."""
    return next(options for options in OPTIONS[subject] if answer in options)


def _about(question: str, image: int, n_images: int) -> str:
    if n_images == 1:
        return question
    return f"In the {ORDINALS[image]} image, {question[0].lower()}{question[1:]}"


def _question(
    rng: np.random.Generator,
    pictures: Sequence[Facts],
    image: int,
    subject: str,
    multiple_choice: bool,
) -> Turn:
    question = _about(_pick(rng, QUESTIONS[subject]), image, len(pictures))
    answer = pictures[image].answer(subject)
    options = _options(subject, answer) if multiple_choice else ()
    return Turn(subject, image, question, answer, options)


def _comparison(rng: np.random.Generator, pictures: Sequence[Facts], image: int, multiple_choice: bool) -> Turn:
    """Which image shows a finding: `image`, alone."""
    names = tuple(f"the {ORDINALS[k]} image" for k in range(len(pictures)))
    options = names if multiple_choice else ()
    return Turn("finding", image, _pick(rng, QUESTIONS["comparison"]), names[image], options)


def _follow_ups(rng: np.random.Generator, lead: str, anatomy: str, n: int) -> list[str]:
    """The subjects of the further questions about one picture, chosen before the picture is.

    Whether there is a finding is never asked after a question that supposes one.
    """
    asked = [lead]
    for _ in range(n):
        open_subjects = [anatomy, *DETAILS]
        # Otherwise `finding` would come up much less often than the three details together.
        if not set(asked) & {"finding", *DETAILS} and rng.random() < 0.5:
            open_subjects = ["finding"]
        asked.append(_pick(rng, [subject for subject in open_subjects if subject not in asked]))
    return asked[1:]


# Shares of the training records.
_KIND_CYCLE = 25  # 1 of 25 without an image, 3 with two images, 2 with three
_TURN_CYCLE = 3  # 1 of 3 with two turns, 1 with three
_MULTIPLE_CHOICE_SHARE = 0.75
_COMPARISON_SHARE = 0.25  # of the records with several images
_TEST_PAIR_CYCLE = 10  # 1 of 10 test questions has two images


def make_train_record(seed: int, index: int) -> Record:
    """Training record `index` (0-based): its pictures' facts, its description and its questions."""
    rng = _rng(seed, TRAIN, _CONTENT, index)
    kind = _stratified(seed, TRAIN, _KIND, index, _KIND_CYCLE)
    if kind == 0:
        return _text_only_record(rng)
    n_images = 2 if kind <= 3 else 3 if kind <= 5 else 1
    n_follow_ups = {0: 2, 1: 1}.get(_stratified(seed, TRAIN, _TURNS, index, _TURN_CYCLE), 0)
    lead = _lead(seed, TRAIN, index)
    # One record asks for the modality or for the body part, never for both: each would give the other away.
    anatomy = lead.subject if lead.subject in ("modality", "body_part") else _pick(rng, ("modality", "body_part"))
    comparison = n_images > 1 and rng.random() < _COMPARISON_SHARE
    subject = "finding" if comparison else lead.subject
    plan = _follow_ups(rng, subject, anatomy, n_follow_ups)

    image = int(rng.integers(n_images))
    if comparison:
        present = True
    elif subject == "finding":
        present = lead.answer == "yes"
    elif "finding" in plan or not {subject, *plan} & set(DETAILS):
        present = bool(rng.integers(2))
    else:
        present = True
    given = {} if comparison else {lead.subject: lead.answer}
    pictures = []
    for k in range(n_images):
        if k == image:
            pictures.append(_draw_facts(rng, anatomy, present, given))
        else:
            other_present = bool(rng.integers(2)) and not comparison
            pictures.append(_draw_facts(rng, anatomy, other_present, {}))

    choice = rng.random() < _MULTIPLE_CHOICE_SHARE
    if comparison:
        turns = [_comparison(rng, pictures, image, choice)]
    else:
        turns = [_question(rng, pictures, image, subject, choice)]
    asked = {(image, subject)}
    for further in plan:
        about = image
        if further == anatomy or (further in DETAILS and not present):
            # A picture without a finding has no details to ask for; another image's anatomy is as good a question.
            further, about = anatomy, int(rng.integers(n_images))
        if (about, further) in asked:
            continue
        asked.add((about, further))
        turns.append(_question(rng, pictures, about, further, rng.random() < _MULTIPLE_CHOICE_SHARE))
    return Record(tuple(pictures), tuple(turns), _description(rng, pictures))


def _text_only_record(rng: np.random.Generator) -> Record:
    question, answer, wrong = TEXT_ONLY[int(rng.integers(len(TEXT_ONLY)))]
    pair = (answer, wrong) if rng.random() < 0.5 else (wrong, answer)
    options = pair if rng.random() < _MULTIPLE_CHOICE_SHARE else ()
    described = TEXT_ONLY[int(rng.integers(len(TEXT_ONLY)))]
    return Record((), (Turn("text", 0, question, answer, options),), described[:2])


def _description(rng: np.random.Generator, pictures: Sequence[Facts]) -> tuple[str, str]:
    if len(pictures) == 1:
        caption = pictures[0].caption()
        return _pick(rng, DESCRIBE_ONE), caption[0].upper() + caption[1:]
    captions = [f"{ORDINALS[k].capitalize()} image: {facts.caption()}" for k, facts in enumerate(pictures)]
    return _pick(rng, DESCRIBE_SEVERAL), " ".join(captions)


def make_test_record(seed: int, index: int) -> Record:
    """Test record `index` (0-based): one multiple-choice question about one picture, or about one of two."""
    rng = _rng(seed, TEST, _CONTENT, index)
    lead = _lead(seed, TEST, index)
    number, rank = SUBJECTS.index(lead.subject), index // len(SUBJECTS)
    n_images = 2 if _stratified(seed, TEST, _PAIR, rank, _TEST_PAIR_CYCLE, number) == 0 else 1
    anatomy = "body_part" if lead.subject == "body_part" else "modality"
    image = int(rng.integers(n_images))
    comparison = n_images > 1 and lead.subject == "finding" and bool(rng.integers(2))
    if comparison or lead.subject in DETAILS:
        present = True
    elif lead.subject == "finding":
        present = lead.answer == "yes"
    else:
        present = bool(rng.integers(2))
    given = {} if comparison else {lead.subject: lead.answer}
    pictures = []
    for k in range(n_images):
        if k == image:
            pictures.append(_draw_facts(rng, anatomy, present, given))
        else:
            pictures.append(_draw_facts(rng, anatomy, bool(rng.integers(2)) and not comparison, {}))
    if comparison:
        turn = _comparison(rng, pictures, image, multiple_choice=True)
    else:
        turn = _question(rng, pictures, image, lead.subject, multiple_choice=True)
    return Record(tuple(pictures), (turn,), ("", ""))


# ---------------------------------------------------------------------------------------------------------------
# Drawing. Coordinates run from -1 to 1 over the picture, y downwards; brightness runs from 0 to 1. An image is
# (height, width), or (3, height, width) in colour: NumPy is much slower with the short axis last.

Array = np.ndarray

# Three large findings in neighbouring slots stay apart, by a pixel of 60 at the least.
SMALL_RADIUS, LARGE_RADIUS = 0.12, 0.22
_EDGE = 0.05  # the width of a soft edge, about a pixel and a half of 64


def _soft(distance: Array) -> Array:
    """Coverage of a shape from the signed distance to its outline (positive inside)."""
    coverage = distance * np.float32(1 / _EDGE)
    coverage += np.float32(0.5)
    # Called most of all; np.clip takes twice as long on arrays this small.
    np.maximum(coverage, 0, out=coverage)
    return np.minimum(coverage, 1, out=coverage)


def _ellipse(x: Array, y: Array, cx: float, cy: float, rx: float, ry: float) -> Array:
    radius = np.sqrt(((x - cx) * (1 / rx)) ** 2 + ((y - cy) * (1 / ry)) ** 2)
    return _soft((1 - radius) * min(rx, ry))


def _box(x: Array, y: Array, cx: float, cy: float, rx: float, ry: float) -> Array:
    """A rectangle of half-widths rx and ry."""
    return _soft(rx - np.abs(x - cx)) * _soft(ry - np.abs(y - cy))


def _colour(value: float | Sequence[float]) -> Array:
    """A grey value, or a colour that broadcasts over an image's rows and columns."""
    return np.asarray(value, np.float32)[..., None, None]


def _paint(image: Array, coverage: Array, value: float | Sequence[float], strength: float = 1.0) -> None:
    """Lay `value` (grey, or one number per colour channel) over the image where `coverage` says."""
    if strength != 1.0:
        coverage = coverage * np.float32(strength)
    image += coverage * (_colour(value) - image)


def _xray_chest(image: Array, x: Array, y: Array, rng: np.random.Generator) -> None:
    image += np.float32(0.16)
    _paint(image, _ellipse(x, y, 0, 0.5, 0.98, 1.45), 0.46)
    lungs = _ellipse(x, y, -0.44, 0.0, 0.33, 0.74) + _ellipse(x, y, 0.44, 0.0, 0.33, 0.74)
    _paint(image, lungs, 0.14)
    ribs = np.clip(np.sin((y + 0.45 * x * x + rng.uniform(0, 0.3)) * 21) * 2 - 0.6, 0, 1)
    _paint(image, ribs * lungs, 0.32, 0.8)
    _paint(image, _box(x, y, 0, 0.0, 0.1, 1.2), 0.62)
    _paint(image, _ellipse(x, y, 0.06, 0.45, 0.26, 0.3), 0.54)


def _xray_hand(image: Array, x: Array, y: Array, rng: np.random.Generator) -> None:
    image += np.float32(0.12)
    _paint(image, _ellipse(x, y, 0, 0.5, 0.66, 0.52), 0.32)
    thumb = -1 if rng.integers(2) else 1
    slanted = x - thumb * (0.85 - 0.45 * y)
    _paint(image, _box(slanted, y, 0, 0.4, 0.11, 0.4), 0.32)
    _paint(image, _box(slanted, y, 0, 0.4, 0.05, 0.34), 0.56)
    for cx, top in ((-0.51, -0.55), (-0.17, -0.8), (0.17, -0.85), (0.51, -0.65)):
        finger = x - cx * (1 - 0.3 * (y - 0.2) * (y > 0.2))
        middle, half = (top + 0.5) / 2, (0.5 - top) / 2
        _paint(image, _box(finger, y, 0, middle, 0.13, half), 0.32)
        bone = _box(finger, y, 0, (top + 0.75) / 2, 0.06, (0.75 - top) / 2)
        joints = np.abs(np.mod(y - top, 0.36) - 0.18) > 0.03
        _paint(image, bone * joints, 0.58)


def _xray_knee(image: Array, x: Array, y: Array, rng: np.random.Generator) -> None:
    image += np.float32(0.12)
    _paint(image, _soft(0.78 - 0.1 * y - np.abs(x)), 0.3)
    width = 0.24 + 0.22 * np.exp(-((y * 4) ** 2))
    _paint(image, _soft(width - np.abs(x)) * _soft(np.abs(y) - 0.05), 0.56)
    _paint(image, _soft(width - 0.1 - np.abs(x)) * _soft(np.abs(y) - 0.15), 0.42)
    # The fibula, beside the shin on either side.
    _paint(image, _box(x, y, 0.46 if rng.integers(2) else -0.46, 0.75, 0.06, 0.5), 0.5)


def _ct_table(image: Array, x: Array, y: Array) -> None:
    _paint(image, _soft(0.03 - np.abs(y - 0.95 + 0.1 * x * x)), 0.5)


def _ct_chest(image: Array, x: Array, y: Array, rng: np.random.Generator) -> None:
    _ct_table(image, x, y)
    _paint(image, _ellipse(x, y, 0, 0, 0.95, 0.82), 0.5)
    _paint(image, _ellipse(x, y, -0.45, 0, 0.36, 0.64), 0.06)
    _paint(image, _ellipse(x, y, 0.45, 0, 0.36, 0.64), 0.06)
    _paint(image, _ellipse(x, y, 0.04, -0.14, 0.2, 0.3), 0.6)
    _paint(image, _ellipse(x, y, 0, 0.52, 0.13, 0.14), 0.82)


def _ct_brain(image: Array, x: Array, y: Array, rng: np.random.Generator) -> None:
    _ct_table(image, x, y)
    _paint(image, _ellipse(x, y, 0, -0.03, 0.82, 0.92), 0.86)
    _paint(image, _ellipse(x, y, 0, -0.03, 0.72, 0.82), 0.38)
    _paint(image, _soft(0.02 - np.abs(x)) * _soft(0.8 - np.abs(y)), 0.5, 0.6)
    for cx in (-0.09, 0.09):
        _paint(image, _ellipse(x, y, cx, -0.02, 0.07, 0.26), 0.1)


def _ct_abdomen(image: Array, x: Array, y: Array, rng: np.random.Generator) -> None:
    _ct_table(image, x, y)
    _paint(image, _ellipse(x, y, 0, 0, 0.96, 0.84), 0.22)
    _paint(image, _ellipse(x, y, 0, 0, 0.86, 0.72), 0.42)
    _paint(image, _ellipse(x, y, -0.42, -0.08, 0.36, 0.5), 0.55)
    _paint(image, _ellipse(x, y, 0.38, -0.3, 0.28, 0.2), 0.3)
    for cx in (-0.34, 0.34):
        _paint(image, _ellipse(x, y, cx, 0.34, 0.15, 0.17), 0.58)
    _paint(image, _ellipse(x, y, 0, 0.1, 0.08, 0.08), 0.66)
    _paint(image, _ellipse(x, y, 0, 0.36, 0.15, 0.15), 0.84)


def _mri_brain(image: Array, x: Array, y: Array, rng: np.random.Generator) -> None:
    _paint(image, _ellipse(x, y, 0, 0, 0.86, 0.95), 0.62)
    _paint(image, _ellipse(x, y, 0, 0, 0.79, 0.88), 0.04)
    brain = _ellipse(x, y, 0, 0, 0.74, 0.83)
    _paint(image, brain, 0.48)
    radius, angle = np.hypot(x * 1.12, y), np.arctan2(y, x)
    folds = np.sin(angle * 14 + 5 * np.sin(radius * 9 + rng.uniform(0, 6)))
    _paint(image, brain * np.clip(folds * 3, 0, 1) * np.clip(radius * 4 - 1.4, 0, 1), 0.24, 0.8)
    _paint(image, brain * _soft(0.02 - np.abs(x)), 0.1)
    for cx in (-0.12, 0.12):
        _paint(image, _ellipse(x + cx * y, y, cx, -0.02, 0.06, 0.24), 0.08)


def _mri_knee(image: Array, x: Array, y: Array, rng: np.random.Generator) -> None:
    _paint(image, _soft(0.86 - np.abs(x)), 0.5)
    _paint(image, _soft(0.76 - np.abs(x)), 0.2)
    width = 0.34 + 0.26 * np.exp(-((y * 3) ** 2))
    for border, value in ((0.0, 0.02), (0.05, 0.6)):
        _paint(image, _soft(width - border - np.abs(x)) * _soft(np.abs(y) - 0.08 - border), value)
    _paint(image, _ellipse(x, y, 0, 0, 0.5, 0.07), 0.32)


def _mri_spine(image: Array, x: Array, y: Array, rng: np.random.Generator) -> None:
    image += np.float32(0.26)
    _paint(image, np.clip(np.sin(x * 34 + 3 * np.sin(y * 3)), 0, 1) * _soft(np.abs(x) - 0.3), 0.14, 0.7)
    _paint(image, _box(x, y, 0, 0, 0.24, 1.3), 0.05)
    phase = np.mod(y + rng.uniform(0, 0.4), 0.4)
    _paint(image, _soft(0.19 - np.abs(x)) * _soft(0.14 - np.abs(phase - 0.2)), 0.62)
    _paint(image, _soft(0.04 - np.abs(np.abs(x) - 0.3)), 0.5)


def _fan(x: Array, y: Array) -> tuple[Array, Array]:
    """The field of view of an ultrasound probe, and the depth below it."""
    depth = np.hypot(x, y + 1.75)
    return _soft(depth - 0.85) * _soft(2.62 - depth) * _soft((0.62 - np.abs(np.arctan2(x, y + 1.75))) * depth), depth


def _ultrasound(image: Array, x: Array, y: Array, rng: np.random.Generator, organ: Callable[..., None]) -> None:
    fan, depth = _fan(x, y)
    image += np.float32(0.34) + np.float32(0.06) * np.sin(depth * 16)
    organ(image, x, y)
    height, width = image.shape
    speckle = rng.standard_normal(((height + 1) // 2, (width + 1) // 2), np.float32).repeat(2, 0).repeat(2, 1)
    image *= 1 + np.float32(0.3) * np.clip(speckle[:height, :width], -2, 2)
    image *= fan


def _ultrasound_kidney(image: Array, x: Array, y: Array) -> None:
    _paint(image, _ellipse(x, y, 0, 0.15, 0.8, 0.56), 0.5)
    _paint(image, _ellipse(x, y, 0, 0.15, 0.72, 0.48), 0.17)
    _paint(image, _ellipse(x, y, 0, 0.15, 0.2, 0.22), 0.55)


def _ultrasound_heart(image: Array, x: Array, y: Array) -> None:
    for cx in (-0.33, 0.33):
        _paint(image, _ellipse(x, y, cx, -0.12, 0.27, 0.34), 0.04)
        _paint(image, _ellipse(x, y, cx, 0.5, 0.25, 0.22), 0.04)


def _ultrasound_thyroid(image: Array, x: Array, y: Array) -> None:
    for cx in (-0.45, 0.45):
        _paint(image, _ellipse(x, y, cx, 0.1, 0.3, 0.55), 0.52)
    _paint(image, _ellipse(x, y, 0, 0.3, 0.2, 0.34), 0.6)
    _paint(image, _ellipse(x, y, 0, 0.36, 0.17, 0.34), 0.02)


_NUCLEUS = (0.55, 0.33, 0.66)


def _nuclei(image: Array, rng: np.random.Generator, n: int) -> None:
    """Small cell nuclei scattered over the picture, each two pixels by two."""
    rows = rng.integers(0, image.shape[1] - 1, n)
    columns = rng.integers(0, image.shape[2] - 1, n)
    for down in (0, 1):
        for right in (0, 1):
            image[:, rows + down, columns + right] = np.asarray(_NUCLEUS, np.float32)[:, None]


def _histology_gland(image: Array, x: Array, y: Array, rng: np.random.Generator) -> None:
    image += _colour((0.93, 0.74, 0.83))
    _nuclei(image, rng, 70)
    for cx, cy, rx, ry in ((0, 0, 0.26, 0.62), (-0.95, 0, 0.2, 0.7), (0.95, 0, 0.2, 0.7)):
        u, v = (x - cx) * (1 / rx), (y - cy) * (1 / ry)
        radius = np.hypot(u, v) * (1 + 0.1 * np.cos(9 * np.arctan2(v, u)))
        _paint(image, _soft((1 - radius) * rx), (0.66, 0.42, 0.74))
        _paint(image, _soft((0.6 - radius) * rx), (0.98, 0.96, 0.97))


def _histology_skin(image: Array, x: Array, y: Array, rng: np.random.Generator) -> None:
    image += _colour((0.95, 0.7, 0.78))
    fibres = np.sin(y * 26 + 2.5 * np.sin(x * 5 + rng.uniform(0, 6)))
    _paint(image, np.clip(fibres, 0, 1), (0.98, 0.84, 0.88), 0.8)
    _nuclei(image, rng, 35)
    border = -0.52 + 0.07 * np.sin(x * 9 + rng.uniform(0, 6)) - y
    _paint(image, _soft(border), (0.62, 0.38, 0.7))
    _paint(image, _soft(border - 0.24), (0.97, 0.95, 0.96))


def _fundus_retina(image: Array, x: Array, y: Array, rng: np.random.Generator) -> None:
    distance = np.hypot(x, y)
    eye = _soft(0.97 - distance)
    _paint(image, eye, (0.74, 0.34, 0.13))
    image *= 1 - np.float32(0.3) * distance * distance
    # The macula, faintly darker, on either side of the optic disc.
    _paint(image, _ellipse(x, y, 0.45 if rng.integers(2) else -0.45, 0.02, 0.16, 0.16), (0.5, 0.2, 0.08), 0.5)
    reach = np.sqrt(np.abs(x) + np.float32(0.01))
    for bend in (rng.uniform(0.7, 0.9), rng.uniform(0.1, 0.22)):
        _paint(image, eye * _soft(0.02 - np.abs(np.abs(y) - bend * reach)), (0.42, 0.08, 0.06), 0.9)
    _paint(image, _ellipse(x, y, 0, 0, 0.15, 0.17), (0.9, 0.66, 0.3))


@dataclass(frozen=True, slots=True)
class _View:
    """How one modality shows one body part, and how far from the middle its findings lie."""

    draw: Callable[[Array, Array, Array, np.random.Generator], None]
    slot_x: float = 0.42


def _sonogram(organ: Callable[[Array, Array, Array], None]) -> Callable[..., None]:
    return lambda image, x, y, rng: _ultrasound(image, x, y, rng, organ)


_VIEWS: dict[tuple[str, str], _View] = {
    ("X-ray", "chest"): _View(_xray_chest, slot_x=0.44),
    ("X-ray", "hand"): _View(_xray_hand, slot_x=0.36),
    ("X-ray", "knee"): _View(_xray_knee, slot_x=0.4),
    ("CT", "chest"): _View(_ct_chest, slot_x=0.44),
    ("CT", "brain"): _View(_ct_brain, slot_x=0.37),
    ("CT", "abdomen"): _View(_ct_abdomen, slot_x=0.42),
    ("MRI", "brain"): _View(_mri_brain, slot_x=0.38),
    ("MRI", "knee"): _View(_mri_knee, slot_x=0.4),
    ("MRI", "spine"): _View(_mri_spine, slot_x=0.55),
    ("ultrasound", "kidney"): _View(_sonogram(_ultrasound_kidney), slot_x=0.42),
    ("ultrasound", "heart"): _View(_sonogram(_ultrasound_heart), slot_x=0.42),
    ("ultrasound", "thyroid"): _View(_sonogram(_ultrasound_thyroid), slot_x=0.44),
    ("histology", "gland"): _View(_histology_gland, slot_x=0.52),
    ("histology", "skin"): _View(_histology_skin, slot_x=0.45),
    ("fundus", "retina"): _View(_fundus_retina, slot_x=0.46),
}
_COLOURED = ("histology", "fundus")
# A finding is marked as an annotation tool would mark it: green inside a dark rim, in every manner of picture.
_SLOT_Y = (-0.58, 0.0, 0.58)
_FINDING, _RIM = (0.15, 0.95, 0.4), (0.02, 0.1, 0.05)


@lru_cache(maxsize=4096)
def _axes(height: int, width: int) -> tuple[Array, Array]:
    """The coordinates of the pixels' centres, as a column of y and a row of x."""
    y = (np.arange(height, dtype=np.float32) + np.float32(0.5)) * np.float32(2 / height) - 1
    x = (np.arange(width, dtype=np.float32) + np.float32(0.5)) * np.float32(2 / width) - 1
    return y[:, None], x[None, :]


def _draw_findings(image: Array, x: Array, y: Array, facts: Facts, view: _View, rng: np.random.Generator) -> None:
    radius = SMALL_RADIUS if facts.size == "small" else LARGE_RADIUS
    sign = -1 if facts.side == "left" else 1
    for slot in sorted(rng.permutation(3)[: facts.count].tolist()):
        cx = sign * view.slot_x + rng.uniform(-0.05, 0.05)
        cy = _SLOT_Y[slot] + rng.uniform(-0.02, 0.02)
        rx, ry = (radius * stretch for stretch in rng.uniform(0.92, 1.08, 2).tolist())
        _paint(image, _ellipse(x, y, cx, cy, rx + 0.06, ry + 0.06), _RIM, 0.7)
        _paint(image, _ellipse(x, y, cx, cy, rx, ry), _FINDING)


def draw_picture(facts: Facts, rng: np.random.Generator, size: int) -> Image.Image:
    """A picture of `facts`, its sides between 7/8 and 3/2 of `size`, in colour where the modality or a finding is."""
    area, shape = rng.uniform(1.0, 1.36), rng.uniform(0.88, 1.13)
    width, height = (
        int(np.clip(round(side), round(size * 7 / 8), round(size * 3 / 2)))
        for side in (size * area * shape, size * area / shape)
    )
    rows, columns = _axes(height, width)
    zoom = 1 / rng.uniform(0.95, 1.05)
    x = (columns - np.float32(rng.uniform(-0.05, 0.05))) * np.float32(zoom)
    y = (rows - np.float32(rng.uniform(-0.05, 0.05))) * np.float32(zoom)
    view = _VIEWS[facts.modality, facts.body_part]
    coloured = facts.modality in _COLOURED
    image = np.zeros((3, height, width) if coloured else (height, width), np.float32)
    view.draw(image, x, y, rng)
    if facts.modality == "MRI":
        # An uneven coil and faint ghosts along one direction.
        image *= 1 + np.float32(rng.uniform(-0.15, 0.15)) * x + np.float32(rng.uniform(-0.15, 0.15)) * y
        image += np.float32(0.025) * np.sin(y * 40 + np.float32(rng.uniform(0, 6)))
    contrast, brightness = rng.uniform(0.8, 1.1), rng.uniform(-0.05, 0.05)
    noise = rng.standard_normal((height, width), np.float32)
    noise *= np.float32(rng.uniform(0.01, 0.04))
    if facts.count and image.ndim == 2:
        image = np.repeat(image[None], 3, axis=0)
    # The last to take random numbers, so that nothing else in the picture depends on what the findings are.
    _draw_findings(image, x, y, facts, view, rng)
    image -= np.float32(0.5)
    image *= np.float32(contrast)
    image += np.float32(0.5 + brightness)
    image += noise
    pixels = (np.clip(image, 0, 1) * np.float32(255) + np.float32(0.5)).astype(np.uint8)
    return Image.fromarray(np.moveaxis(pixels, 0, -1) if pixels.ndim == 3 else pixels)


def picture(seed: int, split: int, index: int, k: int, facts: Facts, size: int) -> Image.Image:
    """Picture `k` of record `index`, always the same for the same arguments."""
    return draw_picture(facts, _rng(seed, split, _PICTURE, index, k), size)


# ---------------------------------------------------------------------------------------------------------------
# Writing

Row = dict[str, object]


def _conversation(pairs: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [
        {"from": speaker, "value": text}
        for question, answer in pairs
        for speaker, text in (("human", question), ("gpt", answer))
    ]


def _train_rows(record: Record, number: int, images: list[str]) -> tuple[Row, Row]:
    """The record's row of the alignment file and its row of the instruction file."""
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
    alignment = {
        "id": f"Alignment_VQA_{number}",
        "image": images,
        "conversations": _conversation([record.description]),
        **about,
    }
    instruction = {
        "id": f"Instruction-Tuning_VQA_{number}",
        "image": images,
        "conversations": _conversation(turns),
        **about,
    }
    return alignment, instruction


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


def _make_chunk(chunk: _Chunk) -> list[tuple[Row, ...]]:
    """Write the chunk's pictures and return its rows."""
    name, make = ("pmc", make_train_record) if chunk.split == TRAIN else ("test", make_test_record)
    rows: list[tuple[Row, ...]] = []
    for index in range(chunk.start, chunk.stop):
        record = make(chunk.seed, index)
        images = []
        for k, facts in enumerate(record.pictures):
            images.append(f"images/{name}_{index + 1}_{k}.png")
            drawn = picture(chunk.seed, chunk.split, index, k, facts, chunk.size)
            drawn.save(chunk.folder / images[-1], compress_level=1)
        if chunk.split == TRAIN:
            rows.append(_train_rows(record, index + 1, images))
        else:
            rows.append((_test_row(record, index + 1, images),))
    return rows


_CHUNK_RECORDS = 64
# Below this many records, starting worker processes takes longer than drawing.
_PARALLEL_FROM = 1024


def _run(chunks: Sequence[_Chunk], n_records: int, workers: int) -> Iterator[list[tuple[Row, ...]]]:
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

Every picture in this folder is drawn by a program (`data/phantom.py`). None is a medical image, none comes from a
person, and nothing here says anything about medicine or about how well a model does on real images. The set shows
that a training run learns to see: its questions can't be answered without the pictures.

| file | content |
|---|---|
| `PubMedVision_Alignment_VQA.json` | {train} training records: a request to describe, and a caption with every fact |
| `PubMedVision_InstructionTuning_VQA.json` | the same {train} records: questions, multiple-choice and open |
| `phantom_test.json` | {test} held-out multiple-choice questions about {test_images} pictures of their own |
| `images/` | {images} pictures, PNG |
| `samples.png` | a few of the pictures with their facts |
| `manifest.json` | arguments, counts, checksums |

Each picture imitates one of: {modalities}. It shows one body part or tissue ({body_parts}) and either no finding or
one to three findings, all small or all large and all on the left or on the right of the picture (not of a patient).
For a record with several images, `modality` and `body_part` are the first image's. Over each kind of question the
right answers, and the letters of the right options, are balanced: a guess from the text alone is right for about
39 % of the test questions.

Made with `python -m data.phantom --train {train} --test {test} --seed {seed} --size {size}` (generator version
{version}); the same arguments give the same bytes.
"""


def _arguments(train: int, test: int, seed: int, size: int) -> dict[str, int]:
    for name, value, low, high in (
        ("--train", train, 0, 10_000_000),
        ("--test", test, 0, 10_000_000),
        ("--seed", seed, 0, _HIGHEST_SEED),
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
    rows: dict[str, list[Row]] = {ALIGNMENT_FILE: [], INSTRUCTION_FILE: [], TEST_FILE: []}
    # Closed on the way out, so that no worker still writes into a folder that is being removed.
    with closing(_run(chunks, train + test, workers)) as results:
        for chunk, made in zip(chunks, results, strict=True):
            names = (ALIGNMENT_FILE, INSTRUCTION_FILE) if chunk.split == TRAIN else (TEST_FILE,)
            for record_rows in made:
                for name, row in zip(names, record_rows, strict=True):
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


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m data.phantom",
        description="Make a demonstration data set of synthetic pictures in PubMedVision's layout (no medical data).",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new folder")
    parser.add_argument("--train", type=int, required=True, metavar="N", help="training records (0: none)")
    parser.add_argument("--test", type=int, required=True, metavar="N", help="held-out questions (0: none)")
    parser.add_argument("--seed", type=int, required=True, metavar="S", help="the same seed gives the same data")
    parser.add_argument("--size", type=int, default=64, help="pictures measure 7/8 to 3/2 of it a side (default: 64)")
    arguments = parser.parse_args(argv)

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("records", total=arguments.train + arguments.test)
            made = make_phantom(
                **vars(arguments),
                advance=lambda n_records: progress.advance(task, n_records),
            )
    except UserError as error:
        console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    if made:
        text = f"{arguments.out}: {arguments.train} training records and {arguments.test} test questions made."
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    else:
        # On stdout: of no interest to whoever only needs the data to be there.
        text = f"{arguments.out} already holds this data set; nothing to do."
        Console().print(text, markup=False, highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

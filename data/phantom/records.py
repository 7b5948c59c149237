"""The records of the set: the facts of their pictures, their description and their questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.phantom.facts import (
    ANSWERS,
    BODY_PARTS,
    BODY_PARTS_OF,
    COUNTS,
    DETAILS,
    LETTERS,
    MODALITIES,
    OPTIONS,
    ORDINALS,
    SIDES,
    SIZES,
    SUBJECTS,
    Facts,
)
from data.phantom.streams import (
    ANSWER,
    CONTENT,
    KIND,
    PAIR,
    SUBJECT,
    TEST,
    TRAIN,
    TURNS,
    pick,
    stratified,
    stream,
)

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


@dataclass(frozen=True, slots=True)
class _Lead:
    """The first question of a record: its subject, and the answer it shall have."""

    subject: str
    answer: str


def _lead(seed: int, split: int, index: int) -> _Lead:
    """Subject and answer of record `index`, each balanced over the records.

    Every six records hold every subject once, so index // 6 counts the records of one subject.
    """
    number = stratified(seed, split, SUBJECT, index, len(SUBJECTS))
    subject, rank = SUBJECTS[number], index // len(SUBJECTS)
    answers = ANSWERS[subject]
    return _Lead(subject, answers[stratified(seed, split, ANSWER, rank, len(answers), number)])


def _draw_facts(rng: np.random.Generator, anatomy: str, present: bool, given: dict[str, str]) -> Facts:
    """Random facts that agree with `given`. `anatomy` names which of modality and body part is drawn evenly."""
    if anatomy == "body_part":
        body_part = given.get("body_part") or pick(rng, BODY_PARTS)
        modality = pick(rng, [name for name, parts in BODY_PARTS_OF.items() if body_part in parts])
    else:
        modality = given.get("modality") or pick(rng, MODALITIES)
        body_part = pick(rng, BODY_PARTS_OF[modality])
    count = COUNTS.index(given.get("count") or pick(rng, COUNTS)) + 1
    size = given.get("size") or pick(rng, SIZES)
    side = given.get("side") or pick(rng, SIDES)
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
    question = _about(pick(rng, QUESTIONS[subject]), image, len(pictures))
    answer = pictures[image].answer(subject)
    options = _options(subject, answer) if multiple_choice else ()
    return Turn(subject, image, question, answer, options)


def _comparison(rng: np.random.Generator, pictures: Sequence[Facts], image: int, multiple_choice: bool) -> Turn:
    """Which image shows a finding: `image`, alone."""
    names = tuple(f"the {ORDINALS[k]} image" for k in range(len(pictures)))
    options = names if multiple_choice else ()
    return Turn("finding", image, pick(rng, QUESTIONS["comparison"]), names[image], options)


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
        asked.append(pick(rng, [subject for subject in open_subjects if subject not in asked]))
    return asked[1:]


# Shares of the training records.
_KIND_CYCLE = 25  # 1 of 25 without an image, 3 with two images, 2 with three
_TURN_CYCLE = 3  # 1 of 3 with two turns, 1 with three
_MULTIPLE_CHOICE_SHARE = 0.75
_COMPARISON_SHARE = 0.25  # of the records with several images
_TEST_PAIR_CYCLE = 10  # 1 of 10 test questions has two images


def make_train_record(seed: int, index: int) -> Record:
    """Training record `index` (0-based): its pictures' facts, its description and its questions."""
    rng = stream(seed, TRAIN, CONTENT, index)
    kind = stratified(seed, TRAIN, KIND, index, _KIND_CYCLE)
    if kind == 0:
        return _text_only_record(rng)
    n_images = 2 if kind <= 3 else 3 if kind <= 5 else 1
    n_follow_ups = {0: 2, 1: 1}.get(stratified(seed, TRAIN, TURNS, index, _TURN_CYCLE), 0)
    lead = _lead(seed, TRAIN, index)
    # One record asks for the modality or for the body part, never for both: each would give the other away.
    anatomy = lead.subject if lead.subject in ("modality", "body_part") else pick(rng, ("modality", "body_part"))
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
        return pick(rng, DESCRIBE_ONE), caption[0].upper() + caption[1:]
    captions = [f"{ORDINALS[k].capitalize()} image: {facts.caption()}" for k, facts in enumerate(pictures)]
    return pick(rng, DESCRIBE_SEVERAL), " ".join(captions)


def make_test_record(seed: int, index: int) -> Record:
    """Test record `index` (0-based): one multiple-choice question about one picture, or about one of two."""
    rng = stream(seed, TEST, CONTENT, index)
    lead = _lead(seed, TEST, index)
    number, rank = SUBJECTS.index(lead.subject), index // len(SUBJECTS)
    n_images = 2 if stratified(seed, TEST, PAIR, rank, _TEST_PAIR_CYCLE, number) == 0 else 1
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

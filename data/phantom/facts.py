"""What a picture can show, and how it is said: the ground truth of the set."""

from __future__ import annotations

from dataclasses import dataclass

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

# What a text tells of one picture: subject -> answer. A subject that is not in it is not mentioned.
Told = dict[str, str]


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

    def told(self) -> Told:
        """Everything that there is to say of the picture."""
        return {s: self.answer(s) for s in SUBJECTS if self.count or s not in DETAILS}

    def caption(self) -> str:
        """Every fact in one clause, beginning in lower case."""
        return clause(self.told())


def coherent(told: Told) -> Told:
    """Without a finding there is nothing to say of its side, count and size."""
    return {s: answer for s, answer in told.items() if s not in DETAILS or told.get("finding") == "yes"}


def clause(told: Told) -> str:
    """What is told of a picture as one clause, beginning in lower case; what is not told is passed over."""
    modality, body_part = told.get("modality"), told.get("body_part")
    article = "an" if modality in (None, "X-ray", "MRI", "ultrasound") else "a"
    words = ["this is", article, *([modality] if modality else []), "image"]
    if body_part:
        words += ["of the", body_part]
    if told.get("finding") == "no":
        words.append("with no finding")
    elif told.get("finding") == "yes":
        words += ["with", *finding_words(told)]
        if "side" in told:
            words += ["on the", told["side"], "side"]
    return " ".join(words) + "."


def finding_words(told: Told) -> list[str]:
    """Count, size and noun, as far as they are told; findings of an untold number are in the plural."""
    noun = "finding" if told.get("count") == "one" else "findings"
    return [told[subject] for subject in ("count", "size") if subject in told] + [noun]

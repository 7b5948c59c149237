"""Four ways to come by a description of a picture, as the paper compares them (Tables 6 and 9), with known truth.

native_caption    what stands under the picture in an article: true, but with facts missing and text on other things
llm_reformatted   that caption rewritten by a model that can't see: clean text; of what is missing, some is invented
mllm_distill      a model that sees the picture and no caption: every fact is told, some are misread
mllm_reformatted  a model that has both: what the caption states is taken from it, the rest is read from the picture

All four describe the same pictures and answer the same request. The shares below are choices that make the four as the
paper describes them (captions true and incomplete, text-only rewriting incomplete, distillation complete and less
accurate, rewriting with both at once the most complete); they are not measured on real captions or on any model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from data.phantom.facts import ANSWERS, ORDINALS, SUBJECTS, Facts, Told, clause, coherent, finding_words
from data.phantom.records import Record
from data.phantom.streams import CAPTION, READING, REWRITING, TRAIN, pick, stream

METHODS = ("native_caption", "llm_reformatted", "mllm_distill", "mllm_reformatted")

# The share of captions that state a fact; of side, count and size, among the captions that state a finding.
STATED = {"modality": 0.7, "body_part": 0.8, "finding": 0.7, "side": 0.4, "count": 0.5, "size": 0.4}
# How often a fact that the caption leaves out is invented by the model that can't see.
INVENTED = 0.3
# How often a fact is misread from the picture: to any other answer, each as likely.
MISREAD = {"modality": 0.1, "body_part": 0.15, "finding": 0.1, "side": 0.25, "count": 0.3, "size": 0.2}

# What real captions are full of, and what nothing in the picture answers.
ASIDES = (
    "The patient gave written informed consent.",
    "Scale bar, 5 mm.",
    "Adapted with permission of the publisher.",
    "See the text for the statistical analysis.",
    "A 54-year-old patient was admitted to our department.",
    "Error bars show the standard deviation.",
    "The follow-up was uneventful.",
    "Arrows as in the panel above.",
    "Blood tests were within the reference range.",
    "Surgery was performed on the next day.",
)


def stated(true: Told, rng: np.random.Generator) -> Told:
    """What the caption states of the truth."""
    return coherent({s: answer for s, answer in true.items() if rng.random() < STATED[s]})


def rewritten(caption: Told, rng: np.random.Generator) -> Told:
    """What a rewriting of the caption tells by a model that does not see the picture."""
    invented = {s: pick(rng, ANSWERS[s]) for s in SUBJECTS if s not in caption and rng.random() < INVENTED}
    return coherent(caption | invented)


def read(true: Told, rng: np.random.Generator) -> Told:
    """What a model reads from the picture: an answer on every subject, also on findings where there are none."""
    return {s: _read_answer(true.get(s), s, rng) for s in SUBJECTS}


def _read_answer(answer: str | None, subject: str, rng: np.random.Generator) -> str:
    if answer is None:
        return pick(rng, ANSWERS[subject])
    if rng.random() < MISREAD[subject]:
        return pick(rng, [other for other in ANSWERS[subject] if other != answer])
    return answer


def caption_clause(told: Told) -> str:
    """What is told, in the manner of a caption."""
    words = [told.get("modality", "Image")]
    if "body_part" in told:
        words += ["of the", told["body_part"]]
    if told.get("finding") == "no":
        words += ["without a finding"]
    elif told.get("finding") == "yes":
        words += ["showing", *finding_words(told), f"({told['side']}, arrow)" if "side" in told else "(arrow)"]
    return " ".join(words)


def _caption_text(told: Sequence[Told], rng: np.random.Generator) -> str:
    panels = [caption_clause(one) for one in told]
    if len(panels) > 1:
        panels = [f"({letter}) {panel}" for letter, panel in zip("abc", panels, strict=False)]
    asides = [ASIDES[k] for k in rng.choice(len(ASIDES), size=int(rng.integers(1, 4)), replace=False)]
    before = int(rng.integers(len(asides) + 1))
    number = int(rng.integers(1, 10))
    return " ".join([f"Figure {number}.", *asides[:before], "; ".join(panels) + ".", *asides[before:]])


def _report_text(told: Sequence[Told]) -> str:
    """As the captions of the alignment file say it."""
    if len(told) == 1:
        text = clause(told[0])
        return text[0].upper() + text[1:]
    return " ".join(f"{ORDINALS[k].capitalize()} image: {clause(one)}" for k, one in enumerate(told))


def told_by(seed: int, index: int, pictures: Sequence[Facts]) -> dict[str, list[Told]]:
    """What each method tells of the pictures of training record `index`: the same caption and the same reading."""
    true = [facts.told() for facts in pictures]
    captions = _each(stated, true, seed, CAPTION, index)
    readings = _each(read, true, seed, READING, index)
    return {
        "native_caption": captions,
        "llm_reformatted": _each(rewritten, captions, seed, REWRITING, index),
        "mllm_distill": [coherent(reading) for reading in readings],
        "mllm_reformatted": [coherent(reading | caption) for reading, caption in zip(readings, captions, strict=True)],
    }


def _each(
    tell: Callable[[Told, np.random.Generator], Told], told: Sequence[Told], seed: int, purpose: int, index: int
) -> list[Told]:
    rng = stream(seed, TRAIN, purpose, index)
    return [tell(one, rng) for one in told]


def describe(seed: int, index: int, record: Record) -> dict[str, str]:
    """Method -> its description of training record `index`, which has pictures."""
    told = told_by(seed, index, record.pictures)
    wording = stream(seed, TRAIN, CAPTION, index, 1)
    return {
        method: _caption_text(told[method], wording) if method == "native_caption" else _report_text(told[method])
        for method in METHODS
    }

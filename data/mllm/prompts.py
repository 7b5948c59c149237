"""The texts an MLLM is asked with: files in `data/prompts/`, one a method, in our own words.

`mllm_grounded` follows the structure of SemiHVision's released example (arXiv 2410.14948): style, guidelines, what is
asked for, a similar case with its images and findings, the format of the reply, the target.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import jinja2
import yaml

from data.config import BODY_PARTS, MODALITIES

# Of the paper's four ways to make a description (arXiv 2406.19280, section 4.4), the three that ask a model: from text
# only, from images only, and from both ("unblinded").
GROUNDED = "mllm_grounded"
SENDS_IMAGES = ("mllm_distill", "mllm_reformatted", GROUNDED)
SENDS_TEXT = ("llm_reformatted", "mllm_reformatted", GROUNDED)
# Where a prompt shows a picture; no text that is asked about holds it.
IMAGE = "\0"
# What a text must not close, or it would speak with our voice.
_TAGS = re.compile(r"<(/?)\s*(reference|guideline|case|target)\b([^<>]*)>", re.IGNORECASE)

FOLDER = Path(__file__).parents[1] / "prompts"


@dataclass(frozen=True, slots=True)
class Scenario:
    name: str
    text: str


@lru_cache
def scenarios() -> tuple[Scenario, ...]:
    return tuple(Scenario(**entry) for entry in yaml.safe_load((FOLDER / "scenarios.yaml").read_text(encoding="utf-8")))


def scenario_of(row_id: str, seed: int) -> Scenario:
    """The row's scenario: each of the ten equally often, the same for the same seed whatever else is in the data."""
    digest = hashlib.sha256(f"{seed}\0{row_id}".encode()).digest()
    return scenarios()[int.from_bytes(digest[:8]) % len(scenarios())]


@lru_cache
def prompt_version(method: str) -> str:
    """Changes with every word that an MLLM is asked with under this method."""
    names = (f"{method}.jinja", "answer_format.jinja", "ask_again.jinja", "scenarios.yaml")
    texts = [(FOLDER / name).read_text(encoding="utf-8") for name in names]
    return f"{method}-{hashlib.sha256(repr((texts, MODALITIES, BODY_PARTS)).encode()).hexdigest()[:12]}"


def render_prompt(method: str, n_images: int, scenario: Scenario, reference: str, **more: object) -> str:
    """`mllm_grounded` takes `modality`, `guidelines` and `cases` too, and holds IMAGE in each picture's place."""
    text = _environment().get_template(f"{method}.jinja")
    values = {"modalities": MODALITIES, "body_parts": BODY_PARTS, "scenario": scenario.text, "n_images": n_images}
    return text.render(reference=reference, image=IMAGE, **values, **more).strip()


def defused(text: str) -> str:
    """The text without what would end the tags that it is put between, or stand for a picture."""
    return _TAGS.sub(r"< \1\2\3 >", text.replace(IMAGE, " "))


def render_ask_again(problem: str) -> str:
    return _environment().get_template("ask_again.jinja").render(problem=problem).strip()


def reference_text(caption: str, mentions: Sequence[str], max_chars: int) -> tuple[str, int]:
    """Caption and in-text mentions as one text, and how many mentions did not fit in and were left out.

    Text that closes the tags around it would speak with our voice; it is defused.
    """
    kept, room = [caption], max_chars - len(caption)
    for mention in mentions:
        if len(mention) > room:
            break
        kept.append(mention)
        room -= len(mention)
    return defused("\n\n".join(kept)), len(mentions) + 1 - len(kept)


@lru_cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # plain text
    )

"""One figure -> the body of a chat completion, and the key that its answer is kept under.

The body is the same online and in a batch file. The key is made of everything that the answer depends on, and of
nothing else: the model, the prompt, the settings and the figure's own content.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from data.config import Reformat
from data.mllm.answers import response_format
from data.mllm.prompts import (
    GROUNDED,
    IMAGE,
    SENDS_IMAGES,
    SENDS_TEXT,
    Scenario,
    defused,
    prompt_version,
    reference_text,
    render_ask_again,
    render_prompt,
    scenario_of,
)
from huatuo_vision.inputs.images import load_image
from huatuo_vision.schema import ImageRef


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a row is described in the light of: a chunk of a guideline, or a case with its pictures."""

    kind: str  # guideline, case
    id: str
    title: str
    text: str
    licence: str
    score: float
    image_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Figure:
    """What a request is made from."""

    id: str
    image_sha256: tuple[str, ...]
    caption: str
    mentions: tuple[str, ...]  # the paragraphs that refer to it
    annotated: bool = True  # the texts describe the images; else they are tags
    modality: str | None = None  # as the source states it
    evidence: tuple[Evidence, ...] = ()

    def shown(self) -> tuple[str, ...]:
        """All pictures of the request: those of similar cases, then its own."""
        return tuple(i for evidence in self.evidence for i in evidence.image_ids) + self.image_sha256


@dataclass(frozen=True, slots=True)
class Rejected:
    """A reply that could not be used, when asking again."""

    reply: str
    problem: str


def method_of(figure: Figure, settings: Reformat) -> str:
    """What people described is rewritten, also where the rest is written in the light of evidence."""
    return "mllm_reformatted" if settings.method == GROUNDED and figure.annotated else settings.method


def scenario(figure: Figure, settings: Reformat) -> Scenario:
    return scenario_of(figure.id, settings.seed)


def request_key(figure: Figure, settings: Reformat) -> str:
    """SHA-256 over what the answer depends on."""
    method = method_of(figure, settings)
    about = {
        "model": settings.model,
        "prompt": prompt_version(method),
        "scenario": scenario(figure, settings).name,
        "settings": settings.decides(),
        "images": figure.image_sha256 if method in SENDS_IMAGES else len(figure.image_sha256),
        "text": [figure.caption, *figure.mentions] if method in SENDS_TEXT else None,
    }
    if method == GROUNDED:
        about["evidence"] = [[e.id, e.title, e.text, e.image_ids] for e in figure.evidence]
        about["modality"] = figure.modality
    return hashlib.sha256(json.dumps(about, sort_keys=True, ensure_ascii=False).encode(errors="replace")).hexdigest()


def request_body(
    figure: Figure, images: Sequence[bytes], settings: Reformat, rejected: Rejected | None = None
) -> dict[str, Any]:
    """The body of the request: the images, then the prompt; when asking again, the reply and what is wrong with it.

    `images` are the pictures of `figure.shown()`, encoded, that decode; they are left out where the method shows none.
    In the light of evidence, each picture stands where it belongs in the text.
    """
    reference, _ = reference_text(figure.caption, figure.mentions, settings.max_reference_chars)
    method = method_of(figure, settings)
    about = (method, len(figure.image_sha256), scenario(figure, settings), reference)
    shown: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": data_url(image, settings.image_side, settings.jpeg_quality)}}
        for image in (images if method in SENDS_IMAGES else ())
    ]
    if method == GROUNDED:
        texts = render_prompt(*about, **_evidence_of(figure, settings.max_reference_chars)).split(IMAGE)
        parts: list[dict[str, Any]] = []
        for text, picture in zip(texts, [*shown, None], strict=True):
            parts += [{"type": "text", "text": text.strip()}] if text.strip() else []
            parts += [picture] if picture is not None else []
    else:
        parts = [*shown, {"type": "text", "text": render_prompt(*about)}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
    if rejected is not None:
        messages.append({"role": "assistant", "content": rejected.reply})
        messages.append({"role": "user", "content": render_ask_again(rejected.problem)})
    body = {
        "model": settings.model,
        "messages": messages,
        settings.max_tokens_parameter: settings.max_tokens,
        "response_format": response_format(),
        **settings.extra_body,
    }
    if settings.temperature is not None:
        body["temperature"] = settings.temperature
    return body


def _evidence_of(figure: Figure, max_chars: int) -> dict[str, Any]:
    told = [replace(e, title=defused(e.title), text=defused(e.text)[:max_chars]) for e in figure.evidence]
    of_kind = {kind: [e for e in told if e.kind == kind] for kind in ("guideline", "case")}
    return {"modality": figure.modality, "guidelines": of_kind["guideline"], "cases": of_kind["case"]}


def data_url(encoded: bytes, longest_side: int, quality: int) -> str:
    """The picture as a JPEG of at most `longest_side` pixels a side.

    Always encoded anew, also where it is small enough: nothing but pixels leaves, no EXIF and no comments.
    """
    image = load_image(ImageRef(data=encoded), "").image
    if max(image.size) > longest_side:
        image.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}"

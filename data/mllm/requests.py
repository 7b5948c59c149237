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
from dataclasses import dataclass
from typing import Any

from PIL import Image

from data.config import Reformat
from data.mllm.answers import response_format
from data.mllm.prompts import (
    SENDS_IMAGES,
    SENDS_TEXT,
    Scenario,
    prompt_version,
    reference_text,
    render_ask_again,
    render_prompt,
    scenario_of,
)
from huatuo_vision.inputs.images import load_image
from huatuo_vision.schema import ImageRef


@dataclass(frozen=True, slots=True)
class Figure:
    """What a request is made from."""

    id: str
    image_sha256: tuple[str, ...]
    caption: str
    mentions: tuple[str, ...]  # the paragraphs that refer to it


@dataclass(frozen=True, slots=True)
class Rejected:
    """A reply that could not be used, when asking again."""

    reply: str
    problem: str


def scenario(figure: Figure, settings: Reformat) -> Scenario:
    return scenario_of(figure.id, settings.seed)


def request_key(figure: Figure, settings: Reformat) -> str:
    """SHA-256 over what the answer depends on."""
    about = {
        "model": settings.model,
        "prompt": prompt_version(settings.method),
        "scenario": scenario(figure, settings).name,
        "settings": settings.decides(),
        "images": figure.image_sha256 if settings.method in SENDS_IMAGES else len(figure.image_sha256),
        "text": [figure.caption, *figure.mentions] if settings.method in SENDS_TEXT else None,
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True, ensure_ascii=False).encode(errors="replace")).hexdigest()


def request_body(
    figure: Figure, images: Sequence[bytes], settings: Reformat, rejected: Rejected | None = None
) -> dict[str, Any]:
    """The body of the request: the images, then the prompt; when asking again, the reply and what is wrong with it.

    `images` are encoded pictures that decode; they are left out where the method shows none.
    """
    reference, _ = reference_text(figure.caption, figure.mentions, settings.max_reference_chars)
    prompt = render_prompt(settings.method, len(figure.image_sha256), scenario(figure, settings), reference)
    shown = images if settings.method in SENDS_IMAGES else ()
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": data_url(image, settings.image_side, settings.jpeg_quality)}}
        for image in shown
    ]
    messages: list[dict[str, Any]] = [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]
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

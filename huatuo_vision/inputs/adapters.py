"""One row of a data set -> one Sample, as each data set lays its rows out. Pure functions; nothing is opened here.

An adapter checks the shape of a row strictly and says what it got and what it expected (BadSample, mostly
"malformed_row"); the rules that every sample keeps are `schema.check_sample`'s, which the source applies after.
"""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from huatuo_vision.caption_requests import caption_request
from huatuo_vision.recipe import SourceSpec
from huatuo_vision.schema import (
    IMAGE_PLACEHOLDER,
    ROLES,
    BadSample,
    ImageRef,
    Message,
    Role,
    Sample,
    escape_placeholder,
)

Row = Mapping[str, Any]
# An image as a row has it: a file name, encoded bytes, or what `datasets` stores for an Image, {"bytes", "path"}.
RowImage = str | bytes | Mapping[str, Any]

SPEAKERS = {"human": "user", "gpt": "assistant"}
# ShareGPT's chats have system prompts too.
CHAT_SPEAKERS = SPEAKERS | {"system": "system"}
LETTERS = string.ascii_uppercase
# How questions with options end, in training as in evaluation (evaluation/prompts/letter.txt).
LETTER_REQUEST = "Answer with the option's letter from the given choices directly."
CHINESE_CONVERSATIONS = {
    "alignment": "Alignment_VQA_conversations",
    "instruction": "Instruction-Tuning_VQA_conversations",
}
# LLaVA-Med's 60K instruction file spells it like this.
LLAVA_MED_CONVERSATIONS = "conversatons"
META_KEYS = ("modality", "body_part", "article", "case")


class ImageNameError(ValueError):
    """An image name that is not looked up, and why."""


@dataclass(frozen=True, slots=True)
class RowContext:
    """What an adapter knows besides the row."""

    source: str
    spec: SourceSpec
    row_id: str  # the row's id, or what messages call a row that has none
    find_image: Callable[
        [str], ImageRef
    ]  # image name -> where its bytes are; raises ImageNameError for a name it refuses

    def refuse(self, explanation: str, reason: str = "malformed_row") -> BadSample:
        return BadSample(self.row_id, reason, explanation)


def adapt(row: object, source: str, spec: SourceSpec, find_image: Callable[[str], ImageRef], position: int) -> Sample:
    """The row at `position` as a Sample, by the source's adapter. Raises BadSample for a row of another shape."""
    identity = row_id(row, spec) if isinstance(row, Mapping) else None
    by_place = id_key(spec) is False
    context = RowContext(source, spec, identity or f"row {position}", find_image)
    if not isinstance(row, Mapping):
        raise context.refuse(f"the row is {_describe(row)}; expected an object with keys")
    if not identity and not by_place:
        key = id_key(spec)
        raise context.refuse(
            f"{key} is {_describe(row.get(key))}; every row needs an id of its own, a string or a number"
        )
    match spec.adapter:
        case "pubmedvision" | "phantom":
            return _pubmedvision_captions(row, context) if spec.config == "captions" else _pubmedvision(row, context)
        case "llava" | "llava_med":
            return _llava(row, context)
        case "captions":
            return _captions(row, context)
        case "vqa":
            return _vqa(row, context)
        case "messages":
            return _messages(row, context)


def id_key(spec: SourceSpec) -> str | Literal[False]:
    """The column of ids; False where rows have none and are called by their place."""
    return spec.columns.id if spec.adapter in ("captions", "vqa", "messages") else "id"


def row_id(row: Row, spec: SourceSpec) -> str:
    """The sample id of a row, unique in a sound source; empty where the row has none.

    LLaVA's ids are those of the pictures: about 250K rows of the 665K file share theirs with another conversation
    about the same picture, so a digest of the conversation is added. Equal ids are then repeated rows.
    """
    key = id_key(spec)
    value = row.get(key) if key else None
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        return ""
    if spec.adapter in ("llava", "llava_med"):
        turns = json.dumps(row.get("conversations", row.get(LLAVA_MED_CONVERSATIONS)), sort_keys=True, default=str)
        value = f"{value}#{hashlib.sha256(turns.encode()).hexdigest()[:8]}"
    # Half of a surrogate pair would fit no file; it is spelt out.
    return str(value).encode(errors="backslashreplace").decode()


def row_images(row: Row, spec: SourceSpec) -> list[object]:
    """What the row has in place of its images, unchecked."""
    column = spec.columns.image
    key = {"captions": column, "vqa": column, "messages": "images"}.get(spec.adapter, "image")
    value = row.get(key)
    return [] if value is None else value if isinstance(value, list) else [value]


def _pubmedvision(row: Row, context: RowContext) -> Sample:
    """`image` is a list of names and the text holds no placeholder: one per image goes before the first question."""
    images = _image_list(row, "image", context)
    conversations = context.spec.conversations
    messages = _turns(row, CHINESE_CONVERSATIONS[conversations] if conversations else "conversations", context)
    placeholders = sum(message.content.count(IMAGE_PLACEHOLDER) for message in messages)
    if placeholders == 0 and messages and messages[0].role == "user":
        messages[0] = Message("user", f"{IMAGE_PLACEHOLDER}\n" * len(images) + messages[0].content)
    return _sample(row, images, messages, context)


def _pubmedvision_captions(row: Row, context: RowContext) -> Sample:
    images = _image_list(row, "image", context)
    return _sample(row, images, _description(_text(row, "Original_Caption", context), len(images), context), context)


def _llava(row: Row, context: RowContext) -> Sample:
    """`image` is one name or absent; `<image>` stands in the text, and is moved to the front of its turn.

    The move is LLaVA's own (preprocess_multimodal), and where every prompt at inference has the image.
    """
    value = row.get("image")
    if isinstance(value, list):
        raise context.refuse(
            f"image is {_describe(value)}; LLaVA rows hold one name, so write 'x.jpg', or use adapter: pubmedvision"
        )
    images = [] if value is None else [_image(value, "image", context)]
    misspelt = "conversations" not in row and LLAVA_MED_CONVERSATIONS in row
    messages = _turns(row, LLAVA_MED_CONVERSATIONS if misspelt else "conversations", context)
    return _sample(row, images, [_image_first(message) for message in messages], context)


def _image_first(message: Message) -> Message:
    count = message.content.count(IMAGE_PLACEHOLDER)
    if count == 0:
        return message
    text = message.content.replace(IMAGE_PLACEHOLDER, "").strip()
    return Message(message.role, f"{IMAGE_PLACEHOLDER}\n" * count + text)


def _captions(row: Row, context: RowContext) -> Sample:
    """A picture (or several) and its caption; in-text mentions, where there are some, follow after a blank line."""
    columns = context.spec.columns
    value = _present(row, columns.image, context)
    images = [_image(item, columns.image, context) for item in (value if isinstance(value, list) else [value])]
    answer = _text(row, columns.caption, context)
    mentions = row.get(columns.context) if columns.context is not None else None
    if isinstance(mentions, str):
        mentions = [mentions]
    if mentions is not None and not (isinstance(mentions, list) and all(isinstance(item, str) for item in mentions)):
        raise context.refuse(
            f"{columns.context} is {_describe(mentions)}; expected a string, a list of strings, or null"
        )
    # Mentions alone do not make an answer: a row without a caption stays empty and is refused as such.
    if mentions and answer.strip():
        answer = "\n\n".join([answer, *mentions])
    return _sample(row, images, _description(answer, len(images), context), context)


def _vqa(row: Row, context: RowContext) -> Sample:
    """A picture, a question and its answer; with options, listed by letter as in evaluation, and a letter as answer."""
    columns = context.spec.columns
    value = _present(row, columns.image, context)
    images = [_image(item, columns.image, context) for item in (value if isinstance(value, list) else [value])]
    question, answer = _text(row, columns.question, context), _text(row, columns.answer, context)
    if columns.options:
        letters = LETTERS[: len(columns.options)]
        options = [
            # Some data sets print the letter in the option itself: "A: Liver", " B:Spleen".
            re.sub(rf"^\s*{letter}\s*:\s*", "", _text(row, column, context)).strip()
            for letter, column in zip(letters, columns.options, strict=True)
        ]
        answer = answer.strip()
        if answer not in tuple(letters):
            raise context.refuse(
                f"{columns.answer} is {_describe(row[columns.answer])}; expected one of {', '.join(letters)}"
            )
        listed = [f"{letter}. {option}" for letter, option in zip(letters, options, strict=True)]
        question = "\n".join([question, *listed, LETTER_REQUEST])
    messages = [
        Message("user", f"{IMAGE_PLACEHOLDER}\n" * len(images) + escape_placeholder(question)),
        Message("assistant", escape_placeholder(answer)),
    ]
    return _sample(row, images, messages, context)


def _messages(row: Row, context: RowContext) -> Sample:
    """Chat messages of role and content (text, or parts of type text and image) with the row's `images` in order; or
    ShareGPT's turns of from and value."""
    images = _image_list(row, "images", context) if row.get("images") is not None else []
    column = context.spec.columns.messages
    messages = []
    for position, item in enumerate(_list(row, column, context)):
        where = f"{column}[{position}]"
        if isinstance(item, Mapping) and "role" not in item and "from" in item:
            messages.append(_turn(item, where, CHAT_SPEAKERS, context))
            continue
        if not isinstance(item, Mapping) or "role" not in item or "content" not in item:
            raise context.refuse(f"{where} is {_describe(item)}; expected an object with role and content")
        if item["role"] not in ROLES:
            raise context.refuse(
                f"{where} has the role {item['role']!r}; expected one of {', '.join(ROLES)}", "wrong_role"
            )
        messages.append(Message(item["role"], _content(item["role"], item["content"], where, context)))
    return _sample(row, images, messages, context)


def _content(role: str, content: object, where: str, context: RowContext) -> str:
    if isinstance(content, str):
        _check_text(content, where, context)
        return content if role == "user" else escape_placeholder(content)
    if not isinstance(content, list):
        raise context.refuse(f"{where} has content that is {_describe(content)}; expected a string or a list of parts")
    lines = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image":
            lines.append(IMAGE_PLACEHOLDER)
        elif kind == "text" and isinstance(part.get("text"), str):
            _check_text(part["text"], where, context)
            lines.append(escape_placeholder(part["text"]))
        else:
            raise context.refuse(
                f"{where} has a content part that is {_describe(part)}; expected {{'type': 'text', 'text': ...}} or "
                "{'type': 'image'} with the image itself in the row's images"
            )
    return "\n".join(lines)


def _sample(row: Row, images: Sequence[ImageRef], messages: Sequence[Message], context: RowContext) -> Sample:
    meta = {key: row[key] for key in META_KEYS if isinstance(row.get(key), str) and row[key]}
    return Sample(context.row_id, context.source, tuple(images), tuple(messages), meta)


def _description(answer: str, n_images: int, context: RowContext) -> list[Message]:
    """A request to describe the images, chosen by the row's id, and the caption as its answer."""
    if n_images == 0:
        raise context.refuse("has an empty list of images; a caption describes at least one")
    request = caption_request(context.row_id, n_images, context.spec.language)
    return [
        Message("user", f"{IMAGE_PLACEHOLDER}\n" * n_images + request),
        Message("assistant", escape_placeholder(answer)),
    ]


def _turns(row: Row, key: str, context: RowContext) -> list[Message]:
    """Turns of {"from": human or gpt, "value": text}."""
    turns = _list(row, key, context)
    return [_turn(turn, f"{key}[{position}]", SPEAKERS, context) for position, turn in enumerate(turns)]


def _turn(turn: object, where: str, speakers: Mapping[str, Role], context: RowContext) -> Message:
    """What the assistant says never shows an image."""
    if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
        raise context.refuse(f"{where} is {_describe(turn)}; expected an object with from and value")
    if turn["from"] not in tuple(speakers):
        *most, last = speakers
        raise context.refuse(f"{where} is from {turn['from']!r}; expected {', '.join(most)} or {last}", "wrong_role")
    text = turn["value"]
    if not isinstance(text, str):
        raise context.refuse(f"{where} has a value that is {_describe(text)}; expected a string")
    _check_text(text, where, context)
    role = speakers[turn["from"]]
    return Message(role, text if role == "user" else escape_placeholder(text))


def _image_list(row: Row, key: str, context: RowContext) -> list[ImageRef]:
    value = _present(row, key, context)
    if isinstance(value, str):
        raise context.refuse(f"{key} is the string {value!r}; these rows hold a list of names, so write [{value!r}]")
    if not isinstance(value, list):
        raise context.refuse(f"{key} is {_describe(value)}; expected a list of image names")
    return [_image(item, key, context) for item in value]


def _image(value: object, key: str, context: RowContext) -> ImageRef:
    if isinstance(value, Mapping) and value.get("bytes") is not None:
        value = value["bytes"]
    elif isinstance(value, Mapping):
        value = value.get("path")
    if isinstance(value, bytes):
        return ImageRef(data=value)
    if not isinstance(value, str) or not value:
        raise context.refuse(f"{key} holds {_describe(value)}; expected the name of an image file, or its bytes")
    try:
        return context.find_image(value)
    except ImageNameError as error:
        raise context.refuse(f"{key} {error}") from None


def _present(row: Row, key: str, context: RowContext) -> Any:
    # Table formats give every row every column: there, absent is null.
    if row.get(key) is None:
        raise context.refuse(f"has no {key}; its keys are {', '.join(map(str, row))}")
    return row[key]


def _list(row: Row, key: str, context: RowContext) -> list:
    value = _present(row, key, context)
    if not isinstance(value, list):
        raise context.refuse(f"{key} is {_describe(value)}; expected a list of turns")
    return value


def _text(row: Row, key: str, context: RowContext) -> str:
    value = _present(row, key, context)
    if not isinstance(value, str):
        raise context.refuse(f"{key} is {_describe(value)}; expected a string")
    _check_text(value, key, context)
    return value


def _check_text(text: str, where: str, context: RowContext) -> None:
    # JSON can spell half of a surrogate pair, which no tokenizer takes.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        character = text[error.start]
        raise context.refuse(
            f"{where} holds {character!a} at character {error.start}, which is no text; remove it"
        ) from None


def _describe(value: object) -> str:
    """A value in an error message: its kind and as much of it as helps."""
    kinds = {str: "the string", bytes: "bytes", list: "the list", dict: "the object", type(None): "missing or null"}
    kind = kinds.get(type(value), f"the {type(value).__name__}")
    if value is None or isinstance(value, bytes):
        return kind
    shown = repr(value)
    return f"{kind} {shown if len(shown) <= 80 else shown[:77] + '...'}"

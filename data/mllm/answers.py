"""What an MLLM's reply is worth: an answer that can be used, or one of the ways in which it cannot."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, StringConstraints, ValidationError

from data.config import BODY_PARTS, MODALITIES
from huatuo_vision.openai_endpoint import Reply, one_line

# ok: goes on. refused: the model would not. truncated: it ran out of tokens. invalid: no answer of the shape asked for,
# also when asked again. failed: no reply at all, retries used up.
State = Literal["ok", "refused", "truncated", "invalid", "failed"]
STATES: tuple[State, ...] = get_args(State)

_FENCED = re.compile(r"^```[a-z]*\n(.*)\n```$", re.DOTALL | re.IGNORECASE)
_SORRY = re.compile(
    r"^\W*(?:i(?:['’]m| am) (?:very )?(?:sorry|unable|not able)|sorry\b|i apologi[sz]e"
    r"|i (?:can(?:no|['’])t|won['’]t|will not)|as an ai\b)",
    re.IGNORECASE,
)
# The prompt's one prohibition, where a reply breaks it in so many words.
_TOLD = re.compile(
    r"</?\s?(?:reference|guideline|case|target)\s?>"
    r"|\bthe (?:provided|given|retrieved|similar) (?:reference|caption|text|guideline|case)\b"
    r"|\b(?:according to|based on|as (?:stated|described|noted) in|from) the (?:above )?(?:reference|caption)\b",
    re.IGNORECASE,
)


def _silent_about_the_reference(text: str) -> str:
    if found := _TOLD.search(text):
        raise ValueError(f"it mentions the reference ({found[0]!r})")
    return text


def _label_of(labels: tuple[str, ...]) -> BeforeValidator:
    """A label outside the list, from an endpoint that ignores the schema, is no reason to lose a paid answer."""
    known = {label.casefold(): label for label in labels}
    return BeforeValidator(lambda v: known.get(v.strip().casefold(), "Others") if isinstance(v, str) else v)


Text = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1), AfterValidator(_silent_about_the_reference)
]


class Answer(BaseModel):
    """One reply: a description of the images, and a query with its answer."""

    model_config = ConfigDict(frozen=True, json_schema_extra={"additionalProperties": False})

    description: Text
    query: Text
    answer: Text
    modality: Annotated[Literal[MODALITIES], _label_of(MODALITIES)]
    body_part: Annotated[Literal[BODY_PARTS], _label_of(BODY_PARTS)]


def response_format() -> dict[str, Any]:
    """What asks an endpoint for JSON of this shape. Many ignore it in silence: replies are validated anyway."""
    schema = Answer.model_json_schema()
    for field in schema["properties"].values():
        # Strict mode, as the hosted endpoints have it, knows no lengths.
        field.pop("minLength", None)
        field.pop("title", None)
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}


@dataclass(frozen=True, slots=True)
class Outcome:
    state: State
    answer: Answer | None = None
    problem: str | None = None  # of an invalid reply, in words that the model is told when it is asked again


def judge(reply: Reply) -> Outcome:
    """The state of a reply, and its answer where that is "ok"."""
    if reply.refused:
        return Outcome("refused")
    if reply.finish_reason == "length":
        return Outcome("truncated")
    text = reply.text.strip()
    if fenced := _FENCED.match(text):
        text = fenced[1]
    try:
        return Outcome("ok", Answer.model_validate_json(text))
    except ValidationError as error:
        if "{" not in text and _SORRY.match(text):
            return Outcome("refused")
        return Outcome("invalid", problem=_first_problem(error, text))


def _first_problem(error: ValidationError, text: str) -> str:
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        return "it is empty" if not text else f"it is not JSON ({one_line(first['ctx']['error'])})"
    where = ".".join(map(str, first["loc"])) or "the object"
    return f"{where}: {one_line(first['msg'])}"

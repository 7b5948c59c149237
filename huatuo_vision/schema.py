"""The contract between everything that makes data and everything that consumes it.

One `Sample` is one conversation with its images. In message text `IMAGE_PLACEHOLDER` marks each
image's place, in order; text that merely contains those characters must be escaped by whoever
builds the sample (`escape_placeholder`), so that a placeholder always means an image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

IMAGE_PLACEHOLDER = "<image>"

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")


class UserError(ValueError):
    """A mistake of the user's (recipe, data, files), said in one sentence; commands exit with code 2."""


class OutOfReach(UserError):
    """What a recipe names is not here and cannot be fetched: no connection, no access, not downloaded, not yet made."""


class BadSample(ValueError):
    """One sample that can't be trained on. `reason` is a short fixed word for counting; the text explains."""

    def __init__(self, sample_id: str, reason: str, explanation: str):
        super().__init__(f"sample {sample_id!r}: {explanation}")
        self.sample_id = sample_id
        self.reason = reason
        self.explanation = explanation

    def __reduce__(self) -> tuple:
        return BadSample, (self.sample_id, self.reason, self.explanation)


def escape_placeholder(text: str) -> str:
    """Text whose literal `<image>` no longer marks an image (it reads `< image >`)."""
    return text.replace(IMAGE_PLACEHOLDER, "< image >")


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class ImageRef:
    """Where one image's encoded bytes are: a file, bytes in hand, or a member of a zip archive, read in place."""

    path: str | None = None
    data: bytes | None = field(default=None, repr=False)
    archive: str | None = None
    member: str | None = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        given = (self.path is not None, self.data is not None, self.archive is not None and self.member is not None)
        assert sum(given) == 1, f"an ImageRef has exactly one of path, data, archive + member; got {self!r}"

    @property
    def name(self) -> str:
        """What an error message calls this image."""
        if self.path is not None:
            return self.path
        if self.archive is not None:
            return f"{self.archive}!{self.member}"
        return f"<{len(self.data or b'')} bytes>"


@dataclass(frozen=True, slots=True)
class Sample:
    id: str  # unique within its source
    source: str  # the name the recipe gives the data source
    images: tuple[ImageRef, ...]
    messages: tuple[Message, ...]
    meta: Mapping[str, object] = field(default_factory=dict)


def check_sample(sample: Sample) -> None:
    """The rules every trainable sample keeps. Raises BadSample naming the one that is broken."""

    def refuse(reason: str, explanation: str) -> None:
        raise BadSample(sample.id, reason, explanation)

    turns = [m for m in sample.messages if m.role != "system"]
    for position, message in enumerate(sample.messages):
        if message.role not in ROLES:
            refuse(
                "wrong_role", f"message {position} has the role {message.role!r}; expected one of {', '.join(ROLES)}"
            )
        if message.role == "system" and position > 0:
            refuse("wrong_role", f"message {position} is a system message; only the first message may be one")
    if not turns:
        refuse("no_answer", "the conversation is empty; expected a user turn and an assistant turn")
    for position, message in enumerate(turns):
        expected = ("user", "assistant")[position % 2]
        if message.role != expected:
            refuse(
                "wrong_role",
                f"turn {position} is by {message.role!r}; expected {expected!r} (user and assistant alternate)",
            )
        if message.role == "assistant" and not message.content.strip():
            refuse("empty_answer", f"the assistant's answer in turn {position} is empty")
        if message.role == "assistant" and IMAGE_PLACEHOLDER in message.content:
            refuse(
                "placeholder_count",
                f"turn {position} by the assistant contains {IMAGE_PLACEHOLDER}; only user turns show images",
            )
    if turns[-1].role != "assistant":
        refuse("no_answer", "the conversation ends with a user turn; expected an assistant answer at its end")
    placeholders = sum(m.content.count(IMAGE_PLACEHOLDER) for m in sample.messages)
    if placeholders != len(sample.images):
        refuse(
            "placeholder_count",
            f"the text has {placeholders} {IMAGE_PLACEHOLDER} placeholders but the row has {len(sample.images)} images",
        )

"""Talking to an OpenAI-compatible endpoint through the openai client: vLLM, SGLang, `transformers serve`, hosted ones.

The key comes from the environment and stays in the client. What an endpoint says is repeated in one line, without the
key that some of them quote, and without the images that some of them send back.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import openai
from openai.types.chat import ChatCompletion

from huatuo_vision.schema import UserError

# Wrong for one request, wrong for all: no use in asking on.
FATAL = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)

_DATA_URL = re.compile(r"data:[\w.+/-]*;base64,[A-Za-z0-9+/=]*")


def check_address(base_url: str) -> None:
    """Raises UserError for a URL that is none, and where the endpoint behind it needs a key that is not set."""
    _api_key(base_url)


def connect(base_url: str, *, max_retries: int, timeout: openai.Timeout) -> openai.AsyncOpenAI:
    """A client that retries what may pass (no connection, timeouts, 408, 409, 429, 5xx), minding `Retry-After`.

    Raises UserError for what is no address, and where a key is missing.
    """
    return openai.AsyncOpenAI(base_url=base_url, api_key=_api_key(base_url), max_retries=max_retries, timeout=timeout)


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer. Counts are None where the endpoint does not count."""

    text: str  # a refusal's words where there is no other text
    prompt_tokens: int | None
    new_tokens: int | None
    cached_tokens: int | None = None  # of the prompt's
    finish_reason: str | None = None
    refused: bool = False
    model: str | None = None  # as the endpoint calls it


class NotAnAnswer(Exception):
    """What the endpoint sent is no chat completion; the text says what it is."""


async def complete(client: openai.AsyncOpenAI, messages: list[dict[str, Any]], **settings: Any) -> Reply:
    """Raises openai.OpenAIError or NotAnAnswer."""
    try:
        completion = await client.chat.completions.create(messages=messages, **settings)
    except ValueError as error:  # JSON by its content type only
        raise NotAnAnswer(f"no JSON ({one_line(error)})") from None
    return read_reply(completion)


def read_reply(completion: object) -> Reply:
    """Raises NotAnAnswer."""
    # The client hands on what it can't parse as it is.
    if not isinstance(completion, ChatCompletion):
        raise NotAnAnswer(f"no JSON but {one_line(completion)!r}")
    choices = getattr(completion, "choices", None)
    message = getattr(choices[0], "message", None) if isinstance(choices, list) and choices else None
    if message is None:
        raise NotAnAnswer("JSON without choices")
    text, refusal = getattr(message, "content", None), getattr(message, "refusal", None)
    if text is None:
        text = refusal or ""
    if not isinstance(text, str):
        raise NotAnAnswer("a message whose content is no text")
    usage = getattr(completion, "usage", None)
    finish_reason = getattr(choices[0], "finish_reason", None)
    return Reply(
        text,
        getattr(usage, "prompt_tokens", None),
        getattr(usage, "completion_tokens", None),
        getattr(getattr(usage, "prompt_tokens_details", None), "cached_tokens", None),
        finish_reason,
        bool(refusal) or finish_reason == "content_filter",
        getattr(completion, "model", None),
    )


def host_of(base_url: str) -> str:
    """Host and port alone: a URL can carry a password."""
    try:
        parts = urlsplit(base_url)
        port = "" if parts.port is None else f":{parts.port}"
    except ValueError:
        parts, port = urlsplit(""), ""
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError("the base URL is no address of an endpoint; expected one like http://localhost:8000/v1")
    return f"{parts.hostname}{port}"


def explained(error: Exception, model: str, host: str, *, max_retries: int, timeout: openai.Timeout) -> str:
    """A failed request in one clause, without what an endpoint may quote of the key or of the request."""
    tried = f"with up to {max_retries} retries"
    match error:
        case NotAnAnswer():
            return (
                f"the endpoint {host} sent {error}; expected a chat completion, so check that the base URL ends in /v1"
            )
        case openai.APITimeoutError():
            return f"the endpoint {host} did not answer within {timeout.read:.0f} s, {tried}; is it overloaded?"
        case openai.APIConnectionError():
            return f"the endpoint {host} can't be reached, {tried} ({_cause(error)}); is it running?"
        case openai.AuthenticationError() | openai.PermissionDeniedError():
            # Without its own words: some endpoints quote the key.
            return f"the endpoint {host} refuses the key ({error.status_code}); correct OPENAI_API_KEY"
        case openai.NotFoundError():
            return (
                f"the endpoint {host} knows no model {model!r} under this base URL (404: {_detail(error)}); check "
                "both, most list their models at /v1/models"
            )
        case openai.RateLimitError():
            return f"the endpoint {host} says it is asked too often (429: {_detail(error)}), {tried}"
        case openai.InternalServerError():
            return f"the endpoint {host} failed ({error.status_code}: {_detail(error)}), {tried}; look into its log"
        case openai.APIStatusError():
            return f"the endpoint {host} refuses the request ({error.status_code}: {_detail(error)})"
    return f"the endpoint {host} sent no answer that can be read ({one_line(error)})"


def one_line(said: object, length: int = 200) -> str:
    words = " ".join(_DATA_URL.sub("<image>", str(said)).split()).rstrip(".")
    return words if len(words) <= length else f"{words[:length]}..."


def _api_key(base_url: str) -> str:
    key = os.environ.get("OPENAI_API_KEY")
    if key:
        return key
    host = host_of(base_url)
    if not _is_local(urlsplit(base_url).hostname):
        raise UserError(f"the endpoint {host} wants a key; set the environment variable OPENAI_API_KEY")
    return "none"  # servers on one's own machines ask for none, but the client does


def _is_local(hostname: str) -> bool:
    try:
        return ipaddress.ip_address(hostname).is_private
    except ValueError:
        return "." not in hostname or hostname.endswith((".local", ".localhost", ".internal"))


def _detail(error: openai.APIStatusError) -> str:
    body = error.body
    said = body.get("message") if isinstance(body, Mapping) else None
    key = os.environ.get("OPENAI_API_KEY")
    words = one_line(said or error.message)
    return words.replace(key, "***") if key else words


def _cause(error: Exception) -> str:
    return one_line(error.__cause__ or error)

"""A judge model behind an OpenAI-compatible endpoint, and the file that keeps all it ever said. No torch here.

A reply is kept under what was asked: model, prompt and decoding. So nothing is asked twice, a stopped run goes on where
it was, and one file may serve the evaluations of many models (--judge-cache), which are then held against the very same
lists. Replies are kept as they came and read anew each time: a better reader asks nothing again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from huatuo_vision.evaluation.protocols import PROMPTS
from huatuo_vision.evaluation.responses import append
from huatuo_vision.schema import UserError

if TYPE_CHECKING:
    import openai

JUDGE_FILE = "judge.jsonl"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A file of prompts/, and what a judgement records of it."""

    name: str
    text: str

    @classmethod
    def read(cls, name: str) -> Prompt:
        return cls(name, (PROMPTS / f"{name}.txt").read_text(encoding="utf-8").rstrip("\n"))

    @property
    def hash(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Request:
    """One thing to be judged."""

    benchmark: str
    id: str
    prompt: Prompt
    text: str  # the prompt, filled in
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the judge replied to a request."""

    text: str
    tokens: int  # prompt included, as the endpoint counts them
    is_cut: bool  # out of tokens, so that its end is missing


@dataclass(frozen=True, slots=True)
class Judge:
    model: str
    base_url: str
    file: Path
    concurrency: int = 8
    console: Console | None = None

    @property
    def identity(self) -> dict[str, str]:
        """Which judge it is, for the record: its name, the host that it answers at, and the file of its replies."""
        from huatuo_vision.openai_endpoint import host_of

        return {"model": self.model, "host": host_of(self.base_url), "cache": self.file.name}

    def ask(self, requests: Sequence[Request], doing: str) -> list[Judgement]:
        """The judgement on each request, asked for where none is kept. Raises UserError where some are left without."""
        kept = _kept(self.file)
        names = [self._asked(request) for request in requests]
        missing = {name: request for name, request in zip(names, requests, strict=True) if name not in kept}
        if missing:
            self._ask(missing, kept, doing)
        return [
            Judgement(kept[name]["reply"], kept[name]["tokens"], kept[name]["finish_reason"] == "length")
            for name in names
        ]

    def _asked(self, request: Request) -> str:
        """A hash of all that the reply depends on."""
        settings = [self.model, request.text, request.max_tokens, request.temperature, request.seed]
        said = json.dumps(settings, ensure_ascii=False).encode(errors="backslashreplace")
        return hashlib.sha256(said).hexdigest()[:24]

    def _ask(self, missing: Mapping[str, Request], kept: dict[str, dict[str, Any]], doing: str) -> None:
        # Here, so that who has no judge does not wait for the client to be imported.
        from huatuo_vision.evaluation.endpoint import ask_all
        from huatuo_vision.openai_endpoint import complete

        async def ask(client: openai.AsyncOpenAI, item: tuple[str, Request]) -> None:
            name, request = item
            reply = await complete(
                client,
                [{"role": "user", "content": request.text}],
                model=self.model,
                temperature=request.temperature,
                seed=request.seed,
                max_tokens=request.max_tokens,
            )
            line = {
                "asked": name,
                "benchmark": request.benchmark,
                "id": request.id,
                "prompt": request.prompt.name,
                "prompt_hash": request.prompt.hash,
                "model": self.model,
                "answered_by": reply.model,
                "temperature": request.temperature,
                "seed": request.seed,
                "reply": reply.text,
                "finish_reason": reply.finish_reason,
                "tokens": (reply.prompt_tokens or 0) + (reply.new_tokens or 0),
            }
            append(self.file, [line])
            kept[name] = line

        failures = ask_all(
            list(missing.items()),
            ask,
            self.base_url,
            doing=doing,
            concurrency=self.concurrency,
            console=self.console,
        )
        if failures:
            raise UserError(
                f"{failures.said(self.model, self.base_url)}; {len(missing) - failures.left:,} judgements are kept in "
                f"{self.file}, {failures.left:,} are missing: run the same command again to go on"
            )


def _kept(path: Path) -> dict[str, dict[str, Any]]:
    """Judgements of earlier runs by what was asked. The unfinished last line of a killed run is cut off."""
    if not path.exists():
        return {}
    whole = path.read_bytes()
    end = whole.rfind(b"\n") + 1
    if end < len(whole):
        os.truncate(path, end)
    kept: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(whole[:end].decode("utf-8").split("\n")[:-1], 1):
        try:
            judgement = json.loads(line)
            kept[judgement["asked"]] = {key: judgement[key] for key in ("reply", "tokens", "finish_reason")}
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path}, line {number}: no judgement; delete the line, it will be asked again") from None
    return kept

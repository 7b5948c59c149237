"""What a scripted endpoint says to the builder's requests."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from tests.evaluation.server import Sent, completion

ANSWER = {
    "description": "A frontal radiograph of the chest with clear lungs.",
    "query": "What does this radiograph show?",
    "answer": "It shows a normal chest.",
    "modality": "X-Ray",
    "body_part": "Chest",
}


def good(body: dict, *, finish_reason: str = "stop", **changed: Any) -> Sent:
    sent = completion(json.dumps(ANSWER | changed))
    sent["choices"][0]["finish_reason"] = finish_reason
    return Sent(sent)


def said(text: str | None, *, finish_reason: str = "stop", **message: Any) -> Sent:
    sent = completion(text, **message)
    sent["choices"][0]["finish_reason"] = finish_reason
    return Sent(sent)


def prompt_of(body: dict) -> str:
    """The text of the first turn."""
    return next(part["text"] for part in body["messages"][0]["content"] if part["type"] == "text")


class Script:
    """Answers by the first of its rules whose word stands in the prompt; a rule's replies are used up in order.

    Its last reply is repeated. `asked` counts the requests by word.
    """

    def __init__(self, **rules: list[Callable[[dict], Sent]]):
        self.rules = rules
        self.asked: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __call__(self, body: dict) -> Sent:
        prompt = prompt_of(body)
        word = next((word for word in self.rules if word in prompt), "")
        with self._lock:
            self.asked[word] += 1
            turn = self.asked[word]
        replies = self.rules.get(word, [good])
        return replies[min(turn, len(replies)) - 1](body)

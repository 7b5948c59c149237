"""A model and a judge behind one local endpoint, both scripted: what they say depends on what they are asked alone."""

from __future__ import annotations

import re
from collections.abc import Callable

from tests.evaluation.server import Sent, completion

JUDGE = "judge-1"
# Component -> a word of the prompt that asks for its list.
LISTS = {"key_points": "ten key points", "reasoning_steps": "ten steps", "evidence": "ten pieces"}


def text_of(body: dict) -> str:
    content = body["messages"][0]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def kind_of(body: dict) -> str:
    """What a request is for: "answer", a component's list, "marks", "reasoning", or "opinion"."""
    text = text_of(body)
    if body["model"] != JUDGE:
        return "answer"
    for component, words in LISTS.items():
        if f"Reply with a numbered list of {words}" in text:
            return component
    if "You are an examiner of the USMLE" in text:
        return "marks"
    return "reasoning" if "You sort the questions" in text else "opinion"


def student_of(body: dict) -> str:
    """The answer that a judge is to mark."""
    return re.search(r"\n(===== \w+ =====)\n(.*)\n\1\n", text_of(body), re.DOTALL)[2]


def judge(marks: Callable[[dict], str] = lambda body: "1.5", items: int = 4) -> Callable[[dict], Sent]:
    """An endpoint whose model always answers A, and whose judge lists so many items and marks as it is told."""

    def reply(body: dict) -> Sent:
        kind = kind_of(body)
        if kind == "answer":
            return Sent(completion("Answer: A\nThere is consolidation and fever."))
        if kind in LISTS:
            return Sent(completion("\n".join(f"{n}. Item {n} of {kind}" for n in range(1, items + 1))))
        if kind == "marks":
            return Sent(completion(marks(body)))
        if kind == "reasoning":
            return Sent(completion("inference" if "Which diagnosis" in text_of(body) else "Knowledge."))
        return Sent(completion("correct"))

    return reply

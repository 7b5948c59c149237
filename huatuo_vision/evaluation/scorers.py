"""From a reply to its verdict, by a protocol's rules. No torch here."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from huatuo_vision.evaluation import rules
from huatuo_vision.evaluation.protocols import Protocol
from huatuo_vision.evaluation.rows import HIDDEN
from huatuo_vision.schema import UserError

CHOICE_RULES: dict[str, rules.Rule] = {
    "default": rules.default_choice,
    "answer-line": rules.answer_line,
    "huatuo-first-letter": rules.huatuo_first_letter,
    "mmmu-official": rules.mmmu_choice,
    "llava-med-closed": rules.llava_med_closed,
}
OPEN_RULES: dict[str, rules.Rule] = {
    "default": rules.default_open,
    "mmmu-official": rules.mmmu_open,
    "llava-med-recall": rules.llava_med_recall,
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """Unparsed counts in n and is never correct; ungraded (the benchmark hides the answer) does not count in n."""

    benchmark: str
    id: str
    parsed: str | None  # a letter, or an open answer as it is compared
    verdict: Literal["correct", "wrong", "unparsed", "ungraded"]
    chance: float | None = None  # the credit that the official code's random draw would expect, where it draws
    metrics: Mapping[str, float] | None = None  # of open rows: exact_match, token_recall, token_f1, bleu, each 0..1


def judge(response: Mapping[str, Any], protocol: Protocol) -> Verdict:
    """The verdict on one object of a responses file. Raises UserError for a row that can't be graded."""
    check(response)
    multiple_choice = response["question_type"] == "multiple-choice"
    rule = CHOICE_RULES[protocol.choice_rule] if multiple_choice else OPEN_RULES[protocol.open_rule]
    graded = rule(response)
    benchmark, row_id = response["benchmark"], response["id"]
    if response["answer"] == HIDDEN:
        return Verdict(benchmark, row_id, graded.parsed, "ungraded")
    if graded.parsed is None:
        verdict = "unparsed"
    else:
        verdict = "correct" if graded.right else "wrong"
    return Verdict(benchmark, row_id, graded.parsed, verdict, graded.chance, graded.metrics)


def check(response: Mapping[str, Any]) -> None:
    """Raises UserError for a row that can't be graded."""
    where = f"{response['benchmark']} row {response['id']!r}"
    kind, answer = response["question_type"], response["answer"]
    if not isinstance(response["response"], str):
        raise UserError(f"{where} has the response {response['response']!r}; expected a string, empty for no reply")
    if kind == "multiple-choice":
        _check_choice(where, response["options"], answer)
    elif kind == "open":
        accepted = [answer] if isinstance(answer, str) else answer
        if not isinstance(accepted, list | tuple) or not accepted or not all(map(_is_text, accepted)):
            raise UserError(
                f"{where} has the answer {answer!r}; expected a string that is not blank, or a list of them"
            )
    else:
        raise UserError(f'{where} has the question_type {kind!r}; expected "multiple-choice" or "open"')


def _check_choice(where: str, options: object, answer: object) -> None:
    if isinstance(options, str):
        raise UserError(
            f'{where} has options that are one string, {options[:60]!r}; write a JSON list, as in ["text", "text"]'
        )
    most = len(string.ascii_uppercase)
    if not isinstance(options, list | tuple) or not 1 <= len(options) <= most or not all(map(_is_string, options)):
        raise UserError(f"{where} has the options {options!r}; expected a list of 1 to {most} strings")
    if answer != HIDDEN and answer not in tuple(string.ascii_uppercase[: len(options)]):
        letters = f"A to {string.ascii_uppercase[len(options) - 1]}"
        raise UserError(
            f'{where} has the answer {answer!r}; expected the letter of an option, {letters}, or "{HIDDEN}"'
        )


def _is_string(value: object) -> bool:
    return isinstance(value, str)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value.strip() != ""

"""An optional second opinion on each answer, from a language model. It never changes a verdict. No torch here.

The judge sees question, gold answer and reply, and says "correct" or "incorrect", at temperature 0. Its figures stand
beside the rules': the accuracy it gives, the share of rows on which both agree, and Cohen's kappa, which is 0 for the
agreement that chance would bring.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from huatuo_vision.evaluation.judge_client import Judge, Judgement, Prompt, Request
from huatuo_vision.evaluation.variants import is_original

if TYPE_CHECKING:
    from huatuo_vision.evaluation.scorers import Verdict

PROMPT = Prompt.read("judge")

# Room for a judge that repeats the question's terms before its word.
MAX_TOKENS = 64

_WORD = re.compile(r"\b(incorrect|correct)\b", re.IGNORECASE)
_NEGATED = re.compile(r"\bnot\s+(?:\w+\s+)?correct\b", re.IGNORECASE)


def judge_answers(
    answers: Sequence[Mapping[str, Any]], verdicts: Sequence[Verdict], judge: Judge
) -> dict[str, dict[str, Any]]:
    """Benchmark -> its `judge` entry of scores.json, over the answers that have a verdict of the rules.

    Ungraded answers and variants of a question are not judged. n: answers with a judgement that could be read. tokens:
    that the judgements took, prompts included. Raises UserError where some are left without one.
    """
    rule = {(v.benchmark, v.id): v.verdict for v in verdicts if v.verdict != "ungraded"}
    judged = [answer for answer in answers if (answer["benchmark"], answer["id"]) in rule and is_original(answer)]
    requests = [Request(answer["benchmark"], answer["id"], PROMPT, render(answer), MAX_TOKENS) for answer in judged]
    judgements = judge.ask(requests, "judging")
    by_benchmark: dict[str, list[tuple[str, Judgement]]] = {}
    for answer, judgement in zip(judged, judgements, strict=True):
        of_benchmark = by_benchmark.setdefault(answer["benchmark"], [])
        of_benchmark.append((rule[answer["benchmark"], answer["id"]], judgement))
    return {benchmark: _entry(judged, judge) for benchmark, judged in by_benchmark.items()}


def read_judgement(reply: str) -> str | None:
    """ "correct" or "incorrect"; None where the reply says neither, or both."""
    said = {word.lower() for word in _WORD.findall(_NEGATED.sub("incorrect", reply))}
    return said.pop() if len(said) == 1 else None


def render(answer: Mapping[str, Any]) -> str:
    """The text a judge is asked."""
    question, gold = answer["question"], answer["answer"]
    if answer["question_type"] != "open":
        named = named_options(answer)
        question = "\n".join([question, *named])
        gold = named[string.ascii_uppercase.index(gold)]
    elif not isinstance(gold, str):
        gold = " or ".join(gold)
    return PROMPT.text.format(question=question, gold=gold, response=answer["response"])


def named_options(answer: Mapping[str, Any]) -> list[str]:
    """A row's options with their letters; none of an open question."""
    return [f"{letter}. {text}" for letter, text in zip(string.ascii_uppercase, answer["options"] or (), strict=False)]


def _entry(judged: Sequence[tuple[str, Judgement]], judge: Judge) -> dict[str, Any]:
    """judged: the rules' verdict on each answer, and the judge's."""
    from sklearn.metrics import cohen_kappa_score

    words = [(rule, read_judgement(judgement.text)) for rule, judgement in judged]
    read = [(rule == "correct", word == "correct") for rule, word in words if word is not None]
    by_rule, by_judge = [rule for rule, _ in read], [word for _, word in read]
    n = len(read)
    # Where both say one and the same of every row, chance would agree too, and kappa is 0 / 0.
    defined = len({*by_judge, *by_rule}) == 2
    return {
        **judge.identity,
        "prompt_hash": PROMPT.hash,
        "n": n,
        "accuracy": sum(by_judge) / n if n else None,
        "agreement": sum(a == b for a, b in read) / n if n else None,
        "kappa": float(cohen_kappa_score(by_judge, by_rule)) if defined else None,
        "tokens": sum(judgement.tokens for _, judgement in judged),
    }

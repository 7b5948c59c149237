"""An optional second opinion on each answer, from a language model. It never changes a verdict. No torch.

The judge sees question, gold answer and reply, and says "correct" or "incorrect", at temperature 0. Its replies are
kept in judge.jsonl beside what was asked, so no answer is judged twice by the same model and prompt. Its figures
stand beside the rules': the accuracy it gives, the share of rows on which both agree, and Cohen's kappa, which is
0 for the agreement that chance would bring.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
from rich.console import Console

from huatuo_vision.evaluation.endpoint import ask_all
from huatuo_vision.evaluation.protocols import PROMPTS
from huatuo_vision.evaluation.responses import append
from huatuo_vision.openai_endpoint import complete
from huatuo_vision.schema import UserError

if TYPE_CHECKING:
    from huatuo_vision.evaluation.scorers import Verdict

JUDGE_FILE = "judge.jsonl"
PROMPT = (PROMPTS / "judge.txt").read_text(encoding="utf-8").rstrip("\n")
PROMPT_HASH = hashlib.sha256(PROMPT.encode()).hexdigest()[:16]

# Room for a judge that repeats the question's terms before its word.
MAX_TOKENS = 64

_WORD = re.compile(r"\b(incorrect|correct)\b", re.IGNORECASE)
_NEGATED = re.compile(r"\bnot\s+(?:\w+\s+)?correct\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class _Case:
    """One answer to be judged."""

    benchmark: str
    id: str
    prompt: str
    asked: str  # hash of the model and the whole prompt: what a kept judgement must have been asked


def judge_answers(
    answers: Sequence[Mapping[str, Any]],
    verdicts: Sequence[Verdict],
    model: str,
    base_url: str,
    out: Path,
    *,
    concurrency: int = 8,
    console: Console | None = None,
) -> dict[str, dict[str, Any]]:
    """Benchmark -> its `judge` entry of scores.json, over the answers that have a verdict of the rules.

    Ungraded answers and rotated ones are not judged. n: answers with a judgement that could be read. tokens: that the
    judgements took, prompts included, as the endpoint counts them. Raises UserError where some are left without one.
    """
    path = out / JUDGE_FILE
    rule = {(v.benchmark, v.id): v.verdict for v in verdicts if v.verdict != "ungraded"}
    cases = [
        _case(answer, model)
        for answer in answers
        if (answer["benchmark"], answer["id"]) in rule and "rotation" not in answer
    ]
    kept = _kept(path)

    async def ask(client: openai.AsyncOpenAI, case: _Case) -> None:
        messages = [{"role": "user", "content": case.prompt}]
        reply = await complete(client, messages, model=model, temperature=0.0, max_tokens=MAX_TOKENS)
        judgement = {
            "benchmark": case.benchmark,
            "id": case.id,
            "judge": read_judgement(reply.text),
            "reply": reply.text,
            "tokens": (reply.prompt_tokens or 0) + (reply.new_tokens or 0),
            "model": model,
            "prompt_hash": PROMPT_HASH,
            "asked": case.asked,
        }
        append(path, [judgement])
        kept[case.asked] = judgement

    missing = list({case.asked: case for case in cases if case.asked not in kept}.values())
    if missing:
        failures = ask_all(missing, ask, base_url, doing="judging", concurrency=concurrency, console=console)
        if failures:
            raise UserError(
                f"{failures.said(model, base_url)}; {len(cases) - failures.left:,} judgements are kept, "
                f"{failures.left:,} are missing: run the same command again to go on"
            )
    return {
        benchmark: _entry([case for case in cases if case.benchmark == benchmark], kept, rule, model)
        for benchmark in dict.fromkeys(case.benchmark for case in cases)
    }


def read_judgement(reply: str) -> str | None:
    """ "correct" or "incorrect"; None where the reply says neither, or both."""
    said = {word.lower() for word in _WORD.findall(_NEGATED.sub("incorrect", reply))}
    return said.pop() if len(said) == 1 else None


def _case(answer: Mapping[str, Any], model: str) -> _Case:
    prompt = render(answer)
    name = json.dumps([answer["benchmark"], answer["id"], model, prompt], ensure_ascii=False)
    return _Case(
        answer["benchmark"],
        answer["id"],
        prompt,
        hashlib.sha256(name.encode(errors="backslashreplace")).hexdigest()[:16],
    )


def render(answer: Mapping[str, Any]) -> str:
    """The text a judge is asked."""
    question, gold = answer["question"], answer["answer"]
    if answer["question_type"] != "open":
        named = [f"{letter}. {text}" for letter, text in zip(string.ascii_uppercase, answer["options"], strict=False)]
        question = "\n".join([question, *named])
        gold = named[string.ascii_uppercase.index(gold)]
    elif not isinstance(gold, str):
        gold = " or ".join(gold)
    return PROMPT.format(question=question, gold=gold, response=answer["response"])


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
            kept[judgement["asked"]] = judgement
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path}, line {number}: no judgement; delete the line, it will be asked again") from None
    return kept


def _entry(
    cases: Sequence[_Case],
    kept: Mapping[str, Mapping[str, Any]],
    rule: Mapping[tuple[str, str], str],
    model: str,
) -> dict[str, Any]:
    from sklearn.metrics import cohen_kappa_score

    judged = [(case, kept[case.asked]) for case in cases]
    read = [(case, judgement) for case, judgement in judged if judgement["judge"] is not None]
    by_judge = [judgement["judge"] == "correct" for _, judgement in read]
    by_rule = [rule[case.benchmark, case.id] == "correct" for case, _ in read]
    n = len(read)
    # Where both say one and the same of every row, chance would agree too, and kappa is 0 / 0.
    defined = len({*by_judge, *by_rule}) == 2
    return {
        "model": model,
        "prompt_hash": PROMPT_HASH,
        "n": n,
        "accuracy": sum(by_judge) / n if n else None,
        "agreement": sum(a == b for a, b in zip(by_judge, by_rule, strict=True)) / n if n else None,
        "kappa": float(cohen_kappa_score(by_judge, by_rule)) if defined else None,
        "tokens": sum(judgement["tokens"] for _, judgement in judged),
    }

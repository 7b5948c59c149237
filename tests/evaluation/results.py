"""Evaluation folders made on the spot, for what reads them."""

import json
from dataclasses import asdict
from pathlib import Path

from huatuo_vision.evaluation import compare, scores
from huatuo_vision.evaluation.protocols import PROTOCOLS
from huatuo_vision.evaluation.scorers import Verdict

NOTE = "Synthetic pictures: a demonstration of the machinery, no medical result."


def choice(benchmark: str, number: int, right: bool, *, options=("x", "y", "z"), groups=None, **changed) -> dict:
    """A multiple-choice answer whose gold is B; the reply is a bare letter."""
    groups = {"subject": ("side", "size")[number % 2]} if groups is None else groups
    return {
        "benchmark": benchmark, "id": str(number), "question_type": "multiple-choice", "question": "Which one?",
        "options": list(options), "answer": "B", "response": "B" if right else "A", "groups": groups,
        "image_sha256": [],
    } | changed  # fmt: skip


def verdict_of(answer: dict) -> Verdict:
    reply = answer["response"]
    if answer["answer"] == "?":
        return Verdict(answer["benchmark"], answer["id"], reply, "ungraded")
    if answer["options"] is None:
        word = "correct" if reply in answer["answer"] else "wrong"
        metrics = dict.fromkeys(("exact_match", "token_recall", "token_f1", "bleu"), 0.5)
        return Verdict(answer["benchmark"], answer["id"], reply, word, metrics=metrics)
    if reply not in ("A", "B", "C"):
        return Verdict(answer["benchmark"], answer["id"], None, "unparsed")
    return Verdict(answer["benchmark"], answer["id"], reply, "correct" if reply == answer["answer"] else "wrong")


class Result:
    """An evaluation folder and what it was made of."""

    def __init__(
        self, out: Path, answers, *, protocol="default", expected=None, title="", note=NOTE, revision="f" * 40, **header
    ):
        out.mkdir(exist_ok=True)
        self.out, self.answers = out, answers
        self.verdicts = [verdict_of(answer) for answer in answers]
        originals = [answer["benchmark"] for answer in answers if "rotation" not in answer]
        facts = {
            name: scores.BenchmarkFacts(
                name, title or f"Title of {name}", revision, (expected or {}).get(name, originals.count(name)),
                next(iter(answers[0]["groups"]), None), note, "0123456789abcdef",
            )
            for name in dict.fromkeys(originals)
        }  # fmt: skip
        self.header = {
            "model": "runs/a", "weights": "0123", "precision": "float32", "backend": "transformers", "blind": False,
            "limit": None, "scoring": "generate",
        } | header  # fmt: skip
        self.scores = scores.summarise(self.header, PROTOCOLS[protocol], answers, self.verdicts, facts)
        (out / "scores.json").write_text(json.dumps(self.scores))
        (out / "responses.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
        (out / "verdicts.jsonl").write_text("".join(json.dumps(asdict(v)) + "\n" for v in self.verdicts))

    @property
    def rows(self):
        return self.answers, self.verdicts

    def against(self, other: "Result") -> dict:
        return compare.compare(compare.read(self.out), compare.read(other.out))


def simple(out: Path, right: int, n: int = 20, benchmark: str = "phantom", **changed) -> Result:
    """`n` rows of which the first `right` are correct."""
    return Result(out, [choice(benchmark, number, number < right) for number in range(n)], **changed)

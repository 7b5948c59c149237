"""Which answers the report shows one by one, and what the page's script is given of each. No torch here."""

from __future__ import annotations

import base64
import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huatuo_vision.evaluation.rows import HIDDEN
from huatuo_vision.evaluation.variants import is_original

if TYPE_CHECKING:
    from huatuo_vision.evaluation.scorers import Verdict

ROWS_PER_BENCHMARK = 400
# Longer replies are cut in the page (and say so); responses.jsonl keeps them whole.
REPLY_CHARACTERS = 6000

Answer = Mapping[str, Any]
Key = tuple[str, str]  # benchmark, id
Answered = tuple[Sequence[Answer], Sequence["Verdict"]]


def choose(
    answers: Sequence[Answer],
    verdicts: Sequence[Verdict],
    comparison: Mapping[str, Any] | None = None,
    other: Answered | None = None,
) -> list[Key]:
    """The rows that the report shows: at most ROWS_PER_BENCHMARK each, in the order of the answers.

    Flipped, wrong and unparsed rows go first. Among equals a checksum decides, so that the choice is spread over the
    benchmark and the same on every machine.
    """
    graded = {key_of(verdict): verdict.verdict for verdict in verdicts}
    flips = _flips(graded, comparison, other)
    by_benchmark: dict[str, list[Key]] = defaultdict(list)
    for key in (_key(answer) for answer in answers if is_original(answer)):
        if key in graded:
            by_benchmark[key[0]].append(key)

    def rank(key: Key) -> tuple[int, str]:
        if flips.get(key):
            urgency = 0
        else:
            urgency = {"wrong": 1, "unparsed": 1, "correct": 2}.get(graded[key], 3)
        return urgency, hashlib.sha256("\0".join(key).encode("utf-8", "replace")).hexdigest()

    chosen = {key for keys in by_benchmark.values() for key in sorted(keys, key=rank)[:ROWS_PER_BENCHMARK]}
    return [key for keys in by_benchmark.values() for key in keys if key in chosen]


def describe(
    keys: Iterable[Key],
    answers: Sequence[Answer],
    verdicts: Sequence[Verdict],
    comparison: Mapping[str, Any] | None = None,
    other: Answered | None = None,
    marks: Mapping[Key, Mapping[str, float]] | None = None,
) -> list[dict[str, Any]]:
    """What the page shows of each row, ready for JSON. marks: what a judge and a list of terms gave to its answer."""
    by_key = {_key(answer): answer for answer in answers}
    graded = {key_of(verdict): verdict for verdict in verdicts}
    flips = _flips({key: verdict.verdict for key, verdict in graded.items()}, comparison, other)
    second = _second(other)
    variants: dict[Key, list[Answer]] = defaultdict(list)
    for answer in answers:
        if not is_original(answer) and _key(answer) in graded:
            variants[answer["benchmark"], answer.get("rotation_of") or answer.get("control_of")].append(answer)
    shown = []
    for key in keys:
        row = _described(by_key[key], graded[key])
        of_row = [(answer, graded[_key(answer)].verdict) for answer in variants[key]]
        row["rotated"] = [{"by": a["rotation"], "verdict": verdict} for a, verdict in of_row if a.get("rotation")]
        row["controls"] = [{"name": a["control"], "verdict": verdict} for a, verdict in of_row if a.get("control")]
        row["metrics"] |= {name: round(value, 3) for name, value in (marks or {}).get(key, {}).items()}
        row["flip"] = flips.get(key)
        row["other"] = second.get(key)
        shown.append(row)
    return shown


def picture_uris(rows: Iterable[Mapping[str, Any]], folders: Sequence[Path]) -> dict[str, str]:
    """sha256 -> data URI of every picture of these rows that one of the folders holds as <sha256>.jpg."""
    found = {}
    for name in dict.fromkeys(name for row in rows for name in row["images"]):
        # Names come from a file that anyone may have written: only a checksum is ever made a path.
        if len(name) != 64 or set(name) - set("0123456789abcdef"):
            continue
        path = next((folder / f"{name}.jpg" for folder in folders if (folder / f"{name}.jpg").is_file()), None)
        if path is not None:
            found[name] = "data:image/jpeg;base64," + base64.b64encode(path.read_bytes()).decode()
    return found


def key_of(verdict: Verdict) -> Key:
    return verdict.benchmark, verdict.id


def _key(answer: Answer) -> Key:
    return answer["benchmark"], answer["id"]


def _second(other: Answered | None) -> dict[Key, dict[str, Any]]:
    if other is None:
        return {}
    graded = {key_of(verdict): verdict for verdict in other[1]}
    return {
        _key(answer): {
            "reply": _cut(answer["response"]),
            "parsed": graded[_key(answer)].parsed,
            "verdict": graded[_key(answer)].verdict,
        }
        for answer in other[0]
        if _key(answer) in graded
    }


def _flips(
    first: Mapping[Key, str], comparison: Mapping[str, Any] | None, other: Answered | None
) -> dict[Key, str | None]:
    """ "first" or "second" for a row that only one of the two has right, None for one where they agree."""
    if comparison is None:
        return {}
    second = {key: row["verdict"] for key, row in _second(other).items()}
    second |= {(flip["benchmark"], flip["id"]): flip["b"] for flip in comparison["flips"]}
    return {
        key: None if (verdict == "correct") == (second[key] == "correct") else _right(verdict)
        for key, verdict in first.items()
        if key in second
    }


def _right(verdict: str) -> str:
    return "first" if verdict == "correct" else "second"


def _described(answer: Answer, verdict: Verdict) -> dict[str, Any]:
    gold = answer["answer"]
    return {
        "benchmark": answer["benchmark"],
        "id": answer["id"],
        "question": answer["question"],
        "options": None if answer["question_type"] == "open" else answer["options"],
        "gold": [] if gold == HIDDEN else [gold] if isinstance(gold, str) else list(gold),
        "reply": _cut(answer["response"]),
        "parsed": verdict.parsed,
        "verdict": verdict.verdict,
        "groups": {**answer["groups"], "question_type": answer["question_type"]},
        "images": list(answer["image_sha256"]),
        "reference": _cut(answer["reference"]) if isinstance(answer.get("reference"), str) else None,
        "notes": [str(note) for note in answer.get("notes") or ()],
        "metrics": {name: round(value, 3) for name, value in (verdict.metrics or {}).items()},
        "likelihood": {
            kind: [round(p, 4) if math.isfinite(p) else None for p in values]
            for kind, values in (answer.get("likelihood") or {}).items()
        },
    }


def _cut(reply: str) -> str:
    if len(reply) <= REPLY_CHARACTERS:
        return reply
    return f"{reply[:REPLY_CHARACTERS]} … ({len(reply) - REPLY_CHARACTERS:,} more characters in responses.jsonl)"

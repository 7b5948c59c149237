"""Which questions ask for knowledge and which for inference (SemiHVision, Figure 3). No torch here.

The label is the group `reasoning` of a row: from the data set, from a sheet, or from a judge model that sees the
question and its options, never the answer. `reasoning.jsonl` in the evaluation folder keeps what a sheet or a judge
said, so that scoring again and comparing find it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huatuo_vision.evaluation.judge_client import Judge, Prompt, Request
from huatuo_vision.evaluation.judges import named_options
from huatuo_vision.evaluation.responses import json_lines, write_whole
from huatuo_vision.evaluation.rows import INFERENCE, KNOWLEDGE, REASONING
from huatuo_vision.evaluation.sheets import read_sheet
from huatuo_vision.evaluation.variants import is_original
from huatuo_vision.evaluation.words import clean
from huatuo_vision.schema import UserError

LABELS_FILE = "reasoning.jsonl"
BY_JUDGE = "judge"
PROMPT = Prompt.read("reasoning")
MAX_TOKENS = 256

_WORD = re.compile(rf"\b({KNOWLEDGE}|{INFERENCE})\b", re.IGNORECASE)
_SEAL = "===== question ====="

Answer = Mapping[str, Any]
Key = tuple[str, str]  # benchmark, id


def label(out: Path, answers: Sequence[Answer], by: str, judge: Judge | None) -> None:
    """Write `reasoning.jsonl`: by BY_JUDGE, or the path of a sheet with the columns benchmark, id and reasoning.

    Raises UserError for a sheet with another label, or without a row of these answers.
    """
    asked = [answer for answer in answers if is_original(answer)]
    if by == BY_JUDGE:
        source, labels = f"judge {judge.model}, prompt {PROMPT.hash}", _by_judge(asked, judge)
    else:
        source, labels = f"sheet {Path(by).name}", _by_sheet(Path(by), {_key(answer) for answer in asked})
    rows = [{"benchmark": key[0], "id": key[1], REASONING: word, "source": source} for key, word in labels.items()]
    write_whole(out / LABELS_FILE, json_lines(rows))


def with_labels(out: Path, answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """The answers with the labels of `reasoning.jsonl` among their groups; as they are where there is no such file."""
    path = out / LABELS_FILE
    if not path.exists():
        return list(answers)
    labels: dict[Key, str | None] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            labels[row["benchmark"], row["id"]] = row[REASONING]
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path}, line {number}: no label; delete the file and give --reasoning again") from None
    return [_labelled(answer, labels.get(_key(answer))) for answer in answers]


def source_of(out: Path) -> str | None:
    """Where the labels of `reasoning.jsonl` come from."""
    path = out / LABELS_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return json.loads(lines[0])["source"] if lines else None


def _labelled(answer: Answer, word: str | None) -> dict[str, Any]:
    return {**answer, "groups": {**answer["groups"], REASONING: word}} if word else dict(answer)


def _by_judge(asked: Sequence[Answer], judge: Judge) -> dict[Key, str | None]:
    requests = [Request(*_key(answer), PROMPT, _render(answer), MAX_TOKENS) for answer in asked]
    judgements = judge.ask(requests, "sorting the questions")
    return {_key(a): read_label(judgement.text) for a, judgement in zip(asked, judgements, strict=True)}


def _render(answer: Answer) -> str:
    question = "\n".join([answer["question"], *named_options(answer)])
    return PROMPT.text.format(question=question.replace(_SEAL, ""), mark=_SEAL)


def read_label(reply: str) -> str | None:
    """The one label that a reply names; None where it names none, or both."""
    said = {word.lower() for word in _WORD.findall(clean(reply))}
    return said.pop() if len(said) == 1 else None


def _by_sheet(path: Path, known: set[Key]) -> dict[Key, str]:
    found: dict[Key, str] = {}
    for where, row in read_sheet(path, "--reasoning", ("benchmark", "id", REASONING)):
        word = row[REASONING].lower()
        if word not in (KNOWLEDGE, INFERENCE, ""):
            raise UserError(f"{where}: reasoning is {row[REASONING][:40]!r}; expected {KNOWLEDGE} or {INFERENCE}")
        key = (row["benchmark"], row["id"])
        if found.get(key, word) != word:
            raise UserError(f"{where}: {key[0]} {key[1]} stands there twice, with different labels; keep one of them")
        if word and key in known:
            found[key] = word
    if not found:
        raise UserError(f"--reasoning {path} labels none of these questions; check its columns benchmark and id")
    return found


def _key(answer: Answer) -> Key:
    return answer["benchmark"], answer["id"]

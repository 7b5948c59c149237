"""The judge column: cached, counted, compared with the rules, and never more than a column."""

import copy
import hashlib
import warnings
from dataclasses import dataclass

import pytest

from huatuo_vision.evaluation import answers, endpoint, judges
from huatuo_vision.evaluation.judge_client import Judge
from huatuo_vision.schema import UserError
from tests.evaluation.helpers import read_lines
from tests.evaluation.server import Sent, completion
from tests.evaluation.server import endpoint as serve
from tests.evaluation.tiny import mixed_rows


@dataclass(frozen=True)
class Verdict:
    benchmark: str
    id: str
    verdict: str


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr(endpoint, "MAX_RETRIES", 1)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


# Ten answers: what the rules say, and what the judge will say of each.
RULES = ["correct"] * 5 + ["wrong", "wrong", "unparsed", "correct", "ungraded"]
JUDGE = ["Correct", "correct.", "**correct**", "The answer is correct", "incorrect", "Incorrect.", "not correct",
         "correct", "I can't say", "correct"]  # fmt: skip


def material() -> tuple[list[dict], list[Verdict]]:
    rows = mixed_rows(10)
    replies = [answers.response_of(row, f"<{i}> reply {{x}}") for i, row in enumerate(rows)]
    return replies, [Verdict(row.benchmark, row.id, verdict) for row, verdict in zip(rows, RULES, strict=True)]


def judge(body: dict) -> Sent:
    text = body["messages"][0]["content"]
    return Sent(completion(next(JUDGE[i] for i in range(10) if f"<{i}>" in text)))


def run(url, out, model="judge-1", changed=None, **kwargs):
    replies, verdicts = material()
    return judges.judge_answers(changed or replies, verdicts, Judge(model, url, out / "judge.jsonl", **kwargs))


def test_the_entry_counts_and_compares(tmp_path):
    with serve(judge) as server:
        found = run(server.url, tmp_path)
    # Judged: rows 0 to 8. Row 8 can't be read. Correct by the judge: 0 to 3 and 7; by the rules: 0 to 4.
    agreement, by_judge, by_rule = 6 / 8, 5 / 8, 5 / 8
    chance = by_judge * by_rule + (1 - by_judge) * (1 - by_rule)
    assert found == {
        "made-up": {
            "model": "judge-1",
            "host": server.url.split("/")[2],
            "cache": "judge.jsonl",
            "prompt_hash": hashlib.sha256(judges.PROMPT.text.encode()).hexdigest()[:16],
            "n": 8,
            "accuracy": by_judge,
            "agreement": agreement,
            "kappa": pytest.approx((agreement - chance) / (1 - chance)),
            "tokens": 9 * 13,
        }
    }


def test_what_the_judge_is_asked(tmp_path):
    with serve(judge) as server:
        run(server.url, tmp_path)
    assert len(server.requests) == 9
    by_row = {next(i for i in range(10) if f"<{i}>" in b["messages"][0]["content"]): b for b in server.requests}
    assert {(body["model"], body["temperature"]) for body in server.requests} == {("judge-1", 0.0)}
    choice, open_question = (by_row[i]["messages"][0]["content"] for i in (1, 4))
    assert "Which organ is this, please?\nA. right lung\nB. liver\nC. heart\n" in choice
    assert "Reference answer:\nB. liver\n" in choice and "grade:\n<1> reply {x}\n" in choice
    assert "Reference answer:\nspleen or an organ\n" in open_question


def test_answers_are_untouched_and_judgements_kept(tmp_path):
    replies, _ = material()
    before = copy.deepcopy(replies)
    with serve(judge) as server:
        first = run(server.url, tmp_path, changed=replies)
        asked = len(server.requests)
        assert run(server.url, tmp_path) == first
        assert len(server.requests) == asked == 9
        run(server.url, tmp_path, model="judge-2")
        assert len(server.requests) == 18
        replies[0] = replies[0] | {"response": "<0> something else"}
        run(server.url, tmp_path, changed=replies)
        assert len(server.requests) == 19
    assert before[1:] == replies[1:]
    line = next(line for line in read_lines(tmp_path / "judge.jsonl") if line["id"] == "row 6")
    assert (line["reply"], line["prompt"], line["prompt_hash"]) == ("not correct", "judge", judges.PROMPT.hash)
    assert (line["model"], line["answered_by"], line["temperature"]) == ("judge-1", "m", 0.0)


def test_rotated_rows_are_not_judged(tmp_path):
    replies, _ = material()
    replies[0] = replies[0] | {"rotation": 1, "rotation_of": "x"}
    with serve(judge) as server:
        assert run(server.url, tmp_path, changed=replies)["made-up"]["n"] == 7
    assert len(server.requests) == 8


def test_a_failing_judge_loses_nothing_and_a_torn_line_is_asked_again(tmp_path):
    broken = Sent({"error": {"message": "no"}}, 500, headers={"retry-after-ms": "1"})
    with serve(lambda body: broken if "<5>" in body["messages"][0]["content"] else judge(body)) as server:
        with pytest.raises(UserError, match="failed .500: no.*; 8 judgements are kept in .*, 1 are missing"):
            run(server.url, tmp_path, concurrency=4)
        path = tmp_path / "judge.jsonl"
        path.write_bytes(path.read_bytes()[:-20])
        server.reply = judge
        server.requests.clear()
        found = run(server.url, tmp_path)
        assert len(server.requests) == 2
    assert found["made-up"]["n"] == 8
    path.write_text(path.read_text() + "{}\n")
    with pytest.raises(UserError, match="judge.jsonl, line 10: no judgement"):
        run(server.url, tmp_path)


def test_kappa_of_one_class_is_undefined_without_a_warning(tmp_path):
    rows = mixed_rows(3)
    replies = [answers.response_of(row, "x") for row in rows]
    verdicts = [Verdict(row.benchmark, row.id, "correct") for row in rows]
    with serve(lambda body: Sent(completion("correct"))) as server, warnings.catch_warnings():
        warnings.simplefilter("error")
        found = judges.judge_answers(replies, verdicts, Judge("m", server.url, tmp_path / "judge.jsonl"))["made-up"]
        assert (found["agreement"], found["kappa"]) == (1.0, None)
        verdicts = [Verdict(row.benchmark, row.id, "wrong") for row in rows]
        found = judges.judge_answers(replies, verdicts, Judge("m", server.url, tmp_path / "judge.jsonl"))["made-up"]
        assert (found["accuracy"], found["agreement"], found["kappa"]) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("reply", "read"),
    [
        ("correct", "correct"),
        ("INCORRECT.", "incorrect"),
        ("It is not correct.", "incorrect"),
        ("not quite correct", "incorrect"),
        ("It is not correct: incorrect", "incorrect"),
        ("correct or incorrect", None),
        ("correctly", None),
        ("", None),
    ],
)
def test_a_judgement_is_one_word_or_none(reply, read):
    assert judges.read_judgement(reply) == read

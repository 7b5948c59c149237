"""Answers on disk: nothing lost, nothing twice, nobody else's."""

import json
from dataclasses import replace

import pytest

from huatuo_vision.evaluation import responses
from huatuo_vision.schema import UserError

HEADER = responses.Header(
    model="runs/a/final", weights="0123", precision="float32", backend="transformers", protocol="default",
    protocols={"phantom": "abcd"}, revisions={"phantom": "1"}, blind=False, limit=None, scoring="generate",
    rotated=False,
)  # fmt: skip


def row(number: int, reply: str = "B") -> dict:
    return {
        "benchmark": "phantom", "id": f"q{number}", "question_type": "multiple-choice", "question": "Which?",
        "options": ["one", "two"], "answer": "B", "response": reply, "groups": {}, "image_sha256": [],
    }  # fmt: skip


def keys(*numbers: int) -> list[tuple[str, str]]:
    return [("phantom", f"q{number}") for number in numbers]


def test_the_same_evaluation_may_go_on_under_another_path_to_the_same_weights(tmp_path):
    responses.claim_folder(tmp_path, HEADER)
    responses.append(tmp_path / "responses.rank0.jsonl", [row(1)])
    responses.claim_folder(tmp_path, HEADER)
    responses.claim_folder(tmp_path, replace(HEADER, model="/elsewhere/final"))


def test_a_folder_without_answers_is_anyones(tmp_path):
    responses.claim_folder(tmp_path, HEADER)
    responses.claim_folder(tmp_path, replace(HEADER, blind=True))
    assert json.loads((tmp_path / "eval.json").read_text())["blind"] is True


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model": "runs/b/final", "weights": "9999"}, r"model: runs/a/final \(weights 0123\) there, runs/b/final"),
        ({"protocols": {"phantom": "ffff"}}, "protocol or set of benchmarks: .*abcd.* there, .*ffff.* now"),
        ({"revisions": {"phantom": "2"}}, "data revision: .*1.* there, .*2.* now"),
        ({"scoring": "likelihood"}, "scoring: generate there, likelihood now"),
        ({"blind": True}, "blind: false there, true now"),
        ({"limit": 5}, "limit: null there, 5 now"),
        ({"precision": "bfloat16"}, "precision: float32 there, bfloat16 now"),
    ],
)
def test_answers_of_another_evaluation_are_refused_naming_the_difference(tmp_path, changed, said):
    responses.claim_folder(tmp_path, HEADER)
    responses.append(tmp_path / "responses.rank2.jsonl", [row(1)])
    with pytest.raises(UserError, match=f"answers with another {said}"):
        responses.claim_folder(tmp_path, replace(HEADER, **changed))
    assert json.loads((tmp_path / "eval.json").read_text())["weights"] == "0123"


def test_behind_an_endpoint_the_name_is_the_model(tmp_path):
    header = replace(HEADER, weights=None, model="localhost/a")
    responses.claim_folder(tmp_path, header)
    responses.append(tmp_path / "responses.endpoint.jsonl", [row(1)])
    responses.claim_folder(tmp_path, header)
    with pytest.raises(UserError, match="another model: localhost/a there, localhost/b now"):
        responses.claim_folder(tmp_path, replace(header, model="localhost/b"))


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="out: no folder can be made there"):
        responses.claim_folder(tmp_path / "out", HEADER)


def test_answers_without_a_header_are_refused(tmp_path):
    responses.append(tmp_path / "responses.jsonl", [row(1)])
    with pytest.raises(UserError, match="no eval.json"):
        responses.claim_folder(tmp_path, HEADER)
    (tmp_path / "eval.json").write_text('{"model": "x"}')
    with pytest.raises(UserError, match="not the header"):
        responses.claim_folder(tmp_path, HEADER)


@pytest.mark.parametrize("kept", [1, 40, -1])
def test_a_torn_last_line_is_dropped_and_whole_lines_stay(tmp_path, kept):
    path = tmp_path / "responses.rank0.jsonl"
    responses.append(path, [row(1), row(2, "é")])
    whole = path.read_bytes()
    path.write_bytes(whole + responses.json_lines([row(3, "ünfinished")]).encode()[:kept])
    responses.drop_torn_lines(tmp_path)
    assert path.read_bytes() == whole
    responses.drop_torn_lines(tmp_path)
    assert list(responses.finished(tmp_path)) == keys(1, 2)


def test_answers_of_all_processes_become_one_file_in_benchmark_order(tmp_path):
    responses.append(tmp_path / "responses.rank1.jsonl", [row(4), row(2)])
    responses.append(tmp_path / "responses.rank0.jsonl", [row(3), row(1)])
    merged = responses.merge(tmp_path, keys(1, 2, 3, 4))
    assert [r["id"] for r in merged] == ["q1", "q2", "q3", "q4"]
    assert responses.read_responses(tmp_path / "responses.jsonl") == merged
    assert [path.name for path in tmp_path.iterdir()] == ["responses.jsonl"]


def test_a_kill_between_merging_and_cleaning_up_counts_no_answer_twice(tmp_path):
    responses.append(tmp_path / "responses.rank0.jsonl", [row(1), row(2)])
    responses.append(tmp_path / "responses.jsonl", [row(1), row(2)])
    assert len(responses.merge(tmp_path, keys(1, 2))) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["responses.jsonl"]


def test_two_different_answers_to_one_question_are_refused(tmp_path):
    responses.append(tmp_path / "responses.rank0.jsonl", [row(1, "A")])
    responses.append(tmp_path / "responses.rank1.jsonl", [row(1, "B")])
    with pytest.raises(UserError, match="two different answers to phantom row 'q1'"):
        responses.finished(tmp_path)


def test_a_missing_or_foreign_answer_is_refused_and_nothing_is_written(tmp_path):
    responses.append(tmp_path / "responses.rank0.jsonl", [row(1), row(9)])
    with pytest.raises(UserError, match="lacks 1 answers, first 'q2'"):
        responses.merge(tmp_path, keys(1, 2, 9))
    with pytest.raises(UserError, match="'q9', which the benchmark does not have"):
        responses.merge(tmp_path, keys(1))
    assert [path.name for path in tmp_path.iterdir()] == ["responses.rank0.jsonl"]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([row(1), row(1)], "line 2: phantom row 'q1' stands there twice"),
        ([row(1), "{"], "line 2: not JSON"),
        ([row(1), {k: v for k, v in row(2).items() if k != "answer"}], "line 2: without answer"),
        ([[1]], "line 1: no object; expected one JSON object a line"),
        ([row(1) | {"options": "['one', 'two']"}], "line 1: options is .*; it looks like a list written as text"),
        ([row(1) | {"options": ["one", 2]}], "line 1: options is .*; expected a list of strings, or null"),
        ([row(1) | {"response": None}], "line 1: response is null; expected a string"),
        ([row(1) | {"groups": {"subject": 3}}], "line 1: groups is .*; expected an object of strings"),
        ([row(1) | {"id": 7}], "line 1: id is 7; expected a string"),
        ([row(1) | {"image_sha256": None}], "line 1: image_sha256 is null; expected a list of strings"),
    ],
)
def test_a_line_that_is_no_row_is_refused_by_number(tmp_path, lines, said):
    path = tmp_path / "responses.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    with pytest.raises(UserError, match=said):
        responses.read_responses(path)


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path):
    with pytest.raises(UserError, match="gone.jsonl can't be read"):
        responses.read_responses(tmp_path / "gone.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="binary.jsonl can't be read as UTF-8"):
        responses.read_responses(tmp_path / "binary.jsonl")


def test_a_file_from_elsewhere_is_taken_once_and_never_over_another(tmp_path):
    source, out = tmp_path / "theirs.jsonl", tmp_path / "out"
    responses.append(source, [row(1)])
    for _ in range(2):
        responses.take(out, HEADER, [row(1)], source=source)
    assert responses.read_responses(out / "responses.jsonl") == [row(1)]
    with pytest.raises(UserError, match="holds other answers than"):
        responses.take(out, HEADER, [row(1), row(2)], source=source)
    # A folder's own file is scored where it lies.
    responses.take(out, HEADER, [row(1)], source=out / "responses.jsonl")

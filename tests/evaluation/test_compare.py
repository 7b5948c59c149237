"""Two folders side by side: the numbers, the tables, and what is refused."""

import io
import json
from dataclasses import asdict

import pytest
from rich.console import Console

from huatuo_vision.evaluation import compare as comparing
from huatuo_vision.evaluation import statistics
from huatuo_vision.evaluation.compare import shortfall, show, write_comparison
from huatuo_vision.evaluation.protocols import PROTOCOLS
from huatuo_vision.evaluation.rows import Benchmark
from huatuo_vision.evaluation.scorers import Verdict
from huatuo_vision.evaluation.scores import BenchmarkFacts, summarise
from huatuo_vision.schema import UserError
from tests.evaluation.helpers import run_python

NOTE = "Synthetic pictures: a demonstration, no medical result."


def row(i, name="b", **rest):
    return {
        "benchmark": name, "id": str(i), "question_type": "multiple-choice", "question": "?", "options": ["x", "y"],
        "answer": "A", "response": "A", "groups": {"subject": ("side", "size")[i % 2]}, "image_sha256": [], **rest,
    }  # fmt: skip


def made(n, right, name="b", **rest):
    """n rows of which the numbers in `right` are answered correctly."""
    return [(row(i, name, **rest), "correct" if i in right else "wrong") for i in range(n)]


def write(
    out, pairs, *, blind=False, weights="0123", model="runs/a", limit=None, protocol="default", scoring="generate",
    revision="1",
):  # fmt: skip
    """An evaluation folder as eval.py leaves it."""
    out.mkdir()
    protocol = PROTOCOLS[protocol]
    header = {
        "model": model, "weights": weights, "precision": "float32", "backend": "transformers", "blind": blind,
        "limit": limit, "scoring": scoring,
    }  # fmt: skip
    names = dict.fromkeys(answer["benchmark"] for answer, _ in pairs)
    benchmarks = [Benchmark(name, name, "all", 20, "subject", NOTE, lambda path: None) for name in names]
    facts = {one.name: BenchmarkFacts.of(one, revision, protocol) for one in benchmarks}
    answers = [answer for answer, _ in pairs]
    verdicts = [Verdict(answer["benchmark"], answer["id"], None, kind) for answer, kind in pairs]
    scores = summarise(header, protocol, answers, verdicts, facts)
    (out / "scores.json").write_text(json.dumps(scores))
    (out / "responses.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    (out / "verdicts.jsonl").write_text("".join(json.dumps(asdict(verdict)) + "\n" for verdict in verdicts))
    return out


def compare(a, b):
    return comparing.compare(comparing.read(a), comparing.read(b))


def text(comparison, width=160):
    console = Console(width=width, record=True, file=io.StringIO())
    show(comparison, console)
    return console.export_text()


def test_two_models_row_by_row(tmp_path):
    a = write(tmp_path / "a", made(20, range(15)) + made(20, range(5), "c"))
    b = write(tmp_path / "b", made(20, range(3, 12)) + made(20, range(5), "c"), weights="4567", model="runs/b")
    found = compare(a, b)
    assert (found["schema"], found["kind"], found["not_compared"]) == (1, "models", [])
    assert (found["a"]["model"], found["b"]["model"]) == ("runs/a", "runs/b")
    assert found["a"]["protocol"] == {"name": "default", "hash": PROTOCOLS["default"].hash}
    one = found["benchmarks"]["b"]
    assert one["a"] == {"accuracy": 0.75, "ci95": list(statistics.wilson(15, 20))}
    assert one["b"] == {"accuracy": 0.45, "ci95": list(statistics.wilson(9, 20))}
    assert (one["n"], one["difference"], one["discordant"]) == (20, 0.3, {"a_only": 6, "b_only": 0})
    assert one["p"] == pytest.approx(2 / 2**6)
    assert one["p_holm"] == pytest.approx(2 * 2 / 2**6)
    assert one["ci95"][0] < 0.3 < one["ci95"][1]
    assert one["ci_method"] == "paired bootstrap"
    assert one["smallest_detectable_difference"] == statistics.smallest_detectable_difference(20, 0.3)
    assert one["groups"]["subject"]["side"] == {"n": 10, "a": 0.8, "b": 0.4, "difference": 0.4}
    assert set(one["groups"]) == {"question_type", "subject"}
    same = found["benchmarks"]["c"]
    assert (same["difference"], same["p"], same["p_holm"]) == (0.0, 1.0, 1.0)
    assert same["smallest_detectable_difference"] is None
    pooled = found["pooled"]
    assert (pooled["n"], pooled["difference"], pooled["p"]) == (40, 0.15, one["p"])
    assert pooled["p_holm"] is None and "groups" not in pooled
    assert found["flips"][0] == {"benchmark": "b", "id": "0", "a": "correct", "b": "wrong"}
    assert [flip["id"] for flip in found["flips"]] == ["0", "1", "2", "12", "13", "14"]


def test_the_other_way_round_is_the_opposite(tmp_path):
    a, b = write(tmp_path / "a", made(20, range(15))), write(tmp_path / "b", made(20, range(10, 20)), weights="4567")
    there, back = compare(a, b)["benchmarks"]["b"], compare(b, a)["benchmarks"]["b"]
    assert back["difference"] == -there["difference"]
    assert back["discordant"] == {"a_only": 5, "b_only": 10}
    assert back["p"] == there["p"]


def test_the_order_of_the_rows_changes_nothing_but_the_list(tmp_path):
    pairs = made(20, range(15), image_sha256=["p"])
    a, b = write(tmp_path / "a", pairs), write(tmp_path / "b", made(20, range(4, 9)), weights="4567")
    backwards = write(tmp_path / "c", pairs[::-1])
    assert compare(a, b)["benchmarks"] == compare(backwards, b)["benchmarks"]


def test_rows_of_one_picture_are_one_cluster(tmp_path):
    def pairs(right):
        return [(row(i, image_sha256=[f"p{i // 5}"]), kind) for i, (_, kind) in enumerate(made(20, right))]

    a, b = write(tmp_path / "a", pairs(range(10))), write(tmp_path / "b", pairs(()), weights="4567")
    clustered = compare(a, b)["benchmarks"]["b"]
    assert clustered["ci_method"] == "paired bootstrap clustered by image"
    single = compare(
        write(tmp_path / "c", made(20, range(10))), write(tmp_path / "d", made(20, ()), weights="4567")
    )["benchmarks"]["b"]  # fmt: skip
    widths = [one["ci95"][1] - one["ci95"][0] for one in (clustered, single)]
    assert widths[0] > 1.5 * widths[1]
    # A blind row belongs to the pictures it was not shown.
    blind = write(tmp_path / "e", made(20, ()), blind=True)
    assert compare(a, blind)["benchmarks"]["b"]["ci95"] == clustered["ci95"]


def test_sighted_against_blind(tmp_path):
    sighted, blind = write(tmp_path / "s", made(20, range(19))), write(tmp_path / "b", made(20, range(8)), blind=True)
    found = compare(sighted, blind)
    assert found["kind"] == "blind"
    said = text(found)
    for word in ("b: with and without the picture", "subject", "side", "size", "95.0 %", "40.0 %", "+55.0", NOTE,
                 "76.4 to 99.1 %", "only sighted", "11 of 20 rows", "b 8: correct / wrong",
                 "and 1 more"):  # fmt: skip
        assert word in said
    assert "b 18:" not in said  # the eleventh
    side = next(line for line in said.splitlines() if "side" in line)
    assert [cell.strip() for cell in side.split("│")[1:-1]] == ["side", "10", "100.0 %", "40.0 %", "+60.0"]


def test_two_models_as_tables(tmp_path):
    a = write(tmp_path / "a", made(20, range(15)) + made(5, range(5), "omnimedvqa-bundle"), model="runs/[bold]a")
    b = write(tmp_path / "b", made(20, range(9)) + made(5, (), "omnimedvqa-bundle"), weights="4567", model="runs/b")
    said = text(compare(a, b))
    for word in ("a: runs/[bold]a", "b: runs/b", "a against b", "+30.0", "0.031", "p (Holm)",
                 "Not comparable: 5 rows answered, the benchmark has 20."):  # fmt: skip
        assert word in said
    totals = [line for line in said.splitlines() if "all rows" in line]
    differences, tests = ([cell.strip() for cell in line.split("│")[1:-1]] for line in totals)
    assert differences[:5] == ["all rows", "25", "80.0 %", "36.0 %", "+44.0"]
    assert tests == ["all rows", "11", "0", "< 0.001", "–", "37.2"]
    assert "125.3" not in said  # five rows show nothing
    assert "…" not in text(compare(a, b), width=80)


def test_required_accuracy_and_gain(tmp_path):
    sighted, blind = write(tmp_path / "s", made(20, range(19))), write(tmp_path / "b", made(20, range(8)), blind=True)
    found = compare(sighted, blind)
    assert shortfall(found, accuracy=0.95, gain=0.55) is None
    assert shortfall(found, accuracy=0.96, gain=0.1) == "b: accuracy 95.0 % is below the required 96.0 %."
    said = "b: the gain over blind, 55.0 points, is below the required 60.0."
    assert shortfall(found, accuracy=0.9, gain=0.6) == said
    other = write(tmp_path / "o", made(20, range(8)), weights="4567", model="runs/o")
    assert "the gain over runs/o, 55.0" in shortfall(compare(sighted, other), accuracy=0.9, gain=0.6)


def test_written_whole(tmp_path):
    a, b = write(tmp_path / "a", made(20, range(15))), write(tmp_path / "b", made(20, range(9)), weights="4567")
    found = compare(a, b)
    write_comparison(tmp_path / "new" / "out", found)
    assert json.loads((tmp_path / "new" / "out" / "comparison.json").read_text()) == found
    with pytest.raises(UserError, match="no folder can be made there"):
        write_comparison(a / "scores.json", found)


def test_rotated_and_ungraded_rows_are_left_out(tmp_path):
    turned = (row(0, id="0#r1", rotation=1, rotation_of="0", answer="B"), "wrong")
    hidden = (row(50, answer="?"), "ungraded")
    a = write(tmp_path / "a", [*made(20, range(15)), turned, hidden])
    b = write(tmp_path / "b", [*made(20, range(9)), hidden], weights="4567")
    assert compare(a, b)["benchmarks"]["b"]["n"] == 20
    only_hidden = [write(tmp_path / name, [hidden], weights=name) for name in ("c", "d")]
    with pytest.raises(UserError, match="no graded row in common"):
        compare(*only_hidden)


def test_a_limited_result_is_compared_on_the_rows_of_both(tmp_path):
    whole = write(tmp_path / "a", made(20, range(15)))
    limited = write(tmp_path / "b", made(8, range(4)), weights="4567", limit=8)
    one = compare(whole, limited)["benchmarks"]["b"]
    assert (one["n"], one["a"]["accuracy"], one["b"]["accuracy"]) == (8, 1.0, 0.5)
    assert one["why_not_comparable"] == "Not comparable: 8 rows answered under --limit 8, the benchmark has 20."


def test_other_rows_are_refused_with_the_counts(tmp_path):
    a, b = write(tmp_path / "a", made(20, ())), write(tmp_path / "b", made(19, ()), weights="4567")
    with pytest.raises(UserError, match=r"differ in the rows of b: 20 and 19, of which 19 are in both; evaluate both"):
        compare(a, b)
    strangers = write(tmp_path / "c", [(row(90), "wrong")], weights="4567", limit=1)
    with pytest.raises(UserError, match=r"20 and 1, of which 0 are in both"):
        compare(a, strangers)


def test_a_benchmark_of_one_only_is_said_and_none_in_common_refused(tmp_path):
    a = write(tmp_path / "a", made(20, range(15)) + made(5, (), "only"))
    b = write(tmp_path / "b", made(20, range(9)), weights="4567")
    found = compare(a, b)
    assert (list(found["benchmarks"]), found["not_compared"]) == (["b"], ["only"])
    assert "In one of the two only, or without answers: only." in text(found)
    other = write(tmp_path / "c", made(5, (), "c"), weights="4567")
    with pytest.raises(UserError, match="no benchmark in common: b, only there, c here"):
        compare(a, other)


def test_what_does_not_belong_together_is_refused(tmp_path):
    sighted, blind = write(tmp_path / "s", made(20, range(19))), write(tmp_path / "b", made(20, ()), blind=True)
    with pytest.raises(UserError, match="name the one with pictures first"):
        compare(blind, sighted)
    with pytest.raises(UserError, match=r"differ in weights \(0123 and 4567\) and in --blind at once"):
        compare(sighted, write(tmp_path / "other", made(20, ()), blind=True, weights="4567"))
    with pytest.raises(UserError, match=r"differ in protocol or data on b: default \(\w+\) and huatuo-2024 \(\w+\)"):
        compare(sighted, write(tmp_path / "protocol", made(20, ()), protocol="huatuo-2024"))
    with pytest.raises(UserError, match="differ in protocol or data on b"):
        compare(sighted, write(tmp_path / "revision", made(20, ()), revision="2"))
    with pytest.raises(UserError, match="differ in --scoring: generate and likelihood"):
        compare(sighted, write(tmp_path / "scoring", made(20, ()), scoring="likelihood"))
    with pytest.raises(UserError, match="differ in the gold answer of b row '0': 'A' and 'B'"):
        compare(sighted, write(tmp_path / "gold", made(20, (), answer="B")))
    with pytest.raises(UserError, match="differ in the options of b row '0'"):
        compare(sighted, write(tmp_path / "options", made(20, (), options=["y", "x"])))


def test_models_without_weights_are_told_apart_by_name(tmp_path):
    a = write(tmp_path / "a", made(20, range(9)), weights=None, model="served")
    blind = write(tmp_path / "b", made(20, ()), weights=None, model="served", blind=True)
    assert compare(a, blind)["kind"] == "blind"
    other = write(tmp_path / "c", made(20, ()), weights=None, model="another", blind=True)
    with pytest.raises(UserError, match=r"\(served and another\)"):
        compare(a, other)


@pytest.mark.parametrize("name", ["scores.json", "responses.jsonl", "verdicts.jsonl"])
def test_missing_files(tmp_path, name):
    a, b = write(tmp_path / "a", made(20, ())), write(tmp_path / "b", made(20, ()), weights="4567")
    (b / name).unlink()
    with pytest.raises(UserError, match=rf"b has no {name}; eval.py --out"):
        compare(a, b)


def test_broken_files(tmp_path):
    a, b = write(tmp_path / "a", made(20, ())), write(tmp_path / "b", made(20, ()), weights="4567")
    verdicts = (b / "verdicts.jsonl").read_text().splitlines(keepends=True)
    (b / "verdicts.jsonl").write_text("".join(verdicts[:18]))
    with pytest.raises(UserError, match="no verdict on 2 answers, first b row '18'; score"):
        compare(a, b)
    (b / "verdicts.jsonl").write_text(verdicts[0] + '{"benchmark": "b"}\n')
    with pytest.raises(UserError, match="verdicts.jsonl, line 2: no verdict"):
        compare(a, b)
    for broken in ("{", "[]", '{"schema": 1}'):
        (b / "scores.json").write_text(broken)
        with pytest.raises(UserError, match="scores.json is not the scores of an evaluation"):
            compare(a, b)


def test_line_separators_in_what_was_read_break_no_line(tmp_path):
    a, b = write(tmp_path / "a", made(20, ())), write(tmp_path / "b", made(20, ()), weights="4567")
    lines = [json.loads(line) | {"parsed": "3\u2028 4\x85"} for line in (b / "verdicts.jsonl").read_text().splitlines()]
    (b / "verdicts.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    assert compare(a, b)["benchmarks"]["b"]["n"] == 20


def test_the_module_is_light():
    code = "import sys, huatuo_vision.evaluation.compare; sys.exit('torch' in sys.modules)"
    assert run_python("-c", code).returncode == 0

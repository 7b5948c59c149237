"""What people read of a score, and the table of seeing against guessing."""

import io
import json
import re

import pytest
from rich.console import Console

from huatuo_vision.evaluation import report
from huatuo_vision.evaluation.benchmarks import Benchmark
from huatuo_vision.evaluation.protocols import DEFAULT
from huatuo_vision.evaluation.responses import Header
from huatuo_vision.evaluation.scorers import judge
from huatuo_vision.schema import UserError
from tests.evaluation.helpers import run_python

NOTE = "Synthetic pictures: a demonstration of the machinery, no medical result."


def write_result(out, right: int, *, blind=False, weights="0123", model="runs/a", expected=20):
    out.mkdir()
    benchmark = Benchmark("phantom", "1", "all", expected, NOTE, ())
    header = Header(model, weights, "float32", {"phantom": DEFAULT.hash_on(benchmark)}, blind=blind, limit=None)
    answers = [
        {
            "benchmark": "phantom", "id": str(i), "question_type": "multiple-choice", "question": "?",
            "options": ["x", "y"], "answer": "B", "response": "B" if i < right else "A",
            "groups": {"subject": ("side", "size")[i % 2]},
        }
        for i in range(20)
    ]  # fmt: skip
    verdicts = [judge(answer) for answer in answers]
    scores = report.summarise(header, DEFAULT, [benchmark], answers, verdicts)
    report.write_reports(out, scores, verdicts)
    return out


def compare(sighted, blind, *arguments: str):
    return run_python("-m", "huatuo_vision.evaluation.report", "--sighted", sighted, "--blind", blind, *arguments)


def test_scores_and_verdicts_as_written(tmp_path):
    out = write_result(tmp_path / "out", 15)
    scores = json.loads((out / "scores.json").read_text())
    entry = scores["benchmarks"]["phantom"]
    assert (scores["schema"], scores["model"], scores["blind"]) == (1, "runs/a", False)
    assert scores["protocol"] == {"name": "default", "hash": DEFAULT.hash}
    assert (entry["n"], entry["correct"], entry["accuracy"], entry["comparable"]) == (20, 15, 0.75, True)
    verdicts = [json.loads(line) for line in (out / "verdicts.jsonl").read_text().splitlines()]
    assert verdicts[0] == {"benchmark": "phantom", "id": "0", "parsed": "B", "verdict": "correct"}
    assert [v["verdict"] for v in verdicts].count("wrong") == 5


def test_reports_say_the_number_its_count_and_its_interval(tmp_path):
    out = write_result(tmp_path / "out", 15)
    for page in ((out / "report.md").read_text(), (out / "report.html").read_text()):
        for said in ("75.0 %", "53.1 to 88.8 %", "unparsed", NOTE, DEFAULT.hash):
            assert said in page
        assert "Not comparable" not in page


def test_a_number_over_other_rows_says_so_everywhere(tmp_path):
    out = write_result(tmp_path / "out", 15, expected=600)
    said = "Not comparable: 20 rows answered, the benchmark has 600."
    assert said in (out / "report.md").read_text()
    assert said in (out / "report.html").read_text()
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(report.score_table("phantom", report.read_scores(out)["benchmarks"]["phantom"], blind=False))
    assert said in console.export_text()


def test_the_page_escapes_and_loads_nothing(tmp_path):
    page = (write_result(tmp_path / "out", 1, model="<script>alert(1)</script>") / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert not re.search(r"""(src|href)=|url\(|@import|https?://""", page)


def test_sighted_against_blind(tmp_path):
    sighted, blind = write_result(tmp_path / "s", 19), write_result(tmp_path / "b", 8, blind=True)
    done = compare(sighted, blind, "--require-accuracy", "0.90", "--require-gain", "0.40")
    assert done.returncode == 0, done.stderr
    for said in ("side", "size", "95.0 %", "40.0 %", "+55.0", "76.4 to 99.1 %", NOTE):
        assert said in done.stdout
    missed = compare(sighted, blind, "--require-accuracy", "0.96")
    assert missed.returncode == 1
    assert "phantom: accuracy 95.0 % is below the required 96.0 %." in missed.stdout
    assert report.shortfall(sighted, blind, accuracy=0.95, gain=0.55) is None
    said = "phantom: the gain over blind, 55.0 points, is below the required 60.0."
    assert report.shortfall(sighted, blind, accuracy=0.9, gain=0.6) == said


def test_results_that_do_not_belong_together_are_refused(tmp_path):
    sighted, blind = write_result(tmp_path / "s", 19), write_result(tmp_path / "b", 8, blind=True)
    with pytest.raises(UserError, match="must hold a result with images"):
        report.compare_table(blind, sighted)
    with pytest.raises(UserError, match="differ in weights: 0123 and 4567"):
        report.compare_table(sighted, write_result(tmp_path / "other", 8, blind=True, weights="4567"))
    with pytest.raises(UserError, match="differ in benchmarks or protocol"):
        report.compare_table(sighted, write_result(tmp_path / "rows", 8, blind=True, expected=21))
    done = compare(sighted, tmp_path / "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and "scores.json" in done.stderr and "Traceback" not in done.stderr

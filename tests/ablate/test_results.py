"""The table's numbers, against numbers worked out by hand, and that every report says the same."""

from __future__ import annotations

import io
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from huatuo_vision.ablate import report, results
from huatuo_vision.evaluation import statistics
from huatuo_vision.schema import UserError
from tests.ablate.conftest import SET, plan_of, pretend_evaluated, pretend_trained

N = 40
# label -> seed -> which questions are right
RIGHT = {
    "tiny": {0: set(range(20)), 1: set(range(22))},
    "no alignment": {0: set(range(10)), 1: set(range(14))},
    "longer": {0: set(range(25)), 1: set(range(1, 25))},
}
PAPER = {
    "tiny": {"recipe": "tiny.yaml", "paper": {"slake": 50.0, "vqa-rad": 60.0}},
    "no alignment": "tiny-no-alignment.yaml",
    "longer": {"recipe": "tiny-longer.yaml", "paper": {"slake": 54.0, "vqa-rad": 61.0}},
}


def evaluated(folder: Path, **changed):
    plan = plan_of(folder, rows=PAPER, **changed)
    for run in plan.runs:
        pretend_trained(run)
        pretend_evaluated(plan, run, RIGHT[run.row.label][run.seed], N)
        if run.row is plan.loaded.base:
            pretend_evaluated(plan, run, set(range(10 + 2 * run.seed)), N, blind=True)
    return plan


@pytest.fixture
def summary(folder: Path) -> dict:
    return results.summarise(evaluated(folder))


def test_rates_and_differences_are_those_of_the_answers(summary):
    rows = summary["benchmarks"]["phantom"]["rows"]
    assert rows["tiny"]["seeds"] == [0.5, 0.55]
    assert rows["tiny"]["accuracy"] == pytest.approx(0.525)
    assert rows["tiny"]["versus_base"] is None
    versus = rows["no alignment"]["versus_base"]
    assert versus["seeds"] == pytest.approx([-0.25, -0.2])
    assert versus["difference"] == pytest.approx(-0.225)
    low, high = versus["ci95"]
    assert low < -0.225 < high < 0
    # t with one degree of freedom: 12.706 x sd / sqrt(2)
    reach = 12.7062 * np.std([-0.25, -0.2], ddof=1) / np.sqrt(2)
    assert versus["ci95_seeds"] == pytest.approx([-0.225 - reach, -0.225 + reach], abs=1e-4)
    assert rows["tiny"]["blind"] == {"accuracy": pytest.approx(11 / 40), "gain": pytest.approx(0.525 - 11 / 40)}
    assert rows["longer"]["blind"] is None


def test_names_of_others_are_text_in_every_report(summary, tmp_path):
    hostile = "</script><img src=x onerror=alert(1)>|$x_{$ [/red]"
    rows = summary["benchmarks"]["phantom"]["rows"]
    rows[hostile] = rows.pop("longer")
    summary |= {"title": hostile, "note": hostile}
    summary["benchmarks"]["phantom"] |= {"title": hostile, "note": hostile}
    report.write_reports(tmp_path, summary)
    for name in ("report.html", "report.md"):
        text = (tmp_path / name).read_text()
        assert "<img src=x" not in text and "&lt;img src=x" in text, name
    assert (tmp_path / "differences.png").stat().st_size > 10_000
    console = Console(record=True, width=200, file=io.StringIO())
    report.show(summary, tmp_path, console)
    assert "[/red]" in console.export_text()


def test_answers_of_the_seeds_to_one_question_count_together(summary):
    """Questions 14 to 19 are lost with both seeds (2 answers each), 10 to 13 and 20, 21 with one (1 each)."""
    versus = summary["benchmarks"]["phantom"]["rows"]["no alignment"]["versus_base"]
    lost = [2] * 6 + [1] * 6
    # All lost, none won: only the sign pattern with every sign equal is as extreme, on either side.
    assert versus["p"] == pytest.approx(2 * 0.5 ** len(lost), rel=1e-9)
    share = sum(d * d for d in lost) / (2 * N)
    expected = statistics.smallest_detectable_difference(2 * N, share)
    assert versus["smallest_detectable_difference"] == pytest.approx(expected)


def test_p_is_corrected_over_all_rows_and_benchmarks(summary):
    rows = summary["benchmarks"]["phantom"]["rows"]
    p = [rows[label]["versus_base"]["p"] for label in ("no alignment", "longer")]
    assert [rows[label]["versus_base"]["p_holm"] for label in ("no alignment", "longer")] == statistics.holm(p)
    assert max(p) < 1


def test_the_papers_column_is_a_mean_over_its_own_benchmarks(summary):
    assert summary["paper"]["benchmarks"] == ["slake", "vqa-rad"]
    assert summary["paper"]["rows"]["tiny"]["mean"] == 55.0
    assert summary["paper"]["rows"]["longer"]["difference"] == 2.5
    assert "no alignment" not in summary["paper"]["rows"]


def test_one_seed_gives_mcnemars_p_and_no_interval_over_seeds(folder):
    plan = evaluated(folder, seeds=[0])
    versus = results.summarise(plan)["benchmarks"]["phantom"]["rows"]["longer"]["versus_base"]
    assert versus["ci95_seeds"] is None
    assert versus["p"] == pytest.approx(statistics.mcnemar_p(5, 0))


def test_seeds_that_were_asked_other_questions_are_refused(folder):
    plan = evaluated(folder)
    for run in plan.runs:
        if run.seed == 1:
            pretend_evaluated(plan, run, {1}, N - 1)
    with pytest.raises(UserError, match="tiny: its seeds were not asked the same questions of phantom"):
        results.summarise(plan)


def by_enumeration(sums: list[int]) -> float:
    observed = abs(sum(sums))
    totals = [
        abs(sum(s * v for s, v in zip(signs, sums, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(sums))
    ]
    return float(np.mean([total >= observed for total in totals]))


def test_the_sign_flip_test_is_exact():
    generator = np.random.default_rng(0)
    for _ in range(30):
        cluster = generator.integers(0, 9, size=24)
        a, b = generator.integers(0, 2, size=(2, 24))
        sums = [int((a - b)[cluster == c].sum()) for c in np.unique(cluster)]
        assert statistics.sign_flip_p(a, b, cluster) == pytest.approx(by_enumeration([s for s in sums if s]))


@pytest.mark.parametrize(("a_only", "b_only"), [(0, 0), (5, 0), (7, 7), (30, 12), (400, 300), (500, 20)])
def test_the_sign_flip_test_of_single_rows_is_mcnemars(a_only, b_only):
    a = np.array([1] * a_only + [0] * b_only + [1, 0])
    b = np.array([0] * a_only + [1] * b_only + [1, 0])
    p = statistics.sign_flip_p(a, b, np.arange(len(a)))
    assert p == pytest.approx(statistics.mcnemar_p(a_only, b_only), rel=1e-6)
    share = statistics.paired_discordance(a, b, np.arange(len(a)))
    assert share == pytest.approx((a_only + b_only) / len(a))


def test_every_report_says_what_the_results_say(folder, tmp_path):
    plan = evaluated(folder)
    summary = results.summarise(plan)
    report.write_reports(plan.out, summary)
    assert json.loads((plan.out / "results.json").read_text()) == summary
    text = (plan.out / "report.md").read_text()
    unsure = "no alignment on phantom: −22.5 for these trainings, but −54.3 to +9.3 over seeds: another training may"
    unsure += " undo it."
    assert report.unsure_over_seeds(summary) == [unsure]  # "longer" is unsure over the questions already
    assert unsure in text
    row = next(line for line in text.splitlines() if line.startswith("| no alignment | 30.0 %"))
    assert "−22.5" in row and "−25.0, −20.0" in row
    assert "| tiny, blind | 27.5 % |" in text
    assert "Synthetic pictures." in text
    longer = next(line for line in text.splitlines() if line.startswith("| longer |") and "+" in line)
    assert longer.rstrip().endswith("| +2.5 |")
    table = [line for line in text.splitlines() if line.startswith("|")]
    widths = [line.count("|") for line in table[: len(table) - 8]]
    assert len(set(widths)) == 1, widths  # every row has every cell
    page = (plan.out / "report.html").read_text()
    assert "−22.5" in page and "data:image/png;base64," in page and "Synthetic pictures." in page
    assert (plan.out / report.PLOT_FILE).read_bytes().startswith(b"\x89PNG")
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    report.show(summary, plan.out, console)
    printed = console.export_text()
    assert re.search(r"no alignment +│ +30.0 % │", printed)
    assert "−22.5" in printed and "Synthetic pictures." in printed and "another training may undo it" in printed


def test_labels_are_text_and_never_markup(folder):
    rows = {"tiny": "tiny.yaml", "[b]<i>|x": "tiny-longer.yaml"}
    plan = plan_of(folder, rows=rows)
    for run in plan.runs:
        pretend_trained(run)
        pretend_evaluated(plan, run, {1, 2}, N)
        pretend_evaluated(plan, run, {1}, N, blind=True)
    summary = results.summarise(plan)
    report.write_reports(plan.out, summary)
    assert "<i>" not in (plan.out / "report.html").read_text()
    assert r"\[b\]&lt;i&gt;\|x" in (plan.out / "report.md").read_text()
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    report.show(summary, plan.out, console)
    assert "[b]<i>|x" in console.export_text()


def test_several_benchmarks_stand_beside_each_other_with_the_papers_numbers(folder):
    rows = {
        "tiny": {"recipe": "tiny.yaml", "paper": {"slake-en": 40.0, "phantom": 60.0}},
        "longer": {"recipe": "tiny-longer.yaml", "paper": {"slake-en": 50.0, "phantom": 55.0}},
    }
    plan = plan_of(folder, rows=rows, benchmarks=["phantom", "slake-en"], blind="none")
    for run in plan.runs:
        pretend_trained(run)
        pretend_evaluated(plan, run, RIGHT[run.row.label][run.seed], N)
    summary = results.summarise(plan)
    header, lines = report.overview(summary)
    assert header == ["row", "phantom, n = 40", "slake-en, n = 40", "mean"]
    assert lines[0] == ["tiny", "52.5 % (60.0)", "52.5 % (40.0)", "52.5 % (50.0)"]
    assert report.printed(summary, "slake-en", "longer").difference == 10.0
    assert report.printed(summary, "phantom", "longer").cell == "−5.0"
    assert report.printed(summary, "phantom", "tiny").cell == "60.0"
    tests = [entry["rows"]["longer"]["versus_base"] for entry in summary["benchmarks"].values()]
    assert [one["p_holm"] for one in tests] == pytest.approx([2 * one["p"] for one in tests])
    report.write_reports(plan.out, summary)
    text = (plan.out / "report.md").read_text()
    assert "| tiny | 52.5 % (60.0) | 52.5 % (40.0) | 52.5 % (50.0) |" in text
    assert "its number on the same benchmark" in text
    assert "52.5 % (40.0)" in (plan.out / "report.html").read_text()
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    report.show(summary, plan.out, console)
    assert "52.5 % (40.0)" in console.export_text()


def test_a_set_without_the_papers_numbers_has_no_column_for_them(folder):
    plan = plan_of(folder, rows=SET["rows"])
    for run in plan.runs:
        pretend_trained(run)
        pretend_evaluated(plan, run, RIGHT[run.row.label][run.seed], N)
        pretend_evaluated(plan, run, {1}, N, blind=True)
    summary = results.summarise(plan)
    assert summary["paper"] is None
    report.write_reports(plan.out, summary)
    assert "paper" not in (plan.out / "report.md").read_text().lower()

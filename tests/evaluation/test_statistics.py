"""Intervals, tests and calibration, held against what is known of them without running them."""

import numpy as np
import pytest

from huatuo_vision.evaluation import statistics


def row(*pictures: str, benchmark="b", **extra):
    return {"benchmark": benchmark, "image_sha256": list(pictures), **extra}


def same_cluster(rows) -> set[frozenset[int]]:
    numbers = statistics.clusters(rows)
    return {frozenset(np.flatnonzero(numbers == number).tolist()) for number in numbers}


def test_wilson_as_in_the_textbook():
    assert statistics.wilson(15, 20) == pytest.approx((0.5313, 0.8881), abs=1e-4)
    assert statistics.wilson(20, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)


def test_rows_are_joined_by_pictures_cases_and_chains_of_them():
    rows = [
        row("x"), row("y"), row("y", "z"), row("z"),  # y and z joined by the row that has both
        row(), row(),
        row("p", case="7"), row("q", case="7"), row("r", case="7", benchmark="other"), row(case="7"),
    ]  # fmt: skip
    assert same_cluster(rows) == {frozenset(c) for c in ({0}, {1, 2, 3}, {4}, {5}, {6, 7, 9}, {8})}
    assert statistics.clusters([]).shape == (0,)


def test_what_joins_rows_is_said():
    assert statistics.cluster_kind([row("x"), row("x")]) == "image"
    assert statistics.cluster_kind([row(case=1), row(case=1)]) == "case"
    assert statistics.cluster_kind([row("x"), row(case=1)]) == "image and case"


def test_a_rate_over_single_rows_has_wilsons_interval():
    bounds, clustered = statistics.rate_interval([True] * 15 + [False] * 5, range(20))
    assert (bounds, clustered) == (statistics.wilson(15, 20), False)


def test_copies_of_a_row_do_not_narrow_the_interval():
    """40 rows, each four times, on the same picture: as sure as 40 rows, not as 160."""
    correct, cluster = np.arange(40) < 24, np.arange(40)
    (low, high), clustered = statistics.rate_interval(np.repeat(correct, 4), np.repeat(cluster, 4))
    assert clustered
    assert (low, high) == pytest.approx(statistics.wilson(24, 40), abs=0.02)
    naive = statistics.wilson(96, 160)
    assert high - low > 1.8 * (naive[1] - naive[0])


def test_the_bootstrap_of_pairs_agrees_with_the_formula():
    """Clusters of two, half of them split: the standard error of a mean of 200 cluster rates."""
    generator = np.random.default_rng(5)
    correct = generator.random(400) < 0.5
    cluster = np.repeat(np.arange(200), 2)
    error = correct.reshape(200, 2).mean(axis=1).std() / np.sqrt(200)
    (low, high), _ = statistics.rate_interval(correct, cluster)
    assert (low, high) == pytest.approx((correct.mean() - 1.96 * error, correct.mean() + 1.96 * error), abs=0.006)


def test_a_perfect_score_is_not_certain():
    (low, high), _ = statistics.rate_interval([True] * 20, np.arange(20) // 2)
    assert (low, high) == pytest.approx(statistics.wilson(10, 10))
    (low, high), _ = statistics.rate_interval([True, False, False], [0, 0, 0])
    assert low < 1 / 3 < high
    assert statistics.macro_interval([True] * 20, np.arange(20) % 4, range(20))[0] < 0.9
    low, high = statistics.difference_interval([True] * 20, [True] * 20, range(20))
    assert (low, high) == pytest.approx((-statistics.wilson(0, 20)[1], statistics.wilson(0, 20)[1]))


def test_macro_resamples_within_each_value():
    """One row of a value stands in every resample: only the other value's rate varies."""
    correct, value = [True] * 20 + [False] * 10 + [False], [0] * 30 + [1]
    low, high = statistics.macro_interval(correct, value, range(31))
    first = statistics.wilson(20, 30)
    assert (low, high) == pytest.approx((first[0] / 2, first[1] / 2), abs=0.02)


def test_macro_agrees_with_the_formula():
    generator = np.random.default_rng(6)
    value = np.repeat([0, 1], [300, 40])
    correct = generator.random(340) < np.where(value == 0, 0.8, 0.4)
    rates = [correct[value == v].mean() for v in (0, 1)]
    error = 0.5 * np.sqrt(rates[0] * (1 - rates[0]) / 300 + rates[1] * (1 - rates[1]) / 40)
    centre = sum(rates) / 2
    bounds = statistics.macro_interval(correct, value, np.arange(340))
    assert bounds == pytest.approx((centre - 1.96 * error, centre + 1.96 * error), abs=0.008)


def test_a_picture_asked_in_several_values_stays_whole():
    """Four questions on each of 60 pictures, all right or all wrong: the values' errors do not cancel."""
    right = np.arange(60) < 30
    correct, cluster, value = np.repeat(right, 4), np.repeat(np.arange(60), 4), np.tile(np.arange(4), 60)
    low, high = statistics.macro_interval(correct, value, cluster)
    assert (low, high) == pytest.approx(statistics.wilson(30, 60), abs=0.02)
    apart = statistics.macro_interval(correct, value, np.arange(240))
    assert high - low > 1.8 * (apart[1] - apart[0])


def test_values_missing_from_a_resample_leave_the_others():
    correct, value, cluster = [1, 0, 1, 0, 1, 1], [0, 1, 0, 1, 0, 2], [0, 0, 1, 1, 2, 2]
    low, high = statistics.macro_interval(correct, value, cluster)
    assert 0 <= low <= high <= 1


def test_difference_is_paired():
    """Two models that fail on the same rows differ by exactly what they differ, however hard the rows."""
    b = np.arange(200) < 100
    a = b.copy()
    a[100:120] = True
    low, high = statistics.difference_interval(a, b, range(200))
    error = np.sqrt(0.1 * 0.9 / 200)
    assert (low, high) == pytest.approx((0.1 - 1.96 * error, 0.1 + 1.96 * error), abs=0.008)
    assert statistics.difference_interval(b, a, range(200)) == pytest.approx((-high, -low), abs=0.006)
    wide = statistics.difference_interval(np.repeat(a, 3), np.repeat(b, 3), np.repeat(np.arange(200), 3))
    assert wide == pytest.approx((low, high), abs=0.008)


def test_means_of_several_columns_in_one_go():
    generator = np.random.default_rng(7)
    values = generator.random((500, 2)) * (1.0, 0.1)
    intervals = statistics.mean_intervals(values, np.arange(500))
    for column, bounds in zip(values.T, intervals, strict=True):
        error = column.std() / np.sqrt(500)
        expected = (column.mean() - 1.96 * error, column.mean() + 1.96 * error)
        assert bounds == pytest.approx(expected, abs=0.15 * error)
    assert statistics.mean_intervals(values, np.arange(500)) == intervals


def test_resampling_in_blocks_changes_nothing(monkeypatch):
    values, cluster = np.random.default_rng(8).random((100, 2)), np.arange(100)
    whole = statistics.mean_intervals(values, cluster)
    monkeypatch.setattr(statistics, "_BLOCK", 1700)
    np.testing.assert_allclose(statistics.mean_intervals(values, cluster), whole, atol=1e-12)


def test_mcnemar_is_the_exact_binomial_test():
    assert statistics.mcnemar_p(1, 9) == pytest.approx(2 * 11 / 1024)
    assert statistics.mcnemar_p(9, 1) == statistics.mcnemar_p(1, 9)
    assert statistics.mcnemar_p(0, 0) == 1.0
    assert statistics.mcnemar_p(5, 5) == 1.0


def test_holm():
    assert statistics.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert statistics.holm([0.2]) == pytest.approx([0.2])
    assert statistics.holm([]) == []


@pytest.mark.parametrize(
    ("n", "points", "digits"),
    [(145, 10.4, 1), (251, 7.9, 1), (416, 6.1, 1), (2000, 2.8, 1), (3362, 2.2, 1), (11124, 1.2, 1), (17298, 0.95, 2)],
)
def test_smallest_detectable_difference_of_the_benchmarks(n, points, digits):
    assert round(100 * statistics.smallest_detectable_difference(n), digits) == points


def test_smallest_detectable_difference_where_nothing_can_be_said():
    assert statistics.smallest_detectable_difference(0) is None
    assert statistics.smallest_detectable_difference(100, discordant=0.0) is None
    assert statistics.smallest_detectable_difference(100, discordant=0.1) < 0.089


def test_calibration_by_hand():
    found = statistics.calibration([0.95, 0.95, 0.95, 0.95, 0.55, 0.55], [1, 1, 1, 0, 1, 0])
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["bins"] == [
        {"confidence": pytest.approx(0.55), "accuracy": 0.5, "n": 2},
        {"confidence": pytest.approx(0.95), "accuracy": 0.75, "n": 4},
    ]
    assert found["ece"] == pytest.approx((2 * 0.05 + 4 * 0.2) / 6)
    assert found["brier"] == pytest.approx((3 * 0.05**2 + 0.95**2 + 0.45**2 + 0.55**2) / 6)


@pytest.mark.parametrize("right", [0, 1])
def test_calibration_of_one_outcome_and_of_confidences_on_the_edges(right):
    confidence = np.linspace(0, 1, 11)
    found = statistics.calibration([*confidence, 1.0 + 1e-7], [right] * 12)
    assert sum(one["n"] for one in found["bins"]) == 12
    assert found["accuracy"] == right
    total = sum(one["n"] * one["confidence"] for one in found["bins"])
    assert total == pytest.approx(confidence.sum() + 1.0)

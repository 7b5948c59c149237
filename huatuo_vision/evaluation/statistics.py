"""Intervals, tests and calibration: what a difference between two numbers is worth. No torch here.

Rows that share a picture or a case rise and fall together. Every interval but Wilson's therefore resamples whole
clusters of rows (percentile bootstrap, 2,000 resamples, seed 0), so equal rows give equal numbers in any order.
All rates, differences and bounds are fractions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import binom, binomtest, norm, t
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

Bounds = tuple[float, float]
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

SEED = 0
RESAMPLES = 2000
BINS = 10
# Numbers of one block of resampling weights: 32 MB.
_BLOCK = 4_000_000
# Less than this between two resamples is rounding.
_SPREAD = 1e-9


def wilson(correct: int, n: int) -> Bounds:
    """The 95 % Wilson score interval of a rate over n >= 1 independent rows."""
    interval = binomtest(correct, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def clusters(rows: Sequence[Mapping[str, Any]]) -> Integers:
    """The cluster number of each row of a responses file, shape [rows].

    Rows are joined when they share a picture (`image_sha256`) or the same `case` of one benchmark, and so are rows
    that a chain of such pairs connects. A row with neither is a cluster of its own.
    """
    keys: dict[tuple[str, ...], int] = {}
    pairs = [(index, keys.setdefault(key, len(keys))) for index, row in enumerate(rows) for key in _keys(row)]
    joined = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return _components(joined[:, 0], joined[:, 1], len(rows), len(keys))[0]


def cluster_kind(rows: Sequence[Mapping[str, Any]]) -> str:
    """What joins these rows, in words: "image", "case", or "image and case"."""
    kinds = {key[0] for row in rows for key in _keys(row)}
    return " and ".join(kind for kind in ("image", "case") if kind in kinds)


def _keys(row: Mapping[str, Any]) -> list[tuple[str, ...]]:
    keys: list[tuple[str, ...]] = [("image", sha256) for sha256 in row["image_sha256"]]
    if row.get("case") is not None:
        keys.append(("case", row["benchmark"], str(row["case"])))
    return keys


def _components(left: Integers, right: Integers, lefts: int, rights: int) -> tuple[Integers, Integers]:
    """The connected components of a two-sided graph, by its edges: of each left node, and of each right one."""
    size = lefts + rights
    graph = coo_array((np.ones(len(left), dtype=np.int8), (left, lefts + right)), shape=(size, size))
    found = connected_components(graph, directed=False)[1].astype(np.int64)
    return found[:lefts], found[lefts:]


def rate_interval(correct: ArrayLike, cluster: ArrayLike) -> tuple[Bounds, bool]:
    """The 95 % interval of a rate, and whether it had to be clustered.

    Args:
        correct: truth values, shape [rows], at least one.
        cluster: the cluster number of each row, shape [rows].
    Returns:
        Wilson's interval where every row is a cluster of its own, else the clustered bootstrap's.
    """
    correct = np.asarray(correct, dtype=np.float64)
    sums = _cluster_sums(np.column_stack([correct, np.ones_like(correct)]), cluster)
    if len(sums) == len(correct):
        return wilson(int(correct.sum()), len(correct)), False
    total = _resampled(sums)
    return _around(correct.mean(), total[:, 0] / total[:, 1], len(sums)), True


def mean_intervals(values: ArrayLike, cluster: ArrayLike) -> list[Bounds]:
    """The 95 % intervals of the means of k columns with values of 0 to 1, shape [rows, k]."""
    values = np.asarray(values, dtype=np.float64)
    sums = _cluster_sums(np.column_stack([values, np.ones(len(values))]), cluster)
    total = _resampled(sums)
    means = total[:, :-1] / total[:, -1:]
    return [_around(values[:, k].mean(), means[:, k], len(sums)) for k in range(values.shape[1])]


def macro_interval(correct: ArrayLike, value: ArrayLike, cluster: ArrayLike) -> Bounds:
    """The 95 % interval of the macro mean: the unweighted mean of each group value's rate.

    Args:
        correct: truth values, shape [rows], at least one.
        value: the group value of each row, as numbers, shape [rows].
        cluster: the cluster number of each row, shape [rows].

    Resampled within each value. Values that share a cluster are resampled together, by whole clusters: one picture's
    questions stay together although they belong to several values.
    """
    correct = np.asarray(correct, dtype=np.float64)
    values, value = np.unique(value, return_inverse=True)
    names, cluster = np.unique(cluster, return_inverse=True)
    of_cluster, of_value = _components(cluster, value, len(names), len(values))
    rates = np.empty((RESAMPLES, len(values)))
    macro = np.mean([correct[value == index].mean() for index in range(len(values))])
    for number, stratum in enumerate(np.unique(of_value)):
        own = np.flatnonzero(of_value == stratum)
        rows = of_cluster[cluster] == stratum
        member = value[rows][:, None] == own
        sums = _cluster_sums(np.hstack([member * correct[rows][:, None], member]), cluster[rows])
        total = _resampled(sums, seed=SEED + number)
        with np.errstate(invalid="ignore"):  # a value without a row in this resample: 0 / 0, left out below
            rates[:, own] = total[:, : len(own)] / total[:, len(own) :]
    return _around(float(macro), np.nanmean(rates, axis=1), len(names))


def difference_interval(a: ArrayLike, b: ArrayLike, cluster: ArrayLike) -> Bounds:
    """The 95 % interval of rate(a) - rate(b) on the same rows: paired bootstrap over clusters.

    Args:
        a, b: truth values, shape [rows], at least one.
        cluster: the cluster number of each row, shape [rows].
    """
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    sums = _cluster_sums(np.column_stack([difference, np.ones_like(difference)]), cluster)
    total = _resampled(sums)
    low, high = np.quantile(total[:, 0] / total[:, 1], (0.025, 0.975))
    if high - low > _SPREAD:
        return float(low), float(high)
    # All clusters differ by the same amount, mostly by nothing, and resampling shows no spread. How many clusters of
    # another kind could have been missed bounds it.
    centre, missed = float(difference.mean()), wilson(0, len(sums))[1]
    return max(-1.0, centre - missed), min(1.0, centre + missed)


def _cluster_sums(values: Floats, cluster: ArrayLike) -> Floats:
    """Column sums by cluster, [rows, k] -> [clusters, k]."""
    names, index = np.unique(cluster, return_inverse=True)
    return np.column_stack([np.bincount(index, weights=column, minlength=len(names)) for column in values.T])


def _resampled(sums: Floats, seed: int = SEED) -> Floats:
    """Column sums over resamples of the clusters, [clusters, k] -> [RESAMPLES, k].

    Clusters with equal sums are interchangeable, so what is drawn is how often each kind of cluster occurs: few
    kinds, however many rows.
    """
    kinds, counts = np.unique(sums, axis=0, return_counts=True)
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK // len(kinds))
    sizes = [min(block, RESAMPLES - start) for start in range(0, RESAMPLES, block)]
    return np.vstack([generator.multinomial(len(sums), counts / len(sums), size=size) @ kinds for size in sizes])


def _around(rate: float, resampled: Floats, n_clusters: int) -> Bounds:
    """The percentile interval of a rate, or Wilson's over the clusters where resampling shows no spread.

    A perfect score would otherwise be certain: 20 of 20 is not "100 to 100 %".
    """
    low, high = np.quantile(resampled, (0.025, 0.975))
    if high - low <= _SPREAD:
        # Not scipy's, which takes whole numbers only.
        low, high = proportion_confint(rate * n_clusters, n_clusters, method="wilson")
    return float(low), float(high)


def mcnemar_p(a_only: int, b_only: int) -> float:
    """The exact two-sided p of a paired comparison: rows that only a, and that only b, has right."""
    return float(mcnemar([[0, a_only], [b_only, 0]], exact=True).pvalue)


def sign_flip_p(a: ArrayLike, b: ArrayLike, cluster: ArrayLike) -> float:
    """The exact two-sided p of a paired comparison whose rows come in clusters.

    Were there no difference, each cluster's (rows that a has right minus rows that b has right) would be as likely
    with the other sign. McNemar's exact test is the case in which no cluster differs by more than one row.

    Args:
        a, b: truth values, shape [rows].
        cluster: the cluster number of each row, shape [rows].
    """
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    sums = _cluster_sums(difference[:, None], cluster)[:, 0].astype(np.int64)
    pmf = np.ones(1)  # of the sum, from the smallest that can be to the largest
    for size, count in zip(*np.unique(np.abs(sums[sums != 0]), return_counts=True), strict=True):
        own = np.zeros(2 * size * count + 1)
        own[:: 2 * size] = binom.pmf(np.arange(count + 1), count, 0.5)
        pmf = np.convolve(pmf, own)  # not by FFT: its rounding would hide a small p
    beyond = pmf[: len(pmf) // 2 - abs(int(sums.sum())) + 1].sum()
    return float(np.clip(2 * beyond, 0.0, 1.0))


def paired_discordance(a: ArrayLike, b: ArrayLike, cluster: ArrayLike) -> float:
    """What `smallest_detectable_difference` takes as the discordant share, of rows in clusters.

    The sum over clusters of the squared difference, per row: where every row is a cluster of its own, the share of
    rows that just one of the two has right.
    """
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    return float((_cluster_sums(difference[:, None], cluster) ** 2).sum() / len(difference))


def seeds_interval(values: Sequence[float]) -> Bounds | None:
    """The 95 % t interval of a mean over independent trainings; None for a single one, whose spread is not known."""
    if len(values) < 2:
        return None
    centre = float(np.mean(values))
    reach = float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return centre - reach, centre + reach


def holm(p: Sequence[float]) -> list[float]:
    """The p values corrected for how many they are, in the same order."""
    return [float(value) for value in multipletests(p, method="holm")[1]] if p else []


def smallest_detectable_difference(
    n: int, discordant: float = 0.2, power: float = 0.8, alpha: float = 0.05
) -> float | None:
    """The smallest true difference of two rates that a paired test over n rows finds.

    Args:
        discordant: the share of rows that just one of the two has right.
        power: how often the test is to find it.
        alpha: its two-sided level.
    Returns:
        (z(1 - alpha/2) + z(power)) * sqrt(discordant / n); None where n or discordant is 0 and nothing can be said.
    """
    if n == 0 or discordant == 0:
        return None
    return float((norm.ppf(1 - alpha / 2) + norm.ppf(power)) * np.sqrt(discordant / n))


def calibration(confidence: ArrayLike, correct: ArrayLike) -> dict[str, Any]:
    """How far a model's confidence in its choices can be believed.

    Args:
        confidence: the probability of the chosen option, shape [rows], at least one.
        correct: whether it was the right one, shape [rows].
    Returns:
        accuracy; ece, the mean distance between confidence and accuracy over ten bins of equal width, weighted by
        their rows; brier, the mean squared distance of confidence from 1 (right) or 0 (wrong); and the bins that
        have rows: mean confidence, accuracy, n.
    """
    # Probabilities from half-precision sums may exceed 1 by a rounding.
    confidence = np.clip(np.asarray(confidence, dtype=np.float64), 0.0, 1.0)
    correct = np.asarray(correct, dtype=np.int64)
    accuracies, confidences = calibration_curve(correct, confidence, n_bins=BINS, strategy="uniform", pos_label=1)
    inner = np.linspace(0.0, 1.0, BINS + 1)[1:-1]
    counts = np.bincount(np.searchsorted(inner, confidence))  # as calibration_curve sorts them
    counts = counts[counts > 0]
    return {
        "accuracy": float(correct.mean()),
        "ece": float(np.average(np.abs(accuracies - confidences), weights=counts)),
        "brier": float(brier_score_loss(correct, confidence, pos_label=1)),
        "bins": [
            {"confidence": float(mean), "accuracy": float(accuracy), "n": int(n)}
            for mean, accuracy, n in zip(confidences, accuracies, counts, strict=True)
        ],
    }

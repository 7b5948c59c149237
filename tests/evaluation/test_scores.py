"""scores.json from answers and verdicts that are made up row by row, so that every number is known beforehand."""

import json
import random

import pytest

from huatuo_vision.evaluation import statistics
from huatuo_vision.evaluation.protocols import PROTOCOLS
from huatuo_vision.evaluation.rows import Benchmark
from huatuo_vision.evaluation.scorers import Verdict
from huatuo_vision.evaluation.scores import HEADER_KEYS, BenchmarkFacts, summarise
from huatuo_vision.schema import UserError
from tests.evaluation.helpers import run_python

PROTOCOL = PROTOCOLS["default"]
HEADER = {
    "model": "runs/a", "weights": "0123", "precision": "bf16", "backend": "transformers",
    "blind": False, "limit": None, "scoring": "generate",
}  # fmt: skip

# The bundle's rows by modality, and the paper's Table 3 as printed: scores, macro and micro mean over these rows.
MODALITIES = {
    "CT": 1991, "Fundus": 626, "MR": 4040, "OCT": 570,
    "Dermoscopy": 796, "Microscopy": 728, "X-Ray": 1019, "Ultrasound": 1354,
}  # fmt: skip
TABLE_3 = {
    "+ PubMedVision": ((61.6, 80.2, 65.1, 86.3, 71.6, 67.4, 81.4, 87.4), 75.1, 71.2),
    "LLaVA-v1.5-LLaMA3-8B": ((33.0, 49.7, 53.8, 76.0, 63.1, 48.4, 56.6, 31.2), 51.5, 48.8),
}


def answer(row_id, *, benchmark="b", options=("x", "y"), gold="A", pictures=(), **rest):
    kind = "open" if options is None else "multiple-choice"
    return {
        "benchmark": benchmark, "id": str(row_id), "question_type": kind, "question": "?",
        "options": options and list(options), "answer": gold, "response": "", "groups": {},
        "image_sha256": list(pictures), **rest,
    }  # fmt: skip


def verdict(row, kind="correct", parsed=None, **rest):
    return Verdict(benchmark=row["benchmark"], id=row["id"], parsed=parsed, verdict=kind, **rest)


def known(name="b", expected_n=4, macro_over="subject"):
    benchmark = Benchmark(name, name.upper(), "all", expected_n, macro_over, "A note.", lambda path: None)
    return BenchmarkFacts.of(benchmark, "rev1", PROTOCOL)


def score(pairs, facts=None, **header):
    rows, verdicts = zip(*pairs, strict=True) if pairs else ((), ())
    return summarise(HEADER | header, PROTOCOL, rows, verdicts, {"b": facts or known()})


def entry(pairs, facts=None, **header):
    return score(pairs, facts, **header)["benchmarks"]["b"]


def rows(*kinds, **rest):
    """One multiple-choice row for each verdict."""
    made = [answer(i, **rest) for i in range(len(kinds))]
    return [(row, verdict(row, kind)) for row, kind in zip(made, kinds, strict=True)]


def test_the_head_and_every_key():
    scores = score(rows("correct", "wrong", "unparsed", "ungraded"))
    assert scores["schema"] == 1
    assert {key: scores[key] for key in HEADER_KEYS} == HEADER
    assert scores["protocol"] == {"name": "default", "hash": PROTOCOL.hash, "note": PROTOCOL.note}
    one = scores["benchmarks"]["b"]
    assert set(one) == {
        "title", "note", "revision", "protocol_hash", "n", "expected_n", "correct", "unparsed", "ungraded", "accuracy",
        "ci95", "ci_method", "clusters", "micro", "macro", "macro_over", "macro_ci95", "comparable",
        "why_not_comparable", "expectation", "smallest_detectable_difference", "groups", "open", "baselines",
        "rotation", "controls", "calibration", "judge", "rubric", "concepts", "reasoning",
    }  # fmt: skip
    assert (one["n"], one["correct"], one["unparsed"], one["ungraded"]) == (3, 1, 1, 1)
    assert one["accuracy"] == one["micro"] == pytest.approx(1 / 3)
    assert (one["title"], one["note"], one["revision"]) == ("B", "A note.", "rev1")
    assert one["comparable"] and one["why_not_comparable"] is None
    assert (one["open"], one["rotation"], one["calibration"], one["judge"], one["expectation"]) == (None,) * 5
    assert one["smallest_detectable_difference"] == statistics.smallest_detectable_difference(3)
    assert json.loads(json.dumps(scores)) == scores


def test_the_protocol_hash_is_of_the_protocol_on_these_rows():
    benchmark = Benchmark("b", "B", "all", 4, "subject", "", lambda path: None)
    assert BenchmarkFacts.of(benchmark, "rev1", PROTOCOL).protocol_hash == PROTOCOL.hash_on(benchmark, "rev1")
    assert BenchmarkFacts.unknown("b", PROTOCOL).protocol_hash == PROTOCOL.hash


@pytest.mark.parametrize("model", TABLE_3)
def test_macro_and_micro_of_the_published_modality_scores(model):
    printed, macro, micro = TABLE_3[model]
    pairs = []
    for (modality, n), percent in zip(MODALITIES.items(), printed, strict=True):
        right = round(n * percent / 100)
        for i in range(n):
            row = answer(f"{modality}{i}", groups={"modality": modality})
            pairs.append((row, verdict(row, "correct" if i < right else "wrong")))
    one = entry(pairs, known(expected_n=11124, macro_over="modality"))
    assert (one["n"], one["comparable"]) == (11124, True)
    assert (round(100 * one["macro"], 1), round(100 * one["micro"], 1)) == (macro, micro)
    assert one["macro_ci95"][0] < one["macro"] < one["macro_ci95"][1]
    assert {value: tally["n"] for value, tally in one["groups"]["modality"].items()} == MODALITIES


def mixed_pairs():
    """Every kind of row at once, with fractions whose sums depend on their order."""
    generator = random.Random(3)
    pairs = []
    for i in range(60):
        groups = {"subject": "abc"[i % 3], "size": "xy"[i % 2]}
        rest = {"pictures": [f"p{i // 2}"], "groups": groups}
        if i % 4 == 0:
            row = answer(i, options=None, gold=["liver"], **rest)
            metrics = {name: generator.random() / 3 for name in ("exact_match", "token_recall", "token_f1", "bleu")}
            pairs.append((row, verdict(row, generator.choice(["correct", "wrong"]), "liver", metrics=metrics)))
            continue
        letter = generator.random()
        row = answer(i, gold="AB"[i % 2], likelihood={"letter": [letter, 1 - letter], "text": [0.3, 0.7]}, **rest)
        pairs.append((row, verdict(row, "unparsed", chance=1 / 3) if i % 7 == 0 else verdict(row, "correct", "A")))
        turned = answer(f"{i}#r1", options=("y", "x"), gold="BA"[i % 2], rotation=1, rotation_of=str(i), **rest)
        pairs.append((turned, verdict(turned, generator.choice(["correct", "wrong"]), "A")))
    return pairs


def test_the_order_of_the_file_changes_nothing():
    pairs = mixed_pairs()
    once = score(pairs)
    for seed in range(3):
        random.Random(seed).shuffle(pairs)
        assert json.dumps(score(pairs)) == json.dumps(once)


def test_a_row_answered_twice_is_refused():
    pairs = rows("correct", "wrong")
    with pytest.raises(UserError, match=r"^b row '1' is answered 2 times; keep one"):
        score([*pairs, pairs[1]])
    other = answer(1, benchmark="c")
    assert score([*pairs, (other, verdict(other))])["benchmarks"]["c"]["n"] == 1


@pytest.mark.parametrize(
    ("expected_n", "header", "said"),
    [
        (4, {}, None),
        (5, {}, "Not comparable: 4 rows answered, the benchmark has 5."),
        (3, {}, "Not comparable: 4 rows answered, the benchmark has 3."),
        (9, {"limit": 4}, "Not comparable: 4 rows answered under --limit 4, the benchmark has 9."),
        (4, {"limit": 9}, "Not comparable: 4 rows answered under --limit 9, the benchmark has 4."),
        (
            4,
            {"backend": None},
            "Not comparable: the answers come from a file that does not say how the model was asked.",
        ),
    ],
)
def test_what_may_be_compared(expected_n, header, said):
    one = entry(rows("correct", "wrong", "wrong", "ungraded"), known(expected_n=expected_n), **header)
    assert (one["comparable"], one["why_not_comparable"]) == (said is None, said)


def test_an_unknown_benchmark_is_scored_by_the_protocol_alone():
    pairs = rows("correct", "correct", "wrong", groups={"organ": "eye", "modality": "CT"})
    pairs[2][0]["groups"] = {"modality": "MR"}
    summary = summarise(HEADER, PROTOCOL, *zip(*pairs, strict=True), {})
    one = summary["benchmarks"]["b"]
    assert (one["n"], one["correct"], one["expected_n"], one["revision"]) == (3, 2, None, None)
    assert not one["comparable"]
    assert one["why_not_comparable"] == (
        "Not comparable: this package does not know b; it is scored by the protocol alone."
    )
    assert (one["macro_over"], one["macro"]) == ("modality", 0.5)


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ({"organ": "eye", "subject": "1", "modality": "CT"}, "subject"),
        ({"age": "old", "modality": "CT"}, "modality"),
        ({"organ": "eye", "age": "old"}, "age"),
        ({}, None),
    ],
)
def test_an_unknown_benchmark_is_averaged_over_the_group_it_suggests(groups, expected):
    pairs = rows("correct", "wrong", groups=groups)
    pairs[0][0]["groups"] = groups | {"aaa": "only this row"}
    one = summarise(HEADER, PROTOCOL, *zip(*pairs, strict=True), {})["benchmarks"]["b"]
    assert (one["macro_over"], one["macro"]) == (expected, expected and 0.5)


def test_a_benchmark_without_graded_rows_has_no_rates():
    one = entry(rows("ungraded", "ungraded"), known(expected_n=2))
    assert (one["n"], one["ungraded"], one["clusters"], one["comparable"]) == (0, 2, 0, True)
    for key in ("accuracy", "ci95", "ci_method", "macro", "macro_ci95", "expectation", "baselines"):
        assert one[key] is None
    assert one["smallest_detectable_difference"] is None and one["groups"] == {}
    said = "Not comparable: 0 rows answered, the benchmark has 2."
    assert entry([], known(expected_n=2))["why_not_comparable"] == said


def test_wilson_over_single_rows_and_the_bootstrap_over_pictures():
    kinds = ["correct"] * 12 + ["wrong"] * 8
    single = entry(rows(*kinds))
    assert (single["ci_method"], single["clusters"]) == ("wilson", 20)
    assert single["ci95"] == list(statistics.wilson(12, 20))
    pairs = rows(*kinds)
    for i, (row, _) in enumerate(pairs):
        row["image_sha256"] = [f"p{i // 4}"]
    shared = entry(pairs)
    assert (shared["ci_method"], shared["clusters"]) == ("bootstrap clustered by image", 5)
    assert shared["ci95"][1] - shared["ci95"][0] > 1.5 * (single["ci95"][1] - single["ci95"][0])
    for row, _ in pairs:
        row["image_sha256"], row["case"] = [], row["image_sha256"][0]
    assert entry(pairs) == shared | {"ci_method": "bootstrap clustered by case"}


def test_groups_have_their_own_counts_and_the_kind_of_question_is_always_one():
    pairs = rows("correct", "wrong", "unparsed", "ungraded", groups={"organ": "eye"})
    row = answer(9, options=None, gold=["4 cm"], groups={"organ": "lung"})
    groups = entry([*pairs, (row, verdict(row))])["groups"]
    assert list(groups) == ["question_type", "organ"]
    assert groups["organ"]["eye"] == {
        "n": 3, "correct": 1, "unparsed": 1, "accuracy": 1 / 3, "ci95": list(statistics.wilson(1, 3)),
    }  # fmt: skip
    assert groups["organ"]["lung"]["n"] == 1
    assert {kind: tally["n"] for kind, tally in groups["question_type"].items()} == {"multiple-choice": 3, "open": 1}


def test_the_expectation_of_random_draws():
    pairs = rows("correct", "wrong", "wrong")
    row = answer(9)
    assert entry([*pairs, (row, verdict(row, "unparsed", chance=0.25))])["expectation"] == pytest.approx(1.25 / 4)
    assert entry([*pairs, (row, verdict(row, "unparsed"))])["expectation"] is None


def test_open_metrics_are_means_over_the_open_rows():
    pairs = rows("correct")
    for i, value in enumerate((0.2, 0.4, 0.9)):
        row = answer(10 + i, options=None, gold=["liver"])
        metrics = {"exact_match": float(i == 2), "token_recall": value, "token_f1": value / 2, "bleu": 0.0}
        pairs.append((row, verdict(row, "wrong", "", metrics=metrics)))
    found = entry(pairs)["open"]
    assert found["n"] == 3
    means = {name: metric["mean"] for name, metric in found.items() if name != "n"}
    assert means == pytest.approx({"exact_match": 1 / 3, "token_recall": 0.5, "token_f1": 0.25, "bleu": 0.0})
    low, high = found["token_recall"]["ci95"]
    assert 0.2 <= low < 0.5 < high <= 0.9


def test_baselines_need_no_model():
    asked = [
        (("Yes", "No"), "A"), (("No", "Yes"), "B"), (("Yes", "No"), "B"),
        (("a", "bb", "bb "), "C"), (("same", "size"), "A"),
    ]  # fmt: skip
    made = [answer(i, options=options, gold=gold) for i, (options, gold) in enumerate(asked)]
    opened = answer(9, options=None, gold=["Yes"])
    hidden = answer(10, options=("Yes", "No"), gold="?")
    pairs = [(row, verdict(row, "wrong")) for row in (*made, opened)] + [(hidden, verdict(hidden, "ungraded"))]
    found = entry(pairs)["baselines"]
    assert found["majority"] == {"answer": "Yes", "accuracy": 2 / 5}
    assert found["constant_letter"] == {"A": 2 / 5, "B": 2 / 5, "C": 1 / 5}
    # Yes, Yes, (Yes), "bb ", and the first of two that are equally long.
    assert found["longest_option"] == 4 / 5
    assert entry(pairs[5:6])["baselines"] is None


def rotated(row_id, *choices):
    """A row with gold "x", asked in as many orders as letters are chosen."""
    orders = [("x", "y", "z"), ("y", "z", "x"), ("z", "x", "y")]
    for turn, (options, chosen) in enumerate(zip(orders, choices, strict=False)):
        gold = "ABC"[options.index("x")]
        name = row_id if turn == 0 else f"{row_id}#r{turn}"
        rest = {"rotation": turn, "rotation_of": row_id} if turn else {}
        row = answer(name, options=options, gold=gold, **rest)
        yield row, verdict(row, "unparsed" if chosen is None else "correct" if chosen == gold else "wrong", chosen)


def test_rotated_rows_feed_the_rotation_alone():
    pairs = [
        *rotated("always x", "A", "C", "B"),
        *rotated("always A", "A", "A", "A"),
        *rotated("always y", "B", "A", "C"),
        *rotated("unread once", "A", None, "B"),
        *rotated("never read", None, None, None),
        *rotated("never rotated", "A"),
    ]
    one = entry(pairs, known(expected_n=6))
    assert (one["n"], one["correct"], one["comparable"], one["clusters"]) == (6, 4, True, 6)
    found = one["rotation"]
    assert (found["rotations"], found["rows"]) == (3, 5)
    assert found["mean_accuracy"] == pytest.approx((1 + 1 / 3 + 0 + 2 / 3 + 0) / 5)
    assert found["ci95"][0] < found["mean_accuracy"] < found["ci95"][1]
    assert found["consistency"] == 2 / 5  # also where it is always wrong; not where a reply was not read
    # 11 replies read: A 6, B 3, C 2 chosen; gold A 4, C 3, B 4.
    assert found["letter_bias"] == pytest.approx({"A": 2 / 11, "B": -1 / 11, "C": -1 / 11})


def test_a_rotated_row_without_its_original_is_refused():
    with pytest.raises(UserError, match=r"b row 'r' is answered with rotated options only"):
        entry(list(rotated("r", "A", "A"))[1:])


def test_calibration_of_letters_and_of_texts():
    asked = [([0.9, 0.1], [0.2, 0.8], "A"), ([0.7, 0.3], [0.4, 0.6], "B")]
    made = [answer(i, gold=gold, likelihood={"letter": p, "text": q}) for i, (p, q, gold) in enumerate(asked)]
    without = answer(9)
    found = entry([(row, verdict(row)) for row in (*made, without)])["calibration"]
    assert (found["letter"]["accuracy"], found["text"]["accuracy"]) == (0.5, 0.5)
    assert found["letter"]["brier"] == pytest.approx((0.1**2 + 0.7**2) / 2)
    assert found["letter"]["ece"] == pytest.approx((0.1 + 0.7) / 2)
    assert found["text"]["brier"] == pytest.approx((0.8**2 + 0.4**2) / 2)


@pytest.mark.parametrize(
    "likelihood",
    [
        {"letter": [0.5, 0.5]},
        {"letter": [0.5, 0.5], "text": [0.5, 0.3, 0.2]},
        {"letter": [0.5, float("nan")], "text": [0.5, 0.5]},
        {"letter": [-1.2, -0.4], "text": [0.5, 0.5]},
        {"letter": "0.5", "text": [0.5, 0.5]},
        [0.5, 0.5],
    ],
)
def test_a_likelihood_that_is_none_is_refused(likelihood):
    with pytest.raises(UserError, match="b row '0': likelihood is .*expected letter and text.*of its 2 options"):
        entry(rows("correct", likelihood=likelihood))


def test_a_rotation_of_nothing_is_refused():
    with pytest.raises(UserError, match="b row '0' has a rotation but no options or no rotation_of"):
        entry(rows("correct", rotation=1))
    with pytest.raises(UserError, match="b row '0' has a rotation but no options or no rotation_of"):
        entry(rows("correct", rotation=1, rotation_of="x", options=None))


def test_the_module_is_light():
    """Existing answers are scored without torch."""
    code = "import sys, huatuo_vision.evaluation.scores; sys.exit('torch' in sys.modules)"
    assert run_python("-c", code).returncode == 0

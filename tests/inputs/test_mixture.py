import numpy as np
import pytest

from huatuo_vision.inputs.mixture import over_limits, select_rows
from huatuo_vision.recipe import MixtureEntry, PhaseSpec
from huatuo_vision.schema import UserError


def entries(**data: dict) -> tuple[MixtureEntry, ...]:
    return tuple(MixtureEntry(source=name, **share) for name, share in data.items())


def counts(selected: list[tuple[str, np.ndarray]]) -> dict[str, int]:
    return {name: len(positions) for name, positions in selected}


def test_neither_rows_nor_weight_is_all_in_order():
    ((name, positions),) = select_rows(entries(a={}), {"a": 7}, seed=3)
    assert name == "a"
    assert positions.tolist() == list(range(7))


def test_rows_are_exactly_that_many_and_distinct():
    selected = dict(select_rows(entries(a={"rows": 40}, b={}, c={"rows": 100}), {"a": 100, "b": 5, "c": 100}, seed=0))
    assert counts(list(selected.items())) == {"a": 40, "b": 5, "c": 100}
    for name, available in {"a": 100, "b": 5, "c": 100}.items():
        assert len(np.unique(selected[name])) == len(selected[name])
        assert selected[name].min() >= 0
        assert selected[name].max() < available


def test_a_larger_number_of_rows_extends_a_smaller_one():
    few = dict(select_rows(entries(a={"rows": 30}), {"a": 1000}, seed=0))["a"]
    many = dict(select_rows(entries(a={"rows": 300}), {"a": 1000}, seed=0))["a"]
    assert many[:30].tolist() == few.tolist()


def test_same_seed_same_rows_whatever_the_other_sources():
    alone = dict(select_rows(entries(a={"rows": 30}), {"a": 1000}, seed=5))["a"]
    among = dict(select_rows(entries(b={"rows": 9}, a={"rows": 30}), {"a": 1000, "b": 1000}, seed=5))
    assert among["a"].tolist() == alone.tolist()
    assert among["a"][:9].tolist() != among["b"].tolist()  # sources are not drawn by one common order


def test_another_seed_draws_other_rows():
    draws = [dict(select_rows(entries(a={"rows": 30}), {"a": 1000}, seed=seed))["a"].tolist() for seed in (0, 1)]
    assert draws[0] != draws[1]


def test_the_draw_is_pinned():
    # Whoever repeats a published run must get its rows: a change here changes every recipe that says `rows`.
    ((_, positions),) = select_rows(entries(pubmedvision={"rows": 5}), {"pubmedvision": 100}, seed=0)
    assert positions.tolist() == [61, 79, 38, 71, 51]


@pytest.mark.parametrize(
    ("weights", "available", "expected"),
    [
        ({"a": 1, "b": 1}, {"a": 10, "b": 30}, {"a": 10, "b": 10}),
        ({"a": 0.7, "b": 0.3}, {"a": 70, "b": 30}, {"a": 70, "b": 30}),  # 0.7 + 0.3 < 1 in binary
        ({"a": 0.1, "b": 0.2, "c": 0.7}, {"a": 100, "b": 200, "c": 700}, {"a": 100, "b": 200, "c": 700}),
        ({"a": 3, "b": 1}, {"a": 100, "b": 100}, {"a": 100, "b": 33}),  # total 133: 99.75 and 33.25
        ({"a": 1, "b": 1, "c": 1}, {"a": 7, "b": 9, "c": 9}, {"a": 7, "b": 7, "c": 7}),
        ({"a": 2.5}, {"a": 11}, {"a": 11}),
    ],
)
def test_weights_give_the_largest_epoch_without_repeats(weights, available, expected):
    data = entries(**{name: {"weight": weight} for name, weight in weights.items()})
    selected = select_rows(data, available, seed=0)
    assert counts(selected) == expected
    for _, positions in selected:
        assert len(np.unique(positions)) == len(positions)


def test_weighted_counts_are_within_one_of_their_share_and_use_up_a_source():
    random = np.random.default_rng(0)
    for _ in range(200):
        weights = dict(zip("abcd", random.uniform(0.01, 5, 4).round(3).tolist(), strict=True))
        available = dict(zip("abcd", random.integers(500, 5_000, 4).tolist(), strict=True))
        got = counts(select_rows(entries(**{n: {"weight": w} for n, w in weights.items()}), available, seed=0))
        total = sum(got.values())
        for name, count in got.items():
            assert count <= available[name]
            assert abs(count - total * weights[name] / sum(weights.values())) < 1
        # One sample more would need a row that is not there.
        assert any((total + 1) * weights[name] / sum(weights.values()) > available[name] for name in weights)


def test_too_few_rows_says_both_numbers_and_what_to_do():
    with pytest.raises(UserError, match=r"'a': rows asks for 60,000 samples but 512 are available; lower rows to 512"):
        select_rows(entries(a={"rows": 60_000}), {"a": 512}, seed=0)


def test_a_weight_too_small_for_one_sample_is_refused():
    with pytest.raises(UserError, match=r"'b': weight 0.0001 gives it no sample in an epoch of 10"):
        select_rows(entries(a={"weight": 1}, b={"weight": 0.0001}), {"a": 10, "b": 10}, seed=0)


def test_an_empty_source_is_refused():
    with pytest.raises(UserError, match="'b' has no samples"):
        select_rows(entries(a={"weight": 1}, b={"weight": 1}), {"a": 10, "b": 0}, seed=0)


def test_limits_give_each_sample_one_reason():
    train = {"projector": {"lr": 1e-3}}
    phase = PhaseSpec(data=entries(a={}), train=train, global_batch_size=1, max_sample_tokens=10, max_row_images=2)
    refused = over_limits(np.array([10, 11, 10, 11]), np.array([2, 2, 3, 3]), phase)
    assert {reason: rows.tolist() for reason, rows in refused.items()} == {
        "overlong": [False, True, False, True],
        "too_many_images": [False, False, True, False],
    }

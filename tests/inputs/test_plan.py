"""The step plan keeps the experiment: the same samples in the same step, whatever the machine."""

import time
import tracemalloc

import numpy as np
import pytest

from huatuo_vision.inputs.plan import StepPlan, plan_steps
from huatuo_vision.schema import UserError


def lengths(n: int, seed: int = 0, max_images: int = 6) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, max_images + 1, n).astype(np.int16)
    text = rng.integers(20, 300, n).astype(np.int32)
    tokens = (images * 64 + text).astype(np.int32)
    return {"tokens": tokens, "images": images, "targets": text // 2, "cost": tokens + tokens.astype(float) ** 2 / 1000}


def plan(n: int = 2000, data: dict | None = None, **changes) -> StepPlan:
    settings = {"global_batch_size": 32, "world_size": 1, "epochs": 2, "max_row_tokens": 2048, "max_row_images": 12}
    return plan_steps(**(data or lengths(n)), seed=0, **settings | changes)


def samples_per_step(p: StepPlan) -> np.ndarray:
    return np.sort(p.order.reshape(p.steps, p.global_batch_size), axis=1)


def per_row(values: np.ndarray, p: StepPlan) -> np.ndarray:
    return np.add.reduceat(values[p.order], p.row_starts[:-1])


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_step_has_the_same_samples_for_any_number_of_processes(world_size):
    one, many = plan(), plan(world_size=world_size)
    assert np.array_equal(samples_per_step(one), samples_per_step(many))
    assert np.array_equal(one.step_targets, many.step_targets)
    assert many.rows == many.steps * world_size * many.accumulation


def test_no_row_is_empty_or_over_budget():
    data = lengths(2000)
    for world_size in (1, 4, 8):
        p = plan(data=data, world_size=world_size)
        assert np.diff(p.row_starts).min() >= 1
        assert per_row(data["tokens"], p).max() <= 2048
        assert per_row(data["images"].astype(int), p).max() <= 12


def test_an_epoch_uses_every_sample_once_but_for_the_counted_rest():
    p = plan(n=1003, epochs=3)
    per_epoch = p.order.reshape(3, -1)
    assert p.dropped_per_epoch == 1003 % 32
    for epoch in per_epoch:
        assert len(set(epoch.tolist())) == 1003 - p.dropped_per_epoch
    assert not np.array_equal(per_epoch[0], per_epoch[1])


def test_step_targets_are_the_supervised_tokens_of_the_step():
    data = lengths(500)
    p = plan(data=data)
    assert p.step_targets.tolist() == [int(data["targets"][p.step(s)].sum()) for s in range(p.steps)]


def test_rows_of_a_step_are_alike_and_ordered_by_cost():
    data = lengths(20_000)
    p = plan(data=data, global_batch_size=128, world_size=8, epochs=1, max_row_tokens=8192, max_row_images=64)
    cost = per_row(data["cost"], p).reshape(p.steps, p.accumulation, 8)
    assert (np.diff(cost.reshape(p.steps, -1), axis=1) <= 0).all()
    assert cost.max(axis=2).sum() / cost.mean(axis=2).sum() - 1 < 0.02


def test_accumulation_is_the_smallest_that_fits():
    data = {"tokens": np.full(64, 500), "images": np.zeros(64, int), "targets": np.ones(64, int), "cost": np.ones(64)}
    # 32 samples of 500 tokens, 2 to a row of 1000: 16 rows.
    assert plan(data=data, max_row_tokens=1000).accumulation == 16
    assert plan(data=data, max_row_tokens=1000, world_size=4).accumulation == 4
    assert plan(data=data, max_row_tokens=999).accumulation == 32


def test_packs_what_longest_first_by_cost_can_not():
    # Costs hide the lengths: by cost alone the two halves of a row would not meet.
    data = {
        "tokens": np.array([60, 40, 60, 40]),
        "images": np.zeros(4, int),
        "targets": np.ones(4, int),
        "cost": np.array([1.0, 4.0, 1.0, 4.0]) + np.array([0.0, 0.0, 5.0, 0.0]),
    }
    p = plan(data=data, global_batch_size=4, epochs=1, max_row_tokens=100)
    assert p.accumulation == 2
    assert per_row(data["tokens"], p).tolist() == [100, 100]


def test_refusals_name_the_setting():
    with pytest.raises(UserError, match="fewer than one step of global_batch_size 32"):
        plan(n=31)
    with pytest.raises(UserError, match="more rows than samples.*raise global_batch_size or max_row_tokens"):
        plan(world_size=33)


def test_another_seed_is_another_order():
    settings = {"global_batch_size": 32, "world_size": 1, "epochs": 1, "max_row_tokens": 2048, "max_row_images": 12}
    a, b = (plan_steps(**lengths(500), seed=seed, **settings) for seed in (0, 1))
    assert not np.array_equal(samples_per_step(a), samples_per_step(b))


def test_a_million_samples_plan_in_seconds_and_flat_memory():
    data = lengths(1_300_000)
    tracemalloc.start()
    started = time.process_time()
    p = plan(data=data, global_batch_size=128, world_size=8, epochs=1, max_row_tokens=8192, max_row_images=24)
    seconds, peak = time.process_time() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert p.steps == 1_300_000 // 128
    assert seconds < 60
    assert peak < 500 * 2**20

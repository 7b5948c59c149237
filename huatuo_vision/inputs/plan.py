"""The step plan: which samples share an optimizer step, and which of them share a row.

Packing that fills rows to a fixed length lets the number of samples per optimizer step drift, and the
result is no longer the recipe's. Here a whole optimizer step is planned at once: exactly
`global_batch_size` samples, the same ones for any number of processes, spread over
`world_size x accumulation` rows of near-equal cost that never exceed the token and image budgets.

    step 0                                            step 1
    |- row 0: sample 17 | sample 4 | sample 90        |- ...
    |- row 1: sample 33 | sample 8
    `- row 2: ...

The plan is a pure function of its arguments: there is no state to save, and a run can be resumed on
another number of processes. Everything is a flat NumPy array, so 1.3 million samples stay small.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from huatuo_vision.schema import UserError

# Steps planned together; bounds the working memory at a few MB whatever the size of the data.
_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Rows of all optimizer steps. Rank r of W runs rows r, r+W, ... of each step, in this order."""

    order: np.ndarray  # (steps * global_batch_size,) int32: pool positions, row after row, step after step
    row_starts: np.ndarray  # (rows + 1,) int64: row i holds order[row_starts[i]:row_starts[i + 1]]
    step_targets: np.ndarray  # (steps,) int64: supervised tokens of each step, over all rows and ranks
    global_batch_size: int
    world_size: int
    accumulation: int
    dropped_per_epoch: int  # samples of the incomplete last step of an epoch

    @property
    def steps(self) -> int:
        return len(self.step_targets)

    @property
    def rows_per_step(self) -> int:
        return self.world_size * self.accumulation

    @property
    def rows(self) -> int:
        return len(self.row_starts) - 1

    def row(self, index: int) -> np.ndarray:
        """Pool positions of one row's samples."""
        return self.order[self.row_starts[index] : self.row_starts[index + 1]]

    def step(self, index: int) -> np.ndarray:
        """Pool positions of one optimizer step's samples."""
        return self.order[index * self.global_batch_size : (index + 1) * self.global_batch_size]


def plan_steps(
    tokens: np.ndarray,
    images: np.ndarray,
    targets: np.ndarray,
    cost: np.ndarray,
    *,
    global_batch_size: int,
    world_size: int,
    epochs: int,
    max_row_tokens: int,
    max_row_images: int,
    seed: int,
) -> StepPlan:
    """Plan every optimizer step of a phase.

    tokens, images, targets, cost: (n,) of one epoch's samples: length, number of images, supervised
    tokens, and cost (any unit; FLOPs) by which rows are balanced. No sample may exceed the budgets.
    Accumulation is the smallest number, constant over the phase, with which every step fits.
    Raises UserError where there are fewer samples than one step, or more rows than samples in a step.
    """
    n = len(tokens)
    steps_per_epoch, dropped = divmod(n, global_batch_size)
    if steps_per_epoch == 0:
        raise UserError(f"{n} samples are fewer than one step of global_batch_size {global_batch_size}; lower it")
    assert tokens.max() <= max_row_tokens and images.max() <= max_row_images, "a sample exceeds the row budget"

    steps = np.concatenate([_epoch_order(n, seed, epoch)[: n - dropped] for epoch in range(epochs)])
    steps = steps.reshape(-1, global_batch_size)
    accumulation = _smallest_accumulation(steps, tokens, images, cost, world_size, max_row_tokens, max_row_images)

    rows = world_size * accumulation
    order = np.empty(steps.shape, dtype=np.int32)
    row_lengths = np.empty((len(steps), rows), dtype=np.int32)
    for start in range(0, len(steps), _BLOCK):
        block = slice(start, start + _BLOCK)
        assigned = _assign(steps[block], rows, tokens, images, cost, max_row_tokens, max_row_images)
        order[block], row_lengths[block] = _lay_out(steps[block], assigned, cost[steps[block]], rows)
    return StepPlan(
        order=order.ravel(),
        row_starts=np.concatenate([[0], np.cumsum(row_lengths.ravel(), dtype=np.int64)]),
        step_targets=targets[steps].sum(axis=1, dtype=np.int64),
        global_batch_size=global_batch_size,
        world_size=world_size,
        accumulation=accumulation,
        dropped_per_epoch=dropped,
    )


def _epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n).astype(np.int32)


def _smallest_accumulation(
    steps: np.ndarray,
    tokens: np.ndarray,
    images: np.ndarray,
    cost: np.ndarray,
    world_size: int,
    max_tokens: int,
    max_images: int,
) -> int:
    global_batch_size = steps.shape[1]
    need_tokens = max(1, int(-(-tokens[steps].sum(axis=1, dtype=np.int64).max() // max_tokens)))
    need_images = max(1, int(-(-images[steps].sum(axis=1, dtype=np.int64).max() // max_images)))
    accumulation = -(-max(need_tokens, need_images) // world_size)
    pending = steps  # steps not yet seen to fit
    while True:
        rows = world_size * accumulation
        if rows > global_batch_size:
            raise UserError(
                f"one step of global_batch_size {global_batch_size} needs {rows} rows ({world_size} processes x "
                f"{accumulation}), more rows than samples; raise global_batch_size or max_row_tokens ({max_tokens}) or "
                f"max_row_images ({max_images}), or use fewer processes"
            )
        failed = []
        for start in range(0, len(pending), _BLOCK):
            block = pending[start : start + _BLOCK]
            assigned = _assign(block, rows, tokens, images, cost, max_tokens, max_images)
            failed.append(block[(assigned < 0).any(axis=1)])
        checked, pending = len(pending), np.concatenate(failed)
        if len(pending):
            accumulation += 1
        elif checked == len(steps):
            return accumulation
        else:
            pending = steps  # those that fitted in fewer rows are laid out anew in more, so all are checked once more


def _assign(
    steps: np.ndarray,
    rows: int,
    tokens: np.ndarray,
    images: np.ndarray,
    cost: np.ndarray,
    max_tokens: int,
    max_images: int,
) -> np.ndarray:
    """(n_steps, G) row of each sample, -1 throughout a step that does not fit.

    Longest processing time first, over all steps at once: the k-th most costly sample of every step goes
    to that step's cheapest row with room. Where that order wastes room, first fit by decreasing length.
    """
    n_steps, size = steps.shape
    by_cost = np.argsort(-cost[steps], axis=1, kind="stable")
    load = np.zeros((n_steps, rows))
    used_tokens = np.zeros((n_steps, rows), dtype=np.int64)
    used_images = np.zeros((n_steps, rows), dtype=np.int64)
    assigned = np.empty((n_steps, size), dtype=np.int32)
    each = np.arange(n_steps)
    fits = np.ones(n_steps, dtype=bool)
    for k in range(size):
        slot = by_cost[:, k]
        sample = steps[each, slot]
        has_room = (used_tokens + tokens[sample, None] <= max_tokens) & (
            used_images + images[sample, None] <= max_images
        )
        row = np.where(has_room, load, np.inf).argmin(axis=1)
        fits &= has_room[each, row]
        load[each, row] += cost[sample]
        used_tokens[each, row] += tokens[sample]
        used_images[each, row] += images[sample]
        assigned[each, slot] = row
    for step in np.flatnonzero(~fits):
        assigned[step] = _first_fit(tokens[steps[step]], images[steps[step]], rows, max_tokens, max_images)
    return assigned


def _first_fit(tokens: np.ndarray, images: np.ndarray, rows: int, max_tokens: int, max_images: int) -> np.ndarray:
    """(G,) row of each sample of one step by first fit decreasing, -1 throughout if it does not fit."""
    # A sample's size is its larger share of the two budgets.
    size = np.maximum(tokens / max_tokens, images / max_images)
    free_tokens, free_images = np.full(rows, max_tokens), np.full(rows, max_images)
    assigned = np.full(len(tokens), -1, dtype=np.int32)
    for slot in np.argsort(-size, kind="stable"):
        room = np.flatnonzero((free_tokens >= tokens[slot]) & (free_images >= images[slot]))
        if len(room) == 0:
            return np.full_like(assigned, -1)
        row = room[0]
        free_tokens[row] -= tokens[slot]
        free_images[row] -= images[slot]
        assigned[slot] = row
    # Every row must hold a sample (a rank without a row would wait for ever): empty rows take one from the fullest.
    for row in np.setdiff1d(np.arange(rows), assigned):
        fullest = np.bincount(assigned, minlength=rows).argmax()
        assigned[np.flatnonzero(assigned == fullest)[-1]] = row
    return assigned


def _lay_out(steps: np.ndarray, assigned: np.ndarray, cost: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(n, G) samples in row order and (n, rows) samples per row, the step's most costly row first, so that the
    rows that run at the same time on different processes are alike."""
    n_steps = len(steps)
    flat = assigned + rows * np.arange(n_steps)[:, None]
    row_cost = np.bincount(flat.ravel(), weights=cost.ravel(), minlength=n_steps * rows).reshape(n_steps, rows)
    rank = np.empty_like(assigned, shape=(n_steps, rows))
    np.put_along_axis(
        rank, np.argsort(-row_cost, axis=1, kind="stable"), np.arange(rows, dtype=rank.dtype)[None], axis=1
    )
    position = np.take_along_axis(rank, assigned, axis=1)
    order = np.argsort(position, axis=1, kind="stable")
    lengths = np.bincount((position + rows * np.arange(n_steps)[:, None]).ravel(), minlength=n_steps * rows)
    return np.take_along_axis(steps, order, axis=1), lengths.reshape(n_steps, rows)

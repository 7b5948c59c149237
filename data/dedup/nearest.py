"""Which rows repeat one before them, by their pictures or by their captions' vectors. Plain arrays, no files.

Rows come in the order of preference, so of any that are the same the first stays. Nothing depends on chance: the
clusters are seeded, and every comparison is exact within its cluster.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import faiss
import numpy as np

# Up to so many pictures, every hash is compared with every other; beyond, within the lists of an inverted file.
EXACT_HASHES = 100_000
_PROBED_LISTS = 32
_BLOCK = 4096
# Rows a cluster, on average; within a cluster every caption is compared with every other.
CLUSTER_ROWS = 1000
_TRAINING_ROWS = 64  # a centroid, all in memory at once
_SEED = 0

# A row, the row before it that it repeats, and whether they are the very same.
Repeat = tuple[int, int, bool]


def near_hashes(
    hashes: np.ndarray, queries: np.ndarray, max_distance: int, *, exact: bool | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Blocks of (query, hash, distance) for all pairs of hashes no further apart than `max_distance` bits.

    `hashes` and `queries` are uint8 of shape (n, bytes). Beyond EXACT_HASHES an inverted file is used, which may miss
    pairs that fall into other lists.
    """
    if not len(hashes) or not len(queries):
        return
    bits = hashes.shape[1] * 8
    if exact if exact is not None else len(hashes) <= EXACT_HASHES:
        index = faiss.IndexBinaryFlat(bits)
    else:
        lists = int(4 * np.sqrt(len(hashes)))
        index = faiss.IndexBinaryIVF(faiss.IndexBinaryFlat(bits), bits, lists)
        index.own_fields = False
        index.nprobe = _PROBED_LISTS
        index.cp.seed = _SEED
        sample = np.random.default_rng(_SEED).choice(len(hashes), min(len(hashes), lists * 64), replace=False)
        index.train(hashes[np.sort(sample)])
    index.add(hashes)
    for start in range(0, len(queries), _BLOCK):
        block = queries[start : start + _BLOCK]
        limits, distances, found = index.range_search(block, max_distance + 1)  # strictly below the radius
        yield (
            start + np.repeat(np.arange(len(block)), np.diff(limits.astype(np.int64))),
            found,
            distances.astype(np.int64),
        )


def repeated_pictures(
    owners: np.ndarray, pictures: np.ndarray, n_pictures: int, neighbours: Mapping[int, Sequence[int]]
) -> Iterator[Repeat]:
    """Rows all of whose pictures are those of rows before them, or neighbours of those.

    `owners` (sorted) and `pictures` say which row has which picture; `neighbours` which pictures show the same.
    """
    times = np.bincount(pictures, minlength=n_pictures)
    # Of all others nothing has to be asked.
    involved = times > 1
    involved[list(neighbours)] = True
    rows = np.unique(owners[involved[pictures]])
    first_of: dict[int, int] = {}  # picture -> the kept row that shows it
    starts, ends = np.searchsorted(owners, rows, "left"), np.searchsorted(owners, rows, "right")
    for row, start, end in zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True):
        shown = pictures[start:end].tolist()
        exact = [first_of.get(picture) for picture in shown]
        near = [
            same
            if same is not None
            else min((first_of[n] for n in neighbours.get(p, ()) if n in first_of), default=None)
            for p, same in zip(shown, exact, strict=True)
        ]
        if all(match is not None for match in near):
            yield row, near[0], all(match is not None for match in exact)
        else:
            for picture in shown:
                first_of.setdefault(picture, row)


def repeated_captions(vectors: np.ndarray, min_cosine: float) -> Iterator[Repeat]:
    """Rows whose caption is as near as `min_cosine` to that of a kept row before them (SemDeDup, arXiv:2303.09540).

    `vectors` of length 1, shape (n, dimensions), float16 or float32; it may be a memory map. Each row is compared in
    the two clusters whose centres are nearest to it, since near neighbours may lie on both sides of a border.
    """
    n, width = vectors.shape
    clusters = -(-n // CLUSTER_ROWS)
    members: Sequence[np.ndarray] = [np.arange(n)]
    if clusters > 1:
        chosen = np.random.default_rng(_SEED).choice(n, min(n, clusters * _TRAINING_ROWS), replace=False)
        kmeans = faiss.Kmeans(width, clusters, niter=10, seed=_SEED, spherical=True, min_points_per_centroid=1)
        kmeans.train(np.asarray(vectors[np.sort(chosen)], np.float32))
        nearest = np.concatenate(
            [
                kmeans.index.search(np.asarray(vectors[start : start + _BLOCK], np.float32), 2)[1]
                for start in range(0, n, _BLOCK)
            ]
        ).reshape(-1)
        order = np.argsort(nearest, kind="stable")
        borders = np.searchsorted(nearest[order], np.arange(clusters + 1))
        members = [order[a:b] // 2 for a, b in zip(borders[:-1], borders[1:], strict=True)]
    dropped = np.zeros(n, bool)
    for cluster in members:
        rows = cluster[~dropped[cluster]]
        for row, kept in _repeats_within(rows, np.asarray(vectors[rows], np.float32), min_cosine):
            dropped[row] = True
            yield row, kept, False


def _repeats_within(rows: np.ndarray, vectors: np.ndarray, min_cosine: float) -> Iterator[tuple[int, int]]:
    """The same for one cluster, in blocks: first against what was kept before, then among themselves."""
    kept: list[int] = []  # positions
    # Vectors were rounded to half precision: two that are equal may come out a little below 1.
    limit = min_cosine - 1e-3 if min_cosine > 0.999 else min_cosine
    for start in range(0, len(rows), _BLOCK):
        block = np.arange(start, min(start + _BLOCK, len(rows)))
        against = vectors[block] @ vectors[kept].T if kept else np.zeros((len(block), 0), np.float32)
        among = vectors[block] @ vectors[block].T
        suspects = (among >= limit).sum(axis=1) > 1
        kept_here: list[int] = []
        for place, position in enumerate(block.tolist()):
            if len(kept) and (best := int(against[place].argmax())) >= 0 and against[place, best] >= limit:
                yield int(rows[position]), int(rows[kept[best]])
                continue
            if suspects[place]:
                same = [other for other in kept_here if among[place, other - start] >= limit]
                if same:
                    yield int(rows[position]), int(rows[same[0]])
                    continue
            kept_here.append(position)
        kept += kept_here

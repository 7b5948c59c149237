"""Stage dedup: rows that overlap an evaluation set, then repeated pictures, then repeated captions.

    dedup.guard     one task    pictures and questions of the evaluation sets (only if any are named)
    dedup.captions  all tasks   vectors of the captions, and which texts quote an evaluation question
    dedup.decide    one task    what becomes of each row, over all of them
    dedup           all tasks   the rows, accordingly

Of rows that are the same, the one with the largest pictures stays, then the longest caption, then the smallest id.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datatrove.pipeline.base import PipelineStep
from PIL import Image

from data.config import Dedup
from data.dedup.guard import (
    EvaluationSets,
    WriteEvaluationSets,
    as_array,
    case_keys,
    check_names,
    held_out_cases,
    held_out_digest,
    quoted_question,
)
from data.dedup.nearest import repeated_captions, repeated_pictures
from data.dedup.pictures import Hashes, Proposal, neighbours_of, proposals, same_pictures, thumbnail
from data.filters.encoders import caption_encoder, encoder_name
from data.steps import Pass, Rows, row_pass
from data.tables import Dropped, Pair, RunFolder, batched, whole_file, write_json

STAGE, PREVIOUS = "dedup", "image-filter"
REPORT_FILE = "contamination.json"
# Thumbnails of 10 KB each: at most a gigabyte.
_PROPOSALS_AT_ONCE = 50_000
# Goes up whenever what the guard keeps of the evaluation sets changes.
GUARD_VERSION = 2
_FLAG = "flag"  # not a reason to drop: the row stays, and says what it overlaps


def dedup_passes(run: RunFolder, settings: Dedup, tasks: int) -> list[Pass]:
    check_names(settings.guard)
    encoder = encoder_name(settings.encoder) if settings.min_cosine is not None else None
    guard = settings.guard.model_dump(mode="json", exclude={"cases"}) | {"cases": held_out_digest(settings.guard)}
    guard["version"] = GUARD_VERSION
    record = {**settings.model_dump(mode="json", exclude={"encoder", "guard"}), "encoder": encoder, "guard": guard}
    passes = []
    if settings.guard.benchmarks:
        passes.append(Pass("dedup.guard", (WriteEvaluationSets(run, settings.guard),), 1, guard, ("guard",)))
    folders = ("vectors/quotes", *([f"vectors/{encoder}"] if encoder else []))
    passes += [
        Pass("dedup.captions", (ReadCaptions(run, settings),), tasks, [encoder, guard], folders),
        Pass("dedup.decide", (Decide(run, settings, tasks),), 1, record, ("decisions",)),
        row_pass(run, STAGE, PREVIOUS, tasks, (Apply(run),), record),
    ]
    return passes


def contamination(run: RunFolder) -> dict[str, Any]:
    """What the guard found: which evaluation sets were compared, and the rows that overlap them."""
    return json.loads((run.path / "decisions" / REPORT_FILE).read_text(encoding="utf-8"))


class ReadCaptions(PipelineStep):
    """One rank's caption vectors, and the rows that quote an evaluation question."""

    type, name = "encoder", "captions"

    def __init__(self, run: RunFolder, settings: Dedup):
        super().__init__()
        self.run_folder, self.settings = run, settings

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        guard = self.settings.guard
        questions = EvaluationSets(self.run_folder).questions() if guard.benchmarks else {}
        encode = caption_encoder(self.settings.encoder) if self.settings.min_cosine is not None else None
        ids: list[str] = []
        vectors: list[np.ndarray] = []
        quotes: list[str | None] = []
        for batch in batched(self.run_folder.pairs(PREVIOUS, rank), 256):
            ids += [pair.id for pair in batch]
            quotes += [quoted_question(p, questions, guard.question_words) if questions else None for p in batch]
            if encode is not None:
                vectors.append(encode([text_to_compare(pair) for pair in batch]).astype(np.float16))
        with whole_file(self.run_folder.rank_file("vectors", "quotes", rank)) as unfinished:
            pq.write_table(
                pa.table({"id": pa.array(ids, pa.string()), "row": pa.array(quotes, pa.string())}), unfinished
            )
        if encode is not None:
            found = np.concatenate(vectors) if vectors else np.zeros((0, 1), np.float16)
            self.run_folder.write_vectors(encoder_name(self.settings.encoder), rank, ids, found)


def text_to_compare(pair: Pair) -> str:
    return pair.caption or pair.context[0]


class Decide(PipelineStep):
    """Looks at all rows at once: a few hundred bytes of memory each, their texts and pictures not among them."""

    type, name = "dedup", "decide"

    def __init__(self, run: RunFolder, settings: Dedup, tasks: int):
        super().__init__()
        self.run_folder, self.settings, self.tasks = run, settings, tasks

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        rows = self._rows()
        n = len(rows)
        ids = rows["id"]
        decided: dict[int, tuple[str, str]] = {}
        flags: dict[int, str] = {}
        for row in _later_ones(ids):
            decided[row] = ("duplicate_id", "a row before it has the same id")
        owners, shown, pictures = self._pictures(rows)
        report = self._overlaps(rows, owners, shown, pictures, decided, flags)
        left = np.setdiff1d(np.arange(n), np.fromiter(decided, np.int64, len(decided)))
        new = np.full(n, -1)
        new[left] = np.arange(len(left))
        chosen = new[owners] >= 0
        neighbours = self._neighbours(pictures) if self.settings.max_hash_distance else {}
        for row, other, same in repeated_pictures(new[owners[chosen]], shown[chosen], len(pictures.ids), neighbours):
            decided[int(left[row])] = ("same_image" if same else "near_image", _at(ids, left[other]))
        if self.settings.min_cosine is not None:
            left = np.setdiff1d(left, np.fromiter(decided, np.int64, len(decided)))
            # Tags are alike for whole data sets: only what people wrote is compared.
            left = left[rows["annotated"].to_numpy()[left]]
            for row, other, _ in repeated_captions(self._vectors(rows, left), self.settings.min_cosine):
                decided[int(left[row])] = ("near_caption", _at(ids, left[other]))
        self._write(rows, decided, flags)
        write_json(self.run_folder.path / "decisions" / REPORT_FILE, report)

    def _rows(self) -> pa.Table:
        """id, rank, place in the rank, images, all in the order of preference."""
        tables = []
        for rank in range(self.tasks):
            pairs = self.run_folder.pair_columns(PREVIOUS, rank, ["id", "image_ids", "caption", "article", "annotated"])
            images = self.run_folder.image_columns(rank, ["id", "width", "height"])
            area = np.multiply(images["width"].to_numpy().astype(np.int64), images["height"].to_numpy())
            areas = dict(zip(images["id"].to_pylist(), area.tolist(), strict=True))
            tables.append(
                pa.table(
                    {
                        "id": pairs["id"],
                        "article": pairs["article"],
                        "annotated": pairs["annotated"],
                        "images": pairs["image_ids"],
                        "area": pa.array(
                            [sum(areas[i] for i in of) for of in pairs["image_ids"].to_pylist()], pa.int64()
                        ),
                        "length": pc.utf8_length(pairs["caption"]),
                        "rank": pa.array(np.full(len(pairs), rank, np.int32)),
                        "place": pa.array(np.arange(len(pairs), dtype=np.int32)),
                    }
                )
            )
        keys = [("area", "descending"), ("length", "descending"), ("id", "ascending"), ("rank", "ascending")]
        return pa.concat_tables(tables).sort_by([*keys, ("place", "ascending")]).combine_chunks()

    def _pictures(self, rows: pa.Table) -> tuple[np.ndarray, np.ndarray, _Pictures]:
        """Owner and picture of each showing of a picture, and the pictures."""
        lists = rows["images"].combine_chunks()
        owners = np.repeat(np.arange(len(rows), dtype=np.int32), pc.list_value_length(lists).to_numpy())
        coded = lists.flatten().dictionary_encode()
        tables = []
        for rank in range(self.tasks):
            table = self.run_folder.image_columns(rank, ["id", "phash", "coarse_phash"])
            tables.append(table.append_column("rank", pa.array(np.full(len(table), rank, np.int32))))
        images = pa.concat_tables(tables).combine_chunks()
        # Of a picture that several tasks stored, the first.
        images = images.take(pc.index_in(coded.dictionary, images["id"].combine_chunks()))
        hashes = (as_array(images["phash"]), as_array(images["coarse_phash"]))
        pictures = _Pictures(self.run_folder, coded.dictionary, hashes, images["rank"].to_numpy())
        return owners, coded.indices.to_numpy(), pictures

    def _neighbours(self, pictures: _Pictures) -> Mapping[int, list[int]]:
        """Pictures that show the same as others."""
        hashes = pictures.hashes
        proposed = proposals(hashes, hashes, self.settings.max_hash_distance)
        proposed = sorted({(min(one, other), max(one, other), distance) for one, other, distance in proposed})
        same: list[Proposal] = []
        for block in batched(proposed, _PROPOSALS_AT_ONCE):
            pictures.keep({place for one, other, _ in block for place in (one, other)})
            same += same_pictures(block, pictures.thumbnail, pictures.thumbnail, self.settings.min_likeness)
        return neighbours_of(same)

    def _overlaps(
        self,
        rows: pa.Table,
        owners: np.ndarray,
        shown: np.ndarray,
        pictures: _Pictures,
        decided: dict[int, tuple[str, str]],
        flags: dict[int, str],
    ) -> dict[str, Any]:
        """Decide on rows that overlap an evaluation set; returns the report."""
        guard = self.settings.guard
        cases = held_out_cases(guard)
        if not guard.benchmarks and not cases:
            return {"benchmarks": {}, "cases": 0, "cases_not_found": [], "on_overlap": guard.on_overlap, "overlaps": []}
        found = _of_cases(rows, {key: case for case in sorted(cases) for key in case_keys(case, exactly=True)})
        not_found = sorted(cases - {case for _, case in found.values()})
        if guard.benchmarks:
            found |= self._of_benchmarks(rows, owners, shown, pictures)
        ids = rows["id"]
        overlaps = []
        for row, (reason, detail) in sorted(found.items()):
            where = {"id": _at(ids, row), "article": _at(rows["article"], row)}
            overlaps.append({**where, "reason": reason, "detail": detail})
            if guard.on_overlap == "drop":
                decided.setdefault(row, (reason, detail))
            else:
                flags[row] = f"{reason}: {detail}"
        counts = Counter(overlap["reason"] for overlap in overlaps)
        return {
            "benchmarks": EvaluationSets(self.run_folder).report() if guard.benchmarks else {},
            "cases": len(cases),
            "cases_not_found": not_found,
            "on_overlap": guard.on_overlap,
            "question_words": guard.question_words,
            "max_hash_distance": self.settings.max_hash_distance,
            "min_likeness": self.settings.min_likeness,
            "rows_checked": len(rows),
            "counts": dict(sorted(counts.items())),
            "overlaps": sorted(overlaps, key=lambda overlap: overlap["id"]),
        }

    def _of_benchmarks(
        self, rows: pa.Table, owners: np.ndarray, shown: np.ndarray, pictures: _Pictures
    ) -> dict[int, tuple[str, str]]:
        """Rows that are a case of a benchmark, quote a question of it, or show a picture."""
        sets = EvaluationSets(self.run_folder)
        found = _of_cases(rows, sets.cases())
        ranks, places = rows["rank"].to_numpy(), rows["place"].to_numpy()
        firsts = np.concatenate([[0], np.cumsum(np.bincount(ranks, minlength=self.tasks))])
        row_at = np.empty(len(rows), np.int64)  # by rank, then place
        row_at[firsts[ranks] + places] = np.arange(len(rows))
        for rank in range(self.tasks):
            quotes = pq.read_table(self.run_folder.rank_file("vectors", "quotes", rank))["row"]
            for place in np.flatnonzero(quotes.is_valid().to_numpy()).tolist():
                found[int(row_at[firsts[rank] + place])] = ("evaluation_question", quotes[place].as_py())
        matches = sets.matches(pictures.ids, pictures.hashes, pictures.thumbnail, self.settings)
        for showing in np.flatnonzero(np.isin(shown, list(matches))).tolist():
            row, distance = matches[int(shown[showing])]
            found[int(owners[showing])] = ("evaluation_image", f"{row}, {distance} of 256 bits apart")
        return found

    def _vectors(self, rows: pa.Table, left: np.ndarray) -> np.ndarray:
        """The vectors of the rows that are left, in their order, on disk."""
        name = encoder_name(self.settings.encoder)
        ranks, places = (rows[column].to_numpy()[left] for column in ("rank", "place"))
        found: np.memmap | None = None
        path = self.run_folder.path / "decisions" / "vectors.f16"
        path.parent.mkdir(parents=True, exist_ok=True)
        for rank in range(self.tasks):
            _, vectors = self.run_folder.vectors(name, rank)
            mine = np.flatnonzero(ranks == rank)
            if not len(mine):
                continue
            if found is None:
                found = np.memmap(path, np.float16, "w+", shape=(len(left), vectors.shape[1]))
            found[mine] = vectors[places[mine]]
        path.unlink(missing_ok=True)  # the map keeps it until it is let go
        return found if found is not None else np.zeros((0, 1), np.float16)

    def _write(self, rows: pa.Table, decided: dict[int, tuple[str, str]], flags: dict[int, str]) -> None:
        ranks, places = rows["rank"].to_numpy(), rows["place"].to_numpy()
        by_rank: dict[int, list[tuple[int, str, str]]] = {rank: [] for rank in range(self.tasks)}
        for row, (reason, detail) in decided.items():
            by_rank[int(ranks[row])].append((int(places[row]), reason, detail))
        for row, detail in flags.items():
            if row not in decided:
                by_rank[int(ranks[row])].append((int(places[row]), _FLAG, detail))
        for rank, decisions in by_rank.items():
            places_of, reasons, details = zip(*sorted(decisions), strict=True) if decisions else ((), (), ())
            columns = {"place": pa.array(places_of, pa.int32()), "reason": pa.array(reasons, pa.string())}
            with whole_file(self.run_folder.rank_file("decisions", "", rank)) as unfinished:
                pq.write_table(pa.table({**columns, "detail": pa.array(details, pa.string())}), unfinished)


class _Pictures:
    """All pictures by position: ids and hashes in memory, thumbnails read when they are asked for."""

    def __init__(self, run: RunFolder, ids: pa.StringArray, hashes: Hashes, ranks: np.ndarray):
        self.ids, self.hashes = ids, hashes
        self._run, self._ranks = run, ranks
        self._kept: dict[int, Image.Image] = {}

    def keep(self, places: Iterable[int]) -> None:
        """Read these thumbnails now, file by file, and keep them in place of others."""
        self._kept.clear()
        by_rank: dict[int, list[int]] = {}
        for place in sorted(places):
            by_rank.setdefault(int(self._ranks[place]), []).append(place)
        for rank, of_rank in sorted(by_rank.items()):
            with self._run.images(rank) as images:
                for place in images.in_file_order(of_rank, lambda place: self.ids[place].as_py()):
                    self._kept[place] = thumbnail(images.get(self.ids[place].as_py()))

    def thumbnail(self, place: int) -> Image.Image:
        if place not in self._kept:
            with self._run.images(int(self._ranks[place])) as images:
                self._kept[place] = thumbnail(images.get(self.ids[place].as_py()))
        return self._kept[place]


class Apply(PipelineStep):
    type, name = "dedup", "apply"

    def __init__(self, run: RunFolder):
        super().__init__()
        self.run_folder = run

    def run(self, data: Rows, rank: int = 0, world_size: int = 1) -> Rows:
        self.run_folder.tasks("dedup.decide")
        table = pq.read_table(self.run_folder.rank_file("decisions", "", rank))
        columns = (table[name].to_pylist() for name in ("place", "reason", "detail"))
        decisions = {place: (reason, detail) for place, reason, detail in zip(*columns, strict=True)}
        for place, row in enumerate(data):
            reason, detail = decisions.get(place, (None, ""))
            if reason is None:
                yield row
            elif reason == _FLAG:
                yield replace(row, overlaps=detail)
            else:
                yield Dropped(row.id, reason, detail)


def _of_cases(rows: pa.Table, cases: Mapping[str, str]) -> dict[int, tuple[str, str]]:
    """Rows of one of the cases, which are given by their keys."""
    articles = rows["article"].combine_chunks().dictionary_encode()
    keys = [case_keys(article, exactly=True) for article in articles.dictionary.to_pylist()]
    named = [next((cases[key] for key in of if key in cases), None) for of in keys]
    numbers = articles.indices.to_pylist() if any(named) else ()
    return {row: ("evaluation_case", named[n]) for row, n in enumerate(numbers) if named[n] is not None}


def _at(column: pa.ChunkedArray, place: int) -> str:
    return column[int(place)].as_py()


def _later_ones(ids: pa.ChunkedArray) -> Iterator[int]:
    """Places of ids that stand further ahead already."""
    coded = ids.combine_chunks().dictionary_encode().indices.to_numpy()
    _, first = np.unique(coded, return_index=True)
    if len(first) < len(coded):
        yield from np.setdiff1d(np.arange(len(coded)), first).tolist()

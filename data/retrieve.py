"""Step retrieve: evidence for the rows that nobody described, from guidelines and from the cases that people did.

    retrieve.guidelines   one task    chunks of the guidelines and their vectors
    retrieve.vectors      all tasks   one fused vector a row: its pictures and its texts (UniIR's score fusion)
    retrieve.search       all tasks   for each such row the nearest chunks and cases, and the cases' pictures

No row drops here; the stage reformat reads what was found. A case is never evidence for itself: not for the same row,
not for another of its article (case, study, patient), and not where it shows one of the same pictures. Nothing of an
evaluation set is evidence: what dedup's guard found, and every other row of its case, is left out, whether such rows
were dropped or only flagged, and so are chunks that quote a question. The paper gives neither the fusion nor k (arXiv
2410.14948); both are settings.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datatrove.pipeline.base import PipelineStep
from PIL import Image

from data.config import Guard, Guidelines, Retrieve
from data.dedup.guard import EvaluationSets, case_keys, runs_of_words
from data.dedup.stage import contamination
from data.filters.encoders import encoder_name, shared_encoder
from data.mllm.requests import Evidence
from data.sources.text import folded
from data.steps import Pass
from data.tables import Pair, RunFolder, ShardImages, batched, row_writer, whole_file, write_json
from huatuo_vision.schema import UserError

STAGE, PREVIOUS = "retrieve", "balance"
GUIDELINES, VECTORS, SEARCH = (f"{STAGE}.{word}" for word in ("guidelines", "vectors", "search"))
REPORT_FILE = "guidelines.json"
_KEYS = ("id", "title", "clean_text")
_CASE_COLUMNS = ("id", "article", "title", "caption", "context", "licence", "image_ids", "annotated", "overlaps")
_FOUND = pa.schema(
    [("row", pa.string()), ("kind", pa.string()), ("id", pa.string()), ("title", pa.string()), ("text", pa.string())]
    + [("licence", pa.string()), ("score", pa.float32()), ("image_ids", pa.list_(pa.string()))]
)
_PICTURES = pa.schema([("id", pa.string()), ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))])
# Neighbours that are looked at before any is left out; more where that was too few.
_SPARE = 16
_BLOCK = 1024


def retrieve_passes(run: RunFolder, settings: Retrieve | None, guard: Guard, tasks: int) -> list[Pass]:
    """None of them where nothing is to be found. Raises UserError for guidelines that can't be read."""
    if settings is None:
        return []
    name = vectors_name(settings)
    about = settings.guidelines
    guided = about is not None and settings.top_k.guidelines > 0
    encoder = encoder_name(settings.encoder)
    passes = []
    if guided:
        record = {
            "guidelines": Path(about.path).name,
            "sha256": _sha256(about),
            "licence": about.licence,
            "chunk_words": about.chunk_words,
            "encoder": encoder,
            "guard": guard.model_dump(mode="json"),
        }
        passes.append(Pass(GUIDELINES, (ReadGuidelines(run, about, settings, guard),), 1, record, ("retrieve",)))
    vectors = {"encoder": encoder, "image_weight": settings.image_weight}
    search = {"encoder": encoder, **settings.model_dump(mode="json", exclude={"encoder", "guidelines"})}
    return [
        *passes,
        Pass(VECTORS, (WriteVectors(run, settings),), tasks, vectors, (f"vectors/{name}",)),
        Pass(SEARCH, (Search(run, settings, tasks, guided),), tasks, search, ("evidence",)),
    ]


def vectors_name(settings: Retrieve) -> str:
    return f"evidence-{encoder_name(settings.encoder)}"


def evidence_of(run: RunFolder, rank: int) -> dict[str, tuple[Evidence, ...]]:
    """Row -> its evidence, guidelines first and the nearest of each first."""
    run.tasks(SEARCH)
    found: dict[str, list[Evidence]] = {}
    for entry in pq.read_table(run.rank_file("evidence", "found", rank)).to_pylist():
        row = found.setdefault(entry.pop("row"), [])
        row.append(Evidence(**entry | {"image_ids": tuple(entry["image_ids"])}))
    return {row: tuple(entries) for row, entries in found.items()}


def evidence_images(run: RunFolder, rank: int) -> ShardImages:
    """The pictures of the cases that were found for the rows of a rank."""
    return ShardImages(run.rank_file("evidence", "images", rank))


def text_of(pair: Pair) -> str:
    """What is searched with, and found by: the row's own words, marks in pixels not among them."""
    said = (text for text, section in zip(pair.context, pair.sections, strict=True) if section != "boxes")
    return " ".join(filter(None, (pair.modality, pair.caption, *said)))


# Guidelines ----------------------------------------------------------------------------------------------------------


def _sha256(settings: Guidelines) -> str:
    try:
        with open(settings.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(
            f"retrieve.guidelines.path: {settings.path} can't be read ({error.strerror or error}); expected JSON Lines "
            "of id, source, title and clean_text, as OpenGuidelines has them, or remove guidelines"
        ) from None


def read_guidelines(settings: Guidelines, counts: Counter[str]) -> Iterator[tuple[str, str, str]]:
    """(id, title, text) of every guideline with a text; the others are counted. Raises UserError for another format."""
    opener = gzip.open if settings.path.endswith(".gz") else open
    seen: set[str] = set()
    try:
        with opener(settings.path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                counts["guidelines"] += 1
                try:
                    row = json.loads(line)
                except ValueError:
                    raise ValueError(f"line {number} is not JSON") from None
                if missing := [key for key in _KEYS if not isinstance(row, dict) or key not in row]:
                    raise ValueError(f"line {number} has no {missing[0]}")
                if row["id"] is None:
                    raise ValueError(f"line {number} has an empty id")
                text = folded(row["clean_text"]) if isinstance(row["clean_text"], str) else ""
                if not text:
                    counts["without_text"] += 1
                elif str(row["id"]) in seen:
                    counts["repeated_id"] += 1
                else:
                    seen.add(str(row["id"]))
                    yield str(row["id"]), folded(str(row["title"] or "")), text
    except (ValueError, EOFError, OSError) as error:
        raise UserError(
            f"retrieve.guidelines.path: {settings.path}: {' '.join(str(error).split())[:200]}; expected JSON Lines of "
            "id, source, title and clean_text"
        ) from None


def chunks(text: str, words: int) -> Iterator[str]:
    """Runs of about `words` words, all of nearly the same length."""
    all_words = text.split()
    parts = -(-len(all_words) // words)
    for part in np.array_split(np.array(all_words, object), max(parts, 1)):
        yield " ".join(part)


class ReadGuidelines(PipelineStep):
    """The chunks and their vectors."""

    type, name = "encoder", "guidelines"

    def __init__(self, run: RunFolder, guidelines: Guidelines, settings: Retrieve, guard: Guard):
        super().__init__()
        self.run_folder, self.guidelines, self.settings, self.guard = run, guidelines, settings, guard

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        questions = EvaluationSets(self.run_folder).questions() if self.guard.benchmarks else {}
        counts: Counter[str] = Counter()
        rows: list[dict[str, Any]] = []
        vectors: list[np.ndarray] = []
        encode = shared_encoder(self.settings.encoder).texts
        for batch in batched(self._chunks(counts, questions), 256):
            rows += batch
            vectors.append(encode([f"{row['title']} {row['text']}" for row in batch]).astype(np.float16))
        if not rows:
            raise UserError(
                f"retrieve.guidelines.path: none of the {counts['guidelines']} guidelines in {self.guidelines.path} "
                "has a text that can be used; check clean_text, or remove guidelines"
            )
        folder = self.run_folder.path / "retrieve"
        with whole_file(folder / "guidelines.parquet") as unfinished:
            pq.write_table(pa.Table.from_pylist(rows), unfinished)
        with whole_file(folder / "guidelines.npy") as unfinished, unfinished.open("wb") as file:
            np.save(file, np.concatenate(vectors))
        write_json(folder / REPORT_FILE, dict(counts))

    def _chunks(self, counts: Counter[str], questions: Mapping[int, str]) -> Iterator[dict[str, Any]]:
        for id_, title, text in read_guidelines(self.guidelines, counts):
            for number, chunk in enumerate(chunks(text, self.guidelines.chunk_words)):
                counts["chunks"] += 1
                if questions and any(run in questions for run in runs_of_words(chunk, self.guard.question_words)):
                    counts["chunks_with_an_evaluation_question"] += 1
                else:
                    yield {"id": f"{id_}#{number}", "title": title, "text": chunk}


# Rows ----------------------------------------------------------------------------------------------------------------


class WriteVectors(PipelineStep):
    """The fused vectors of one rank's rows."""

    type, name = "encoder", "rows"

    def __init__(self, run: RunFolder, settings: Retrieve):
        super().__init__()
        self.run_folder, self.settings = run, settings

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        encoder, weight = shared_encoder(self.settings.encoder), self.settings.image_weight
        ids: list[str] = []
        vectors: list[np.ndarray] = []
        with self.run_folder.images(rank) as images:
            for batch in batched(self.run_folder.pairs(PREVIOUS, rank), self.settings.encoder.batch_size):
                pictures = [_picture(images.get(image_id)) for pair in batch for image_id in pair.image_ids]
                looks = np.split(encoder.images(pictures), np.cumsum([len(pair.image_ids) for pair in batch])[:-1])
                texts = encoder.texts([text_of(pair) for pair in batch])
                for pair, look, text in zip(batch, looks, texts, strict=True):
                    ids.append(pair.id)
                    # A row without a word has no text: an empty one's vector would pull it towards nothing.
                    vectors.append(encoder.fused(look, text if text_of(pair).strip() else None, weight))
        found = np.stack(vectors).astype(np.float16) if vectors else np.zeros((0, 1), np.float16)
        self.run_folder.write_vectors(vectors_name(self.settings), rank, ids, found)


def _picture(encoded: bytes) -> Image.Image:
    return Image.open(io.BytesIO(encoded)).convert("RGB")


@dataclass(frozen=True, slots=True)
class _Cases:
    """What may be found: the rows that people described, by their position in the index."""

    rows: pa.Table
    ranks: np.ndarray
    index: faiss.Index

    def at(self, place: int) -> dict[str, Any]:
        return self.rows.slice(place, 1).to_pylist()[0]


# Once a process, not once a task.
@lru_cache(maxsize=1)
def _cases(run: RunFolder, vectors: str, tasks: int, mark: str) -> _Cases:
    """`mark` is the fingerprint of the vectors' pass: after another run of it, they are read again."""
    overlaps = contamination(run)["overlaps"]
    held_out = {key for overlap in overlaps for key in case_keys(overlap["article"], exactly=True)}
    tables: list[pa.Table] = []
    ranks: list[np.ndarray] = []
    found: list[np.ndarray] = []
    for rank in range(tasks):
        rows = run.pair_columns(PREVIOUS, rank, _CASE_COLUMNS)
        chosen = np.flatnonzero(may_be_evidence(rows, held_out))
        if len(chosen):
            tables.append(rows.take(chosen))
            ranks.append(np.full(len(chosen), rank))
            found.append(run.vectors(vectors, rank)[1][chosen])
    if not tables:
        return _Cases(pa.table({}), np.zeros(0, np.int64), faiss.IndexFlatIP(1))
    return _Cases(pa.concat_tables(tables).combine_chunks(), np.concatenate(ranks), _index(np.concatenate(found)))


class Search(PipelineStep):
    """For each row of a rank that nobody described: the nearest chunks and cases."""

    type, name = "retriever", "search"

    def __init__(self, run: RunFolder, settings: Retrieve, tasks: int, guided: bool):
        super().__init__()
        self.run_folder, self.settings, self.tasks, self.guided = run, settings, tasks, guided

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        top_k = self.settings.top_k
        rows = list(self.run_folder.pairs(PREVIOUS, rank))
        asking = [place for place, pair in enumerate(rows) if not pair.annotated]
        queries = self.run_folder.vectors(vectors_name(self.settings), rank)[1][asking].astype(np.float32)
        rows = [rows[place] for place in asking]
        guidelines = self._guidelines(queries) if self.guided and rows else [()] * len(rows)
        cases = self._cases() if top_k.cases and rows else None
        # All rows at once are searched much faster than one by one.
        look_at = min(top_k.cases + _SPARE, len(cases.ranks)) if cases is not None else 0
        firsts = list(zip(*cases.index.search(queries, look_at), strict=True)) if look_at else [None] * len(rows)
        shown: dict[int, dict[str, None]] = {}  # rank of the case -> its pictures
        with row_writer(self.run_folder.rank_file("evidence", "found", rank), _FOUND) as found:
            for pair, query, chunks_, first in zip(rows, queries, guidelines, firsts, strict=True):
                near = self._nearest(pair, query, cases, first) if cases is not None else ()
                for of_rank, evidence in near:
                    shown.setdefault(of_rank, {}).update(dict.fromkeys(evidence.image_ids))
                for evidence in (*chunks_, *(evidence for _, evidence in near)):
                    found.write({"row": pair.id, **asdict(evidence)})
        self._copy_pictures(rank, shown)

    def _guidelines(self, queries: np.ndarray) -> list[tuple[Evidence, ...]]:
        self.run_folder.tasks(GUIDELINES)
        folder = self.run_folder.path / "retrieve"
        table = pq.read_table(folder / "guidelines.parquet")
        index = _index(np.load(folder / "guidelines.npy"))
        scores, places = index.search(queries, min(self.settings.top_k.guidelines, index.ntotal))
        licence = self.settings.guidelines.licence or ""
        return [
            tuple(
                Evidence("guideline", licence=licence, score=float(score), **table.slice(place, 1).to_pylist()[0])
                for place, score in zip(of_row.tolist(), of_scores, strict=True)
            )
            for of_row, of_scores in zip(places, scores, strict=True)
        ]

    def _cases(self) -> _Cases:
        mark = self.run_folder.state(VECTORS)["fingerprint"]
        self.run_folder.tasks(VECTORS)
        return _cases(self.run_folder, vectors_name(self.settings), self.tasks, mark)

    def _nearest(self, pair: Pair, query: np.ndarray, cases: _Cases, found: Any) -> list[tuple[int, Evidence]]:
        """Rank and evidence of the nearest cases, beginning with those `found`; there may be fewer than are wanted."""
        wanted, total = self.settings.top_k.cases, len(cases.ranks)
        while found is not None:
            near = [
                (int(cases.ranks[place]), self._evidence(case, score))
                for score, place in zip(*(values.tolist() for values in found), strict=True)
                if not same_case(pair, case := cases.at(place))
            ]
            looked_at = len(found[0])
            if len(near) >= wanted or looked_at == total:
                return near[:wanted]
            found = tuple(values[0] for values in cases.index.search(query[None], min(4 * looked_at, total)))
        return []

    def _evidence(self, case: Mapping[str, Any], score: float) -> Evidence:
        text = "\n".join(filter(None, (case["caption"], *case["context"])))
        shown = tuple(case["image_ids"][: self.settings.case_images])
        return Evidence("case", case["id"], case["title"], text, case["licence"], score, shown)

    def _copy_pictures(self, rank: int, shown: Mapping[int, Mapping[str, None]]) -> None:
        """Beside the evidence, so that whoever reads it reads this rank's files only."""
        copied: set[str] = set()
        with row_writer(self.run_folder.rank_file("evidence", "images", rank), _PICTURES) as pictures:
            for of_rank, image_ids in sorted(shown.items()):
                with self.run_folder.images(of_rank) as images:
                    for image_id in images.in_file_order(set(image_ids) - copied, lambda image_id: image_id):
                        encoded = images.get(image_id)
                        pictures.write({"id": image_id, "image": {"bytes": encoded, "path": image_id}}, len(encoded))
                        copied.add(image_id)


def may_be_evidence(rows: pa.Table, held_out: Set[str]) -> np.ndarray:
    """Of which rows: people described them, and neither they nor another row of their case is of an evaluation set.

    held_out: the keys of such cases.
    """
    articles = rows["article"].combine_chunks().dictionary_encode()
    named = [not held_out.isdisjoint(case_keys(article, exactly=True)) for article in articles.dictionary.to_pylist()]
    of_evaluation = np.array(named, bool)[articles.indices.to_numpy()] | pc.is_valid(rows["overlaps"]).to_numpy()
    return rows["annotated"].to_numpy() & ~of_evaluation


def same_case(row: Pair, case: Mapping[str, Any]) -> bool:
    same_picture = not set(row.image_ids).isdisjoint(case["image_ids"])
    # By their keys: two sources may hold one case, each under a name of its own.
    of_row, of_case = (set(case_keys(name, exactly=True)) for name in (row.article, case["article"]))
    return row.id == case["id"] or not of_row.isdisjoint(of_case) or same_picture


def _index(vectors: np.ndarray) -> faiss.Index:
    """Exact. All vectors are in memory, four bytes a number: a million of 768 are 3 GB in every worker process."""
    index = faiss.IndexFlatIP(vectors.shape[1])
    for start in range(0, len(vectors), _BLOCK):
        index.add(np.ascontiguousarray(vectors[start : start + _BLOCK], np.float32))
    return index


def report(run: RunFolder) -> dict[str, int] | None:
    """Counts of the guidelines, where some were read."""
    path = run.path / "retrieve" / REPORT_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def scores(run: RunFolder) -> Sequence[tuple[str, int, float]]:
    """(kind, pieces of evidence, mean score) over all rows."""
    tables = [
        pq.read_table(run.rank_file("evidence", "found", rank), columns=["kind", "score"])
        for rank in range(run.tasks(SEARCH))
    ]
    grouped = pa.concat_tables(tables).group_by("kind").aggregate([("score", "count"), ("score", "mean")]).to_pylist()
    return [(row["kind"], row["score_count"], row["score_mean"]) for row in grouped]

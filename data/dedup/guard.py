"""Training rows that show a picture of an evaluation set, or quote one of its questions or references.

Pictures by the SHA-256 of their pixels and by perceptual hash; questions, and the discussions that explanations are
held against, by runs of words. A run that stands in many questions of a benchmark ("what imaging modality was used to
take this image") marks none of them. What can't be compared, a question of fewer words, is counted in the report.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datatrove.pipeline.base import PipelineStep
from PIL import Image

from data.config import Dedup, Guard
from data.dedup.pictures import Hashes, proposals, same_pictures, shrunk, thumbnail
from data.sources.images import fingerprints
from data.tables import Pair, RunFolder, whole_file, write_json
from huatuo_vision.evaluation.benchmarks import BENCHMARKS
from huatuo_vision.inputs.images import load_image
from huatuo_vision.schema import BadSample, UserError

# Collections whose cases are known by a number: how an identifier, address or file name of them begins.
COLLECTIONS = ("eurorad", "jama")
# Runs of words that more questions of a benchmark share are its manner of asking.
_QUESTIONS_OF_A_RUN = 3
_WORD = re.compile(r"[^\W_]+")
_PICTURES = pa.schema(
    [("id", pa.string()), ("row", pa.string()), ("phash", pa.binary(32)), ("coarse_phash", pa.binary(8))]
    + [("thumbnail", pa.binary())]
)
_CASES = pa.schema([("case", pa.string()), ("row", pa.string())])


def runs_of_words(text: str, length: int) -> Iterator[int]:
    """64-bit hashes of all runs of `length` words."""
    words = _WORD.findall(text.lower())
    for start in range(len(words) - length + 1):
        run = " ".join(words[start : start + length])
        yield int.from_bytes(hashlib.blake2b(run.encode(), digest_size=8).digest(), "little")


def case_keys(text: str, *, exactly: bool = False) -> Iterator[str]:
    """The cases that a text names by collection and number: `https://www.eurorad.org/case/19254`, `eurorad-19254`,
    `.../jamadermatology/fullarticle/2811083`, and of Eurorad also `case19254`, as its copies call their folders.

    exactly: the text itself is a case's name too, as in a column of them, whatever its capitals.
    """
    if exactly:
        yield f"={text.strip().casefold()}"
    words: list[str] = []
    for token in re.findall(r"[a-z]+|[0-9]+", text.lower()):
        if not token.isdecimal():
            words.append(token)
        elif len(token) >= 4:
            near = words[-4:]
            yield from (f"{name}/{token}" for name in COLLECTIONS if any(word.startswith(name) for word in near))
            if near and near[-1] == "case" and not any(word.startswith("jama") for word in near):
                yield f"eurorad/{token}"


def check_names(guard: Guard) -> None:
    """Raises UserError for a benchmark that eval.py does not know, and for a list of cases that can't be read."""
    for name in guard.benchmarks:
        if name not in BENCHMARKS:
            raise UserError(f"dedup.guard.benchmarks: {name!r} is no benchmark; expected {', '.join(BENCHMARKS)}")
    held_out_cases(guard)


def held_out_cases(guard: Guard) -> frozenset[str]:
    """Raises UserError for a list that can't be read or is empty."""
    if guard.cases is None:
        return frozenset()
    try:
        lines = Path(guard.cases).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"dedup.guard.cases: {guard.cases} can't be read ({said}); expected a case id a line") from None
    if not (cases := frozenset(filter(None, map(str.strip, lines)))):
        raise UserError(f"dedup.guard.cases: {guard.cases} names no case; expected a case id a line, or remove it")
    return cases


def held_out_digest(guard: Guard) -> str | None:
    """What the list of held-out cases is known by."""
    cases = held_out_cases(guard)
    return hashlib.sha256("\n".join(sorted(cases)).encode()).hexdigest() if cases else None


class EvaluationSets:
    """Pictures and questions of the benchmarks, in files of the run folder."""

    def __init__(self, run: RunFolder):
        self._folder = run.path / "guard"

    @property
    def report_file(self) -> Path:
        return self._folder / "evaluation_sets.json"

    def write(self, guard: Guard) -> None:
        pictures: dict[str, dict[str, Any]] = {}
        runs: dict[int, str] = {}
        cases: dict[str, str] = {}
        report: dict[str, dict[str, Any]] = {}
        for name, path in guard.benchmarks.items():
            loaded = BENCHMARKS[name].load(Path(path) if path is not None else None)
            seen: dict[str, None] = {}
            times: Counter[int] = Counter()
            first: dict[int, str] = {}
            comparable = 0
            questions = {row.question: row.id for row in reversed(loaded.rows)}
            references = {row.extra["reference"]: row.id for row in reversed(loaded.rows) if "reference" in row.extra}
            for text, id_ in (references | questions).items():
                found = set(runs_of_words(text, guard.question_words))
                comparable += bool(found) and text in questions
                times.update(found)
                first |= dict.fromkeys(found, f"{name}:{id_}")
            runs |= {run: first[run] for run, number in times.items() if number <= _QUESTIONS_OF_A_RUN}
            for row in loaded.rows:
                if (case := row.extra.get("case")) is not None:
                    cases.setdefault(str(case), f"{name}:{row.id}")
                for ref in row.images:
                    if ref.sha256 in seen:
                        continue
                    seen[ref.sha256] = None
                    try:
                        image = load_image(ref, row.id).image
                    except BadSample as error:
                        raise UserError(f"dedup.guard.benchmarks: {name}: {error.explanation}") from None
                    pictures.setdefault(*_picture(image, f"{name}:{row.id}"))
            report[name] = {
                "revision": loaded.revision,
                "questions": len(loaded.rows),
                "different_questions": len(questions),
                "comparable_questions": comparable,
                "references": len(references),
                "images": len(seen),
            }
        with whole_file(self._folder / "pictures.parquet") as unfinished:
            pq.write_table(pa.Table.from_pylist(list(pictures.values()), _PICTURES), unfinished)
        table = pa.table({"run": pa.array(list(runs), pa.uint64()), "row": list(runs.values())})
        with whole_file(self._folder / "questions.parquet") as unfinished:
            pq.write_table(table, unfinished)
        with whole_file(self._folder / "cases.parquet") as unfinished:
            pq.write_table(pa.table({"case": list(cases), "row": list(cases.values())}, _CASES), unfinished)
        write_json(self.report_file, report)

    def cases(self) -> dict[str, str]:
        """Key of a case -> evaluation row."""
        rows = pq.read_table(self._folder / "cases.parquet").to_pylist()
        # Backwards, so that of two with one key the first stays.
        return {key: row["row"] for row in reversed(rows) for key in case_keys(row["case"], exactly=True)}

    def questions(self) -> dict[int, str]:
        table = pq.read_table(self._folder / "questions.parquet")
        return dict(zip(table["run"].to_pylist(), table["row"].to_pylist(), strict=True))

    def matches(
        self, ids: pa.StringArray, hashes: Hashes, thumbnails: Callable[[int], Image.Image], settings: Dedup
    ) -> dict[int, tuple[str, int]]:
        """Position of a picture -> the evaluation row that shows it too, and the distance between their hashes."""
        table = pq.read_table(self._folder / "pictures.parquet")
        rows = table["row"].to_pylist()
        same_pixels = pc.index_in(ids, table["id"].combine_chunks())
        shared = np.flatnonzero(same_pixels.is_valid().to_numpy(zero_copy_only=False)).tolist()
        found = {place: (rows[same_pixels[place].as_py()], 0) for place in shared}
        if settings.max_hash_distance > 0:
            known = (as_array(table["phash"]), as_array(table["coarse_phash"]))
            proposed = proposals(known, hashes, settings.max_hash_distance)
            proposed = [proposal for proposal in proposed if proposal[0] not in found]
            small = table["thumbnail"]
            same = same_pictures(proposed, thumbnails, lambda n: thumbnail(small[n].as_py()), settings.min_likeness)
            for place, known_place, distance in same:
                found.setdefault(place, (rows[known_place], distance))
        return found

    def report(self) -> dict[str, dict[str, Any]]:
        return json.loads(self.report_file.read_text(encoding="utf-8"))


def as_array(hashes: pa.ChunkedArray) -> np.ndarray:
    """A column of hashes of one length as uint8 of shape (n, bytes of a hash)."""
    column = hashes.combine_chunks()
    width = column.type.byte_width
    return np.frombuffer(column.buffers()[1], np.uint8, len(column) * width, column.offset * width).reshape(-1, width)


def _picture(image: Image.Image, row: str) -> tuple[str, dict[str, Any]]:
    id_, phash, coarse = fingerprints(image)
    buffer = io.BytesIO()
    shrunk(image).save(buffer, "PNG")
    return id_, {"id": id_, "row": row, "phash": phash, "coarse_phash": coarse, "thumbnail": buffer.getvalue()}


def quoted_question(pair: Pair, questions: Mapping[int, str], length: int) -> str | None:
    """The evaluation row whose question the pair's texts hold, if one."""
    return quoted_row((pair.caption, *pair.context), questions, length)


def quoted_row(texts: Iterable[str], questions: Mapping[int, str], length: int) -> str | None:
    """The first evaluation row of which one of the texts holds a run of words, if one."""
    for text in texts:
        for run in runs_of_words(text, length):
            if run in questions:
                return questions[run]
    return None


class WriteEvaluationSets(PipelineStep):
    type, name = "guard", "evaluation sets"

    def __init__(self, run: RunFolder, guard: Guard):
        super().__init__()
        self.run_folder, self.guard = run, guard

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        EvaluationSets(self.run_folder).write(self.guard)

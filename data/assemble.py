"""Stage assemble: described figures -> Parquet with the images inside, and PubMedVision's own files.

    <out>/<licence class>/alignment/train-00000-of-00002.parquet      (q', d): a fixed request and the description
    <out>/<licence class>/instruction/train-00000-of-00002.parquet    (q, a): the drawn scenario's question and answer
    <out>/<licence class>/human/train-00000-of-00002.parquet          what people wrote, of several sources' rows only
    <out>/<licence class>/PubMedVision_Alignment_VQA.json, PubMedVision_InstructionTuning_VQA.json, images_0.zip, ...

All hold PubMedVision's own columns (plus, in Parquet, where each row comes from), so a recipe reads any with
`adapter: pubmedvision`. Native captions make no questions, hence no instruction rows. A row written in the light of
evidence is of the most restricted class of its own licence and the evidence's.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image, List, Value
from datatrove.pipeline.base import PipelineStep
from PIL import Image as Pillow

from data.config import Assemble
from data.sources.licences import family, licence_name
from data.steps import Pass, ReadPairs
from data.tables import Counts, Pair, RunFolder
from huatuo_vision.caption_requests import caption_request
from huatuo_vision.schema import UserError, escape_placeholder

STAGE, PREVIOUS = "assemble", "reformat"

LicenceClass = Literal["commercial", "noncommercial", "restricted"]
KINDS = ("alignment", "instruction", "human")
JSON_FILES = {
    "alignment": "PubMedVision_Alignment_VQA.json",
    "instruction": "PubMedVision_InstructionTuning_VQA.json",
    "human": "Human_VQA.json",
}
ID_PREFIXES = {"alignment": "Alignment_VQA", "instruction": "Instruction-Tuning_VQA", "human": "Human_VQA"}
PARTS = ".parts"
UNKNOWN = ""  # a label that nobody gave, as PubMedVision's readers expect it: text, and false

_PROVENANCE = (
    "pair", "collection", "article", "title", "figure", "licence", "source", "method", "scenario", "prompt_version",
    "model", "state",
)  # fmt: skip
FEATURES = Features(
    {
        "id": Value("string"),
        "image": List(Image()),
        "conversations": List({"from": Value("string"), "value": Value("string")}),
        "modality": Value("string"),
        "body_part": Value("string"),
        **{name: Value("string") for name in _PROVENANCE},
        "evidence": List(Value("string")),
    }
)

_COMMERCIAL = ("CC0", "Public-Domain", "CC-BY", "CC-BY-SA")
_NONCOMMERCIAL = ("CC-BY-NC", "CC-BY-NC-SA")
_CLASSES: tuple[LicenceClass, ...] = ("commercial", "noncommercial", "restricted")
_DIAGNOSIS_REQUEST = "What is the diagnosis, and why?"
_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "TIFF": "tif", "GIF": "gif", "WEBP": "webp", "BMP": "bmp"}

# What a page of the dataset viewer or a shuffled read fetches at once.
_ROW_GROUP_BYTES = 100 * 2**20
_ROW_GROUP_ROWS = 256


def licence_class(licence: str | None) -> LicenceClass:
    """commercial: CC0, CC BY, CC BY-SA. noncommercial: CC BY-NC, CC BY-NC-SA. restricted: all else, and unknown."""
    name = family(licence_name(licence or "") or "")
    return "commercial" if name in _COMMERCIAL else "noncommercial" if name in _NONCOMMERCIAL else "restricted"


def row_class(pair: Pair) -> LicenceClass:
    """The most restricted of the row's own licence and those of what it was written with."""
    return max((licence_class(licence) for licence in (pair.licence, *pair.evidence_licences)), key=_CLASSES.index)


def assemble_pass(run: RunFolder, settings: Assemble, tasks: int) -> Pass:
    return Pass(
        name=STAGE,
        steps=(ReadPairs(run, PREVIOUS), WriteParts(run, settings.shard_bytes)),
        tasks=tasks,
        settings=settings.model_dump(mode="json"),
        folders=(run.out.relative_to(run.path).as_posix(),),
        finish=partial(finish, run.out, pubmedvision_files=settings.pubmedvision_files),
    )


class WriteParts(PipelineStep):
    """Each task's rows as Parquet files of their own. No row is dropped here."""

    type, name = "writer", "data set"

    def __init__(self, run: RunFolder, shard_bytes: int):
        super().__init__()
        self.run_folder, self.shard_bytes = run, shard_bytes

    def run(self, data: Iterator[Pair], rank: int = 0, world_size: int = 1) -> None:
        started = time.monotonic()
        before = [self.run_folder.rank_counts(PREVIOUS, other).rows_out for other in range(rank + 1)]
        rows = before.pop()
        with self.run_folder.images(rank) as images:
            made = write_part(
                data,
                lambda pair: [images.get(image_id) for image_id in pair.image_ids],
                self.run_folder.out,
                task=rank,
                first_number=sum(before) + 1,
                shard_bytes=self.shard_bytes,
            )
        written = sum(count for name, count in made.items() if name.endswith("/alignment"))
        assert written == rows, f"{rows} rows came, {written} were written"
        self.run_folder.write_counts(STAGE, rank, Counts(rows, rows, {}, dict(made), time.monotonic() - started))


def dataset_rows(pair: Pair, images: Sequence[bytes], number: int) -> dict[str, dict[str, Any]]:
    """kind -> the row of pair `number` (from 1, over the whole data set)."""
    names = [f"images/pmc_{number}_{k}.{_extension(image)}" for k, image in enumerate(images)]
    turns = {"alignment": [(caption_request(pair.id, len(images)), pair.description)]}
    if pair.query is not None:
        turns["instruction"] = [(escape_placeholder(pair.query), pair.answer)]
    if pair.collection and pair.annotated and (human := human_turns(pair, len(images))):
        turns["human"] = human
    return {
        kind: {
            "id": f"{ID_PREFIXES[kind]}_{number}",
            "image": [{"bytes": image, "path": name} for image, name in zip(images, names, strict=True)],
            "conversations": [
                {"from": speaker, "value": text}
                for question, answer in asked
                for speaker, text in (("human", question), ("gpt", answer))
            ],
            "modality": pair.modality or UNKNOWN,
            "body_part": pair.body_part or UNKNOWN,
            "pair": pair.id,
            **{name: getattr(pair, name) for name in _PROVENANCE if name != "pair"},
            "evidence": list(pair.evidence) if kind != "human" else [],
            **({"method": "human", "model": None, "prompt_version": None, "scenario": None} if kind == "human" else {}),
        }
        for kind, asked in turns.items()
    }


def human_turns(pair: Pair, n_images: int) -> list[tuple[str, str]]:
    """What people wrote, word for word: of the pictures given the history, then the discussion, where there is one."""

    def texts(*sections: str) -> str:
        found = (text for text, section in zip(pair.context, pair.sections, strict=True) if section in sections)
        return "\n".join(found)

    request = caption_request(pair.id, n_images)
    if history := texts("history"):
        request = f"History: {escape_placeholder(history)}\n{request}"
    told = "\n".join(filter(None, (pair.caption, texts("", "findings"))))
    turns = [(request, told), (_DIAGNOSIS_REQUEST, texts("discussion"))]
    return [(question, answer) for question, answer in turns if answer]


def write_part(
    pairs: Iterable[Pair],
    read_images: Callable[[Pair], Sequence[bytes]],
    out: Path,
    *,
    task: int,
    first_number: int,
    shard_bytes: int,
) -> Counter[str]:
    """Write one task's rows as files under `out`/.parts; returns the rows by "class/kind" and by what they are.

    What an earlier, killed attempt of the same task left is removed first.
    """
    counts: Counter[str] = Counter()
    for stale in (out / PARTS).glob(f"*/*/{task:05d}-*"):
        stale.unlink()
    writers: dict[tuple[str, str], _Shards] = {}
    try:
        for number, pair in enumerate(pairs, first_number):
            where = row_class(pair)
            for kind, row in dataset_rows(pair, read_images(pair), number).items():
                if (where, kind) not in writers:
                    writers[where, kind] = _Shards(out / PARTS / where / kind, f"{task:05d}", shard_bytes)
                writers[where, kind].write(row)
                counts[f"{where}/{kind}"] += 1
    finally:
        for shards in writers.values():
            shards.close()
    return counts


def finish(out: Path, *, pubmedvision_files: bool) -> None:
    """All tasks' parts -> the files of the data set, under their final names. Interrupted, it starts over."""
    parts = out / PARTS
    if not parts.is_dir():  # all of it was done before
        if not list(out.glob("*/alignment")):
            raise UserError(f"no row is left to assemble in {out}; the funnel says where they were dropped")
        return
    folders = sorted(folder for folder in parts.glob("*/*") if folder.is_dir())
    for folder in folders:
        target = out / folder.relative_to(parts)
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        files = sorted(folder.glob("*.parquet"))
        for n, file in enumerate(files):
            _second_name(file, target / f"train-{n:05d}-of-{len(files):05d}.parquet")
    if pubmedvision_files:
        for where in sorted({folder.parent.name for folder in folders}):
            _write_pubmedvision_files(out / where)
    # From here on the parts are not needed; half a folder of them must not be taken for the whole.
    parts.rename(out / f"{PARTS}-done")
    shutil.rmtree(out / f"{PARTS}-done")


def _second_name(file: Path, name: Path) -> None:
    try:
        os.link(file, name)
    except OSError:  # not every file system has hard links
        shutil.copy2(file, name)


def rows_by_class(out: Path) -> dict[str, dict[str, int]]:
    """Licence class -> kind -> rows of a finished data set."""
    rows: dict[str, dict[str, int]] = {}
    for file in sorted(out.glob("*/*/train-*.parquet")):
        kinds = rows.setdefault(file.parent.parent.name, {})
        kinds[file.parent.name] = kinds.get(file.parent.name, 0) + pq.ParquetFile(file).metadata.num_rows
    return rows


class _Shards:
    """Parquet files of about `shard_bytes`, as the Hub and `datasets` like them."""

    def __init__(self, folder: Path, prefix: str, shard_bytes: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.prefix, self.shard_bytes = folder, prefix, shard_bytes
        self.number = 0
        self.written = 0  # bytes of images in the open file
        self.waiting: list[dict[str, Any]] = []
        self.waiting_bytes = 0
        self.writer: pq.ParquetWriter | None = None

    def write(self, row: dict[str, Any]) -> None:
        self.waiting.append(row)
        self.waiting_bytes += sum(len(image["bytes"]) for image in row["image"])
        if self.waiting_bytes >= min(_ROW_GROUP_BYTES, self.shard_bytes) or len(self.waiting) >= _ROW_GROUP_ROWS:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._end_file()

    def _flush(self) -> None:
        if not self.waiting:
            return
        if self.writer is None:
            path = self.folder / f"{self.prefix}-{self.number:05d}.parquet"
            self.writer = pq.ParquetWriter(
                path, FEATURES.arrow_schema, use_content_defined_chunking=True, write_page_index=True
            )
            self.number += 1
        self.writer.write_table(pa.Table.from_pylist(self.waiting, schema=FEATURES.arrow_schema))
        self.written += self.waiting_bytes
        self.waiting, self.waiting_bytes = [], 0
        if self.written >= self.shard_bytes:
            self._end_file()

    def _end_file(self) -> None:
        if self.writer is not None:
            self.writer.close()
        self.writer, self.written = None, 0


# Below 4 GB, so that every unpacker reads them; the released archives have about 3.
_ARCHIVE_BYTES = 3 * 10**9


def _write_pubmedvision_files(folder: Path) -> None:
    """JSON arrays, a row to a line, and archives of the pictures that they name."""
    pictures = _Archives(folder)
    for kind in KINDS:
        files = sorted((folder / kind).glob("*.parquet"))
        if not files:
            continue
        temporary = folder / f".{JSON_FILES[kind]}.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            separator = "[\n"
            for row in (row for path in files for row in _rows(path)):
                if kind == "alignment":  # all kinds show its pictures
                    for image in row["image"]:
                        pictures.add(image["path"], image["bytes"])
                kept = {name: row[name] for name in ("id", "image", "conversations", "modality", "body_part")}
                kept["image"] = [image["path"] for image in row["image"]]
                file.write(separator + json.dumps(kept, ensure_ascii=False))
                separator = ",\n"
            file.write("\n]\n")
        temporary.replace(folder / JSON_FILES[kind])
    pictures.close()


class _Archives:
    def __init__(self, folder: Path):
        for stale in folder.glob("images_*.zip"):
            stale.unlink()
        self.folder, self.number, self.size = folder, 0, 0
        self.archive: zipfile.ZipFile | None = None

    def add(self, name: str, content: bytes) -> None:
        if self.archive is None:
            self.archive = zipfile.ZipFile(self.folder / f"images_{self.number}.zip", "w", zipfile.ZIP_STORED)
            self.number, self.size = self.number + 1, 0
        # A fixed date: the same rows give the same archive.
        self.archive.writestr(zipfile.ZipInfo(name), content)
        self.size += len(content)
        if self.size >= _ARCHIVE_BYTES:
            self.close()

    def close(self) -> None:
        if self.archive is not None:
            self.archive.close()
        self.archive = None


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for batch in pq.ParquetFile(path).iter_batches(batch_size=64):
        yield from batch.to_pylist()


def _extension(encoded: bytes) -> str:
    with Pillow.open(io.BytesIO(encoded)) as opened:
        return _EXTENSIONS.get(opened.format, "img")

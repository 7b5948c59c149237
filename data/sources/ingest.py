"""The first stage: what a source holds -> the images table, written once, and the pairs that refer to it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
from datatrove.pipeline.base import PipelineStep
from fsspec import AbstractFileSystem

from data.config import Ingest
from data.sources import articles, pairs
from data.sources.dicom import is_dicom, read_dicom
from data.sources.found import Found, Note, refused
from data.sources.images import refuse_blank, store_encoded, store_pixels
from data.steps import Pass
from data.tables import (
    IMAGE_SCHEMA,
    Dropped,
    Pair,
    RowWriter,
    RunFolder,
    StageOutput,
    StoredImage,
    batched,
    row_writer,
    stage_output,
    whole_file,
)
from huatuo_vision.schema import BadSample, UserError

STAGE = "ingest"


def open_source(source: str, settings: Ingest) -> tuple[AbstractFileSystem, str]:
    """The file system and the path in it. Raises UserError where there is nothing."""
    try:
        fs, root = fsspec.core.url_to_fs(source, **settings.storage_options)
        there = settings.articles is not None or fs.exists(root)
    except (ImportError, ValueError, TypeError, OSError) as error:
        raise UserError(f"--source {source} can't be opened ({' '.join(str(error).split())})") from None
    if not there:
        raise UserError(f"--source {source} does not exist; give the folder that holds the articles or pairs")
    return fs, root


def list_units(source: str, settings: Ingest, limit: int | None) -> Iterator[list[dict[str, Any]]]:
    """The units of each task. Raises UserError for a source that holds nothing to read."""
    fs, root = open_source(source, settings)
    if settings.kind == "pairs":
        tasks = ([unit] for unit in pairs.list_chunks(fs, root, settings, limit))
    else:
        tasks = batched(islice(articles.list_articles(fs, root, settings), limit), settings.shard_size)
    empty = True
    for units in tasks:
        empty = False
        yield units
    if empty:
        expected = "*.jsonl or *.parquet" if settings.kind == "pairs" else "JATS (*.xml, *.nxml) or archives of it"
        raise UserError(f"--source {source} holds no {expected}; check the folder and ingest.kind")


def write_plan(run: RunFolder, source: str, settings: Ingest, limit: int | None) -> int:
    """Write down what each task shall read; returns the number of tasks."""
    tasks = 0
    for tasks, units in enumerate(list_units(source, settings, limit), start=1):
        with whole_file(run.units_file(tasks - 1)) as unfinished:
            unfinished.write_text("".join(json.dumps(unit) + "\n" for unit in units), encoding="utf-8")
    return tasks


def ingest_pass(run: RunFolder, source: str, settings: Ingest, limit: int | None, tasks: int) -> Pass:
    return Pass(
        name=STAGE,
        steps=(ReadSource(run, source, settings),),
        tasks=tasks,
        settings=ingest_settings(source, settings, limit),
        folders=("images", f"pairs/{STAGE}", f"dropped/{STAGE}"),
    )


def ingest_settings(source: str, settings: Ingest, limit: int | None) -> dict[str, Any]:
    local = "://" not in source
    where = str(Path(source).resolve()) if local else source
    # Options of the file system may hold keys, and change nothing in what is read.
    return {"address": where, "limit": limit, **settings.model_dump(mode="json", exclude={"storage_options"})}


class ReadSource(PipelineStep):
    """One task of ingest."""

    type, name = "reader", "source"

    def __init__(self, run: RunFolder, source: str, settings: Ingest):
        super().__init__()
        self.run_folder, self.source, self.settings = run, source, settings

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        fs, root = open_source(self.source, self.settings)
        reader = pairs if self.settings.kind == "pairs" else articles
        with (
            stage_output(self.run_folder, STAGE, rank, expected=None) as output,
            row_writer(self.run_folder.images_file(rank), IMAGE_SCHEMA) as images,
        ):
            keeper = _Keeper(output, images, self.settings)
            for line in self.run_folder.units_file(rank).read_text(encoding="utf-8").splitlines():
                for item in reader.read_unit(fs, root, json.loads(line), self.settings):
                    if isinstance(item, Note):
                        output.notes[item.name] += item.count
                    else:
                        keeper.keep(item)


class _Keeper:
    """Stores pictures, each once a task, and writes the rows that have all of theirs."""

    def __init__(self, output: StageOutput, images: RowWriter, settings: Ingest):
        self._output, self._images, self._window = output, images, settings.window
        self._stored: set[str] = set()
        self._ids: set[str] = set()

    def keep(self, item: Found | Dropped) -> None:
        self._output.write(self._row(item) if isinstance(item, Found) else item)

    def _row(self, found: Found) -> Pair | Dropped:
        id_ = found.pair.id
        if id_ in self._ids:
            return Dropped(id_, "duplicate_id", "a row before it has the same id")
        try:
            stored = [self._picture(read(), id_) for read in found.pictures]
        except BadSample as error:
            return refused(error)
        self._ids.add(id_)
        for image, notes in stored:
            self._output.notes.update(f"image_{note}" for note in notes)
            if image.id not in self._stored:
                self._stored.add(image.id)
                self._images.write(image.row(), len(image.data))
        return replace(found.pair, image_ids=tuple(image.id for image, _ in stored))

    def _picture(self, data: bytes, owner: str) -> tuple[StoredImage, tuple[str, ...]]:
        if is_dicom(data):
            picture, how = read_dicom(data, owner, self._window)
            refuse_blank(picture, owner)
            return store_pixels(picture), (how,)
        return store_encoded(data, owner)

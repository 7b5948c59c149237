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

from data.config import Ingest, Source
from data.sources import articles, cases, pairs, volumes
from data.sources.dicom import is_dicom, read_dicom
from data.sources.files import safe_name
from data.sources.found import Found, FoundRows, Note, refused
from data.sources.images import read_deep, refuse_blank, store_encoded, store_pixels
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
_EXPECTED = {
    "articles": "JATS (*.xml, *.nxml) or archives of it",
    "pairs": "*.jsonl, *.csv or *.parquet",
    "cases": f"folder with a {cases.FILE}",
    "volumes": "*.nii, *.nii.gz or folder of DICOM files",
}
_READERS = {"articles": articles, "pairs": pairs, "cases": cases, "volumes": volumes}


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
    """The units of each task; `limit` of each source. Raises UserError for a source that holds nothing to read."""
    fs, root = open_source(source, settings)
    for name in settings.sources or (None,):
        part = settings.part(name)
        where = _part_root(root, settings, name)
        if not fs.exists(where):
            raise UserError(
                f"ingest.sources.{name}: {part.folder} is not in --source {source}; put it there, or remove the source "
                "from the configuration if you may not use it"
            )
        empty = True
        for units in _tasks(fs, where, part, limit):
            empty = False
            yield units if name is None else [{"of": name, **unit} for unit in units]
        if empty:
            key = "ingest.kind" if name is None else f"ingest.sources.{name}.kind"
            shown = source if name is None else f"{source}, folder {part.folder}"
            raise UserError(f"--source {shown} holds no {_EXPECTED[part.kind]}; check the folder and {key}")


def _tasks(fs: AbstractFileSystem, root: str, settings: Source, limit: int | None) -> Iterator[list[dict[str, Any]]]:
    match settings.kind:
        case "pairs":
            # What is left to cut is cut already: a chunk is a task.
            return ([unit] for unit in pairs.list_chunks(fs, root, settings, limit))
        case "articles":
            units = articles.list_articles(fs, root, settings)
        case "cases":
            units = cases.list_cases(fs, root, settings)
        case "volumes":
            units = volumes.list_volumes(fs, root, settings)
    return batched(islice(units, limit), settings.shard_size)


def _part_root(root: str, settings: Ingest, name: str | None) -> str:
    return root if name is None else f"{root.rstrip('/')}/{safe_name(settings.sources[name].folder)}"


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
        with (
            stage_output(self.run_folder, STAGE, rank, expected=None) as output,
            row_writer(self.run_folder.images_file(rank), IMAGE_SCHEMA) as images,
        ):
            keeper = _Keeper(output, images)
            for line in self.run_folder.units_file(rank).read_text(encoding="utf-8").splitlines():
                unit = json.loads(line)
                name = unit.pop("of", None)
                part = self.settings.part(name)
                read = _READERS[part.kind].read_unit(fs, _part_root(root, self.settings, name), unit, part)
                for item in read if name is None else _of_source(read, name, part):
                    if isinstance(item, Note):
                        output.notes[item.name] += item.count
                    else:
                        keeper.keep(item, part)


def _of_source(rows: FoundRows, name: str, settings: Source) -> FoundRows:
    """The rows of one of several sources: called by its name, so that no two sources' ids and cases meet."""
    for row in rows:
        if isinstance(row, Found):
            pair = row.pair
            changed = {"collection": name, "annotated": settings.annotated, "article": f"{name}-{pair.article}"}
            row = Found(replace(pair, id=f"{name}-{pair.id}", **changed), row.pictures)
        elif isinstance(row, Dropped):
            row = replace(row, id=f"{name}-{row.id}")
        yield row


class _Keeper:
    """Stores pictures, each once a task, and writes the rows that have all of theirs."""

    def __init__(self, output: StageOutput, images: RowWriter):
        self._output, self._images = output, images
        self._stored: set[str] = set()
        self._ids: set[str] = set()

    def keep(self, item: Found | Dropped, settings: Source) -> None:
        self._output.write(self._row(item, settings) if isinstance(item, Found) else item)

    def _row(self, found: Found, settings: Source) -> Pair | Dropped:
        id_ = found.pair.id
        if id_ in self._ids:
            return Dropped(id_, "duplicate_id", "a row before it has the same id")
        try:
            stored = [_picture(read(), id_, settings) for read in found.pictures]
        except BadSample as error:
            return replace(refused(error), id=id_)
        self._ids.add(id_)
        for image, notes in stored:
            self._output.notes.update(f"image_{note}" for note in notes)
            if image.id not in self._stored:
                self._stored.add(image.id)
                self._images.write(image.row(), len(image.data))
        return replace(found.pair, image_ids=tuple(image.id for image, _ in stored))


def _picture(data: bytes, owner: str, settings: Source) -> tuple[StoredImage, tuple[str, ...]]:
    if is_dicom(data):
        picture, how = read_dicom(data, owner, settings.window)
        refuse_blank(picture, owner)
        return store_pixels(picture), (how,)
    if settings.window is not None and (deep := read_deep(data, *settings.window, settings.intercept)) is not None:
        refuse_blank(deep, owner)
        return store_pixels(deep), ("deep_window_given",)
    return store_encoded(data, owner)

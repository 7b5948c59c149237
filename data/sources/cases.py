"""Teaching cases as a source: a folder for each, with `case.json` and its pictures (Eurorad's content, in our layout).

    <case>/case.json   {"title", "history", "findings", "discussion", "diagnosis", "licence", "modality",
                        "figures": [{"images": ["a.png", ...], "caption": "...", "modality": "..."}, ...]}

All but `figures` may be missing. Each figure is a row; the folder's name is what the rows of one case share, and what
keeps a case from being evidence for itself. History and findings go with every figure, discussion and diagnosis with
the first alone, so that a long text is not told once a picture.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from fsspec import AbstractFileSystem

from data.config import Source
from data.filters.labels import modality_of
from data.sources.files import FolderFiles, TooLarge
from data.sources.found import Found, FoundRows, slug
from data.sources.pairs import read_picture
from data.sources.text import plain_text
from data.tables import Dropped, Pair

FILE = "case.json"
# Section of a pair's context -> keys of the file that it is made of.
EVERY_FIGURE = {"history": ("history",), "findings": ("findings",)}
FIRST_FIGURE = {"discussion": ("discussion", "diagnosis")}


def list_cases(fs: AbstractFileSystem, root: str, settings: Source) -> Iterator[dict[str, str]]:
    """One unit a case: its folder, relative to `root`."""
    prefix = len(root.rstrip("/")) + 1
    for path in sorted(fs.find(root)):
        if path.endswith(f"/{FILE}"):
            yield {"case": path[prefix : -len(FILE) - 1]}


def read_unit(fs: AbstractFileSystem, root: str, unit: Mapping[str, str], settings: Source) -> FoundRows:
    """A row for each figure of the case."""
    name = slug(unit["case"] or root.rsplit("/", 1)[-1])
    files = FolderFiles(fs, f"{root.rstrip('/')}/{unit['case']}".rstrip("/"))
    try:
        case = json.loads(files.read(FILE))
        if not isinstance(case, dict) or not isinstance(case.get("figures"), list) or not case["figures"]:
            raise ValueError("expected an object with a list of figures")
    except (ValueError, RecursionError, TooLarge, FileNotFoundError) as error:
        yield Dropped(name, "broken_case", f"{FILE}: {' '.join(str(error).split())}")
        return
    licence = _text(case, "licence") or settings.licence or ""
    if not licence:
        yield Dropped(name, "no_licence", f"{FILE} has no licence; set the source's licence if all cases share one")
        return
    for number, figure in enumerate(case["figures"], start=1):
        yield _figure(files, case, figure, name, number, licence, settings)


def _figure(
    files: FolderFiles, case: Mapping[str, Any], figure: object, name: str, number: int, licence: str, settings: Source
) -> Found | Dropped:
    id_ = f"{name}_{number}"
    images = figure.get("images") if isinstance(figure, Mapping) else None
    if not isinstance(images, list) or not images or not all(isinstance(i, str) and i.strip() for i in images):
        return Dropped(id_, "malformed_row", "a figure has no list of image file names in images")
    sections = EVERY_FIGURE | (FIRST_FIGURE if number == 1 else {})
    context = {
        section: " ".join(filter(None, (_text(case, key) for key in keys))) for section, keys in sections.items()
    }
    context = {section: text for section, text in context.items() if text}
    caption = _text(figure, "caption")
    if not caption and not context:
        return Dropped(id_, "no_text", "neither the figure nor the case has a text")
    modality = _text(figure, "modality") or _text(case, "modality")
    pair = Pair(
        id=id_,
        image_ids=(),
        caption=caption,
        context=tuple(context.values()),
        sections=tuple(context),
        label=f"Figure {number}",
        article=name,
        title=_text(case, "title"),
        figure=str(number),
        licence=licence,
        source=_text(case, "source") or settings.source or "",
        modality=modality_of(modality) or settings.modality,
    )
    return Found(pair, tuple(partial(read_picture, files, image.strip(), id_) for image in images))


def _text(values: Mapping[str, Any], key: str) -> str:
    value = values.get(key)
    return plain_text(value)[0] if isinstance(value, str) else ""

"""Articles as sources: PMC's layout (`PMC<id>.<v>/` with XML, JSON and figures), folders of JATS, archives of either.

An article is read where it is, from a local folder or from anything that fsspec opens (s3://pmc-oa-opendata).
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, urlsplit

from fsspec import AbstractFileSystem

from data.config import Ingest
from data.sources.files import (
    ARCHIVE_ERRORS,
    ARCHIVE_SUFFIXES,
    ARTICLE_SUFFIXES,
    Files,
    FolderFiles,
    TooLarge,
    UnsafeName,
    read_archive,
    safe_name,
)
from data.sources.found import Found, FoundRows, Note, slug
from data.sources.jats import BadArticle, JatsArticle, JatsFigure, parse_article
from data.sources.licences import family, licence_name
from data.tables import Dropped, Pair
from huatuo_vision.schema import BadSample, UserError

# An article version in PMC's inventory or in a list.
_PMC_XML = re.compile(r"(PMC\d+\.\d+)/\1\.xml")
_PMC_ID = re.compile(r"PMC\d+\.\d+")


def list_articles(fs: AbstractFileSystem, root: str, settings: Ingest) -> Iterator[dict[str, str]]:
    """One unit an article or archive, in an order that never changes: {"xml": path} or {"archive": path}.

    Paths are relative to `root`. Raises UserError for a list that names nothing.
    """
    if settings.articles is not None:
        yield from _listed(Path(settings.articles))
        return
    prefix = len(root.rstrip("/")) + 1
    for path in sorted(fs.find(root)):
        name, lower = path[prefix:], path.lower()
        if any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts):
            continue
        if lower.endswith(ARTICLE_SUFFIXES):
            yield {"xml": name}
        elif lower.endswith(ARCHIVE_SUFFIXES):
            yield {"archive": name}


def _listed(path: Path) -> Iterator[dict[str, str]]:
    """The articles of a list: names one a line (PMC ids with version, or paths of XML files), or S3's inventory."""
    opener = gzip.open if path.suffix == ".gz" else open
    found = False
    try:
        with opener(path, "rt", encoding="utf-8", newline="") as file:
            for number, cells in enumerate(csv.reader(file), start=1):
                if not cells or not cells[0].strip():
                    continue
                # Inventory: bucket, key, ...; it names every file, of which the articles are meant.
                name = cells[1] if len(cells) > 1 else cells[0].strip()
                if _PMC_ID.fullmatch(name):
                    name = f"{name}/{name}.xml"
                if len(cells) > 1 and not _PMC_XML.fullmatch(name):
                    continue
                if not name.lower().endswith(ARTICLE_SUFFIXES):
                    raise UserError(
                        f"ingest.articles: line {number} of {path} is {name[:80]!r}; expected PMC<id>.<version>, the "
                        "path of an XML file, or an inventory of PMC's bucket"
                    )
                found = True
                yield {"xml": safe_name(name)}
    except (OSError, UnicodeDecodeError, csv.Error, EOFError, UnsafeName) as error:
        raise UserError(f"ingest.articles: {path} can't be read ({' '.join(str(error).split())})") from None
    if not found:
        raise UserError(f"ingest.articles: {path} names no article")


def article_name(xml: str) -> str:
    """The article's name from its XML file's path: the file's stem, behind its folders where they say more."""
    path = PurePosixPath(xml)
    parts = [*path.parent.parts, path.stem]
    if len(parts) > 1 and parts[-1] == parts[-2]:
        parts.pop()
    name = "--".join(parts)
    return slug(name if not any("--" in part for part in parts) else f"{name} {xml}")


def read_unit(fs: AbstractFileSystem, root: str, unit: Mapping[str, str], settings: Ingest) -> FoundRows:
    """All figures of the article or articles of a unit."""
    if "xml" in unit:
        path = PurePosixPath(unit["xml"])
        folder = f"{root.rstrip('/')}/{path.parent.as_posix()}" if path.parent.as_posix() != "." else root
        yield from _article(_folder(fs, folder), path.name, article_name(unit["xml"]), settings)
        return
    name = unit["archive"]
    try:
        data = FolderFiles(fs, root).read(name)
        archive = read_archive(data, name)
    except (*ARCHIVE_ERRORS, TooLarge) as error:
        reason = "archive_too_large" if isinstance(error, TooLarge) else "broken_archive"
        yield Dropped(slug(name), reason, " ".join(str(error).split()))
        return
    for member, reason in sorted(archive.refused.items()):
        yield Note(f"archive_member_{reason}")
        if member.lower().endswith(ARTICLE_SUFFIXES):
            yield Dropped(slug(f"{name}/{member}"), reason, f"member {member[:120]!r} of {name} is not read")
    articles = sorted(n for n in archive.content if n.lower().endswith(ARTICLE_SUFFIXES))
    if not articles and not archive.refused:
        yield Dropped(slug(name), "no_article", f"{name} holds no {' or '.join(ARTICLE_SUFFIXES)} file")
    base = re.sub(r"(?:\.tar)?\.\w+$", "", name)
    for member in articles:
        path = PurePosixPath(member)
        folder = path.parent.as_posix() if path.parent.as_posix() != "." else ""
        # PMC's packages hold one folder of the archive's name.
        inside = member.removeprefix(f"{PurePosixPath(base).name}/")
        whole = base if len(articles) == 1 else f"{base}/{inside}"
        article = article_name(whole if whole.lower().endswith(ARTICLE_SUFFIXES) else f"{whole}.xml")
        yield from _article(archive.below(folder), path.name, article, settings)


@lru_cache(maxsize=2)
def _folder(fs: AbstractFileSystem, folder: str) -> FolderFiles:
    # One folder may hold many articles: it is listed once.
    return FolderFiles(fs, folder)


def _article(files: Files, xml: str, name: str, settings: Ingest) -> FoundRows:
    yield Note("articles")
    try:
        record = _record(files, xml)
        if isinstance(files, FolderFiles) and record.media and "file" not in files.fs.protocol:
            files = FolderFiles(files.fs, files.folder, known=tuple(record.media))
        article = parse_article(files.read(xml))
    except BadArticle as error:
        yield Dropped(name, error.reason, str(error))
        return
    except (FileNotFoundError, TooLarge) as error:
        reason = "xml_too_large" if isinstance(error, TooLarge) else "missing_article"
        yield Dropped(name, reason, str(error))
        return
    yield Note("figures", len(article.figures))
    yield Note("figure_references", article.references)
    yield Note("figure_references_in_paragraphs", article.mentions)
    if article.unresolved:
        yield Note("figure_references_to_no_figure", article.unresolved)
    if article.html_removed:
        yield Note("html_removed", article.html_removed)
    if not article.figures:
        yield Note("articles_without_figures")
    for number, figure in enumerate(article.figures, start=1):
        yield _figure(files, article, figure, name, f"{name}_{slug(figure.id or str(number))}", record, settings)


class _Record:
    """What the JSON beside a PMC article says of it."""

    def __init__(self, values: Mapping[str, Any] | None = None):
        values = values or {}
        self.licence_code = str(values.get("license_code") or "")
        self.retracted = values.get("is_retracted") in (True, "true", "yes", 1)
        self.closed = "is_pmc_openaccess" in values and values["is_pmc_openaccess"] in (False, "false", "no", 0, None)
        self.title = str(values.get("title") or "")
        self.media: dict[str, str] = {}  # name -> MD5, "" where none is given
        urls = values.get("media_urls") or ()
        for url in urls if isinstance(urls, (list, tuple)) else ():
            parts = urlsplit(str(url))
            self.media[PurePosixPath(parts.path).name] = parse_qs(parts.query).get("md5", [""])[0]


def _record(files: Files, xml: str) -> _Record:
    """Raises BadArticle for a record that is no JSON object."""
    try:
        data = files.read(f"{PurePosixPath(xml).stem}.json")
    except FileNotFoundError:
        return _Record()
    try:
        values = json.load(io.BytesIO(data))
    except ValueError as error:
        raise BadArticle("broken_record", f"the JSON beside it is damaged ({error})") from None
    if not isinstance(values, dict):
        raise BadArticle("broken_record", "the JSON beside it is no object")
    return _Record(values)


def _figure(
    files: Files,
    article: JatsArticle,
    figure: JatsFigure,
    article_id: str,
    id_: str,
    record: _Record,
    settings: Ingest,
) -> Found | Dropped:
    if reason := _unusable(article, figure, record, settings):
        return Dropped(id_, *reason)
    pictures: list[Callable[[], bytes]] = []
    for names in figure.graphics:
        try:
            found = files.picture(names)
        except UnsafeName as error:
            return Dropped(id_, "unsafe_path", str(error))
        if found is None:
            return Dropped(id_, "missing_image", f"no picture file for {names[0]!r}")
        pictures.append(partial(_read, files, found, id_, record.media.get(PurePosixPath(found).name, "")))
    pair = Pair(
        id=id_,
        image_ids=(),
        caption=figure.caption,
        context=tuple(mention.text for mention in figure.mentions),
        sections=tuple(mention.section for mention in figure.mentions),
        label=figure.label,
        article=article_id,
        title=article.title or record.title,
        figure=figure.id,
        licence=figure.licence or licence_name(record.licence_code) or "",
        source=article.source,
    )
    return Found(pair, tuple(pictures))


def _unusable(article: JatsArticle, figure: JatsFigure, record: _Record, settings: Ingest) -> tuple[str, str] | None:
    """Reason and detail where a figure may not or can't be used, whatever its pictures are."""
    if record.retracted:
        return "retracted", "the article was retracted"
    if record.closed:
        return "not_open_access", "the record says that the article is not open access"
    if figure.in_sub_article and not settings.sub_articles:
        return "in_sub_article", "it belongs to a decision letter, a response or another part article"
    if figure.licence != article.licence and figure.licence is None:
        return "no_licence", "the figure has permissions of its own that name no open licence"
    stated = licence_name(record.licence_code)
    if record.licence_code and article.licence and (stated is None or family(stated) != family(article.licence)):
        return "licence_conflict", f"the XML says {article.licence}, the record {record.licence_code!r}"
    licence = figure.licence or stated
    if licence is None:
        return "no_licence", "neither the XML nor a record beside it names an open licence"
    if family(licence) not in settings.licences:
        return "licence_not_allowed", licence
    if not figure.graphics:
        return "no_graphic", "the figure has no graphic (a video, a table or text)"
    if not figure.caption and not figure.mentions:
        return "no_text", "it has no caption and no paragraph mentions it"
    return None


def _read(files: Files, name: str, owner: str, md5: str) -> bytes:
    try:
        data = files.read(name)
    except FileNotFoundError:
        raise BadSample(owner, "missing_image", f"{name} is not there") from None
    except TooLarge as error:
        raise BadSample(owner, "image_too_large", str(error)) from None
    if md5 and hashlib.md5(data, usedforsecurity=False).hexdigest() != md5:
        raise BadSample(owner, "checksum_mismatch", f"{name} has another MD5 than its record says; copy it again")
    return data

"""The files that an article may use: its folder's (local or remote, through fsspec), or an archive's, read in place.

No name from an article or an archive leads out of its folder, and nothing is ever unpacked to disk.
"""

from __future__ import annotations

import io
import lzma
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath

from fsspec import AbstractFileSystem

from huatuo_vision.inputs.images import LARGE_ZIP_MEMBER, MAX_ENCODED_BYTES, MAX_ZIP_RATIO

ARTICLE_SUFFIXES = (".xml", ".nxml")
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
# Browsers' formats first: they are smaller, and PMC made them from the others.
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".gif", ".webp", ".bmp")
# What all the files that are read of one archive may take in memory.
MAX_ARCHIVE_BYTES = 2 * 2**30

ARCHIVE_ERRORS = (zipfile.BadZipFile, tarfile.TarError, RuntimeError, EOFError, zlib.error, lzma.LZMAError)
ARCHIVE_ERRORS += (NotImplementedError, ValueError)


class UnsafeName(ValueError):
    """A name that leads out of the folder, or to another machine."""


class TooLarge(ValueError):
    """More than is ever read into memory."""


class Files(ABC):
    """Files by their path below the article's folder."""

    @abstractmethod
    def names(self) -> Iterable[str]: ...

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError, TooLarge, UnsafeName, OSError."""

    @cached_property
    def pictures(self) -> dict[str, tuple[int, str]]:
        """By path without suffix, and by bare name without suffix, in lower case: the best file and its preference."""
        found: dict[str, tuple[int, str]] = {}
        for name in self.names():
            path = PurePosixPath(name)
            if path.suffix.lower() in PICTURE_SUFFIXES:
                entry = (PICTURE_SUFFIXES.index(path.suffix.lower()), name)
                for key in {path.with_suffix("").as_posix().lower(), path.stem.lower()}:
                    found[key] = min(entry, found.get(key, entry))
        return found

    def picture(self, hrefs: Iterable[str]) -> str | None:
        """The file of a graphic that may be named in several ways, with or without its suffix. Raises UnsafeName."""
        found = []
        for href in hrefs:
            path = PurePosixPath(safe_name(href))
            stem = path.with_suffix("") if path.suffix.lower() in PICTURE_SUFFIXES else path
            found += [self.pictures[k] for k in (stem.as_posix().lower(), stem.name.lower()) if k in self.pictures][:1]
        return min(found)[1] if found else None


def safe_name(name: str) -> str:
    """The name as a relative path. Raises UnsafeName."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in name or "\0" in name or not path.name:
        raise UnsafeName(f"the name {name[:120]!r} leads out of the source's folder")
    return path.as_posix()


@dataclass
class FolderFiles(Files):
    """A folder of any file system that fsspec knows."""

    fs: AbstractFileSystem
    folder: str
    known: tuple[str, ...] = ()  # names that a record says: a remote folder then needs no listing

    def names(self) -> Iterable[str]:
        prefix = len(self.folder.rstrip("/")) + 1
        return self.known or [path[prefix:] for path in self.fs.find(self.folder, maxdepth=2)]

    def read(self, name: str) -> bytes:
        path = f"{self.folder.rstrip('/')}/{safe_name(name)}"
        with self.fs.open(path, "rb") as file:
            data = file.read(MAX_ENCODED_BYTES + 1)
        if len(data) > MAX_ENCODED_BYTES:
            raise TooLarge(f"{name} is larger than {MAX_ENCODED_BYTES:,} bytes")
        return data


@dataclass
class ArchiveFiles(Files):
    """The articles and pictures of a zip or tar archive, in memory; `refused` says what was not read, and why."""

    content: dict[str, bytes]
    refused: dict[str, str]  # member -> unsafe_path, archive_bomb, special_file

    def names(self) -> Iterable[str]:
        return self.content

    def read(self, name: str) -> bytes:
        if name not in self.content:
            raise FileNotFoundError(name)
        return self.content[name]

    def below(self, folder: str) -> ArchiveFiles:
        prefix = f"{folder}/" if folder else ""
        return ArchiveFiles({n.removeprefix(prefix): d for n, d in self.content.items() if n.startswith(prefix)}, {})


def read_archive(data: bytes, name: str) -> ArchiveFiles:
    """Raises what ARCHIVE_ERRORS names for a damaged archive."""
    members = _zip_members(data) if name.lower().endswith(".zip") else _tar_members(data)
    files, total = ArchiveFiles({}, {}), 0
    for member, packed, size, special, read in members:
        if member.startswith("__MACOSX/"):
            continue
        try:
            inside = safe_name(member)
        except UnsafeName:
            files.refused[member] = "unsafe_path"
            continue
        if special:
            files.refused[member] = "special_file"
            continue
        if not inside.lower().endswith((*ARTICLE_SUFFIXES, *PICTURE_SUFFIXES, ".json")):
            continue
        bomb = size > max(LARGE_ZIP_MEMBER, MAX_ZIP_RATIO * packed) if packed else size > MAX_ENCODED_BYTES
        if bomb or size > MAX_ENCODED_BYTES or total + size > MAX_ARCHIVE_BYTES:
            files.refused[member] = "archive_bomb"
            continue
        files.content[inside] = read()
        total += size
    return files


def _zip_members(data: bytes) -> Iterator[tuple]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for info in archive.infolist():
            if info.is_dir():
                continue

            def read(info: zipfile.ZipInfo = info) -> bytes:
                with archive.open(info) as file:
                    return file.read(info.file_size)

            # The upper half holds Unix modes; 0o120000 is a symbolic link.
            special = (info.external_attr >> 16) & 0o170000 == 0o120000
            yield info.filename, info.compress_size, info.file_size, special, read


def _tar_members(data: bytes) -> Iterator[tuple]:
    # The whole stream is walked, so a stream that unpacks to more than is ever kept is cut off by its headers' sizes.
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:*") as archive:
        walked = 0
        for info in archive:
            if info.isdir():
                continue
            walked += info.size
            if walked > max(MAX_ARCHIVE_BYTES, MAX_ZIP_RATIO * len(data)):
                raise tarfile.TarError("it unpacks to more than is ever read; it may be a decompression bomb")
            yield info.name, 0, info.size, not info.isreg(), lambda info=info: archive.extractfile(info).read()

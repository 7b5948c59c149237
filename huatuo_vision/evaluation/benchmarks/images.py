"""A benchmark's pictures: files, members of zip archives read in place, and cells of tables. No torch here.

Each is hashed over its encoded bytes when a row names it, so loading a benchmark reads all its pictures once.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any

from huatuo_vision.schema import ImageRef, UserError

# RuntimeError: an encrypted member, or a compression that zipfile lacks.
ZIP_ERRORS = (zipfile.BadZipFile, RuntimeError, OSError, EOFError, zlib.error)


class Images:
    """Finds a benchmark's pictures and hashes their encoded bytes; `check` names all that are missing at once."""

    def __init__(
        self, benchmark: str, root: Path, archives: Sequence[str], folders: Sequence[str], store: Path | None = None
    ):
        """store: where pictures that are cells of a table are kept as files, instead of in memory."""
        self._store = store
        self._benchmark, self._root, self._archives, self._folders = benchmark, root, tuple(archives), tuple(folders)
        self._open = ExitStack()
        self._zips: dict[Path, zipfile.ZipFile] = {}
        self._members: dict[str, list[tuple[Path, str]]] | None = None  # file name -> (archive, member)
        self._files: dict[str, list[Path]] | None = None  # file name -> files in the unpacked folders
        self._named: dict[str, ImageRef] = {}
        self._held: dict[str, ImageRef] = {}  # sha256 -> bytes in memory, or their file
        self._missing: dict[str, None] = {}  # in the order of the rows

    def close(self) -> None:
        self._open.close()

    def named(self, name: str) -> ImageRef:
        """The picture of this name, relative to the folder, an archive or an unpacked archive."""
        if name not in self._named:
            found = self._find(name)
            if found is None:
                self._missing[name] = None
            self._named[name] = found or ImageRef(path=name)
        return self._named[name]

    def names_in(self, folder: str) -> list[str]:
        """The files of a folder, by name, as `named` takes them; none where it is no folder inside the data's own."""
        inside = PurePosixPath(folder)
        if inside.is_absolute() or ".." in inside.parts or not (self._root / inside).is_dir():
            return []
        files = sorted(path.name for path in (self._root / inside).iterdir() if path.is_file())
        return [str(inside / name) for name in files if not name.startswith(".")]

    def encoded(self, value: Any, where: str) -> ImageRef:
        """The picture in the cell of the row at `where`: encoded bytes, or a struct of bytes and path as on the Hub."""
        if isinstance(value, Mapping):
            data, name = value.get("bytes"), value.get("path")
            if not data and isinstance(name, str) and name:
                return self.named(name)
            value = data
        if isinstance(value, str) and value.strip():
            return self.named(value.strip())
        if not isinstance(value, bytes) or not value:
            name = f"the picture of {where.partition(': ')[2]}"
            self._missing[name] = None
            return ImageRef(path=name)
        digest = hashlib.sha256(value).hexdigest()
        if digest not in self._held:
            self._held[digest] = self._stored(value, digest) if self._store else ImageRef(data=value, sha256=digest)
        return self._held[digest]

    def _stored(self, value: bytes, digest: str) -> ImageRef:
        """The picture as a file of the store, which several processes and later runs share."""
        path = self._store / digest[:2] / digest
        try:
            if not path.is_file() or path.stat().st_size != len(value):
                path.parent.mkdir(parents=True, exist_ok=True)
                unfinished = path.with_name(f"{digest}.{os.getpid()}")
                unfinished.write_bytes(value)
                unfinished.replace(path)
        except OSError as error:
            raise UserError(
                f"{self._benchmark}: its pictures cannot be kept in {self._store} ({brief(error)}); make room, or "
                "set HF_HOME to a folder that has some"
            ) from None
        return ImageRef(path=str(path), sha256=digest)

    def check(self) -> None:
        """Raises UserError with the names of all pictures that were asked for and are not there."""
        if not self._missing:
            return
        shown = ", ".join(list(self._missing)[:8]) + (", ..." if len(self._missing) > 8 else "")
        places = [str(self._root)]
        for pattern in self._archives:
            found = [path.name for path in archives_in(self._root, pattern)]
            places.append(", ".join(found) if found else f"{pattern} (not there)")
        places += [f"{folder}/" for folder in self._folders if (self._root / folder).is_dir()]
        raise UserError(
            f"{self._benchmark}: {len(self._missing):,} images are missing: {shown}; looked in {', '.join(places)}; "
            "download the data set again, or put its archive or the unpacked images beside the table"
        )

    def archive(self, path: Path) -> zipfile.ZipFile:
        if path not in self._zips:
            try:
                self._zips[path] = self._open.enter_context(zipfile.ZipFile(path))
            except ZIP_ERRORS as error:
                raise UserError(
                    f"{self._benchmark}: {path} is not a whole zip archive ({brief(error)}); download it again"
                ) from None
        return self._zips[path]

    def _find(self, name: str) -> ImageRef | None:
        inside = PurePosixPath(name.replace("\\", "/"))
        # A name from a data set never leads out of its folder.
        if inside.is_absolute() or ".." in inside.parts or not inside.name:
            return None
        if (self._root / inside).is_file():
            return self._file(self._root / inside)
        members = [place for place in self._all_members().get(inside.name, ()) if _ends(place[1], inside)]
        if members:
            return self._only(name, [self._member(*place) for place in members])
        files = [path for path in self._all_files().get(inside.name, ()) if _ends(path.as_posix(), inside)]
        return self._only(name, [self._file(path) for path in files]) if files else None

    def _only(self, name: str, found: list[ImageRef]) -> ImageRef:
        if len({ref.sha256 for ref in found}) > 1:
            raise UserError(
                f"{self._benchmark}: the image {name} is ambiguous: {found[0].name} and {found[1].name} differ; "
                "leave only the data set's own images there"
            )
        return found[0]

    def _all_members(self) -> dict[str, list[tuple[Path, str]]]:
        if self._members is None:
            self._members = {}
            for path in (path for pattern in self._archives for path in archives_in(self._root, pattern)):
                for info in self.archive(path).infolist():
                    # A Mac's archive holds a second, useless file for each.
                    if not info.is_dir() and not info.filename.startswith("__MACOSX/"):
                        key = PurePosixPath(info.filename).name
                        self._members.setdefault(key, []).append((path, info.filename))
        return self._members

    def _all_files(self) -> dict[str, list[Path]]:
        if self._files is None:
            self._files = {}
            for folder in self._folders:
                for path in sorted((self._root / folder).rglob("*")):
                    if path.is_file():
                        self._files.setdefault(path.name, []).append(path)
        return self._files

    def _file(self, path: Path) -> ImageRef:
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{self._benchmark}: the image {path} cannot be read ({brief(error)})") from None
        return ImageRef(path=str(path), sha256=digest)

    def _member(self, path: Path, member: str) -> ImageRef:
        try:
            with self.archive(path).open(member) as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except ZIP_ERRORS as error:
            raise UserError(
                f"{self._benchmark}: the image {path}!{member} cannot be unpacked ({brief(error)}); download the "
                "archive again"
            ) from None
        return ImageRef(archive=str(path), member=member, sha256=digest)


def archives_in(root: Path, pattern: str) -> list[Path]:
    """The archives of this name in a folder, or one folder deeper."""
    return sorted(root.glob(pattern)) or sorted(root.glob(f"*/{pattern}"))


def brief(error: BaseException) -> str:
    """What another library's error says, in one line."""
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__


def _ends(path: str, name: PurePosixPath) -> bool:
    return path == str(name) or path.endswith(f"/{name}")

"""Sheets that people fill in: CSV with a header, read strictly, written so that no cell is a formula. No torch here."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from huatuo_vision.evaluation.responses import write_whole
from huatuo_vision.schema import UserError

# What a spreadsheet would take for the beginning of a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def read_sheet(path: Path, option: str, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Where each row stands, for messages, and its cells without surrounding white space.

    option: the command's, that named the file. Raises UserError for a file that is not there, is no CSV in UTF-8, or
    lacks a column.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            missing = [column for column in columns if column not in (reader.fieldnames or ())]
            if missing:
                raise UserError(
                    f"{option} {path} has the columns {', '.join(reader.fieldnames or ()) or 'none'}; expected also "
                    f"{', '.join(missing)}"
                )
            for row in reader:
                yield (
                    f"{option} {path}, line {reader.line_num}",
                    {name: (value or "").strip() for name, value in row.items() if isinstance(name, str)},
                )
    except OSError as error:
        raise UserError(f"{option} {path} can't be read ({error.strerror}); give a CSV file") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{option} {path} is no CSV in UTF-8 ({error}); save it as one") from None


def write_sheet(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> None:
    """The rows' columns; text that a spreadsheet would compute gets an apostrophe before it, as people write it."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(
        {name: f"'{value}" if value.startswith(_FORMULA) else value for name, value in row.items()} for row in rows
    )
    write_whole(path, text.getvalue())

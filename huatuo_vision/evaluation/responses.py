"""The evaluation folder's answers on disk: what they answer, which are finished, and the one merged file.

While it runs, process r appends to `responses.rank<r>.jsonl`; at the end all of them become `responses.jsonl`, in
the benchmarks' own order. `eval.json` says whose answers they are. No torch here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from huatuo_vision.schema import UserError

HEADER_FILE = "eval.json"
RESPONSES_FILE = "responses.jsonl"
FIELDS = ("benchmark", "id", "question_type", "question", "options", "answer", "response", "groups", "image_sha256")

Response = dict[str, Any]
Key = tuple[str, str]  # benchmark, id


@dataclass(frozen=True, slots=True)
class Header:
    """Whose answers a folder holds. Only answers of equal headers may stand in one file."""

    model: str
    weights: str  # fingerprint of the model folder
    precision: str
    protocols: dict[str, str]  # benchmark -> hash of the protocol on it
    blind: bool
    limit: int | None


def claim_folder(out: Path, header: Header) -> None:
    """Make `out` the folder of this evaluation; raises UserError where it holds another's answers."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: no folder can be made there ({error.strerror})") from None
    path = out / HEADER_FILE
    if not any(out.glob("responses*.jsonl")):
        write_whole(path, json.dumps(asdict(header), indent=2) + "\n")
        return
    if not path.exists():
        raise UserError(f"{out} holds answers but no {HEADER_FILE} that says whose; give --out a new folder")
    try:
        there = Header(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise UserError(f"{path} is not the header of an evaluation; give --out a new folder") from None
    for name in (field.name for field in fields(Header) if field.name != "model"):
        old, new = getattr(there, name), getattr(header, name)
        if old != new:
            if name == "weights":
                name, old, new = "model", f"{there.model} (weights {old})", f"{header.model} (weights {new})"
            name = "protocol" if name == "protocols" else name
            raise UserError(
                f"{out} holds answers with another {name}: {_said(old)} there, {_said(new)} now; "
                "give --out a new folder or delete this one"
            )


def _said(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def drop_torn_lines(out: Path) -> None:
    """Cut off the unfinished last line that a killed process leaves; its row will be answered again."""
    for path in out.glob("responses*.jsonl"):
        whole = path.read_bytes()
        kept = whole.rfind(b"\n") + 1
        if kept < len(whole):
            os.truncate(path, kept)


def read_responses(path: Path) -> list[Response]:
    """The rows of a responses file. Raises UserError naming the line that is no row, or a row that stands twice."""
    rows: dict[Key, Response] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line:
            continue
        try:
            row = json.loads(line)
        except ValueError:
            raise UserError(f"{path}, line {number}: not JSON; mend or delete the line") from None
        missing = [name for name in FIELDS if name not in row] if isinstance(row, dict) else FIELDS
        if missing:
            raise UserError(f"{path}, line {number}: without {', '.join(missing)}; a row has {', '.join(FIELDS)}")
        key = (row["benchmark"], row["id"])
        if key in rows:
            raise UserError(f"{path}, line {number}: {key[0]} row {key[1]!r} stands there twice; keep one of them")
        rows[key] = row
    return list(rows.values())


def finished(out: Path) -> dict[Key, Response]:
    """Every answer the folder holds, in however many files."""
    found: dict[Key, Response] = {}
    for path in sorted(out.glob("responses*.jsonl")):
        for row in read_responses(path):
            key = (row["benchmark"], row["id"])
            # A kill just after merging leaves the merged rows in their old files too.
            if found.setdefault(key, row) != row:
                raise UserError(
                    f"{out} holds two different answers to {key[0]} row {key[1]!r}; give --out a new folder"
                )
    return found


def append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json_lines(rows))


def merge(out: Path, order: Sequence[Key]) -> list[Response]:
    """All answers as `responses.jsonl`, one for each key, in that order; the files of single processes go."""
    found = finished(out)
    if missing := [key for key in order if key not in found]:
        raise UserError(f"{out} lacks {len(missing)} answers, first {missing[0][1]!r}; run the same command again")
    if unknown := found.keys() - set(order):
        raise UserError(
            f"{out} holds an answer to {min(unknown)[1]!r}, which the benchmark does not have; give --out a new folder"
        )
    rows = [found[key] for key in order]
    write_whole(out / RESPONSES_FILE, json_lines(rows))
    for path in out.glob("responses.rank*.jsonl"):
        path.unlink()
    return rows


def json_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is never seen half written."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)

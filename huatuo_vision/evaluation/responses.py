"""The evaluation folder's answers on disk: what they answer, which are finished, and the one merged file.

While it runs, each writer appends to a file of its own (`responses.rank<r>.jsonl`, `responses.endpoint.jsonl`); at the
end all of them become `responses.jsonl`, in the benchmarks' own order. `eval.json` says whose answers they are.
No torch here.
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
    weights: str | None  # fingerprint of the model folder; None behind an endpoint
    precision: str | None
    backend: str | None  # None: a file that does not say how it was made
    protocol: str
    protocols: dict[str, str]  # benchmark -> hash of the protocol on its rows
    revisions: dict[str, str]  # benchmark -> which data
    blind: bool
    limit: int | None
    scoring: str  # generate or likelihood
    rotated: bool  # whether every order of the options was asked
    controls: bool = False  # whether questions were asked with less to see besides


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
    there = read_header(out)
    # A folder may have been moved: its model is its weights. Behind an endpoint the name is all there is.
    compared = [field.name for field in fields(Header) if field.name != "model" or header.weights is None]
    for name in compared:
        old, new = getattr(there, name), getattr(header, name)
        if old != new:
            if name == "weights":
                name, old, new = "model", f"{there.model} (weights {old})", f"{header.model} (weights {new})"
            name = {"protocols": "protocol or set of benchmarks", "revisions": "data revision"}.get(name, name)
            raise UserError(
                f"{out} holds answers with another {name}: {_said(old)} there, {_said(new)} now; "
                "give --out a new folder or delete this one"
            )


def read_header(out: Path) -> Header:
    """Whose answers a folder holds. Raises UserError where it does not say."""
    path = out / HEADER_FILE
    try:
        return Header(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{out} holds answers but no {HEADER_FILE} that says whose; give --out a new folder") from None
    except (ValueError, TypeError):
        raise UserError(f"{path} is not the header of an evaluation; give --out a new folder") from None


def take(out: Path, header: Header, rows: Sequence[Response], *, source: Path) -> None:
    """Make `out` the folder of the rows of a file from elsewhere; raises UserError where it holds other answers."""
    target = out / RESPONSES_FILE
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: no folder can be made there ({error.strerror})") from None
    if target.exists() and target.resolve() != source.resolve() and read_responses(target) != rows:
        raise UserError(f"{target} holds other answers than {source}; give --out a new folder")
    write_whole(out / HEADER_FILE, json.dumps(asdict(header), indent=2) + "\n")
    if not target.exists():
        write_whole(target, json_lines(rows))


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
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read as UTF-8 text ({error}); give a responses file in JSON Lines") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError:
            raise UserError(f"{where}: not JSON; mend or delete the line") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: no object; expected one JSON object a line, with {', '.join(FIELDS)}")
        missing = [name for name in FIELDS if name not in row]
        if missing:
            raise UserError(f"{where}: without {', '.join(missing)}; a row has {', '.join(FIELDS)}")
        _check_types(row, where)
        key = (row["benchmark"], row["id"])
        if key in rows:
            raise UserError(f"{where}: {key[0]} row {key[1]!r} stands there twice; keep one of them")
        rows[key] = row
    return list(rows.values())


def _check_types(row: Response, where: str) -> None:
    """Raises UserError for a field of another type than the format says; what the values mean is the rules' affair."""

    def strings(value: object) -> bool:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)

    groups = row["groups"]
    expected = {
        "benchmark": ("a string", isinstance(row["benchmark"], str)),
        "id": ("a string", isinstance(row["id"], str)),
        "question": ("a string", isinstance(row["question"], str)),
        "response": ("a string, empty where the model said nothing", isinstance(row["response"], str)),
        "options": ("a list of strings, or null", row["options"] is None or strings(row["options"])),
        "answer": ("a string, or a list of strings", isinstance(row["answer"], str) or strings(row["answer"])),
        "groups": (
            "an object of strings",
            isinstance(groups, dict) and all(isinstance(value, str) for value in groups.values()),
        ),
        "image_sha256": ("a list of strings", strings(row["image_sha256"])),
    }
    for name, (kind, right) in expected.items():
        if not right:
            got = json.dumps(row[name], ensure_ascii=False)
            got = got if len(got) <= 80 else f"{got[:80]}..."
            hint = ""
            if name == "options" and isinstance(row[name], str):
                hint = "; it looks like a list written as text: write it as a JSON list"
            raise UserError(f"{where}: {name} is {got}; expected {kind}{hint}")


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
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
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
    for path in out.glob("responses.*.jsonl"):
        path.unlink()
    return rows


def json_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is never seen half written."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    # Half a surrogate pair, which a cut reply may hold, is no UTF-8; escaped it is JSON and reads back as it was.
    unfinished.write_text(text, encoding="utf-8", errors="backslashreplace")
    unfinished.replace(path)

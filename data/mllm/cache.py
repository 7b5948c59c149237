"""The answers that were paid for, in SQLite files that survive a kill: no request is paid for twice.

Every task writes a file of its own and reads those of all others, so answers are found again whatever task a row
falls to after the number of tasks changed, and whoever asked: an online run, an estimate, or a collected batch.
An answer is committed before anything is done with it.
"""

from __future__ import annotations

import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path

from data.config import Prices
from data.mllm.answers import State
from huatuo_vision.schema import UserError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT, attempt INTEGER,                      -- 1, or 2 when asked again
    state TEXT, text TEXT, problem TEXT,
    finish_reason TEXT, prompt_tokens INTEGER, cached_tokens INTEGER, new_tokens INTEGER,
    batch INTEGER, model TEXT, seconds REAL, at REAL,
    PRIMARY KEY (key, attempt)
);
CREATE TABLE IF NOT EXISTS failures (key TEXT PRIMARY KEY, error TEXT, at REAL);
"""
_COLUMNS = (
    "key", "attempt", "state", "text", "problem", "finish_reason", "prompt_tokens", "cached_tokens", "new_tokens",
    "batch", "model", "seconds",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Kept:
    """One paid answer."""

    key: str
    attempt: int
    state: State
    text: str
    problem: str | None
    finish_reason: str | None
    prompt_tokens: int | None  # None where the endpoint does not count
    cached_tokens: int | None
    new_tokens: int | None
    batch: bool
    model: str | None
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Usage:
    """What a set of answers took."""

    answers: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    uncounted: int = 0  # answers for which the endpoint gave no counts

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))

    def cost(self, prices: Prices, *, batch: bool = False) -> float:
        """In the prices' currency."""
        cached_price = prices.input if prices.cached_input is None else prices.cached_input
        full = (
            (self.prompt_tokens - self.cached_tokens) * prices.input
            + self.cached_tokens * cached_price
            + self.new_tokens * prices.output
        ) / 1e6
        return full * (1 - prices.batch_discount) if batch else full


class AnswerCache:
    """The files `answers-*.sqlite` of a folder; `writer` names the one that this process writes, if it writes any."""

    def __init__(self, folder: Path, writer: str | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._own = None if writer is None else self._open(folder / f"answers-{writer}.sqlite", write=True)
        self._files = {} if writer is None else {folder / f"answers-{writer}.sqlite": self._own}
        self._look_for_others()

    def __enter__(self) -> AnswerCache:
        return self

    def __exit__(self, *exception: object) -> None:
        for connection in self._files.values():
            connection.close()

    def find(self, key: str) -> dict[int, Kept]:
        """Attempt -> the answer, of all that were paid for under this key."""
        found: dict[int, Kept] = {}
        for connection in self._files.values():
            query = f"SELECT {', '.join(_COLUMNS)} FROM answers WHERE key = ?"
            for row in connection.execute(query, (key,)):
                kept = Kept(*row[:9], bool(row[9]), *row[10:])
                found.setdefault(kept.attempt, kept)
        return found

    def keep(self, kept: Kept) -> None:
        """Commit an answer; one that is there already stays."""
        values = [getattr(kept, name) for name in _COLUMNS]
        with self._own:
            marks = ", ".join("?" * (len(_COLUMNS) + 1))
            self._own.execute(
                f"INSERT OR IGNORE INTO answers ({', '.join(_COLUMNS)}, at) VALUES ({marks})", (*values, time.time())
            )
            self._own.execute("DELETE FROM failures WHERE key = ?", (kept.key,))

    def keep_failure(self, key: str, error: str) -> None:
        with self._own:
            self._own.execute("INSERT OR REPLACE INTO failures VALUES (?, ?, ?)", (key, error, time.time()))

    def failure(self, key: str) -> str | None:
        """What the last request under this key failed with, if nothing was ever answered."""
        for connection in self._files.values():
            if row := connection.execute("SELECT error FROM failures WHERE key = ?", (key,)).fetchone():
                return row[0]
        return None

    def usage(self) -> dict[bool, Usage]:
        """What all answers of the folder took, by whether they came in a batch. Looks for other writers' new files."""
        self._look_for_others()
        total = {False: Usage(), True: Usage()}
        for connection in self._files.values():
            for batch, *counts in connection.execute(
                "SELECT batch, COUNT(*), TOTAL(prompt_tokens), TOTAL(cached_tokens), TOTAL(new_tokens), "
                "SUM(prompt_tokens IS NULL OR new_tokens IS NULL) FROM answers GROUP BY batch"
            ):
                total[bool(batch)] += Usage(*map(int, counts))
        return total

    def _look_for_others(self) -> None:
        for path in sorted(self.folder.glob("answers-*.sqlite")):
            if path not in self._files:
                self._files[path] = self._open(path, write=False)

    @staticmethod
    def _open(path: Path, *, write: bool) -> sqlite3.Connection:
        connection = sqlite3.connect(path, timeout=60)
        try:
            # A reader of a file that is being made finds its tables too.
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.executescript(_SCHEMA)
            if not write:
                connection.execute("PRAGMA query_only = ON")
        except sqlite3.DatabaseError as error:
            connection.close()
            raise UserError(
                f"{path} can't be read as a cache of answers ({error}); restore it from a copy, or move it away and "
                "pay for its answers again"
            ) from None
        return connection


def spent(usage: dict[bool, Usage], prices: Prices) -> float:
    """In the prices' currency."""
    return sum(part.cost(prices, batch=batch) for batch, part in usage.items())

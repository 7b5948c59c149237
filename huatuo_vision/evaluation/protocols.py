"""A protocol: everything besides the model that a score depends on, as one value with a hash."""

from __future__ import annotations

import hashlib
import json
import string
from dataclasses import asdict, dataclass
from pathlib import Path

from huatuo_vision.evaluation.benchmarks import Benchmark, Row
from huatuo_vision.evaluation.scorers import PARSER_VERSION

PROMPTS = Path(__file__).parent / "prompts"


@dataclass(frozen=True, slots=True)
class Decoding:
    """The generation settings of transformers' GenerationConfig; nothing is taken from the checkpoint's own."""

    do_sample: bool
    num_beams: int
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class Protocol:
    name: str
    prompt: str  # str.format template with {question} and {options}
    decoding: Decoding
    parser_version: int

    def render(self, row: Row) -> str:
        """The text a model is asked, images apart (the paper, appendix E)."""
        options = "\n".join(
            f"{letter}. {text}" for letter, text in zip(string.ascii_uppercase, row.options, strict=False)
        )
        return self.prompt.format(question=row.question, options=options)

    @property
    def hash(self) -> str:
        """16 hex digits over prompt, decoding and parser."""
        return _digest(asdict(self))

    def hash_on(self, benchmark: Benchmark) -> str:
        """16 hex digits over the protocol and which rows it is applied to: equal hashes compare."""
        rows = {
            "benchmark": benchmark.name,
            "revision": benchmark.revision,
            "row_filter": benchmark.row_filter,
            "expected_n": benchmark.expected_n,
        }
        return _digest(asdict(self) | rows)


def _digest(values: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


DEFAULT = Protocol(
    name="default",
    prompt=(PROMPTS / "default.txt").read_text(encoding="utf-8").rstrip("\n"),
    decoding=Decoding(do_sample=False, num_beams=1, max_new_tokens=16),
    parser_version=PARSER_VERSION,
)

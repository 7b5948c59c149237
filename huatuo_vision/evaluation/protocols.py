"""Protocols: everything besides the model that a score depends on, as values with a hash. No torch here.

A protocol is data: prompts, decoding, and the names of the rules that read replies (`scorers.CHOICE_RULES` and
`scorers.OPEN_RULES`). Adding one is adding an entry to PROTOCOLS.
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from huatuo_vision.evaluation.rows import HIDDEN, Benchmark, Row
from huatuo_vision.schema import UserError

PROMPTS = Path(__file__).parent / "prompts"


@dataclass(frozen=True, slots=True)
class Decoding:
    """The generation settings; nothing is taken from the checkpoint's own."""

    max_new_tokens: int
    temperature: float = 0.0  # 0: greedy
    repetition_penalty: float = 1.0  # over new tokens only: over the prompt it would punish the options' letters
    seed: int = 0  # of sampling; each row draws from a stream of its own


@dataclass(frozen=True, slots=True)
class Protocol:
    name: str
    # str.format templates with {question} and {options}, by kind of question: "open", "multiple-choice", and
    # "yes-no" where yes/no questions are asked in words of their own.
    prompts: Mapping[str, str]
    option: str  # str.format template of one option, with {letter} and {text}
    decoding: Decoding
    choice_rule: str
    open_rule: str
    rules_version: int  # goes up whenever one of its rules would read any reply differently
    note: str  # its known defects; shown beside every number
    withhold_options: bool = False  # rows with options are asked openly; the gold option's text is what is accepted
    explains: bool = False  # its prompt asks for reasons, which a rubric judge may then mark

    def asked(self, row: Row) -> Row:
        """The row as this protocol asks it. Raises UserError for options that can't be withheld."""
        if not self.withhold_options or row.options is None:
            return row
        if row.extra.get("options_in_image"):
            raise UserError(
                f"{row.benchmark} shows its options in the picture, so --protocol {self.name} can't withhold them; "
                "choose another protocol"
            )
        answer = row.answer if row.answer == HIDDEN else row.options[string.ascii_uppercase.index(row.answer)]
        extra = {**row.extra, "withheld_options": list(row.options)}
        return replace(row, question_type="open", options=None, answer=answer, extra=extra)

    def render(self, row: Row) -> str:
        """The text a model is asked, images apart."""
        if row.options is None:
            return self.prompts["open"].format(question=row.question)
        yes_no = {option.strip().casefold() for option in row.options} == {"yes", "no"}
        kind = "yes-no" if yes_no and "yes-no" in self.prompts else "multiple-choice"
        # The picture itself shows the options; they stand in the row so that replies can be read.
        shown = () if row.extra.get("options_in_image") else row.options
        options = "\n".join(
            self.option.format(letter=letter, text=text)
            for letter, text in zip(string.ascii_uppercase, shown, strict=False)
        )
        return self.prompts[kind].format(question=row.question, options=options)

    @property
    def hash(self) -> str:
        """16 hex digits over prompts, decoding and rules."""
        return _digest(self._identity())

    def hash_on(self, benchmark: Benchmark, revision: str) -> str:
        """16 hex digits over the protocol and which rows it is applied to: equal hashes compare."""
        rows = {
            "benchmark": benchmark.name,
            "revision": revision,
            "row_filter": benchmark.row_filter,
            "expected_n": benchmark.expected_n,
        }
        return _digest(self._identity() | rows)

    def _identity(self) -> dict[str, object]:
        identity = {key: value for key, value in asdict(self).items() if key not in ("note", "explains")}
        # Protocols that show the options keep the hash that they had before any withheld them.
        return identity if self.withhold_options else {k: v for k, v in identity.items() if k != "withhold_options"}


def _digest(values: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _prompt(name: str) -> str:
    return (PROMPTS / f"{name}.txt").read_text(encoding="utf-8").rstrip("\n")


_LETTER = _prompt("letter")  # the paper, appendix E

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="default",
            prompts={"multiple-choice": _LETTER, "open": _prompt("short")},
            option="{letter}. {text}",
            decoding=Decoding(max_new_tokens=32),
            choice_rule="default",
            open_rule="default",
            rules_version=3,
            note="Greedy. A reply that does not clearly choose one option is unparsed, and never counted as correct.",
        ),
        Protocol(
            name="huatuo-2024",
            prompts={"multiple-choice": _LETTER, "open": _prompt("short")},
            option="{letter}. {text}",
            decoding=Decoding(max_new_tokens=256, temperature=0.2, repetition_penalty=1.2, seed=42),
            choice_rule="huatuo-first-letter",
            open_rule="default",
            rules_version=2,
            note=(
                "The paper's rule, defects included: the first standalone letter a to n of the reply counts, "
                "case-sensitive ('b' is wrong, 'I think C' reads I). The official scorer aborts at a reply without a "
                "letter; here such a reply is unparsed. It samples at temperature 0.2; one seed is one draw. The "
                "paper scored no open question; open rows here are graded by the default rule."
            ),
        ),
        Protocol(
            name="mmmu-official",
            prompts={"multiple-choice": _prompt("mmmu_letter"), "open": _prompt("mmmu_open")},
            option="({letter}) {text}",
            decoding=Decoding(max_new_tokens=128),
            choice_rule="mmmu-official",
            open_rule="mmmu-official",
            rules_version=1,
            note=(
                "MMMU's own rules. Where the official code would draw a random letter the row is unparsed, and the "
                "expectation of that draw is printed beside the accuracy."
            ),
        ),
        Protocol(
            name="llava-med",
            prompts={
                "multiple-choice": _LETTER,
                "yes-no": _prompt("llava_med_closed"),
                "open": "{question}",
            },
            option="{letter}. {text}",
            decoding=Decoding(max_new_tokens=128),
            choice_rule="llava-med-closed",
            open_rule="llava-med-recall",
            rules_version=2,
            note=(
                "LLaVA-Med's published metrics: a closed answer counts where the reply contains the gold word as a "
                "substring ('abnormal' contains 'no'); the accuracy of open questions is token recall, which rewards "
                "long replies."
            ),
        ),
        Protocol(
            name="open",
            prompts={"open": _prompt("short")},
            option="{letter}. {text}",
            decoding=Decoding(max_new_tokens=32),
            choice_rule="default",
            open_rule="default",
            rules_version=3,
            note=(
                "Greedy. No option is shown: the right option's text is the accepted answer. A question that points at "
                "its options (which of the following) can't be answered so, and counts as wrong; read token recall "
                "beside the accuracy, which asks for the same words."
            ),
            withhold_options=True,
        ),
        Protocol(
            name="explain",
            prompts={"multiple-choice": _prompt("explain"), "open": _prompt("short")},
            option="{letter}. {text}",
            decoding=Decoding(max_new_tokens=1024),
            choice_rule="answer-line",
            open_rule="default",
            rules_version=1,
            note=(
                "Greedy. Choose one option, then explain. The lines that begin with 'Answer' are what is read, and the "
                "whole reply only where there is none; lines that name different options are unparsed."
            ),
            explains=True,
        ),
    )
}

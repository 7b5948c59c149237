"""Proof of the rules before use: the right answer in many forms, no answer, and always the same letter. No torch here.

The default rules must read every form of every row, credit no blank and no refusal, and give a constant letter just
its share of the gold answers. The published rules have known defects; theirs are shown, and fail nothing.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from huatuo_vision.evaluation.choices import equal_options
from huatuo_vision.evaluation.protocols import PROTOCOLS, Protocol
from huatuo_vision.evaluation.rows import HIDDEN
from huatuo_vision.evaluation.scorers import judge

Form = Callable[[str, str, Sequence[str]], str]
Counts = dict[str, tuple[int, int]]  # form -> right, rows


def _all_options(options: Sequence[str]) -> str:
    return "\n".join(f"{letter}. {text}" for letter, text in zip(string.ascii_uppercase, options, strict=False))


def _reasoned(letter: str, text: str, options: Sequence[str]) -> str:
    return f"A closer look at the image helps. I compared all {len(options)} options. Therefore the answer is {letter}"


def _others_wrong(letter: str, text: str, options: Sequence[str]) -> str:
    other = string.ascii_uppercase[letter == "A"]
    return f"The answer is ({letter}). The other options such as ({other}) are wrong."


# Letter, text and all options -> a reply that chooses them. What comes of the letter alone stands first.
FORMS: dict[str, Form] = {
    "B": lambda letter, text, options: letter,
    "(B)": lambda letter, text, options: f"({letter})",
    "B.": lambda letter, text, options: f"{letter}.",
    "B)": lambda letter, text, options: f"{letter})",
    "**B**": lambda letter, text, options: f"**{letter}**",
    "b": lambda letter, text, options: letter.lower(),
    "full-width B": lambda letter, text, options: chr(ord(letter) + 0xFEE0),
    "Option B": lambda letter, text, options: f"Option {letter}",
    "The answer is B": lambda letter, text, options: f"The answer is {letter}",
    "The answer is B.": lambda letter, text, options: f"The answer is {letter}.",
    "The correct answer is (B).": lambda letter, text, options: f"The correct answer is ({letter}).",
    "Answer: B": lambda letter, text, options: f"Answer: {letter}",
    "Answer: b": lambda letter, text, options: f"Answer: {letter.lower()}",
    "**Final answer:** B": lambda letter, text, options: f"**Final answer:** {letter}",
    "I would go with (B).": lambda letter, text, options: f"I would go with ({letter}).",
    r"\boxed{B}": lambda letter, text, options: rf"\boxed{{{letter}}}",
    r"$\boxed{\text{B}}$": lambda letter, text, options: rf"The answer is $\boxed{{\text{{{letter}}}}}$.",
    '{"answer": "B"}': lambda letter, text, options: f'{{"answer": "{letter}"}}',
    "<answer>B</answer>": lambda letter, text, options: f"<answer>{letter}</answer>",
    "thoughts, then B": lambda letter, text, options: f"<think>Perhaps A. Or B?</think>\n{letter}",
    "reasons, then the answer": _reasoned,
    "So, B.": lambda letter, text, options: f"The image was read with care. So, {letter}.",
    "the other options are wrong": _others_wrong,
    "all options, then the answer": lambda letter, text, options: (
        f"{_all_options(options)}\nThe correct answer is ({letter})."
    ),
    "答案是B": lambda letter, text, options: f"答案是{letter}",
    "答案：B": lambda letter, text, options: f"答案：{letter}",
    "故选B。": lambda letter, text, options: f"故选{letter}。",
    "正确答案为（B）": lambda letter, text, options: f"正确答案为（{letter}）",
    "B. text": lambda letter, text, options: f"{letter}. {text}",
    "B: text": lambda letter, text, options: f"{letter}: {text}",
    "B) text": lambda letter, text, options: f"{letter}) {text}",
    "(B) text": lambda letter, text, options: f"({letter}) {text}",
    "**B. text**": lambda letter, text, options: f"**{letter}. {text}**",
    "The answer is B. text": lambda letter, text, options: f"The answer is {letter}. {text}",
}
# The option's text without its letter: names no option where two have the same text.
TEXT_FORMS: dict[str, Form] = {
    "text": lambda letter, text, options: text,
    "The answer is text.": lambda letter, text, options: f"The answer is {text}.",
    "text in a sentence": lambda letter, text, options: f"I believe that this picture shows {text} here.",
}
OPEN_FORMS: dict[str, Callable[[str], str]] = {
    "gold": lambda gold: gold,
    "gold.": lambda gold: f"{gold}.",
    "GOLD": lambda gold: gold.upper(),
    "The answer is gold.": lambda gold: f"The answer is {gold}.",
    "Answer: gold": lambda gold: f"Answer: {gold}",
    "答案是gold": lambda gold: f"答案是{gold}",
}
SILENCE = {
    "blank": "",
    "white space": " \n",
    "I cannot determine the answer ...": "I cannot determine the answer from this image.",
    "As an AI ...": "As an AI language model, I am unable to give a medical diagnosis.",
    "I'm sorry ...": "I'm sorry, but I can't help with that.",
    "I do not know.": "I do not know.",
    "无法确定": "抱歉，我无法确定答案。",
}


@dataclass(frozen=True, slots=True)
class Proof:
    """What one protocol's rules made of the forms."""

    protocol: str
    forms: Counts  # must all be right
    silence: Counts  # must none be right
    constant: dict[str, tuple[int, int]]  # letter -> rows credited to it, rows whose gold it is
    failures: tuple[str, ...]  # the first of them, each a sentence

    @property
    def perfect(self) -> bool:
        return not self.failures


@dataclass(frozen=True, slots=True)
class SelfTest:
    rows: int
    proofs: tuple[Proof, ...]
    left_out: tuple[str, ...]  # rows whose gold text is another option's too: text forms can't name it

    @property
    def passed(self) -> bool:
        return all(proof.perfect for proof in self.proofs if proof.protocol == "default")


def run(
    rows_by_benchmark: Mapping[str, Iterable[Mapping[str, Any]]] | None = None,
    protocols: Sequence[Protocol] = tuple(PROTOCOLS.values()),
) -> SelfTest:
    """Try the rules of `protocols` on rows of benchmarks (responses without a response), or on rows made for it."""
    given = {"built-in": BUILT_IN} if rows_by_benchmark is None else rows_by_benchmark
    rows = [dict(row, benchmark=name) for name, some in given.items() for row in some if row["answer"] != HIDDEN]
    left_out = tuple(f"{row['benchmark']} row {row['id']!r}" for row in rows if not _text_names_gold(row))
    return SelfTest(len(rows), tuple(_prove(protocol, rows) for protocol in protocols), left_out)


def _text_names_gold(row: Mapping[str, Any]) -> bool:
    """Whether the text alone says which option is meant: it is no other option's, and no other option's letter."""
    if row["options"] is None:
        return True
    text = _gold_text(row)
    letter = re.fullmatch(r"\W*([A-Za-z])\W*", text)
    other_letter = letter and letter[1].upper() in string.ascii_uppercase[: len(row["options"])].replace(
        row["answer"], ""
    )
    return (
        re.search(r"\w", text) is not None and row["answer"] not in equal_options(row["options"]) and not other_letter
    )


def _gold_text(row: Mapping[str, Any]) -> str:
    return row["options"][string.ascii_uppercase.index(row["answer"])]


def _replies(row: Mapping[str, Any]) -> dict[str, str]:
    """Form -> a reply in that form that chooses the gold answer."""
    if row["options"] is None:
        gold = row["answer"] if isinstance(row["answer"], str) else row["answer"][0]
        return {name: form(gold) for name, form in OPEN_FORMS.items()}
    forms = FORMS | (TEXT_FORMS if _text_names_gold(row) else {})
    return {name: form(row["answer"], _gold_text(row), row["options"]) for name, form in forms.items()}


@dataclass(slots=True)
class _Tally:
    right: Counter[str] = field(default_factory=Counter)
    rows: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, right: bool) -> None:
        self.rows[name] += 1
        self.right[name] += right

    def counts(self) -> Counts:
        return {name: (self.right[name], rows) for name, rows in self.rows.items()}


def _prove(protocol: Protocol, rows: Sequence[Mapping[str, Any]]) -> Proof:
    forms, silence, failures = _Tally(), _Tally(), []

    def credited(row: Mapping[str, Any], reply: str) -> bool:
        return judge({**row, "response": reply}, protocol).verdict == "correct"

    for row in rows:
        for name, reply in _replies(row).items():
            right = credited(row, reply)
            forms.add(name, right)
            if not right:
                failures.append(f"{row['benchmark']} row {row['id']!r}: {reply!r} is not read as {row['answer']!r}")
        for name, reply in SILENCE.items():
            right = credited(row, reply)
            silence.add(name, right)
            if right:
                failures.append(f"{row['benchmark']} row {row['id']!r}: {reply!r} is credited")
    constant = {}
    choices = [row for row in rows if row["options"] is not None]
    for letter in string.ascii_uppercase[: max((len(row["options"]) for row in choices), default=0)]:
        credit = sum(credited(row, letter) for row in choices)
        share = sum(row["answer"] == letter for row in choices)
        constant[letter] = (credit, share)
        if credit != share:
            failures.append(f"always {letter!r} is credited {credit} times, but is the gold answer of {share} rows")
    return Proof(protocol.name, forms.counts(), silence.counts(), constant, tuple(failures))


def show(result: SelfTest, console: Console) -> None:
    """Print form by form what each protocol's rules credit, and what the default rules get wrong."""
    table = Table(title=f"Replies credited, of {result.rows} rows", title_justify="left")
    table.add_column("reply (where the right answer is B)")
    for proof in result.proofs:
        table.add_column(proof.protocol, justify="right")
    for part in ("forms", "silence"):
        for name in getattr(result.proofs[0], part):
            table.add_row(name, *(_share(*getattr(proof, part)[name]) for proof in result.proofs))
        table.add_section()
    for letter in result.proofs[0].constant:
        table.add_row(f"always {letter}", *(_share(*proof.constant[letter]) for proof in result.proofs))
    console.print(table)
    if result.left_out:
        rows = "1 row" if len(result.left_out) == 1 else f"{len(result.left_out)} rows"
        console.print(f"{rows} without text forms, for the text names another option too:")
        console.print(_shortened(result.left_out), highlight=False, soft_wrap=True, markup=False)
    for proof in result.proofs:
        if proof.protocol == "default" and not proof.perfect:
            console.print(_shortened(proof.failures), highlight=False, soft_wrap=True, markup=False)
    verdict = "every form read" if result.passed else "NOT every form read as it should be"
    console.print(f"default rules: {verdict}; the others are published rules, with their defects", highlight=False)


def _share(right: int, rows: int) -> str:
    return f"{right} / {rows}"


def _shortened(lines: Sequence[str]) -> str:
    more = [f"... and {len(lines) - 20} more"] if len(lines) > 20 else []
    return "\n".join([*lines[:20], *more])


def _row(
    number: int, answer: str | Sequence[str], options: Sequence[str] | None = None, question: str = ""
) -> dict[str, Any]:
    return {
        "id": str(number),
        "question_type": "open" if options is None else "multiple-choice",
        "question": question,
        "options": None if options is None else list(options),
        "answer": answer if isinstance(answer, str) else list(answer),
        "groups": {},
        "image_sha256": [],
    }


_OPTIONS: tuple[tuple[str, ...], ...] = (
    ("Yes", "No"),
    ("No", "Yes"),
    ("True", "False"),
    ("Pneumonia", "Pleural effusion", "Pneumothorax", "Normal"),
    ("left lung", "left lung upper lobe", "right lung", "right lung upper lobe"),  # one inside the other
    ("Fracture", "No fracture"),
    ("Normal", "Abnormal", "Not malignant", "Malignant"),
    ("Hepatitis B", "Hepatitis C", "E. coli infection", "C. difficile colitis"),  # letters inside
    ("Vitamin A", "Vitamin B", "Vitamin C", "Vitamin D", "Vitamin E"),
    ("A positive", "B positive", "AB positive", "O positive"),
    ("ER+", "ER-", "HER2+", "HER2-"),
    ("3", "3.5 cm", "35 mm", "-5", "1,000", "10 %"),
    ("<5 mm", "5 mm", ">5 mm"),
    ("MRI", "mri.", "CT"),  # the same after normalisation
    ("A", "B", "C", "D"),
    ("<image 1>", "<image 2>", "<image 3>"),
    ("T1-weighted MRI", "T2-weighted MRI", "FLAIR", "Diffusion-weighted imaging"),
    ("None of the above", "All of the above", "Both lungs", "Unknown"),
    ("Cannot be determined", "The heart", "A tumor of the lung.", "Crohn's disease (terminal ileum)"),
    ("Left", "Right", "Both", "Neither"),
    ("肺炎", "胸腔积液", "气胸", "未见异常"),
    ("是", "否"),
    ("大脑", "左侧大脑", "右侧大脑", "小脑"),
    ("heart; lungs", "heart, lungs and liver", "liver", "It shows a fracture. The bone is broken."),
    tuple(f"finding {number}" for number in range(1, 15)),
)
_OPEN: tuple[str | tuple[str, ...], ...] = (
    "pleural effusion", "Left side", "3 cm", "2.5", "1,200", "50%", "liver, spleen and kidney", "yes", "No",
    "Crohn's disease",
    ("MRI", "magnetic resonance imaging"), ("24/7", "3.429"), "肺炎", "左肺，右肺", "T2-weighted",
    "cannot be determined",
)  # fmt: skip

BUILT_IN: tuple[Mapping[str, Any], ...] = tuple(
    _row(number, answer, options)
    for number, (answer, options) in enumerate(
        [
            *((letter, options) for options in _OPTIONS for letter in string.ascii_uppercase[: len(options)]),
            *((answer, None) for answer in _OPEN),
        ]
    )
)

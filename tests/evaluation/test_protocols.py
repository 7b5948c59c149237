"""The prompts and the protocol's hash, frozen: a change here makes old and new numbers incomparable."""

from dataclasses import replace
from pathlib import Path

import pytest

from huatuo_vision.evaluation.protocols import PROTOCOLS
from huatuo_vision.evaluation.rows import Benchmark, Loaded, Row

DEFAULT = PROTOCOLS["default"]
LETTER = "Answer with the option's letter from the given choices directly."


def row(options: tuple[str, ...] | None, answer: str) -> Row:
    kind = "open" if options is None else "multiple-choice"
    return Row("made-up", "1", "Which organ is {shown}?", kind, options, answer, (), {"subject": "organ"})


CHOICE = row(("left kidney", "liver", "50 %"), "B")
YES_NO = row(("Yes", "No"), "A")
OPEN = row(None, "liver")


def nothing(path: Path | None) -> Loaded:
    return Loaded((), "1")


BENCHMARK = Benchmark("made-up", "Made up", "all", 1, "subject", "", nothing)


@pytest.mark.parametrize(
    ("protocol", "asked", "text"),
    [
        ("default", CHOICE, f"Which organ is {{shown}}?\nA. left kidney\nB. liver\nC. 50 %\n{LETTER}"),
        ("default", YES_NO, f"Which organ is {{shown}}?\nA. Yes\nB. No\n{LETTER}"),
        ("default", OPEN, "Which organ is {shown}?\nAnswer the question briefly, with a word or a short phrase."),
        ("huatuo-2024", CHOICE, f"Which organ is {{shown}}?\nA. left kidney\nB. liver\nC. 50 %\n{LETTER}"),
        ("mmmu-official", CHOICE, f"Which organ is {{shown}}?\n(A) left kidney\n(B) liver\n(C) 50 %\n\n{LETTER}"),
        ("mmmu-official", OPEN, "Which organ is {shown}?\n\nAnswer the question using a single word or phrase."),
        ("llava-med", YES_NO, "Which organ is {shown}? Please choose from the following two options: [yes, no]"),
        ("llava-med", OPEN, "Which organ is {shown}?"),
    ],
)
def test_prompts_are_what_they_were(protocol, asked, text):
    assert PROTOCOLS[protocol].render(asked) == text


def test_protocols_are_what_they_were():
    assert {name: protocol.hash for name, protocol in PROTOCOLS.items()} == {
        "default": "954c472358838683",
        "huatuo-2024": "9b76aa5504158342",
        "mmmu-official": "93e39e6655fad858",
        "llava-med": "891633ae9169b7f0",
        "open": "382ea6c45681cd9d",
        "explain": "63c43e0dbdc0713e",
    }


def test_whatever_a_score_depends_on_changes_the_hash():
    same = DEFAULT.hash_on(BENCHMARK, "1")
    assert replace(DEFAULT, note="another").hash_on(replace(BENCHMARK, note="another"), "1") == same
    others = [
        DEFAULT.hash_on(BENCHMARK, "2"),
        DEFAULT.hash_on(replace(BENCHMARK, row_filter="English only"), "1"),
        DEFAULT.hash_on(replace(BENCHMARK, expected_n=2), "1"),
        replace(DEFAULT, prompts=DEFAULT.prompts | {"open": "{question}"}).hash_on(BENCHMARK, "1"),
        replace(DEFAULT, option="({letter}) {text}").hash_on(BENCHMARK, "1"),
        replace(DEFAULT, rules_version=DEFAULT.rules_version + 1).hash_on(BENCHMARK, "1"),
        replace(DEFAULT, choice_rule="huatuo-first-letter").hash_on(BENCHMARK, "1"),
        replace(DEFAULT, decoding=replace(DEFAULT.decoding, max_new_tokens=17)).hash_on(BENCHMARK, "1"),
    ]
    assert len({same, *others}) == 9

"""The prompts and the protocol's hash, frozen: a change here makes old and new numbers incomparable."""

from dataclasses import replace

from huatuo_vision.evaluation.benchmarks import Benchmark, Row
from huatuo_vision.evaluation.protocols import DEFAULT

ROW = Row("made-up", "1", "Which organ is {shown}?", ("left kidney", "liver", "50 %"), "B", (), {"subject": "organ"})
BENCHMARK = Benchmark("made-up", "revision 1", "all", 1, "", (ROW,))


def test_the_default_prompt_is_the_papers():
    assert DEFAULT.render(ROW) == (
        "Which organ is {shown}?\n"
        "A. left kidney\n"
        "B. liver\n"
        "C. 50 %\n"
        "Answer with the option's letter from the given choices directly."
    )


def test_the_default_protocol_is_what_it_was():
    assert DEFAULT.hash == "3b69671be12f82c4"


def test_whatever_a_score_depends_on_changes_the_hash():
    same = DEFAULT.hash_on(BENCHMARK)
    assert DEFAULT.hash_on(replace(BENCHMARK, note="another", rows=())) == same
    others = [
        DEFAULT.hash_on(replace(BENCHMARK, revision="revision 2")),
        DEFAULT.hash_on(replace(BENCHMARK, row_filter="English only")),
        DEFAULT.hash_on(replace(BENCHMARK, expected_n=2)),
        replace(DEFAULT, prompt=DEFAULT.prompt + " ").hash_on(BENCHMARK),
        replace(DEFAULT, parser_version=DEFAULT.parser_version + 1).hash_on(BENCHMARK),
        replace(DEFAULT, decoding=replace(DEFAULT.decoding, max_new_tokens=17)).hash_on(BENCHMARK),
    ]
    assert len({same, *others}) == 7

"""The published rules, defects included: what official scorers make of replies (the matrix of known disagreements)."""

import pytest

from huatuo_vision.evaluation.protocols import PROTOCOLS
from huatuo_vision.evaluation.scorers import Verdict, judge

OPTIONS = ["Pneumonia", "Pleural effusion", "Pneumothorax", "Normal"]


def graded(protocol: str, reply: str, answer: object = "B", options: list[str] | None = OPTIONS) -> Verdict:
    return judge(
        {
            "benchmark": "made-up", "id": "1", "question": "?", "options": options, "answer": answer,
            "question_type": "open" if options is None else "multiple-choice", "response": reply, "groups": {},
            "image_sha256": [],
        },
        PROTOCOLS[protocol],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"), ("(B)", "B"), ("**B**", "B"), ("B. Pleural effusion", "B"), ("The answer is B.", "B"),
        ("I think C", "I"),  # the first standalone letter
        ("b", "b"),  # and case counts
        ("A pleural effusion", None),  # the article guard
        ("Yes", None), ("", None),
        ("A. Pneumonia\nB. Pleural effusion\nThe correct answer is (B).", "A"),
        ("Z", None), ("N", "N"),  # letters go to n, whatever the options
    ],
)  # fmt: skip
def test_huatuogpt_takes_the_first_letter(reply, letter):
    verdict = graded("huatuo-2024", reply)
    assert verdict.parsed == letter
    assert (verdict.verdict == "correct") == (letter == "B")
    assert (verdict.verdict == "unparsed") == (letter is None)


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"), ("B.", "B"), ("(B)", "B"), ("The answer is B.", "B"), ("Answer: B", "B"),
        ("Options (A) and (B) are near, but (C)", "C"),  # of several, the last
        ("The answer is (B). The other options such as (D) are wrong.", "D"),
        ("The picture shows a large pleural effusion on the left", "B"),  # text counts above five words
        ("A closer look helps. Therefore the answer is B", "B"),
    ],
)  # fmt: skip
def test_mmmu_reads_what_the_official_code_reads(reply, letter):
    verdict = graded("mmmu-official", reply)
    assert (verdict.parsed, verdict.chance) == (letter, None)


def test_mmmu_pro_has_a_rule_of_its_own():
    def letter(benchmark: str, reply: str) -> str | None:
        row = {
            "benchmark": benchmark, "id": "1", "question": "?", "options": OPTIONS, "answer": "B", "groups": {},
            "question_type": "multiple-choice", "response": reply, "image_sha256": [],
        }  # fmt: skip
        return judge(row, PROTOCOLS["mmmu-official"]).parsed

    assert letter("mmmu-pro-standard-10", "(A) is near. Answer: B") == "B"  # what follows the last "Answer:"
    assert letter("mmmu-pro-standard-10", "B. Pleural effusion") == "B"  # where MMMU's rule draws at random
    assert letter("MMMU_Pro", "C. A large shadow") == "A"  # "A " comes before "C."
    assert letter("mmmu-val", "(A) is near. Answer: B") == "A"
    assert letter("mmmu-val", "B. Pleural effusion") is None


@pytest.mark.parametrize("reply", ["**B**", "b", "Pleural effusion", "\\boxed{B}", "", "B: text"])
def test_where_mmmu_draws_at_random_the_row_is_unparsed_and_the_draw_is_expected(reply):
    verdict = graded("mmmu-official", reply)
    assert (verdict.verdict, verdict.parsed, verdict.chance) == ("unparsed", None, 0.25)


@pytest.mark.parametrize(
    ("reply", "answer", "right"),
    [
        ("7", "7", True), ("The answer is 7.00", "7", True), ("7.004", "7", True), ("8", "7", False),
        ("1,200", "1200", True), ("the femoral artery", "femoral artery", True),
        ("femoral vein", "femoral artery", False),
        ("It is so. Therefore, the value is 3.43", ["24/7", "3.429"], True),
    ],
)  # fmt: skip
def test_mmmu_open_questions_compare_numbers_and_phrases(reply, answer, right):
    assert (graded("mmmu-official", reply, answer, None).verdict == "correct") == right


@pytest.mark.parametrize(
    ("reply", "answer", "verdict"),
    [
        ("Yes, it is", "A", "correct"), ("no", "A", "wrong"), ("abnormal", "B", "correct"),  # contains "no"
        ("yes and no", "A", "correct"), ("yes and no", "B", "correct"), ("unclear", "A", "unparsed"),
    ],
)  # fmt: skip
def test_llava_med_closed_is_a_substring_rule(reply, answer, verdict):
    assert graded("llava-med", reply, answer, ["Yes", "No"]).verdict == verdict


def test_llava_med_closed_reads_other_options_by_the_default_rule():
    assert graded("llava-med", "**B**").verdict == "correct"


def test_llava_med_open_counts_words_said_twice_and_numbers_as_digits():
    twice = graded("llava-med", "left left left", "left lung", None)
    assert twice.metrics["token_recall"] == pytest.approx(3 / 4)
    assert graded("llava-med", "There are two.", "2", None).verdict == "correct"


def test_llava_med_open_is_token_recall():
    part = graded("llava-med", "the left side of it", "left lung", None)
    assert part.metrics["token_recall"] == pytest.approx(0.5) and part.verdict == "wrong"
    assert graded("llava-med", "in the left lung, lower part", "left lung", None).verdict == "correct"

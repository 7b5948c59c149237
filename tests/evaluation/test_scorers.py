"""What a reply counts as, and the arithmetic of scores."""

import math
import string

import pytest

from huatuo_vision.evaluation.scorers import Verdict, judge, parse_choice, score_benchmark, tally
from huatuo_vision.schema import UserError
from tests.evaluation.helpers import run_python

OPTIONS = ("Fracture", "Hepatitis C", "E. coli infection", "normal")

CHOOSES_B = [
    "B", "b", " B \n", "(B)", "[B]", "B.", "B)", "B:", '"B"', "`B`", "**B**", "**B.**", "（B）", "(b)",
    "B: Hepatitis C", "B. Hepatitis C", "B) hepatitis c.", "(B) Hepatitis C", "**B. Hepatitis C**",
    "B: a liver disease",
    "B. A liver disease.", "B\nBecause of the pattern.",
    "The answer is B", "The answer is B.", "The answer is (B).", "The answer is **B**.",
    "The answer is B because it fits.", "Answer: B", "Answer: b", "**Answer:** B", "Final answer: (B)",
    "The correct option is B", "Answer: The answer is B",
    "The answer is (B). The other options such as (D) are wrong.", "The answer is B: Hepatitis C",
    "A. Fracture\nB. Hepatitis C\nC. E. coli infection\nD. normal\nThe correct answer is (B).",
    "Hepatitis C", "hepatitis  c.", "HEPATITIS C", "**Hepatitis C**", "The answer is hepatitis C.",
]  # fmt: skip

CHOOSES_NOTHING = [
    "", "  \n", ".", "?", "E", "(E)", "The answer is E", "E. Abscess", "Z",
    "A or B", "A, B", "A/B", "A and B", "(A) (B)", "AB", "ABCD", "B\nA", "A. B.", "A. Fracture B. Hepatitis C",
    "a) fracture b) hepatitis c", "The answer is A. The answer is B.", "The answer is A or B",
    "The answer is (A) or (B)",
    "The answer is B: Fracture", "B: Fracture", "B. normal", "fracture or normal",
    "A fracture of the wrist", 
    "The answer is a fracture of the wrist", "The answer is A fracture of the wrist",
    "I", "I think so", "Answer: I think it is unclear", "I cannot determine the answer from this image.",
    "As an AI, I can't help.", "The answer is not B", "The answer isn't B", "not B", "B-mode ultrasound",
    "The answer is B cell lymphoma", "C. difficile", "yes", "none", "unclear",
]  # fmt: skip


@pytest.mark.parametrize("reply", CHOOSES_B)
def test_a_reply_that_names_one_option_chooses_it(reply):
    assert parse_choice(reply, OPTIONS) == "B"


@pytest.mark.parametrize("reply", CHOOSES_NOTHING)
def test_a_reply_that_names_none_or_two_chooses_nothing(reply):
    assert parse_choice(reply, OPTIONS) is None


@pytest.mark.parametrize(
    "form", ["{0}", "({0})", "{0}.", "{0}. {1}", "{0}: {1}", "**{0}**", "The answer is {0}.", "{1}"]
)
def test_every_letter_is_read_in_every_form(form):
    options = tuple(f"finding {number}" for number in range(11))
    for letter, option in zip(string.ascii_uppercase, options, strict=False):
        assert parse_choice(form.format(letter, option), options) == letter


def test_options_that_are_letters_numbers_or_equal():
    assert parse_choice("B", ("B", "A")) == "B"
    assert parse_choice("5", (".5", "5")) == "B"
    assert parse_choice("-5", ("5", "-5")) == "B"
    assert parse_choice("yes", ("Yes", "yes", "no")) is None
    assert parse_choice("B. yes", ("Yes", "yes", "no")) == "B"


def response(reply: str, answer: str = "B", number: int = 0, subject: str = "liver") -> dict:
    return {
        "benchmark": "made-up", "id": str(number), "question_type": "multiple-choice", "question": "Which?",
        "options": list(OPTIONS), "answer": answer, "response": reply, "groups": {"subject": subject},
        "image_sha256": [],
    }  # fmt: skip


def test_unparsed_is_neither_correct_nor_wrong_and_a_hidden_answer_is_not_graded():
    assert judge(response("B")) == Verdict("made-up", "0", "B", "correct")
    assert judge(response("A")) == Verdict("made-up", "0", "A", "wrong")
    assert judge(response("no idea")) == Verdict("made-up", "0", None, "unparsed")
    assert judge(response("B", answer="?")) == Verdict("made-up", "0", "B", "ungraded")


@pytest.mark.parametrize("changed", [{"answer": "E"}, {"answer": "AB"}, {"answer": ""}, {"question_type": "open"}])
def test_a_row_that_cannot_be_graded_is_refused_by_name(changed):
    with pytest.raises(UserError, match="made-up row '0'"):
        judge(response("B") | changed)


def test_scores_add_up_and_unparsed_counts_in_n():
    replies = [("B", "liver"), ("A", "liver"), ("B", "bone"), ("B", "bone"), ("hm", "bone"), ("A", "bone")]
    responses = [response(reply, number=i, subject=subject) for i, (reply, subject) in enumerate(replies)]
    responses.append(response("B", answer="?", number=9))
    verdicts = [judge(row) for row in responses]
    scores = score_benchmark(responses, verdicts, expected_n=7, limit=None)
    assert (scores["n"], scores["correct"], scores["unparsed"], scores["ungraded"]) == (6, 3, 1, 1)
    assert scores["accuracy"] == scores["micro"] == 0.5
    subjects = scores["groups"]["subject"]
    assert (subjects["liver"]["n"], subjects["bone"]["n"]) == (2, 4)
    assert subjects["bone"]["unparsed"] == 1
    for count in ("n", "correct", "unparsed"):
        assert sum(subject[count] for subject in subjects.values()) == scores[count]
    assert scores["macro"] == (1 / 2 + 2 / 4) / 2
    assert scores["comparable"]


def test_macro_is_the_mean_of_subjects_not_of_rows():
    responses = [response("B" if i else "A", number=i, subject="one" if i else "other") for i in range(10)]
    scores = score_benchmark(responses, [judge(row) for row in responses], expected_n=10, limit=None)
    assert (scores["micro"], scores["macro"]) == (0.9, 0.5)


def test_a_limit_or_another_row_count_is_not_comparable():
    responses = [response("B")]
    verdicts = [judge(row) for row in responses]
    assert score_benchmark(responses, verdicts, expected_n=1, limit=None)["comparable"]
    assert not score_benchmark(responses, verdicts, expected_n=2, limit=None)["comparable"]
    assert not score_benchmark(responses, verdicts, expected_n=1, limit=1)["comparable"]


@pytest.mark.parametrize(("correct", "n"), [(0, 10), (5, 10), (10, 10), (170, 251)])
def test_the_interval_is_wilsons(correct, n):
    verdicts = [Verdict("made-up", str(i), "A", "correct" if i < correct else "wrong") for i in range(n)]
    z, p = 1.959963984540054, correct / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert tally(verdicts).ci95 == pytest.approx((centre - half, centre + half), abs=1e-9)


def test_nothing_graded_has_no_rate():
    scores = score_benchmark([response("B", answer="?")], [judge(response("B", answer="?"))], expected_n=1, limit=None)
    assert (scores["n"], scores["accuracy"], scores["ci95"], scores["macro"]) == (0, None, None, None)


def test_scoring_and_reporting_need_no_torch():
    code = "import sys, huatuo_vision.evaluation.report; print('torch' in sys.modules, 'transformers' in sys.modules)"
    assert run_python("-c", code).stdout == "False False\n"

"""Replies as models write them, and what each counts for under the default rules."""

import pytest

from huatuo_vision.evaluation.protocols import PROTOCOLS
from huatuo_vision.evaluation.scorers import CHOICE_RULES, OPEN_RULES, judge
from huatuo_vision.schema import UserError

DEFAULT = PROTOCOLS["default"]
LUNGS = ["left lung", "left lung upper lobe", "pneumonia", "no abnormality"]
YES_NO = ["Yes", "No"]


def row(reply: str, options: list[str] | None = LUNGS, answer: object = "B", question: str = "Is it?") -> dict:
    return {
        "benchmark": "made-up", "id": "7", "question_type": "open" if options is None else "multiple-choice",
        "question": question, "options": options, "answer": answer, "response": reply, "groups": {},
        "image_sha256": [],
    }  # fmt: skip


def parsed(reply: str, options: list[str] = LUNGS) -> str | None:
    return judge(row(reply, options, "A"), DEFAULT).parsed


@pytest.mark.parametrize(
    "reply",
    [
        "B", "(B)", "B.", "B)", "b", "[B]", "'B'", "`B`", "**B**", "__B__", " B\n", "B</s>", "B:", "Ｂ", "（B）",
        "B: left lung upper lobe", "B. left lung upper lobe", "B) left lung upper lobe", "(B) left lung upper lobe",
        "(b) left lung upper lobe", "**B. left lung upper lobe**", "B, because the lesion is in the upper lobe",
        "The answer is B", "The answer is B.", "the answer is (b).", "Answer: B", "Answer: b", "Answer:\nB",
        "The correct answer is (B). The other options such as (D) are wrong.", "Final answer: **B**", "Choice: B",
        "Option B", "Option B is correct.", "Letter B is correct", "I choose B", "I would go with (B).",
        "I pick option B",
        "I think B", "So, B.", "Therefore, B", "Sure! B", "It must be B.", "My answer: B",
        "A closer look shows a lesion. Therefore the answer is B", "A is incorrect, so B",
        "<think>maybe A or C</think> B",
        "A. left lung\nB. left lung upper lobe\nC. pneumonia\nD. no abnormality\nThe correct answer is (B).",
        "\\boxed{B}", "$\\boxed{B}$", "\\boxed{\\text{B}}", '{"answer": "B"}', "{'answer': 'B'}", "<answer>B</answer>",
        "left lung upper lobe", "Left lung upper lobe.", "The answer is left lung upper lobe.",
        "It is in the left lung upper lobe.", "**left lung upper lobe**",
        "答案是B", "答案：B", "正确答案为(B)", "正确答案是 B。", "选B", "故选B。", "应选择 B", "选项B", "我选择B",
    ],
)  # fmt: skip
def test_a_chosen_option_is_read(reply):
    assert parsed(reply) == "B"


@pytest.mark.parametrize(
    "reply",
    [
        "", "   ", "\n", ".", "A and B", "A or B", "Either B or C", "B, C", "Both A and C", "E", "The answer is E",
        "(Z)",
        "A fracture is seen", "A closer look helps", "I", "I cannot determine the answer.", "I do not know.",
        "As an AI language model, I can't interpret medical images.", "I'm sorry, but I can't help with that.",
        "not A", "A is wrong", "The answer is not B", "There is no evidence of pneumonia.", "Unable to tell.",
        "A: pneumonia", "无法确定", "不是A", "A不对", "The image is of poor quality.", "?", "None", "I am not sure",
    ],
)  # fmt: skip
def test_a_reply_that_chooses_no_option_or_two_is_unparsed(reply):
    assert parsed(reply) is None
    assert judge(row(reply), DEFAULT).verdict == "unparsed"


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("left lung", "A"),
        ("The left lung is affected.", "A"),
        ("Based on the image, the most likely diagnosis is pneumonia.", "C"),
        ("no abnormality", "D"),
        ("First I thought A, but the final answer is C.", "C"),
        ("It could be A or B at first sight. Answer: D", "D"),
        ("Answer: A. On second look I choose B.", None),
    ],
)
def test_the_longest_option_and_the_final_answer_win(reply, letter):
    assert parsed(reply) == letter


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("Yes", "A"), ("no.", "B"), ("No, there is not", "B"), ("Yes, there is no other finding", "A"), ("A", "A"),
        ("(B)", "B"), ("The answer is no", "B"), ("YES!", "A"), ("normal", None), ("none", None), ("", None),
        ("I do not know", None), ("yes and no", None), ("nodule", None), ("unknown", None), ("maybe", None),
    ],
)  # fmt: skip
def test_yes_and_no_are_words(reply, letter):
    assert parsed(reply, YES_NO) == letter


@pytest.mark.parametrize(
    ("options", "reply", "letter"),
    [
        (["3", "3.5 cm", "35 mm"], "3.5 cm", "B"),
        (["3", "3.5 cm", "35 mm"], "3", "A"),
        (["Vitamin A", "Vitamin B", "Vitamin C"], "Vitamin B", "B"),
        (["Vitamin A", "Vitamin B", "Vitamin C"], "C", "C"),
        (["MRI", "mri.", "CT"], "MRI", None),  # two options with one text
        (["MRI", "mri.", "CT"], "B", "B"),
        (["E. coli", "C. difficile"], "E. coli", "A"),
        (["是", "否"], "是", "A"),
        (["肺炎", "气胸"], "气胸", "B"),
    ],
)
def test_options_that_are_easily_confused(options, reply, letter):
    assert parsed(reply, options) == letter


@pytest.mark.parametrize(
    ("reply", "accepted", "verdict"),
    [
        ("liver", "Liver", "correct"),
        ("The liver.", ["liver", "hepar"], "correct"),
        ("It is the liver.", "liver", "correct"),
        ("hepar", ["liver", "hepar"], "correct"),
        ("spleen", "liver", "wrong"),
        ("3.50 cm", "3.5 cm", "correct"),
        ("35 cm", "3.5 cm", "wrong"),
        ("kidney and liver", "liver, kidney", "correct"),
        ("The answer is kidney, liver.", "liver and kidney", "correct"),
        ("liver, kidney and spleen", "liver, kidney", "wrong"),
        ("I think it is the liver.", "liver", "correct"),
        ("\\boxed{liver}", "liver", "correct"),
        ("答案是肝脏。", "肝脏", "correct"),
        ("3 mm", "3 cm", "wrong"),
        ("3 centimeters", "3 cm", "correct"),
        ("about 50 percent", "50%", "correct"),
        ("1200 ml", "1,200 mL", "correct"),
        ("Three.", "3", "correct"),
        ("three lesions", "3 lesions", "correct"),
        ("3", "3 cm", "wrong"),  # no unit is not the same unit
        ("Cannot be determined", "cannot be determined", "correct"),
        ("Yes, there is.", "yes", "correct"),
        ("yes and no", "yes", "wrong"),
        ("none", "no", "wrong"),
        ("A", "yes", "wrong"),  # open questions have no letters
        ("not liver", "liver", "wrong"),
        ("Yes.", "yes", "correct"),
        ("", "liver", "unparsed"),
        ("I cannot determine the answer.", "liver", "unparsed"),
    ],
)
def test_open_answers(reply, accepted, verdict):
    assert judge(row(reply, None, accepted), DEFAULT).verdict == verdict


def test_open_metrics_have_their_real_names_and_lie_between_0_and_1():
    metrics = judge(row("the large left lobe", None, ["left lobe", "x"]), DEFAULT).metrics
    assert set(metrics) == {"exact_match", "token_recall", "token_f1", "bleu"}
    assert (metrics["exact_match"], metrics["token_recall"]) == (0.0, 1.0)
    assert metrics["token_f1"] == pytest.approx(0.8) and 0 < metrics["bleu"] < 1
    exact = judge(row("left lobe", None, ["left lobe"]), DEFAULT).metrics
    assert all(value == pytest.approx(1) and value <= 1 for value in exact.values())


def test_a_hidden_answer_is_ungraded_but_read():
    verdict = judge(row("The answer is C", answer="?"), DEFAULT)
    assert (verdict.parsed, verdict.verdict) == ("C", "ungraded")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"answer": "E"}, "made-up row '7'.*'E'"),
        ({"answer": "b"}, "made-up row '7'.*'b'"),
        ({"question_type": "essay"}, "made-up row '7'.*essay"),
        ({"options": "['a', 'b']"}, "made-up row '7'.*one string.*JSON list"),
        ({"options": None}, "made-up row '7'"),
        ({"question_type": "open", "answer": 3}, "made-up row '7'"),
    ],
)
def test_a_row_that_can_not_be_graded_is_named(changed, said):
    with pytest.raises(UserError, match=said):
        judge(row("B") | changed, DEFAULT)


def test_every_protocol_names_rules_that_exist():
    for protocol in PROTOCOLS.values():
        assert protocol.choice_rule in CHOICE_RULES and protocol.open_rule in OPEN_RULES

"""The self-test is itself tested: it passes on our rules and fails on rules that are wrong."""

from io import StringIO

import pytest
from rich.console import Console

from huatuo_vision.evaluation import rules, scorers, self_test
from huatuo_vision.evaluation.protocols import PROTOCOLS

ONLY_DEFAULT = [PROTOCOLS["default"]]


def test_the_default_rules_read_every_form_of_every_row():
    result = self_test.run(protocols=ONLY_DEFAULT)
    assert result.passed and result.rows > 100
    (proof,) = result.proofs
    assert all(right == rows for right, rows in proof.forms.values()) and len(proof.forms) > 30
    assert all(right == 0 for right, _ in proof.silence.values())


@pytest.mark.parametrize(
    "wrong",
    [
        lambda response: rules.Graded("A", response["answer"] == "A"),  # a blank reply is an A
        lambda response: rules.Graded(None, False),  # reads nothing
        rules.huatuo_first_letter,
    ],
)
def test_wrong_rules_fail(monkeypatch, wrong):
    monkeypatch.setitem(scorers.CHOICE_RULES, "default", wrong)
    result = self_test.run(protocols=ONLY_DEFAULT)
    assert not result.passed
    shown = StringIO()
    self_test.show(result, Console(file=shown, width=120))
    assert "NOT every form" in shown.getvalue()


def test_rows_of_a_benchmark_can_be_tried():
    row = self_test.BUILT_IN[0] | {"id": "mine"}
    result = self_test.run({"theirs": [row, row | {"id": "hidden", "answer": "?"}]}, protocols=ONLY_DEFAULT)
    assert result.rows == 1 and result.passed

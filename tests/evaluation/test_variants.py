"""Rotated options: the same options, the same gold text, a letter that moves with it."""

from dataclasses import replace

import pytest

from huatuo_vision.evaluation.rows import HIDDEN
from huatuo_vision.evaluation.variants import with_rotations
from tests.evaluation.tiny import ORGANS, mixed_rows

ROW = replace(mixed_rows(2)[1], options=ORGANS[:4], answer="C", extra={"case": "7"})


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("gold", [0, -1])
def test_every_rotation_once_with_the_gold_option_where_it_went(n, gold):
    row = replace(ROW, options=ORGANS[:n], answer="ABCDE"[:n][gold])
    found = with_rotations([row])
    assert found[0] == row
    assert len({rotated.options for rotated in found}) == len(found) == n
    assert {rotated.answer for rotated in found} == set("ABCDE"[:n])
    for r, rotated in enumerate(found[1:], 1):
        assert (rotated.id, rotated.extra) == (f"row 1#r{r}", {"case": "7", "rotation": r, "rotation_of": "row 1"})
        for i, option in enumerate(row.options):
            assert rotated.options[(i + r) % n] == option
        assert rotated.options["ABCDE".index(rotated.answer)] == row.options[gold]
        assert replace(rotated, id=row.id, options=row.options, answer=row.answer, extra=row.extra) == row


def test_a_hidden_answer_stays_hidden():
    assert {row.answer for row in with_rotations([replace(ROW, answer=HIDDEN)])} == {HIDDEN}


def test_open_rows_and_rows_of_many_options_stay_alone(capfd):
    many = replace(ROW, id="many", options=ORGANS[:6])
    open_row = replace(ROW, id="open", question_type="open", options=None, answer=("liver",))
    found = with_rotations([many, ROW, open_row, replace(many, id="more")])
    assert [row.id for row in found] == ["many", "row 1", "row 1#r1", "row 1#r2", "row 1#r3", "open", "more"]
    assert "2 rows with more than 5 options" in capfd.readouterr().err
    with_rotations([ROW, open_row])
    assert capfd.readouterr().err == ""

"""People's marks beside the judge's: the sheet that they fill in, and how far the two agree. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from math import fsum
from pathlib import Path
from typing import Any

from huatuo_vision.evaluation import rubric
from huatuo_vision.evaluation.rubric import COMPONENTS, MOST_MARKS, Answer, Key, Marked
from huatuo_vision.evaluation.sheets import read_sheet, write_sheet
from huatuo_vision.evaluation.variants import WHOLE, condition_of
from huatuo_vision.schema import UserError

SHEET_FILE = "human-sheet.csv"
COLUMNS = ("benchmark", "id", "rater", *COMPONENTS)

Sheet = Mapping[Key, Mapping[str, Mapping[str, float]]]  # benchmark, id -> component -> rater -> mark


def write_human_sheet(out: Path, marked: Marked) -> None:
    """`human-sheet.csv`: each answer to a whole question with its lists; the marks are empty, the judge's not shown.

    A sheet that is there is left alone: somebody may have filled it in.
    """
    if (out / SHEET_FILE).exists():
        return
    columns = (*COLUMNS, "question", "answer", *(f"list_of_{component}" for component in COMPONENTS))
    write_sheet(out / SHEET_FILE, columns, [_row(a, marked) for a in marked.answers if condition_of(a) == WHOLE])


def _row(answer: Answer, marked: Marked) -> dict[str, str]:
    items = marked.items[answer["benchmark"], answer["id"]]
    lists = {
        f"list_of_{component}": "\n".join(f"{number}. {item}" for number, item in enumerate(items[component], 1))
        for component in COMPONENTS
    }
    empty = dict.fromkeys(("rater", *COMPONENTS), "")
    about = {"benchmark": answer["benchmark"], "id": answer["id"]}
    return about | empty | {"question": answer["question"], "answer": answer["response"]} | lists


def read_human_sheet(path: Path) -> Sheet:
    """The marks of a filled-in sheet; empty cells are none. Raises UserError for a mark that is none."""
    found: dict[Key, dict[str, dict[str, float]]] = {}
    for where, row in read_sheet(path, "--human-sheet", ("benchmark", "id", *COMPONENTS)):
        rater = row.get("rater") or "1"
        for component in COMPONENTS:
            if not row[component]:
                continue
            of_component = found.setdefault((row["benchmark"], row["id"]), {}).setdefault(component, {})
            if rater in of_component:
                raise UserError(f"{where}: {row['benchmark']} {row['id']} by rater {rater} stands there twice")
            of_component[rater] = _mark(row[component], f"{where}: {component}")
    if not found:
        raise UserError(f"--human-sheet {path} holds no mark; fill in {', '.join(COMPONENTS)}, 0 to {MOST_MARKS:g}")
    return found


def _mark(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= MOST_MARKS:
        raise UserError(f"{where} is {text[:40]!r}; expected a number from 0 to {MOST_MARKS:g}, or nothing")
    return value


def agreement(marked: Marked, sheet: Sheet, benchmark: str) -> dict[str, Any] | None:
    """The `human` entry of a benchmark's rubric: by component, over answers that both have marked; None without any.

    bias: how much higher the judge marks, on average. distance: the mean absolute difference. spearman: of ranks; None
    where one side gives everything the same mark. between_raters: people's own mean absolute difference, which no judge
    can be asked to be better than; None with one rater.
    """
    judge = {key: own for key, own in rubric.metrics(marked).items() if key[0] == benchmark}
    common = {key: marks for key, marks in sheet.items() if key in judge}
    if not common:
        return None
    return {
        "marked": len(common),
        "unknown": sum(key[0] == benchmark and key not in judge for key in sheet),
        "raters": len({rater for marks in common.values() for by_rater in marks.values() for rater in by_rater}),
        "components": {component: _component(component, judge, common) for component in COMPONENTS},
    }


def _component(component: str, judge: Mapping[Key, Mapping[str, float]], sheet: Sheet) -> dict[str, Any]:
    from scipy.stats import spearmanr

    both = [key for key in sheet if component in sheet[key] and component in judge[key]]
    human = [fsum(sheet[key][component].values()) / len(sheet[key][component]) for key in both]
    own = [judge[key][component] for key in both]
    differences = [a - b for a, b in zip(own, human, strict=True)]
    varies = len(set(own)) > 1 and len(set(human)) > 1
    pairs = [abs(a - b) for key in both for a, b in combinations(sheet[key][component].values(), 2)]
    return {
        "n": len(both),
        "human": _mean(human),
        "judge": _mean(own),
        "bias": _mean(differences),
        "distance": _mean([abs(difference) for difference in differences]),
        "spearman": float(spearmanr(own, human).statistic) if varies and len(both) > 2 else None,
        "between_raters": _mean(pairs),
    }


def _mean(values: Sequence[float]) -> float | None:
    return fsum(values) / len(values) if values else None

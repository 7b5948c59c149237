"""Balance: a source's cap and the modalities' shares, before anything is paid for; and what its card says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("datatrove")

from rich.console import Console

from data.balance import PUBLISHED, balance_passes, known_modality, report, wanted_rows
from data.config import Balance, Executor
from data.executor import LocalRun, start
from data.filters.labels import body_part_of, modality_of
from data.tables import Pair, RunFolder
from tests.data.rows import complete_stage, pair

CT, MRI, XRAY = "Computed Tomography", "Magnetic Resonance Imaging", "X-Ray"


def rows(n: int, modality: str | None, source: str = "a", first: int = 0, **changed: object) -> list[Pair]:
    return [pair(first + k, modality=modality, collection=source, caption="x", **changed) for k in range(n)]


def balanced(folder: Path, *ranks: list[Pair], **settings: object) -> tuple[list[Pair], Counter[str], RunFolder]:
    """The rows that stay, the reasons of those that don't, and the run."""
    run = complete_stage(folder, "dedup", list(ranks))
    upstream = ""
    with LocalRun(Executor(workers=1), Console(quiet=True)) as local:
        for work in balance_passes(run, Balance(**settings), len(ranks)):
            upstream = start(run, work, upstream)
            local.run(run, work)
    kept = [row for rank in range(len(ranks)) for row in run.pairs("balance", rank)]
    reasons = Counter(dropped.reason for dropped in run.dropped("balance"))
    assert len(kept) + reasons.total() == sum(map(len, ranks))
    return kept, reasons, run


def test_without_settings_every_row_goes_on(tmp_path: Path) -> None:
    ranks = rows(3, CT), rows(2, None, first=3)
    kept, reasons, run = balanced(tmp_path, *ranks)
    assert kept == [*ranks[0], *ranks[1]] and not reasons
    assert report(run)["modality"]["before"] == {CT: 3, "unknown": 2} == report(run)["modality"]["after"]


def test_a_source_gives_no_more_than_its_cap(tmp_path: Path) -> None:
    kept, reasons, run = balanced(tmp_path, rows(8, CT), rows(2, CT, "b", first=8), cap=3)
    assert Counter(row.collection for row in kept) == {"a": 3, "b": 2} and reasons == {"over_source_cap": 5}
    assert report(run)["collection"] == {"before": {"a": 8, "b": 2}, "after": {"a": 3, "b": 2}}


def test_shares_are_kept_exactly_and_what_is_not_named_drops(tmp_path: Path) -> None:
    everything = rows(12, CT) + rows(4, MRI, first=12) + rows(5, XRAY, first=16)
    kept, reasons, run = balanced(tmp_path, everything, modalities={CT: 0.6, MRI: 0.4})
    assert Counter(row.modality for row in kept) == {CT: 6, MRI: 4}
    assert reasons == {"over_modality_share": 6, "modality_not_named": 5} and report(run)["short"] == {}


def test_a_modality_with_too_few_rows_falls_short_and_says_so(tmp_path: Path) -> None:
    kept, _, run = balanced(tmp_path, rows(12, CT) + rows(2, MRI, first=12), modalities={CT: 0.5, MRI: 0.5}, rows=10)
    assert Counter(row.modality for row in kept) == {CT: 5, MRI: 2} and report(run)["short"] == {MRI: 3}


def test_what_people_described_stays_first_and_chance_is_the_rows_own(tmp_path: Path) -> None:
    told, tags = rows(3, CT), rows(20, CT, first=3, annotated=False)
    kept, _, _ = balanced(tmp_path / "one", tags + told, cap=8)
    assert set(told) <= set(kept)
    # In other tasks and another order the same rows stay, and another seed keeps others.
    again, _, _ = balanced(tmp_path / "two", told[::-1] + tags[10:], tags[:10], cap=8)
    other, _, _ = balanced(tmp_path / "three", tags + told, cap=8, seed=1)
    ids = [{row.id for row in some} for some in (kept, again, other)]
    assert ids[0] == ids[1] != ids[2]


def test_the_caption_names_the_modality_where_the_source_does_not() -> None:
    assert known_modality(pair(1, caption="Axial CT of the chest")) == CT
    assert known_modality(pair(1, caption="Axial CT of the chest", modality=XRAY)) == XRAY
    assert known_modality(pair(1, caption="Mr Smith on the 2nd of Oct", context=())) == "unknown"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("computed tomography", CT), ("MR", MRI), ("ct", CT), ("T2-weighted image", MRI), ("PET/CT", "Nuclear Imaging"),
        ("chest radiograph", XRAY), ("H&E stain of the gland", "Microscopy Images"), ("oct", None), ("nothing", None),
    ],
)  # fmt: skip
def test_words_and_codes_of_modalities(text: str, expected: str | None) -> None:
    assert modality_of(text) == expected


def test_words_of_body_parts() -> None:
    assert body_part_of("CT of the liver") == "Abdomen" and body_part_of("a picture") is None


def test_as_many_rows_as_fill_every_share() -> None:
    settings = Balance(modalities={CT: 0.75, MRI: 0.25})
    assert wanted_rows({CT: 100, MRI: 10}, settings) == {CT: 30, MRI: 10}
    assert wanted_rows({CT: 100}, settings) == {CT: 0, MRI: 0}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"modalities": {"CT": 1.0}}, "no such modality"),
        ({"modalities": {CT: 0.5, MRI: 0.4}}, "add up to 0.9000"),
        ({"modalities": {CT: 1.5}}, "share above 0"),
        ({"rows": 5}, "rows goes with modalities"),
    ],
)
def test_shares_that_can_not_be_are_refused(values: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Balance.model_validate(values)


def test_the_papers_figure_is_as_it_was_printed() -> None:
    assert sum(before for _, before, _, _ in PUBLISHED) == pytest.approx(99.23)
    assert sum(after or 0 for _, _, after, _ in PUBLISHED) == pytest.approx(97.97)

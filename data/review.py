"""Experts judge descriptions without knowing how they were made: draw a sample, give out a form, read it back.

`draw` takes the same figures from data sets made by different methods, mixes their descriptions, and writes one
self-contained page per rater and a key that says which description is whose. `read` puts the filled forms together
again. The paper's design is 90 images under four methods, three experts, four criteria from 1 to 5 (arXiv 2406.19280,
section 4.4 and appendix G); it prints means only, so intervals and agreement are ours.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import krippendorff
import numpy as np
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console
from rich.table import Table
from scipy.stats import bootstrap

from data.mllm.requests import data_url
from huatuo_vision.cli import run_command
from huatuo_vision.html import render_page
from huatuo_vision.schema import UserError

TEMPLATE = Path(__file__).with_name("review.html.jinja")
KEY_FILE = "key.json"
REPORT_FILE = "review"  # .json and .md
LONGEST_SIDE, JPEG_QUALITY = 1024, 85
RESAMPLES = 10_000

# Our words for the paper's four criteria, with what the ends of the scale mean.
CRITERIA = {
    "accuracy": ("Accuracy", "Is what it says true of the image?", "mostly wrong", "free of errors"),
    "relevance": ("Relevance", "Does it speak of what matters in this image?", "beside the point", "to the point"),
    "completeness": ("Completeness", "Are the important findings there?", "most are missing", "none is missing"),
    "usefulness": ("Usefulness", "Would it help who learns or works with such images?", "of no use", "very useful"),
}
SCALE = (1, 2, 3, 4, 5)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class KeyItem(_Strict):
    pair: str
    method: str


class Key(_Strict):
    """What the raters must not see."""

    schema_version: Literal[1] = 1
    draw: str  # names this draw in its forms
    seed: int
    raters: list[str]
    items: dict[str, KeyItem]


class Filled(BaseModel):
    """What a form's page exports."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    draw: str
    rater: str
    ratings: dict[str, dict[str, Annotated[int, Field(strict=True, ge=1, le=5)]]]
    comments: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class _Description:
    pair: str
    method: str
    text: str
    file: Path
    row: int


def draw(data: Sequence[Path], out: Path, *, images: int, raters: Sequence[str], seed: int) -> Key:
    """Write a form for each rater and the key into `out`.

    `data` are data sets' folders (what the builder's `assemble` wrote), each made by one method. Raises UserError.
    """
    if len(set(raters)) != len(raters) or not all(raters):
        raise UserError(f"--raters {' '.join(raters)}: expected a name of its own for each rater")
    if (out / KEY_FILE).exists():
        raise UserError(f"{out} holds a draw already; give --out a new folder, so that no form loses its key")
    found = [description for folder in data for description in _descriptions(folder)]
    methods = sorted({description.method for description in found})
    by_pair: dict[str, dict[str, _Description]] = {}
    for description in found:
        if description.method in by_pair.setdefault(description.pair, {}):
            raise UserError(
                f"figure {description.pair!r} has two descriptions by the method {description.method}; give --data "
                "each method's data set once"
            )
        by_pair[description.pair][description.method] = description
    everywhere = sorted(pair for pair, by_method in by_pair.items() if len(by_method) == len(methods))
    if len(everywhere) < images:
        raise UserError(
            f"{len(everywhere)} figures have a description by every method ({', '.join(methods)}), and --images asks "
            f"for {images}; build more of the same figures, or ask for fewer"
        )
    rng = random.Random(seed)
    chosen = rng.sample(everywhere, images)
    items = [by_pair[pair][method] for pair in chosen for method in methods]
    rng.shuffle(items)
    width = len(str(len(items)))
    numbered = {f"{n:0{width}}": item for n, item in enumerate(items, 1)}
    drawn = [[item.pair, item.method, item.text] for item in items]
    name = hashlib.sha256(json.dumps([seed, drawn]).encode()).hexdigest()[:12]
    key = Key(
        draw=name,
        seed=seed,
        raters=list(raters),
        items={number: KeyItem(pair=item.pair, method=item.method) for number, item in numbered.items()},
    )
    # One copy of each figure's pictures, under a name that tells nothing.
    pictures = {pair: _pictures(by_pair[pair][methods[0]]) for pair in chosen}
    places = {pair: place for place, pair in enumerate(chosen)}
    out.mkdir(parents=True, exist_ok=True)
    for rater in raters:
        order = list(numbered)
        # Tired eyes and habits then fall on other items for each rater.
        random.Random(f"{seed}/{rater}").shuffle(order)
        page = render_page(
            TEMPLATE,
            title=f"Review of {len(items)} descriptions",
            rater=rater,
            criteria=CRITERIA,
            scale=SCALE,
            n_items=len(items),
            data={
                "form": {"draw": name, "rater": rater, "criteria": list(CRITERIA)},
                "items": [[n, places[numbered[n].pair], numbered[n].text] for n in order],
                "pictures": list(pictures.values()),
            },
        )
        (out / f"form-{_file_name(rater)}.html").write_text(page, encoding="utf-8")
    (out / KEY_FILE).write_text(key.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return key


def read(key_path: Path, forms: Sequence[Path]) -> dict[str, Any]:
    """The report on filled forms: per method and criterion mean and interval, per criterion the raters' agreement.

    An item's score is the mean of its raters'; intervals are 95 % percentile bootstraps over the figures. Agreement is
    Krippendorff's alpha for ordinal ratings, over the items as the raters saw them. Raises UserError.
    """
    key = _read(key_path, Key)
    filled: dict[str, Filled] = {}
    for path in forms:
        form = _read(path, Filled)
        if form.draw != key.draw:
            raise UserError(
                f"{path} was filled for the draw {form.draw}, and {key_path} is of {key.draw}; pair them up"
            )
        if form.rater not in key.raters:
            raise UserError(f"{path} is by {form.rater!r}; the raters of this draw are {', '.join(key.raters)}")
        if form.rater in filled:
            raise UserError(f"{path} is a second form by {form.rater!r}; give --forms the last one only")
        if unknown := sorted(form.ratings.keys() - key.items.keys()):
            raise UserError(f"{path} rates the item {unknown[0]!r}, which {key_path} does not know")
        if strange := sorted({name for marks in form.ratings.values() for name in marks} - CRITERIA.keys()):
            raise UserError(f"{path} rates {strange[0]!r}; the criteria are {', '.join(CRITERIA)}")
        filled[form.rater] = form
    if not any(marks for form in filled.values() for marks in form.ratings.values()):
        raise UserError("the forms hold no rating; fill them in and press their Save button")

    numbers = list(key.items)
    # (criteria, raters, items), NaN where a rater left an item out.
    marks = np.array(
        [
            [[form.ratings.get(n, {}).get(criterion, np.nan) for n in numbers] for form in filled.values()]
            for criterion in CRITERIA
        ],
        dtype=float,
    )
    methods = sorted({item.method for item in key.items.values()})
    of_method = {method: np.array([key.items[n].method == method for n in numbers]) for method in methods}
    return {
        "schema": 1,
        "draw": key.draw,
        "figures": len({item.pair for item in key.items.values()}),
        "raters": {
            rater: {"rated": sum(len(form.ratings.get(n, {})) == len(CRITERIA) for n in numbers), "of": len(numbers)}
            for rater, form in filled.items()
        },
        "raters_missing": [rater for rater in key.raters if rater not in filled],
        "methods": {
            method: {criterion: _mean(marks[c][:, of_method[method]], key.seed) for c, criterion in enumerate(CRITERIA)}
            for method in methods
        },
        "agreement": {criterion: _alpha(marks[c]) for c, criterion in enumerate(CRITERIA)},
        "comments": sum(bool(text.strip()) for form in filled.values() for text in form.comments.values()),
    }


def _mean(marks: np.ndarray, seed: int) -> dict[str, Any]:
    """`marks`: (raters, figures), NaN where not rated."""
    rated = ~np.isnan(marks)
    scores = np.nanmean(marks[:, rated.any(axis=0)], axis=0)
    interval = None
    if len(scores) > 1:
        rng = np.random.default_rng(seed)
        drawn = bootstrap((scores,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=rng)
        interval = [float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)]
    return {
        "mean": float(scores.mean()) if len(scores) else None,
        "ci95": interval,
        "figures": len(scores),
        "ratings": int(rated.sum()),
    }


def _alpha(marks: np.ndarray) -> float | None:
    """Krippendorff's alpha; None where no item has two ratings, or all ratings are one and the same."""
    rated = ~np.isnan(marks)
    shared = marks[:, rated.sum(axis=0) >= 2]
    values = shared[~np.isnan(shared)]
    if not values.size or np.unique(values).size < 2:
        return None
    return float(krippendorff.alpha(reliability_data=shared, level_of_measurement="ordinal", value_domain=list(SCALE)))


def report_markdown(report: Mapping[str, Any]) -> str:
    """The report as a table for people."""
    raters = ", ".join(f"{name} {r['rated']}/{r['of']}" for name, r in report["raters"].items())
    lines = [
        f"# Review {report['draw']}",
        "",
        f"{report['figures']} figures under {len(report['methods'])} methods; items rated: {raters}."
        + (f" No form yet: {', '.join(report['raters_missing'])}." if report["raters_missing"] else ""),
        "Means of ratings from 1 to 5 with 95 % bootstrap intervals over the figures.",
        "",
        "| method | " + " | ".join(CRITERIA) + " |",
        "| --- |" + " --- |" * len(CRITERIA),
    ]
    for method, by_criterion in report["methods"].items():
        lines.append(f"| {method} | " + " | ".join(_shown(by_criterion[c]) for c in CRITERIA) + " |")
    alphas = ["not defined" if report["agreement"][c] is None else f"{report['agreement'][c]:.2f}" for c in CRITERIA]
    lines.append("| *Krippendorff's alpha (ordinal)* | " + " | ".join(alphas) + " |")
    return "\n".join(lines) + "\n"


def _shown(score: Mapping[str, Any]) -> str:
    if score["mean"] is None:
        return "not rated"
    low, high = score["ci95"] or (None, None)
    return f"{score['mean']:.2f}" + ("" if low is None else f" ({low:.2f} to {high:.2f})")


def _descriptions(folder: Path) -> list[_Description]:
    """Every alignment row of a data set."""
    files = sorted(folder.glob("*/alignment/*.parquet"))
    if not files:
        raise UserError(f"{folder} holds no */alignment/*.parquet; expected a data set that the builder assembled")
    found = []
    for file in files:
        table = pq.read_table(file, columns=["pair", "method", "conversations"])
        for row, stored in enumerate(table.to_pylist()):
            text = stored["conversations"][-1]["value"]
            found.append(_Description(stored["pair"], stored["method"], text, file, row))
    return found


def _pictures(description: _Description) -> list[str]:
    """The row's pictures as data URLs; of its file, only the row group is read."""
    file = pq.ParquetFile(description.file)
    before = 0
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if description.row < before + rows:
            column = file.read_row_group(group, columns=["image"]).column("image")
            return [
                data_url(image["bytes"], LONGEST_SIDE, JPEG_QUALITY)
                for image in column[description.row - before].as_py()
            ]
        before += rows
    raise AssertionError(f"{description.file} has no row {description.row}")


def _file_name(rater: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in rater)


def _read(path: Path, model: type[BaseModel]) -> Any:
    try:
        return model.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror})") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(
            f"{path}: {where}: {first['msg']}; expected what a form's Save button, or draw, wrote"
        ) from None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data.review", description=__doc__.split("\n", 1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    drawing = commands.add_parser("draw", help="write forms and their key")
    drawing.add_argument("--data", type=Path, nargs="+", required=True, metavar="DIR", help="data sets, one a method")
    drawing.add_argument("--out", type=Path, required=True, metavar="DIR")
    drawing.add_argument("--images", type=int, default=90, help="figures (default: 90, as in the paper)")
    drawing.add_argument("--raters", nargs="+", default=["rater-1", "rater-2", "rater-3"], metavar="NAME")
    drawing.add_argument("--seed", type=int, default=0)
    reading = commands.add_parser("read", help="put filled forms together")
    reading.add_argument("--key", type=Path, required=True, metavar="FILE", help=f"the draw's {KEY_FILE}")
    reading.add_argument("--forms", type=Path, nargs="+", required=True, metavar="FILE", help="what the forms saved")
    reading.add_argument("--out", type=Path, required=True, metavar="DIR", help="for review.json and review.md")
    arguments = parser.parse_args()
    console = Console()
    if arguments.command == "draw":
        if arguments.images < 1:
            raise UserError(f"--images is {arguments.images}; expected 1 or more")
        key = draw(arguments.data, arguments.out, images=arguments.images, raters=arguments.raters, seed=arguments.seed)
        text = (
            f"{arguments.out}: {len(key.items)} items for {len(key.raters)} raters. Give each rater a form, keep "
            f"{KEY_FILE} to yourself, and collect what the forms save."
        )
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        return
    report = read(arguments.key, arguments.forms)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{REPORT_FILE}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (arguments.out / f"{REPORT_FILE}.md").write_text(report_markdown(report), encoding="utf-8")
    table = Table("method", *CRITERIA, title=f"review {report['draw']}")
    for method, by_criterion in report["methods"].items():
        table.add_row(method, *(_shown(by_criterion[criterion]) for criterion in CRITERIA))
    agreement = ("-" if a is None else f"{a:.2f}" for a in report["agreement"].values())
    table.add_row("Krippendorff's alpha", *agreement, style="dim")
    console.print(table)


if __name__ == "__main__":
    run_command(main)

"""Articles that were never written: synthetic JATS with drawn figures, for the builder's demonstration and tests.

    python -m data.phantom_articles --out DIR --articles N --seed S

writes `articles/` (what `python -m data.build --source` reads), `labelled/` (pictures with classes, to train the
classifier of figures) and `expected.json` (what was planted, and where the builder should drop it). The pictures are
data.phantom's, drawn larger; the sentences around them say what the pictures show and no more. Nothing in it is
medical data.

The articles are of the two layouts that the builder meets most (`PMC<id>.<v>/` with a JSON beside the XML, and a
folder of JATS with its figures), each with one fault where the table below says so; faults repeat as articles do.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from rich.console import Console

from data.phantom.drawing import draw_picture
from data.phantom.facts import BODY_PARTS_OF, COUNTS, MODALITIES, SIDES, SIZES, Facts
from huatuo_vision.cli import run_command
from huatuo_vision.schema import UserError

# Goes up whenever the same arguments would give other articles.
GENERATOR_VERSION = 1
EXPECTED_FILE = "expected.json"

SIDE = 420  # pictures measure 7/8 to 3/2 of it a side: above the paper's 336 pixels
SMALL_SIDE = 96
LABELLED = 120  # pictures to train the classifier of figures on, half of them medical

_WORDS_OF = {
    "X-ray": "radiograph", "CT": "computed tomography", "MRI": "magnetic resonance imaging",
    "ultrasound": "ultrasound", "histology": "histology", "fundus": "fundus photography",
}  # fmt: skip
_ORDINALS = ("first", "second", "third", "fourth")


@dataclass
class _Figure:
    """One `fig` of an article, and the files that belong to it (None: planted as missing)."""

    id: str
    label: str
    caption: str
    files: dict[str, bytes | None]  # as stored; the XML names them without or with their extension
    mentions: list[str] = field(default_factory=list)
    drop: str | None = None  # the reason under which the builder should drop it


@dataclass
class _Article:
    name: str
    title: str
    licence: str | None
    figures: list[_Figure]
    paragraphs: list[str] = field(default_factory=list)
    broken: Callable[[str], str] | None = None
    drop: str | None = None  # of the whole article


def _rng(seed: int, *place: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=place))


def _facts(rng: np.random.Generator) -> Facts:
    modality = MODALITIES[rng.integers(len(MODALITIES))]
    parts = BODY_PARTS_OF[modality]
    return Facts(
        modality,
        parts[rng.integers(len(parts))],
        int(rng.integers(len(COUNTS) + 1)),
        SIZES[rng.integers(len(SIZES))],
        SIDES[rng.integers(len(SIDES))],
    )


def _caption(facts: Facts, number: int) -> str:
    """What the picture shows, in the words of a figure legend."""
    if not facts.count:
        found = "without a lesion"
    else:
        noun = "lesion" if facts.count == 1 else "lesions"
        found = f"with {COUNTS[facts.count - 1]} {facts.size} {noun} on the {facts.side} side"
    picture = f"{_WORDS_OF[facts.modality].capitalize()} of the {facts.body_part} of patient {number}, {found}."
    return f"{picture} The examination was read by two radiologists for diagnosis; follow-up of the patient is shown."


def _mention(facts: Facts, number: int, reference: str) -> str:
    if facts.count:
        state, checked = f"{facts.size} lesions of the {facts.side} {facts.body_part}", "the biopsy of the lesion"
    else:
        state, checked = "normal tissue", "the follow-up by the radiologist"
    return (
        f"In patient {number} the {_WORDS_OF[facts.modality]} examination of the {facts.body_part} showed {state} "
        f"({reference}), which agreed with the clinical diagnosis and with {checked}."
    )


def _picture(facts: Facts, rng: np.random.Generator, side: int = SIDE) -> Image.Image:
    """A picture like no other: turned and unevenly lit, since data.phantom's views of one organ are nearly alike."""
    image = draw_picture(facts, rng, side).convert("RGB")
    image = image.rotate(rng.uniform(-30, 30), Image.Resampling.BILINEAR, fillcolor=(8, 8, 8))
    coarse = Image.fromarray(rng.uniform(0.35, 1.35, (4, 4)).astype(np.float32))
    light = np.asarray(coarse.resize(image.size, Image.Resampling.BICUBIC))[..., None]
    return Image.fromarray(np.clip(np.asarray(image) * light, 0, 255).astype(np.uint8))


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _chart(rng: np.random.Generator, side: int = SIDE) -> Image.Image:
    """A bar or line chart with axes, as journals print them."""
    width, height = side, round(side * 0.86)
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    left, bottom = width // 8, height - height // 8
    pen.line([(left, height // 12), (left, bottom), (width - width // 12, bottom)], fill="black", width=3)
    colours = ["#3366aa", "#cc6633", "#449944", "#aa4466"]
    n = int(rng.integers(4, 8))
    step = (width - left - width // 6) / n
    tops = bottom - rng.uniform(0.1, 0.8, n) * (bottom - height // 12)
    if rng.random() < 0.5:
        for k, top in enumerate(tops):
            x = left + 14 + k * step
            pen.rectangle([x, top, x + step * 0.7, bottom - 2], fill=colours[k % len(colours)])
    else:
        for series in range(2):
            ys = tops if series == 0 else bottom - rng.uniform(0.1, 0.8, n) * (bottom - height // 12)
            points = [(left + 14 + k * step, float(y)) for k, y in enumerate(ys)]
            pen.line(points, fill=colours[series], width=4)
    pen.text((left, bottom + 6), "group", fill="black", font_size=18)
    pen.text((4, height // 12), "value (%)", fill="black", font_size=16)
    return image


def _diagram(rng: np.random.Generator, side: int = SIDE) -> Image.Image:
    """Boxes and arrows."""
    image = Image.new("RGB", (side, side), "#fdfdfd")
    pen = ImageDraw.Draw(image)
    before = None
    for k in range(int(rng.integers(3, 6))):
        x, y = side * (0.1 + 0.4 * rng.random()), side * (0.06 + 0.18 * k)
        box = [x, y, x + side * 0.36, y + side * 0.1]
        pen.rounded_rectangle(box, 10, outline="#333333", fill=("#dfe9f5", "#f5e6d8", "#e2f2e0")[k % 3], width=3)
        pen.text((x + 12, y + 8), f"step {k + 1}", fill="black", font_size=20)
        if before is not None:
            pen.line([before, (x + side * 0.18, y)], fill="#333333", width=3)
        before = (x + side * 0.18, y + side * 0.1)
    return image


class _Writer:
    """Makes articles one after another; `number` counts patients, so that no two captions are alike by accident."""

    def __init__(self, seed: int):
        self.seed = seed
        self.number = 0

    def figure(self, article: int, place: int, *, n_images: int = 1, extension: str = "jpg") -> _Figure:
        rng = _rng(self.seed, article, place)
        self.number += 1
        figure_id = f"f{place + 1}"
        facts = _facts(rng)
        files: dict[str, bytes | None] = {}
        for k in range(n_images):
            # Several pictures of one figure show the same examination with other findings.
            shown = facts if k == 0 else replace(facts, count=(facts.count + k) % 4)
            name = f"phantom-{article}-{figure_id}{'abcd'[k] if n_images > 1 else ''}.{extension}"
            files[name] = _encoded(_picture(shown, rng), {"jpg": "JPEG", "png": "PNG", "tif": "TIFF"}[extension])
        caption = _caption(facts, self.number)
        if n_images > 1:
            caption += f" The {_ORDINALS[n_images - 1]} image is the last of the series."
        figure = _Figure(figure_id, f"Figure {place + 1}", caption, files)
        reference = f'<xref ref-type="fig" rid="{figure_id}">Fig. {place + 1}</xref>'
        figure.mentions.append(_mention(facts, self.number, reference))
        return figure


def _sound(writer: _Writer, n: int, n_figures: int = 2) -> _Article:
    name = f"PMC{9_000_000 + n}.1" if n % 2 else f"phantom-{n}"
    figures = [writer.figure(n, place) for place in range(n_figures)]
    return _Article(name, f"Phantom case series {n}", "https://creativecommons.org/licenses/by/4.0/", figures)


# The faults, in the order in which articles carry them; each changes a sound article.
def _plant_nothing(article: _Article, writer: _Writer, n: int) -> None:
    """Three figures, one of them of three pictures, one as TIFF; a range of references; HTML written as text."""
    article.figures[1] = writer.figure(n, 1, n_images=3, extension="png")
    article.figures.append(writer.figure(n, 2, extension="tif"))
    article.paragraphs.append(
        'All examinations (<xref ref-type="fig" rid="f1">Figs. 1</xref>-<xref ref-type="fig" rid="f3">3</xref>) were '
        "made with the same scanner and read for diagnosis."
    )
    article.figures[0].caption += " &lt;b onclick=&quot;alert(1)&quot;&gt;Bold&lt;/b&gt; &lt;script&gt;x&lt;/script&gt;"


def _plant_missing_file(article: _Article, writer: _Writer, n: int) -> None:
    figure = article.figures[1]
    figure.files = dict.fromkeys(figure.files)
    figure.drop = "missing_image"


def _plant_empty_and_animated(article: _Article, writer: _Writer, n: int) -> None:
    first, second = article.figures
    first.files = dict.fromkeys(first.files, b"")
    first.drop = "empty_image"
    frames = [Image.new("L", (SIDE, SIDE), 60 * k) for k in range(3)]
    gif = _encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    second.files = {name.rsplit(".", 1)[0] + ".gif": gif for name in second.files}
    second.drop = "animated_image"


def _plant_small(article: _Article, writer: _Writer, n: int) -> None:
    figure = article.figures[1]
    picture = _picture(_facts(_rng(writer.seed, n, 50)), _rng(writer.seed, n, 51), SMALL_SIDE)
    figure.files = {name: _encoded(picture, "JPEG") for name in figure.files}
    figure.drop = "low_resolution"


def _plant_charts(article: _Article, writer: _Writer, n: int) -> None:
    for place, (figure, draw) in enumerate(zip(article.figures, (_chart, _diagram), strict=False)):
        picture = draw(_rng(writer.seed, n, 60 + place))
        figure.files = {name: _encoded(picture, "JPEG", quality=92) for name in figure.files}
        figure.drop = "not_medical"


def _plant_few_terms(article: _Article, writer: _Writer, n: int) -> None:
    figure = article.figures[1]
    figure.caption = f"The view from the window of room {n}."
    figure.mentions = ['What could be seen is shown in <xref ref-type="fig" rid="f2">Figure 2</xref>.']
    figure.drop = "few_terms"


def _plant_no_licence(article: _Article, writer: _Writer, n: int) -> None:
    article.licence = None
    article.drop = "no_licence"


def _plant_noncommercial(article: _Article, writer: _Writer, n: int) -> None:
    article.licence = "https://creativecommons.org/licenses/by-nc/4.0/"


def _plant_broken_xml(article: _Article, writer: _Writer, n: int) -> None:
    article.broken = lambda xml: xml[: len(xml) * 2 // 3]
    article.drop = "broken_xml"


def _plant_entity_bomb(article: _Article, writer: _Writer, n: int) -> None:
    layers = "".join(f'<!ENTITY e{k} "{f"&e{k - 1};" * 10}">' for k in range(1, 10))
    doctype = f'<!DOCTYPE article SYSTEM "http://127.0.0.1:9/jats.dtd" [<!ENTITY e0 "lesion">{layers}]>'
    article.broken = lambda xml: xml.replace("<article ", doctype + "\n<article ", 1).replace("made", "&e9;", 1)
    article.drop = "broken_xml"


_FAULTS: tuple[Callable[[_Article, _Writer, int], None], ...] = (
    _plant_nothing,
    _plant_missing_file,
    _plant_charts,
    _plant_small,
    _plant_few_terms,
    _plant_empty_and_animated,
    _plant_noncommercial,
    _plant_no_licence,
    _plant_broken_xml,
    _plant_entity_bomb,
)


def _plant_duplicates(articles: Sequence[_Article]) -> None:
    """The last article prints figures of the first again: the same picture, a re-encoded one, a near-copied caption."""
    source, copy = articles[0], articles[-1]
    same, again = source.figures[0], copy.figures[0]
    again.files = dict(zip(again.files, same.files.values(), strict=True))
    again.drop = "same_image"
    other, encoded = source.figures[2], copy.figures[1]
    picture = Image.open(io.BytesIO(next(iter(other.files.values())))).convert("RGB")
    encoded.files = {name: _encoded(picture, "JPEG", quality=60) for name in encoded.files}
    encoded.drop = "near_image"


def _xml(article: _Article) -> str:
    licence = ""
    if article.licence is not None:
        text = f'<license xlink:href="{article.licence}"><license-p>Open access.</license-p></license>'
        licence = f"<permissions>{text}</permissions>"
    figures = []
    for figure in article.figures:
        graphics = "".join(f'<graphic xlink:href="{name.rsplit(".", 1)[0]}"/>' for name in figure.files)
        figures.append(
            f'<fig id="{figure.id}"><label>{figure.label}</label><caption><p>{figure.caption}</p></caption>'
            f"{graphics}</fig>"
        )
    text = "".join(f"<p>{paragraph}</p>" for figure in article.figures for paragraph in figure.mentions)
    text += "".join(f"<p>{paragraph}</p>" for paragraph in article.paragraphs)
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        '<article article-type="research-article" xmlns:xlink="http://www.w3.org/1999/xlink">'
        "<front><journal-meta><journal-title-group><journal-title>Phantom Journal</journal-title></journal-title-group>"
        f"</journal-meta><article-meta><title-group><article-title>{escape(article.title)}</article-title></title-group>"
        "<contrib-group><contrib><name><surname>Nobody</surname></name></contrib></contrib-group>"
        f"<pub-date><year>2026</year></pub-date>{licence}</article-meta></front>"
        "<body><sec><title>Methods</title><p>Examinations were made and read.</p></sec>"
        f"<sec><title>Results</title>{text}{''.join(figures)}</sec></body></article>\n"
    )


def make_articles(out: Path, articles: int, seed: int) -> dict[str, object]:
    """Make everything in `out`, unless it is there already; returns what was planted.

    It is written beside `out` and renamed when whole. Raises UserError where `out` holds anything else.
    """
    least = len(_FAULTS) + 1
    if not least <= articles <= 100_000:
        raise UserError(f"--articles is {articles}; expected {least} (each fault once, and repeated figures) to 100000")
    asked = {"articles": articles, "seed": seed, "generator_version": GENERATOR_VERSION}
    if out.exists():
        try:
            there = json.loads((out / EXPECTED_FILE).read_text(encoding="utf-8"))
            if there["arguments"] == asked:
                return there
        except (OSError, ValueError, KeyError, TypeError):
            pass
        raise UserError(f"{out} holds something else than these articles; delete it or give --out a new folder")
    unfinished = out.parent / f".{out.name}.{uuid.uuid4().hex[:12]}.unfinished"
    try:
        expected = _write(unfinished, articles, seed, asked)
        unfinished.rename(out)
    except OSError as error:
        raise UserError(f"{out} can't be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return expected


def _write(folder: Path, n_articles: int, seed: int, asked: dict[str, int]) -> dict[str, object]:
    writer = _Writer(seed)
    made: list[_Article] = []
    for n in range(n_articles):
        article = _sound(writer, n)
        if n < n_articles - 1:
            # Every round of faults is followed by as many sound articles.
            place = n % (2 * len(_FAULTS))
            if place < len(_FAULTS):
                _FAULTS[place](article, writer, n)
        made.append(article)
    _plant_duplicates(made)
    dropped: dict[str, int] = {}
    for article in made:
        _write_article(folder / "articles" / article.name, article)
        for figure in article.figures:
            # An article that can't be parsed is one row; the figures of another count each.
            reason = article.drop or figure.drop
            if reason == "broken_xml" and figure is not article.figures[0]:
                continue
            if reason:
                dropped[reason] = dropped.get(reason, 0) + 1
    figures = sum(1 if a.drop == "broken_xml" else len(a.figures) for a in made)
    expected = {
        "synthetic": "drawn and written by data/phantom_articles.py; no medical data",
        "arguments": asked,
        "rows": figures,
        "dropped": dict(sorted(dropped.items())),
        "kept": figures - sum(dropped.values()),
    }
    (folder / EXPECTED_FILE).write_text(json.dumps(expected, indent=2) + "\n", encoding="utf-8")
    _write_labelled(folder / "labelled", seed)
    return expected


def _write_article(folder: Path, article: _Article) -> None:
    folder.mkdir(parents=True)
    xml = _xml(article)
    (folder / f"{article.name}.xml").write_text(article.broken(xml) if article.broken else xml, encoding="utf-8")
    for figure in article.figures:
        for name, content in figure.files.items():
            if content is not None:
                (folder / name).write_bytes(content)
    if article.name.startswith("PMC"):
        code = {None: None}.get(article.licence, "CC BY-NC" if "by-nc" in (article.licence or "") else "CC BY")
        about = {
            "pmcid": article.name.split(".")[0],
            "version": 1,
            "title": article.title,
            "is_pmc_openaccess": True,
            "is_retracted": False,
            "license_code": code,
        }
        (folder / f"{article.name}.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _write_labelled(folder: Path, seed: int) -> None:
    """Pictures of their own, none of them in an article: half medical, a quarter charts, a quarter diagrams."""
    folder.mkdir(parents=True)
    rows = []
    for n in range(LABELLED):
        rng = _rng(seed, 1_000_000, n)
        label = ("medical", "chart", "medical", "diagram")[n % 4]
        if label == "medical":
            picture = _picture(_facts(rng), rng)
        else:
            picture = (_chart if label == "chart" else _diagram)(rng)
        name = f"{label}-{n}.jpg"
        picture.save(folder / name, quality=90)
        rows.append({"image": name, "label": label})
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data.phantom_articles", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new folder")
    parser.add_argument("--articles", type=int, default=60, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="the same seed gives the same articles")
    arguments = parser.parse_args()
    expected = make_articles(arguments.out, arguments.articles, arguments.seed)
    text = (
        f"{arguments.out}: {arguments.articles} synthetic articles, {expected['rows']} rows, of which "
        f"{expected['kept']} are sound; what was planted: expected.json"
    )
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run_command(main)

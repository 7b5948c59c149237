"""Repeats of pictures and captions, and overlaps with evaluation sets."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("datatrove")

from PIL import Image
from rich.console import Console

from data.config import Dedup, Executor, Guard
from data.dedup.guard import quoted_question, runs_of_words
from data.dedup.nearest import near_hashes, repeated_captions
from data.dedup.pictures import likeness, shrunk
from data.dedup.stage import REPORT_FILE, contamination, dedup_passes
from data.executor import LocalRun, start
from data.phantom.write import make_phantom
from data.sources.images import store_encoded
from data.tables import IMAGE_SCHEMA, Pair, RunFolder, StoredImage, row_writer, stage_output
from huatuo_vision.schema import UserError
from tests.data.rows import pair
from tests.evaluation import layouts


def textured(seed: int, size: tuple[int, int] = (240, 180)) -> Image.Image:
    """Blobs of many sizes: a picture with edges of its own."""
    rng = np.random.default_rng(seed)
    layers = [
        np.asarray(
            Image.fromarray(rng.integers(0, 256, (n, n), np.uint8)).resize(size, Image.Resampling.BICUBIC), float
        )
        for n in (4, 9, 20, 45)
    ]
    return Image.fromarray(np.clip(np.mean(layers, axis=0) * 2 - 128, 0, 255).astype(np.uint8)).convert("RGB")


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> StoredImage:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return store_encoded(buffer.getvalue(), "x")[0]


def folder(path: Path, ranks: list[list[tuple[Pair, list[StoredImage]]]], complete: str = "image-filter") -> RunFolder:
    """A run folder in which a stage is complete with these rows and pictures."""
    run = RunFolder(path)
    (path / "logs").mkdir(parents=True)
    for stage in ("ingest", complete):
        (path / "logs" / f"{stage}.json").write_text(json.dumps({"fingerprint": "0", "tasks": len(ranks)}))
        for rank, rows in enumerate(ranks):
            with stage_output(run, stage, rank, None) as output:
                for row, _ in rows:
                    output.write(row)
            marker = run.logging_dir(stage) / "completions" / f"{rank:05d}"
            marker.parent.mkdir(exist_ok=True)
            marker.touch()
    for rank, rows in enumerate(ranks):
        with row_writer(run.images_file(rank), IMAGE_SCHEMA) as images:
            for image in {image.id: image for _, of in rows for image in of}.values():
                images.write(image.row(), len(image.data))
    return run


def row(number: int, images: list[StoredImage], **changed: object) -> tuple[Pair, list[StoredImage]]:
    values = {"image_ids": tuple(image.id for image in images), "caption": f"{number * 7919} caption {number}"}
    return pair(number, **values | changed), images


def dedup(run: RunFolder, **settings: object) -> tuple[dict[str, Pair], dict[str, tuple[str, str]]]:
    """The rows that stay, and reason and detail of those that don't."""
    upstream = ""
    with LocalRun(Executor(workers=1), Console(quiet=True)) as local:
        for work in dedup_passes(run, Dedup(**settings), run.tasks("image-filter")):
            upstream = start(run, work, upstream)
            local.run(run, work)
    kept = {p.id: p for rank in range(run.tasks("dedup")) for p in run.pairs("dedup", rank)}
    dropped = {d.id: (d.reason, d.detail) for d in run.dropped("dedup")}
    assert run.counts("dedup").rows_in == len(kept) + len(dropped)
    return kept, dropped


def test_copies_recodings_scalings_and_crops_drop_and_others_stay(tmp_path):
    original = textured(1)
    cropped = original.crop((0, 8, 240, 172))
    ranks = [
        [row(1, [encoded(original)]), row(2, [encoded(textured(2))]), row(3, [encoded(textured(3))])],
        [
            row(4, [encoded(original)], caption="longer than the other caption by far"),
            row(5, [encoded(original, "JPEG", quality=60)]),
            row(6, [encoded(original.resize((200, 150)))]),
            row(7, [encoded(cropped)]),
            row(8, [encoded(original.transpose(Image.Transpose.FLIP_LEFT_RIGHT))]),
        ],
    ]
    kept, dropped = dedup(folder(tmp_path, ranks))
    stays = "PMC4.1-f1"  # of the largest, the longest caption
    assert dropped == {
        "PMC1.1-f1": ("same_image", stays),
        "PMC5.1-f1": ("near_image", stays),
        "PMC6.1-f1": ("near_image", stays),
        "PMC7.1-f1": ("near_image", stays),
    }
    assert sorted(kept) == ["PMC2.1-f1", "PMC3.1-f1", "PMC4.1-f1", "PMC8.1-f1"]


def test_a_figure_repeats_only_if_all_its_pictures_do(tmp_path):
    a, b, c = (encoded(textured(n)) for n in (1, 2, 3))
    rows = [row(1, [a, b]), row(2, [a]), row(3, [b, c]), row(4, [a, b], caption="x")]
    kept, dropped = dedup(folder(tmp_path, [rows]))
    assert dropped == {"PMC2.1-f1": ("same_image", "PMC1.1-f1"), "PMC4.1-f1": ("same_image", "PMC1.1-f1")}
    assert "PMC3.1-f1" in kept


def test_which_row_stays_does_not_depend_on_where_it_stands(tmp_path):
    picture = encoded(textured(1))
    rows = [row(n, [picture], caption="same length") for n in range(1, 5)]
    results = []
    for name, order in (("a", rows), ("b", rows[::-1]), ("c", [rows[2], rows[0], rows[3], rows[1]])):
        kept, _ = dedup(folder(tmp_path / name, [order[:2], order[2:]]))
        results.append(list(kept))
    assert results == [["PMC1.1-f1"]] * 3


def test_captions_alike_drop_unless_asked_not_to(tmp_path):
    words = "axial contrast enhanced ct of the abdomen shows a large hypodense lesion in the right lobe of the liver"
    rows = [
        row(1, [encoded(textured(1))], caption=words),
        row(2, [encoded(textured(2))], caption=words.capitalize() + "."),
        row(3, [encoded(textured(3))], caption="A radiograph of the left knee."),
    ]
    _, dropped = dedup(folder(tmp_path / "a", [rows]))
    assert dropped == {"PMC1.1-f1": ("near_caption", "PMC2.1-f1")}
    _, dropped = dedup(folder(tmp_path / "b", [rows]), min_cosine=None)
    assert dropped == {}


def test_the_same_id_twice_is_dropped_once(tmp_path):
    rows = [row(1, [encoded(textured(n))], caption=f"caption {n * 31}") for n in (1, 2)]
    kept, dropped = dedup(folder(tmp_path, [[rows[0]], [rows[1]]]))
    assert list(kept) == ["PMC1.1-f1"] and dropped["PMC1.1-f1"][0] == "duplicate_id"


def test_vectors_in_clusters_lose_no_planted_repeat():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(5000, 64)).astype(np.float32)
    vectors[4000:] = vectors[:1000] + rng.normal(size=(1000, 64)).astype(np.float32) * 0.02
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = list(repeated_captions(vectors.astype(np.float16), 0.95))
    pairs = {(row, kept) for row, kept, _ in found}
    expected = {(4000 + k, k) for k in range(1000)}
    assert not pairs - expected and len(pairs & expected) >= 990
    assert found == list(repeated_captions(vectors.astype(np.float16), 0.95))


def test_hashes_in_an_inverted_file_lose_few():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 256, (20_000, 32), np.uint8)
    flipped = np.unpackbits(hashes[:500], axis=1)
    flipped[np.arange(500)[:, None], rng.integers(0, 256, (500, 20))] ^= 1
    queries = np.packbits(flipped, axis=1)
    found = {
        exact: {
            (q, h) for block in near_hashes(hashes, queries, 60, exact=exact) for q, h in zip(*block[:2], strict=True)
        }
        for exact in (True, False)
    }
    assert found[True] == {(k, k) for k in range(500)}
    assert len(found[False]) >= 450


def test_likeness_is_of_edges_and_ignores_scale_crop_and_contrast():
    original = textured(1, (400, 300))
    changed = original.crop((20, 10, 390, 290)).resize((250, 190)).point(lambda v: 40 + v // 2)
    assert likeness(shrunk(original), shrunk(changed)) > 0.8
    assert likeness(shrunk(original), shrunk(textured(2, (400, 300)))) < 0.5
    assert likeness(shrunk(original), shrunk(Image.new("RGB", (400, 300)))) < 0.5


# The contamination guard ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def phantom(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("phantom") / "set"
    make_phantom(made, train=0, test=12, seed=1, size=160, workers=1)
    return made


def contaminated(path: Path, phantom: Path) -> RunFolder:
    with Image.open(sorted((phantom / "images").iterdir())[0]) as image:
        shown = image.convert("RGB")
    rows = [
        row(1, [encoded(shown)]),
        row(2, [encoded(shown.resize((shown.width * 2, shown.height * 2)), "JPEG", quality=70)]),
        row(3, [encoded(textured(3))]),
    ]
    return folder(path, [rows])


def test_pictures_of_an_evaluation_set_drop_or_are_flagged(tmp_path, phantom):
    guard = {"benchmarks": {"phantom": str(phantom)}}
    run = contaminated(tmp_path / "drop", phantom)
    kept, dropped = dedup(run, guard=guard, min_likeness=0.9)
    assert list(kept) == ["PMC3.1-f1"]
    assert {reason for reason, _ in dropped.values()} == {"evaluation_image"}
    assert all(detail.startswith("phantom:") for _, detail in dropped.values())
    report = json.loads((run.path / "decisions" / REPORT_FILE).read_text())
    assert report["counts"] == {"evaluation_image": 2} and report["benchmarks"]["phantom"]["questions"] == 12
    assert [overlap["id"] for overlap in report["overlaps"]] == ["PMC1.1-f1", "PMC2.1-f1"]

    kept, dropped = dedup(contaminated(tmp_path / "flag", phantom), guard=guard | {"on_overlap": "flag"})
    flagged = {id_: row.overlaps for id_, row in kept.items()}
    assert flagged["PMC3.1-f1"] is None and any(
        f and f.startswith("evaluation_image: phantom:") for f in flagged.values()
    )


def test_a_question_is_found_in_the_texts_around_a_figure():
    question = "Which vessel supplies the posterior wall of the left ventricle in this patient?"
    known = dict.fromkeys(runs_of_words(question, 8), "b:1")
    quoting = pair(1, context=("We asked: which vessel supplies the POSTERIOR wall, of the left ventricle?",))
    assert quoted_question(quoting, known, 8) == "b:1"
    assert quoted_question(pair(2), known, 8) is None


def test_held_out_cases_drop_by_their_ids(tmp_path):
    (tmp_path / "held-out.txt").write_text("PMC1.1\nelsewhere\n\n")
    rows = [row(n, [encoded(textured(n))]) for n in (1, 2)]
    run = folder(tmp_path / "run", [rows])
    kept, dropped = dedup(run, guard={"cases": str(tmp_path / "held-out.txt")})
    assert list(kept) == ["PMC2.1-f1"] and dropped == {"PMC1.1-f1": ("evaluation_case", "PMC1.1")}
    found = contamination(run)
    assert found["cases"] == 2 and found["cases_not_found"] == ["elsewhere"]
    assert [overlap["article"] for overlap in found["overlaps"]] == ["PMC1.1"]


def test_held_out_cases_are_known_by_other_names(tmp_path):
    (tmp_path / "held-out.txt").write_text("Eurorad-19250\nOWN-c1\n")
    names = ["eurorad-case19250", "own-c1", "own-c10"]
    rows = [row(n, [encoded(textured(n))], article=name) for n, name in enumerate(names, 1)]
    kept, dropped = dedup(folder(tmp_path / "run", [rows]), guard={"cases": str(tmp_path / "held-out.txt")})
    assert list(kept) == ["PMC3.1-f1"]
    assert [detail for _, detail in dropped.values()] == ["Eurorad-19250", "OWN-c1"]


def test_cases_of_a_benchmark_drop_by_their_numbers_and_by_their_discussions(tmp_path):
    discussion = "Oedema of both thighs points to myositis, and the skin of the hands to the antisynthetase syndrome."
    cases = layouts.medthinkvqa(tmp_path / "cases", [layouts.medthinkvqa_row(0, discussion=discussion)])
    rows = [
        row(1, [encoded(textured(1))], article="eurorad-19250"),
        row(2, [encoded(textured(2))], article="eurorad-19259"),
        row(3, [encoded(textured(3))], caption=f"A teaching file. {discussion}"),
    ]
    kept, dropped = dedup(folder(tmp_path / "run", [rows]), guard={"benchmarks": {"medthinkvqa": str(cases)}})
    assert list(kept) == ["PMC2.1-f1"]
    assert dropped == {
        "PMC1.1-f1": ("evaluation_case", "medthinkvqa:eurorad/19250"),
        "PMC3.1-f1": ("evaluation_question", "medthinkvqa:eurorad/19250"),
    }


@pytest.mark.parametrize(("content", "expected"), [(None, "can't be read"), ("\n \n", "names no case")])
def test_a_list_of_cases_that_says_nothing_is_refused(tmp_path, content, expected):
    if content is not None:
        (tmp_path / "held-out.txt").write_text(content)
    with pytest.raises(UserError, match=expected):
        dedup_passes(RunFolder(tmp_path), Dedup(guard=Guard(cases=str(tmp_path / "held-out.txt"))), 1)


def test_tags_are_not_compared_as_captions(tmp_path):
    rows = [row(n, [encoded(textured(n))], caption="CT, liver", annotated=n > 2) for n in range(1, 5)]
    kept, dropped = dedup(folder(tmp_path, [rows]))
    assert set(dropped) == {"PMC4.1-f1"} and dropped["PMC4.1-f1"][0] == "near_caption" and len(kept) == 3


def test_an_unknown_benchmark_is_refused(tmp_path):
    with pytest.raises(UserError, match="'vqa' is no benchmark; expected phantom"):
        dedup_passes(RunFolder(tmp_path), Dedup(guard=Guard(benchmarks={"vqa": None})), 1)


@pytest.mark.skipif("HUATUO_SAMPLES" not in os.environ, reason="needs the real samples")
def test_labelled_repeats_of_real_figures_drop_and_nothing_else(tmp_path):
    source = Path(os.environ["HUATUO_SAMPLES"]) / "real_sample"
    samples = [json.loads(line) for line in (source / "samples.jsonl").read_text().splitlines()]
    rows = []
    for number, sample in enumerate(samples, start=1):
        stored = store_encoded((source / sample["image"]).read_bytes(), sample["id"])[0]
        rows.append(row(number, [stored], id=sample["id"], caption=sample["caption"]))
    _, dropped = dedup(folder(tmp_path, [rows[:50], rows[50:]]))
    labelled = {frozenset((s["id"], other)) for s in samples for other in s["near_duplicate_of"] or ()}
    assert {frozenset((id_, kept)) for id_, (_, kept) in dropped.items()} == labelled and len(labelled) == 3

"""Vocabulary, text filter, image filter and its classifier."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("datatrove")

from PIL import Image

from data.config import ImageEncoder, ImageFilter, TextFilter
from data.filters.classifier import Classifier, load_classifier, train
from data.filters.encoders import image_encoder
from data.filters.image import LargeEnough, Medical
from data.filters.text import OWN_VOCABULARY, CountTerms, read_entries, text_filter_pass
from data.filters.vocabulary import cleaned, mesh_entries, specialist_entries
from data.tables import Dropped, Pair, RunFolder
from huatuo_vision.schema import UserError
from huatuo_vision.terms import Terms
from tests.data.rows import complete_stage, pair

ROOT = Path(__file__).parents[2]

# As the documentation of the SPECIALIST Lexicon prints unit records.
LEXICON = """{base=anesthetic
spelling_variant=anaesthetic
entry=E0330018
\tcat=noun
\tvariants=reg
}
{base=biopsy
entry=E1
\tcat=noun
\tvariants=reg
}
{base=vertebra
entry=E2
\tcat=noun
\tvariants=glreg
}
{base=finding
entry=E3
\tcat=noun
\tvariants=reg
}
{base=inject
entry=E4
\tcat=verb
\tvariants=reg
}
{base=foot
entry=E5
\tcat=noun
\tvariants=irreg|foot|feet|
}
"""
MESH = """<?xml version="1.0"?><!DOCTYPE DescriptorRecordSet SYSTEM "https://www.nlm.nih.gov/x.dtd"><DescriptorRecordSet>
<DescriptorRecord><DescriptorUI>D1</DescriptorUI><DescriptorName><String>Tomography, X-Ray</String></DescriptorName>
<TreeNumberList><TreeNumber>E01.370</TreeNumber></TreeNumberList><ConceptList><Concept><TermList><Term><String>CAT Scan
</String></Term></TermList></Concept></ConceptList></DescriptorRecord>
<DescriptorRecord><DescriptorName><String>Philosophy</String></DescriptorName>
<TreeNumberList><TreeNumber>K01.752</TreeNumber></TreeNumberList></DescriptorRecord></DescriptorRecordSet>"""


def test_entries_count_once_as_whole_words_in_any_case():
    vocabulary = Terms([("lung", "lungs"), ("lung cancer",), ("x-ray",), ("ct",)])
    assert vocabulary.count("Lung cancer of both lungs; LUNG.") == 2
    assert vocabulary.count("An X-ray, (CT)!") == 2
    assert vocabulary.count("lunge, tract, plungs, x-rays") == 0
    assert Terms([("cold",), ("common cold", "cold")]).count("cold") == 2


def test_the_filter_counts_over_caption_and_mentions_and_says_how_many():
    step = CountTerms(OWN_VOCABULARY, TextFilter(min_terms=5))
    rich = pair(1, caption="Chest radiograph with pleural effusion.", context=("Pneumonia of the left lung.",))
    poor = pair(2, caption="The chest.", context=())
    before = Dropped("x", "missing_image")
    kept, dropped, passed = step.run(iter([rich, poor, before]))
    assert isinstance(kept, Pair) and kept.terms >= 5
    assert (dropped.id, dropped.reason, dropped.detail) == (poor.id, "few_terms", "1 of at least 5")
    assert passed is before


def test_tags_are_let_through_and_short_captions_are_not():
    step = CountTerms(OWN_VOCABULARY, TextFilter(min_terms=0, min_words=3))
    tags, short = pair(1, caption="CT", annotated=False), pair(2, caption="Two words")
    kept, dropped = step.run(iter([tags, short]))
    assert kept is tags and (dropped.reason, dropped.detail) == ("few_words", "2 of at least 3")


def test_the_list_of_our_own_is_sound():
    entries = read_entries(OWN_VOCABULARY)
    assert 600 < len(entries) < 800 and len({e[0] for e in entries}) == len(entries)


@pytest.mark.parametrize(
    "content",
    [b"", b"# only\n", b"<?xml version='1.0'?><a/>", LEXICON.encode(), b"E1|lung|noun\n", b"\xff\xfe", b"x" * 300],
)
def test_a_vocabulary_of_another_format_is_refused(tmp_path, content):
    (tmp_path / "v.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"v\.txt.*expected an entry a line"):
        read_entries(tmp_path / "v.txt")
    with pytest.raises(UserError, match="does not exist; python -m data.filters.vocabulary"):
        read_entries(tmp_path / "gone.txt")


def test_another_vocabulary_is_another_stage(tmp_path):
    def settings(text: str) -> object:
        (tmp_path / "v.txt").write_text(text)
        return text_filter_pass(RunFolder(tmp_path), TextFilter(vocabulary=str(tmp_path / "v.txt")), 1).settings

    assert settings("lung\n") != settings("liver\n")


def test_the_specialist_lexicon_gives_nouns_with_spellings_and_plurals(tmp_path):
    (tmp_path / "LEXICON").write_text(LEXICON)
    found = cleaned(specialist_entries(tmp_path / "LEXICON"), {"finding"})
    assert found == [
        ("anesthetic", "anaesthetic", "anesthetics", "anaesthetics"),
        ("biopsy", "biopsies"),
        ("foot", "feet"),
        ("vertebra", "vertebrae"),
    ]


def test_mesh_gives_entry_terms_of_the_trees_both_ways_round(tmp_path):
    (tmp_path / "desc.xml").write_text(MESH)
    found = cleaned(mesh_entries(tmp_path / "desc.xml", ("A", "E")), set())
    assert found == [("x-ray tomography", "tomography, x-ray", "cat scan")]


@pytest.mark.parametrize("option", ["--specialist", "--mesh"])
def test_the_command_refuses_other_files_in_one_sentence(tmp_path, option):
    (tmp_path / "other").write_text("a list of words\n" if option == "--specialist" else "<a/>")
    command = [sys.executable, "-m", "data.filters.vocabulary", option, tmp_path / "other", "--out", tmp_path / "v.txt"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "expected" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "v.txt").exists()


def test_what_the_command_writes_the_filter_reads(tmp_path):
    (tmp_path / "LEXICON").write_text(LEXICON)
    command = [sys.executable, "-m", "data.filters.vocabulary", "--specialist", tmp_path / "LEXICON"]
    subprocess.run([*command, "--out", tmp_path / "v.txt"], cwd=ROOT, capture_output=True, check=True)
    assert ("biopsy", "biopsies") in read_entries(tmp_path / "v.txt")


def test_small_pictures_drop_and_one_small_picture_drops_its_figure(tmp_path):
    run = complete_stage(tmp_path, "text-filter", [[pair(1), pair(2, 2)]])
    limit = 40  # the pictures of tests.data.rows are 48 x 40
    assert all(isinstance(row, Pair) for row in LargeEnough(run, limit).run(run.pairs("text-filter", 0), 0))
    dropped = list(LargeEnough(run, limit + 1).run(run.pairs("text-filter", 0), 0))
    assert {row.reason for row in dropped} == {"low_resolution"} and dropped[0].detail == "40 pixels of at least 41"


def photographs_and_charts(n: int) -> tuple[list[Image.Image], list[str]]:
    """Noise in soft colours, and white pages with black lines."""
    pictures, labels = [], []
    for k in range(n):
        rng = np.random.default_rng(k)
        if k % 2:
            pixels = np.full((90, 120, 3), 255, np.uint8)
            pixels[rng.integers(5, 85, 6)] = 0
            pixels[:, rng.integers(5, 115, 6)] = 0
        else:
            soft = Image.fromarray(rng.integers(0, 255, (6, 8, 3), np.uint8)).resize((120, 90))
            pixels = np.clip(np.asarray(soft) + rng.normal(0, 8, (90, 120, 3)), 0, 255).astype(np.uint8)
        pictures.append(Image.fromarray(pixels))
        labels.append("chart" if k % 2 else "medical")
    return pictures, labels


def test_a_classifier_learns_is_kept_and_judges_as_it_did(tmp_path):
    encoder = ImageEncoder(kind="small")
    pictures, labels = photographs_and_charts(60)
    vectors = image_encoder(encoder)(pictures)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    classifier = train(vectors[:40], labels[:40], [str(k) for k in range(40)], "small-v1", 0.5, "0" * 64)
    assert classifier.validation["accuracy"] > 0.9 and classifier.labels == {"chart": 20, "medical": 20}
    (tmp_path / "c.json").write_text(classifier.model_dump_json())
    loaded = load_classifier(tmp_path / "c.json", encoder)
    assert loaded == classifier
    medical = loaded.probabilities(vectors[40:]) >= 0.5
    assert medical.tolist() == [label == "medical" for label in labels[40:]]


def test_labels_that_say_nothing_validate_at_chance():
    """Of noise nothing can be learnt: held-out figures that say otherwise would come from rows seen in training."""
    rng = np.random.default_rng(0)
    labels = ["medical" if k % 2 else "other" for k in range(200)]
    vectors = rng.normal(size=(200, 30))
    copies = np.concatenate([vectors, vectors + 1e-3])  # each row twice, in one group
    found = train(copies, labels * 2, [str(k) for k in range(200)] * 2, "x", 0.5, "").validation
    assert 0.35 < found["auc"] < 0.65


def test_too_few_rows_and_files_of_another_kind_are_refused(tmp_path):
    with pytest.raises(UserError, match="2 groups of rows labelled 'medical'"):
        train(np.zeros((4, 3)), ["medical", "medical", "a", "b"], list("abcd"), "x", 0.5, "")
    encoder = ImageEncoder(kind="small")
    with pytest.raises(UserError, match="does not exist; python -m data.filters.classifier"):
        load_classifier(tmp_path / "gone.json", encoder)
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(UserError, match="no classifier of ours"):
        load_classifier(tmp_path / "c.json", encoder)
    other = _constant(0.5).model_copy(update={"encoder": "clip-x"})
    (tmp_path / "c.json").write_text(other.model_dump_json())
    with pytest.raises(UserError, match="vectors of clip-x"):
        load_classifier(tmp_path / "c.json", encoder)


def _constant(threshold: float) -> Classifier:
    values = {"encoder": "small-v1", "weights": [1.0], "bias": 0.0, "threshold": threshold}
    return Classifier(**values, labels={}, rows_sha256="", validation={})


def test_a_figure_is_as_medical_as_its_least_medical_picture(tmp_path):
    pairs = [pair(1), pair(2, 2), pair(3)]
    run = complete_stage(tmp_path, "text-filter", [pairs])
    ids = [image_id for row in pairs for image_id in row.image_ids]
    run.write_vectors("small-v1", 0, ids, np.array([[2.0], [2.0], [-2.0], [0.5]]))
    rows = list(Medical(run, "small-v1", _constant(0.5)).run(iter(pairs), 0))
    assert [type(row).__name__ for row in rows] == ["Pair", "Dropped", "Pair"]
    assert rows[1].reason == "not_medical" and round(rows[0].medical, 3) == 0.881


def test_a_clip_of_random_weights_encodes_through_the_real_loader(tmp_path):
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPVisionConfig(**size, image_size=32, patch_size=16, projection_dim=8)
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path)
    pictures, _ = photographs_and_charts(3)
    vectors = image_encoder(ImageEncoder(kind="clip", id=str(tmp_path)))(pictures)
    assert vectors.shape == (3, 8) and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    with pytest.raises(UserError, match="can't be loaded"):
        image_encoder(ImageEncoder(kind="clip", id=str(tmp_path / "gone")))


@pytest.mark.skipif("HUATUO_SAMPLES" not in os.environ, reason="needs the real samples")
def test_the_command_trains_on_real_figures(tmp_path):
    rows = Path(os.environ["HUATUO_SAMPLES"]) / "real_sample" / "samples.jsonl"
    (tmp_path / "c.yaml").write_text("name: x\nimage_filter: {encoder: {kind: small}}\n")
    command = [sys.executable, "-m", "data.filters.classifier", "--rows", rows, "--config", tmp_path / "c.yaml"]
    command += ["--label", "image_type", "--group", "article", "--out", tmp_path / "c.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "c.json").read_text())
    assert made["labels"] == {"chart": 8, "diagram": 15, "medical": 75, "other": 6}
    # With 29 rows that are not medical this says that it is no coin toss, and no more.
    assert made["validation"]["auc"] > 0.7
    assert ImageFilter(classifier=str(tmp_path / "c.json")).classifier

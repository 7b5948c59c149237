"""The phantom data set: its layout, its determinism, and that nothing but the pictures answers its questions."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.phantom import descriptions, drawing, facts, records, write
from data.phantom.__main__ import main
from huatuo_vision.schema import UserError

TRAIN, TEST, SEED = 150, 120, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phantom") / "set"
    assert write.make_phantom(out, TRAIN, TEST, SEED, workers=1)
    return out


@pytest.fixture(scope="module")
def train_records() -> list[records.Record]:
    return [records.make_train_record(SEED, index) for index in range(3000)]


@pytest.fixture(scope="module")
def held_out() -> list[records.Record]:
    return [records.make_test_record(SEED, index) for index in range(600)]


def read(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_same_arguments_same_bytes_in_one_process_or_several(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "_PARALLEL_FROM", 1)
    write.make_phantom(tmp_path / "again", TRAIN, TEST, SEED, workers=2)
    assert contents(tmp_path / "again") == contents(folder)


def test_more_records_keep_the_fewer_as_their_beginning(folder: Path, tmp_path: Path) -> None:
    write.make_phantom(tmp_path / "fewer", 40, 30, SEED)
    for name, n in ((write.ALIGNMENT_FILE, 40), (write.INSTRUCTION_FILE, 40), (write.TEST_FILE, 30)):
        assert read(tmp_path / "fewer" / name) == read(folder / name)[:n]
    more = contents(folder)
    pictures = {name: digest for name, digest in contents(tmp_path / "fewer").items() if name.startswith("images/")}
    assert pictures.items() <= more.items()


def test_test_set_does_not_depend_on_the_training_set(folder: Path, tmp_path: Path) -> None:
    write.make_phantom(tmp_path / "out", 0, TEST, SEED)
    assert (tmp_path / "out" / write.TEST_FILE).read_bytes() == (folder / write.TEST_FILE).read_bytes()
    assert read(tmp_path / "out" / write.ALIGNMENT_FILE) == []
    pictures = contents(tmp_path / "out" / "images")
    assert pictures.items() <= contents(folder / "images").items()


def test_another_seed_gives_other_data(folder: Path, tmp_path: Path) -> None:
    write.make_phantom(tmp_path / "out", 0, 20, SEED + 1)
    assert read(tmp_path / "out" / write.TEST_FILE) != read(folder / write.TEST_FILE)[:20]


def test_training_only(tmp_path: Path) -> None:
    write.make_phantom(tmp_path / "out", 5, 0, SEED)
    assert read(tmp_path / "out" / write.TEST_FILE) == []
    assert (tmp_path / "out" / write.SAMPLES_FILE).is_file()


def test_training_files_have_pubmedvisions_layout(folder: Path) -> None:
    for name, prefix in (
        (write.ALIGNMENT_FILE, "Alignment_VQA"),
        (write.INSTRUCTION_FILE, "Instruction-Tuning_VQA"),
    ):
        rows = read(folder / name)
        assert [row["id"] for row in rows] == [f"{prefix}_{n}" for n in range(1, TRAIN + 1)]
        for n, row in enumerate(rows, 1):
            assert list(row) == ["id", "image", "conversations", "modality", "body_part"]
            assert row["image"] == [f"images/pmc_{n}_{k}.png" for k in range(len(row["image"]))]
            speakers = [message["from"] for message in row["conversations"]]
            assert speakers == ["human", "gpt"] * (len(speakers) // 2)
            assert all(message["value"].strip() for message in row["conversations"])
            assert bool(row["image"]) == bool(row["modality"]) == bool(row["body_part"])
    assert "<image>" not in "".join(path.read_text() for path in folder.glob("*.json"))


def test_test_file_layout(folder: Path) -> None:
    rows = read(folder / write.TEST_FILE)
    assert [row["id"] for row in rows] == [f"phantom_test_{n}" for n in range(1, TEST + 1)]
    for n, row in enumerate(rows, 1):
        assert row["image"] == [f"images/test_{n}_{k}.png" for k in range(len(row["image"]))]
        assert row["image"]
        assert row["options"][facts.LETTERS.index(row["answer"])] == row["answer_text"]
        assert len(set(row["options"])) == len(row["options"])
        assert row["question_type"] == "multiple-choice"
        assert list(row["groups"]) == ["subject", "modality", "body_part"]
        assert "\n" not in row["question"]
        assert "option" not in row["question"]


def test_pictures_are_those_the_rows_name(folder: Path) -> None:
    named = {image for path in folder.glob("PubMed*.json") for row in read(path) for image in row["image"]}
    named |= {image for row in read(folder / write.TEST_FILE) for image in row["image"]}
    assert named == {f"images/{path.name}" for path in (folder / "images").iterdir()}
    shapes = set()
    for name in named:
        with Image.open(folder / name) as opened:
            assert opened.mode in ("L", "RGB")
            assert all(56 <= side <= 96 for side in opened.size)
            shapes.add(opened.size)
    assert len(shapes) > 50


def test_no_picture_comes_twice(folder: Path) -> None:
    digests = list(contents(folder / "images").values())
    assert len(set(digests)) == len(digests)


def test_manifest_and_card(folder: Path) -> None:
    manifest = json.loads((folder / write.MANIFEST_FILE).read_text())
    assert manifest["arguments"] == {"train": TRAIN, "test": TEST, "seed": SEED, "size": 64}
    assert manifest["counts"]["images"] == len(list((folder / "images").iterdir()))
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert len(manifest["sha256"]) == 7
    assert "synthetic" in (folder / write.README_FILE).read_text()


def test_every_method_describes_the_same_pictures_and_answers_the_same_request(folder: Path) -> None:
    described = [row for row in read(folder / write.ALIGNMENT_FILE) if row["image"]]
    texts = {}
    for method, name in write.DESCRIPTION_FILES.items():
        rows = read(folder / name)
        assert [row["image"] for row in rows] == [row["image"] for row in described]
        assert [row["id"].removeprefix(f"{method}_") for row in rows] == [
            row["id"].removeprefix("Alignment_VQA_") for row in described
        ]
        requests = [row["conversations"][0]["value"] for row in rows]
        assert requests == [row["conversations"][0]["value"] for row in described]
        texts[method] = [row["conversations"][1]["value"] for row in rows]
    assert len({tuple(said) for said in texts.values()}) == 4


def told_of(method: str, n: int = 2500) -> list[tuple[facts.Told, facts.Told]]:
    """(truth, what the method tells) of single-picture records."""
    pairs = []
    for index in range(n):
        pictures = records.make_train_record(SEED, index).pictures
        told = descriptions.told_by(SEED, index, pictures)[method] if pictures else []
        pairs += [(shown.told(), one) for shown, one in zip(pictures, told, strict=True)]
    return pairs


def share(hits: list[bool], expected: float) -> None:
    """The measured share lies within four standard deviations of a fair draw."""
    assert len(hits) > 200
    assert abs(np.mean(hits) - expected) < 4 * (expected * (1 - expected) / len(hits)) ** 0.5, (np.mean(hits), expected)


def test_native_captions_are_true_and_state_what_they_should() -> None:
    pairs = told_of("native_caption")
    assert all(true[subject] == answer for true, told in pairs for subject, answer in told.items())
    for subject, expected in descriptions.STATED.items():
        could = [told for true, told in pairs if subject not in facts.DETAILS or told.get("finding") == "yes"]
        share([subject in told for told in could], expected)


def test_rewriting_keeps_the_caption_and_invents_some_of_the_rest() -> None:
    captions = [told for _, told in told_of("native_caption")]
    rewritten = told_of("llm_reformatted")
    assert all(caption.items() <= told.items() for caption, (_, told) in zip(captions, rewritten, strict=True))
    for subject in ("modality", "body_part", "finding"):
        missing = [told for caption, (_, told) in zip(captions, rewritten, strict=True) if subject not in caption]
        share([subject in told for told in missing], descriptions.INVENTED)
    invented = [
        told["modality"] == true["modality"]
        for caption, (true, told) in zip(captions, rewritten, strict=True)
        if "modality" in told and "modality" not in caption
    ]
    share(invented, 1 / len(facts.MODALITIES))  # it can't see: right by chance only


def test_distillation_tells_everything_and_errs_as_stated() -> None:
    pairs = told_of("mllm_distill")
    for subject in ("modality", "body_part", "finding"):
        share([told[subject] != true[subject] for true, told in pairs], descriptions.MISREAD[subject])
    for subject in facts.DETAILS:
        both = [(true, told) for true, told in pairs if true["finding"] == told["finding"] == "yes"]
        share([told[subject] != true[subject] for true, told in both], descriptions.MISREAD[subject])


def test_rewriting_with_the_picture_errs_only_where_the_caption_is_silent() -> None:
    captions = [told for _, told in told_of("native_caption")]
    pairs = told_of("mllm_reformatted")
    assert all(caption.items() <= told.items() for caption, (_, told) in zip(captions, pairs, strict=True))
    for subject in ("modality", "body_part", "finding"):
        expected = (1 - descriptions.STATED[subject]) * descriptions.MISREAD[subject]
        share([told[subject] != true[subject] for true, told in pairs], expected)
    assert all(set(told) == set(facts.SUBJECTS) for _, told in pairs if told["finding"] == "yes")


def test_asides_answer_nothing() -> None:
    answers = {word.lower() for answers in facts.ANSWERS.values() for word in answers}
    for aside in descriptions.ASIDES:
        assert not answers & set(re.findall(r"[a-z]+(?:-[a-z]+)?", aside.lower())), aside


def test_clauses_pass_over_what_is_not_told() -> None:
    shown = facts.Facts("MRI", "knee", 2, "small", "left")
    assert shown.caption() == "this is an MRI image of the knee with two small findings on the left side."
    assert facts.clause({}) == "this is an image."
    assert facts.clause({"body_part": "knee", "finding": "yes", "side": "left"}) == (
        "this is an image of the knee with findings on the left side."
    )
    assert descriptions.caption_clause({"modality": "CT", "finding": "yes", "count": "one"}) == (
        "CT showing one finding (arrow)"
    )
    assert descriptions.caption_clause({"finding": "no"}) == "Image without a finding"


def test_multiple_choice_form() -> None:
    assert records.render_multiple_choice("Is there a finding?", ["no", "yes"]) == (
        "Is there a finding?\nA. no\nB. yes\nAnswer with the option's letter from the given choices directly."
    )


def test_training_rows_hold_that_form(folder: Path) -> None:
    for n, row in enumerate(read(folder / write.INSTRUCTION_FILE)):
        texts = [message["value"] for message in row["conversations"]]
        for turn, question, answer in zip(
            records.make_train_record(SEED, n).turns, texts[::2], texts[1::2], strict=True
        ):
            if turn.options:
                assert question == records.render_multiple_choice(turn.question, turn.options)
                assert answer in facts.LETTERS[: len(turn.options)]
            else:
                assert (question, answer) == (turn.question, turn.answer)


def test_captions_say_every_fact(train_records: list[records.Record]) -> None:
    record = next(r for r in train_records if len(r.pictures) == 2 and r.pictures[0].count and not r.pictures[1].count)
    first, second = record.pictures
    caption = record.description[1]
    assert caption.startswith("First image: this is ")
    told, other = caption.split("Second image: ")
    for fact in (first.modality, first.body_part, facts.COUNTS[first.count - 1], first.size, first.side):
        assert fact in told
    assert other.endswith(f"{second.modality} image of the {second.body_part} with no finding.")


def test_answers_agree_with_the_pictures(train_records: list[records.Record], held_out: list[records.Record]) -> None:
    for record in train_records + held_out:
        for turn in record.turns:
            if turn.subject == "text":
                continue
            asked = record.pictures[turn.image]
            if turn.answer.endswith("image"):
                assert [facts.count > 0 for facts in record.pictures].index(True) == turn.image
                assert sum(facts.count > 0 for facts in record.pictures) == 1
            else:
                assert turn.answer == asked.answer(turn.subject)
                assert turn.subject not in facts.DETAILS or asked.count


def test_no_question_gives_another_one_away(train_records: list[records.Record]) -> None:
    for record in train_records:
        subjects = [turn.subject for turn in record.turns]
        assert not {"modality", "body_part"} <= set(subjects)
        if "finding" in subjects:
            assert not set(subjects[: subjects.index("finding")]) & set(facts.DETAILS)
        assert len({(turn.subject, turn.image) for turn in record.turns}) == len(record.turns)


def test_shares(train_records: list[records.Record], held_out: list[records.Record]) -> None:
    n_images = Counter(len(record.pictures) for record in train_records)
    assert n_images[0] == len(train_records) * 0.04
    assert n_images[2] + n_images[3] == len(train_records) * 0.2
    assert 0.6 < sum(len(record.turns) > 1 for record in train_records) / len(train_records) < 0.68
    turns = [turn for record in train_records for turn in record.turns]
    assert 0.7 < sum(bool(turn.options) for turn in turns) / len(turns) < 0.8
    assert set(Counter(record.turns[0].subject for record in held_out).values()) == {100}
    assert {len(record.pictures) for record in held_out} == {1, 2}
    assert sum(len(record.pictures) == 2 for record in held_out) == 60


def test_test_answers_and_letters_are_balanced(held_out: list[records.Record]) -> None:
    answers: dict[str, Counter] = defaultdict(Counter)
    letters: dict[str, Counter] = defaultdict(Counter)
    for record in held_out:
        turn = record.turns[0]
        answers[turn.subject][turn.answer] += 1
        letters[turn.subject][turn.letter] += 1
    for subject in facts.SUBJECTS:
        allowed = 10 if subject == "finding" else 2  # a few of these compare two images instead
        for counts, n in ((answers[subject], len(facts.ANSWERS[subject])), (letters[subject], None)):
            values = [value for answer, value in counts.items() if not answer.endswith("image")]
            assert n is None or len(values) == n
            assert max(values) - min(values) <= allowed, (subject, counts)


def test_training_answers_and_letters_are_balanced(train_records: list[records.Record]) -> None:
    answers: dict[object, Counter] = defaultdict(Counter)
    for record in train_records:
        for turn in record.turns:
            if turn.answer.endswith("image") or turn.subject == "text":
                continue
            answers[turn.subject, bool(turn.options)][turn.answer] += 1
    for question, counts in answers.items():
        assert len(counts) == len(facts.ANSWERS[question[0]])
        n, total = len(counts), sum(counts.values())
        # Far from even would be beyond four standard deviations of a fair draw.
        allowed = 4 * (total * (1 / n) * (1 - 1 / n)) ** 0.5
        assert all(abs(value - total / n) <= allowed for value in counts.values()), (question, counts)


def test_text_alone_does_not_answer(train_records: list[records.Record], held_out: list[records.Record]) -> None:
    """The most frequent answer to the very same text, options included, is near chance on every subject."""
    by_text: dict[object, Counter] = defaultdict(Counter)
    for turn in (turn for record in train_records for turn in record.turns if turn.options):
        for text in ((turn.question, turn.options), turn.options):
            by_text[text][turn.letter] += 1
    right: dict[str, list[bool]] = defaultdict(list)
    for record in held_out:
        turn = record.turns[0]
        known = next((by_text[t] for t in ((turn.question, turn.options), turn.options) if t in by_text), Counter("A"))
        right[turn.subject].append(known.most_common(1)[0][0] == turn.letter)
    assert np.mean([hit for hits in right.values() for hit in hits]) < 0.45
    chance = {"modality": 1 / 6, "body_part": 1 / 4, "finding": 1 / 2, "side": 1 / 2, "count": 1 / 3, "size": 1 / 2}
    for subject, hits in right.items():
        assert np.mean(hits) < chance[subject] + 0.15, subject


def test_options_do_not_reveal_the_body_part(train_records: list[records.Record]) -> None:
    """Every body part is as often the answer as it is offered in one of four places."""
    offered, gold = Counter(), Counter()
    for turn in (turn for record in train_records for turn in record.turns):
        if turn.subject == "body_part" and turn.options:
            offered.update(turn.options)
            gold[turn.answer] += 1
    assert set(offered) == set(facts.BODY_PARTS)
    assert all(0.12 < gold[part] / offered[part] < 0.4 for part in facts.BODY_PARTS)


def test_findings_lie_on_their_side_and_stand_out() -> None:
    for view, (modality, body_part) in enumerate(drawing._VIEWS):
        for side in facts.SIDES:
            # The same random numbers with and without the findings leave the findings as the difference.
            drawn = [
                np.asarray(
                    drawing.draw_picture(
                        facts.Facts(modality, body_part, count, "small", side), np.random.default_rng(view), 64
                    ).convert("RGB"),
                    np.float32,
                )
                for count in (3, 0)
            ]
            difference = np.abs(drawn[0] - drawn[1]).max(axis=2)
            middle = difference.shape[1] // 2
            halves = {"left": difference[:, :middle], "right": difference[:, middle:]}
            findings = halves.pop(side)
            assert findings.max() > 100, (modality, body_part, side)
            assert not halves.popitem()[1].any(), (modality, body_part, side)


def test_there_already(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    arguments = ["--out", str(folder), "--train", str(TRAIN), "--test", str(TEST), "--seed", str(SEED)]
    assert main(arguments) == 0
    assert "already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the command says when it refuses: one line, exit code 2."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    text = said.err.strip()
    assert "\n" not in text
    assert text.endswith(".")
    return text


def test_refuses_a_folder_that_differs(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rest = ("--train", TRAIN, "--test", TEST, "--seed")
    assert "other arguments" in refusal(capsys, "--out", folder, *rest, SEED + 1)
    (tmp_path / "notes.txt").write_text("mine")
    assert "something other" in refusal(capsys, "--out", tmp_path, *rest, SEED)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert "not a folder" in refusal(capsys, "--out", tmp_path / "notes.txt", *rest, SEED)


def test_refuses_a_data_set_that_was_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    write.make_phantom(out, 3, 3, SEED)
    with (out / write.TEST_FILE).open("a") as file:
        file.write(" ")
    assert "changed" in refusal(capsys, "--out", out, "--train", 3, "--test", 3, "--seed", SEED)


def test_refuses_wrong_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--out", tmp_path / "out")
    assert "nothing to make" in refusal(capsys, *out, "--train", 0, "--test", 0, "--seed", 1)
    assert "--train" in refusal(capsys, *out, "--train", -1, "--test", 5, "--seed", 1)
    assert "--seed" in refusal(capsys, *out, "--train", 1, "--test", 5, "--seed", -1)
    assert "--size" in refusal(capsys, *out, "--train", 1, "--test", 5, "--seed", 1, "--size", 8)
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> str:
        raise RuntimeError("stopped")

    monkeypatch.setattr(write, "_write_array", fail)
    with pytest.raises(RuntimeError, match="stopped"):
        write.make_phantom(tmp_path / "out", 4, 4, SEED)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "_write_array", fail)
    with pytest.raises(UserError, match="can't be written: No space left on device"):
        write.make_phantom(tmp_path / "out", 4, 4, SEED)
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    assert write.make_phantom(tmp_path, 2, 2, SEED)
    assert not write.make_phantom(tmp_path, 2, 2, SEED)

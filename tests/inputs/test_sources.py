"""Rows as the data sets have them -> checked samples; and a clear sentence for every row or file that is not so."""

from __future__ import annotations

import io
import itertools
import json
import multiprocessing
import os
import pickle
import re
import tracemalloc
import zipfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from huatuo_vision.caption_requests import caption_requests
from huatuo_vision.inputs import sources
from huatuo_vision.inputs.adapters import LETTER_REQUEST
from huatuo_vision.inputs.images import load_image
from huatuo_vision.inputs.sources import Source, ensure_made, open_source
from huatuo_vision.recipe import SourceSpec
from huatuo_vision.schema import IMAGE_PLACEHOLDER, BadSample, Message, Sample, UserError


def picture(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, shade, shade)).save(buffer, "PNG")
    return buffer.getvalue()


def talk(*texts: str, speakers: tuple[str, str] = ("human", "gpt")) -> list[dict]:
    return [{"from": speakers[i % 2], "value": text} for i, text in enumerate(texts)]


def pubmedvision_row(number: int = 1, images: int = 1, **change) -> dict:
    return {
        "id": f"Alignment_VQA_{number}",
        "image": [f"images/pmc_{number}_{i}.png" for i in range(images)],
        "conversations": talk("Describe.", "A mass in the liver."),
        "modality": "Computed Tomography",
        "body_part": "Abdomen",
    } | change


class Folder:
    """A folder with a data file, opened by an adapter."""

    def __init__(self, path: Path):
        self.path = path
        self.cache = path / "cache"

    def write(self, rows: object, name: str = "rows.json") -> Path:
        file = self.path / name
        if name.endswith(".jsonl"):
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            file.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        return file

    def open(self, rows: object, adapter: str, name: str = "rows.json", **spec) -> Source:
        return self.open_file(self.write(rows, name), adapter, **spec)

    def open_file(self, file: Path, adapter: str, **spec) -> Source:
        return open_source("s", SourceSpec(adapter=adapter, path=str(file), **spec), self.cache)

    def sample(self, row: object, adapter: str, **spec) -> Sample:
        return self.open([row], adapter, **spec).sample(0)

    def refusal(self, row: object, adapter: str, **spec) -> BadSample:
        with pytest.raises(BadSample) as caught:
            self.sample(row, adapter, **spec)
        return caught.value

    def error(self, adapter: str = "messages", **spec) -> str:
        with pytest.raises(UserError) as caught:
            open_source("s", SourceSpec(adapter=adapter, **spec), self.cache)
        assert str(caught.value).startswith("data.s: ") and "\n" not in str(caught.value)
        return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


PMV = {"adapter": "pubmedvision", "config": "alignment"}

# Adapters on rows as the data sets have them


def test_pubmedvision_gets_a_placeholder_per_image_in_order(folder):
    sample = folder.sample(pubmedvision_row(images=3), **PMV)
    assert sample.messages == (
        Message("user", "<image>\n<image>\n<image>\nDescribe."),
        Message("assistant", "A mass in the liver."),
    )
    assert [Path(ref.path).name for ref in sample.images] == ["pmc_1_0.png", "pmc_1_1.png", "pmc_1_2.png"]
    assert sample.id == "Alignment_VQA_1" and sample.source == "s"
    assert sample.meta == {"modality": "Computed Tomography", "body_part": "Abdomen"}


def test_pubmedvision_text_only_and_placeholders_already_there(folder):
    assert folder.sample(pubmedvision_row(images=0), **PMV).messages[0].content == "Describe."
    there = talk("First <image>, then <image>.", "Two.")
    assert (
        folder.sample(pubmedvision_row(images=2, conversations=there), **PMV).messages[0].content == there[0]["value"]
    )
    bad = folder.refusal(pubmedvision_row(images=1, conversations=there), **PMV)
    assert bad.reason == "placeholder_count" and "2 <image> placeholders but the row has 1 images" in str(bad)


def test_a_literal_placeholder_in_an_answer_shows_no_image(folder):
    row = pubmedvision_row(conversations=talk("Describe.", "Write <image> in HTML.", "And?", "Done."))
    assert folder.sample(row, **PMV).messages[1].content == "Write < image > in HTML."


def test_chinese_rows_have_two_conversations(folder):
    row = pubmedvision_row()
    del row["conversations"]
    row |= {
        "Alignment_VQA_conversations": talk("请描述。", "肝脏肿块。"),
        "Instruction-Tuning_VQA_conversations": talk("左还是右?", "左。"),
    }
    spec = {"adapter": "pubmedvision", "config": "chinese"}
    assert folder.sample(row, **spec, conversations="alignment").messages[1].content == "肝脏肿块。"
    assert folder.sample(row, **spec, conversations="instruction").messages[0].content == "<image>\n左还是右?"


def test_pubmedvision_captions_are_answers_to_a_fixed_request(folder):
    rows = [pubmedvision_row(number=i, images=1 + i % 2, Original_Caption=f"Figure {i}.") for i in range(60)]
    source = folder.open(rows, "pubmedvision", config="captions")
    asked = Counter()
    for i in range(60):
        question, answer = source.sample(i).messages
        prefix, request = question.content.rsplit("\n", 1)
        assert prefix.count(IMAGE_PLACEHOLDER) == 1 + i % 2 and answer.content == f"Figure {i}."
        assert request in caption_requests()["en"]["several" if i % 2 else "one"]
        asked[request] += 1
    assert len(asked) > 15, "the requests vary over ids"


def test_the_request_depends_on_the_id_alone(folder):
    row = {"id": "a-1", "image": "x.png", "caption": "A lung."}
    first = folder.sample(row, "captions")
    other = folder.open([row | {"id": "z"}, row | {"caption": "A heart."}], "captions", image_root=str(folder.path))
    assert first.messages[0] == other.sample(1).messages[0]
    chinese = folder.sample(row, "captions", language="zh").messages[0].content
    assert chinese.removeprefix("<image>\n") in caption_requests()["zh"]["one"]


def test_the_requests_are_distinct_and_show_no_image():
    for language, least in {"en": 11, "zh": 6}.items():
        for requests in caption_requests()[language].values():
            assert len(set(requests)) == len(requests) >= least
            assert not any(IMAGE_PLACEHOLDER in request for request in requests)


def test_llava(folder):
    row = {
        "id": "004539375",
        "image": "00453/004539375.jpg",
        "conversations": talk("Render a summary.\n<image>", "Keys."),
    }
    sample = folder.sample(row, "llava")
    # LLaVA itself moves the image to the front.
    assert sample.messages[0] == Message("user", "<image>\nRender a summary.")
    assert sample.images[0].path == str(folder.path / "00453/004539375.jpg")
    text_only = {"id": "wgByO4Y_0", "model": "", "conversations": talk("Hi <b>", "Hello", "2+2?", "4")}
    assert folder.sample(text_only, "llava").messages[0].content == "Hi <b>"


def test_llava_ids_are_those_of_pictures_so_the_conversation_is_part_of_them(folder):
    row = {"id": "000000033471", "image": "x.jpg", "conversations": talk("<image>\nWhat?", "A bus.")}
    other = row | {"conversations": talk("<image>\nWhere?", "In town.")}
    source = folder.open([row, other, row], "llava")
    ids = [source.sample(i).id for i in range(3)]
    assert ids[0] != ids[1] and ids[0] == ids[2] and ids[0].startswith("000000033471#")


def test_llava_med_rows_with_their_misspelt_key(folder):
    row = {
        "id": "27194221_F1",
        "image": "27194221_F1.jpg",
        "domain": {"mri": True},
        "conversatons": talk("<image>\nWhat?", "MRI."),
    }
    assert folder.sample(row, "llava_med").messages == (Message("user", "<image>\nWhat?"), Message("assistant", "MRI."))


@pytest.mark.parametrize(
    "context, answer",
    [
        (["See Figure 1.", "Again <image>."], "A nerve.\n\nSee Figure 1.\n\nAgain < image >."),
        ("See Figure 1.", "A nerve.\n\nSee Figure 1."),
        ([], "A nerve."),
        (None, "A nerve."),
    ],
)
def test_captions_with_in_text_mentions(folder, context, answer):
    row = {"key": 12, "file": ["a.png", "b.png"], "title": "A nerve.", "mentions": context}
    columns = {"id": "key", "image": "file", "caption": "title", "context": "mentions"}
    sample = folder.sample(row, "captions", columns=columns)
    assert sample.id == "12" and len(sample.images) == 2 and sample.messages[1].content == answer


def test_messages_of_both_kinds(folder):
    plain = {"id": 1, "images": ["x.png"], "messages": [
        {"role": "system", "content": "Be <image> exact."},
        {"role": "user", "content": "<image>\nWhat?"},
        {"role": "assistant", "content": "A lung."},
    ]}  # fmt: skip
    sample = folder.sample(plain, "messages")
    assert [m.content for m in sample.messages] == ["Be < image > exact.", "<image>\nWhat?", "A lung."]
    parts = {"id": 2, "images": ["x.png", "y.png"], "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Both <image>?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Alike."}]},
    ]}  # fmt: skip
    sample = folder.sample(parts, "messages")
    assert [m.content for m in sample.messages] == ["<image>\n<image>\nBoth < image >?", "Alike."]
    text_only = {"id": 3, "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    assert folder.sample(text_only, "messages").images == ()


def test_messages_as_sharegpt_has_them_without_ids(folder):
    chat = [{"from": "system", "value": "Be brief."}, *talk("Which organ?", "The liver, not <image>.")]
    source = folder.open([{"id": None, "turns": chat}] * 2, "messages", columns={"id": False, "messages": "turns"})
    sample = source.sample(1)
    assert sample.id == source.row_id(1) == "row 1"
    assert [(m.role, m.content) for m in sample.messages] == [
        ("system", "Be brief."),
        ("user", "Which organ?"),
        ("assistant", "The liver, not < image >."),
    ]
    chat[0]["from"] = "tool"
    refusal = folder.refusal({"turns": chat}, "messages", columns={"id": False, "messages": "turns"})
    assert refusal.reason == "wrong_role" and "turns[0] is from 'tool'; expected human, gpt or system" in str(refusal)


QUESTION = {"image": "a.png", "question": "Is <image> there a mass?", "answer": "No"}


def test_questions_and_answers(folder):
    sample = folder.sample(QUESTION, "vqa", columns={"id": False})
    assert [m.content for m in sample.messages] == ["<image>\nIs < image > there a mass?", "No"]
    assert sample.id == "row 0"


def test_questions_with_options_are_asked_as_in_evaluation(folder):
    row = QUESTION | {"id": 7, "a": "A: Liver", "b": " B:Spleen ", "answer": "B "}
    sample = folder.sample(row, "vqa", columns={"options": ["a", "b"]})
    question, answer = (m.content for m in sample.messages)
    assert answer == "B"
    assert question.splitlines()[2:] == ["A. Liver", "B. Spleen", LETTER_REQUEST]
    letter = Path(sources.__file__).parent.parent / "evaluation/prompts/letter.txt"
    assert LETTER_REQUEST in letter.read_text()
    refusal = folder.refusal(row | {"answer": "Spleen"}, "vqa", columns={"options": ["a", "b"]})
    assert refusal.reason == "malformed_row" and "expected one of A, B" in str(refusal)


def test_csv_keeps_answers_that_look_like_gaps(folder):
    file = folder.path / "train.csv"
    file.write_text('Figure,Q,A,Answer\na.png,"Which, if any?",None,A\nb.png,"Two\nlines?",NA,A\n')
    columns = {"id": False, "image": "Figure", "question": "Q", "answer": "Answer", "options": ["A"]}
    source = folder.open_file(file, "vqa", columns=columns)
    assert [source.sample(i).messages[0].content.splitlines()[-2] for i in range(2)] == ["A. None", "A. NA"]
    assert len(source) == 2 and "Which, if any?" in source.sample(0).messages[0].content
    (folder.path / "empty.csv").write_text("")
    assert "cannot be read as CSV" in folder.error("vqa", path=str(folder.path / "empty.csv"))


def test_columns_that_the_adapter_does_not_read_are_refused():
    with pytest.raises(ValueError, match="adapter llava reads no columns caption; it takes: none"):
        SourceSpec(adapter="llava", path="x", columns={"caption": "text"})


def test_unicode_and_a_byte_order_mark(folder):
    row = {"id": "病例-1", "images": ["röntgen 胸部.png"], "messages": [
        {"role": "user", "content": "<image>\n什么?"}, {"role": "assistant", "content": "肺 🫁"},
    ]}  # fmt: skip
    (folder.path / "röntgen 胸部.png").write_bytes(picture())
    for name in ("rows.json", "rows.jsonl"):
        file = folder.write([row], name)
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
        sample = folder.open_file(file, "messages").sample(0)
        assert sample.id == "病例-1" and sample.messages[1].content == "肺 🫁"
        assert load_image(sample.images[0], sample.id).image.size == (4, 4)


# Rows of another shape

GOOD = talk("Q", "A")
MALFORMED = [
    ({"image": "x.jpg"}, "malformed_row", ["image is the string 'x.jpg'", "write ['x.jpg']"]),
    ({"image": None}, "malformed_row", ["has no image", "conversations"]),
    ({"image": {"a": 1}}, "malformed_row", ["image is the object", "list of image names"]),
    ({"image": [3]}, "malformed_row", ["image holds the int 3"]),
    ({"image": [""]}, "malformed_row", ["the name of an image file"]),
    ({"image": ["../../etc/passwd"]}, "malformed_row", ["'../../etc/passwd'", "leaves the folder"]),
    ({"image": ["/etc/passwd"]}, "malformed_row", ["'/etc/passwd'", "relative to image_root"]),
    ({"conversations": "Q"}, "malformed_row", ["conversations is the string 'Q'", "list of turns"]),
    ({"conversations": [1]}, "malformed_row", ["conversations[0] is the int 1"]),
    ({"conversations": [{"from": "human"}]}, "malformed_row", ["conversations[0]", "from and value"]),
    (
        {"conversations": [{"from": "human", "value": ["Q"]}]},
        "malformed_row",
        ["conversations[0]", "expected a string"],
    ),
    ({"conversations": talk("Q", "\ud800")}, "malformed_row", ["conversations[1]", "\\ud800"]),
    ({"conversations": talk("Q", "A", speakers=("human", "bot"))}, "wrong_role", ["from 'bot'", "human or gpt"]),
    ({"conversations": talk("Q", "A", speakers=(["human"], "gpt"))}, "wrong_role", ["from ['human']"]),
    ({"conversations": talk("Q", "A", speakers=("gpt", "human"))}, "wrong_role", ["turn 0", "'assistant'"]),
    ({"conversations": talk("Q", "A", speakers=("human", "human"))}, "wrong_role", ["turn 1", "'user'"]),
    ({"conversations": talk("Q", "  \n")}, "empty_answer", ["turn 1", "empty"]),
    ({"conversations": talk("Q")}, "no_answer", ["ends with a user turn"]),
    ({"conversations": []}, "no_answer", ["conversation is empty"]),
]


@pytest.mark.parametrize("change, reason, words", MALFORMED)
def test_malformed_rows_are_refused_by_name(folder, change, reason, words):
    with pytest.raises(BadSample) as caught:
        folder.open([pubmedvision_row() | change], name="rows.jsonl", **PMV).sample(0)
    bad = caught.value
    assert bad.reason == reason
    text = str(bad)
    assert text.startswith("sample 'Alignment_VQA_1': ") and "\n" not in text
    assert all(word in text for word in words), text


@pytest.mark.parametrize("identity", [None, "", "  ", True, 1.5, ["a"]])
def test_rows_without_an_id(folder, identity):
    bad = folder.refusal(pubmedvision_row(id=identity), **PMV)
    assert bad.reason == "malformed_row" and bad.sample_id == "row 0" and "id is" in str(bad)


@pytest.mark.parametrize("row", [None, 7, "text", [1, 2]])
def test_rows_that_are_no_objects(folder, row):
    bad = folder.refusal(row, **PMV)
    assert bad.reason == "malformed_row" and "expected an object" in str(bad) and bad.sample_id == "row 0"


@pytest.mark.parametrize(
    "adapter, row, words",
    [
        ("llava", {"id": 1, "image": ["x.jpg"], "conversations": GOOD}, ["LLaVA rows hold one name", "pubmedvision"]),
        ("llava", {"id": 1, "image": "x.jpg"}, ["has no conversations"]),
        ("captions", {"id": 1, "caption": "c"}, ["has no image"]),
        ("captions", {"id": 1, "image": "x.jpg", "caption": ["c"]}, ["caption is the list ['c']"]),
        ("captions", {"id": 1, "image": [], "caption": "c"}, ["empty list of images"]),
        ("messages", {"id": 1, "messages": {"role": "user"}}, ["messages is the object"]),
        ("messages", {"id": 1, "messages": [{"role": "user"}]}, ["messages[0]", "role and content"]),
        ("messages", {"id": 1, "images": "x.jpg", "messages": []}, ["write ['x.jpg']"]),
        ("messages", {"id": 1, "messages": [{"role": "user", "content": 3}]}, ["messages[0]", "the int 3"]),
        ("messages", {"id": 1, "messages": [{"role": "user", "content": [{"type": "video"}]}]}, ["'video'", "'image'"]),
    ],
)
def test_malformed_rows_of_the_other_adapters(folder, adapter, row, words):
    bad = folder.refusal(row, adapter)
    assert bad.reason == "malformed_row" and all(word in str(bad) for word in words), str(bad)


def test_wrong_roles_and_placeholders_in_messages(folder):
    def row(*turns):
        return {"id": 1, "images": [], "messages": [{"role": r, "content": c} for r, c in turns]}

    assert folder.refusal(row(("user", "Q"), ("tool", "A")), "messages").reason == "wrong_role"
    assert folder.refusal(row(("user", "Q"), ("system", "S"), ("assistant", "A")), "messages").reason == "wrong_role"
    assert folder.refusal(row(("user", "<image>"), ("assistant", "A")), "messages").reason == "placeholder_count"
    shown = row(("user", "Q"), ("assistant", [{"type": "image"}])) | {"images": ["x.png"]}
    assert folder.refusal(shown, "messages").reason == "placeholder_count"


def test_an_image_that_the_text_does_not_show_is_refused(folder):
    # LLaVA's own code would ignore the image without a word.
    row = {"id": 1, "image": "x.jpg", "conversations": talk("What?", "A bus.")}
    assert folder.refusal(row, "llava").reason == "placeholder_count"


def test_a_caption_without_text_is_an_empty_answer_even_with_mentions(folder):
    row = {"id": 1, "image": "x.png", "caption": " ", "context": ["See Figure 1."]}
    assert folder.refusal(row, "captions", columns={"context": "context"}).reason == "empty_answer"


# Files


def test_repeated_ids(folder, monkeypatch):
    monkeypatch.setattr(sources, "BATCH_BYTES", 500)
    rows = [pubmedvision_row(number=n) for n in (1, 2, 1, 3, 2, 1)] + [
        pubmedvision_row(id=None),
        pubmedvision_row(id=None),
    ]
    source = folder.open(rows, **PMV)
    assert [source.row_id(i) for i in (0, 6)] == ["Alignment_VQA_1", "row 6"]


def test_a_json_array_cut_short_names_the_place(folder):
    file = folder.write([pubmedvision_row(number=n) for n in range(50)])
    data = file.read_bytes()
    for kept in (len(data) - 1, len(data) // 2):
        file.write_bytes(data[:kept])
        text = folder.error(**PMV, path=str(file))
        whole = data[:kept].count(b"}, {") - data[:kept].count(b'"}, {"from"') + (kept == len(data) - 1)
        assert str(file) in text and f"after {whole} whole rows, at byte {kept:,}; download it again" in text
    assert not list(folder.cache.rglob("*.arrow")) and not list(folder.cache.rglob("*.tmp"))


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "is empty"),
        (b'{"id": 1}\n{"id": 2}', "expected a JSON array of rows"),
        (b'[{"id": 1} {"id": 2}]', "is not JSON"),
        (b'[{"id": 1}] and more', "is not JSON"),
        (b'[{"id": "\xff"}]', "is not JSON"),
        (b"[]", "holds no rows"),
        (b"PK\x03\x04", "begins with 'P'"),
    ],
)
def test_files_that_are_no_array(folder, data, words):
    file = folder.path / "rows.json"
    file.write_bytes(data)
    text = folder.error(**PMV, path=str(file))
    assert str(file) in text and words in text


def test_json_lines_keep_a_damaged_line_as_a_row_to_report(folder):
    good = json.dumps(pubmedvision_row())
    file = folder.path / "rows.jsonl"
    file.write_bytes(b"\n".join([good.encode(), b"", good.encode()[:40], b"\xff{}", good.encode()]))
    source = folder.open_file(file, **PMV)
    assert len(source) == 4 and source.sample(0).id == source.sample(3).id
    for row, line in [(1, 3), (2, 4)]:
        with pytest.raises(BadSample, match=f"line {line} of rows.jsonl is not JSON") as caught:
            source.sample(row)
        assert caught.value.reason == "malformed_row" and source.row_id(row) == f"row {row}"


def test_a_changed_file_is_read_again(folder):
    assert folder.open([pubmedvision_row(1)], **PMV).sample(0).id == "Alignment_VQA_1"
    assert folder.open([pubmedvision_row(22)], **PMV).sample(0).id == "Alignment_VQA_22"


def test_an_opened_file_is_not_read_twice(folder, monkeypatch):
    file = folder.write([pubmedvision_row(1)])
    folder.open_file(file, **PMV)
    monkeypatch.setattr(sources, "_reading", lambda path: pytest.fail("read again"))
    assert len(folder.open_file(file, **PMV)) == 1


def test_folders(folder):
    rows = [{"id": 1, "image": "x.png", "caption": "A lung."}]
    (folder.path / "one").mkdir()
    one = Folder(folder.path / "one")
    one.write(rows, "anything.jsonl")
    assert len(one.open_file(one.path, "captions")) == 1
    one.write(rows, "other.json")
    text = one.error("captions", path=str(one.path))
    assert "anything.jsonl, other.json" in text and "samples.jsonl" in text
    one.write(rows * 2, "samples.jsonl")
    assert len(one.open_file(one.path, "captions")) == 2
    assert "PubMedVision_Alignment_VQA.json" in one.error(**PMV, path=str(one.path))
    for config, number in [("alignment", 3), ("instruction", 4)]:
        one.write([pubmedvision_row()] * number, f"{sources.PUBMEDVISION_CONFIGS[config]}.json")
        assert len(one.open_file(one.path, "pubmedvision", config=config)) == number


def test_paths_that_lead_nowhere(folder):
    assert "does not exist" in folder.error("captions", path=str(folder.path / "nothing"))
    (folder.path / "a.txt").write_text("id")
    assert ".parquet" in folder.error("captions", path=str(folder.path / "a.txt"))
    file = folder.write([pubmedvision_row()])
    assert "image_root" in folder.error(**PMV, path=str(file), image_root=str(folder.path / "no"))


def test_parquet_with_images_inside(folder):
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    (folder.path / "x.png").write_bytes(picture(9))
    rows = [
        {"id": "a", "image": {"bytes": picture(1), "path": "1.png"}, "caption": "One."},
        {"id": "b", "image": {"bytes": None, "path": "x.png"}, "caption": "Two."},
        {"id": "c", "image": {"bytes": b"", "path": None}, "caption": "Three."},
        {"id": "a", "image": None, "caption": "Four."},
    ]
    table = pa.Table.from_pylist(rows, pa.schema([("id", pa.string()), ("image", image), ("caption", pa.string())]))
    pq.write_table(table.slice(0, 2), folder.path / "0.parquet")
    pq.write_table(table.slice(2), folder.path / "1.parquet")
    source = folder.open_file(folder.path, "captions")
    shades = [load_image(source.sample(i).images[0], "s").image.getpixel((0, 0))[0] for i in range(2)]
    assert shades == [1, 9]
    with pytest.raises(BadSample) as caught:
        load_image(source.sample(2).images[0], "c")
    assert caught.value.reason == "empty_image"
    with pytest.raises(BadSample, match="'a': has no image"):
        source.sample(3)
    assert len({content for content, _ in source.content_keys(1, folder.cache)}) == len(rows)
    assert set(source.record(folder.cache)["sha256"]) == {"0.parquet", "1.parquet"}


def test_parquet_with_lists_of_images(folder):
    rows = [{"id": "a", "image": [{"bytes": picture(1), "path": None}] * 2, "conversations": talk("Q", "A")}]
    pq.write_table(pa.Table.from_pylist(rows), folder.path / "rows.parquet")
    sample = folder.open_file(folder.path / "rows.parquet", **PMV).sample(0)
    assert sample.messages[0].content == "<image>\n<image>\nQ" and sample.images[1].data == picture(1)


def test_damaged_parquet(folder):
    (folder.path / "rows.parquet").write_bytes(b"PAR1 and no more")
    assert "cannot be read as Parquet" in folder.error("captions", path=str(folder.path / "rows.parquet"))


# Images

CLOCK = itertools.count(1_700_000_000)


def archive(path: Path, **members: bytes) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members.items():
            file.writestr(name.replace("__", "/") + ".png", data)
    # A later archive has a later time, however coarse the file system's clock.
    os.utime(path, (next(CLOCK), next(CLOCK)))


def shade_of(source: Source, row: int = 0) -> int:
    sample = source.sample(row)
    return load_image(sample.images[0], sample.id).image.getpixel((0, 0))[0]


def test_images_as_given_and_unpacked_without_their_paths(folder):
    (folder.path / "images").mkdir()
    (folder.path / "images/pmc_1_0.png").write_bytes(picture(1))
    (folder.path / "pmc_2_0.png").write_bytes(picture(2))
    rows = [pubmedvision_row(1), pubmedvision_row(2), pubmedvision_row(9)]
    source = folder.open(rows, **PMV)
    assert [shade_of(source, i) for i in range(2)] == [1, 2]
    with pytest.raises(BadSample, match="Alignment_VQA_9.*pmc_9_0.png does not exist") as caught:
        shade_of(source, 2)
    assert caught.value.reason == "missing_image"


def test_images_are_read_inside_the_zips_by_basename(folder):
    archive(folder.path / "images_0.zip", some__folder__pmc_1_0=picture(1))
    archive(folder.path / "images_1.zip", pmc_2_0=picture(2), 图=picture(3))
    source = folder.open([pubmedvision_row(1), pubmedvision_row(2), pubmedvision_row(image=["images/图.png"])], **PMV)
    assert [shade_of(source, i) for i in range(3)] == [1, 2, 3]
    assert not list(folder.path.rglob("*.png")), "nothing is unpacked"
    # A file beside the archives goes before them.
    (folder.path / "pmc_1_0.png").write_bytes(picture(7))
    assert shade_of(source) == 7


def test_the_same_basename_in_two_zips(folder):
    archive(folder.path / "a.zip", images__pmc_1_0=picture(1))
    archive(folder.path / "b.zip", other__pmc_1_0=picture(2))
    assert shade_of(folder.open([pubmedvision_row(1)], **PMV)) == 1, "the full path decides"
    archive(folder.path / "a.zip", first__pmc_1_0=picture(1))
    with pytest.raises(
        UserError, match=r"2 different pictures for the name 'images/pmc_1_0.png'.*a.zip!first"
    ) as caught:
        folder.open([pubmedvision_row(1)], **PMV).sample(0)
    assert str(folder.path) in str(caught.value)
    archive(folder.path / "b.zip", second__pmc_1_0=picture(1))
    assert shade_of(folder.open([pubmedvision_row(1)], **PMV)) == 1, "copies of one picture are no conflict"


def test_only_pubmedvision_is_found_by_basename(folder):
    archive(folder.path / "a.zip", gqa__1=picture(1), top__coco__2=picture(2))
    (folder.path / "3.png").write_bytes(picture(3))
    rows = [{"id": i, "image": f"./coco/{i}.png", "caption": "c"} for i in (1, 2, 3)]
    source = folder.open(rows, "captions")
    assert shade_of(source, 1) == 2
    for row in (0, 2):
        with pytest.raises(BadSample, match="does not exist"):
            shade_of(source, row)


def test_a_zip_without_files(folder):
    with zipfile.ZipFile(folder.path / "a.zip", "w") as file:
        file.writestr("images/", b"")
    with pytest.raises(BadSample, match="does not exist"):
        shade_of(folder.open([pubmedvision_row(1)], **PMV))


def test_a_damaged_zip(folder):
    file = folder.write([pubmedvision_row()])
    (folder.path / "images_0.zip").write_bytes(b"PK\x03\x04 cut")
    assert "images_0.zip is not a whole zip archive" in folder.error(**PMV, path=str(file))


# What preparation, tokenizer training and the run record ask


def test_content_keys_change_with_all_that_a_sample_is_made_from(folder):
    (folder.path / "pmc_1_0.png").write_bytes(picture(1))
    archive(folder.path / "z.zip", pmc_2_0=picture(2))
    rows = [pubmedvision_row(1), pubmedvision_row(2), pubmedvision_row(3), 7]

    def keys(at_a_time: int = 4, rows: list = rows, **spec) -> tuple[str, str]:
        return folder.open(rows, **(PMV | spec)).content_keys(at_a_time, folder.cache)[0]

    before = keys()
    assert keys() == before and keys(3)[0] != before[0]
    seen = {before, keys(rows=[pubmedvision_row(1, body_part="Head"), *rows[1:]]), keys(language="zh")}
    archive(folder.path / "z.zip", pmc_2_0=picture(5))
    seen.add(keys())
    (folder.path / "pmc_3_0.png").write_bytes(picture(3))
    seen.add(keys())
    assert len({content for content, _ in seen}) == len({timed for _, timed in seen}) == 5
    copied = keys()
    os.utime(folder.path / "pmc_1_0.png", (1, 1))
    assert keys()[0] == copied[0] and keys()[1] != copied[1]


def test_keys_of_archives_are_kept_until_a_file_or_an_archive_says_otherwise(folder, monkeypatch):
    (folder.path / "images").mkdir()
    rows = [pubmedvision_row(number) for number in (1, 2, 3)]
    asked = []
    content_keys = Source._content_keys
    monkeypatch.setattr(Source, "_content_keys", lambda *args: asked.append(args) or content_keys(*args))

    def keys() -> tuple[list, bool]:
        asked.clear()
        found = folder.open_file(folder.path / "rows.json", **PMV).content_keys(2, folder.cache)
        return found, bool(asked)

    folder.write(rows)
    archive(folder.path / "a.zip", **{f"pmc_{number}_0": picture(number) for number in (1, 2)})
    found, computed = keys()
    assert len(found) == 2 and computed and keys() == (found, False)
    (kept,) = (folder.cache / "keys").iterdir()
    kept.write_text('{"folders": 1')
    assert keys() == (found, True), "damaged"
    folder.write([*rows[:2], pubmedvision_row(4)])
    changed = keys()
    assert changed[1] and changed[0][0] == found[0] and changed[0][1] != found[1]
    folder.write(rows)
    archive(folder.path / "b.zip", pmc_3_0=picture(3))
    with_third = keys()
    assert with_third[1] and with_third[0][0] == found[0] and with_third[0][1] != found[1]
    assert keys() == (with_third[0], False)
    (folder.path / "images" / "notes.txt").write_text("of no row")
    assert keys() == (with_third[0], True)
    (folder.path / "images" / "pmc_1_0.png").write_bytes(picture(1))
    unpacked = keys()
    assert unpacked[1] and unpacked[0][0] != with_third[0][0]
    assert keys() == unpacked, "a file can change at any time, so nothing is kept"


@pytest.mark.parametrize("slow", [False, True])
def test_files_are_asked_alike_on_a_disk_and_over_a_network(folder, monkeypatch, slow):
    monkeypatch.setattr(sources, "SLOW_STAT", -1 if slow else 1)
    for number in range(0, 40, 2):
        (folder.path / f"pmc_{number}_0.png").write_bytes(b"0" * number)
    images = folder.open([pubmedvision_row(1)], **PMV).images
    sizes = images.stamps([f"images/pmc_{number}_0.png" for number in range(40)]).sizes
    assert sizes == ["missing" if number % 2 else str(number) for number in range(40)]


@pytest.mark.parametrize("alike", ["", "_[49]_", "."])
def test_an_image_name_is_looked_up_the_same_way_alone_and_among_many(folder, monkeypatch, alike):
    hashes = sources._hashes
    if alike:  # names with one hash, as some of a million may have
        monkeypatch.setattr(sources, "_hashes", lambda names: hashes([re.sub(f".*{alike}.*", "", n) for n in names]))
    (folder.path / "pmc_1_0.png").write_bytes(picture(1))
    archive(folder.path / "a.zip", some__pmc_2_0=picture(2), pmc_3_0=picture(3))
    archive(folder.path / "b.zip", some__pmc_2_0=picture(2), some__pmc_4_0=picture(4))
    images = folder.open([pubmedvision_row(1)], **PMV).images
    names = [f"images/pmc_{n}_0.png" for n in (4, 1, 9, 2, 3, 2)] + ["../pmc_1_0.png", "/etc/passwd", "", "x/", "a\0b"]

    def stamps_of(names: list[str]) -> list[tuple[str, str]]:
        stamps = images.stamps(names)
        return list(zip(stamps.sizes, stamps.times, strict=True))

    for name, stamp in zip(names, stamps_of(names), strict=True):
        assert [stamp] == stamps_of([name])
        try:
            found = images.find(name)
        except sources.ImageNameError:
            assert stamp == ("refused", "")
            continue
        if found.archive:
            assert ":" in stamp[0] and not stamp[1]
        elif os.path.isfile(found.path):
            assert stamp[0] == str(os.path.getsize(found.path)) and stamp[1]
        else:
            assert stamp == ("missing", "")
    stamps = dict(zip(names, stamps_of(names), strict=True))
    assert [size for size, _ in stamps.values()].count("missing") == 4
    # Among plain names of which none is a file, the folders are not asked name by name.
    archived = names[:1] + names[2:6]
    assert stamps_of(archived) == [stamps[name] for name in archived]


def test_texts_are_those_of_the_samples(folder):
    rows = [pubmedvision_row(1), 7, pubmedvision_row(2, conversations=[]), pubmedvision_row(3, images=2)]
    texts = ["<image>\nDescribe.", "A mass in the liver.", "<image>\n<image>\nDescribe.", "A mass in the liver."]
    assert list(folder.open(rows, **PMV).texts()) == texts


@pytest.mark.parametrize("name", ["rows.json", "rows.csv"])
def test_a_file_that_changed_behind_its_size_and_time_is_refused(folder, name):
    def write(caption: str) -> Path:
        rows = [{"id": "a", "image": "a.png", "caption": caption}]
        if name.endswith(".json"):
            return folder.write(rows, name)
        (folder.path / name).write_text(f"id,image,caption\na,a.png,{caption}\n")
        return folder.path / name

    file = write("A mass in the liver.")
    before = folder.open_file(file, "captions").record(folder.cache)
    time = file.stat().st_mtime_ns
    write("A cyst in the liver.")
    os.utime(file, ns=(time, time))
    with pytest.raises(UserError, match=rf"{name} has the size and time of an earlier reading .*; touch "):
        folder.open_file(file, "captions").record(folder.cache)
    os.utime(file, ns=(time, time + 2_000_000_000))
    source = folder.open_file(file, "captions")
    assert "A cyst" in "".join(source.texts()) and source.record(folder.cache)["sha256"] != before["sha256"]


def test_the_run_record(folder):
    record = folder.open([pubmedvision_row()], **PMV).record(folder.cache)
    assert {key: record[key] for key in ("adapter", "hub_id", "revision", "rows", "synthetic")} == {
        "adapter": "pubmedvision",
        "hub_id": None,
        "revision": None,
        "rows": 1,
        "synthetic": False,
    }
    assert list(record["sha256"]) == ["rows.json"] and len(record["sha256"]["rows.json"]) == 64
    json.dumps(record)


def _ids_in_another_process(source: Source, queue) -> None:
    queue.put([source.sample(i).id for i in range(len(source))])


def test_a_source_travels_as_paths(folder):
    source = folder.open([pubmedvision_row(n) for n in range(2000)], **PMV)
    assert len(pickle.dumps(source)) < 10_000
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_ids_in_another_process, args=(source, queue))
    process.start()
    assert queue.get(timeout=60) == [f"Alignment_VQA_{n}" for n in range(2000)]
    process.join()


def test_reading_a_large_array_does_not_hold_its_rows(folder, monkeypatch):
    monkeypatch.setattr(sources, "BATCH_BYTES", 2**16)
    answer = "word " * 2000
    file = folder.write([pubmedvision_row(n, conversations=talk("Q", answer)) for n in range(800)])
    folder.open([pubmedvision_row()], name="small.json", **PMV)  # imports and first uses are not measured
    tracemalloc.start()
    source = folder.open_file(file, **PMV)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == 800 and file.stat().st_size > 8e6
    assert peak < 4e6


# The Hub, phantoms, real figures


def test_hub_rows_and_their_commit(folder, monkeypatch):
    import datasets

    rows = [pubmedvision_row(n) for n in range(3)]
    asked = {}

    class Builder:
        hash = "a" * 40

        def download_and_prepare(self) -> None:
            pass

        def as_dataset(self, split: str):
            asked["split"] = split
            return datasets.Dataset.from_list(rows)

    def load_dataset_builder(hub_id: str, **options) -> Builder:
        asked.update(options, hub_id=hub_id)
        return Builder()

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    spec = SourceSpec(**PMV, hub_id="org/PubMedVision", revision="v1", image_root=str(folder.path))
    source = open_source("s", spec, folder.cache)
    assert asked == {
        "hub_id": "org/PubMedVision",
        "name": "PubMedVision_Alignment_VQA",
        "revision": "v1",
        "split": "train",
    }
    assert source.sample(2).images[0].path == str(folder.path / "images/pmc_2_0.png")
    assert source.record(folder.cache) | {"revision": "a" * 40, "sha256": {}, "rows": 3} == source.record(folder.cache)
    bare = open_source("s", SourceSpec(**PMV, hub_id="org/PubMedVision"), folder.cache)
    with pytest.raises(UserError, match="image_root"):
        bare.sample(0)


def test_a_hub_data_set_out_of_reach(folder, monkeypatch):
    import datasets

    def gated(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError(
            "Dataset 'org/x' is a gated dataset on the Hub.\nAsk for access."
        )

    monkeypatch.setattr(datasets, "load_dataset_builder", gated)
    text = folder.error("captions", hub_id="org/x")
    assert "org/x (revision main" in text and "gated" in text and "hf auth login" in text


def test_phantoms_are_made_once_and_then_opened(folder):
    spec = SourceSpec(adapter="phantom", config="alignment", train=6, test=2, seed=3)
    with pytest.raises(UserError, match="not made yet"):
        open_source("s", spec, folder.cache)
    ensure_made(spec, folder.cache)
    made = {path: path.stat().st_mtime_ns for path in folder.cache.rglob("*.json")}
    ensure_made(spec, folder.cache)
    assert made == {path: path.stat().st_mtime_ns for path in folder.cache.rglob("*.json")}
    for config in ("alignment", "instruction"):
        source = open_source("s", spec.model_copy(update={"config": config}), folder.cache)
        assert len(source) == 6 and source.record(folder.cache)["synthetic"]
        for i in range(6):
            sample = source.sample(i)
            for ref in sample.images:
                assert load_image(ref, sample.id).image.mode == "RGB"


@pytest.mark.skipif("HUATUO_SAMPLES" not in os.environ, reason="HUATUO_SAMPLES names no folder of real samples")
def test_real_figures(tmp_path):
    folder = Path(os.environ["HUATUO_SAMPLES"]) / "real_sample"
    spec = SourceSpec(adapter="captions", path=str(folder), columns={"context": "context"})
    source = open_source("real", spec, tmp_path)
    assert len(source) == 104
    for i in range(len(source)):
        sample = source.sample(i)
        loaded = load_image(sample.images[0], sample.id)
        assert max(loaded.image.size) <= 512 and loaded.notes == ()
        assert "\n\n" in sample.messages[1].content

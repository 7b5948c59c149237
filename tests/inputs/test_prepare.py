import hashlib
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich import box
from rich.console import Console

from huatuo_vision.inputs import prepare as preparation
from huatuo_vision.inputs.prepare import load_pool, prepare
from huatuo_vision.inputs.prepare_report import PrepareReport, tables
from huatuo_vision.recipe import Recipe
from huatuo_vision.schema import BadSample, Sample, UserError

TOKENS_PER_IMAGE = 10


@dataclass(frozen=True)
class Words:
    input_ids: np.ndarray
    targets: int


class WordEncoder:
    """A token per word and ten per image; supervises the answers. Stands in for a composed model's Encoder."""

    def __init__(self, fingerprint: str = "words"):
        self.fingerprint = fingerprint

    def encode(self, sample: Sample) -> Words:
        counts = [len(message.content.replace("<image>", "").split()) for message in sample.messages]
        tokens = TOKENS_PER_IMAGE * len(sample.images) + sum(counts)
        answers = (n for n, message in zip(counts, sample.messages, strict=True) if message.role == "assistant")
        return Words(np.zeros(tokens), sum(answers))


class Data:
    """A JSON file of chat messages and its image folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.rows: list[dict] = []

    def add(self, images: int = 1, words: int = 5, answer: str = "It is a lung .", id_: str | None = None) -> str:
        number = len(self.rows)
        names = [f"{number}-{k}.png" for k in range(images)]
        for k, name in enumerate(names):
            self.draw(name, shade=(40 * k + number) % 256)
        question = "<image>\n" * images + " ".join(["word"] * words)
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        self.rows.append({"id": id_ or f"row-{number}", "images": names, "messages": turns})
        return self.rows[-1]["id"]

    def draw(self, name: str, shade: int, size: int = 8) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (size, size), (shade, shade, shade)).save(self.folder / name)

    def spec(self) -> dict:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "rows.json"
        path.write_text(json.dumps(self.rows))
        return {"adapter": "messages", "path": str(path), "image_root": str(self.folder)}


def make_recipe(sources: dict[str, Data], on_bad_sample: str = "drop", phases: dict | None = None, **phase) -> Recipe:
    def phase_values(values: dict) -> dict:
        data = [{"source": name} for name in sources]
        return {"data": data, "train": {"projector": {"lr": 1e-3}}, "global_batch_size": 1} | values

    return Recipe.model_validate(
        {
            "name": "test",
            "model": {"vision_encoder": {"path": "v"}, "language_model": {"path": "l"}},
            "data": {name: data.spec() for name, data in sources.items()},
            "phases": {name: phase_values(values) for name, values in (phases or {"align": phase}).items()},
            "on_bad_sample": on_bad_sample,
        }
    )


class Run:
    """Prepares with one cache and one run folder; remembers which images were decoded."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        self.cache, self.out = tmp_path / "cache", tmp_path / "out"
        self.decoded: Counter[str] = Counter()
        self.screen = ""
        load_image = preparation.load_image

        def counting(ref, sample_id):
            self.decoded[Path(ref.name).name] += 1
            return load_image(ref, sample_id)

        monkeypatch.setattr(preparation, "load_image", counting)
        monkeypatch.setattr(preparation, "SHARD_ROWS", 4)

    def __call__(self, recipe: Recipe, encoder: WordEncoder | None = None, processes: int = 1, out: Path | None = None):
        self.decoded.clear()
        console = Console(file=io.StringIO(), width=200)
        try:
            return prepare(
                recipe, list(recipe.phases), encoder or WordEncoder(), self.cache, out or self.out, console, processes
            )
        finally:
            self.screen = console.file.getvalue()

    def report(self) -> dict:
        return json.loads((self.out / "prepare" / "report.json").read_text())

    def table(self, source: str = "a") -> dict[str, list]:
        return pq.read_table(self.out / "prepare" / f"{source}.parquet").to_pydict()


@pytest.fixture
def run(tmp_path, monkeypatch) -> Run:
    return Run(tmp_path, monkeypatch)


@pytest.fixture
def data(tmp_path) -> Data:
    return Data(tmp_path / "data")


def all_kinds_of_bad(data: Data) -> None:
    for _ in range(6):
        data.add()
    data.add()
    (data.folder / "6-0.png").unlink()
    data.add()
    whole = (data.folder / "7-0.png").read_bytes()
    (data.folder / "7-0.png").write_bytes(whole[: len(whole) // 2])
    data.add(answer="  ")
    data.add(images=2)
    data.rows[-1]["messages"][0]["content"] = "<image>\nonly one place for two images"


def test_every_row_is_accounted_for_with_its_reason_and_id(data, run):
    all_kinds_of_bad(data)
    report = run(make_recipe({"a": data}))
    source = report.sources["a"]
    assert (source["rows"], source["kept"], sum(source["dropped"].values())) == (10, 6, 4)
    assert sorted(id_ for samples in report.dropped_ids["a"].values() for id_, _ in samples) == [
        "row-6", "row-7", "row-8", "row-9"
    ]  # fmt: skip
    assert {reason: len(samples) for reason, samples in report.dropped_ids["a"].items()} == source["dropped"]
    assert source["dropped"]["empty_answer"] == source["dropped"]["placeholder_count"] == 1
    explanations = {id_: text for samples in report.dropped_ids["a"].values() for id_, text in samples}
    assert "6-0.png" in explanations["row-6"]
    assert "7-0.png" in explanations["row-7"]
    assert "1 <image> placeholders but the row has 2 images" in explanations["row-9"]


def test_another_number_of_rows_than_expected_is_said(data, run):
    for _ in range(3):
        data.add()
    recipe = make_recipe({"s": data})
    for expected, said in ((3, False), (5, True), (None, False)):
        spec = recipe.data["s"].model_copy(update={"expected_rows": expected})
        report = run(recipe.model_copy(update={"data": {"s": spec}}))
        sentence = "source 's' holds 3 rows; the recipe expects 5"
        assert (sentence in run.screen) == said
        assert (sentence in report.path.with_suffix(".md").read_text()) == said
        assert report.sources["s"]["expected_rows"] == expected
        assert not run.decoded or expected == 3, "another expectation checks nothing again"


def test_the_table_holds_what_was_measured(data, run):
    data.add(images=2, words=7, answer="one two three")
    data.add(images=0, words=1, answer="yes")
    report = run(make_recipe({"a": data}))
    assert run.table() == {
        "row": [0, 1], "id": ["row-0", "row-1"], "tokens": [30, 2], "targets": [3, 1], "images": [2, 0]
    }  # fmt: skip
    assert report.sources["a"]["tokens"] == {"mean": 16.0, "p50": 2, "p95": 2, "max": 30}
    assert report.sources["a"]["images"] == 2


def test_stop_names_the_first_bad_sample_after_the_report_is_written(data, run):
    all_kinds_of_bad(data)
    with pytest.raises(UserError) as stopped:
        run(make_recipe({"a": data}, on_bad_sample="stop"))
    message = str(stopped.value)
    assert message.startswith("4 of 10 samples can't be trained on (")
    assert "empty_answer 1" in message
    assert "the first is sample 'row-6' of source 'a': " in message
    assert "6-0.png" in message
    assert str(run.out / "prepare" / "report.json") in message
    assert "on_bad_sample: drop" in message
    assert sum(run.report()["sources"]["a"]["dropped"].values()) == 4
    assert not (run.out / "prepare" / "a.parquet").exists()


def test_stop_goes_on_where_nothing_is_wrong(data, run):
    data.add()
    assert run(make_recipe({"a": data}, on_bad_sample="stop")).sources["a"]["kept"] == 1


def test_two_sources_of_one_file(data, run):
    for _ in range(3):
        data.add()
    run(make_recipe({"a": data, "b": data}))
    assert [account["kept"] for account in run.report()["sources"].values()] == [3, 3]


def test_of_rows_with_the_same_id_the_first_is_kept_across_shards(data, run):
    for number in range(9):
        data.add(id_="twin" if number in (1, 2, 7) else None)
    report = run(make_recipe({"a": data}))
    assert report.sources["a"]["dropped"] == {"duplicate_id": 2}
    assert run.table()["row"] == [0, 1, 3, 4, 5, 6, 8]
    assert [text.split(";")[0] for _, text in report.dropped_ids["a"]["duplicate_id"]] == [
        "row 2 has the id of row 1",
        "row 7 has the id of row 1",
    ]


def test_phase_limits_drop_and_count_but_never_stop(data, run):
    for images, words in ((1, 5), (1, 200), (3, 5), (3, 200), (0, 5)):
        data.add(images=images, words=words)
    phases = {
        "align": {"max_sample_tokens": 100, "max_row_images": 2},
        "instruct": {"max_sample_tokens": 4096, "max_row_images": 2},
    }
    report = run(make_recipe({"a": data}, on_bad_sample="stop", phases=phases))
    assert report.sources["a"]["kept"] == 5
    assert report.phases["align"]["a"] == {
        "rows": 5, "kept": 2, "dropped": {"overlong": 2, "too_many_images": 1}, "selected": 2
    }  # fmt: skip
    assert report.phases["instruct"]["a"]["dropped"] == {"too_many_images": 2}
    assert [id_ for id_, _ in report.dropped_ids["a"]["overlong"]] == ["row-1", "row-3"]
    assert report.dropped_ids["a"]["overlong"][0][1] == (
        "215 tokens and 1 images in phase align, max_sample_tokens is 100 and max_row_images is 2"
    )
    assert [id_ for id_, _ in report.dropped_ids["a"]["too_many_images"]] == ["row-2", "row-2", "row-3"]


def test_phase_counts_add_up_with_all_reasons_together(data, run):
    all_kinds_of_bad(data)
    data.add(words=200, id_="long")
    data.add(words=200, id_="long")
    account = run(make_recipe({"a": data}, max_sample_tokens=100)).phases["align"]["a"]
    assert account["rows"] == 12 == account["kept"] + sum(account["dropped"].values())
    assert account["kept"] == 6
    assert account["dropped"]["duplicate_id"] == account["dropped"]["overlong"] == 1


def test_changing_a_limit_checks_nothing_again(data, run):
    for _ in range(5):
        data.add()
    run(make_recipe({"a": data}))
    report = run(make_recipe({"a": data}, max_sample_tokens=20, max_row_images=1))
    assert run.decoded.total() == 0
    assert report.phases["align"]["a"]["kept"] == 5


def test_a_second_preparation_does_no_image_work(data, run):
    for _ in range(9):
        data.add(images=2)
    first = run(make_recipe({"a": data}))
    assert run.decoded.total() == 18
    second = run(make_recipe({"a": data}))
    assert run.decoded.total() == 0
    assert second == first


def test_a_changed_image_rechecks_its_shard_alone(data, run):
    for _ in range(12):
        data.add()
    run(make_recipe({"a": data}))
    data.draw("5-0.png", shade=200, size=30)
    run(make_recipe({"a": data}))
    assert sorted(run.decoded) == ["4-0.png", "5-0.png", "6-0.png", "7-0.png"]


def test_another_encoder_checks_everything_again(data, run):
    for _ in range(5):
        data.add()
    run(make_recipe({"a": data}))
    run(make_recipe({"a": data}), encoder=WordEncoder("another tokenizer"))
    assert run.decoded.total() == 5


def test_another_version_of_the_code_checks_everything_again(data, run, monkeypatch):
    for _ in range(5):
        data.add()
    run(make_recipe({"a": data}))
    monkeypatch.setattr(preparation, "PREPARE_VERSION", preparation.PREPARE_VERSION + 1)
    run(make_recipe({"a": data}))
    assert run.decoded.total() == 5


def test_stop_checks_refused_shards_anew_so_that_what_is_mended_is_seen(data, run, monkeypatch):
    for _ in range(8):
        data.add()
    load_image = preparation.load_image

    def unreadable(ref, sample_id):
        if ref.name.endswith("5-0.png"):
            raise BadSample(sample_id, "unreadable_image", "cannot be read (permission denied)")
        return load_image(ref, sample_id)

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "load_image", unreadable)
        with pytest.raises(UserError, match="permission denied"):
            run(make_recipe({"a": data}, on_bad_sample="stop"))
        assert run(make_recipe({"a": data}, on_bad_sample="drop")).sources["a"]["kept"] == 7
        assert run.decoded.total() == 0
    # The permission is given: neither the file's size nor its time tells.
    assert run(make_recipe({"a": data}, on_bad_sample="stop")).sources["a"]["kept"] == 8
    assert run.decoded.total() == 4


def test_an_image_used_often_is_decoded_once_per_shard_and_refuses_every_user(data, run):
    for _ in range(8):
        data.add(images=0)
    for number, row in enumerate(data.rows):
        row["images"] = ["shared.png" if number < 6 else "broken.png"]
        row["messages"][0]["content"] = "<image>\nwhat is it"
    data.draw("shared.png", shade=1)
    (data.folder / "broken.png").write_bytes(b"no image")
    report = run(make_recipe({"a": data}))
    assert run.decoded == {"shared.png": 2, "broken.png": 1}
    assert [id_ for samples in report.dropped_ids["a"].values() for id_, _ in samples] == ["row-6", "row-7"]


def test_an_interrupted_preparation_goes_on_where_it_was(data, run, monkeypatch):
    for _ in range(12):
        data.add()
    recipe = make_recipe({"a": data})
    check_shard = preparation._check_shard

    def killed_in_the_second(shard, source, encoder):
        if shard.start == 4:
            raise KeyboardInterrupt
        return check_shard(shard, source, encoder)

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "_check_shard", killed_in_the_second)
        with pytest.raises(KeyboardInterrupt):
            run(recipe)
    assert run.decoded.total() == 4
    report = run(recipe)
    assert run.decoded.total() == 8
    assert report.sources["a"]["kept"] == 12


def test_a_write_that_is_killed_leaves_no_file_under_the_final_name(tmp_path):
    def killed(path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        preparation._write(tmp_path / "shard.parquet", killed)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_shard_is_named(data, run):
    data.add()
    run(make_recipe({"a": data}))
    (shard,) = (run.cache / "prepared").iterdir()
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(UserError, match=f"{shard.name} is damaged; delete it and start again"):
        run(make_recipe({"a": data}))


def test_two_processes_give_the_same_files_as_one(data, run, tmp_path):
    all_kinds_of_bad(data)
    for _ in range(6):
        data.add(images=2)
    recipe = make_recipe({"a": data})
    run(recipe, processes=1)
    one = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (run.out / "prepare").iterdir()}
    run.cache = tmp_path / "other cache"
    run(recipe, processes=2)
    assert run.decoded.total() == 0, "nothing is decoded in this process"
    two = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (run.out / "prepare").iterdir()}
    assert sorted(one) == ["a.parquet", "report.json", "report.md"]
    assert two == one


def test_reports_can_be_read(data, run):
    all_kinds_of_bad(data)
    data.add(words=200)
    run(make_recipe({"pairs.x": data}, max_sample_tokens=100))
    page = (run.out / "prepare" / "report.md").read_text()
    for text in (page, run.screen):
        assert "pairs.x" in text
        assert "overlong 1" in text
        assert "empty_answer 1" in text
    assert run.screen.count("pairs.x") == 4  # in each table, and with the reasons below
    assert "\x1b" not in page
    assert "| pairs.x " in page
    assert "row-8: the assistant's answer" in page
    assert set(run.report()) == {"sources", "phases", "dropped_ids"}


def test_a_narrow_terminal_shows_whole_numbers():
    tokens = {"p50": 1_620, "p95": 2_310, "max": 3_319}
    account = {"rows": 1_300_000, "kept": 1_299_990, "dropped": {"missing_image": 10}, "tokens": tokens}
    account |= {"images": 1_600_000, "selected": 1_299_990}
    name = "instruction_tuning"
    console = Console(width=80, record=True)
    console.print(*tables(PrepareReport(Path(), {name: account}, {"instruct": {name: account}}, {}), box.SIMPLE_HEAD))
    shown = console.export_text()
    assert "…" not in shown
    assert shown.count("1,299,990") == 3 and "1,600,000" in shown and "1,620 / 2,310 / 3,319" in shown


def test_ids_of_others_are_no_markup_in_the_report(data, run):
    data.add(id_="<img src=x onerror=alert(1)>\n# Head", answer=" ")
    data.add()
    run(make_recipe({"a": data}))
    page = (run.out / "prepare" / "report.md").read_text()
    assert "&lt;img src=x onerror=alert(1)&gt; # Head: " in page and "<img" not in page and "\n# Head" not in page


def test_a_log_file_gets_lines_of_progress(data, run, monkeypatch):
    monkeypatch.setattr(preparation, "LOG_SECONDS", -1)
    for _ in range(7):
        data.add()
    data.add(answer=" ")
    run(make_recipe({"a": data}))
    assert "checked 4 of 8 rows, 0 refused, " in run.screen
    assert "checked 8 of 8 rows, 1 refused, " in run.screen


def test_a_source_with_nothing_left_stops(data, run):
    data.add(answer=" ")
    with pytest.raises(UserError, match=r"source 'a': nothing is left .* all 1 rows are refused \(empty_answer 1\)"):
        run(make_recipe({"a": data}))


def test_a_phase_whose_limits_leave_nothing_stops(data, run):
    data.add(words=200)
    with pytest.raises(UserError, match=r"no sample of source 'a' fits the phase \(overlong 1; max_sample_tokens is 9"):
        run(make_recipe({"a": data}, max_sample_tokens=9))
    assert run.report()["phases"]["align"]["a"] == {
        "rows": 1, "kept": 0, "dropped": {"overlong": 1}, "selected": None
    }  # fmt: skip


def test_more_rows_than_there_are_stops(data, run):
    data.add()
    with pytest.raises(UserError, match=r"phases.align.data: source 'a': rows asks for 2 samples but 1 are available"):
        run(make_recipe({"a": data}, data=[{"source": "a", "rows": 2}]))
    assert run.report()["phases"]["align"]["a"]["selected"] is None


def test_the_pool_is_one_epoch_of_a_phase(tmp_path, run):
    first, second = Data(tmp_path / "first"), Data(tmp_path / "second")
    for words in range(1, 11):
        first.add(words=words, answer="a b c")
        second.add(images=0, words=words)
    first.rows[3]["messages"][1]["content"] = " "
    entries = [{"source": "second", "rows": 4}, {"source": "first"}]
    recipe = make_recipe({"first": first, "second": second}, data=entries, max_sample_tokens=21)
    report = run(recipe)
    pool = load_pool(recipe, "align", run.out, seed=0)
    assert pool.sources == ("second", "first")
    assert len(pool) == sum(account["selected"] for account in report.phases["align"].values()) == 4 + 7
    assert pool.source.tolist() == [0] * 4 + [1] * 7
    assert pool.row[4:].tolist() == [0, 1, 2, 4, 5, 6, 7]  # row 3 is bad, rows 8 and 9 have 22 and 23 tokens
    assert pool.tokens[4:].tolist() == [14, 15, 16, 18, 19, 20, 21]
    assert pool.tokens[:4].tolist() == (pool.row[:4] + 1 + 5).tolist()
    assert pool.targets.tolist() == [5] * 4 + [3] * 7
    assert pool.images.tolist() == [0] * 4 + [1] * 7
    assert (pool.source.dtype, pool.row.dtype, pool.tokens.dtype, pool.targets.dtype, pool.images.dtype) == (
        np.int16, np.int64, np.int32, np.int32, np.int16
    )  # fmt: skip
    indices = np.array([10, 0, 5, 10])
    assert pool.ids(indices) == [f"row-{pool.row[i]}" for i in indices]
    assert len(set(pool.row[:4].tolist())) == 4
    again = load_pool(recipe, "align", run.out, seed=0)
    assert again.row.tolist() == pool.row.tolist()
    assert load_pool(recipe, "align", run.out, seed=1).row.tolist() != pool.row.tolist()


def test_a_worker_does_not_outlive_a_killed_parent(tmp_path):
    program = (
        "import os, sys, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "import multiprocessing\n"
        "from huatuo_vision.inputs.prepare import _start_worker\n"
        "if __name__ == '__main__':\n"
        "    pool = ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), _start_worker, ({}, None))\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    time.sleep(600)\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(program)
    environment = os.environ | {"PYTHONPATH": str(Path(preparation.__file__).parents[2])}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        worker = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
    for _ in range(200):
        if not Path(f"/proc/{worker}").exists():
            return
        time.sleep(0.05)
    pytest.fail("the worker still runs 10 s after its parent was killed")


def test_the_pool_knows_the_data_by_their_content(data, run, tmp_path):
    def contents() -> tuple[str, ...]:
        run(make_recipe({"a": data}))
        return load_pool(make_recipe({"a": data}), "align", run.out, seed=0).contents

    data.add(words=3, answer="left lung")
    before = contents()
    assert contents() == before
    data.rows[-1]["messages"][1]["content"] = "right lung"  # no token more or less
    assert contents() != before


def test_a_worker_leaves_the_signal_before_a_time_limit_to_its_parent():
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, preparation._start_worker, ({}, None)) as pool:
        pool.submit(signal.raise_signal, signal.SIGUSR1).result()
        assert pool.submit(os.getpid).result() != os.getpid()

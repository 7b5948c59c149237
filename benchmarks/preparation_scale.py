"""Preparation in PubMedVision's own layout: memory and speed as the rows grow, killed and resumed, and started again.

    python -m benchmarks.preparation_scale --rows 20000 200000
    python -m benchmarks.preparation_scale --start 1300000

Rows, pictures and archives are made on the spot: one JSON array with rows of PubMedVision's size, whose pictures lie in
20 zip archives under other folders than the rows name (a picture for every row, two to six for one row in nine). What
is measured is `train.py` itself, from the command to the plan of the first phase, with a tiny model; memory is the
most that the main process, and the largest process that it started, held of their own (RssAnon, read every 50 ms: pages
of mapped files, which the kernel takes back when it needs them, are left out).

--rows: every picture is decoded and every text encoded, as before any training; then, all being prepared, a new run.
The first of the sizes is also prepared from nothing once more, killed with SIGKILL half way and started again, which
must check no shard twice and come to the same report. --start: the rows count as checked already (their
verdicts are written, not found), and what is measured is the start of a run.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import yaml
from PIL import Image
from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parents[1]
DATA_FILE = "PubMedVision_Alignment_VQA.json"
ARCHIVES = 20
WORDS = (REPOSITORY / "data" / "filters" / "common_words.txt").read_text().split()


def make_data(folder: Path, rows: int) -> None:
    """The JSON array and the archives, one row at a time; texts and pictures are taken in turn from a few hundred."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(rows)
    pictures = [_picture(rng) for _ in range(64)]
    talks = [json.dumps(_talk(rng), indent=4) for _ in range(509)]
    archives = [zipfile.ZipFile(folder / f"images_{number}.zip", "w") for number in range(ARCHIVES)]
    with (folder / DATA_FILE).open("w", encoding="utf-8") as file:
        for number in range(rows):
            names = [f"pmc_{number}_{image}.jpg" for image in range(1 if number % 9 else 2 + number % 5)]
            for name in names:
                archives[number % ARCHIVES].writestr(f"some/folder/{name}", pictures[number % len(pictures)])
            images = ", ".join(f'"images/{name}"' for name in names)
            file.write(
                f'{"[" if number == 0 else ","}\n{{"image": [{images}], "id": "Alignment_VQA_{number}", '
                f'"modality": "CT", "body_part": "Chest", "conversations": {talks[number % len(talks)]}}}'
            )
        file.write("]")
    for archive in archives:
        archive.close()


def _talk(rng: np.random.Generator) -> list[dict[str, str]]:
    lengths = zip(("human", "gpt"), (20, int(rng.integers(60, 200))), strict=True)
    return [{"from": who, "value": " ".join(rng.choice(WORDS, length))} for who, length in lengths]


def _picture(rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((48, 48)).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def make_recipe(folder: Path) -> None:
    """A tiny composed model, and a recipe that aligns it on the data."""
    from huatuo_vision.model.compose import compose_processor, compose_weights
    from huatuo_vision.recipe import load_recipe

    model = load_recipe(REPOSITORY / "recipes" / "mini" / "tiny.yaml").model
    compose_processor(model, folder / "model", texts=iter(WORDS))
    compose_weights(model, folder / "model", seed=0)
    phase = {
        "data": [{"source": "rows"}],
        "train": {"projector": {"lr": 1e-3}},
        "global_batch_size": 256,
        "max_sample_tokens": 1024,
        "max_row_tokens": 8192,
        "max_row_images": 64,
        "precision": "fp32",
    }
    recipe = {
        "name": "scale",
        "model": {"llava": {"path": str(folder / "model")}},
        "data": {"rows": {"adapter": "pubmedvision", "config": "alignment", "path": str(folder / "data")}},
        "phases": {"align": phase},
        "workers": 0,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


Show = Callable[..., None]  # a row of the table, cell by cell


@dataclass
class Measured:
    seconds: float
    peak_mib: float = 0.0
    worker_mib: float = 0.0


def run_until(folder: Path, out: Path, cache: Path, done: Callable[[], bool]) -> Measured:
    """`train.py` from nothing in `out`, killed as soon as `done()`."""
    command = [sys.executable, str(REPOSITORY / "train.py"), "--recipe", str(folder / "recipe.yaml"), "--out", str(out)]
    variables = {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=said, cwd=REPOSITORY, env=os.environ | variables, start_new_session=True
        )
        found = Measured(0.0)
        while not done():
            if process.poll() is not None:
                said.seek(0)
                raise SystemExit(f"train.py ended with {process.returncode}:\n{said.read()[-3000:]}")
            found.peak_mib = max(found.peak_mib, _own_mib(process.pid))
            children = psutil.Process(process.pid).children()
            found.worker_mib = max([found.worker_mib, *(_own_mib(child.pid) for child in children)])
            time.sleep(0.05)
        found.seconds = time.monotonic() - began
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return found


def _own_mib(pid: int) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return 0.0
    line = next((line for line in status.splitlines() if line.startswith("RssAnon")), "RssAnon: 0 kB")
    return int(line.split()[1]) / 1024


def measure_rows(folder: Path, rows: int, show: Show) -> None:
    cache = folder / "cache"
    for name, out in (("all rows", folder / "first"), ("a new run", folder / "again")):
        found = run_until(folder, out, cache, is_planned(out))
        show(f"{rows:,}", name, *_cells(found), f"{rows / found.seconds:,.0f}" if name == "all rows" else "")


def measure_kill(folder: Path, rows: int, show: Show) -> None:
    def shards() -> dict[str, int]:
        files = (cache / "huatuo_vision" / "prepared").glob("[!.]*.parquet")
        return {path.name: path.stat().st_mtime_ns for path in files}

    out, cache = folder / "broken", folder / "other-cache"
    half = rows // 1024 // 2
    cut = run_until(folder, out, cache, lambda: len(shards()) >= half)
    kept = shards()
    show(f"{rows:,}", f"killed after {len(kept)} shards of 1,024", *_cells(cut), "")
    rest = run_until(folder, out, cache, is_planned(out))
    show(f"{rows:,}", "the same command again", *_cells(rest), "")
    twice = [name for name, when in kept.items() if shards()[name] != when]
    reports = [json.loads((folder / run / "prepare" / "report.json").read_text()) for run in ("first", "broken")]
    if twice or reports[0] != reports[1]:
        raise SystemExit(f"after the kill {len(twice)} shards were checked twice, or the report differs")


def is_planned(out: Path) -> Callable[[], bool]:
    return (out / "align" / "data.json").exists


def measure_start(folder: Path, rows: int, show: Show) -> None:
    cache = folder / "cache"
    read = run_until(
        folder, folder / "read", cache, lambda: any((cache / "huatuo_vision" / "rows").glob("[!.]*.arrow"))
    )
    show(f"{rows:,}", "the JSON array read, once", *_cells(read), f"{rows / read.seconds:,.0f}")
    write_verdicts(folder, cache)
    started = run_until(folder, folder / "run", cache, is_planned(folder / "run"))
    show(f"{rows:,}", "a new run", *_cells(started), "")


def write_verdicts(folder: Path, cache: Path) -> None:
    """What a preparation of these rows would have left, without decoding a picture."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from huatuo_vision.inputs import prepare
    from huatuo_vision.inputs.encode import Encoder
    from huatuo_vision.inputs.sources import open_source
    from huatuo_vision.recipe import load_recipe

    ours = cache / "huatuo_vision"
    source = open_source("rows", load_recipe(folder / "recipe.yaml").data["rows"], ours)
    rng = np.random.default_rng(0)
    for shard in prepare._shards(source, Encoder(folder / "model"), ours):
        targets = rng.integers(60, 260, len(shard))
        columns = {
            "id": [f"Alignment_VQA_{row}" for row in range(shard.start, shard.stop)],
            "tokens": targets + 60,
            "targets": targets,
            "images": np.ones(len(shard), dtype=np.int16),
            "reason": [""] * len(shard),
            "explanation": [""] * len(shard),
            "notes": [[]] * len(shard),
        }
        table = pa.table(columns).cast(prepare.VERDICTS)
        prepare._write(shard.path, lambda path, table=table: pq.write_table(table, path))


def _cells(found: Measured) -> tuple[str, ...]:
    worker = f"{found.worker_mib:,.0f}" if found.worker_mib else ""
    return f"{found.seconds:,.1f}", f"{found.peak_mib:,.0f}", worker


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preparation_scale", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rows", type=int, nargs="*", default=[], metavar="N", help="prepare so many rows")
    parser.add_argument("--start", type=int, nargs="*", default=[], metavar="N", help="start a run on so many")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where data and runs are made (default: a temporary)")
    args = parser.parse_args()
    columns = ("rows", "what", "seconds", "peak MiB", "worker's MiB", "rows/s")
    table = Table(title=f"train.py up to its first plan, {len(os.sched_getaffinity(0))} cores", title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name == "what" else "right")
    console = Console()

    def show(*cells: str) -> None:
        table.add_row(*cells)
        console.print("  ".join(cell for cell in cells if cell), highlight=False)  # now: the table takes its time

    killed = {rows: (measure_rows, measure_kill) for rows in args.rows[:1]}
    wanted = [(rows, killed.get(rows, (measure_rows,))) for rows in args.rows]
    wanted += [(rows, (measure_start,)) for rows in args.start]
    for rows, measures in wanted:
        folder = Path(tempfile.mkdtemp(dir=args.work))
        try:
            make_data(folder / "data", rows)
            size = sum(path.stat().st_size for path in (folder / "data").iterdir())
            array = (folder / "data" / DATA_FILE).stat().st_size
            console.print(f"{rows:,} rows: {array / 2**20:,.0f} MiB of JSON, {size / 2**20:,.0f} MiB with archives")
            make_recipe(folder)
            for measure in measures:
                measure(folder, rows, show)
        finally:
            shutil.rmtree(folder)
    console.print(table)


if __name__ == "__main__":
    main()

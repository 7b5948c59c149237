"""Preparation and loading beside `datasets.map` and the processor: python -m benchmarks.preparation_speed

Rows of `benchmarks.samples` (one JPEG picture of 512 pixels each) for an encoder of 336 pixels and 576 image tokens.
No model runs. Everything is done in one process and counted in samples per CPU second; the sides take turns, and
tokens, supervised tokens and pixels of both must be equal.

preparation   what is done once, before training: ours decodes every picture in full, encodes every text and keeps a
              verdict and the lengths; `map` keeps token ids and pixels, as scripts built on it do
loading       what is done in every epoch: ours decodes and encodes the samples of a row and packs them; `map` reads its
              rows back and pads them; "in the collator" is the processor on the rows themselves, nothing prepared
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

BATCH = 8


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.preparation_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, default=256, metavar="N", help="a multiple of 8 (default: 256)")
    parser.add_argument("--kind", default="single", help="of benchmarks.samples (default: single)")
    parser.add_argument("--alternations", type=int, default=3, metavar="N", help="turns of each side (default: 3)")
    arguments = parser.parse_args(argv)
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

    import datasets
    import transformers
    from rich.console import Console
    from rich.table import Table

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as folder:
        sides = _Sides(Path(folder), arguments.kind, arguments.rows)
        tasks: dict[str, dict[str, Callable[[], Any]]] = {
            "preparation": {"ours": sides.prepare, "datasets.map": sides.map},
            "loading": {"ours": sides.load, "datasets.map": sides.load_mapped, "in the collator": sides.collate},
        }
        table = Table(title=f"samples per CPU second, {arguments.rows} rows, one process", title_justify="left")
        for column in ("", "", "median [min to max]", "ours over it", "on disk, a sample"):
            table.add_column(column, justify="right" if table.columns[2:] or column else "left", no_wrap=True)
        for task, ways in tasks.items():
            speeds: dict[str, list[float]] = {way: [] for way in ways}
            for turn in range(arguments.alternations):
                for way in list(ways)[:: 1 if turn % 2 == 0 else -1]:
                    began = time.process_time()
                    ways[way]()
                    speeds[way].append(arguments.rows / (time.process_time() - began))
            for way, found in speeds.items():
                ratios = [ours / theirs for ours, theirs in zip(speeds["ours"], found, strict=True)]
                disk = f"{sides.disk[way] / arguments.rows:,.0f} B" if task == "preparation" else ""
                table.add_row(task, way, _spread(found, ",.0f"), "" if way == "ours" else _spread(ratios, ".2f"), disk)
        sides.assert_equal()
    console.print(table)
    console.print("tokens, supervised tokens and pixels of both sides are equal", highlight=False)


def _spread(values: Sequence[float], form: str) -> str:
    return f"{statistics.median(values):{form}} [{min(values):{form}} to {max(values):{form}}]"


class _Sides:
    """Both ways of doing it, on the same rows and the same processor."""

    def __init__(self, folder: Path, kind: str, rows: int):
        import json

        from rich.console import Console

        from benchmarks.peers import PaddingCollator
        from benchmarks.samples import make_samples
        from benchmarks.training_speed import MODEL
        from huatuo_vision.inputs.encode import Encoder
        from huatuo_vision.inputs.processor import load_processor
        from huatuo_vision.inputs.sources import open_source
        from huatuo_vision.model.compose import compose_processor
        from huatuo_vision.recipe import ModelSpec, Recipe

        self.folder, self.count, self.turn = folder, rows, 0
        path = make_samples(folder / "samples", kind, rows, seed=0, side=512)
        spec = ModelSpec.model_validate(MODEL)
        spec.vision_encoder.config.update(image_size=336)
        self.recipe = Recipe.model_validate(
            {
                "name": "speed",
                "model": spec.model_dump(),
                "data": {"rows": {"adapter": "messages", "path": str(path)}},
                "phases": {
                    "instruct": {
                        "data": [{"source": "rows"}],
                        "train": {"projector": {"lr": 1e-3}},
                        "global_batch_size": BATCH,
                        "max_row_tokens": BATCH * 4096,
                        "max_row_images": BATCH * 8,
                    }
                },
            }
        )
        self.source = open_source("rows", self.recipe.data["rows"], folder / "cache")
        compose_processor(spec, folder / "model", texts=self.source.texts())
        self.encoder = Encoder(folder / "model")
        self.processor = load_processor(folder / "model")
        self.collator = PaddingCollator(self.processor)
        self.rows = json.loads(path.read_text())
        self.quiet = Console(quiet=True)
        self.disk: dict[str, int] = {}

    # ---- ours ----

    def prepare(self) -> None:
        from huatuo_vision.inputs.prepare import load_pool, prepare

        self.turn += 1
        cache, out = self.folder / f"ours-{self.turn}", self.folder / "ours"
        shutil.rmtree(out, ignore_errors=True)
        prepare(self.recipe, ["instruct"], self.encoder, cache, out, self.quiet, processes=1)
        self.pool = load_pool(self.recipe, "instruct", out, seed=0)
        self.disk["ours"] = _size(cache) + _size(out)

    def load(self) -> None:
        from huatuo_vision.inputs.plan import plan_steps
        from huatuo_vision.inputs.rows import PlannedRows

        phase = self.recipe.phases["instruct"]
        pool = self.pool
        plan = plan_steps(
            pool.tokens,
            pool.images,
            pool.targets,
            pool.tokens.astype(float),
            global_batch_size=BATCH,
            world_size=1,
            epochs=1,
            max_row_tokens=phase.max_row_tokens,
            max_row_images=phase.max_row_images,
            seed=0,
        )
        rows = PlannedRows(plan, pool, {"rows": self.source}, self.encoder)
        for index in range(len(rows)):
            self.row = rows[index]
        self.order = plan.row(len(rows) - 1)

    # ---- datasets.map and the processor ----

    def map(self) -> None:
        from datasets import Dataset, Image, List

        folder = self.folder / "mapped"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        rows = [
            {
                "messages": row["messages"],
                "images": [str(self.folder / "samples" / name) for name in row["images"]],
            }
            for row in self.rows
        ]
        pictures = Dataset.from_list(rows).cast_column("images", List(Image()))
        self.mapped = pictures.map(
            lambda batch: self._encode(batch),
            batched=True,
            batch_size=1,
            remove_columns=pictures.column_names,
            cache_file_name=str(folder / "rows.arrow"),
            writer_batch_size=64,
        ).with_format("torch")
        self.disk["datasets.map"] = _size(folder)

    def _encode(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        found = self.collator([{key: batch[key][0] for key in ("messages", "images")}])
        return {key: [found[key].numpy() if key == "pixel_values" else found[key][0].numpy()] for key in found}

    def load_mapped(self) -> None:
        import torch
        from torch.nn.utils.rnn import pad_sequence

        for start in range(0, self.count, BATCH):
            batch = self.mapped[start : start + BATCH]
            self.last = {
                "input_ids": pad_sequence(list(batch["input_ids"]), batch_first=True),
                "attention_mask": pad_sequence(list(batch["attention_mask"]), batch_first=True),
                "labels": pad_sequence(list(batch["labels"]), batch_first=True, padding_value=-100),
                "pixel_values": torch.cat(list(batch["pixel_values"])),
            }

    def collate(self) -> None:
        from PIL import Image

        for start in range(0, self.count, BATCH):
            rows = self.rows[start : start + BATCH]
            self.collator(
                [
                    {
                        "messages": row["messages"],
                        "images": [Image.open(self.folder / "samples" / name) for name in row["images"]],
                    }
                    for row in rows
                ]
            )

    def assert_equal(self) -> None:
        import numpy as np

        mapped = self.mapped.with_format("numpy")
        for position in range(self.count):
            ids, labels = mapped[position]["input_ids"], mapped[position]["labels"]
            assert len(ids) == self.pool.tokens[position], f"row {position} has other tokens"
            assert (labels[1:] != -100).sum() == self.pool.targets[position], f"row {position} has other targets"
        theirs = np.concatenate([mapped[int(position)]["pixel_values"] for position in self.order])
        assert np.array_equal(theirs, self.row["pixel_values"].numpy()), "pixels differ"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()

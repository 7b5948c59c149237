"""Stage image-filter: pictures large enough to read, then medical ones.

That a picture can be decoded in full was settled by ingest, which decodes each once and counts those that can't be.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from datatrove.pipeline.base import PipelineStep
from PIL import Image

from data.config import ImageFilter
from data.filters.classifier import Classifier, load_classifier
from data.filters.encoders import encoder_name, image_encoder
from data.steps import Pass, Rows, row_pass
from data.tables import Dropped, Pair, RunFolder, batched

STAGE, PREVIOUS = "image-filter", "text-filter"
VECTORS = f"{STAGE}.vectors"


def image_filter_passes(run: RunFolder, settings: ImageFilter, tasks: int) -> list[Pass]:
    """The vectors of the pictures that are large enough, and the filter itself; the first only for a classifier.

    So another threshold, or a classifier trained anew, costs no second look at the pictures.
    """
    if settings.classifier is None:
        record = {"min_side": settings.min_side, "classifier": None}
        return [row_pass(run, STAGE, PREVIOUS, tasks, (LargeEnough(run, settings.min_side),), record)]
    path = Path(settings.classifier)
    classifier = load_classifier(path, settings.encoder)
    if settings.threshold is not None:
        classifier = classifier.model_copy(update={"threshold": settings.threshold})
    name = encoder_name(settings.encoder)
    vectors = Pass(
        name=VECTORS,
        steps=(WriteVectors(run, settings),),
        tasks=tasks,
        settings={"encoder": name, "min_side": settings.min_side},
        folders=(f"vectors/{name}",),
    )
    record = {
        "min_side": settings.min_side,
        "encoder": name,
        "classifier": hashlib.sha256(path.read_bytes()).hexdigest(),
        "threshold": classifier.threshold,
        "validation": classifier.validation,
        "labels": classifier.labels,
    }
    steps = (LargeEnough(run, settings.min_side), Medical(run, name, classifier))
    return [vectors, row_pass(run, STAGE, PREVIOUS, tasks, steps, record)]


def short_sides(run: RunFolder, rank: int) -> dict[str, int]:
    table = run.image_columns(rank, ["id", "width", "height"])
    sides = np.minimum(table["width"].to_numpy(), table["height"].to_numpy())
    return dict(zip(table["id"].to_pylist(), sides.tolist(), strict=True))


class LargeEnough(PipelineStep):
    type, name = "filter", "resolution"

    def __init__(self, run: RunFolder, min_side: int):
        super().__init__()
        self.run_folder, self.min_side = run, min_side

    def run(self, data: Rows, rank: int = 0, world_size: int = 1) -> Rows:
        sides = short_sides(self.run_folder, rank)
        for row in data:
            if isinstance(row, Pair) and (smallest := min(sides[i] for i in row.image_ids)) < self.min_side:
                yield Dropped(row.id, "low_resolution", f"{smallest} pixels of at least {self.min_side}")
            else:
                yield row


class WriteVectors(PipelineStep):
    """The vectors of one rank's pictures."""

    type, name = "encoder", "images"

    def __init__(self, run: RunFolder, settings: ImageFilter):
        super().__init__()
        self.run_folder, self.settings = run, settings

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        encode = image_encoder(self.settings.encoder)
        ids, vectors = [], []
        with self.run_folder.images(rank) as images:
            for batch in batched(self._wanted(rank), self.settings.encoder.batch_size):
                pictures = [Image.open(io.BytesIO(images.get(image_id))).convert("RGB") for image_id in batch]
                vectors.append(encode(pictures).astype(np.float16))
                ids += batch
        shape = np.concatenate(vectors) if vectors else np.zeros((0, 1), np.float16)
        self.run_folder.write_vectors(encoder_name(self.settings.encoder), rank, ids, shape)

    def _wanted(self, rank: int) -> Iterator[str]:
        sides = short_sides(self.run_folder, rank)
        pairs = self.run_folder.pairs(PREVIOUS, rank)
        large = (p for p in pairs if all(sides[i] >= self.settings.min_side for i in p.image_ids))
        yield from dict.fromkeys(image_id for pair in large for image_id in pair.image_ids)


class Medical(PipelineStep):
    type, name = "filter", "medical"

    def __init__(self, run: RunFolder, encoder: str, classifier: Classifier):
        super().__init__()
        self.run_folder, self.encoder, self.classifier = run, encoder, classifier

    def run(self, data: Rows, rank: int = 0, world_size: int = 1) -> Rows:
        ids, vectors = self.run_folder.vectors(self.encoder, rank)
        found = self.classifier.probabilities(vectors) if ids else np.zeros(0)
        medical = dict(zip(ids, found.tolist(), strict=True))
        for row in data:
            if not isinstance(row, Pair):
                yield row
                continue
            # A figure is as medical as the least medical of its pictures.
            lowest = min(medical[image_id] for image_id in row.image_ids)
            if lowest < self.classifier.threshold:
                yield Dropped(row.id, "not_medical", f"{lowest:.3f} of at least {self.classifier.threshold}")
            else:
                yield replace(row, medical=lowest)

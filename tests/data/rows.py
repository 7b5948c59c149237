"""Rows and run folders made by hand, as the stages before would leave them."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from data.tables import IMAGE_SCHEMA, Pair, RunFolder, StoredImage, row_writer, stage_output


def stored(number: int, side: int = 48, format: str = "JPEG") -> StoredImage:
    """A picture unlike that of any other number."""
    image = Image.new("RGB", (side, side - 8), ((number * 37) % 256, (number * 91) % 256, number // 256))
    file = io.BytesIO()
    image.save(file, format)
    digest = hashlib.sha256(image.tobytes()).hexdigest()
    return StoredImage(
        digest, file.getvalue(), f"{digest}.{format.lower()}", *image.size, digest.encode()[:32], digest.encode()[:8]
    )


def pair(number: int, n_images: int = 1, **changed: object) -> Pair:
    values = {
        "id": f"PMC{number}.1-f1",
        "image_ids": tuple(stored(10 * number + k).id for k in range(n_images)),
        "caption": f"A radiograph of the chest, number {number}.",
        "context": (f"Figure 1 shows the chest of patient {number}.",),
        "sections": ("Results",),
        "label": "Figure 1",
        "article": f"PMC{number}.1",
        "title": "An article",
        "figure": "f1",
        "licence": "CC-BY-4.0",
        "source": "a journal",
    }
    return Pair(**values | changed)


def described(number: int, n_images: int = 1, **changed: object) -> Pair:
    values = {
        "method": "mllm_reformatted",
        "scenario": "standard_qa",
        "prompt_version": "mllm_reformatted-1",
        "model": "m",
        "state": "ok",
        "description": f"Description {number}.",
        "query": f"Question {number}?",
        "answer": f"Answer {number}.",
        "modality": "X-Ray",
        "body_part": "Chest",
    }
    return pair(number, n_images, **values | changed)


def complete_stage(folder: Path, stage: str, ranks: Sequence[Sequence[Pair]]) -> RunFolder:
    """A run folder in which `stage` (and ingest, with the pictures) is complete with these rows."""
    run = RunFolder(folder)
    for name in {"ingest", stage}:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        (folder / "logs" / f"{name}.json").write_text(json.dumps({"fingerprint": "0", "tasks": len(ranks)}))
        for rank, pairs in enumerate(ranks):
            with stage_output(run, name, rank, None) as output:
                for row in pairs:
                    output.write(row)
            completions = run.logging_dir(name) / "completions"
            completions.mkdir(exist_ok=True)
            (completions / f"{rank:05d}").touch()
    for rank, pairs in enumerate(ranks):
        with row_writer(run.images_file(rank), IMAGE_SCHEMA) as images:
            for row in pairs:
                number = int(row.article.removeprefix("PMC").removesuffix(".1"))
                for k in range(len(row.image_ids)):
                    picture = stored(10 * number + k)
                    images.write(picture.row(), len(picture.data))
    return run

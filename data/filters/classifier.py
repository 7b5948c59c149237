"""Medical picture or not: logistic regression on image vectors, trained from labelled rows and kept as JSON.

    python -m data.filters.classifier --rows labelled.jsonl --config data/pubmedvision.yaml --out classifier.json

A row is {"image": file relative to the rows' folder, "label": "medical" or anything else}; rows of one group (an
article, a patient) are never on both sides of the validation. The paper used 1K hand-labelled and 10K GPT-4V-labelled
images and a head on CLIP (appendix B); head, threshold and classes are not given, so they are choices made here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError
from rich.console import Console
from rich.progress import track

from data.config import ImageEncoder, load_config
from data.filters.encoders import encoder_name, image_encoder
from data.tables import batched, write_json
from huatuo_vision.cli import run_command
from huatuo_vision.inputs.images import load_image
from huatuo_vision.recipe import Strict
from huatuo_vision.schema import BadSample, ImageRef, UserError

MEDICAL = "medical"
_FOLDS = 5
# Of the inverse of the regularisation; inputs are standardised.
_C = 0.1


class Classifier(Strict):
    """Weights on an encoder's vectors, and how well they did on rows that they were not trained on."""

    version: Literal[1] = 1
    encoder: str
    weights: tuple[float, ...]
    bias: float
    threshold: float
    labels: dict[str, int]  # of the rows it was trained on
    rows_sha256: str
    validation: dict[str, Any]

    def probabilities(self, vectors: np.ndarray) -> np.ndarray:
        """Of being medical; `vectors` has shape (pictures, dimensions)."""
        scores = vectors.astype(np.float64) @ np.asarray(self.weights) + self.bias
        return 1 / (1 + np.exp(-np.clip(scores, -50, 50)))


def load_classifier(path: Path, encoder: ImageEncoder) -> Classifier:
    """Raises UserError for a missing file, another file, or one made with another encoder."""
    try:
        classifier = Classifier.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"image_filter.classifier: {path} does not exist; python -m data.filters.classifier trains one from "
            "labelled rows, and null leaves this filter out"
        ) from None
    except (OSError, ValidationError) as error:
        said = " ".join(str(error).split())[:160]
        raise UserError(f"image_filter.classifier: {path} is no classifier of ours ({said}); train it again") from None
    if classifier.encoder != encoder_name(encoder):
        raise UserError(
            f"image_filter.classifier: {path} was trained on vectors of {classifier.encoder}; the configuration's "
            f"encoder is {encoder_name(encoder)}, so train it again or change the encoder"
        )
    return classifier


def train(
    vectors: np.ndarray, labels: list[str], groups: list[str], encoder: str, threshold: float, rows_sha256: str
) -> Classifier:
    """Fit on all rows; the validation is on rows and groups held out, in five folds. Raises UserError for too few."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    wanted = np.array([label == MEDICAL for label in labels])
    of_each = [len({g for g, is_medical in zip(groups, wanted, strict=True) if is_medical == side}) for side in (1, 0)]
    if min(of_each) < _FOLDS:
        raise UserError(
            f"--rows has {of_each[0]} groups of rows labelled {MEDICAL!r} and {of_each[1]} of others; expected at "
            f"least {_FOLDS} of each, and hundreds for a filter to rely on"
        )
    model = make_pipeline(StandardScaler(), LogisticRegression(C=_C, class_weight="balanced", max_iter=2000))
    folds = StratifiedGroupKFold(_FOLDS, shuffle=True, random_state=0)
    held_out = cross_val_predict(model, vectors, wanted, groups=groups, cv=folds, method="predict_proba")[:, 1]
    model.fit(vectors, wanted)
    scaler, head = model[0], model[1]
    weights = head.coef_[0] / scaler.scale_
    validation = {"method": f"{_FOLDS} folds, groups kept together", "n": len(labels), "groups": len(set(groups))}
    validation |= {"auc": round(float(roc_auc_score(wanted, held_out)), 4)} | _scores(wanted, held_out, threshold)
    validation["at_thresholds"] = {f"{t / 10:.1f}": _scores(wanted, held_out, t / 10) for t in range(1, 10)}
    return Classifier(
        encoder=encoder,
        weights=tuple(float(w) for w in weights),
        bias=float(head.intercept_[0] - weights @ scaler.mean_),
        threshold=threshold,
        labels=dict(sorted(Counter(labels).items())),
        rows_sha256=rows_sha256,
        validation=validation,
    )


def _scores(wanted: np.ndarray, probabilities: np.ndarray, threshold: float) -> dict[str, float]:
    kept = probabilities >= threshold
    return {
        "accuracy": round(float((kept == wanted).mean()), 4),
        "medical_kept": round(float(kept[wanted].mean()), 4),
        "others_dropped": round(float((~kept)[~wanted].mean()), 4),
    }


def read_rows(path: Path, label: str, group: str) -> Iterator[tuple[Path, str, str]]:
    """Image file, label and group of each row. Raises UserError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--rows {path} can't be read ({' '.join(str(error).split())})") from None
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            yield path.parent / row["image"], str(row[label]), str(row.get(group) or row["image"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f'--rows {path}, line {number}: expected {{"image": file, "{label}": "{MEDICAL}" or another word}}'
            ) from None


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.filters.classifier",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=Path, required=True, metavar="JSONL")
    parser.add_argument("--config", type=Path, required=True, metavar="YAML", help="whose image_filter.encoder is used")
    parser.add_argument("--out", type=Path, required=True, metavar="JSON")
    parser.add_argument("--label", default="label", metavar="KEY", help="the key that holds a row's label")
    parser.add_argument("--group", default="group", metavar="KEY", help="the key of what must stay together")
    parser.add_argument("--threshold", type=float, default=0.5, help="keep pictures from this probability on")
    arguments = parser.parse_args()
    settings = load_config(arguments.config).image_filter.encoder
    encode = image_encoder(settings)
    rows = list(read_rows(arguments.rows, arguments.label, arguments.group))
    vectors = []
    console = Console(stderr=True)
    batches = list(batched(rows, settings.batch_size))
    for batch in track(batches, "encoding", console=console, transient=True, disable=not console.is_terminal):
        try:
            images = [load_image(ImageRef(path=str(file)), file.name).image for file, _, _ in batch]
        except BadSample as error:
            raise UserError(f"--rows {arguments.rows}: {error.explanation}") from None
        vectors.append(encode(images))
    digest = hashlib.sha256(arguments.rows.read_bytes()).hexdigest()
    labels, groups = [label for _, label, _ in rows], [group for _, _, group in rows]
    if not rows:
        raise UserError(f"--rows {arguments.rows} holds no row")
    classifier = train(np.concatenate(vectors), labels, groups, encoder_name(settings), arguments.threshold, digest)
    write_json(arguments.out, classifier.model_dump(mode="json"))
    found = classifier.validation
    print(
        f"{arguments.out}: {found['n']} rows in {found['groups']} groups, held out in {_FOLDS} folds: accuracy "
        f"{found['accuracy']:.1%}, medical kept {found['medical_kept']:.1%}, others dropped "
        f"{found['others_dropped']:.1%}, AUC {found['auc']:.3f} (encoder {classifier.encoder})"
    )


if __name__ == "__main__":
    run_command(main)

"""Pictures and captions as vectors of length 1: by the models that the paper used, or by small stand-ins of our own.

The stand-ins need no weights. They serve tests, demonstrations and machines without a network, and whatever they make
says so: `small` sees colours, brightness and edges and no content; `hashing` compares wording and no meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from data.config import CaptionEncoder, ImageEncoder
from huatuo_vision.schema import UserError

EncodeImages = Callable[[Sequence[Image.Image]], np.ndarray]
EncodeTexts = Callable[[Sequence[str]], np.ndarray]

_SIDE = 128  # pixels; the small encoder looks at pictures of this size
_HASHED = 512  # dimensions of hashed captions
_LOOK = 109  # and of looks


def encoder_name(settings: ImageEncoder | CaptionEncoder) -> str:
    """As reports and folders call it."""
    if settings.id is None:
        return f"{settings.kind}-v1"
    return "-".join([settings.kind, settings.id.strip("/").replace("/", "--"), *filter(None, [settings.revision])])


def image_encoder(settings: ImageEncoder) -> EncodeImages:
    """RGB pictures to float32 of shape (pictures, dimensions). Raises UserError for a model that can't be had."""
    return _encoder(settings)


def caption_encoder(settings: CaptionEncoder) -> EncodeTexts:
    """Texts to float32 of shape (texts, dimensions). Raises UserError for a model that can't be had."""
    return _encoder(settings)


@dataclass(frozen=True, slots=True)
class SharedEncoder:
    """Pictures and texts as vectors of one space, float32 of shape (n, dimensions)."""

    images: EncodeImages
    texts: EncodeTexts

    def fused(self, images: np.ndarray | None, text: np.ndarray | None, image_weight: float) -> np.ndarray:
        """One vector of length 1 for pictures and a text; either may be missing (UniIR's score fusion).

        The product of two of them is the weighted sum of how alike picture and picture, text and text, and each and
        the other are, divided by their lengths.
        """
        parts = [image_weight * images.mean(axis=0)] if images is not None and len(images) else []
        parts += [(1 - image_weight) * text] if text is not None else []
        return _unit(np.sum(parts, axis=0)[None])[0]


def shared_encoder(settings: ImageEncoder) -> SharedEncoder:
    """Raises UserError for a model that can't be had."""
    return _shared_encoder(settings)


@lru_cache(maxsize=1)
def _shared_encoder(settings: ImageEncoder) -> SharedEncoder:
    if settings.kind == "small":
        # Neither knows the other's: looks and words stand in coordinates of their own.
        look, hashed = image_encoder(settings), _load_caption_encoder(CaptionEncoder(kind="hashing"))
        return SharedEncoder(
            lambda images: np.pad(_contrasted(look(images)), ((0, 0), (0, _HASHED))),
            lambda texts: np.pad(hashed(texts), ((0, 0), (_LOOK, 0))),
        )
    import torch
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        processor = AutoImageProcessor.from_pretrained(settings.id, revision=settings.revision, backend="pil")
        tokenizer = AutoTokenizer.from_pretrained(settings.id, revision=settings.revision)
        model = CLIPModel.from_pretrained(settings.id, revision=settings.revision).eval().to(device)
    except (OSError, ValueError) as error:
        raise _unavailable("retrieve.encoder", settings.id, error) from None
    length = model.config.text_config.max_position_embeddings

    @torch.inference_mode()
    def images(pictures: Sequence[Image.Image]) -> np.ndarray:
        pixels = processor(images=list(pictures), return_tensors="pt")["pixel_values"].to(device)
        seen = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        return _unit(seen.float().cpu().numpy())

    @torch.inference_mode()
    def texts(said: Sequence[str]) -> np.ndarray:
        tokens = tokenizer(list(said), padding=True, truncation=True, max_length=length, return_tensors="pt")
        inputs = {name: tokens[name].to(device) for name in ("input_ids", "attention_mask")}
        read = model.text_projection(model.text_model(**inputs).pooler_output)
        return _unit(read.float().cpu().numpy())

    return SharedEncoder(images, texts)


# Loaded once a process and not once a task; one at a time, since a worker serves all stages.
@lru_cache(maxsize=1)
def _encoder(settings: ImageEncoder | CaptionEncoder) -> Callable[..., np.ndarray]:
    return _load_image_encoder(settings) if isinstance(settings, ImageEncoder) else _load_caption_encoder(settings)


def _load_image_encoder(settings: ImageEncoder) -> EncodeImages:
    if settings.kind == "small":
        return lambda images: _unit(np.stack([_look(image) for image in images]))
    import torch
    from transformers import AutoImageProcessor, CLIPVisionModelWithProjection

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # The PIL backend, as in training: resizing by another library gives other pixels.
        processor = AutoImageProcessor.from_pretrained(settings.id, revision=settings.revision, backend="pil")
        model = CLIPVisionModelWithProjection.from_pretrained(settings.id, revision=settings.revision)
    except (OSError, ValueError) as error:
        raise _unavailable("image_filter.encoder", settings.id, error) from None
    model = model.eval().to(device)

    @torch.inference_mode()
    def encode(images: Sequence[Image.Image]) -> np.ndarray:
        pixels = processor(images=list(images), return_tensors="pt")["pixel_values"].to(device)
        return _unit(model(pixel_values=pixels).image_embeds.float().cpu().numpy())

    return encode


def _load_caption_encoder(settings: CaptionEncoder) -> EncodeTexts:
    if settings.kind == "hashing":
        from sklearn.feature_extraction.text import HashingVectorizer

        vectorizer = HashingVectorizer(n_features=_HASHED, ngram_range=(1, 2), norm="l2", dtype=np.float32)
        return lambda texts: vectorizer.transform(texts).toarray()
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise UserError(
            "dedup.encoder: sentence-transformers is not installed; pip install sentence-transformers, or use "
            "{kind: hashing}, which compares wording only"
        ) from None
    try:
        model = SentenceTransformer(settings.id, revision=settings.revision)
    except (OSError, ValueError) as error:
        raise _unavailable("dedup.encoder", settings.id, error) from None
    options: dict[str, Any] = {"batch_size": settings.batch_size, "show_progress_bar": False}
    return lambda texts: model.encode(list(texts), normalize_embeddings=True, **options).astype(np.float32)


def _unavailable(key: str, id_: str | None, error: Exception) -> UserError:
    text = " ".join(str(error).split())[:200]
    return UserError(f"{key}: the model {id_} can't be loaded ({text}); download it first, or name a folder")


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _contrasted(looks: np.ndarray) -> np.ndarray:
    """Looks as they differ from an even one: all their numbers are positive, so any two are nearly parallel."""
    return _unit(looks - looks.mean(axis=1, keepdims=True))


def _look(image: Image.Image) -> np.ndarray:
    """109 numbers about a picture, each between 0 and 1: what tells photographs from drawings and plots."""
    small = image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    rgb = np.asarray(small)
    hue, saturation, value = np.moveaxis(np.asarray(small.convert("HSV")), -1, 0)
    grey = rgb.mean(axis=-1, dtype=np.float32) / 255
    down, right = np.gradient(grey)
    strength = np.hypot(down, right)
    direction = np.minimum((np.mod(np.arctan2(down, right), np.pi) * (4 / np.pi)).astype(int), 3)
    places = np.arange(_SIDE) // (_SIDE // 4)
    cell = places[:, None] * 4 + places[None, :]
    oriented = np.bincount((cell * 4 + direction).ravel(), strength.ravel(), 64)
    colours = rgb.astype(np.int32) >> 3
    n_colours = np.count_nonzero(np.bincount((colours @ np.array([1024, 32, 1])).ravel(), minlength=32768))
    numbers = [
        # Flat areas and pure white are drawn, noise is recorded.
        (strength < 1 / 255).mean(),
        n_colours / grey.size,
        (grey > 0.98).mean(),
        (grey < 0.04).mean(),
        (saturation < 13).mean(),
        (strength > 0.1).mean(),
        strength.mean(),
        np.abs(right).mean(axis=0).max(),  # the strongest vertical line
        np.abs(down).mean(axis=1).max(),
        grey.std(),
        saturation.mean() / 255,
        min(image.size) / max(image.size),
        grey[:8].mean(),  # the margins
    ]
    histograms = (
        np.bincount(np.minimum((grey * 12).astype(int), 11).ravel(), minlength=12),
        np.bincount((saturation >> 5).ravel(), minlength=8),
        np.bincount((hue.astype(int) * 12 >> 8).ravel(), (saturation / 255 * (value / 255)).ravel(), 12),
        oriented * 4,
    )
    return np.concatenate([numbers, *(histogram / grey.size for histogram in histograms)]).astype(np.float32)

"""The sizes of a recipe's model without its weights or the Hub: from the recipe, a folder, or the table beside this."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig, LlavaConfig, PreTrainedConfig

from huatuo_vision.model.compose import check_in_llm, config_from_values
from huatuo_vision.model.encoders import GridEncoder
from huatuo_vision.model.flops import ModelShape
from huatuo_vision.model.multi_encoder import MultiEncoderConfig, check_grids
from huatuo_vision.recipe import LanguageModelSpec, ModelSpec, VisionEncoderSpec, load_recipe
from huatuo_vision.schema import OutOfReach

TABLE = Path(__file__).with_name("backbones.yaml")


def known_shape(spec: ModelSpec) -> ModelShape:
    """Raises OutOfReach for a Hub id that the table lacks, and for a folder that is not there and no recipe makes."""
    return ModelShape.from_config(_known_config(spec))


def _known_config(spec: ModelSpec) -> LlavaConfig | MultiEncoderConfig:
    llava = spec.llava
    if llava is not None and llava.path is not None:
        if (Path(llava.path) / "config.json").is_file():
            return AutoConfig.from_pretrained(llava.path)
        if llava.made_by is None:
            raise OutOfReach(f"model.llava.path {llava.path} is not there; name the recipe that makes it as made_by")
        return _known_config(load_recipe(llava.made_by).model)
    if llava is not None:
        parts = _entry("llava", llava.id)
        return _known_config(ModelSpec.model_validate({key: {"id": id_} for key, id_ in parts.items()}))
    text = _part(spec.language_model, "language_model")
    if spec.vision_encoders is not None:
        grids = [
            GridEncoder.of(e.name, _part(e, "vision_encoder"), e.image_size, e.feature_layer, e.side)
            for e in spec.vision_encoders
        ]
        check_grids(grids, spec.sva.side if spec.sva else None)
        check_in_llm(spec, text)
        return MultiEncoderConfig(
            text_config=text,
            encoders=[grid.to_dict() for grid in grids],
            sva=spec.sva.model_dump(mode="json") if spec.sva else None,
            tie_word_embeddings=text.tie_word_embeddings,
        )
    return LlavaConfig(
        vision_config=_part(spec.vision_encoder, "vision_encoder"),
        text_config=text,
        vision_feature_layer=spec.feature_layer,
        vision_feature_select_strategy=spec.feature_strategy,
        tie_word_embeddings=text.tie_word_embeddings,
    )


def _part(spec: VisionEncoderSpec | LanguageModelSpec, key: str) -> PreTrainedConfig:
    if spec.config is not None:
        return config_from_values(spec.config, key)
    if spec.id is not None:
        return config_from_values(_entry(f"{key}s", spec.id), key)
    if not (Path(spec.path) / "config.json").is_file():
        if spec.path in _table()[f"{key}s"]:
            return config_from_values(_entry(f"{key}s", spec.path), key)
        raise OutOfReach(f"model.{key}.path {spec.path} holds no config.json")
    config = AutoConfig.from_pretrained(spec.path)
    return getattr(config, "vision_config", config) if key == "vision_encoder" else config


def _entry(section: str, id_: str) -> dict[str, Any]:
    known = _table()[section]
    if id_ not in known:
        raise OutOfReach(f"{id_} is not among the known backbones; add the sizes in its config.json to {TABLE}")
    return known[id_]


@lru_cache
def _table() -> dict[str, dict[str, dict[str, Any]]]:
    return yaml.safe_load(TABLE.read_text(encoding="utf-8"))

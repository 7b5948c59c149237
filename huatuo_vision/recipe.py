"""A recipe: one YAML file that says everything about one result, both phases inside.

`load_recipe` reads the file, merges its one `base`, applies `--set` overrides, refuses what it does
not know with the nearest valid name, and returns a frozen `Recipe`. `python -m huatuo_vision.recipe
--schema` prints the JSON schema for editors.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PlainSerializer,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from huatuo_vision.redaction import redact
from huatuo_vision.run_record import write_text
from huatuo_vision.schema import UserError

PHASE_NAMES = ("text", "align", "instruct", "anneal")
# Names become folders and file names.
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
PUBMEDVISION_CONFIGS = ("alignment", "instruction", "captions", "chinese")
# The phantoms' pictures as four data-construction methods describe them (data/phantom/descriptions.py).
PHANTOM_DESCRIPTIONS = ("native_caption", "llm_reformatted", "mllm_distill", "mllm_reformatted")
PHANTOM_CONFIGS = ("alignment", "instruction", *PHANTOM_DESCRIPTIONS)
PARTS = ("vision_encoder", "projector", "language_model")

# Keys that do not change what is learnt: they may differ between a run and its continuation.
OPERATIONAL_KEYS = frozenset(
    {"name", "base", "ablates", "reproduces", "launch", "hub", "report_to", "reuse", "workers"}
)
# Nor does what is said of a source's or a checkpoint's origin, for planning before it is there.
OPERATIONAL_SOURCE_KEYS = frozenset({"expected_rows"})
OPERATIONAL_LLAVA_KEYS = frozenset({"made_by"})
OPERATIONAL_PHASE_KEYS = frozenset(
    {
        "max_row_tokens",
        "max_row_images",
        "recompute",
        "compile",
        "attention",
        "log_every",
        "save_every",
        "keep_checkpoints",
    }
)


def refuse(message: str) -> PydanticCustomError:
    return PydanticCustomError("recipe", "{message}", {"message": message})


class Strict(BaseModel):
    """Frozen, and refuses unknown keys with the nearest valid name."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            for key in values:
                if key not in cls.model_fields:
                    near = difflib.get_close_matches(str(key), cls.model_fields, n=1)
                    hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(cls.model_fields)}"
                    raise refuse(f"unknown key {key!r}; {hint}")
        return values


def _exactly_one(model: Strict, *keys: str) -> None:
    given = [key for key in keys if getattr(model, key) is not None]
    if len(given) != 1:
        got = " and ".join(given) if given else "none of them"
        raise refuse(f"give exactly one of {', '.join(keys)}; got {got}")


class Pretrained(Strict):
    """Weights on the Hub (`id` and `revision`) or in a local folder (`path`)."""

    id: str | None = None
    revision: str | None = None
    path: str | None = None

    @model_validator(mode="after")
    def _check_revision(self) -> Pretrained:
        if self.revision is not None and self.id is None:
            raise refuse("revision is of a Hub id; remove it, or give id")
        return self

    @property
    def location(self) -> str | None:
        return self.id or self.path


class VisionEncoderSpec(Pretrained):
    """A CLIP or SigLIP encoder; `config` (with `model_type`) starts from random weights."""

    config: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check(self) -> VisionEncoderSpec:
        _exactly_one(self, "id", "path", "config")
        return self


class NamedEncoderSpec(VisionEncoderSpec):
    """One of several vision encoders: CLIP, SigLIP, DINOv2 or ConvNeXt."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    image_size: PositiveInt | None = Field(
        None, description="pixels on a side, where the encoder can read other sizes than its own (DINOv2, ConvNeXt)"
    )
    feature_layer: int | None = Field(
        None, description="hidden state that is handed on, counted as in model.feature_layer; absent: the last output"
    )
    side: PositiveInt | None = Field(
        None, description="features on a side that are handed on, resized bilinearly; absent: the encoder's own"
    )


class SvaSpec(Strict):
    """The Spatial Vision Aggregator of Cambrian-1 (arXiv:2406.16860); the defaults are its 8B release's."""

    side: PositiveInt = Field(24, description="queries on a side; it divides every encoder's side")
    depth: PositiveInt = 3
    groups: PositiveInt = 1
    width: PositiveInt = 1024
    heads: PositiveInt = 16
    newline: bool = Field(True, description="a learned vector ends each row of the image's features")
    in_llm: tuple[NonNegativeInt, ...] = Field(
        (), description="decoder layers after which the image's positions look through their windows again"
    )

    @model_validator(mode="after")
    def _check(self) -> SvaSpec:
        if self.width % self.heads:
            raise refuse(f"width {self.width} is not divisible by {self.heads} heads; change one of them")
        if list(self.in_llm) != sorted(set(self.in_llm)):
            raise refuse(f"in_llm {list(self.in_llm)} must rise, each layer once")
        return self


class TokenizerSpec(Pretrained):
    """An existing tokenizer, or one trained on all texts under the recipe's `data`, used by a phase or not
    (`vocab_size`): recipes that list the same data have the same tokens whatever their phases use of it."""

    vocab_size: PositiveInt | None = None

    @model_validator(mode="after")
    def _check(self) -> TokenizerSpec:
        _exactly_one(self, "id", "path", "vocab_size")
        return self


class LanguageModelSpec(Pretrained):
    """A Llama, Qwen2, Qwen3, Mistral or Yi causal LM; `config` starts from random weights and needs `tokenizer`."""

    config: dict[str, Any] | None = None
    tokenizer: TokenizerSpec | None = None

    @model_validator(mode="after")
    def _check(self) -> LanguageModelSpec:
        _exactly_one(self, "id", "path", "config")
        if self.config is not None and self.tokenizer is None:
            raise refuse(
                "a language_model from a config has no tokenizer; add tokenizer: {id: ...} or {vocab_size: ...}"
            )
        if self.config is None and self.tokenizer is not None:
            raise refuse("tokenizer goes with config only; a language_model with id or path brings its own")
        return self


def _feature_layer(value: Any) -> Any:
    if value == 0:
        raise refuse(
            "0 is the patch embedding, before any layer; count layers from 1, or from the end with -1, -2, ..."
        )
    return value


class LlavaSpec(Pretrained):
    """A whole LLaVA checkpoint in transformers' format to start from, its projector trained already."""

    made_by: str | None = Field(None, description="the recipe whose run makes `path`; plans read its sizes from there")

    @model_validator(mode="after")
    def _check(self) -> LlavaSpec:
        _exactly_one(self, "id", "path")
        return self


class ModelSpec(Strict):
    """An encoder and a language model to compose, with a fresh projector; or a LLaVA checkpoint to go on from.

    Several `vision_encoders` in place of one make another model than LLaVA (`model.multi_encoder`)."""

    vision_encoder: VisionEncoderSpec | None = None
    vision_encoders: tuple[NamedEncoderSpec, ...] | None = Field(None, min_length=1)
    language_model: LanguageModelSpec | None = None
    llava: LlavaSpec | None = None
    projector: Literal["mlp2x_gelu", "sva"] = "mlp2x_gelu"
    sva: SvaSpec | None = None
    feature_layer: Annotated[int, BeforeValidator(_feature_layer)] = -2
    feature_strategy: Literal["default", "full"] = Field(
        "default",
        description="default drops the class token (CLIP); full keeps every token (SigLIP has no class token)",
    )
    chat_template: Literal["huatuo", "vicuna", "llama3", "chatml", "mistral"] = "huatuo"

    @model_validator(mode="after")
    def _check(self) -> ModelSpec:
        if self.llava is not None:
            own = [key for key in _CHECKPOINTS_OWN if key in self.model_fields_set and getattr(self, key) is not None]
            if own:
                raise refuse(f"{', '.join(own)} come with the llava checkpoint; remove them, or remove llava")
            return self
        if self.vision_encoders is not None:
            return self._check_several()
        absent = [part for part in ("vision_encoder", "language_model") if getattr(self, part) is None]
        if absent:
            raise refuse(f"{' and '.join(absent)} missing; give vision_encoder and language_model, or llava alone")
        if self.projector == "sva" or self.sva is not None:
            raise refuse(
                "projector sva aggregates a list of encoders; give vision_encoders, a list, for vision_encoder"
            )
        return self

    def _check_several(self) -> ModelSpec:
        if self.vision_encoder is not None:
            raise refuse("give vision_encoder or vision_encoders, not both")
        if self.language_model is None:
            raise refuse("language_model missing; give it beside vision_encoders")
        names = [encoder.name for encoder in self.vision_encoders]
        if len(set(names)) < len(names):
            raise refuse(f"vision_encoders has a name twice: {', '.join(names)}; each encoder needs its own")
        alone = sorted({"feature_layer", "feature_strategy"} & self.model_fields_set)
        if alone:
            raise refuse(f"{', '.join(alone)} go with one vision_encoder; of several, each has its own feature_layer")
        if (self.projector == "sva") != (self.sva is not None):
            raise refuse("projector: sva and the key sva (its sizes) go together; give both, or neither")
        return self

    @model_serializer(mode="wrap")
    def _only_what_counts(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what a checkpoint decides, and without what only several encoders have where there is one."""
        left_out = set(_CHECKPOINTS_OWN) if self.llava else set()
        if self.vision_encoders is None:
            left_out |= {"vision_encoders", "sva"}
        else:
            left_out |= {"vision_encoder", "feature_layer", "feature_strategy"}
        return {k: v for k, v in serialize(self).items() if k not in left_out}

    @property
    def pretrained(self) -> dict[str, Pretrained]:
        """What the first weights come from, by the key that names it."""
        if self.vision_encoders is not None:
            return {e.name: e for e in self.vision_encoders} | {"language_model": self.language_model}
        keys = ("llava",) if self.llava else ("vision_encoder", "language_model")
        return {key: getattr(self, key) for key in keys}

    @property
    def trains_tokenizer(self) -> bool:
        tokenizer = self.language_model.tokenizer if self.language_model else None
        return tokenizer is not None and tokenizer.vocab_size is not None


# What a LLaVA checkpoint decides itself.
_CHECKPOINTS_OWN = (
    "vision_encoder",
    "vision_encoders",
    "language_model",
    "projector",
    "sva",
    "feature_layer",
    "feature_strategy",
)


class Columns(Strict):
    """Which columns of a row hold what."""

    id: str | Literal[False] = Field("id", description="false: rows have no id, and are called by their place")
    image: str = "image"
    caption: str = "caption"
    context: str | None = Field(None, description="column of in-text mentions, added to the caption in the answer")
    question: str = "question"
    answer: str = "answer"
    options: tuple[str, ...] = Field((), description="columns of the options A, B, ...; the answer is then a letter")
    messages: str = Field("messages", description="column of turns: role and content, or from and value (ShareGPT)")


# Adapter -> the columns that its rows can name otherwise; other data sets lay their rows out one way.
_COLUMNS = {
    "captions": {"id", "image", "caption", "context"},
    "vqa": {"id", "image", "question", "answer", "options"},
    "messages": {"id", "messages"},
}


class SourceSpec(Strict):
    """One data source: an adapter, and where its rows are."""

    adapter: Literal["pubmedvision", "llava", "llava_med", "captions", "vqa", "messages", "phantom"]
    path: str | None = Field(None, description="a JSON, JSON Lines, Parquet or CSV file, or a folder that holds one")
    image_root: str | None = Field(None, description="folder (or folder of zips) that image names are relative to")
    hub_id: str | None = None
    revision: str | None = None
    split: str = "train"
    config: Literal[PUBMEDVISION_CONFIGS + PHANTOM_DESCRIPTIONS] | None = Field(
        None,
        description="which of the set's files; pubmedvision: alignment, instruction, captions or chinese; phantom: "
        "alignment, instruction or one of the four descriptions",
    )
    conversations: Literal["alignment", "instruction"] | None = Field(
        None, description="which conversation column of a Chinese PubMedVision row"
    )
    columns: Columns = Columns()
    expected_rows: PositiveInt | None = Field(
        None, description="the published number of rows: plans without the data count on it, another number is said"
    )
    language: Literal["en", "zh"] = Field("en", description="language of the description requests paired with captions")
    train: PositiveInt | None = Field(None, description="phantom: training records to make")
    test: int | None = Field(None, ge=0, description="phantom: test questions to make")
    seed: int | None = Field(None, ge=0, description="phantom: seed of the pictures")

    @model_validator(mode="after")
    def _check(self) -> SourceSpec:
        defaults = Columns()
        named = {key for key in Columns.model_fields if getattr(self.columns, key) != getattr(defaults, key)}
        foreign = sorted(named - _COLUMNS.get(self.adapter, set()))
        if foreign:
            usable = ", ".join(sorted(_COLUMNS.get(self.adapter, ()))) or "none"
            raise refuse(f"adapter {self.adapter} reads no columns {', '.join(foreign)}; it takes: {usable}")
        phantom_keys = [key for key in ("train", "test", "seed") if getattr(self, key) is not None]
        if self.adapter == "phantom":
            if self.path or self.hub_id or self.image_root:
                raise refuse("adapter phantom makes its own data; remove path, hub_id and image_root")
            if self.train is None:
                raise refuse("adapter phantom needs train (how many records to make)")
            if self.config not in PHANTOM_CONFIGS:
                raise refuse(f"adapter phantom needs config: {', '.join(PHANTOM_CONFIGS)}")
            return self
        _exactly_one(self, "path", "hub_id")
        if phantom_keys:
            raise refuse(f"{', '.join(phantom_keys)} belong to adapter phantom; remove them or change the adapter")
        if self.adapter == "pubmedvision":
            if self.config not in PUBMEDVISION_CONFIGS:
                raise refuse(f"adapter pubmedvision needs config: {', '.join(PUBMEDVISION_CONFIGS)}")
            if (self.config == "chinese") != (self.conversations is not None):
                raise refuse("conversations (alignment or instruction) goes with config: chinese, and only with it")
        elif self.config is not None or self.conversations is not None:
            raise refuse(f"config and conversations belong to adapter pubmedvision; adapter {self.adapter} has neither")
        return self


class MixtureEntry(Strict):
    """A share of a phase's data: exact `rows`, or a relative `weight`, or neither (all rows)."""

    source: str
    rows: PositiveInt | None = None
    weight: PositiveFloat | None = None

    @model_validator(mode="after")
    def _check(self) -> MixtureEntry:
        if self.rows is not None and self.weight is not None:
            raise refuse("give rows or weight, not both")
        return self


class LoraSpec(Strict):
    r: PositiveInt = 16
    alpha: PositiveFloat = 32
    dropout: float = Field(0.0, ge=0, lt=1)
    quantize: Literal["nf4"] | None = Field(None, description="nf4: QLoRA, the frozen language model in 4 bits")


def _false_is_frozen(value: Any) -> Any:
    if value is False:
        return None
    if value is True:
        raise refuse("true does not say how to train this part; write {lr: ...}")
    return value


class PartTraining(Strict):
    lr: PositiveFloat


class ProjectorTraining(PartTraining):
    sva_lr: PositiveFloat | None = Field(
        None, description="of the aggregator's queries and blocks, in the language model too; absent: lr"
    )

    @model_serializer(mode="wrap")
    def _only_what_is_given(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in serialize(self).items() if value is not None}


class LanguageModelTraining(PartTraining):
    lora: LoraSpec | None = None


FalseIfFrozen = (BeforeValidator(_false_is_frozen), PlainSerializer(lambda part: part if part is not None else False))


class TrainSpec(Strict):
    """Which parts train, each with its own peak learning rate; false is frozen."""

    vision_encoder: Annotated[PartTraining | None, *FalseIfFrozen] = None
    projector: Annotated[ProjectorTraining | None, *FalseIfFrozen] = None
    language_model: Annotated[LanguageModelTraining | None, *FalseIfFrozen] = None

    @model_validator(mode="after")
    def _check(self) -> TrainSpec:
        if not any(getattr(self, part) for part in PARTS):
            raise refuse("every part is frozen; give at least one of vision_encoder, projector, language_model an lr")
        if self.lora and not self.projector:
            raise refuse("lora trains the projector in full beside the adapter; set projector: {lr: ...}")
        if self.lora and self.vision_encoder:
            raise refuse(
                "lora saves adapter and projector only, so the vision_encoder must stay frozen; set it to false"
            )
        return self

    @property
    def lora(self) -> LoraSpec | None:
        return self.language_model.lora if self.language_model else None

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(part for part in PARTS if getattr(self, part))


class OptimizerSpec(Strict):
    name: Literal["adamw", "adamw_8bit"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0


class ScheduleSpec(Strict):
    name: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = Field(0.03, ge=0, lt=1)


def _recompute(value: Any) -> Any:
    if value in ("none", "all") or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise refuse(f"got {value!r}; expected none, all, or a number n (recompute every n-th layer)")


class PhaseSpec(Strict):
    data: tuple[MixtureEntry, ...] = Field(min_length=1)
    train: TrainSpec
    global_batch_size: PositiveInt
    epochs: PositiveInt = 1
    max_sample_tokens: PositiveInt = 4096
    max_row_tokens: PositiveInt = 8192
    max_row_images: PositiveInt = 12
    optimizer: OptimizerSpec = OptimizerSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    precision: Literal["bf16", "fp32"] = "bf16"
    recompute: Annotated[Literal["none", "all"] | int, BeforeValidator(_recompute)] = "none"
    compile: bool = Field(
        False,
        description="torch.compile each decoder layer: on a GPU from 1.5B a fifth to two fifths faster, after up to a "
        "minute at the start",
    )
    attention: Literal["auto", "varlen", "flash_attention_2", "flash_attention_3", "sdpa"] = Field(
        "auto", description="auto: torch's varlen kernel on CUDA, SDPA per sample elsewhere"
    )
    log_every: PositiveInt = 10
    save_every: PositiveInt = 500
    keep_checkpoints: PositiveInt = 2

    @model_validator(mode="after")
    def _check(self) -> PhaseSpec:
        if self.max_sample_tokens > self.max_row_tokens:
            raise refuse(
                f"max_sample_tokens {self.max_sample_tokens} is above max_row_tokens {self.max_row_tokens}, so a long "
                "sample would fit no row; raise max_row_tokens or lower max_sample_tokens"
            )
        kinds = {"weight" if entry.weight is not None else "rows" for entry in self.data}
        if len(kinds) > 1:
            raise refuse("either every data entry has a weight or none has; a weight beside rows says nothing")
        names = [entry.source for entry in self.data]
        if len(set(names)) < len(names):
            raise refuse("a source stands twice in data; give each source one entry")
        return self


class HubSpec(Strict):
    repo_id: str | None = None
    private: bool = True
    license: str | None = Field(None, description="the Hub's licence identifier for the pushed weights, for the card")
    push: Literal["never", "final", "phases"] = Field("never", description="phases: each phase to its revision too")

    @model_validator(mode="after")
    def _check(self) -> HubSpec:
        if self.push != "never" and (self.repo_id is None or self.license is None):
            raise refuse(f"push: {self.push} needs a repo_id and a license (of the weights, for the model card)")
        if self.repo_id is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.repo_id):
            raise refuse(f"repo_id {self.repo_id!r} is no repository on the Hub; expected ORG/NAME")
        return self


class LaunchSpec(Strict):
    """What the recipe is made for: plans are drawn up for it, and its command is written with it."""

    config: Literal["single", "ddp", "fsdp2", "zero2", "zero3", "cpu"] = Field(
        description="a file of recipes/accelerate/, without .yaml"
    )
    processes: PositiveInt = Field(1, description="one a GPU")
    gpu_gb: PositiveInt | None = Field(None, description="memory of one GPU, as it is sold: 24, 80")

    @model_validator(mode="after")
    def _check(self) -> LaunchSpec:
        if self.config == "single" and self.processes > 1:
            raise refuse(f"config single is one process, and processes is {self.processes}; take ddp, or 1")
        return self

    @property
    def sharding(self) -> Literal["ddp", "zero2", "fsdp"]:
        """How weights and optimizer state are spread; ZeRO-3 spreads them as FSDP does."""
        return {"zero2": "zero2", "zero3": "fsdp", "fsdp2": "fsdp"}.get(self.config, "ddp")


class Reproduces(Strict):
    paper: str
    table: int | str
    row: str
    targets: dict[str, float]


class Recipe(Strict):
    name: str = Field(pattern=NAME)
    base: str | None = None
    ablates: tuple[str, ...] = ()
    reproduces: Reproduces | None = None
    model: ModelSpec
    data: dict[Annotated[str, Field(pattern=NAME)], SourceSpec] = Field(min_length=1)
    phases: dict[Literal["text", "align", "instruct", "anneal"], PhaseSpec] = Field(min_length=1)
    on_bad_sample: Literal["stop", "drop"] = Field(
        "stop", description="drop: count it in prepare/report.json and go on"
    )
    launch: LaunchSpec | None = None
    seed: int = Field(0, ge=0)
    workers: int = Field(4, ge=0, description="image-decoding processes per training process; 0 decodes in line")
    hub: HubSpec = HubSpec()
    report_to: tuple[Literal["wandb", "trackio"], ...] = ()
    reuse: str | None = Field(
        None, description="another run's folder; its finished phases are taken over where this recipe trains the same"
    )

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        for name, phase in self.phases.items():
            for entry in phase.data:
                if entry.source not in self.data:
                    raise refuse(
                        f"phases.{name}.data names the source {entry.source!r}; data has: {', '.join(self.data)}"
                    )
            projector = phase.train.projector
            if projector and projector.sva_lr and self.model.sva is None and self.model.llava is None:
                raise refuse(
                    f"phases.{name}.train.projector.sva_lr is for projector: sva, which the model lacks; remove it"
                )
        return self

    def resolved(self) -> dict[str, Any]:
        """The recipe as plain values, every default written out; loading it again gives the same recipe."""
        return self.model_dump(mode="json", exclude_none=True) | {"base": None, "ablates": []}

    def learning_keys(self, through_phase: str | None = None) -> dict[str, Any]:
        """Dotted key -> value for all that decides what is learnt, up to and including a phase."""
        values = {k: v for k, v in self.model_dump(mode="json").items() if k not in OPERATIONAL_KEYS}
        phases = values["phases"]
        if through_phase is not None:
            names = list(phases)
            phases = {name: phases[name] for name in names[: names.index(through_phase) + 1]}
        used = {entry["source"] for phase in phases.values() for entry in phase["data"]}
        if self.model.trains_tokenizer:
            used = set(self.data)  # its tokens come from all of them
        values["data"] = {
            name: {k: v for k, v in spec.items() if k not in OPERATIONAL_SOURCE_KEYS}
            for name, spec in values["data"].items()
            if name in used
        }
        if self.model.llava:
            llava = values["model"]["llava"]
            values["model"]["llava"] = {k: v for k, v in llava.items() if k not in OPERATIONAL_LLAVA_KEYS}
        values["phases"] = {
            name: {k: v for k, v in phase.items() if k not in OPERATIONAL_PHASE_KEYS} for name, phase in phases.items()
        }
        return dict(_flatten(values))

    def fingerprint(self, through_phase: str | None = None) -> str:
        """16 hex digits over `learning_keys`: equal fingerprints learn the same thing from the same data."""
        canonical = json.dumps(self.learning_keys(through_phase), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, its base merged and `key=value` overrides applied.

    Raises UserError in one sentence for anything the file gets wrong, and when an ablation differs
    from its base in a key that its `ablates` list does not name.
    """
    path = Path(path)
    values = read_yaml(path)
    base_values = None
    if values.get("base") is not None:
        base_path = path.parent / str(values["base"])
        base_values = read_yaml(base_path)
        if base_values.get("base") is not None:
            raise UserError(f"{path}: base {values['base']} has a base of its own; inheritance is one level deep")
        # The row of a paper that the base stands for is not the ablation's.
        values = _merge({key: value for key, value in base_values.items() if key != "reproduces"}, values)
    for override in overrides:
        _apply_override(values, override)
    recipe = _validate(values, path)
    if base_values is not None and not overrides:
        _check_ablation(recipe, _validate(base_values, base_path), path)
    return recipe


def save_recipe(recipe: Recipe, path: Path) -> None:
    write_text(path, yaml.safe_dump(recipe.resolved(), sort_keys=False, allow_unicode=True))


def differing_keys(a: Recipe, b: Recipe, through_phase: str | None = None) -> list[str]:
    """The dotted keys in which two recipes would learn differently."""
    left, right = a.learning_keys(through_phase), b.learning_keys(through_phase)
    return sorted(key for key in left.keys() | right.keys() if left.get(key) != right.get(key))


def read_yaml(path: Path, kind: str = "recipe", keys: str = "name, model, data, phases") -> dict[str, Any]:
    """The mapping in a YAML file; `kind` and `keys` say in an error what was expected."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{kind} {path} does not exist; recipes/ holds the shipped ones") from None
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(f"{kind} {path} is not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{kind} {path} is empty or not a mapping; expected keys such as {keys}")
    return values


def _merge(base: Any, change: Any) -> Any:
    """`change` over `base`, as RFC 7396 merges: mappings key by key, null takes a key away, the rest is replaced."""
    if isinstance(base, dict) and isinstance(change, dict):
        merged = base | {key: _merge(base.get(key), value) for key, value in change.items()}
        return {key: value for key, value in merged.items() if value is not None}
    return change


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"--set {override!r}: expected key=value, for example --set phases.align.epochs=2")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set {override!r}: the value is not YAML") from None
    *parents, last = key.split(".")
    node: Any = values
    for depth, name in enumerate([*parents, last]):
        if isinstance(node, list) and name.isdigit() and int(name) < len(node):
            name = int(name)
        elif not isinstance(node, dict):
            raise UserError(f"--set {override!r}: {'.'.join(key.split('.')[:depth])} has no key {name!r}")
        if depth == len(parents):
            node[name] = value
        elif isinstance(node, dict):
            # A missing mapping is made, so that a default section can be overridden; a misspelt one is refused below.
            node[name] = dict(node[name]) if isinstance(node.get(name), dict) else node.get(name) or {}
            node = node[name]
        else:
            node = node[name]


def _validate(values: dict[str, Any], path: Path) -> Recipe:
    for key, value in _flatten(values):
        if redact(text := str(value)) != text:  # the recipe is copied into the run and its models
            raise UserError(
                f"recipe {path}: {key} holds a key or a password; take it out, and log in (hf auth login) or set "
                "it in the environment (HF_TOKEN, WANDB_API_KEY)"
            )
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"recipe {path}: {first_sentence(error)}") from None


def first_sentence(error: ValidationError) -> str:
    """What is wrong, with the key, in one sentence."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"] if part != "[key]")
    if first["type"] == "recipe":
        text = first["msg"]
    elif first["type"] == "missing":
        text = "is missing and has no default; add it"
    elif "[key]" in first["loc"] and first["loc"][0] == "phases":
        near = difflib.get_close_matches(where.rsplit(".", 1)[-1], PHASE_NAMES, n=1)
        text = f"unknown phase; expected one of {', '.join(PHASE_NAMES)}" + (
            f", did you mean {near[0]!r}?" if near else ""
        )
    else:
        got = first["input"]
        text = f"got {got!r} ({type(got).__name__}); {first['msg'][0].lower()}{first['msg'][1:]}"
    more = error.error_count() - 1
    return (f"{where}: " if where else "") + text + (f" (and {more} more)" if more else "")


def _check_ablation(recipe: Recipe, base: Recipe, path: Path) -> None:
    left, right = dict(_flatten(recipe.model_dump(mode="json"))), dict(_flatten(base.model_dump(mode="json")))
    free = ("name", "base", "ablates", "reproduces", "hub", "reuse", *recipe.ablates)
    undeclared = sorted(
        key
        for key in left.keys() | right.keys()
        if left.get(key) != right.get(key) and not any(key == name or key.startswith(name + ".") for name in free)
    )
    if undeclared:
        raise UserError(
            f"recipe {path} differs from its base in {', '.join(undeclared)}, which ablates does not name; "
            "add the key to ablates or take the base's value"
        )


def _flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, values


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m huatuo_vision.recipe", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--schema", action="store_true", required=True, help="print the JSON schema of a recipe")
    parser.parse_args()
    json.dump(Recipe.model_json_schema(), sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()

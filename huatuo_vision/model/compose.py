"""Composes a model from one or several vision encoders, a fresh projector and a language model, or takes a whole one
over. With one encoder it is a LLaVA.

`compose_processor` writes everything but the weights, from configs and tokenizers alone, so a dry run
downloads no weights; `compose_weights` adds them. The result is a model folder (`model.folder`).
"""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    GenerationConfig,
    LlavaConfig,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging
from transformers.utils.chat_template_utils import render_jinja_template

from huatuo_vision.model.encoders import ENCODERS, LLAVA_ENCODERS, EncoderFamily, GridEncoder
from huatuo_vision.model.folder import (
    check_loaded,
    damaged_weights,
    load_model,
    module_name,
    replacing,
    save_model_folder,
    write_config,
)
from huatuo_vision.model.multi_encoder import MultiEncoderConfig, check_grids, projector
from huatuo_vision.model.processor import (
    finished_tokenizer,
    llava_image_processor,
    named_tokens,
    one_line,
    read_tokenizer,
    rows_needed,
    with_image_token,
    write_processor,
)
from huatuo_vision.model.sva import start_vectors
from huatuo_vision.multi_encoder_processor import MultiEncoderImageProcessor, MultiEncoderProcessor
from huatuo_vision.recipe import (
    LanguageModelSpec,
    LlavaSpec,
    ModelSpec,
    NamedEncoderSpec,
    Pretrained,
    TokenizerSpec,
    VisionEncoderSpec,
)
from huatuo_vision.schema import IMAGE_PLACEHOLDER, OutOfReach, UserError

CHAT_TEMPLATES = Path(__file__).parent / "chat_templates"


# Model type -> class; Yi is a llama. Engines pick their language model by the class name in text_config.
_LANGUAGE_MODELS = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
}

# Tokens a template's markers must be; the last one ends the assistant's turn. The others write plain text and EOS.
_MARKERS = {
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
}

# What the other half of a CLIP or SigLIP checkpoint is called; LLaVA has no use for it.
TEXT_TOWER = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")

_EOS, _PAD = "<|endoftext|>", "<|pad|>"


def compose_processor(
    spec: ModelSpec, folder: Path, texts: Iterator[str] | None = None
) -> LlavaConfig | MultiEncoderConfig:
    """Writes config, generation config, tokenizer, image processor and chat template; no weights are read.

    `texts` are what a tokenizer is trained on, where the recipe asks for one of its own. Raises UserError for
    anything that does not fit together or cannot be found.
    """
    if spec.llava is not None:
        return _take_over(spec, folder)
    text_config = _text_config(spec.language_model)
    if spec.vision_encoders is None:
        vision_config = _vision_config(spec.vision_encoder, LLAVA_ENCODERS, "vision_encoder")
        _check_features(spec, vision_config)
        image_processor = _image_processor(spec.vision_encoder, vision_config, vision_config.image_size)
    else:
        grids = encoder_grids(spec.vision_encoders)
        check_grids(grids, spec.sva.side if spec.sva else None)
        check_in_llm(spec, text_config)
    if texts is not None:
        texts = _with_role_markers(texts, _template(spec.chat_template))

    # An embedding that is still to be made gets the rows that the tokenizer needs, unless the recipe says how many.
    decided = spec.language_model.config is None or "vocab_size" in spec.language_model.config
    rows = text_config.vocab_size if decided else None
    tokenizer = _tokenizer(spec.language_model, texts, rows, max_length=text_config.max_position_embeddings)
    end_of_turn = check_template(spec.chat_template, tokenizer)
    rows = rows_needed(tokenizer, rows)

    text_config.vocab_size = rows
    name_tokens(text_config, tokenizer)
    shared = {
        "text_config": text_config,
        "image_token_index": tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER),
        "tie_word_embeddings": text_config.tie_word_embeddings,
        "dtype": text_config.dtype or torch.float32,
    }
    if spec.vision_encoders is None:
        patches = (vision_config.image_size // vision_config.patch_size) ** 2
        class_tokens = LLAVA_ENCODERS[vision_config.model_type].class_tokens
        config = LlavaConfig(
            architectures=["LlavaForConditionalGeneration"],
            vision_config=vision_config,
            image_seq_length=patches + (class_tokens if spec.feature_strategy == "full" else 0),
            projector_hidden_act="gelu",
            multimodal_projector_bias=True,
            vision_feature_layer=spec.feature_layer,
            vision_feature_select_strategy=spec.feature_strategy,
            **shared,
        )
    else:
        sva = spec.sva.model_dump(mode="json") if spec.sva else None
        config = MultiEncoderConfig(encoders=[grid.to_dict() for grid in grids], sva=sva, **shared)
        image_processor = several_image_processors(spec.vision_encoders, config)
    write_folder(folder, config, image_processor, tokenizer, spec.chat_template, end_of_turn)
    return config


def encoder_grids(specs: Sequence[NamedEncoderSpec]) -> list[GridEncoder]:
    """What each encoder gives, from its config alone. Raises UserError for one that cannot give what is asked."""
    configs = [_vision_config(spec, ENCODERS, f"vision_encoders ({spec.name})") for spec in specs]
    return [
        GridEncoder.of(spec.name, config, spec.image_size, spec.feature_layer, spec.side)
        for spec, config in zip(specs, configs, strict=True)
    ]


def several_image_processors(
    specs: Sequence[NamedEncoderSpec], config: MultiEncoderConfig, *more: CLIPImageProcessorPil
) -> MultiEncoderImageProcessor:
    """Each encoder's own preprocessing. `more`: of encoders behind those of `specs`, whose size their grid says."""
    grids = config.grids
    own = [_image_processor(spec, grid.config, grid.image_size) for spec, grid in zip(specs, grids, strict=False)]
    own += [
        llava_image_processor(_whole_square(processor, grid.image_size), grid.image_size, grid.name)
        for processor, grid in zip(more, grids[len(specs) :], strict=True)
    ]
    return MultiEncoderImageProcessor([processor.to_dict() for processor in own], config.tokens_per_image)


def encoder_weights(
    specs: Sequence[NamedEncoderSpec], config: MultiEncoderConfig, dtype: torch.dtype
) -> dict[str, Tensor]:
    return {
        f"model.vision_tower.{spec.name}.{name}": tensor
        for spec, grid in zip(specs, config.grids, strict=False)
        for name, tensor in _vision_encoder(spec, grid.config, dtype).state_dict().items()
    }


def check_in_llm(spec: ModelSpec, text_config: PreTrainedConfig) -> None:
    """Raises UserError for a block behind the last decoder layer."""
    layers = text_config.num_hidden_layers
    beyond = [layer for layer in (spec.sva.in_llm if spec.sva else ()) if layer >= layers]
    if beyond:
        raise UserError(
            f"model.sva.in_llm names the decoder layer {beyond[0]}, but the language model has {layers}; expected 0 to "
            f"{layers - 1}"
        )


def _take_over(spec: ModelSpec, folder: Path) -> LlavaConfig | MultiEncoderConfig:
    """`compose_processor` for a whole checkpoint: its config and tokenizer, our image processor and template."""
    source = _source(spec.llava)
    what, model_type = source.location, _model_type(source)
    several = model_type == MultiEncoderConfig.model_type
    if not several and model_type != "llava":
        hint = (
            "; python -m huatuo_vision.model.convert makes one of the original format" if "llava_" in model_type else ""
        )
        raise UserError(
            f"model.llava {what} has the model_type {model_type!r}; expected llava, as transformers has it{hint}"
        )
    config = AutoConfig.from_pretrained(source.location, revision=source.revision)
    parts = [(config.text_config, _LANGUAGE_MODELS)] + ([] if several else [(config.vision_config, LLAVA_ENCODERS)])
    for part, known in parts:
        if part.model_type not in known:
            raise UserError(f"model.llava {what} holds a {part.model_type!r}; expected one of {', '.join(known)}")
    tokenizer = _tokenizer(spec.llava, None, config.text_config.vocab_size, config.text_config.max_position_embeddings)
    if tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER) != config.image_token_index:
        raise UserError(
            f"model.llava {what}: its config reads images at id {config.image_token_index}, but its tokenizer has "
            f"{IMAGE_PLACEHOLDER} at {tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)}; the checkpoint is damaged"
        )
    end_of_turn = check_template(spec.chat_template, tokenizer)
    name_tokens(config.text_config, tokenizer)
    # Checkpoints of transformers 4 keep the encoder's dtype and the text's apart; here one is named for all.
    config.dtype = config.dtype or config.text_config.dtype or torch.float32
    if several:
        image_processor = MultiEncoderImageProcessor.from_pretrained(source.location, revision=source.revision)
    else:
        image_processor = _image_processor(spec.llava, config.vision_config, config.vision_config.image_size)
    write_folder(folder, config, image_processor, tokenizer, spec.chat_template, end_of_turn)
    return config


def _template(name: str) -> str:
    return (CHAT_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def name_tokens(text_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    text_config.architectures = [_LANGUAGE_MODELS[text_config.model_type]]
    text_config.bos_token_id = tokenizer.bos_token_id
    text_config.eos_token_id = tokenizer.eos_token_id
    if text_config.pad_token_id == tokenizer.eos_token_id:
        # The embedding row of a padding id gets no gradient, and the end of an answer is no padding.
        text_config.pad_token_id = None


def write_folder(
    folder: Path,
    config: LlavaConfig | MultiEncoderConfig,
    image_processor: LlavaImageProcessorPil | MultiEncoderImageProcessor,
    tokenizer: PreTrainedTokenizerFast,
    chat_template: str,
    end_of_turn: int,
) -> None:
    stop_ids = list(dict.fromkeys((end_of_turn, tokenizer.eos_token_id)))
    if isinstance(config, MultiEncoderConfig):
        processor = MultiEncoderProcessor(image_processor, tokenizer, _template(chat_template))
    else:
        processor = LlavaProcessor(
            image_processor=image_processor,
            tokenizer=tokenizer,
            patch_size=config.vision_config.patch_size,
            num_additional_image_tokens=LLAVA_ENCODERS[config.vision_config.model_type].class_tokens,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            chat_template=_template(chat_template),
        )
    with replacing(folder) as new:
        write_config(new, config)
        GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=stop_ids if len(stop_ids) > 1 else stop_ids[0],
            pad_token_id=tokenizer.pad_token_id,
        ).save_pretrained(new)
        write_processor(new, processor)


def compose_weights(spec: ModelSpec, folder: Path, seed: int) -> None:
    """Adds the weights to a folder of `compose_processor`: encoder and language model as they are, projector fresh.

    All are saved in the language model's dtype (fp32 where it starts from random weights). The same seed gives the
    same weights. The process's random state is left as it was. Raises UserError where a checkpoint is not whole.
    """
    config = AutoConfig.from_pretrained(folder)
    if spec.llava is not None:
        source = _source(spec.llava)
        model = load_model(source.location, dtype="auto", revision=source.revision)
        save_model_folder(folder, model.state_dict(), config, source_folder=folder)
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        language_model = _language_model(spec.language_model, config.text_config)
        dtype = language_model.dtype
        if spec.vision_encoders is None:
            tower = _vision_encoder(spec.vision_encoder, config.vision_config, dtype)
            encoders = {f"model.vision_tower.{name}": tensor for name, tensor in tower.state_dict().items()}
        else:
            encoders = encoder_weights(spec.vision_encoders, config, dtype)
    weights = {
        **{module_name(f"language_model.{name}"): tensor for name, tensor in language_model.state_dict().items()},
        **encoders,
        **_projector(config, dtype, seed),
    }
    save_model_folder(folder, weights, config, source_folder=folder)


def resolve_revision(spec: Pretrained) -> str | None:
    """The commit that a Hub id and revision mean now (offline: in the cache); None for what is not from the Hub."""
    if spec.id is None:
        return None
    file = "tokenizer_config.json" if isinstance(spec, TokenizerSpec) else "config.json"
    wanted = f"{spec.id} (revision {spec.revision})" if spec.revision else spec.id
    try:
        return Path(hf_hub_download(spec.id, file, revision=spec.revision)).parent.name
    except GatedRepoError:
        raise OutOfReach(
            f"{spec.id} is gated: accept its terms on https://huggingface.co/{spec.id}, "
            "then log in with `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{spec.id} is not on the Hub, or it is private; check the id, or log in with `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise UserError(
            f"{spec.id} has no revision {spec.revision!r} on the Hub; check the branch, tag or commit"
        ) from None
    except LocalEntryNotFoundError:
        raise OutOfReach(
            f"{wanted} is not in the local cache and the Hub cannot be reached; "
            f"download it first (`hf download {spec.id}`) or give a local path"
        ) from None
    except EntryNotFoundError:
        raise UserError(
            f"{wanted} has no {file}, so it is not in transformers' format; choose another repository"
        ) from None
    except HFValidationError:
        raise UserError(f"{spec.id!r} is not a Hub id (owner/name); give a folder as path instead of id") from None


@dataclass(frozen=True, slots=True)
class _Source:
    """Where `from_pretrained` reads: a Hub id at one commit, or a folder."""

    location: str
    revision: str = "main"


def _source(spec: Pretrained) -> _Source:
    if spec.id is not None:
        return _Source(spec.id, resolve_revision(spec))
    if not Path(spec.path).is_dir():
        made_by = getattr(spec, "made_by", None)
        how = f"; train it first: accelerate launch train.py --recipe {made_by}" if made_by else ""
        raise OutOfReach(f"path {spec.path} is not a folder; expected a model in transformers' format{how}")
    return _Source(spec.path)


def _model_type(source: _Source) -> str:
    try:
        values, _ = PreTrainedConfig.get_config_dict(source.location, revision=source.revision)
    except OSError as error:
        raise UserError(f"{source.location} has no readable config.json: {one_line(error)}") from None
    return str(values.get("model_type"))


def config_from_values(values: dict[str, Any], part: str) -> PreTrainedConfig:
    """A config from a recipe's own values. transformers would take a misspelt key as one more attribute."""
    values = copy.deepcopy(values)  # transformers completes a rope_scaling in place, and the recipe is frozen
    config_class = type(AutoConfig.for_model(values.pop("model_type")))
    try:
        config = config_class(**values)
    except (StrictDataclassError, ValueError) as error:
        raise UserError(f"model.{part}.config: {one_line(error)}") from None
    known = {*config_class().to_dict(), *config_class.attribute_map, "rope_theta", "rope_scaling"}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it is no key of {config_class.__name__}"
            raise UserError(f"model.{part}.config: unknown key {key!r}; {hint}")
    return config


def _vision_config(spec: VisionEncoderSpec, known: dict[str, EncoderFamily], part: str) -> PreTrainedConfig:
    if spec.config is not None:
        what, model_type = f"model.{part}.config", str(spec.config.get("model_type"))
    else:
        source = _source(spec)
        what, model_type = source.location, _model_type(source)
    if model_type.startswith("siglip2"):
        raise UserError(
            f"vision encoder {what} is a NaFlex SigLIP 2 ({model_type}), whose patch grid changes with the image "
            "and which LLaVA cannot run; choose a fixed-resolution SigLIP 2, whose model_type is siglip"
        )
    if model_type not in known:
        hint = "; more are taken in vision_encoders, a list" if model_type in ENCODERS else ""
        raise UserError(
            f"vision encoder {what} has the model_type {model_type!r}; expected one of {', '.join(known)}{hint}"
        )
    config_class = known[model_type].config
    if spec.config is not None:
        return config_from_values(spec.config | {"model_type": config_class.model_type}, part)
    return config_class.from_pretrained(source.location, revision=source.revision)


def _text_config(spec: LanguageModelSpec) -> PreTrainedConfig:
    if spec.config is not None:
        what, model_type = "model.language_model.config", str(spec.config.get("model_type"))
    else:
        source = _source(spec)
        what, model_type = source.location, _model_type(source)
    if model_type not in _LANGUAGE_MODELS:
        raise UserError(
            f"language model {what} has the model_type {model_type!r}; expected one of {', '.join(_LANGUAGE_MODELS)} "
            "(Yi is llama, Qwen2.5 is qwen2)"
        )
    if spec.config is not None:
        return config_from_values(spec.config, "language_model")
    return AutoConfig.from_pretrained(source.location, revision=source.revision)


def _check_features(spec: ModelSpec, vision_config: PreTrainedConfig) -> None:
    depth = vision_config.num_hidden_layers
    if not -depth - 1 <= spec.feature_layer <= depth:
        raise UserError(
            f"model.feature_layer {spec.feature_layer} is out of range: the vision encoder has {depth} layers, "
            f"so expected {-depth - 1} to {depth}"
        )
    if spec.feature_strategy == "default" and not LLAVA_ENCODERS[vision_config.model_type].class_tokens:
        raise UserError(
            "model.feature_strategy default drops the class token, but SigLIP has none and would lose its first patch; "
            "set feature_strategy: full"
        )


def _image_processor(
    spec: VisionEncoderSpec | LlavaSpec, vision_config: PreTrainedConfig, side: int
) -> LlavaImageProcessorPil:
    """The encoder's own preprocessing after padding to a square in its mean colour, as LLaVA-1.5 does."""
    image_processor_class = ENCODERS[vision_config.model_type].image_processor
    square = {"height": side, "width": side}
    if isinstance(spec, VisionEncoderSpec) and spec.config is not None:
        own = image_processor_class(size=square, crop_size=square)
    else:
        source = _source(spec)
        try:
            own = image_processor_class.from_pretrained(source.location, revision=source.revision)
        except OSError:
            raise UserError(
                f"vision encoder {source.location} has no preprocessor_config.json, so its image size and mean are "
                "unknown; add the one it was trained with"
            ) from None
    if ENCODERS[vision_config.model_type].any_size:
        own = _whole_square(own, side)
    return llava_image_processor(own, side, f"vision encoder {spec.location}")


def _whole_square(own: Any, side: int) -> CLIPImageProcessorPil:
    """Preprocessing that was made for a crop of a photograph, for a padded square that is resized whole."""
    return CLIPImageProcessorPil(**own.to_dict() | {"size": {"height": side, "width": side}, "do_center_crop": False})


def _tokenizer(
    spec: LanguageModelSpec | LlavaSpec, texts: Iterator[str] | None, rows: int | None, max_length: int
) -> PreTrainedTokenizerFast:
    """The language model's tokenizer with `<image>` in it. `rows`: of the embedding, None where still to be decided."""
    apart = spec.tokenizer if isinstance(spec, LanguageModelSpec) else None
    if apart is not None and apart.vocab_size is not None:
        if texts is None:
            raise ValueError("a recipe with tokenizer.vocab_size needs texts to train the tokenizer on")
        backend = _train_tokenizer(texts, apart.vocab_size)
        named = {"eos_token": _EOS, "pad_token": _PAD}
    else:
        source = _source(apart or spec)
        original = read_tokenizer(source.location, source.revision)
        named = named_tokens(original)
        backend = with_image_token(original.backend_tokenizer, rows, keep=frozenset(named.values()))
    if apart is not None and rows is not None and backend.get_vocab_size() > rows:
        raise UserError(
            f"model.language_model.config.vocab_size is {rows} but the tokenizer has {backend.get_vocab_size()} "
            f"ids with {IMAGE_PLACEHOLDER}; leave vocab_size out"
        )
    return finished_tokenizer(backend, named, max_length)


def _with_role_markers(texts: Iterator[str], template: str) -> Iterator[str]:
    """The texts, and beside each what the template writes around a turn: markers in plain text become few tokens."""
    turn = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
    (markers,), _ = render_jinja_template(conversations=[turn], chat_template=template, eos_token="", bos_token="")
    for text in texts:
        yield text
        yield markers


def _train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE, at most `vocab_size` ids, special tokens included."""
    special = [_EOS, _PAD, IMAGE_PLACEHOLDER]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(special):
        raise UserError(
            f"model.language_model.tokenizer.vocab_size {vocab_size} is too small: {len(alphabet)} bytes and "
            f"{len(special)} special tokens alone need {len(alphabet) + len(special)}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def check_template(name: str, tokenizer: PreTrainedTokenizerFast) -> int:
    """The id that ends the assistant's turn. Refuses a template whose markers the tokenizer would cut into pieces."""
    vocabulary = tokenizer.get_vocab()
    absent = [marker for marker in _MARKERS.get(name, ()) if marker not in vocabulary]
    if absent:
        fitting = [
            path.stem
            for path in sorted(CHAT_TEMPLATES.glob("*.jinja"))
            if all(marker in vocabulary for marker in _MARKERS.get(path.stem, ()))
        ]
        raise UserError(
            f"model.chat_template {name} needs {', '.join(absent)} as tokens, which the language model's tokenizer "
            f"does not have; templates that fit it: {', '.join(fitting)}"
        )
    return vocabulary[_MARKERS[name][-1]] if name in _MARKERS else tokenizer.eos_token_id


def _language_model(spec: LanguageModelSpec, config: PreTrainedConfig) -> PreTrainedModel:
    """The causal LM, its embeddings grown to the config's vocabulary; new rows are the mean of the old ones."""
    if spec.config is not None:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    source = _source(spec)
    model, info = _load_whole(AutoModelForCausalLM, source, dtype="auto")
    check_loaded(source.location, info, ignored=lambda key: key.endswith(".inv_freq"))
    old_rows = model.config.vocab_size
    if config.vocab_size > old_rows:
        model.resize_token_embeddings(config.vocab_size, mean_resizing=False)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            weight = layer.weight.data
            weight[old_rows:] = weight[:old_rows].float().mean(0).to(weight.dtype)
    return model


def sincos_positions(side: int, width: int) -> Tensor:
    """(side * side, width) sines and cosines of each patch's column and row, of unit mean square.

    What random encoders start from: "Better plain ViT baselines for ImageNet-1k" (Beyer et al. 2022). With random
    vectors, as transformers starts them, a small encoder learns what a picture shows and for thousands of steps not
    where: nothing in them says yet which patches are neighbours. Wavelengths suit grids of some ten patches a side.
    """
    frequencies = 100.0 ** -(torch.arange(width // 4) / (width // 4))
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = torch.cat([axis.reshape(-1, 1) * frequencies for axis in (column, row)], dim=1)  # (side², width / 2)
    return math.sqrt(2) * torch.cat([angles.sin(), angles.cos()], dim=1)


def _vision_encoder(spec: VisionEncoderSpec, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A vision encoder, of a CLIP or SigLIP checkpoint its half, or random weights."""
    if spec.config is not None:
        encoder = AutoModel.from_config(config, dtype=dtype)
        if config.model_type != "convnext":  # a convolution knows its neighbours
            _start_positions(encoder, config)
        return encoder
    source = _source(spec)
    verbosity = logging.get_verbosity()
    # Its report would list every tensor of the text tower; what is amiss is said below.
    logging.set_verbosity_error()
    try:
        model, info = _load_whole(ENCODERS[config.model_type].model, source, dtype=dtype, config=config)
    finally:
        logging.set_verbosity(verbosity)
    check_loaded(source.location, info, ignored=lambda key: key.startswith(TEXT_TOWER))
    return model


def _start_positions(encoder: PreTrainedModel, config: PreTrainedConfig) -> None:
    grid = sincos_positions(config.image_size // config.patch_size, config.hidden_size)
    if config.model_type == "dinov2":
        positions, patches = encoder.embeddings.position_embeddings[0], encoder.embeddings.patch_embeddings.projection
    else:
        positions, patches = encoder.embeddings.position_embedding.weight, encoder.embeddings.patch_embedding
    with torch.no_grad():  # the grid's rows come last; a class token, first, keeps its own
        # As large as what a patch of normalised pixels shows.
        positions[-len(grid) :] = grid * patches.weight.std() * math.sqrt(patches.weight[0].numel())


def _projector(config: LlavaConfig | MultiEncoderConfig, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """As transformers initialises it: normal weights, zero biases; the vectors of an aggregator as Cambrian-1's."""
    generator = torch.Generator().manual_seed(seed)
    std, width_out = config.text_config.initializer_range, config.text_config.hidden_size
    weights: dict[str, Tensor] = {}
    if isinstance(config, MultiEncoderConfig) and config.sva:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = projector(config, config.grids)
            for part in module.modules():
                start_vectors(part)
                if isinstance(part, nn.Linear):
                    nn.init.normal_(part.weight, std=std)
                    if part.bias is not None:
                        nn.init.zeros_(part.bias)
        return {f"model.multi_modal_projector.{name}": w.to(dtype) for name, w in module.state_dict().items()}
    several = isinstance(config, MultiEncoderConfig)
    width_in = sum(grid.channels for grid in config.grids) if several else config.vision_config.hidden_size
    for name, width in (("linear_1", width_in), ("linear_2", width_out)):
        weight = torch.empty(width_out, width).normal_(std=std, generator=generator)
        weights[f"model.multi_modal_projector.{name}.weight"] = weight.to(dtype)
        weights[f"model.multi_modal_projector.{name}.bias"] = torch.zeros(width_out, dtype=dtype)
    return weights


def _load_whole(model_class: Any, source: _Source, **kwargs: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    try:
        return model_class.from_pretrained(
            source.location,
            revision=source.revision,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **kwargs,
        )
    except SafetensorError as error:
        raise damaged_weights(source.location, error) from None
    except OSError as error:
        raise UserError(
            f"no safetensors weights can be read from {source.location} at {source.revision} ({one_line(error)}); "
            "pickled weights are never opened: give the revision of the Hub's safetensors conversion (refs/pr/N, under "
            "Community) or a converted local copy"
        ) from None

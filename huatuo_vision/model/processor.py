"""The processor of a LLaVA model: tokenizer with `<image>`, padding image processor, and their files.

The tokenizer adds no BOS or EOS of its own: what a conversation starts and ends with is written in the
chat template, so that training, `processor(text=...)` and every engine agree on the ids.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, processors
from transformers import (
    CLIPImageProcessorPil,
    LlamaTokenizer,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
)
from transformers.utils import cached_file, is_sentencepiece_available

from huatuo_vision.multi_encoder_processor import MultiEncoderProcessor
from huatuo_vision.schema import IMAGE_PLACEHOLDER, UserError

# Tokens that makers of tokenizers set aside: Llama 3, Gemma-like vocabularies, Mistral 0.3, Mistral Nemo.
_RESERVED = re.compile(r"<\|reserved_special_token_\d+\|>|[<\[]\|?unused_?\d+\|?[>\]]|\[control_\d+\]|<SPECIAL_\d+>")

# New rows of an embedding come in such numbers that matrix kernels run at full speed.
_VOCAB_MULTIPLE = 64

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def read_tokenizer(location: str, revision: str = "main") -> PreTrainedTokenizerFast:
    """The tokenizer of a folder or Hub id: its tokenizer.json as it is, else made from its SentencePiece model.

    Raises UserError where there is neither, or no EOS in it.
    """
    try:
        has_json = _has_file(location, "tokenizer.json", revision)
        if not has_json and _has_file(location, "tokenizer.model", revision):
            if not is_sentencepiece_available():
                raise UserError(
                    f"{location} has no tokenizer.json but a SentencePiece model (tokenizer.model), which only the "
                    "package sentencepiece reads; pip install sentencepiece"
                )
            # The general class would leave out the blank before the first word.
            original = LlamaTokenizer.from_pretrained(location, revision=revision)
        else:
            # Not AutoTokenizer: for some model types it rebuilds tokenizer.json's pipeline, or takes tekken.json's.
            original = PreTrainedTokenizerFast.from_pretrained(location, revision=revision)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer.json can be read from {location}: {one_line(error)}") from None
    if original.eos_token is None:
        raise UserError(
            f"the tokenizer of {location} has no eos_token, so no answer could end; name one in its "
            "tokenizer_config.json"
        )
    return original


def _has_file(location: str, name: str, revision: str) -> bool:
    found = cached_file(location, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    return found is not None


def named_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """bos_token, eos_token, unk_token and pad_token, those that there are; padding is EOS where none is named."""
    named = {key: tokenizer.special_tokens_map[key] for key in _NAMED_TOKENS if key in tokenizer.special_tokens_map}
    named.setdefault("pad_token", named["eos_token"])
    return named


def with_image_token(tokenizer: Tokenizer, rows: int | None, keep: frozenset[str]) -> Tokenizer:
    """`<image>` as a special token: on a spare row of the embedding, else for a reserved token, else on a new row.

    Qwen2 has spare rows (151,646 ids, 152,064 rows) and Llama 3 reserved tokens, so neither needs a resize;
    Yi has neither. `keep`: tokens already in use.
    """
    image = AddedToken(IMAGE_PLACEHOLDER, special=True, normalized=False)
    added = Tokenizer.from_str(tokenizer.to_str())
    added.add_special_tokens([image])
    if rows is None or added.token_to_id(IMAGE_PLACEHOLDER) < rows:
        return added
    reserved = [
        (token_id, token.content)
        for token_id, token in sorted(tokenizer.get_added_tokens_decoder().items())
        if _RESERVED.fullmatch(token.content) and token.content not in keep and token_id < rows
    ]
    if not reserved:
        return added
    token_id, content = reserved[0]
    pipeline = json.loads(tokenizer.to_str())
    for token in pipeline["added_tokens"]:
        if token["id"] == token_id:
            token |= {
                "content": IMAGE_PLACEHOLDER,
                "special": True,
                "normalized": False,
                "lstrip": False,
                "rstrip": False,
            }
    vocabulary = pipeline["model"]["vocab"]
    if content in vocabulary:
        vocabulary[IMAGE_PLACEHOLDER] = vocabulary.pop(content)
    return Tokenizer.from_str(json.dumps(pipeline))


def rows_needed(tokenizer: PreTrainedTokenizerFast, rows: int | None) -> int:
    """Rows of an embedding that holds every id: `rows` where they suffice, else the next multiple of 64."""
    ids = max(tokenizer.get_vocab().values()) + 1
    return rows if rows is not None and ids <= rows else -(-ids // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE


def finished_tokenizer(backend: Tokenizer, named: dict[str, str], max_length: int) -> PreTrainedTokenizerFast:
    """The tokenizer of a LLaVA from its pipeline, which this changes: no BOS, EOS, padding or truncation by itself."""
    backend.post_processor = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
    backend.no_padding()
    backend.no_truncation()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=max_length,
        padding_side="left",  # batched generation continues from the right end
        clean_up_tokenization_spaces=False,
        **named,
    )


def llava_image_processor(
    own: CLIPImageProcessorPil | SiglipImageProcessorPil, side: int, what: str, *, pad: bool = True
) -> LlavaImageProcessorPil:
    """The encoder's `own` preprocessing, after padding to a square in its mean colour, as LLaVA-1.5 does.

    Raises UserError where it does not make `side` x `side` pixels; `what` names the encoder then.
    """
    values = own.to_dict()
    sizes = {values["size"].get(key) for key in ("height", "width", "shortest_edge")} - {None}
    if values.get("do_center_crop"):
        sizes |= set(values["crop_size"].values())
    if sizes != {side}:
        raise UserError(
            f"{what} takes {side} x {side} pixels but its preprocessor_config.json makes "
            f"{' or '.join(map(str, sorted(sizes)))}; correct the file"
        )
    kept = ("do_resize", "size", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
    return LlavaImageProcessorPil(
        do_pad=pad,
        do_center_crop=bool(values.get("do_center_crop")),
        crop_size={"height": side, "width": side},
        do_convert_rgb=True,
        **{key: values[key] for key in kept},
    )


def write_processor(folder: Path, processor: LlavaProcessor | MultiEncoderProcessor) -> None:
    """The processor's files; a LLaVA's as both transformers 4.57 and 5.x read them."""
    tokenizer = processor.tokenizer
    processor.save_pretrained(folder)
    # 4.x wants the image processor in a file of its own; with two copies one might be edited and the other read.
    processor.image_processor.save_pretrained(folder)
    path = folder / "processor_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    del values["image_processor"]
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    # 4.x knows neither 5.x's tokenizer class nor its list of extra tokens (tokenizer.json has them all), and would
    # return token_type_ids, which LLaVA's generate refuses.
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": type(processor).__name__,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": tokenizer.model_max_length,
        "padding_side": tokenizer.padding_side,
        "clean_up_tokenization_spaces": False,
        **{key: tokenizer.special_tokens_map[key] for key in _NAMED_TOKENS if key in tokenizer.special_tokens_map},
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())

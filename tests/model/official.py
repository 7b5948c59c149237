"""Tiny checkpoints in the official layouts, and what the official code computes from them.

`Original` is written after FreedomIntelligence/HuatuoGPT-Vision (cli.py, llava_arch.py, clip_encoder.py),
haotian-liu/LLaVA and microsoft/LLaVA-Med (mm_utils.py, conversation.py), and shares nothing with the converter.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
)

SIDE, PATCH, PATCHES = 28, 14, 4
MEAN = [0.48145466, 0.4578275, 0.40821073]
TOWER = "vit/clip_vit_tiny_patch14_28"

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
    "hidden_act": "quick_gelu",
    "projection_dim": 32,
}
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # None is a default: a reader that loses one gives other logits.
    "rope_theta": 70000.0,
    "rms_norm_eps": 1e-4,
    "tie_word_embeddings": False,
}
TEXT_TYPES = {"llava_qwen2": "qwen2", "llava_llama": "llama", "llava": "llama", "llava_mistral": "mistral"}

WORDS = [
    "Which organ is shown in the picture? <|user|>\n<|assistant|>\n",
    "The left kidney, with a cyst of 12 mm at the lower pole. \n",
    "USER: ASSISTANT: [INST] [/INST] A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions. 这张图片显示了什么？",
] * 10

# The pre-tokeniser of Qwen2's tokenizer.json.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_qwen2_tokenizer(folder: Path) -> int:
    """Byte-level BPE with <|endoftext|>, <|im_start|> and <|im_end|>, no BOS; the number of its ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        WORDS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>", chat_template="{{ 'ChatML' }}"
    )
    wrapped.save_pretrained(folder)
    _as_of_2024(folder, tokenizer_class="Qwen2Tokenizer")
    return tokenizer.get_vocab_size()


def write_llama_tokenizer(folder: Path, blank: str, bos: bool) -> int:
    """SentencePiece-like BPE with byte fallback, every id in use; the number of its ids.

    blank: where it puts one before its text: before "each" piece between special tokens (the fast tokenizers of 2023,
    Yi's), or before the "first" alone (`legacy: false`).
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=160, show_progress=False))
    pipeline = json.loads(trained.to_str())["model"]
    specials = ["<unk>", "<s>", "</s>"]
    vocabulary = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *pipeline["vocab"]]
    tokenizer = Tokenizer(
        models.BPE(
            {token: number for number, token in enumerate(vocabulary)},
            [tuple(merge) for merge in pipeline["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    if blank == "each":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    named = {"bos_token": "<s>"} if bos else {}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="<unk>", **named
    ).save_pretrained(folder)
    _as_of_2024(folder, tokenizer_class="LlamaTokenizer", legacy=blank == "each", add_bos_token=bos)
    return tokenizer.get_vocab_size()


def _as_of_2024(folder: Path, **values: Any) -> None:
    """The tokenizer's files as the transformers of that time wrote them."""
    pipeline = json.loads((folder / "tokenizer.json").read_text())
    pipeline["model"]["merges"] = [" ".join(merge) for merge in pipeline["model"]["merges"]]
    pipeline["model"].pop("ignore_merges", None)
    (folder / "tokenizer.json").write_text(json.dumps(pipeline))
    path = folder / "tokenizer_config.json"
    kept = json.loads(path.read_text())
    path.write_text(json.dumps({key: kept[key] for key in kept if key.endswith("_token")} | values))


def _wide(module: nn.Module, seed: int, std: float) -> nn.Module:
    """Weights that make different prompts give different answers; norms stay near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.empty(parameter.shape).normal_(0.0, std, generator=generator)
            parameter.copy_(1 + noise if "norm" in name and name.endswith("weight") else noise)
    return module.eval()


def write_tower(folder: Path, seed: int, *, weights: bool = True) -> CLIPVisionModel:
    """A CLIP as OpenAI's repository has it: whole config, integer sizes in preprocessor_config.json."""
    folder.mkdir(parents=True)
    tower = _wide(CLIPVisionModel(CLIPVisionConfig(**VISION)), seed, 0.2)
    if weights:
        tensors = {f"vision_model.{name.removeprefix('vision_model.')}": t for name, t in tower.state_dict().items()}
        tensors |= {
            "text_model.final_layer_norm.weight": torch.ones(3),
            "logit_scale": torch.ones(()),
            "vision_model.embeddings.position_ids": torch.arange(PATCHES + 1)[None],
        }
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": VISION}))
    preprocessor = {
        "crop_size": SIDE,
        "size": SIDE,
        "resample": 3,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": MEAN,
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return tower


def write_checkpoint(
    folder: Path,
    model_type: str = "llava_qwen2",
    *,
    tower: Path | None = None,
    blank: str = "each",
    shards: int = 3,
    dtype: torch.dtype = torch.float32,
    sizes: dict[str, int] | None = None,
    **changes: Any,
) -> Path:
    """A checkpoint of random weights. tower: a folder outside that holds the only copy, as with LLaVA-1.5; without,
    the tower is in the shards, and another one, which must not count, in `vit/`. sizes: of the language model, where
    they are not TEXT's. changes: of config.json, whatever the tensors are."""
    folder.mkdir(parents=True)
    if model_type == "llava_qwen2":
        rows = write_qwen2_tokenizer(folder) + 9
    else:
        rows = write_llama_tokenizer(folder, blank, bos=tower is not None or model_type == "llava_mistral")
    text = TEXT | (sizes or {}) | {"vocab_size": rows, "bos_token_id": 1, "eos_token_id": 2}
    language_model = _wide(
        AutoModelForCausalLM.from_config(AutoConfig.for_model(TEXT_TYPES[model_type], **text)), 1, 0.15
    )
    projector = _wide(projector_of(VISION["hidden_size"], text["hidden_size"]), 2, 0.2)
    tensors = dict(language_model.state_dict())
    tensors |= {f"model.mm_projector.{name}": tensor for name, tensor in projector.state_dict().items()}
    if tower is None:
        inside = _wide(CLIPVisionModel(CLIPVisionConfig(**VISION)), 3, 0.2)
        tensors |= {
            f"model.vision_tower.vision_tower.vision_model.{name.removeprefix('vision_model.')}": tensor
            for name, tensor in inside.state_dict().items()
        }
        write_tower(folder / TOWER, seed=4)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    write_shards(folder, {name: t.to(dtype).contiguous() for name, t in tensors.items()}, shards)
    config = text | {
        "architectures": ["Llava"],
        "model_type": model_type,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": VISION["hidden_size"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": f"./{TOWER}" if tower is None else str(tower),
        "tune_mm_mlp_adapter": False,
        "use_mm_proj": True,
        "tokenizer_model_max_length": 4096,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_sliding_window": False,
        "transformers_version": "4.40.0.dev0",
    }
    (folder / "config.json").write_text(json.dumps(config | changes))
    (folder / "generation_config.json").write_text(json.dumps({"top_p": 0.8, "pad_token_id": 32001}))
    return folder


def write_shards(folder: Path, tensors: dict[str, Tensor], shards: int) -> None:
    names = list(tensors)
    files = {f"model-{n + 1:05d}-of-{shards:05d}.safetensors": names[n::shards] for n in range(shards)}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, held in files.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def projector_of(width_in: int, width_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width_in, width_out), nn.GELU(), nn.Linear(width_out, width_out))


class Original:
    """An official checkpoint, run as the official code runs it, in float32."""

    IMAGE = -200

    def __init__(self, folder: Path):
        values = json.loads((folder / "config.json").read_text())
        tower_folder = folder / values["mm_vision_tower"]
        tensors: dict[str, Tensor] = {}
        for path in folder.glob("*.safetensors"):
            tensors |= {name: tensor.float() for name, tensor in load_file(path).items()}

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        text_type = TEXT_TYPES[values["model_type"]]
        text = {key: value for key, value in values.items() if key in {*TEXT, "vocab_size"}}
        self.language_model = AutoModelForCausalLM.from_config(AutoConfig.for_model(text_type, **text)).eval()
        self.language_model.load_state_dict(
            {
                name: tensor
                for name, tensor in tensors.items()
                if not name.startswith(("model.mm_projector.", "model.vision_tower.")) and "inv_freq" not in name
            }
        )
        self.projector = projector_of(VISION["hidden_size"], TEXT["hidden_size"])
        self.projector.load_state_dict(part("model.mm_projector."))
        self.tower = CLIPVisionModel(CLIPVisionConfig(**VISION)).eval()
        weights = part("model.vision_tower.vision_tower.vision_model.")
        if not weights:
            own = load_file(tower_folder / "model.safetensors")
            weights = {name.removeprefix("vision_model."): t for name, t in own.items() if "position_ids" not in name}
            weights = {name: t for name, t in weights.items() if not name.startswith(("text_model.", "logit_scale"))}
        prefix = "vision_model." if any(name.startswith("vision_model.") for name in self.tower.state_dict()) else ""
        self.tower.load_state_dict({prefix + name: tensor for name, tensor in weights.items()})
        self.image_processor = CLIPImageProcessorPil.from_pretrained(tower_folder)
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """(N, 3, H, W): padded to a square in the mean colour, then CLIP's own processing."""
        background = tuple(int(x * 255) for x in self.image_processor.image_mean)

        def expand2square(image: Image.Image) -> Image.Image:
            width, height = image.size
            if width == height:
                return image
            side = max(width, height)
            result = Image.new(image.mode, (side, side), background)
            result.paste(image, (0, (side - height) // 2) if width > height else ((side - width) // 2, 0))
            return result

        return self.image_processor([expand2square(image) for image in images], return_tensors="pt")["pixel_values"]

    def _piecewise(self, prompt: str) -> list[int]:
        ids: list[int] = []
        for number, piece in enumerate(prompt.split("<image>")):
            ids += [self.IMAGE] if number else []
            ids += self.tokenizer(piece, add_special_tokens=False).input_ids
        return ids

    def huatuo_ids(self, conversation: Sequence[tuple[str, str | None]]) -> list[int]:
        """(user text with <image>, answer or None) -> ids as cli.py's preprocess_huatuo makes them."""
        ids: list[int] = []
        for question, answer in conversation[:-1]:
            ids += self._piecewise(f"<|user|>\n{question.strip()}\n")
            ids += self.tokenizer(f"<|assistant|>\n{answer} \n", add_special_tokens=False).input_ids
        return ids + self._piecewise(f"<|user|>\n{conversation[-1][0].strip()}\n<|assistant|>\n")

    def vicuna_ids(self, conversation: Sequence[tuple[str, str | None]]) -> list[int]:
        prompt = (
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions. "
        )
        for question, answer in conversation:
            prompt += f"USER: {question} " + (f"ASSISTANT: {answer}</s>" if answer else "ASSISTANT:")
        return [self.tokenizer.bos_token_id, *self._piecewise(prompt)]

    def mistral_ids(self, conversation: Sequence[tuple[str, str | None]]) -> list[int]:
        prompt = "".join(f"[INST] {q} [/INST]" + (f" {a} </s>" if a else "") for q, a in conversation)
        return [self.tokenizer.bos_token_id, *self._piecewise(prompt)]

    @torch.no_grad()
    def embed(self, ids: Sequence[int], images: Sequence[Image.Image]) -> Tensor:
        """(1, S, D): the features of each image in its sentinel's place."""
        features = iter(())
        if images:
            hidden = self.tower(self.pixels(images), output_hidden_states=True).hidden_states[-2]
            features = iter(self.projector(hidden[:, 1:]))
        table = self.language_model.get_input_embeddings().weight
        parts = [next(features) if token == self.IMAGE else table[token][None] for token in ids]
        assert next(features, None) is None, "more images than sentinels"
        return torch.cat(parts)[None]

    @torch.no_grad()
    def logits(self, ids: Sequence[int], images: Sequence[Image.Image]) -> Tensor:
        """(S, V)"""
        return self.language_model(inputs_embeds=self.embed(ids, images), use_cache=False).logits[0]

    @torch.no_grad()
    def answer(self, ids: Sequence[int], images: Sequence[Image.Image], length: int, penalty: float = 1.0) -> list[int]:
        """Greedy; the repetition penalty sees new tokens alone, because generation starts from embeddings."""
        embeddings, new = self.embed(ids, images), []
        for _ in range(length):
            scores = self.language_model(inputs_embeds=embeddings, use_cache=False).logits[0, -1]
            for token in set(new):
                scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
            new.append(int(scores.argmax()))
            if new[-1] == self.tokenizer.eos_token_id:
                break
            table = self.language_model.get_input_embeddings().weight
            embeddings = torch.cat([embeddings, table[new[-1]][None, None]], dim=1)
        return new

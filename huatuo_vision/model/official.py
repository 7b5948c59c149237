"""What the official releases look like from outside: which there are, and how their own code writes a prompt.

Their code cuts a prompt into pieces at every image (HuatuoGPT-Vision: at every turn too) and tokenises each piece by
itself. A chat template is rendered and tokenised as one string. The two agree where the tokenizer puts nothing before
a piece, as Qwen2's; a tokenizer that puts a blank before its text (Llama, Yi) needs that blank written into the
template. Which it is, is found by trying: `fit_template` compares ids over `TRIALS`.

Sources: FreedomIntelligence/HuatuoGPT-Vision cli.py; haotian-liu/LLaVA and microsoft/LLaVA-Med conversation.py and
mm_utils.py (`vicuna_v1`, `mistral_instruct`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huatuo_vision.schema import IMAGE_PLACEHOLDER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parent / "chat_templates" / "official"

BOS = "<BOS>"  # stands for the tokenizer's own in a list of pieces

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True, slots=True)
class Turn:
    """One question with its images before it, and its answer where it has been given."""

    question: str
    images: int = 0
    answer: str | None = None

    @property
    def text(self) -> str:
        return (IMAGE_PLACEHOLDER + "\n") * self.images + self.question


@dataclass(frozen=True, slots=True)
class Release:
    """One family of checkpoints with one way of asking."""

    name: str  # also its chat template's
    title: str
    pieces: Callable[[Sequence[Turn], str], list[str]]  # (turns, EOS) -> texts that are tokenised one by one
    always_pads: bool  # to a square, whatever the config's image_aspect_ratio says
    generation: dict[str, Any] = field(default_factory=dict)  # what its code passes to generate()


def _huatuo_pieces(turns: Sequence[Turn], eos: str) -> list[str]:
    pieces: list[str] = []
    for turn in turns[:-1]:
        pieces += _at_images(f"<|user|>\n{turn.text.strip()}\n")
        pieces.append(f"<|assistant|>\n{turn.answer} \n")
    return pieces + _at_images(f"<|user|>\n{turns[-1].text.strip()}\n<|assistant|>\n")


def _vicuna_pieces(turns: Sequence[Turn], eos: str) -> list[str]:
    said = "".join(f"USER: {t.text} ASSISTANT: {t.answer}{eos}" for t in turns[:-1])
    return [BOS, *_at_images(f"{VICUNA_SYSTEM} {said}USER: {turns[-1].text} ASSISTANT:")]


def _mistral_pieces(turns: Sequence[Turn], eos: str) -> list[str]:
    said = "".join(f"[INST] {t.text} [/INST] {t.answer} {eos}" for t in turns[:-1])
    return [BOS, *_at_images(f"{said}[INST] {turns[-1].text} [/INST]")]


def _at_images(text: str) -> list[str]:
    first, *rest = text.split(IMAGE_PLACEHOLDER)
    return [first, *(piece for after in rest for piece in (IMAGE_PLACEHOLDER, after))]


# Sampling at 0.2 is what the three command lines default to. The penalty of HuatuoGPT-Vision's is none that
# `repetition_penalty` could say: its code generates from embeddings, so it sees the new tokens alone (README.md).
_SAMPLING = {"do_sample": True, "temperature": 0.2, "max_new_tokens": 512}

RELEASES = {
    release.name: release
    for release in (
        Release(
            "huatuo",
            "HuatuoGPT-Vision",
            _huatuo_pieces,
            always_pads=True,
            generation=_SAMPLING | {"min_new_tokens": 1, "new_token_repetition_penalty": 1.2},
        ),
        Release("llava-v1.5", "LLaVA-1.5", _vicuna_pieces, always_pads=False, generation=_SAMPLING),
        Release("llava-med", "LLaVA-Med v1.5", _mistral_pieces, always_pads=False, generation=_SAMPLING),
    )
}

# Conversations with what decides how text is cut: none, one and several images, anywhere; ends in a letter, a full
# stop, a line end, a digit; other scripts; answers that begin or end unlike the usual.
TRIALS: tuple[tuple[Turn, ...], ...] = (
    (Turn("Which organ is shown?"),),
    (Turn("Which organ is shown?", images=1),),
    (Turn("Compare 2 and 3", images=3),),
    (Turn("  A. liver\nB. kidney\n\nAnswer with the letter.", images=1),),
    (Turn("这张图片显示了什么？", images=1),),
    (Turn("Is it a cyst?", images=1, answer="Yes, of 12 mm."), Turn("Sure")),
    (Turn("What", images=2, answer="A\n\nB"), Turn("And here? ", images=1, answer="是的。 "), Turn("Sure?", images=1)),
    (Turn("Hello", answer="Hello! 5"), Turn("<b>What</b> is |this|>", images=1, answer="no"), Turn("1")),
)


@dataclass(frozen=True, slots=True)
class FittedTemplate:
    text: str
    agreeing: int  # of TRIALS
    disagreement: str  # about the first trial whose ids differ; empty where none does


def fit_template(
    release: Release, original: PreTrainedTokenizerFast, tokenizer: PreTrainedTokenizerFast
) -> FittedTemplate:
    """The release's template with the seams that make `tokenizer`'s ids those of the official code with `original`.

    `tokenizer` is `original` with `<image>`. Where no seams make all trials agree, those of the most agreements.
    """
    file = (TEMPLATES / f"{release.name}.jinja").read_text(encoding="utf-8")
    best = None
    for turn_seam, image_seam in product(("", " "), repeat=2):
        text = file.replace("turn_seam = ''", f"turn_seam = '{turn_seam}'")
        text = text.replace("image_seam = ''", f"image_seam = '{image_seam}'")
        fitted = _tried(text, release, original, tokenizer)
        if best is None or fitted.agreeing > best.agreeing:
            best = fitted
        if not fitted.disagreement:
            break
    return best


def _tried(
    template: str, release: Release, original: PreTrainedTokenizerFast, tokenizer: PreTrainedTokenizerFast
) -> FittedTemplate:
    agreeing, disagreement = 0, ""
    for turns in TRIALS:
        rendered = tokenizer.apply_chat_template(
            messages_of(turns), chat_template=template, add_generation_prompt=True, tokenize=False
        )
        ours = tokenizer.convert_ids_to_tokens(tokenizer(rendered, add_special_tokens=False).input_ids)
        theirs = official_tokens(release, original, turns)
        if ours == theirs:
            agreeing += 1
        elif not disagreement:
            at = next(
                (n for n, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]),
                min(len(ours), len(theirs)),
            )
            disagreement = f"{ours[at : at + 4]} for {theirs[at : at + 4]} at token {at} of {rendered!r}"
    return FittedTemplate(template, agreeing, disagreement)


def official_tokens(release: Release, tokenizer: PreTrainedTokenizerFast, turns: Sequence[Turn]) -> list[str]:
    """The prompt as the official code makes it, `<image>` where it splices an image's features in."""
    whole = {BOS: tokenizer.bos_token, IMAGE_PLACEHOLDER: IMAGE_PLACEHOLDER}
    tokens: list[str] = []
    for piece in release.pieces(turns, tokenizer.eos_token):
        tokens += [whole[piece]] if piece in whole else tokenizer.tokenize(piece, add_special_tokens=False)
    return tokens


def messages_of(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """The turns as transformers' chat messages."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        content = [{"type": "image"}] * turn.images + [{"type": "text", "text": turn.question}]
        messages.append({"role": "user", "content": content})
        if turn.answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    return messages

"""Scoring options by their likelihood instead of reading a reply: nothing to parse, and a confidence with each answer.

Each multiple-choice row is scored twice, by its options' letters and by their texts. A score is the mean
log-probability of the tokens with which the model would begin its answer with that letter or text, the end of turn
not among them; a softmax over a row's scores makes them probabilities over its options. The response is the letter
of the highest letter probability, the first of equal ones.

The prompt and its images go through the model once. All continuations of a row then follow in one more pass, side by
side on top of the prompt's cache (here "A", "B", "left lung", of one, one and two tokens; a token sees the prompt
and its own option, and the last token of an option is only predicted, never fed):

    cache                     fed     sees
    <image> Which organ ? ->  left    the prompt and itself; predicts "lung"
                              (the prompt's own last token predicts "A", "B" and "left")

Open questions have no options: they are left to generation, and their number is said.

Legend: B rows of a batch, S tokens of its longest prompt with images, Q tokens that are fed on top of it,
V vocabulary.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from rich.console import Console

from huatuo_vision.evaluation.answers import progress_bar, response_of
from huatuo_vision.evaluation.generate import (
    Asked,
    Batch,
    ahead,
    answer_rows,
    check_length,
    in_batches,
    load,
    memory_error_explained,
    prepare,
    render_prompt,
    share_of,
    user_turn,
)
from huatuo_vision.evaluation.protocols import Protocol
from huatuo_vision.evaluation.responses import append
from huatuo_vision.evaluation.rows import Row
from huatuo_vision.schema import UserError, escape_placeholder

# Of an option without a token: no probability beside any other's, and still a number.
_NO_TOKENS = -1e4


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Probabilities over one row's options."""

    letter: list[float]
    text: list[float]

    @property
    def best(self) -> str:
        return string.ascii_uppercase[max(range(len(self.letter)), key=self.letter.__getitem__)]


def check_rows(rows: Sequence[Row], protocol: Protocol) -> None:
    """Raises UserError where the protocol asks a multiple-choice question without naming its options by letters."""
    for row in rows:
        if row.options is not None and not all(
            protocol.option.format(letter=letter, text=text) in protocol.render(row)
            for letter, text in zip(string.ascii_uppercase, row.options, strict=False)
        ):
            raise UserError(
                f"protocol {protocol.name} asks {row.benchmark} row {row.id!r} without its options' letters, so "
                "--scoring likelihood has nothing to score; choose another --protocol, or --scoring generate"
            )


def answer(
    rows: Sequence[Row],
    folder: Path,
    protocol: Protocol,
    world: PartialState,
    out: Path,
    *,
    blind: bool,
    batch_size: int,
) -> None:
    """Append the answers to this process's share of `rows` to its file in `out`, batch by batch."""
    check_rows(rows, protocol)
    asked = load(folder, protocol, world.device, blind=blind)
    path = out / f"responses.rank{world.process_index}.jsonl"
    hidden = not world.is_main_process
    choices = [row for row in rows if row.options is not None]
    score_rows(asked, share_of(choices, protocol, world, blind=blind), path, batch_size=batch_size, hidden=hidden)
    open_rows = [row for row in rows if row.options is None]
    if open_rows:
        if not hidden:
            said = f"{len(open_rows)} open questions have no options to score: their answers are generated"
            Console(stderr=True).print(said, highlight=False, soft_wrap=True)
        share = share_of(open_rows, protocol, world, blind=blind)
        answer_rows(asked, share, path, batch_size=batch_size, hidden=hidden)


def score_rows(asked: Asked, rows: Sequence[Row], path: Path, *, batch_size: int, hidden: bool = False) -> None:
    """Append the answers to `rows`, all of them multiple-choice, to `path`. hidden: no progress bar."""
    lead = answer_lead(asked)
    with progress_bar("scoring options", hidden=hidden) as progress:
        task = progress.add_task("rows", total=len(rows))
        for batch, continuations in ahead(
            lambda batch: _with_continuations(asked, batch, lead), in_batches(rows, batch_size)
        ):
            found = score(asked, batch, continuations)
            append(
                path,
                [
                    response_of(
                        row,
                        scored.best,
                        likelihood={
                            "letter": [round(p, 6) for p in scored.letter],
                            "text": [round(p, 6) for p in scored.text],
                        },
                    )
                    for row, scored in zip(batch.rows, found, strict=True)
                ],
            )
            progress.advance(task, len(batch.rows))


def answer_lead(asked: Asked) -> str:
    """What the chat template puts between the prompt and the answer's own text: a blank, for some."""
    row = Row("", "", "?", "open", None, "", (), {})
    prompt = render_prompt(asked.processor, asked.protocol, row, blind=True)
    reply = {"role": "assistant", "content": [{"type": "text", "text": "X"}]}
    whole = asked.processor.apply_chat_template([user_turn(asked.protocol, row, blind=True), reply], tokenize=False)
    lead, found, _ = whole.removeprefix(prompt).partition("X")
    return lead if whole.startswith(prompt) and found else ""


def _with_continuations(asked: Asked, rows: list[Row], lead: str) -> tuple[Batch, list[list[list[int]]]]:
    """The batch, and for each row the token ids of its letters followed by those of its option texts."""
    batch = prepare(asked, rows)
    tokenizer = asked.processor.tokenizer
    continuations = []
    for row, prompt in zip(rows, batch.prompts, strict=True):
        letters = string.ascii_uppercase[: len(row.options)]
        texts = [escape_placeholder(option.strip()) for option in row.options]
        begun = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        whole = tokenizer([prompt + lead + text for text in (*letters, *texts)], add_special_tokens=False)["input_ids"]
        # Where the boundary is no boundary of tokens, the option's own tokens are what can follow the prompt.
        continuations.append(
            [
                ids[len(begun) :]
                if ids[: len(begun)] == begun
                else tokenizer(lead + text, add_special_tokens=False)["input_ids"]
                for ids, text in zip(whole, (*letters, *texts), strict=True)
            ]
        )
    return batch, continuations


@torch.inference_mode()
def score(asked: Asked, batch: Batch, continuations: list[list[list[int]]]) -> list[Likelihood]:
    """continuations: for each row, its letters' token ids followed by its option texts'."""
    model = asked.model
    check_length(asked, batch, max((len(ids) for row in continuations for ids in row), default=0))
    with memory_error_explained(len(batch.rows)):
        inputs = batch.inputs(model)
        mask = inputs["attention_mask"]  # (B, S)
        prefill = model(**inputs, position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0), logits_to_keep=1, use_cache=True)
        first = prefill.logits[:, -1].float().log_softmax(dim=-1)  # (B, V): log-probabilities of the first token
        fed = _Fed.of(continuations)
        later = None
        if fed.length:
            later = model(
                input_ids=fed.input_ids.to(model.device),
                attention_mask=fed.mask(mask, model.dtype),
                position_ids=mask.sum(dim=1, keepdim=True) + fed.depths.to(model.device),
                past_key_values=prefill.past_key_values,
                use_cache=True,
            ).logits  # (B, Q, V)
    found = []
    for position, row in enumerate(continuations):
        # One row at a time: all rows' logits in single precision could be larger than the model.
        following = None if later is None else later[position].float().log_softmax(dim=-1)  # (Q, V)
        scores = torch.tensor(
            [
                _mean_log_probability(ids, start, first[position], following)
                for ids, start in zip(row, fed.starts[position], strict=True)
            ]
        )
        letter, text = scores.chunk(2)
        found.append(Likelihood(letter.softmax(dim=0).tolist(), text.softmax(dim=0).tolist()))
    return found


def _mean_log_probability(
    ids: list[int], start: int, first: torch.Tensor, following: torch.Tensor | None
) -> torch.Tensor | float:
    """first: (V,); following: (Q, V), of which rows `start` and on predict the option's second token and on."""
    if not ids:
        return _NO_TOKENS
    total = first[ids[0]]
    if len(ids) > 1:
        total = total + following[range(start, start + len(ids) - 1), ids[1:]].sum()
    return total / len(ids)


@dataclass(frozen=True, slots=True)
class _Fed:
    """All continuations of each row side by side, without their last tokens; rows are padded at the end."""

    input_ids: torch.Tensor  # (B, Q)
    options: torch.Tensor  # (B, Q): which continuation a token belongs to, -1 for padding
    depths: torch.Tensor  # (B, Q): how many tokens of its continuation precede it
    starts: list[list[int]]  # for each row and continuation, where its tokens begin in Q

    @property
    def length(self) -> int:
        return self.input_ids.shape[1]

    @classmethod
    def of(cls, continuations: list[list[list[int]]]) -> _Fed:
        longest = max(sum(max(len(ids) - 1, 0) for ids in row) for row in continuations)
        input_ids = torch.zeros(len(continuations), longest, dtype=torch.long)
        options, depths = torch.full_like(input_ids, -1), torch.zeros_like(input_ids)
        starts: list[list[int]] = []
        for position, row in enumerate(continuations):
            place = 0
            starts.append([])
            for option, ids in enumerate(row):
                starts[-1].append(place)
                end = place + max(len(ids) - 1, 0)
                input_ids[position, place:end] = torch.tensor(ids[:-1], dtype=torch.long)
                options[position, place:end] = option
                depths[position, place:end] = torch.arange(end - place)
                place = end
        return cls(input_ids, options, depths, starts)

    def mask(self, prompt_mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """(B, 1, Q, S + Q), added to attention scores: 0 where a token may look, the lowest number elsewhere."""
        options, depths = self.options.to(prompt_mask.device), self.depths.to(prompt_mask.device)
        prompt = prompt_mask.bool().unsqueeze(1).expand(-1, self.length, -1)  # (B, Q, S)
        same = options.unsqueeze(2) == options.unsqueeze(1)
        own = same & (depths.unsqueeze(2) >= depths.unsqueeze(1))  # (B, Q, Q)
        allowed = torch.cat([prompt, own], dim=2).unsqueeze(1)
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(
            ~allowed, torch.finfo(dtype).min
        )

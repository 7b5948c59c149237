"""What each choice in the training step saves on a CPU, beside the other way to do it: python -m benchmarks.levers

Parts of the step of `benchmarks.training_speed`'s model (fp32), forward and backward, on a row of 8 samples with 1,829
tokens, 1,000 of them targets. The ways take turns in one process, and must give the same result; ratios are taken turn
by turn. A part's share of a step stands in no figure here: for the whole, see `benchmarks.training_speed`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence

LENGTHS = (150, 310, 220, 180, 260, 330, 200, 179)
TARGETS, HIDDEN, HEADS, VOCABULARY = 1000, 256, 4, 8192


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.levers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=9, metavar="N", help="of each way (default: 9)")
    arguments = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

    import torch
    from rich.console import Console
    from rich.table import Table

    torch.set_num_threads(1)
    torch.manual_seed(0)
    table = Table(title=f"ms of CPU time, median of {arguments.turns} turns", title_justify="left")
    for column in ("part", "way", "ms", "of the first way [quartiles]"):
        table.add_column(column, justify="left" if column in ("part", "way") else "right", no_wrap=True)
    for part, ways in (("loss", losses()), ("encoder", encoders()), ("attention", attentions()), ("AdamW", updates())):
        seconds = take_turns(ways, arguments.turns)
        first = next(iter(seconds.values()))
        for way, found in seconds.items():
            ratios = sorted(a / b for a, b in zip(found, first, strict=True))
            low, middle, high = statistics.quantiles(ratios, n=4)
            of_first = f"{middle:.2f} [{low:.2f} to {high:.2f}]" if found is not first else ""
            table.add_row(part, way, f"{1e3 * statistics.median(found):.1f}", of_first)
        table.add_section()
    Console(width=100).print(table)


def take_turns(ways: dict[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    """Runs every way once to warm up and compare, then in turn; a way returns the tensors that must be equal."""
    import torch

    results = {name: way() for name, way in ways.items()}
    for name, result in results.items():
        torch.testing.assert_close(result, next(iter(results.values())), rtol=2e-4, atol=2e-4, msg=name)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            began = time.process_time()
            way()
            seconds[name].append(time.process_time() - began)
    return seconds


def losses() -> dict[str, Callable[[], object]]:
    """Head and cross-entropy: on all tokens, on the targets, and in chunks whose gradient is taken at once."""
    import torch
    from torch.nn import functional as F

    tokens = sum(LENGTHS)
    hidden = torch.randn(tokens, HIDDEN)
    weight = (0.02 * torch.randn(VOCABULARY, HIDDEN)).requires_grad_()
    targets = torch.randperm(tokens)[:TARGETS]
    labels = torch.full((tokens,), -100)
    labels[targets] = torch.randint(0, VOCABULARY, (TARGETS,))

    def run(loss: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], object]:
        def way() -> object:
            leaf, weight.grad = hidden.clone().requires_grad_(), None
            total = loss(leaf)
            total.backward()
            return total.detach() / TARGETS, leaf.grad, weight.grad

        return way

    def on_targets(leaf: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(leaf[targets] @ weight.T, labels[targets], reduction="sum")

    def chunked(rows: int, reduction: str) -> Callable[[torch.Tensor], torch.Tensor]:
        options = torch.nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=rows)
        call = {"reduction": reduction, "options": options}
        return lambda leaf: F.linear_cross_entropy(leaf[targets], weight, labels[targets], **call).sum()

    ways = {"logits of the targets": run(on_targets)}
    ways["logits of all tokens"] = run(lambda leaf: F.cross_entropy(leaf @ weight.T, labels, reduction="sum"))
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        ways |= {
            f"targets, chunks of {rows}, summed (ours: 256)": run(chunked(rows, "sum")) for rows in (128, 256, 512)
        }
        ways["targets, chunks of 256, loss by loss"] = run(chunked(256, "none"))
    return ways


def encoders() -> dict[str, Callable[[], object]]:
    """The frozen vision encoder on 8 pictures, with the layer behind the state that is read, and without."""
    import copy

    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    from benchmarks.training_speed import MODEL
    from huatuo_vision.model.llava import PackedLlava, skip_unread_layers

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**MODEL["vision_encoder"]["config"]),
        text_config=LlamaConfig(hidden_size=HIDDEN, num_hidden_layers=1, intermediate_size=64, vocab_size=512),
        vision_feature_layer=-2,
    )
    whole = PackedLlava(config).requires_grad_(False)
    cut = copy.deepcopy(whole)
    skip_unread_layers(cut)
    pixels = torch.randn(8, 3, 112, 112)
    return {
        name: lambda model=model: torch.cat(tuple(model.get_image_features(pixel_values=pixels).pooler_output))
        for name, model in {"all 6 layers": whole, "the 5 that are read (ours)": cut}.items()
    }


def attentions() -> dict[str, Callable[[], object]]:
    """One layer's causal attention over a packed row, forward and backward."""
    import torch
    from torch.nn import functional as F
    from torch.nn.utils.rnn import pad_sequence

    from huatuo_vision.model.attention import _per_sample_sdpa

    tokens = sum(LENGTHS)
    start = [torch.randn(1, HEADS, tokens, HIDDEN // HEADS) for _ in range(3)]
    sample = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    block = (sample[:, None] == sample) & torch.ones(tokens, tokens, dtype=torch.bool).tril()

    def per_sample(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return _per_sample_sdpa(torch.nn.Identity(), q, k, v, None, sample_lengths=LENGTHS)[0]

    def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=block).transpose(1, 2)

    def padded(*qkv: torch.Tensor) -> torch.Tensor:
        # Padding stands behind, so that causal attention never reaches it.
        batches = [pad_sequence(x[0].transpose(0, 1).split(LENGTHS), True).transpose(1, 2) for x in qkv]
        out = F.scaled_dot_product_attention(*batches, is_causal=True).transpose(1, 2)
        return torch.cat([row[:length] for row, length in zip(out, LENGTHS, strict=True)])[None]

    def run(attention: Callable[..., torch.Tensor]) -> Callable[[], object]:
        def way() -> object:
            leaves = [x.clone().requires_grad_() for x in start]
            output = attention(*leaves)
            output.square().sum().backward()
            return output.detach(), *(leaf.grad for leaf in leaves)

        return way

    ways = {"per sample (ours)": per_sample, "padded within attention": padded, "a mask over the row": masked}
    return {name: run(attention) for name, attention in ways.items()}


def updates() -> dict[str, Callable[[], object]]:
    """One optimizer step over the language model's weights."""
    import torch

    shapes = [(VOCABULARY, HIDDEN)] * 2 + [(HIDDEN, HIDDEN)] * 24 + [(688, HIDDEN)] * 18 + [(HIDDEN,)] * 13

    def run(**kind: bool) -> Callable[[], object]:
        weights = [torch.full(shape, 0.1, requires_grad=True) for shape in shapes]
        for weight in weights:
            weight.grad = torch.full_like(weight, 1e-3)
        optimizer = torch.optim.AdamW(weights, lr=1e-6, weight_decay=0.0, **kind)

        def way() -> object:
            optimizer.step()
            return weights[0].detach().clone()[:1]

        return way

    return {"fused (ours)": run(fused=True), "foreach": run(foreach=True), "one by one": run(foreach=False)}


if __name__ == "__main__":
    main()

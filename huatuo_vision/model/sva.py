"""Projectors from the grids of several encoders to the language model's width.

`MlpProjector` lays the grids on top of each other and maps each place by two linear layers, as LLaVA does.
`SvaProjector` is the Spatial Vision Aggregator of Cambrian-1 (arXiv:2406.16860): learned queries, one at each place of
a Q x Q grid, each looking through its own window into every encoder's grid; blocks of the same kind can look again from
inside the language model.

Legend: N images, Q queries on a side, S_i features on a side of encoder i, k_i = (S_i / Q)^2 features in a window,
R = N * Q * Q windows, G groups of queries, W width of the aggregator, D width of the language model, P features per
image that are handed on: Q * Q, and Q more where each row of the grid ends in a learned newline.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init


@dataclass(frozen=True, slots=True)
class Windows:
    """What blocks look at, of all images of one call."""

    features: tuple[torch.Tensor, ...]  # (R, k_i, W) for each encoder
    context: torch.Tensor  # (N, W): each image as a whole, the mean of the first encoder's features


@dataclass(frozen=True, slots=True)
class ImageContext:
    """What decoder layers need of one call's images; it travels as an argument of the call, and ends with it."""

    blocks: nn.ModuleDict  # decoder layer -> the block after it
    positions: torch.Tensor  # (R,): where the images' features stand among all tokens of the call, newlines left out
    windows: Windows
    blank: bool  # no image at all: the blocks run, so that every rank does the same, and nothing comes of it

    def updated(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (B, S, D) after decoder layer `layer`, its image positions as the block there makes them."""
        tokens = hidden.flatten(0, 1)
        seen = self.blocks[str(layer)](tokens[self.positions], self.windows).to(hidden.dtype)  # (R, D)
        if self.blank:
            return hidden + 0.0 * seen.float().mean().to(hidden.dtype)
        return tokens.index_copy(0, self.positions, seen).view_as(hidden)


def window_context(layer: int, _: nn.Module, arguments: tuple, keywords: dict[str, Any], hidden: torch.Tensor) -> Any:
    """The forward hook of decoder layer `layer`: all that it knows of images is in the call's `image_context`."""
    context = keywords.get("image_context")
    return hidden if context is None else context.updated(layer, hidden)


class WindowAttention(nn.Module):
    """One query for each window, over the features of all encoders in it under one softmax."""

    def __init__(self, width: int, heads: int, encoders: int):
        super().__init__()
        self.heads = heads
        self.query = _normed_linear(width)
        self.keys = nn.ModuleList(_normed_linear(width) for _ in range(encoders))
        self.values = nn.ModuleList(_normed_linear(width) for _ in range(encoders))
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, queries: torch.Tensor, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """queries (R, W), features (R, k_i, W) -> (R, W)."""
        keys, values = (
            torch.cat([project(x) for project, x in zip(projections, features, strict=True)], dim=1)  # (R, k, W)
            for projections in (self.keys, self.values)
        )
        query, keys, values = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (self.query(queries)[:, None], keys, values)
        )  # (R, heads, 1 or k, W / heads)
        attended = F.scaled_dot_product_attention(query, keys, values)
        return self.output(attended.transpose(1, 2).flatten(1))


class AggregationBlock(nn.Module):
    """Queries look through their windows. `query_width` is W in the projector, D inside the language model."""

    def __init__(self, query_width: int, width: int, heads: int, window_sizes: Sequence[int]):
        super().__init__()
        self.context = nn.Linear(width, width, bias=False)
        self.merge = nn.Linear(query_width + width, width, bias=False)
        self.attention = WindowAttention(width, heads, len(window_sizes))
        # Which place of its window a feature comes from; a window of one feature has one place.
        self.places = nn.ParameterDict(
            {str(i): nn.Parameter(torch.empty(size, width)) for i, size in enumerate(window_sizes) if size > 1}
        )
        self.norm = nn.LayerNorm(width)
        self.linear_1 = nn.Linear(width, width, bias=False)
        self.linear_2 = nn.Linear(width, query_width, bias=False)

    def forward(self, queries: torch.Tensor, windows: Windows) -> torch.Tensor:
        """queries (R, query_width) -> the same shape."""
        context = self.context(windows.context)  # (N, W)
        context = context.repeat_interleave(len(queries) // len(context), dim=0)  # (R, W)
        merged = self.merge(torch.cat([queries, context.to(queries.dtype)], dim=-1))
        placed = [
            features + self.places[str(i)] if str(i) in self.places else features
            for i, features in enumerate(windows.features)
        ]
        seen = self.norm(merged + self.attention(merged, placed))
        return queries + self.linear_2(F.gelu(self.linear_1(seen)))


class SvaProjector(nn.Module):
    """Encoders' grids -> P features per image, and the windows that blocks inside the language model look through."""

    def __init__(
        self,
        channels: Sequence[int],
        sides: Sequence[int],
        hidden: int,
        *,
        side: int,
        depth: int,
        groups: int,
        width: int,
        heads: int,
        newline: bool,
        in_llm: Sequence[int],
    ):
        super().__init__()
        self.side = side
        window_sizes = [(s // side) ** 2 for s in sides]
        self.encoders = nn.ModuleList(
            nn.Sequential(nn.Linear(c, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width))
            for c in channels
        )
        # One vector for all places of a group: a query knows its place by its window.
        self.query = nn.Parameter(torch.empty(groups, width))
        self.groups = nn.ModuleList(
            nn.ModuleList(AggregationBlock(width, width, heads, window_sizes) for _ in range(depth))
            for _ in range(groups)
        )
        self.linear_1 = nn.Linear(groups * width, hidden)
        self.linear_2 = nn.Linear(hidden, hidden)
        self.newline = nn.Parameter(torch.empty(hidden)) if newline else None
        self.in_llm = nn.ModuleDict({str(i): AggregationBlock(hidden, width, heads, window_sizes) for i in in_llm})

    def forward(self, grids: Sequence[torch.Tensor]) -> tuple[torch.Tensor, Windows]:
        """grids (N, S_i, S_i, C_i) -> features (N, P, D)."""
        projected = [project(grid) for project, grid in zip(self.encoders, grids, strict=True)]  # (N, S_i, S_i, W)
        windows = Windows(tuple(map(self._windows, projected)), projected[0].mean(dim=(1, 2)))
        images = len(projected[0])
        seen = []
        for query, blocks in zip(self.query, self.groups, strict=True):
            queries = query.to(projected[0].dtype).expand(images * self.side**2, -1)  # (R, W)
            for block in blocks:
                queries = block(queries, windows)
            seen.append(queries)
        features = self.linear_2(F.gelu(self.linear_1(torch.cat(seen, dim=-1))))  # (R, D)
        features = features.unflatten(0, (images, self.side, self.side))
        if self.newline is not None:
            newline = self.newline.to(features.dtype).expand(images, self.side, 1, -1)
            features = torch.cat([features, newline], dim=2)  # (N, Q, Q + 1, D)
        return features.flatten(1, 2), windows

    def _windows(self, grid: torch.Tensor) -> torch.Tensor:
        """(N, S, S, W) -> (R, k, W), row by row."""
        reach = grid.shape[1] // self.side
        blocks = grid.unflatten(2, (self.side, reach)).unflatten(1, (self.side, reach))  # (N, Q, reach, Q, reach, W)
        return blocks.transpose(2, 3).flatten(0, 2).flatten(1, 2)


class MlpProjector(nn.Module):
    """LLaVA's two linear layers, over the encoders' channels side by side."""

    def __init__(self, channels: Sequence[int], hidden: int):
        super().__init__()
        self.linear_1 = nn.Linear(sum(channels), hidden)
        self.linear_2 = nn.Linear(hidden, hidden)

    def forward(self, grids: Sequence[torch.Tensor]) -> tuple[torch.Tensor, None]:
        """grids (N, S, S, C_i), all of one side -> features (N, S * S, D)."""
        stacked = grids[0] if len(grids) == 1 else torch.cat(list(grids), dim=-1)
        return self.linear_2(F.gelu(self.linear_1(stacked.flatten(1, 2)))), None


def start_vectors(module: nn.Module) -> None:
    """Queries, newline and places of a module that has them, as Cambrian-1's code starts them; loaded ones stay."""
    if isinstance(module, SvaProjector):
        for vectors in (module.query, module.newline):
            if vectors is not None:
                init.normal_(vectors, std=1 / math.sqrt(module.linear_2.out_features))
    elif isinstance(module, nn.ParameterDict):  # a block's places: transformers passes over what has none of its own
        for place in module.values():
            init.normal_(place)


def _normed_linear(width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width, bias=False))

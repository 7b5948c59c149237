"""The `reformat` section of a builder's configuration."""

from __future__ import annotations

import os
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from data.mllm.prompts import Method
from huatuo_vision.schema import UserError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Prices(_Strict):
    """What the endpoint charges for a million tokens. None is built in: prices go stale."""

    input: NonNegativeFloat
    output: NonNegativeFloat
    cached_input: NonNegativeFloat | None = None  # None: as input
    batch_discount: float = Field(0.5, ge=0, lt=1)  # what the batch route costs less
    currency: str = "USD"


class Reformat(_Strict):
    """How descriptions and questions are made. What decides an answer is part of the key that it is kept under."""

    method: Method = "mllm_reformatted"
    model: str | None = None  # as the endpoint calls it; needed by every method but native_caption
    base_url: str | None = None  # without it, OPENAI_BASE_URL; the key is only ever read from OPENAI_API_KEY
    route: Literal["online", "batch"] = "online"  # batch: answers come from `python -m data.batch` alone
    temperature: NonNegativeFloat | None = None  # None: the endpoint's default
    max_tokens: PositiveInt = 2048
    max_tokens_parameter: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"  # some models know only one
    extra_body: dict[str, Any] = {}  # further parameters of a request: top_p, seed, reasoning_effort, ...
    image_side: PositiveInt = 1024  # pixels; longer sides are made smaller
    jpeg_quality: int = Field(90, ge=1, le=100)
    max_reference_chars: PositiveInt = 12_000  # in-text mentions beyond it are left out, and counted
    seed: int = 0  # of the scenarios
    concurrency: PositiveInt = 8  # requests at once, per task
    max_retries: int = Field(8, ge=0)
    timeout: PositiveFloat = 300.0  # seconds
    max_failed_share: float = Field(0.05, ge=0, le=1)  # of the rows asked; above it the run stops
    prices: Prices | None = None
    max_cost: PositiveFloat | None = None  # in the prices' currency, over all runs into the same output folder

    @model_validator(mode="after")
    def _whole(self) -> Reformat:
        if self.method != "native_caption" and self.model is None:
            raise ValueError(f"method {self.method} asks a model; set model to the name that the endpoint knows it by")
        if self.max_cost is not None and self.prices is None:
            raise ValueError("max_cost needs prices: {input: ..., output: ...} for a million tokens")
        return self

    @property
    def asks(self) -> bool:
        return self.method != "native_caption"

    def endpoint(self) -> str:
        """The base URL. Raises UserError where none is given."""
        url = self.base_url or os.environ.get("OPENAI_BASE_URL")
        if not url:
            raise UserError(
                "reformat.base_url is not set, and neither is OPENAI_BASE_URL; expected the address of an "
                "OpenAI-compatible endpoint, like http://localhost:8000/v1"
            )
        return url

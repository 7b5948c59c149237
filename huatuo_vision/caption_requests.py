"""What a user asks before a description is the answer: for rows that hold a caption, and for data sets being made."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

import yaml


def caption_request(row_id: str, n_images: int, language: str = "en") -> str:
    """One of the fixed requests for one image or for several, always the same for the same row id."""
    requests = caption_requests()[language]["one" if n_images == 1 else "several"]
    digest = hashlib.sha256(row_id.encode()).digest()
    return requests[int.from_bytes(digest[:8]) % len(requests)]


@lru_cache
def caption_requests() -> dict[str, dict[str, list[str]]]:
    """language -> one or several images -> the requests."""
    return yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))

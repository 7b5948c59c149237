"""What looks like a key, or is one of this process's, never reaches a log, a record, a card or a terminal."""

from __future__ import annotations

import os
import re

SECRETS = {
    "a Hugging Face token": rb"(?<![A-Za-z0-9])(?:(?:hf|api_org)_[A-Za-z0-9]{20,}|hf_oauth_[\w.-]{20,})",
    "a wandb key": rb"(?i)key[\"']?\s*[:=]\s*[\"']?[0-9a-f]{40}(?![0-9a-f])|wandb_v\d+_\w{20,}",
    "an API key (sk-...)": rb"(?<![A-Za-z0-9])sk-[A-Za-z0-9_-]*[A-Za-z0-9]{16,}",
    "a GitHub token": rb"(?<![A-Za-z0-9])(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})",
    "an AWS key": rb"(?<![A-Z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Z0-9])"
    rb"|(?i:aws_secret_access_key)[\"']?\s*[:=]\s*[\"']?[A-Za-z0-9/+]{40}",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
SECRET_VARIABLE = re.compile(r"(TOKEN|API_KEY|SECRET|SECRET_ACCESS_KEY|PASSWORD)$")  # HF_TOKEN, WANDB_API_KEY, ...


def own_secrets() -> list[str]:
    """The keys in this process's environment, the longest first: one may be a part of another."""
    found = {value for name, value in os.environ.items() if SECRET_VARIABLE.search(name) and len(value) >= 8}
    return sorted(found, key=len, reverse=True)


def redact(text: str) -> str:
    """The text with every secret replaced by ***, and addresses without the user and password they may carry."""
    for secret in own_secrets():
        text = text.replace(secret, "***")
    for pattern in SECRETS.values():
        text = re.sub(pattern.decode(), "***", text)
    return re.sub(r"(\w+://)[^/\s'\"]+@", r"\1", text)  # up to the last @: a password may hold one


def without_queries(text: str) -> str:
    """Web addresses up to their question mark: what follows may sign them."""
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", text)

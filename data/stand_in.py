"""An endpoint that stands in for an MLLM in demonstrations: it looks at no picture and rewords the reference text.

    python -m data.stand_in -- COMMAND ...

runs COMMAND with OPENAI_BASE_URL set to a server on this machine, and ends with it. Its model is called
`stand-in-from-captions`, so every row, cache and card that it had a part in says so. Token counts are words.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from data.mllm.prompts import BODY_PARTS, MODALITIES

MODEL = "stand-in-from-captions"

# Words of a caption -> the labels that an MLLM would give.
_MODALITY_WORDS = {
    "radiograph": "X-Ray", "x-ray": "X-Ray", "computed tomography": "Computed Tomography",
    "magnetic resonance": "Magnetic Resonance Imaging", "ultrasound": "Ultrasound", "microscop": "Microscopy Images",
    "micrograph": "Microscopy Images", "histology": "Microscopy Images", "endoscop": "Endoscopy",
    "fundus": "Fundus Photography", "photo": "Digital Photography",
}  # fmt: skip
_BODY_PART_WORDS = {
    "hand": "Upper Limb", "knee": "Lower Limb", "kidney": "Abdomen", "heart": "Chest", "lung": "Chest",
    "thyroid": "Neck", "retina": "Eye", "gland": "Cell", "cells": "Cell",
    **{part.lower(): part for part in BODY_PARTS if part != "Others"},
}  # fmt: skip


def reply(body: Mapping[str, Any]) -> dict[str, Any]:
    """The chat completion for a request of the builder's."""
    content = body["messages"][0]["content"]
    prompt = content if isinstance(content, str) else "\n".join(p["text"] for p in content if p["type"] == "text")
    found = re.search(r"<reference>\n(.*)\n</reference>", prompt, re.DOTALL)
    caption, *mentions = found[1].split("\n\n") if found else ("An image that the stand-in cannot see.",)
    context = re.sub(r"\s*\((?:Fig|Figs|Figure|Figures)\b[^)]*\)", "", " ".join(mentions))
    low = f"{caption} {context}".lower()
    modality = next((label for word, label in _MODALITY_WORDS.items() if word in low), "Others")
    body_part = next((label for word, label in _BODY_PART_WORDS.items() if word in low), "Others")
    assert modality in MODALITIES and body_part in BODY_PARTS
    first = re.split(r"(?<=[.!?])\s", caption, maxsplit=1)[0]
    answer = {
        "description": f"{caption} {context}".strip(),
        "query": "What does this image show?" if "You see a figure" in prompt else "What do these images show?",
        "answer": first,
        "modality": modality,
        "body_part": body_part,
    }
    text = json.dumps(answer, ensure_ascii=False)
    usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(text.split())}
    return {
        "id": "stand-in",
        "object": "chat.completion",
        "created": 0,
        "model": MODEL,
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
        "usage": usage | {"total_tokens": sum(usage.values())},
    }


@contextmanager
def serve() -> Iterator[str]:
    """The server's base URL, while it runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            status, sent = 200, reply(json.loads(body))
        except (ValueError, KeyError, TypeError, IndexError):
            status, sent = 400, {"error": {"message": "expected a chat completion as the builder asks for it"}}
        content = json.dumps(sent).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data.stand_in", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs="+", help="what to run, after --")
    arguments = parser.parse_args()
    with serve() as url:
        environment = os.environ | {"OPENAI_BASE_URL": url, "NO_PROXY": "127.0.0.1"}
        return subprocess.run(arguments.command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

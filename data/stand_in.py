"""An endpoint that stands in for an MLLM in demonstrations: it looks at no picture and rewords the texts it is sent.

    python -m data.stand_in -- COMMAND ...

runs COMMAND with OPENAI_BASE_URL set to a server on this machine, and ends with it. Its model is called
`stand-in-from-captions`, so every row, cache and card that it had a part in says so. Token counts are words.
"""

from __future__ import annotations

import argparse
import hashlib
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

from data.filters.labels import body_part_of, modality_of
from data.phantom.facts import LETTERS
from data.phantom.records import render_multiple_choice
from data.phantom_cases import FOLLOW_UPS, QUESTION, rule_in, stated

MODEL = "stand-in-from-captions"


def reply(body: Mapping[str, Any]) -> dict[str, Any]:
    """The chat completion for a request of the builder's."""
    content = body["messages"][0]["content"]
    prompt = content if isinstance(content, str) else "\n".join(p["text"] for p in content if p["type"] == "text")
    told = _in_light_of_evidence(prompt, content) if "<target>" in prompt else _reworded(prompt)
    said = " ".join(told.values())
    labels = {"modality": modality_of(said) or "Others", "body_part": body_part_of(said) or "Others"}
    text = json.dumps(told | labels, ensure_ascii=False)
    usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(text.split())}
    return {
        "id": "stand-in",
        "object": "chat.completion",
        "created": 0,
        "model": MODEL,
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
        "usage": usage | {"total_tokens": sum(usage.values())},
    }


def _reworded(prompt: str) -> dict[str, str]:
    found = re.search(r"<reference>\n(.*)\n</reference>", prompt, re.DOTALL)
    caption, *mentions = found[1].split("\n\n") if found else ("An image that the stand-in cannot see.",)
    context = re.sub(r"\s*\((?:Fig|Figs|Figure|Figures)\b[^)]*\)", "", " ".join(mentions))
    return {
        "description": f"{caption} {context}".strip(),
        "query": "What does this image show?" if "You see a figure" in prompt else "What do these images show?",
        "answer": _first_sentence(caption),
    }


def _in_light_of_evidence(prompt: str, content: object) -> dict[str, str]:
    """The target's tags and, where they name a finding of data.phantom_cases, the follow-up that it calls for.

    The follow-up is the guideline's where one that was sent rules on such a finding; else it is guessed, each as often
    and another for every picture, as whoever does not know the guideline must. Tags without a finding are told with
    the first sentence of the similar case, which is all that a stand-in without eyes can do.
    """
    tags = re.search(r"<target>\n(.*)\n</target>", prompt, re.DOTALL)[1].strip().split("\n\n")[0]
    finding = stated(tags)
    if finding is None:
        case = re.search(r"<case>\n(.*?)\n</case>", prompt, re.DOTALL)
        said = " ".join(filter(None, (tags, _first_sentence(case[1].strip()) if case else "")))
        return {"description": said, "query": "What does this image show?", "answer": said}
    rules = dict(filter(None, map(rule_in, re.findall(r"<guideline [^>]*>\n(.*?)\n</guideline>", prompt, re.DOTALL))))
    pictures = json.dumps(content, sort_keys=True).encode()
    follow_up = rules.get(finding) or FOLLOW_UPS[hashlib.sha256(pictures).digest()[0] % len(FOLLOW_UPS)]
    return {
        "description": f"{tags}. The phantom guideline asks for {follow_up}.",
        "query": render_multiple_choice(QUESTION, FOLLOW_UPS),
        "answer": LETTERS[FOLLOW_UPS.index(follow_up)],
    }


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?])\s", text, maxsplit=1)[0]


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

"""An OpenAI-compatible endpoint on this machine that behaves as a test tells it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Sent:
    """What the server sends for one request."""

    body: Any  # str and bytes as they are, everything else as JSON
    status: int = 200
    delay: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)


def completion(text: str | None, **message: Any) -> dict[str, Any]:
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [
            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text, **message}}
        ],
        "usage": {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13},
    }


@dataclass
class Endpoint:
    url: str
    reply: Callable[[dict], Sent]  # request body -> what to send
    requests: list[dict] = field(default_factory=list)
    headers: list[dict] = field(default_factory=list)
    most_at_once: int = 0


@contextmanager
def endpoint(reply: Callable[[dict], Sent]) -> Iterator[Endpoint]:
    lock = threading.Lock()
    at_once = 0

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            nonlocal at_once
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                at_once += 1
                served.most_at_once = max(served.most_at_once, at_once)
                served.requests.append(body)
                served.headers.append({name.lower(): value for name, value in self.headers.items()})
            sent = served.reply(body)
            time.sleep(sent.delay)
            with lock:
                at_once -= 1
            as_json = not isinstance(sent.body, str | bytes)
            text = json.dumps(sent.body) if as_json else sent.body
            encoded = text.encode() if isinstance(text, str) else text
            try:
                self.send_response(sent.status)
                kind = {"Content-Type": "application/json" if as_json else "text/html"}
                for name, value in (kind | {"Content-Length": str(len(encoded))} | sent.headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(encoded)
            except ConnectionError:
                pass  # the client had no patience, as some test wants it

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    served = Endpoint(f"http://127.0.0.1:{server.server_address[1]}/v1", reply)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

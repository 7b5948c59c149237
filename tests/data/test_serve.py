"""The wire format, against a server that is not ours: `transformers serve` with a LLaVA of random weights."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.config import Reformat
from data.mllm.ask import Asker
from data.mllm.cache import AnswerCache
from tests.data.test_mllm import figure, picture
from tests.environments import python_with
from tests.evaluation.tiny import save_tiny_model

pytestmark = pytest.mark.slow

PACKAGES = (
    "fastapi==0.121.3", "starlette==0.50.0", "uvicorn==0.38.0", "click==8.3.1", "h11==0.16.0", "annotated-doc==0.0.4",
    "python-multipart==0.0.20",
)  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """(base URL, model)"""
    python = python_with("serving", PACKAGES)
    folder = tmp_path_factory.mktemp("serve")
    model = str(save_tiny_model(folder / "model"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        python,
        "-m",
        "transformers.cli.transformers",
        "serve",
        model,
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
    ]
    log = (folder / "log").open("w")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        for _ in range(1200):
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1", model
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()


@pytest.mark.parametrize("method", ["mllm_reformatted", "mllm_distill", "llm_reformatted"])
def test_requests_are_understood_and_counted(served: tuple[str, str], tmp_path: Path, method: str) -> None:
    url, model = served
    asked_with = Reformat(method=method, model=model, base_url=url, max_tokens=4, max_retries=0, timeout=120)

    async def ask() -> list:
        async with Asker(asked_with, cache, lambda f: [picture()] * len(f.image_sha256)) as asker:
            return [await asker.ask(figure(n=1)), await asker.ask(figure(n=2, n_images=2))]

    with AnswerCache(tmp_path, "0") as cache:
        states = {asked.state for asked in asyncio.run(ask())}
        # Four tokens of a random model are no answer; what counts is that they are one reply each, with its usage.
        assert states <= {"truncated", "invalid"}
        used = cache.usage()[False]
    assert used.uncounted == 0 and used.answers >= 2 and used.new_tokens <= 4 * used.answers
    assert used.prompt_tokens > 1000 * used.answers  # a byte a token: the whole prompt arrived

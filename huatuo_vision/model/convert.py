"""Turns an official checkpoint in the original LLaVA format into a plain transformers LLaVA folder.

`python -m huatuo_vision.model.convert --source FreedomIntelligence/HuatuoGPT-Vision-7B --out models/huatuo-7b`

`conversion.py` does it; README.md beside it has the table of names and what is guaranteed.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from pathlib import Path

from huatuo_vision.cli import run_command
from huatuo_vision.model.official import RELEASES


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m huatuo_vision.model.convert",
        description="Turn an official HuatuoGPT-Vision, LLaVA-1.5 or LLaVA-Med v1.5 checkpoint into a plain "
        "transformers LLaVA folder.",
    )
    parser.add_argument("--source", required=True, metavar="DIR_OR_ID", help="the official checkpoint")
    parser.add_argument("--revision", metavar="R", help="branch, tag, commit or refs/pr/N of a Hub id")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write, must not exist")
    parser.add_argument(
        "--prompt", choices=list(RELEASES), help="whose prompt the checkpoint answers, if not what its config shows"
    )
    parser.add_argument(
        "--vision-tower", metavar="DIR_OR_ID", help="the CLIP to use, if not the one that the checkpoint names"
    )
    parser.add_argument("--vision-tower-revision", metavar="R", help="revision of a Hub id, as --revision")
    arguments = parser.parse_args()
    from huatuo_vision.model.conversion import convert

    stopped = threading.Event()

    def stop(*_: object) -> None:
        stopped.set()
        sys.exit(143)

    # Without this a stopped conversion would leave its half-written folder behind.
    signal.signal(signal.SIGTERM, stop)
    try:
        convert(
            arguments.source,
            arguments.out,
            revision=arguments.revision,
            prompt=arguments.prompt,
            vision_tower=arguments.vision_tower,
            vision_tower_revision=arguments.vision_tower_revision,
        )
    except ValueError:
        # What is raised while safetensors reads comes out as an error of its own.
        if not stopped.is_set():
            raise
        sys.exit(143)


if __name__ == "__main__":
    run_command(main)

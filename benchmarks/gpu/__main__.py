"""What the training step reaches on one GPU, in one unattended call.

    python -m benchmarks.gpu --out gpu-results

Checks that packed attention and a packed model are right, then times the project's own trainer on 1.5-8B LLaVAs with
random weights. Every result is written to results.jsonl as it comes; what fails or no longer fits into --minutes is
named with its reason. Needs torch, transformers, accelerate, peft, rich and Pillow; compares TRL where it is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of the results (gpu-results)")
    parser.add_argument("--minutes", type=float, default=8.0, help="no case begins that would end later (8)")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="only cases whose name has one of these")
    parser.add_argument("--toy", action="store_true", help="toy sizes on the CPU; its figures mean nothing")
    parser.add_argument("--list", action="store_true", help="name the cases and end")
    return parser.parse_args()


def main() -> int:
    started = time.monotonic()
    args = parse_arguments()
    if args.toy:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Rows differ in length, so blocks of every size come and go.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    import torch
    from rich.console import Console

    from benchmarks.gpu.cases import Bench, all_cases, attempt
    from benchmarks.gpu.report import line_of, tables

    if not (args.toy or torch.cuda.is_available()):
        sys.stderr.write("error: no CUDA device; --toy runs every case at toy size on the CPU\n")
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    console = Console(width=150, highlight=False)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch, (args.out / "log.txt").open("w") as log:
        bench = Bench(torch.device("cpu" if args.toy else "cuda"), args.toy, args.out, Path(scratch))
        cases = [case for case in all_cases(bench) if not args.only or any(text in case.name for text in args.only)]
        if args.list:
            for case in cases:
                console.print(f"{case.name}  (about {case.seconds} s)")
            return 0
        for case in cases:
            elapsed = time.monotonic() - started
            result: dict[str, Any] = {"case": case.name, "started_s": round(elapsed, 1)}
            if elapsed + case.seconds > args.minutes * 60:
                result |= {"status": "not run: time"}
            else:
                result |= attempt(case, bench, log)
                result["took_s"] = round(time.monotonic() - started - elapsed, 1)
            results.append(result)
            with (args.out / "results.jsonl").open("a") as file:
                file.write(json.dumps(result) + "\n")
            console.print(line_of(result))
    for table in tables(results):
        console.print(table)
    failed = [result for result in results if result["status"].startswith("failed")]
    console.print(f"{len(results)} cases in {time.monotonic() - started:.0f} s, {len(failed)} failed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())

"""Talks to a model in the terminal, with any number of images at any turn.

`python -m huatuo_vision.chat --model models/huatuo-7b --image scan.png`

The model is a folder that train.py or model.convert wrote, an adapter's folder, or a Hub id. Reads questions and
commands from stdin, a line each, so a file or a pipe asks as a person would: answers alone go to stdout then, and the
first thing that goes wrong ends it, because a question is never asked without its image.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from huatuo_vision.cli import run_command
from huatuo_vision.schema import UserError

if TYPE_CHECKING:
    from huatuo_vision.conversation import Conversation

COMMANDS = "/image FILE ... shows images with the next question, /clear starts over, /quit ends; Ctrl-C stops an answer"


def talk(conversation: Conversation, console: Console, *, interactive: bool) -> None:
    """Answers stdin's lines until it ends. Raises UserError for what goes wrong, unless a person is there to read."""
    for line in _lines(conversation, interactive=interactive):
        try:
            if line == "/quit":
                return
            if line.startswith("/"):
                _obey(line, conversation, console)
            elif line:
                _answer(line, conversation, console, interactive=interactive)
        except UserError as error:
            if not interactive:
                raise
            console.print(str(error), style="red", markup=False)


def _lines(conversation: Conversation, *, interactive: bool) -> Iterator[str]:
    if not interactive:
        yield from (line.strip() for line in sys.stdin)
        return
    import readline  # noqa: F401, editing and history for input()

    while True:
        images = len(conversation.pending)
        shown = f" [{images} image{'s' if images > 1 else ''}]" if images else ""
        try:
            yield input(f"\nyou{shown}: ").strip()
        except KeyboardInterrupt:  # as in a shell: this line is taken back
            continue
        except EOFError:
            sys.stdout.write("\n")
            return


def _obey(line: str, conversation: Conversation, console: Console) -> None:
    try:
        command, *words = shlex.split(line)
    except ValueError as error:
        raise UserError(f"{line}: {error}; put a name with blanks between quotes") from None
    if command == "/image" and words:
        before = len(conversation.pending)
        try:
            for word in words:
                notes = conversation.add_image(Path(word).expanduser())
                if notes:
                    console.print(f"{word}: {', '.join(notes)}", style="dim")
        except UserError:
            del conversation.pending[before:]  # the images of a command are shown all or not at all
            raise
    elif command == "/clear" and not words:
        conversation.clear()
    elif line == "/help":
        console.print(COMMANDS, style="dim")
    else:
        raise UserError(f"{line} is no command; {COMMANDS}")


def _answer(question: str, conversation: Conversation, console: Console, *, interactive: bool) -> None:
    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    if interactive:
        show("\nmodel: ")
    if not conversation.ask(question, show).strip():
        console.print("(the model ended its answer at once)", style="dim", end="")
    show("\n" if interactive else "\n\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m huatuo_vision.chat",
        description="Talk to a model in the terminal.",
        epilog=f"Commands: {COMMANDS}.",
    )
    parser.add_argument("--model", required=True, metavar="DIR_OR_ID", help="model folder, adapter folder or Hub id")
    parser.add_argument(
        "--image", nargs="+", action="extend", default=[], metavar="FILE", help="images of the first question, in order"
    )
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy; the checkpoint's own otherwise")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="of an answer; the checkpoint's own otherwise")
    parser.add_argument(
        "--repetition-penalty", type=float, metavar="P", help="over the answer's tokens; the checkpoint's own otherwise"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="the same answers to the same questions, also sampled")
    arguments = parser.parse_args()
    for flag, value, least in (
        ("--temperature", arguments.temperature, 0),
        ("--max-new-tokens", arguments.max_new_tokens, 1),
        ("--repetition-penalty", arguments.repetition_penalty, 0.01),
    ):
        if value is not None and value < least:
            raise UserError(f"{flag} {value:g} is too small; expected {least:g} or more")

    interactive = sys.stdin.isatty()
    console = Console(stderr=True, highlight=False, soft_wrap=not interactive)
    with console.status(f"loading {arguments.model}"):
        import torch

        from huatuo_vision.conversation import Decoding, described, start
        from huatuo_vision.model.folder import find_model

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        wanted = Decoding(arguments.temperature, arguments.max_new_tokens, arguments.repetition_penalty)
        conversation = start(find_model(arguments.model), device, wanted)
    if arguments.seed is not None:
        torch.manual_seed(arguments.seed)
    for path in arguments.image:
        _obey(shlex.join(["/image", path]), conversation, console)
    if interactive:
        console.print(f"{arguments.model} on {device}: {described(conversation)}", style="dim")
        console.print(f"{COMMANDS}\nResearch software, no medical device.", style="dim")
    talk(conversation, console, interactive=interactive)


if __name__ == "__main__":
    run_command(main)

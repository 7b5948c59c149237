"""What every command of the project has in common: a user's mistake is one sentence and exit code 2; a run that was
stopped and goes on with the same command says so with exit code 75."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from rich.console import Console
from rich.text import Text

from huatuo_vision.redaction import redact
from huatuo_vision.schema import UserError

START_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: a temporary failure, the same command later succeeds


class Stopped(SystemExit):
    """The run was asked to stop and did; the sentence says where. No error, so that nothing on the way handles it."""


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's `main` and exit with its code (None is 0), with 2 after a UserError, or with 75 after Stopped;
    both are said on stderr."""
    sys.excepthook = _show_redacted
    try:
        code = main()
    except Stopped as stopped:
        Console(stderr=True).print(Text(str(stopped)), soft_wrap=True)
        code = START_AGAIN
    except UserError as error:
        code = _refuse(str(error))
    except Exception as error:
        if not no_room(error):
            raise
        code = _refuse(f"no room to write ({error}); make some, and start the same command again")
    sys.exit(code or 0)


def _refuse(sentence: str) -> int:
    message = Text.assemble(("error: ", "bold red"), redact(sentence))
    Console(stderr=True).print(message, soft_wrap=True)
    return 2


def _show_redacted(*error: Any) -> None:
    """A traceback may quote an address or a header with a key in it."""
    sys.stderr.write(redact("".join(traceback.format_exception(*error))))


def no_room(error: BaseException) -> bool:
    """Whether it is a full disk's, a quota's or a size limit's; safetensors and torch only say so in words."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    words = ("No space left on device", "Disk quota exceeded", "File too large", "enforce fail at inline_container.cc")
    return any(said in str(error) for said in words)

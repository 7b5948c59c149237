"""What every command of the project has in common: a user's mistake is one sentence and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from rich.console import Console
from rich.text import Text

from huatuo_vision.schema import UserError


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's `main` and exit with its code (None is 0), or with 2 after a UserError, said on stderr."""
    try:
        code = main()
    except UserError as error:
        message = Text.assemble(("error: ", "bold red"), str(error))
        Console(stderr=True).print(message, soft_wrap=True)
        code = 2
    sys.exit(code or 0)

"""What a scheduler sends before it kills, SIGTERM and SIGUSR1: the run saves, stops, and asks to be started again.

While a phase trains a signal is only noted. The processes agree on the step after which all of them stop, and write
one checkpoint together. Anywhere else all that is worth keeping is on disk already, and the run stops at once.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from huatuo_vision.cli import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Listens for the signals inside its `with`; for the main thread."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._training = False
        self._process = os.getpid()

    @property
    def asked(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def while_training(self) -> Iterator[None]:
        """Inside, a signal is noted; whoever trains looks at `asked`."""
        self._training = True
        try:
            yield
        finally:
            self._training = False
        if self.asked:  # too late for a step to be the last; the phase is finished
            self._stop()

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        # Data-loading processes inherit the handler, and a scheduler signals them too: the last step needs them.
        if not self._training and os.getpid() == self._process:
            self._stop()

    def _stop(self) -> None:
        raise Stopped(f"stopped by {self.signal.name}; the same command goes on from here")

"""Ctrl-C and SIGTERM as a request to stop after the step at hand."""

import os
import signal
from types import FrameType
from typing import NoReturn


class Interruption:
    """Remembers the first signal, so that the loop can finish its step; a second one quits at once.

    >>> with Interruption() as interruption:
    ...     print(interruption.exit_status)
    None
    """

    def __init__(self) -> None:
        self.exit_status: int | None = None

    def __enter__(self) -> "Interruption":
        signals = (signal.SIGINT, signal.SIGTERM)
        self._previous = {number: signal.signal(number, self._receive) for number in signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.exit_status is not None:
            self._quit(number)
        self.exit_status = 128 + number  # the status that shells give a process ended by a signal

    @staticmethod
    def _quit(number: int) -> NoReturn:
        os._exit(128 + number)

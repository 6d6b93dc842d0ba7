"""Ctrl-C and SIGTERM: a run that can keep its state does so before it stops.

Between steps a run asks `is_asked`. Where it could only lose something by going on, the signal
raises at once; so does a second one.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["StoppedError", "end_with_parent", "handle_signals", "is_asked", "while_steps_run"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class StoppedError(KeyboardInterrupt):
    """The user has stopped the run, of which ``where`` says how far it is kept."""

    def __init__(self, number: int, where: str = "") -> None:
        super().__init__(number, where)
        self.number, self.where = number, where


class _State:
    waits = False  # whether someone is going to ask
    number = 0  # of the signal


def is_asked() -> int:
    """Return the number of the signal that asked to stop; 0 if none has."""
    return _State.number


@contextmanager
def handle_signals() -> Iterator[None]:
    """Let the signals stop the ``with`` block by a `StoppedError`, now or when it asks."""
    before = {number: signal.signal(number, _handle) for number in SIGNALS}
    _State.number = 0
    try:
        yield
    finally:
        _State.number = 0
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def while_steps_run() -> Iterator[None]:
    """Let a signal wait, as the ``with`` block asks after each step."""
    _State.waits = True
    try:
        yield
    finally:
        _State.waits = False


def end_with_parent() -> None:
    """Leave Ctrl-C to the process that started this one; on Linux, end when that has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        import ctypes  # which no other process needs

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _handle(number: int, frame: Any) -> None:
    again, _State.number = bool(_State.number), number
    if again or not _State.waits:
        raise StoppedError(number)

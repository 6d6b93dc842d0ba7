"""The lines of the user's own code: for messages, which name where something stands."""

import linecache
import sys
import traceback
from functools import cache
from types import FrameType

import torch

__all__ = ["Line", "current_line", "is_of_torch", "user_line"]

_OURS = __file__.rpartition("/")[0] + "/"
_TORCH = torch.__file__.rpartition("/")[0] + "/"


class Line(tuple[str, int]):
    """A file and a number in it; its text is read only where it is printed."""

    def __str__(self) -> str:
        filename, number = self
        return f"{filename}:{number}: `{linecache.getline(filename, number).strip()}`"


def is_of_torch(filename: str) -> bool:
    """Tell whether code of this file belongs to torch."""
    return filename.startswith(_TORCH)


@cache  # asked for each frame below each value
def _is_of_user(filename: str) -> bool:
    return not filename.startswith((_TORCH, _OURS, "<")) and "importlib" not in filename


def current_line() -> Line:
    """Return the line of the user's own code that is running: neither torch's nor ours."""
    innermost = sys._getframe(1)
    frame: FrameType | None = innermost
    while frame is not None and not _is_of_user(frame.f_code.co_filename):
        frame = frame.f_back
    found = frame or innermost
    return Line((found.f_code.co_filename, found.f_lineno))


def user_line(error: BaseException) -> Line:
    """Return the last line of the user's own code that ``error`` passed."""
    stack = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in stack if _is_of_user(frame.filename)] or list(stack)
    return Line((own[-1].filename, own[-1].lineno or 0))

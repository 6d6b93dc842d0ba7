"""What a user names as ``package.module:name``: their own model, data, strategy or rule."""

import importlib
import os
import sys
from typing import Any

from ..errors import nearest

__all__ = ["import_own"]


def import_own(name: str, what: str, error: type[Exception]) -> Any:
    """Import it; the current folder counts too, as with ``python -m``.

    Args:
        name: "package.module:name".
        what: it is for, as an error says it.
        error: what to raise if there is no such thing.
    """
    module_name, _, attribute = name.partition(":")
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append("")
    try:
        module = importlib.import_module(module_name)
    except Exception as found:  # importing runs the user's code, which may raise anything
        raise error(
            f"cannot import {module_name!r} for {what} {name!r}: {type(found).__name__}: {found}"
        ) from found
    value: object = getattr(module, attribute, None)
    if value is None:
        public = [key for key in vars(module) if not key.startswith("_")]
        raise error(
            f"module {module_name!r} has no {attribute!r}. Nearest: {nearest(attribute, public)}"
        )
    return value

"""One file per run: everything that the rest of the run depends on."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError

__all__ = ["load_checkpoint", "save_checkpoint"]


def save_checkpoint(path: Path, fingerprint: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write ``state`` to ``path``, which holds the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    torch.save({"fingerprint": dict(fingerprint), "state": dict(state)}, partial)
    os.replace(partial, path)


def load_checkpoint(path: Path, fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Read the state that `save_checkpoint` wrote to ``path`` for the same ``fingerprint``.

    Raises:
        CheckpointError: if there is no such file, it is no checkpoint, or another run wrote it.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; leave out --resume to start a run")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        theirs, state = content["fingerprint"], content["state"]
    except Exception as error:  # torch.load raises a different class for each kind of damage
        raise CheckpointError(f"{path} is not a checkpoint of fxlocal train: {error}") from error
    differences = [
        f"{key} is {theirs.get(key)!r} there and {fingerprint.get(key)!r} here"
        for key in sorted({*theirs, *fingerprint})
        if theirs.get(key) != fingerprint.get(key)
    ]
    if differences:
        raise CheckpointError(f"{path} is of another run: {'; '.join(differences)}")
    return dict(state)

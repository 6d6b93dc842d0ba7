"""One file per run: everything that the rest of the run depends on."""

import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ...errors import CheckpointError
from ..data.images import Images, InMemory
from .settings import Experiment

__all__ = ["build_fingerprint", "load_checkpoint", "save_checkpoint", "save_file"]

SAMPLED = 16  # images, or up to twice as many, tell one set from another


def build_fingerprint(experiment: Experiment) -> dict[str, Any]:
    """Return what tells one run from another, but for the model."""
    data = experiment.data
    parts = ", ".join(map(_describe, (data.train, data.test)))
    return {
        "data": f"{data.name} {data.shape}, {data.num_classes} classes, {parts} images",
        "strategy": experiment.strategy,
        "schedule": repr(experiment.schedule),
        "seed": experiment.seed,
        "modulation": experiment.modulation,
        **asdict(experiment.settings),
    }


def _describe(images: Images) -> str:
    """Return the number of images and, of those in memory, a checksum of the labels and of some."""
    num = len(images)  # type: ignore[arg-type]  # ours have a length
    if not isinstance(images, InMemory):
        return str(num)
    some = images.images[:: max(1, num // SAMPLED)]
    checksum = zlib.crc32(some.numpy().tobytes(), zlib.crc32(images.labels.numpy().tobytes()))
    return f"{num} ({checksum:08x})"


def save_checkpoint(path: Path, fingerprint: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write ``state`` to ``path``, as `save_file` does."""
    save_file(path, {"fingerprint": dict(fingerprint), "state": dict(state)})


def save_file(path: Path, content: Mapping[str, Any]) -> None:
    """Write to ``path``, which holds the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    torch.save(content, partial)
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

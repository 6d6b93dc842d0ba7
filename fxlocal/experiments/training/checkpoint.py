"""One file per run: everything that the rest of the run depends on.

The file is what `torch.save` makes of plain values and tensors, so that ``torch.load`` shows it,
with a line behind it that holds a checksum of all before. Reading it runs no code of the file's.
"""

import hashlib
import io
import os
import shlex
import sys
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset

from ...errors import CheckpointError
from ...runtime.checkpoint import identify
from ..data.images import Images, InMemory
from ..files import write_file
from .measure import find_versions
from .settings import Experiment, build_scheduler

__all__ = [
    "build_fingerprint",
    "command_line",
    "holds",
    "load_checkpoint",
    "read_checkpoint",
    "save_checkpoint",
    "save_file",
]

FORMAT = 2  # of the file; 1 had no checksum
SAMPLED = 16  # images, or up to twice as many, tell one set from another
_RATES = "learning rates"  # which may depend on the number of epochs
_MARK = b"\nfxlocal checkpoint, sha256 "
_TABLES = ("versions", "fingerprint", "state")
_PARTS = ("format", "command", *_TABLES)


def command_line() -> str:
    """Return the command as a shell takes it."""
    return shlex.join(["fxlocal", *sys.argv[1:]])


def build_fingerprint(experiment: Experiment) -> dict[str, Any]:
    """Return what tells one run from another, but for the model."""
    data = experiment.data
    parts = ", ".join(map(_describe, (data.train, data.test)))
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=experiment.settings.lr)
    scheduler = build_scheduler(optimizer, experiment.settings)
    return {
        "data": f"{data.name} {data.shape}, {data.num_classes} classes, {parts} images",
        "classes": ", ".join(data.classes),
        "strategy": experiment.strategy,
        "schedule": identify(experiment.schedule),
        "seed": experiment.seed,
        "modulation": experiment.modulation,
        "amp": experiment.machine.amp,
        _RATES: repr(scheduler.state_dict()),  # which need not depend on the number of epochs
        **asdict(experiment.settings),
    }


def _inside(images: Images) -> Images:
    return _inside(images.dataset) if isinstance(images, Subset) else images


def _describe(images: Images) -> str:
    """Return the number of images and a checksum.

    Of those in memory it is that of the labels and some images; of files, of their names, sizes and
    labels; of those chosen from others, of which they are too.
    """
    num = len(images)  # type: ignore[arg-type]  # ours have a length
    if isinstance(images, InMemory):
        some = images.images[:: max(1, num // SAMPLED)]
        checksum = zlib.crc32(some.numpy().tobytes(), zlib.crc32(images.labels.numpy().tobytes()))
        return f"{num} ({checksum:08x})"
    inside = _inside(images)
    files, root = getattr(inside, "samples", None), getattr(inside, "root", "")
    if files is None:
        return str(num)
    checksum = zlib.crc32(repr(images.indices).encode()) if isinstance(images, Subset) else 0
    for name, label in files:
        told = f"{os.path.relpath(name, root)} {os.stat(name).st_size} {label}\n"
        checksum = zlib.crc32(told.encode(), checksum)
    return f"{num} ({checksum:08x})"


def save_checkpoint(path: Path, fingerprint: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write ``state`` to ``path``, which holds the old file or the new one, never half of one."""
    content = (FORMAT, command_line(), find_versions(), dict(fingerprint), dict(state))
    packed = _packed(dict(zip(_PARTS, content, strict=True)))
    checksum = hashlib.sha256(packed.getbuffer()).hexdigest().encode()
    packed.write(_MARK + checksum + b"\n")
    write_file(path, packed.getbuffer())


def save_file(path: Path, content: Mapping[str, Any]) -> None:
    """Write to ``path``, which holds the old file or the new one, never half of one."""
    write_file(path, _packed(content).getbuffer())


def _packed(content: Mapping[str, Any]) -> io.BytesIO:
    """Return what `torch.save` makes of it, ready to be written behind."""
    packed = io.BytesIO()
    torch.save(content, packed)
    packed.seek(0, io.SEEK_END)
    return packed


def holds(path: Path, fingerprint: Mapping[str, Any]) -> bool:
    """Tell whether there is a checkpoint at ``path``, and it is of this ``fingerprint``.

    Raises:
        CheckpointError: if what is there is no checkpoint.
    """
    if not path.is_file():
        return False
    theirs = read_checkpoint(path)["fingerprint"]
    return all(theirs.get(name) == value for name, value in fingerprint.items())


def load_checkpoint(path: Path, fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Read the state that `save_checkpoint` wrote to ``path`` for the same ``fingerprint``.

    Raises:
        CheckpointError: if there is no such file, it is no checkpoint, or another run wrote it.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; leave out --resume to start a run")
    content = read_checkpoint(path)
    if differences := _differences(content["fingerprint"], fingerprint):
        raise CheckpointError(f"{path} is of another run: {'; '.join(differences)}")
    return dict(content["state"])


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint of this format; a CheckpointError if it is not whole."""
    refusal = f"{path} is not a checkpoint of fxlocal train: "
    packed = path.read_bytes()
    content, mark, checksum = packed.rpartition(_MARK)
    if not packed:
        raise CheckpointError(refusal + "it is empty")
    if not mark:
        raise CheckpointError(
            refusal + "it does not end with a checksum: it was cut short, or something else, or a "
            "version of fxlocal before checksums, wrote it"
        )
    if hashlib.sha256(content).hexdigest().encode() + b"\n" != checksum:
        raise CheckpointError(refusal + "it is damaged: its bytes have another checksum")
    try:
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        missing = [part for part in _PARTS if part not in found]
        missing += [part for part in _TABLES if not isinstance(found.get(part), dict)]
    except Exception as error:  # torch.load raises a different class for each kind of damage
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(refusal + reason) from error
    if missing:
        raise CheckpointError(refusal + f"it has no {', '.join(dict.fromkeys(missing))}")
    if found["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {found['format']}, of fxlocal {found['versions'].get('fxlocal')}; "
            f"this is fxlocal {find_versions()['fxlocal']}, which reads format {FORMAT}"
        )
    return dict(found)


def _differences(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> list[str]:
    """Say which fields differ; epochs may be more, if nothing that they decide differs."""
    names = sorted({*theirs, *mine})
    differing = {name for name in names if theirs.get(name) != mine.get(name)}
    if differing == {"epochs"} and theirs["epochs"] < mine["epochs"]:
        return []
    told = []
    for name in names:
        if name in differing and name != _RATES:
            there, here = _narrow(theirs.get(name), mine.get(name))
            told.append(f"{name} is {there!r} there and {here!r} here")
    if differing == {"epochs", _RATES}:
        told.append(f"lr_schedule {mine['lr_schedule']!r} goes by the number of epochs")
    return told


def _narrow(there: Any, here: Any) -> tuple[Any, Any]:
    """Return of two long texts the parts that differ, if they have as many."""
    if not isinstance(there, str) or not isinstance(here, str) or len(there) < 80:
        return there, here
    pairs = list(zip(there.split(", "), here.split(", "), strict=False))
    if there.count(", ") != here.count(", "):
        return there, here
    return ", ".join(a for a, b in pairs if a != b), ", ".join(b for a, b in pairs if a != b)

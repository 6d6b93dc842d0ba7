"""Weights to begin with: a file's, or published ones of torchvision or timm."""

import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from .catalogue import ModelError

__all__ = ["load_weights"]

# Where trainers keep the model's state in theirs, and what wrappers put before each name.
_PLACES = ("state_dict", "model_state_dict", "model", "state", "driver", "model_ema", "net")
_PREFIXES = ("module.", "_orig_mod.", "model.")


def load_weights(model: nn.Module, source: str) -> str:
    """Load what fits by name and shape into ``model``, in place; return a line that says what did.

    Args:
        model: its other weights stay.
        source: a file of safetensors, or of `torch.save`, read without running code; of the
            latter also a checkpoint that holds the model's state, ours among them. Or
            ``torchvision:ResNet18_Weights.IMAGENET1K_V1``, ``timm:resnet18.a1_in1k``: published
            ones, downloaded by these packages.

    Raises:
        ModelError: if there is no such file, it holds no tensors, or none of them fits.
    """
    theirs, mine = _unwrapped(_read(source), source), model.state_dict()
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in theirs) and not theirs.keys() & mine.keys():
            theirs = {name.removeprefix(prefix): tensor for name, tensor in theirs.items()}
    shared = [name for name in mine if name in theirs]
    taken = {name: theirs[name] for name in shared if theirs[name].shape == mine[name].shape}
    learned = {name for name, _ in model.named_parameters()}
    if not learned & taken.keys():
        if shared:  # and each of another shape
            name = shared[0]
            shapes = f"{tuple(theirs[name].shape)} there, {tuple(mine[name].shape)} in the model"
            raise ModelError(
                f"--weights {source}: nothing in it fits the model: {name} is {shapes}"
            )
        raise ModelError(
            f"--weights {source}: nothing in it fits the model by name: it has {_some(theirs)}, "
            f"the model {_some(mine)}"
        )
    model.load_state_dict(taken, strict=False)
    odd = {
        "of another shape there": [n for n in shared if n not in taken],
        "not there": [name for name in mine if name not in theirs and name in learned],
        "not in the model": [name for name in theirs if name not in mine],
    }
    notes = [f"; {len(names)} {what} ({_some(names)})" for what, names in odd.items() if names]
    return f"weights: {len(taken)} of {len(mine)} tensors from {source}{''.join(notes)}"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _read(source: str) -> Any:
    kind, _, name = source.partition(":")
    if kind in ("torchvision", "timm") and not Path(source).exists():
        return _published(source, kind, name)
    path = Path(source).expanduser()
    if not path.is_file():
        raise ModelError(f"--weights {source}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both raise a different class for each kind of damage
        raise ModelError(
            f"--weights {source}: neither safetensors nor a whole state dict that torch.save wrote "
            f"and torch.load(weights_only=True) reads ({type(error).__name__})"
        ) from error


def _published(source: str, kind: str, name: str) -> Any:
    try:
        if kind == "torchvision":
            return torchvision.models.get_weight(name).get_state_dict(check_hash=True)
        return importlib.import_module("timm").create_model(name, pretrained=True).state_dict()
    except ImportError as error:
        raise ModelError(f"--weights {source}: needs timm: pip install timm") from error
    except Exception as error:  # an unknown name, or no network, each by a class of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"--weights {source}: {reason[:160]}") from error


def _unwrapped(content: Any, source: str) -> dict[str, Tensor]:
    """Return the model's state dict in what was saved."""
    found = content
    while isinstance(found, Mapping):
        tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
        inside = next((found[p] for p in _PLACES if isinstance(found.get(p), Mapping)), None)
        if inside is None:
            if tensors:
                return tensors
            break
        found = inside
    what = f"a {type(content).__name__}"
    what += f" of {_some(map(str, content))}" if isinstance(content, Mapping) else ""
    raise ModelError(f"--weights {source}: it holds no state dict of a model, but {what}")

"""Models by name: ours for small images, any of torchvision's, or any factory of the user's."""

import importlib
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeAlias

import torchvision
from torch import nn
from torchvision.models.resnet import Bottleneck

from ...errors import nearest
from ...ir.random_state import seeded
from ..own import RAISED, import_own
from . import networks

__all__ = ["MODELS", "ModelError", "build_model"]

_Factory: TypeAlias = Callable[..., object]


def _cifar_resnet(blocks: int) -> tuple[str, int, _Factory]:
    depth = f"{'one block' if blocks == 1 else f'{blocks} blocks'} each"
    return f"ResNet of 3 stages, {depth}", 16, partial(networks.resnet, blocks=[blocks] * 3)


def _vgg(*convs: int) -> tuple[str, int, _Factory]:
    return "VGG with batch norm and one linear layer", 64, partial(networks.vgg, convs=convs)


# Name: what it is, its usual width, and what builds it from in_channels, num_classes and width.
_NETWORKS: dict[str, tuple[str, int, _Factory]] = {
    "resnet8": _cifar_resnet(1),
    "resnet14": _cifar_resnet(2),
    "resnet20": _cifar_resnet(3),
    "resnet32": _cifar_resnet(5),
    "resnet110": _cifar_resnet(18),
    "resnet18": ("ResNet-18 with a 3x3 stem", 64, partial(networks.resnet, blocks=[2] * 4)),
    "resnet34": ("ResNet-34 with a 3x3 stem", 64, partial(networks.resnet, blocks=[3, 4, 6, 3])),
    "resnet50": (
        "ResNet-50 with a 3x3 stem",
        64,
        partial(networks.resnet, blocks=[3, 4, 6, 3], block=Bottleneck),
    ),
    "vgg13": _vgg(2, 2, 2, 2, 2),
    "vgg16": _vgg(2, 2, 3, 3, 3),
    "vgg16-backlink": (
        *("VGG-16 with three linear layers and dropout", 64),
        partial(networks.vgg, convs=[2, 2, 3, 3, 3], linear=3),
    ),
    "vgg19": _vgg(2, 2, 4, 4, 4),
    "mobilenetv2": ("MobileNetV2 with small strides", 32, networks.mobilenetv2),
    "alexnet": ("AlexNet with 3x3 kernels and batch norm", 64, networks.alexnet),
    "cnn2": ("two 5x5 convolutions with batch norm", 64, networks.cnn2),
    "unet": ("U-Net of depth 4: logits per pixel", 64, networks.unet),
}

MODELS = {name: description for name, (description, _, _) in _NETWORKS.items()} | {
    "torchvision:NAME": "any model of torchvision, with random weights",
    "timm:NAME": "any model of timm, if it is installed, with random weights",
    "package.module:factory": "what your own function or class returns",
}


class ModelError(ValueError):
    """There is no such model, or it cannot be built as asked."""


def build_model(
    name: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    width: int | None = None,
    seed: int | None = None,
) -> nn.Module:
    """Build a model by name; see `MODELS`.

    A factory gets ``num_classes`` if it takes it, by name or as any keyword, and ``in_channels``
    and ``width`` if it names them.

    Args:
        name: one of `MODELS`, "torchvision:" or "timm:" and a name, or
            "package.module:factory".
        num_classes: number of logits.
        in_channels: channels of the images.
        width: channels of the first stage; None for the usual one.
        seed: fixes the weights, and leaves the global random state alone; None draws from it.

    Raises:
        ModelError: if there is no such model, or it cannot be built as asked.

    Example:
        >>> model = build_model("resnet8", num_classes=10, in_channels=1, seed=0)
        >>> model(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    sizes = {"num_classes": num_classes, "in_channels": in_channels, "width": width}
    for option, value in sizes.items():
        if value is not None and value < 1:
            raise ModelError(f"{option} of {name!r} must be 1 or more, not {value}")
    factory, options = _find(name, num_classes, in_channels, width)
    with nullcontext() if seed is None else seeded(seed):
        return _called(name, factory, options)


def _find(
    name: str, num_classes: int, in_channels: int, width: int | None
) -> tuple[_Factory, dict[str, Any]]:
    """Return what builds the model, and its arguments; imports, which may draw, end here."""
    if name in _NETWORKS:
        _, usual_width, build = _NETWORKS[name]
        sizes = {"in_channels": in_channels, "num_classes": num_classes}
        return build, {**sizes, "width": width or usual_width}
    if name.startswith("torchvision:"):
        return _find_torchvision(name, num_classes, in_channels, width)
    if name.startswith("timm:"):
        return _find_timm(name, num_classes, in_channels, width)
    if ":" in name:
        return _find_own(name, num_classes, in_channels, width)
    raise ModelError(
        f"unknown model {name!r}. Nearest: {nearest(name, _NETWORKS)}; "
        "or give 'torchvision:NAME' or 'package.module:factory', or 'timm:NAME'"
    )


def _find_torchvision(
    name: str, num_classes: int, in_channels: int, width: int | None
) -> tuple[_Factory, dict[str, Any]]:
    asked = name.removeprefix("torchvision:")
    known = torchvision.models.list_models()
    if asked not in known:
        raise ModelError(f"torchvision has no model {asked!r}. Nearest: {nearest(asked, known)}")
    if in_channels != 3:
        raise ModelError(
            f"{name!r} takes images of 3 channels, not {in_channels}: choose other data, or one of "
            + ", ".join(_NETWORKS)
        )
    if width is not None:
        raise ModelError(f"{name!r} has a fixed width: leave width={width} out")
    build = torchvision.models.get_model_builder(asked)
    options: dict[str, Any] = {"weights": None, "num_classes": num_classes}
    if "weights_backbone" in inspect.signature(build).parameters:
        options["weights_backbone"] = None  # the default downloads them
    return build, options


def _find_timm(
    name: str, num_classes: int, in_channels: int, width: int | None
) -> tuple[_Factory, dict[str, Any]]:
    asked = name.removeprefix("timm:")
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise ModelError(f"{name!r} needs timm: pip install timm") from error
    if not timm.is_model(asked):
        raise ModelError(
            f"timm has no model {asked!r}. Nearest: {nearest(asked, timm.list_models())}"
        )
    if width is not None:
        raise ModelError(f"{name!r} has a fixed width: leave width={width} out")
    build = partial(timm.create_model, asked)
    return build, {"pretrained": False, "num_classes": num_classes, "in_chans": in_channels}


def _find_own(
    name: str, num_classes: int, in_channels: int, width: int | None
) -> tuple[_Factory, dict[str, Any]]:
    factory = _imported(name)
    parameters = inspect.signature(factory).parameters
    if width is not None and "width" not in parameters:
        raise ModelError(f"{name!r} takes no width: leave width={width} out")
    options: dict[str, Any] = {}
    if "num_classes" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        options["num_classes"] = num_classes
    if "in_channels" in parameters:
        options["in_channels"] = in_channels
    if width is not None:
        options["width"] = width
    return factory, options


def _imported(name: str) -> _Factory:
    factory: Any = import_own(name, "model", ModelError)
    if isinstance(factory, nn.Module) or not callable(factory):
        raise ModelError(f"{name!r} is a {type(factory).__name__}, not a function that builds one")
    return factory  # type: ignore[no-any-return]


def _called(name: str, factory: _Factory, options: dict[str, Any]) -> nn.Module:
    call = ", ".join(f"{key}={value}" for key, value in options.items())
    try:
        model = factory(**options)
    except RAISED as error:
        raise ModelError(
            f"cannot build {name!r}, called with ({call}): {type(error).__name__}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{name!r}, called with ({call}), returned {type(model).__name__}, not an nn.Module"
        )
    return model

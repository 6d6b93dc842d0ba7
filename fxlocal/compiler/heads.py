"""The auxiliary networks of local modules: classifiers, and InfoPro's decoder."""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ..errors import PlanError
from ..facts import BlockInput
from ..plan import ConvHead, InfoProHead, LinearHead, LocalModules

__all__ = ["Decoder", "Flatten", "Interpolate", "Pool", "build_heads"]


class Flatten(nn.Module):
    """Flatten features of the ``shape``, without batch, that the weights behind it are for."""

    def __init__(self, shape: Sequence[int]):
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, features: Tensor) -> Tensor:
        """Return features, (B, product of the shape); a ValueError if they are of another."""
        if features.shape[1:] != self.shape:
            raise ValueError(
                f"a local head got features of shape {tuple(features.shape[1:])}, and has weights "
                f"for {self.shape}, which the example inputs have there. Give inputs of their "
                "size, transform the model with others, or take LinearHead(pool=2), which fits any"
            )
        return features.flatten(1)


class Pool(nn.Module):
    """Average features to a map of at most ``side`` in each dimension, and flatten it.

    The channels are in the dimension ``channels_at``, 1 or the last one.
    """

    def __init__(self, side: int, channels_at: int):
        super().__init__()
        self.side, self.channels_at = side, channels_at

    def forward(self, features: Tensor) -> Tensor:
        """Return features of shape (B, C * positions); of channels in the last place, (B, C)."""
        if features.dim() == 2:
            return features
        if self.channels_at != 1:
            return features.flatten(1, -2).mean(1)
        sides = [min(self.side, size) for size in features.shape[2:]]
        pool: Any = getattr(F, f"adaptive_avg_pool{len(sides)}d")
        pooled: Tensor = pool(features, sides)
        return pooled.flatten(1)


class Interpolate(nn.Module):
    """Bilinear up- or down-sampling of maps (B, C, H, W), in each side by the same factor.

    Maps whose sides are ``before`` get the sides ``after``.
    """

    def __init__(self, before: Sequence[int], after: Sequence[int]):
        super().__init__()
        self.before, self.after = tuple(before), tuple(after)

    def forward(self, maps: Tensor) -> Tensor:
        """Return maps of the other size."""
        sides = zip(maps.shape[2:], self.before, self.after, strict=True)
        size = [side * after // before for side, before, after in sides]
        return F.interpolate(maps, size, mode="bilinear", align_corners=False)

    def extra_repr(self) -> str:
        """Return what is printed of it."""
        return f"{self.before} -> {self.after}"


class Decoder(nn.Sequential):
    """InfoPro's decoder: bilinear up-sampling and two 3x3 convolutions, ``width`` channels between.

    It makes images from features; of both it is given the shape, (B, C, H, W).
    """

    def __init__(self, features: Sequence[int], width: int, image: Sequence[int]):
        super().__init__(
            OrderedDict(
                upsample=Interpolate(features[2:], image[2:]),
                conv1=nn.Conv2d(features[1], width, 3, padding=1, bias=False),
                bn1=nn.BatchNorm2d(width),
                relu1=nn.ReLU(inplace=True),
                conv2=nn.Conv2d(width, image[1], 3, padding=1),
            )
        )


def build_heads(
    modules: LocalModules,
    features: Sequence[BlockInput],
    image: BlockInput,
    output: BlockInput,
    reference: Tensor,
) -> nn.ModuleList:
    """Build the head of each module but the last, drawing from the global generator.

    Args:
        modules: says which.
        features: what each head gets.
        image: the model's first input.
        output: the model's; per pixel, (B, classes, H, W), where the heads' must be.
        reference: has the device that the heads get, and the dtype where a feature has none.

    Raises:
        PlanError: if there is no such head for these features, or a user's function makes none.
    """
    heads = nn.ModuleList()
    for k, edge in enumerate(features):
        if edge.shape is None:
            raise PlanError(
                f"local module {k} ends with {edge.value!r}, which is no tensor: no head can stand "
                "there. Split elsewhere, by balance=(names of blocks)"
            )
        like, dtype = reference, getattr(torch, edge.dtype)
        if dtype.is_floating_point:
            like = torch.empty(0, dtype=dtype, device=reference.device)
        if isinstance(modules.head, (LinearHead, ConvHead, InfoProHead)):
            head = _built_in(modules, k, edge, image, output).to(like)
        else:
            head = _built_by_user(modules.head, k, edge, like)
        heads.append(head)
    return heads


def _built_in(
    modules: LocalModules, k: int, edge: BlockInput, image: BlockInput, output: BlockInput
) -> nn.Module:
    head: Any = modules.head
    classes = modules.num_classes
    assert classes and edge.shape and output.shape  # checked before
    dense = output.shape[2:] if len(output.shape) > 2 and output.channels_at == 1 else ()
    if dense and (len(edge.shape) != 4 or len(dense) != 2):
        raise PlanError(
            f"{head!r} for scores of shape {output.shape} needs maps (B, C, H, W), and local "
            f"module {k} ends with {edge.shape}: give a head of your own"
        )
    classifier = _classifier(head, edge, classes, dense)
    if not isinstance(head, InfoProHead):
        return classifier
    if len(edge.shape) != 4 or image.shape is None or len(image.shape) != 4:
        raise PlanError(
            f"{head!r} reconstructs images (B, C, H, W) from maps; local module {k} ends with "
            f"{edge.shape}, and the model's input is {image.shape}"
        )
    decoder = Decoder(edge.shape, head.width, image.shape)
    return nn.ModuleDict({"classifier": classifier, "decoder": decoder})


def _classifier(
    head: LinearHead | ConvHead | InfoProHead, edge: BlockInput, classes: int, dense: Sequence[int]
) -> nn.Sequential:
    shape = edge.shape
    assert shape is not None
    pool = Pool(head.pool, edge.channels_at) if head.pool else Flatten(shape[1:])
    width = shape[1] if dense else pool(torch.empty(shape, device="meta")).shape[1]
    layer: Any = partial(nn.Conv2d, kernel_size=1) if dense else nn.Linear
    parts: list[nn.Module] = [] if dense else [pool]
    if isinstance(head, LinearHead):
        parts.append(layer(width, classes))
    else:
        if len(shape) == 4 and edge.channels_at == 1:
            conv = nn.Conv2d(shape[1], shape[1], 3, padding=1, bias=False)
            parts[:0] = [conv, nn.BatchNorm2d(shape[1]), nn.ReLU(inplace=True)]
        parts += [layer(width, head.hidden), nn.ReLU(inplace=True), layer(head.hidden, classes)]
    return nn.Sequential(*parts, *([Interpolate(shape[2:], dense)] if dense else []))


def _built_by_user(head: object, k: int, edge: BlockInput, reference: Tensor) -> nn.Module:
    assert callable(head) and edge.shape is not None
    mine, features_of = f"head of local module {k}", f"features of shape {edge.shape}"
    try:
        module = head(edge.shape)
    except Exception as error:  # the user's code, which may raise anything
        kind = type(error).__name__
        raise PlanError(f"{mine}: {head!r} raised {kind} for {features_of}: {error}") from error
    if not isinstance(module, nn.Module):
        raise PlanError(
            f"{mine}: {head!r} returned {type(module).__name__} for {features_of}: return a "
            "torch.nn.Module"
        )
    features = reference.new_zeros(max(2, edge.shape[0]), *edge.shape[1:])  # norms need two
    for dtype in (None, reference.dtype):  # as it is, or else cast to what it takes
        lazy = any(isinstance(p, UninitializedParameter) for p in module.parameters())
        module.to(reference.device, dtype)
        with torch.no_grad(), torch.random.fork_rng(devices=[], enabled=not lazy):
            try:  # on a copy, but for lazy layers, which get their parameters so
                (module if lazy else copy.deepcopy(module))(features)
                break
            except Exception as error:
                failure = error
    else:
        told = f"{type(failure).__name__}: {failure}"
        raise PlanError(f"{mine}: the module cannot take {features_of}: {told}") from failure
    if features._version:
        raise PlanError(
            f"{mine} overwrites its input, which the next module gets too: make its first "
            "operation one that is not in place"
        )
    return module

"""The settings of a fine-tuner, and what they make of a model and its parameters."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

from torch import nn

from ....errors import nearest

__all__ = ["SettingsError", "Tuning", "freeze", "group_parameters"]


class SettingsError(ValueError):
    """The settings of a run are out of range, or do not fit this machine."""


@dataclass(frozen=True)
class Tuning:
    """Fine-tuning and regularisation.

    Each is torch's, torchvision's or timm's own: ``augment`` of `torchvision.transforms.v2`, see
    `fxlocal.experiments.training.recipe.augment`; ``label_smoothing`` that of
    `torch.nn.functional.cross_entropy`, of local modules' heads too; ``clip`` by
    `torch.nn.utils.clip_grad_norm_`; ``ema`` the decay of `torch.optim.swa_utils.AveragedModel`,
    by which the run is then judged. ``accumulate`` computes each batch in so many parts, one after
    another; ``patience`` counts evaluations.
    """

    weights: Annotated[str, "File of a state dict, or published ones"] = ""
    freeze: Annotated[str, "Paths whose weights stay: conv1,layer1"] = ""
    lr_of: Annotated[str, "Learning rates by path: fc=0.1,layer4=0.02", "rare"] = ""
    output: Annotated[str, "The logits' name or place in the output", "rare"] = ""
    augment: Annotated[str, "none, randaugment, mixup, ..."] = "standard"
    label_smoothing: Annotated[float, "Share spread over all classes", "rare"] = 0.0
    clip: Annotated[float | None, "Largest norm of the gradient", "rare"] = None
    accumulate: Annotated[int, "Parts that a batch is computed in", "rare"] = 1
    ema: Annotated[float | None, "Judge an average of the weights, by decay", "rare"] = None
    patience: Annotated[int | None, "Stop after so many without a better error", "rare"] = None
    keep_best: Annotated[bool, "Keep the weights of least error, best.pt", "rare"] = False

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise SettingsError(f"label_smoothing={self.label_smoothing}: give 0, or less than 1")
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise SettingsError(f"clip={self.clip}: must be finite, above 0")
        if self.ema is not None and not 0 < self.ema < 1:
            raise SettingsError(f"ema={self.ema}: give a decay between 0 and 1, such as 0.999")
        for name in ("accumulate", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"{name}={value}: must be at least 1")
        _paths(self.freeze)
        _rates(self.lr_of)


def _paths(text: str) -> list[str]:
    paths = [path.strip() for path in text.split(",")] if text.strip() else []
    if not all(paths) or len({*paths}) < len(paths):
        raise SettingsError(f"--freeze {text!r}: give paths separated by commas, and none twice")
    return paths


def _rates(text: str) -> dict[str, float]:
    rates: dict[str, float] = {}
    for part in text.split(",") if text.strip() else []:
        path, _, number = (piece.strip() for piece in part.rpartition("="))
        try:
            rate = float(number)
        except ValueError:
            rate = math.nan
        if not path or path in rates or not 0 <= rate < math.inf:
            raise SettingsError(
                f"--lr-of {text!r}: give PATH=RATE,PATH=RATE, each path once, as in fc=0.1"
            )
        rates[path] = rate
    return rates


def _is_within(name: str, path: str) -> bool:
    return name == path or name.startswith(path + ".")


def _refuse_unknown(option: str, path: str, model: nn.Module) -> None:
    names = [name for name, _ in model.named_parameters()]
    if not any(_is_within(name, path) for name in names):
        prefixes = {name.rsplit(".", n)[0] for name in names for n in range(name.count(".") + 1)}
        raise SettingsError(
            f"--{option}: the model has no parameters in {path!r}. "
            f"Nearest: {nearest(path, sorted(prefixes))}"
        )


def freeze(model: nn.Module, tuning: Tuning) -> nn.Module:
    """Let the parameters under the paths get no gradient, in place; norms there count on.

    Raises:
        SettingsError: if a path has none, or none is left to learn.
    """
    for path in _paths(tuning.freeze):
        _refuse_unknown("freeze", path, model)
        for name, parameter in model.named_parameters():
            if _is_within(name, path):
                parameter.requires_grad_(False)
    if tuning.freeze and not any(p.requires_grad for p in model.parameters()):
        raise SettingsError(f"--freeze {tuning.freeze}: no parameter is left to learn")
    return model


def group_parameters(
    model: nn.Module, parameters: Iterable[nn.Parameter], tuning: Tuning
) -> list[dict[str, Any]]:
    """Return groups for an optimizer of ``parameters``, some to each path; the longest decides."""
    rates = _rates(tuning.lr_of)
    for path in rates:
        _refuse_unknown("lr-of", path, model)
    groups: dict[str, list[nn.Parameter]] = {"": [], **{path: [] for path in rates}}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for parameter in parameters:
        name = names.get(parameter, "")  # of a head's there is none
        groups[max((path for path in rates if _is_within(name, path)), key=len, default="")].append(
            parameter
        )
    own = [{"params": params, "lr": rates[path]} for path, params in groups.items() if path]
    return [{"params": groups[""]}, *own]

"""Principal components of one layer's activations: how far a network tells the classes apart there.

The paper (LoCal+SGD, Frontiers, section 3.4 and Figures 7 and 8) draws the two strongest components
of locally trained layers beside those of the same layers trained by SGD. As a number for what the
eye sees, ours is the share of the variance that lies between classes, from 0 (classes lie on each
other) to 1 (each is one point)::

    separation = sum_c n_c ||mean_c - mean||^2 / sum_n ||x_n - mean||^2

Shape suffixes: N images, F features, K classes, B batch.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...compiler.analysis import Analysis
from ...errors import nearest
from ..data.catalogue import Data, batches
from ..data.images import choose
from ..training.settings import Machine, SettingsError

__all__ = [
    "Projection",
    "collect_activations",
    "find_last_local",
    "find_module",
    "find_separation",
    "project",
]


@dataclass(frozen=True)
class Projection:
    """One layer's activations in their two strongest principal components.

    Attributes:
        scores_N2: each image's two components.
        labels_N: each image's class.
        explained: each component's share of the variance.
        separation_plane: share of the variance of the two components that lies between classes.
        separation: the same of all features.
    """

    scores_N2: Tensor
    labels_N: Tensor
    explained: tuple[float, float]
    separation_plane: float
    separation: float


def project(features_NF: Tensor, labels_N: Tensor) -> Projection:
    """Compute the two strongest principal components, in float64.

    A component's sign is free; here its largest loading is positive.

    Raises:
        SettingsError: if the features do not span two dimensions.
    """
    centred_NF = features_NF.double() - features_NF.double().mean(0)
    _, singular, directions = torch.linalg.svd(centred_NF, full_matrices=False)
    if len(singular) < 2 or not singular[1] > 1e-9 * singular[0]:
        raise SettingsError(
            f"{features_NF.shape[1]} features of {len(features_NF)} images do not span a plane; "
            "choose another layer with --pca, or --pca-space flatten"
        )
    plane_2F = directions[:2]
    largest = plane_2F.gather(1, plane_2F.abs().argmax(1, keepdim=True))
    scores_N2 = centred_NF @ (plane_2F * largest.sign()).T
    shares = singular**2 / (singular**2).sum()
    return Projection(
        scores_N2,
        labels_N,
        (shares[0].item(), shares[1].item()),
        find_separation(scores_N2, labels_N),
        find_separation(centred_NF, labels_N),
    )


def find_separation(features_NF: Tensor, labels_N: Tensor) -> float:
    """Return the share of the variance that lies between classes (this module's equation)."""
    centred_NF = features_NF - features_NF.mean(0)
    counts_K = labels_N.bincount()
    sums_KF = centred_NF.new_zeros(len(counts_K), centred_NF.shape[1])
    sums_KF.index_add_(0, labels_N, centred_NF)
    between_K = (sums_KF**2).sum(1) / counts_K.clamp(min=1)
    return float(between_K.sum() / (centred_NF**2).sum())


def collect_activations(
    model: nn.Module,
    path: str,
    data: Data,
    machine: Machine,
    *,
    batch_size: int,
    num_images: int,
    flatten: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return what module ``path`` puts out for test images, one row each, and their classes.

    Args:
        model: where the machine put it; evaluated as it stands.
        path: of a module that runs once per forward.
        data: the images are spread evenly over its test set.
        machine: where and how to compute.
        batch_size: images per forward.
        num_images: at most so many.
        flatten: keep each position of a map as a feature; else maps are averaged over height and
            width.

    Raises:
        SettingsError: if there is no such module, or it puts out no tensor or runs more than once.
    """
    total = len(data.test)  # type: ignore[arg-type]  # ours have a length
    count = min(num_images, total)
    images = choose(data.test, torch.arange(count) * total // count)  # it may be sorted by class
    caught: list[Any] = []
    rows, labels = [], []

    def catch(module: nn.Module, arguments: Any, output: Any) -> None:
        # A copy, because an activation function after the layer may work in place.
        caught.append(output.clone() if isinstance(output, Tensor) else output)

    handle = find_module(model, path).register_forward_hook(catch)
    model.eval()
    try:
        with torch.no_grad(), machine.autocast():
            for x, y in batches(images, batch_size, device=machine.device):
                caught.clear()
                model(machine.place(x))
                if len(caught) != 1 or not isinstance(caught[0], Tensor):
                    raise SettingsError(
                        f"layer {path!r} must run once, and put out one tensor, per forward"
                    )
                output = caught[0].float().cpu()
                is_map = output.dim() == 4 and not flatten
                rows.append(output.mean((2, 3)) if is_map else output.flatten(1))
                labels.append(y.cpu())
    finally:
        handle.remove()
    return torch.cat(rows), torch.cat(labels)


def find_module(model: nn.Module, path: str) -> nn.Module:
    """Return the module at ``path``.

    Raises:
        SettingsError: if there is none.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if not path or path not in modules:
        names = [name for name in modules if name]
        raise SettingsError(f"no layer {path!r} in the model. Nearest: {nearest(path, names)}")
    return modules[path]


def find_last_local(analysis: Analysis, boundary: int) -> str:
    """Return the path of the last block that lies before the boundary, or of the last layer.

    Raises:
        SettingsError: if nothing does.
    """
    if boundary == 0:
        raise SettingsError("no layer learned locally in the last epoch; choose one with --pca")
    local = [block.name for block in analysis.blocks if block.layers[-1] < boundary]
    return local[-1] if local else analysis.layers[boundary - 1].path

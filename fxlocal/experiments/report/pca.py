"""Principal components of one layer's activations: how far a network tells the classes apart there.

The paper (LoCal+SGD, Frontiers, section 3.4 and Figures 7 and 8) draws the two strongest components
of locally trained layers beside those of the same layers trained by SGD. As a number for what the
eye sees, ours is the share of the variance that lies between classes, from 0 (classes lie on each
other) to 1 (each is one point)::

    separation = sum_c n_c ||mean_c - mean||^2 / sum_n ||x_n - mean||^2

Figure 8 has "the L2 difference between the top-2 principal components of either class" over layers;
we read it as the distance of two classes' means in the plane of the two components, and take the
mean over the pairs of classes::

    distance = mean over c < d of ||mean_c - mean_d||

Shape suffixes: N images, F features, K classes, B batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from ...compiler.analysis import Analysis
from ...errors import nearest
from ..data.catalogue import Data, batches
from ..data.images import choose
from ..training.settings import Machine, SettingsError
from .tables import new_table

__all__ = [
    "Projection",
    "collect_activations",
    "find_distance",
    "find_last_local",
    "find_module",
    "find_separation",
    "pca_table",
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
        distance: of the means of two classes in the plane, the mean over pairs.
    """

    scores_N2: Tensor
    labels_N: Tensor
    explained: tuple[float, float]
    separation_plane: float
    separation: float
    distance: float = 0.0


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
        find_distance(scores_N2, labels_N),
    )


def find_separation(features_NF: Tensor, labels_N: Tensor) -> float:
    """Return the share of the variance that lies between classes (this module's equation)."""
    centred_NF = features_NF - features_NF.mean(0)
    counts_K = labels_N.bincount()
    sums_KF = centred_NF.new_zeros(len(counts_K), centred_NF.shape[1])
    sums_KF.index_add_(0, labels_N, centred_NF)
    between_K = (sums_KF**2).sum(1) / counts_K.clamp(min=1)
    return float(between_K.sum() / (centred_NF**2).sum())


def find_distance(scores_N2: Tensor, labels_N: Tensor) -> float:
    """Return how far the means of two classes are apart (this module's equation); 0 of one."""
    classes = sorted(set(labels_N.tolist()))
    if len(classes) < 2:
        return 0.0
    means_K2 = torch.stack([scores_N2[labels_N == label].mean(0) for label in classes])
    return float(torch.pdist(means_K2).mean())


def collect_activations(
    model: nn.Module,
    paths: Sequence[str],
    data: Data,
    machine: Machine,
    *,
    batch_size: int,
    num_images: int,
    flatten: bool = False,
) -> tuple[dict[str, Tensor], Tensor]:
    """Return what modules put out for test images, one row each by path, and their classes.

    Args:
        model: where the machine put it; evaluated as it stands.
        paths: of modules that run once per forward.
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
    caught: dict[str, list[Any]] = {path: [] for path in paths}
    rows: dict[str, list[Tensor]] = {path: [] for path in paths}
    labels = []

    def catch(path: str, module: nn.Module, arguments: Any, output: Any) -> None:
        # A copy, because an activation function after the layer may work in place.
        caught[path].append(output.clone() if isinstance(output, Tensor) else output)

    modules = {path: find_module(model, path) for path in paths}
    handles = [
        module.register_forward_hook(partial(catch, path)) for path, module in modules.items()
    ]
    model.eval()
    try:
        with torch.no_grad(), machine.autocast():
            for x, y in batches(images, batch_size, device=machine.device):
                model(machine.place(x))
                for path, outputs in caught.items():
                    rows[path].append(_row(path, outputs, flatten))
                    outputs.clear()
                labels.append(y.cpu())
    finally:
        for handle in handles:
            handle.remove()
    return {path: torch.cat(found) for path, found in rows.items()}, torch.cat(labels)


def _row(path: str, outputs: Sequence[Any], flatten: bool) -> Tensor:
    """Return the features of a batch, of what a module put out."""
    if len(outputs) != 1 or not isinstance(outputs[0], Tensor):
        raise SettingsError(f"layer {path!r} must run once, and put out one tensor, per forward")
    output = outputs[0].float().cpu()
    return output.mean((2, 3)) if output.dim() == 4 and not flatten else output.flatten(1)


def find_module(model: nn.Module, path: str) -> nn.Module:
    """Return the module at ``path``; a SettingsError if there is none."""
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if not path or path not in modules:
        names = [name for name in modules if name]
        raise SettingsError(f"no layer {path!r} in the model. Nearest: {nearest(path, names)}")
    return modules[path]


def find_last_local(analysis: Analysis, boundary: int) -> str:
    """Return the path of the last block, or layer, before the boundary; or a SettingsError."""
    if boundary == 0:
        raise SettingsError("no layer learned locally in the last epoch; choose one with --pca")
    local = [block.name for block in analysis.blocks if block.layers[-1] < boundary]
    return local[-1] if local else analysis.layers[boundary - 1].path


def pca_table(results: Mapping[str, Any]) -> Table:
    """Return the table of ``pca.json``."""
    title = f"{results['layer']}, {results['model']} on {results['data']}"
    headings = ("error %", "1st %", "2nd %", "between, plane %", "all %")
    table = new_table(title, "strategy", right=headings)
    for row in results["components"]:
        shares = (*row["explained"], row["separation_plane"], row["separation"])
        numbers = [f"{row['error_percent']:.2f}", *(f"{100 * share:.1f}" for share in shares)]
        table.add_row(row["strategy"], *numbers)
    table.caption = (
        "share of the variance: of the two components;\n"
        "between classes, in their plane and in all features"
    )
    return table

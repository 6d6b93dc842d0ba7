"""Grow the batch into the memory that the boundary frees (LoCal+SGD, Frontiers, Table 4).

With the boundary at layer k, a step on B images is predicted to take, in bytes::

    held + gradients(k) + constant(k) + B * (per_image(k) + unseen)

`Footprint` holds what the cost analysis knows: per_image and constant are kept for backward.
On a GPU, where the peak of allocated memory is measured, held is what stays allocated between steps
(weights, the optimizer's state) and gradients are those of the layers from k on; on a CPU, where
the bytes kept for backward are measured, both are 0. unseen is what the analysis does not see: the
loss, and on a GPU short-lived values. Each epoch's measurement says how much that was, for the
next epoch's prediction.

Known limit: on a GPU unseen is taken to grow with the batch, and to change little as the boundary
moves.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import torch

from ...compiler.analysis import Analysis
from ...compiler.split import find_split
from ...plan import Checkpoint, LocalModules
from ...runtime.driver import Driver
from .measure import analyze_on
from .results import finished_runs
from .settings import Experiment, SettingsError

__all__ = ["Footprint", "Growth", "build_growth", "find_footprint", "growing_runs", "scaled_rates"]

LEFT_OUT = 0.1  # of the images, at most, for the sake of a larger batch: a smaller last one is lost
WEIGHT_BYTES = 4


@dataclass(frozen=True)
class Footprint:
    """What a step takes with the boundary at each layer, in bytes.

    Attributes:
        per_image: kept for backward, for each image.
        constant: kept for backward, however many images there are.
        gradients: of the weights from the boundary on.
    """

    per_image: tuple[float, ...]
    constant: tuple[float, ...]
    gradients: tuple[int, ...]


def find_footprint(
    analysis: Analysis,
    doubled: Analysis | None,
    batch_size: int,
    *,
    gradients: bool,
    stages: LocalModules | Checkpoint | None = None,
) -> Footprint:
    """Return the footprint that the costs of two batches mean.

    Args:
        analysis: with the costs of ``batch_size`` images.
        doubled: with the costs of twice as many; None if there will never be more than
            ``batch_size``, and what is constant need not be told apart.
        batch_size: the smaller number of images.
        gradients: count the weights' gradients.
        stages: local modules or checkpointed stages, which keep their activations one after
            another; heads, and what checkpointed stages take, are unseen.
    """
    layers = range(len(analysis.layers))
    together = [layers] if stages is None else _stage_layers(analysis, stages)
    once = [_most_kept(analysis, k, together) for k in layers]
    twice = [_most_kept(doubled, k, together) for k in layers] if doubled else [2 * n for n in once]
    weights = [cost.parameters if gradients else 0 for cost in analysis.costs or ()]
    return Footprint(
        per_image=tuple((b - a) / batch_size for a, b in zip(once, twice, strict=True)),
        constant=tuple(2 * a - b for a, b in zip(once, twice, strict=True)),
        gradients=tuple(WEIGHT_BYTES * sum(weights[k:]) for k in layers),
    )


def _stage_layers(analysis: Analysis, stages: LocalModules | Checkpoint) -> list[range]:
    """Return the layers that run in each stage, those that it repeats of the one before too."""
    starts = [block.layers[0] for block in analysis.blocks]
    split = find_split(analysis, stages)
    link = stages.link if isinstance(stages, LocalModules) else 0
    firsts = [starts[max(block - link, 0)] for block in split]
    ends = [*(starts[block] for block in split[1:]), len(analysis.layers)]
    return [range(a, b) for a, b in zip(firsts, ends, strict=True)]


def _most_kept(analysis: Analysis, boundary: int, together: Sequence[range]) -> int:
    """Return the most that is kept for backward at a time, of the layers from the boundary on."""
    costs = analysis.costs or ()
    kept = (sum(costs[i].saved_bytes for i in part if i >= boundary) for part in together)
    return max(kept, default=0)


def build_growth(
    driver: Driver, experiment: Experiment, stages: LocalModules | Checkpoint | None
) -> "Growth":
    """Return the growth of an experiment's batch.

    Args:
        driver: has captured and analysed the model on the experiment's example.
        experiment: its settings say whether the batch grows.
        stages: local modules or checkpointed stages, if there are any.

    Raises:
        SettingsError: if a GPU has no such memory.
    """
    settings, machine = experiment.settings, experiment.machine
    device, budget = torch.device(machine.device), settings.memory_budget
    on_gpu = device.type == "cuda"
    if on_gpu and budget is not None:
        total = torch.cuda.mem_get_info(device)[1] / 2**20
        if budget > total:
            raise SettingsError(
                f"memory_budget={budget:g}: {machine.name} has {total:.0f} MiB in all"
            )
    example = experiment.example
    analysis, network = driver.analysis, driver.captured
    with machine.autocast():  # what is kept has the dtypes of training
        if machine.amp:
            analysis = analyze_on(network, example)
        doubled = analyze_on(network, torch.cat([example] * 2)) if settings.grows else None
    size = settings.batch_size
    return Growth(
        find_footprint(analysis, doubled, size, gradients=on_gpu, stages=stages),
        size,
        len(experiment.data.train),  # type: ignore[arg-type]  # ours have a length
        grows=settings.grows,
        budget=None if budget is None else round(budget * 2**20),
        held=torch.cuda.memory_allocated(device) if on_gpu else 0,
    )


@dataclass
class Growth:
    """Says how many images each epoch's steps take, and how many bytes.

    The batch is the largest that is predicted to fit the budget, in steps of an eighth of the first
    one, and leaves out no more than a tenth of the images. It is chosen anew when the boundary has
    moved (another network, which would be compiled anyway), or when the last epoch took more than
    the budget; the first epoch, which calibrates the prediction, has the first batch.

    Attributes:
        footprint: what the analysis knows.
        batch_size: of the current epoch; as given, the first and the smallest.
        num_images: that an epoch draws from.
        grows: without it, every epoch has the first batch.
        budget: in bytes; None for what the first epoch is measured to take.
        held: bytes allocated between steps, where those are measured.
        ranks: that share each batch; bytes are those of the rank that takes most.
    """

    footprint: Footprint
    batch_size: int
    num_images: int
    _: KW_ONLY
    grows: bool = True
    budget: int | None = None
    held: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        self.smallest = self.batch_size
        self.unseen: float | None = None
        self.chosen_for: int | None = None

    def follow(self, driver: Driver, experiment: Experiment) -> None:
        """Predict for the model as it is once channels were cut; there are no stages then."""
        self.footprint = build_growth(driver, experiment, None).footprint

    def predict(self, boundary: int, batch_size: int) -> int:
        """Return the bytes that a step on ``batch_size`` images takes."""
        footprint = self.footprint
        per_image = footprint.per_image[boundary] + (self.unseen or 0.0)
        constant = footprint.constant[boundary] + footprint.gradients[boundary] + self.held
        return round(constant + self._share(batch_size) * per_image)

    def _share(self, batch_size: int) -> int:
        return -(-batch_size // self.ranks)

    def start_epoch(self, boundary: int) -> int:
        """Return the batch size of an epoch with the boundary there."""
        if self.grows and self.unseen is not None and boundary != self.chosen_for:
            self.batch_size, self.chosen_for = self._largest(boundary), boundary
        return self.batch_size

    def _largest(self, boundary: int) -> int:
        assert self.budget is not None
        left_out = max(self.num_images % self.smallest, int(LEFT_OUT * self.num_images))
        return max(
            (
                size
                for size in range(self.smallest, self.num_images + 1, max(1, self.smallest // 8))
                if self.num_images % size <= left_out
                and self.predict(boundary, size) <= self.budget
            ),
            default=self.smallest,
        )

    def end_epoch(self, boundary: int, measured: int, held: int = 0) -> None:
        """Learn from what the epoch was measured to take.

        Args:
            boundary: where it was.
            measured: the bytes of its largest step.
            held: the bytes allocated now, between steps.
        """
        self.held, self.unseen = held, None
        self.unseen = (measured - self.predict(boundary, self.batch_size)) / self._share(
            self.batch_size
        )
        if self.budget is None:
            self.budget = measured
        if measured > self.budget:
            self.chosen_for = None

    def refuse_small_budget(self, measured: int) -> None:
        """Raise SettingsError if the budget is below ``measured``, what the first batch takes."""
        if self.unseen is None and self.budget is not None and measured > self.budget:
            raise SettingsError(
                f"memory_budget={self.budget / 2**20:.4g}: the smallest batch, of {self.smallest} "
                f"images, takes {measured / 2**20:.1f} MiB; raise the budget, or make --batch-size "
                "smaller"
            )

    def rate_factor(self, rule: Literal["none", "linear", "sqrt"]) -> float:
        """Return what to multiply the learning rate by, for the batch that it is."""
        ratio = self.batch_size / self.smallest
        return {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[rule]

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next epoch's batch depends on."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        for name in _STATE:
            setattr(self, name, state[name])


_STATE = ("batch_size", "budget", "held", "unseen", "chosen_for")


def growing_runs(results: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Return the finished runs of ``results.json`` by strategy; none if no batch grew in any."""
    runs = finished_runs(results)
    grew = any(len(set(run["batch_size"])) > 1 for own in runs.values() for run in own)
    return runs if grew else {}


@contextmanager
def scaled_rates(optimizer: torch.optim.Optimizer, factor: float) -> Iterator[None]:
    """Multiply the learning rates while the ``with`` block runs; a scheduler sees none of it."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = factor * rate
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

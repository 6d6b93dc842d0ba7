"""What each epoch of a run goes through, whether one process trains or several."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data.catalogue import Data, batches
from ..data.task import count_wrong
from .settings import Machine

__all__ = ["MOST_SEEDS", "describe_divergence", "find_error_percent", "training_batches"]

MOST_SEEDS = 2**63  # that a generator takes


def training_batches(
    data: Data, batch_size: int, device: str | torch.device, *, seed: int, epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of an epoch: images (B, C, H, W) and labels, on ``device``.

    Args:
        data: what to learn from.
        batch_size: images in each; a smaller last batch is left out, so that there is one shape:
            one compilation, and no batch norm over a single image.
        device: where to put them.
        seed: of the run.
        epoch: from 0; the order depends on both, so that a resumed run draws what an unbroken one
            draws.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % MOST_SEEDS)
    how = {"generator": generator, "augment": data.augment, "device": device, "drop_last": True}
    return batches(data.train, batch_size, **how)  # type: ignore[arg-type]


def find_error_percent(model: nn.Module, data: Data, batch_size: int, machine: Machine) -> float:
    """Return the test error of ``model``, which is put into evaluation mode."""
    model.eval()
    counts = torch.zeros(2, dtype=torch.int64, device=machine.device)
    with torch.no_grad(), machine.autocast():
        for x, y in batches(data.test, batch_size, device=machine.device):
            counts += count_wrong(model(machine.place(x)), y, data.task)
    wrong, total = counts.tolist()
    return float(100.0 * wrong / max(total, 1))  # none: no foreground, none found


def describe_divergence(
    strategy: str, seed: int, loss: float, epoch: int, checkpoint: Path | None
) -> str:
    """Say where the loss of a run went out of bounds, and what is left."""
    kept = checkpoint and checkpoint.exists()
    return (
        f"the loss is {loss} in epoch {epoch} of {strategy or 'the run'}, seed {seed}; try "
        "a smaller learning rate" + (f". The last good checkpoint is {checkpoint}" if kept else "")
    )

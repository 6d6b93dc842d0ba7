"""Data parallel training with a moving boundary: two ranks learn as one process with both batches.

The prefix learns by a Hebbian rule, whose deltas are summed over the ranks before they are applied;
gradients behind the boundary are averaged, and nothing else is sent. Run it on as many ranks as you
like, ``torchrun --nproc-per-node 2 examples/ddp.py``; without torchrun it starts two itself.
"""

import os
import tempfile

import torch
from torch import distributed, multiprocessing, nn

import fxlocal
from fxlocal import Hebbian, schedules

EPOCHS, STEPS, BATCH = 4, 5, 16


def build() -> nn.Module:
    convs = (nn.Sequential(nn.Conv2d(c, 8, 3, padding=1), nn.ReLU()) for c in (3, 8, 8, 8))
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def images_of(step: int, rank: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's share of a batch of all ranks'; the last of an epoch is ragged."""
    count = BATCH - 3 * (step % STEPS == STEPS - 1)
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(count, 3, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (count,), generator=generator)
    return images.tensor_split(size)[rank], labels.tensor_split(size)[rank]


def train(rank: int, size: int) -> tuple[list[float], nn.Module]:
    torch.manual_seed(rank)  # ranks begin with the weights of the first, whatever they drew
    model = build().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = schedules.Static(EPOCHS, largest=0.8, start=0.2, rule=Hebbian(1e-3), align=False)
    driver = fxlocal.Driver(model, schedule, optimizer)
    if size > 1:
        fxlocal.replicate(driver)
    for epoch in range(EPOCHS):
        driver.start_epoch()
        for step in range(epoch * STEPS, epoch * STEPS + STEPS):
            images, labels = images_of(step, rank, size)
            loss = nn.functional.cross_entropy(driver.network()(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            driver.observe(loss)
        driver.end_epoch()
        if rank == 0:
            print(f"{size} ranks, boundary {driver.history[-1]}: loss {driver.losses[-1]:.12f}")
    return driver.losses, model


def on_rank(rank: int, size: int, store: str) -> None:
    init = f"file://{store}" if store else "env://"
    distributed.init_process_group("gloo", init_method=init, rank=rank, world_size=size)
    losses, model = train(rank, size)
    sums: list[float] = [0.0] * size
    distributed.all_gather_object(sums, sum(float(p.detach().sum()) for p in model.parameters()))
    assert len(set(sums)) == 1, f"ranks have drifted apart: {sums}"
    distributed.destroy_process_group()
    if rank == 0:
        alone, _ = train(0, 1)
        print("largest difference:", max(abs(a - b) for a, b in zip(losses, alone, strict=True)))
        assert torch.allclose(torch.tensor(losses), torch.tensor(alone), rtol=0, atol=1e-10)


if __name__ == "__main__":
    if "RANK" in os.environ:
        on_rank(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "")
    else:
        with tempfile.TemporaryDirectory() as folder:
            multiprocessing.spawn(on_rank, (2, f"{folder}/store"), nprocs=2)
        print("two ranks have learned what one process does")

"""Weights in shards over two ranks, a Hebbian prefix that grows: the same as one process.

Each rank keeps half of the rows of each weight, and of its optimizer's state. The prefix is
gathered for the forward alone, and each rank gets its rows of the deltas. Run it on as many ranks
as you like, ``torchrun --nproc-per-node 2 examples/fsdp.py``; without torchrun it starts two.
"""

import os
import tempfile

import torch
from torch import Tensor, distributed, multiprocessing, nn

import fxlocal
from fxlocal import Hebbian, schedules

EPOCHS, STEPS, BATCH = 4, 5, 16


def build() -> nn.Module:
    sizes = (12, 32, 32, 32)
    layers = (nn.Sequential(nn.Linear(n, 32), nn.ReLU()) for n in sizes)
    return nn.Sequential(*layers, nn.Linear(32, 4)).double()


def batch_of(step: int, rank: int, size: int) -> tuple[Tensor, Tensor]:
    """This rank's share of a batch of all ranks'."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(BATCH, 12, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (BATCH,), generator=generator)
    return inputs.chunk(size)[rank], labels.chunk(size)[rank]


def train(rank: int, size: int) -> list[float]:
    torch.manual_seed(rank)  # ranks begin with the weights of the first, whatever they drew
    model = build()
    schedule = schedules.Static(EPOCHS, largest=0.8, start=0.2, rule=Hebbian(1e-3), align=False)
    driver = fxlocal.Driver(model, schedule)
    if size > 1:
        fxlocal.shard(driver)
    optimizer = driver.optimizer = torch.optim.AdamW(driver.parameters(), lr=0.01)
    for epoch in range(EPOCHS):
        driver.start_epoch()
        for step in range(epoch * STEPS, epoch * STEPS + STEPS):
            inputs, labels = batch_of(step, rank, size)
            loss = nn.functional.cross_entropy(driver.network()(inputs), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            driver.observe(loss)
        driver.end_epoch()
        if rank == 0:
            print(f"{size} ranks, boundary {driver.history[-1]}: loss {driver.losses[-1]:.12f}")
    return driver.losses


def on_rank(rank: int, size: int, store: str) -> None:
    init = f"file://{store}" if store else "env://"
    distributed.init_process_group("gloo", init_method=init, rank=rank, world_size=size)
    losses = train(rank, size)
    distributed.barrier()
    distributed.destroy_process_group()
    if rank == 0:
        alone = train(0, 1)
        print("largest difference:", max(abs(a - b) for a, b in zip(losses, alone, strict=True)))
        assert torch.allclose(torch.tensor(losses), torch.tensor(alone), rtol=0, atol=1e-10)


if __name__ == "__main__":
    if "RANK" in os.environ:
        on_rank(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "")
    else:
        with tempfile.TemporaryDirectory() as folder:
            multiprocessing.spawn(on_rank, (2, f"{folder}/store"), nprocs=2)
        print("weights in shards have learned what one process does")

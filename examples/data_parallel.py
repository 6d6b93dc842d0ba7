"""Two ranks of a data parallel run, each with its own approximation schedule.

In turns, one rank skips the weight gradients of every other convolution while the other computes
them: a table of layers, steps and ranks. Run it with ``python examples/data_parallel.py``; with
``torchrun`` each rank would call `train` the same way.
"""

import os

import torch
from torch import distributed, multiprocessing, nn

import fxlocal
from fxlocal.schedules import Approximation, combine

RANKS, STEPS = 2, 8


def average_gradients(model: nn.Module) -> None:
    """What DistributedDataParallel does, for networks that change by the step."""
    for parameter in model.parameters():
        distributed.all_reduce(parameter.grad)
        parameter.grad /= RANKS


def train(rank: int, store: str, report) -> None:
    distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=RANKS)
    torch.manual_seed(0)  # equal weights on every rank
    model = nn.Sequential(
        *(nn.Sequential(nn.Conv2d(c, 8, 3, padding=1), nn.ReLU()) for c in (3, 8, 8)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    even, odd = slice(0, None, 2), slice(1, None, 2)
    every_other = slice(None, None, 2)
    schedule = combine(
        Approximation(fxlocal.Zero(), every_other, batches=even, ranks=even),
        Approximation(fxlocal.Zero(), every_other, batches=odd, ranks=odd),
    )
    driver = fxlocal.Driver(model, schedule, optimizer)
    driver.start_epoch()
    torch.manual_seed(1 + rank)  # every rank its own images
    for _ in range(STEPS):
        images, labels = torch.randn(16, 3, 8, 8), torch.randint(4, (16,))
        loss = nn.functional.cross_entropy(driver.network()(images), labels)
        loss.backward()
        average_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
        driver.observe(loss)
    driver.end_epoch()
    report.put((rank, driver.losses[0], sum(p.sum().item() for p in model.parameters())))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    store = f"/tmp/fxlocal-{os.getpid()}"
    report = multiprocessing.get_context("spawn").SimpleQueue()
    multiprocessing.spawn(train, (store, report), nprocs=RANKS)
    losses = dict((rank, rest) for rank, *rest in (report.get() for _ in range(RANKS)))
    for rank in range(RANKS):
        print(f"rank {rank}: mean loss {losses[rank][0]:.4f}, weights {losses[rank][1]:.4f}")

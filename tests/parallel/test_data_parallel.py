"""Ranks of a data parallel run: each has its own column of the table, and all decide alike."""

import copy

import pytest
import torch
from torch import distributed, multiprocessing, nn

import fxlocal
from fxlocal import Driver, Zero
from fxlocal.schedules import Approximation, Plateau, combine

RANKS, STEPS, EPOCHS = 2, 3, 4
EVEN, ODD = slice(0, None, 2), slice(1, None, 2)
ROWS = slice(None)
# Rank 0 approximates in even steps, rank 1 in odd ones, until the mean loss of both stops falling.
SCHEDULE = Plateau(
    combine(
        Approximation(Zero(), ROWS, EVEN, ranks=slice(0, 1)),
        Approximation(Zero(), ROWS, ODD, ranks=slice(1, 2)),
    ),
    patience=1,
)
LOSSES = [(4.0, 1.0), (2.0, 2.0), (1.0, 3.0), (1.0, 1.0)]  # by epoch and rank; means 2.5, 2, 2, 1


def build():
    torch.manual_seed(0)
    convs = [nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Tanh()) for _ in range(3)]
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(3 * 16, 2)).double()


def batch(epoch, step, rank):
    generator = torch.Generator().manual_seed(100 * epoch + 10 * step + rank)
    return torch.randn(4, 3, 4, 4, generator=generator, dtype=torch.float64)


def train(rank, store, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=RANKS)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    driver = Driver(model, SCHEDULE, optimizer)
    for epoch in range(EPOCHS):
        driver.start_epoch()
        for step in range(STEPS):
            driver.network()(batch(epoch, step, rank)).square().sum().backward()
            for parameter in model.parameters():
                distributed.all_reduce(parameter.grad)
                parameter.grad /= RANKS
            optimizer.step()
            optimizer.zero_grad()
            driver.observe(torch.tensor(LOSSES[epoch][rank]))
        driver.end_epoch()
    result = {"losses": driver.losses, "state": model.state_dict()}
    result["switch"] = driver.schedule.switch
    torch.save(result, f"{folder}/{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def by_hand():
    """One process that computes both ranks' gradients and averages them."""
    model = build()
    approximated = {"1.0.weight", "2.0.weight"}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(EPOCHS):
        for step in range(STEPS):
            total = [torch.zeros_like(p) for p in model.parameters()]
            for rank in range(RANKS):
                own = copy.deepcopy(model)
                own(batch(epoch, step, rank)).square().sum().backward()
                for sum_, (name, p) in zip(total, own.named_parameters(), strict=True):
                    zero = epoch < 3 and step % 2 == rank and name in approximated
                    sum_ += 0 * p.grad if zero else p.grad
            for parameter, sum_ in zip(model.parameters(), total, strict=True):
                parameter.grad = sum_ / RANKS
            optimizer.step()
    return model.state_dict()


@pytest.mark.slow  # starts two processes
def test_two_ranks_equal_one_process_with_both_columns(tmp_path):
    multiprocessing.spawn(train, (tmp_path / "store", tmp_path), nprocs=RANKS)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS))
    assert first["losses"] == second["losses"] == [2.5, 2.0, 2.0, 1.0]
    assert first["switch"] == second["switch"] == 3  # neither rank's own losses would tell so
    expected = by_hand()
    for name, value in expected.items():
        torch.testing.assert_close(first["state"][name], value, rtol=1e-12, atol=1e-12)
        assert torch.equal(first["state"][name], second["state"][name]), name


def test_without_ranks_a_driver_is_rank_0():
    driver = Driver(build(), SCHEDULE)
    plans = [driver.schedule.plan(driver.analysis, 0, 0, rank) for rank in range(RANKS)]
    assert plans[0] != plans[1]
    driver.start_epoch()
    assert fxlocal.explain(driver.network()).startswith(repr(plans[0]))

"""Ranks with different numbers of batches: told so at the end of the shorter one's epoch."""

import os

import pytest
import torch
from support.ranks import RULES, batch, build, in_processes
from torch import optim

from fxlocal import Driver, replicate
from fxlocal.schedules import Static


def drive(rank, folder, rule, steps):
    """Save what is raised where each rank takes ``steps`` of its own, and the driver's epochs."""
    schedule = Static(epochs=3, largest=0.9, start=0.2, rule=RULES[rule], align=False)
    driver = replicate(Driver(build(), schedule))
    driver.optimizer = optim.SGD(driver.parameters(), lr=0.1)
    driver.start_epoch()
    try:
        for epoch in range(2):
            for step in range(steps[rank] if epoch else 2):
                loss = driver.network()(batch(step, 2)).square().mean()
                loss.backward()
                driver.optimizer.step()
                driver.optimizer.zero_grad()
                driver.observe(loss)
            driver.end_epoch()
            driver.start_epoch()
    except RuntimeError as error:
        torch.save((str(error), driver.history, driver.losses), folder / f"{rank}.pt")
        os._exit(0)  # nothing more can be said to the other rank


@pytest.mark.slow  # starts processes
@pytest.mark.parametrize(("rule", "steps"), [("freeze", (2, 3)), ("hebbian", (4, 2))])
def test_both_ranks_are_told(rule, steps, tmp_path):
    for rank, (said, history, losses) in enumerate(
        in_processes(drive, tmp_path, tmp_path, rule, steps)
    ):
        assert f"1 of 2 ranks ended the epoch (this is rank {rank}), and the others go on" in said
        assert len(history) == len(losses) == 1  # the epoch was not ended

"""PruneTrain under replicate: all ranks cut as one process does with all samples."""

import pytest
import torch
from support.ranks import build_in_turn, in_threads
from torch import nn

from fxlocal import Driver, Plan, PruneTrain, replicate
from fxlocal.schedules import Constant

EPOCHS, STEPS = 3, 2


class Residual(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.first, self.second = nn.Conv2d(width, 3, 1), nn.Conv2d(3, width, 1)

    def forward(self, x):
        return x + self.second(self.first(x).tanh())


def build():
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(2, 6, 3), nn.Tanh(), Residual(), Residual()),
        *(nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)),
    )
    with torch.no_grad():
        for weight in (net[2].first.weight, net[2].second.weight, net[4].weight[:3]):
            weight.mul_(1e-3)  # a branch that goes, and some channels
        net[7].weight[:, :12].mul_(1e-3)
    return net.double()


def run(rank=0, sizes=(4, 2), alone=True):
    def make():
        driver = Driver(build(), Constant(Plan()))
        driver.optimizer = torch.optim.SGD(driver.parameters(), lr=0.01, momentum=0.9)
        return driver, PruneTrain(driver.model, driver.optimizer, every=1, threshold=0.05)

    driver, prune = make() if alone else build_in_turn(make)
    if not alone:
        replicate(driver)
    sent, expected = [], []
    for _ in range(EPOCHS):
        in_turn(alone, driver.start_epoch)
        sizes_left = [p.numel() for p in driver.model.parameters()]  # and of each, if it is there
        expected.append(STEPS * (3 + sum(sizes_left) + len(sizes_left)) * 8)
        before = sent_bytes(driver)
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(sum(sizes), 2, 6, 6, dtype=torch.float64, generator=generator)
            x = x if alone else x.split(sizes)[rank]
            loss = in_turn(alone, driver.network)(x).square().mean()
            (loss + prune.penalty(loss, len(x))).backward()
            driver.optimizer.step()
            driver.optimizer.zero_grad()
            driver.observe(loss)
        driver.end_epoch()
        in_turn(alone, prune.end_epoch)
        in_turn(alone, driver.follow_cuts)
        sent.append(sent_bytes(driver) - before)
    state = driver.model.state_dict()
    return state, prune.kept, float(prune.strength), driver.losses, (sent, expected)


def sent_bytes(driver):
    reducer = driver.captured.meta.get("reducer")
    return reducer.sent_bytes if reducer else 0


def in_turn(alone, function):
    return function() if alone else build_in_turn(function)


@pytest.mark.parametrize("sizes", [(4, 4), (4, 2), (1, 3, 2)], ids=str)
def test_ranks_cut_as_one_process_does(sizes):
    state, kept, strength, losses, _ = run(sizes=sizes)
    assert kept["2.first"] == [] and kept["4"] and len(kept["4"]) < 8  # or nothing is tried
    found = in_threads(lambda rank: run(rank, sizes, alone=False), size=len(sizes))
    for own, own_kept, own_strength, own_losses, (sent, expected) in found:
        assert own_kept == kept
        assert own_strength == pytest.approx(strength, rel=1e-10)
        assert own_losses == pytest.approx(losses, rel=1e-10)
        torch.testing.assert_close(own, state, rtol=0, atol=1e-10)
        torch.testing.assert_close(own, found[0][0], rtol=0, atol=0)
        assert sent == expected and sent[1] < sent[0]  # nothing is sent for what is gone

"""Drivers with a cache of a frozen prefix, and runs with them."""

import torch

from fxlocal import Driver, Freeze, LocalPrefix, Plan
from fxlocal.schedules import Constant
from support import laws
from support.nets import NETS

RESIDUAL = NETS["residual"].build
DATA = torch.randn(17, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def prefix(until, norm="eval", rule=None):
    return Constant(Plan(local=LocalPrefix(until, rule or Freeze(), norm)))


class Moving:
    """Freezes up to a layer in each epoch."""

    def __init__(self, *boundaries):
        self.boundaries = boundaries

    def plan(self, analysis, epoch, step=0, rank=0):
        boundary = self.boundaries[min(epoch, len(self.boundaries) - 1)]
        return Plan(local=LocalPrefix(boundary, Freeze(), "eval")) if boundary else Plan()


def train(model, schedule, cache, epochs=5, batch=8, compile=False):
    """Train on shuffled batches of which the last is left out; return losses and driver."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=0.01)
    driver = Driver(model, schedule, optimizer, cache=cache, compile=compile)
    losses = []
    for epoch in range(epochs):
        driver.start_epoch()
        torch.manual_seed(epoch)
        for ids in torch.randperm(len(DATA))[: len(DATA) // batch * batch].split(batch):
            told = {} if cache is None else {"sample_ids": ids}
            loss = laws.loss_of(driver.network()(DATA[ids], **told)).tanh()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            driver.observe(loss)
            losses.append(loss.item())
        driver.end_epoch()
    return losses, driver

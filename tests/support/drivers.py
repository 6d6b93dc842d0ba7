"""Drivers of a small model, and epochs of training with them."""

import torch
from torch import nn

from fxlocal import Hebbian, LocalPrefix, Plan
from fxlocal.schedules import Static
from support import laws

X = (torch.randn(3, 4, generator=torch.Generator().manual_seed(3)),)
STATIC = Static(epochs=6, largest=0.9, start=0.2, rule=Hebbian(0.01), rate_decay=(0.5, 1))
SGD = dict(lr=0.05, momentum=0.9, weight_decay=0.01)


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def local(until, rule=None):
    return Plan(local=LocalPrefix(until, rule or Hebbian(0.01)))


def run(driver, epochs, inputs, steps=2):
    """Train for ``epochs`` more epochs; return each step's loss."""
    return run_by(driver, epochs, lambda net, _: laws.loss_of(net(*inputs)).square(), steps)


def run_by(driver, epochs, loss_of, steps=2):
    """Train for ``epochs`` more, by ``loss_of`` the network and the number of the step so far."""
    losses = []
    for epoch in range(driver.epoch, driver.epoch + epochs):
        driver.start_epoch()
        for step in range(steps):
            loss = loss_of(driver.network(), epoch * steps + step)
            loss.backward()
            if driver.optimizer is not None:
                driver.optimizer.step()
                driver.optimizer.zero_grad()
            driver.observe(loss)
            losses.append(float(loss.detach()))
        driver.end_epoch()
    return losses

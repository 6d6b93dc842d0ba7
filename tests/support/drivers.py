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
    losses = []
    for _ in range(epochs):
        driver.start_epoch()
        for _ in range(steps):
            loss = laws.loss_of(driver.network()(*inputs)).square()
            loss.backward()
            if driver.optimizer is not None:
                driver.optimizer.step()
                driver.optimizer.zero_grad()
            driver.observe(loss)
            losses.append(float(loss.detach()))
        driver.end_epoch()
    return losses

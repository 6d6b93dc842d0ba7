"""Models that are attached to a driver, and whether they learn in their forward."""

import torch

import fxlocal
from fxlocal import Hebbian, LocalModules, Plan
from fxlocal.schedules import Constant, Static
from support.drivers import SGD, X, local

LEARNING = Constant(local(2))
EVERY_OTHER = Static(epochs=1, start=0.5, largest=0.9, rule=Hebbian(0.01), update_every=2)
MODULES = Plan(modules=LocalModules(2, num_classes=2))
Y = torch.tensor([0, 1, 0])


def attached(model, schedule=LEARNING, **options):
    """Attach a model, give the driver an optimizer and begin an epoch."""
    driver = fxlocal.attach(model, schedule, **options)
    driver.optimizer = torch.optim.SGD(model.parameters(), **SGD)
    driver.start_epoch()
    return driver


def moves(model, inputs=X):
    """Tell whether a forward moves the first weight."""
    before = next(model.parameters()).detach().clone()
    model(*inputs)
    return not torch.equal(before, next(model.parameters()))

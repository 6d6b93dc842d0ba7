"""Training with checkpointed stages beside training without."""

import copy

import torch

import fxlocal
from fxlocal import Checkpoint, Plan
from support import laws

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def checkpointed(count, **parts):
    return Plan(checkpoint=Checkpoint(count, "blocks"), **parts)


def both(build, plan, seed=0):
    """The rewritten network, its model, and the same model as it was."""
    torch.manual_seed(seed)
    ours = build()
    theirs = copy.deepcopy(ours)
    return fxlocal.transform(ours, plan), ours, theirs


def steps(model, network, count=3, images=IMAGES):
    """Take some steps and return the losses; gradients are left in the model."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    torch.manual_seed(1)
    for _ in range(count):
        optimizer.zero_grad()
        loss = laws.loss_of(network(images))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_trains_alike(ours, network, theirs, plain):
    assert steps(ours, network) == steps(theirs, plain)
    laws.assert_equal(laws.gradients(ours), laws.gradients(theirs), "gradient")
    laws.assert_equal(ours.state_dict(), theirs.state_dict(), "state")

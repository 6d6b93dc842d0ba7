"""Optimizers whose state was saved before there were heads: what was learned stays in its place."""

import pytest
import torch
from support.drivers import X, small

from fxlocal import Driver, LocalModules, Plan
from fxlocal.schedules import Constant

PLAN = Plan(modules=LocalModules(2, num_classes=2, balance="blocks"))
FIRST = ("behind", "before", "between", "alone")  # where the heads are


def trained(groups):
    """Return an optimizer that has taken a step in which gradients are numbers of their own."""
    optimizer = torch.optim.Adam(groups)
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        p.grad = torch.full_like(p, i + 1.0)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("place", FIRST)
def test_moments_are_placed_where_they_were(place):
    model = small()
    own = list(model.parameters())
    saved = trained([{"params": own[:2]}, {"params": own[2:]}]).state_dict()
    driver = Driver(model, Constant(PLAN), example_inputs=X)
    heads = list(driver.heads.parameters())
    first, second = {
        "behind": (own[:2], own[2:] + heads),
        "before": (heads + own[:2], own[2:]),
        "between": (own[:1] + heads[:1] + own[1:2], heads[1:] + own[2:]),
        "alone": (own[:2], own[2:]),
    }[place]
    groups = [{"params": first}, {"params": second, "lr": 1.0}]
    groups[1:1] = [{"params": heads, "lr": 2.0}] if place == "alone" else []
    driver.optimizer = optimizer = torch.optim.Adam(groups)
    with pytest.warns(UserWarning, match="without the heads of local modules, which begin anew"):
        optimizer.load_state_dict(saved)
    for i, p in enumerate(own):
        assert torch.equal(optimizer.state[p]["exp_avg"], torch.full_like(p, (i + 1) * 0.1))
    assert not any(p in optimizer.state for p in heads)
    assert optimizer.param_groups[-1]["lr"] == 1e-3  # as it was saved
    if place == "alone":
        assert optimizer.param_groups[1]["lr"] == 2.0
    own_state = trained(groups).state_dict()
    optimizer.load_state_dict(own_state)  # one with heads is loaded as it is
    assert len(optimizer.state) == len(own) + len(heads)

"""replicate: N ranks equal one process with all samples, while the boundary moves."""

import pytest
import torch
from support.ranks import RULES, batch, build, build_in_turn, in_threads
from torch import nn

from fxlocal import Driver, Plan, TopK, Zero, replicate
from fxlocal.schedules import Approximation, Constant, Dynamic, Static, combine

EPOCHS, STEPS = 5, 3
MOVING = dict(epochs=EPOCHS, largest=0.9, start=0.2, align=False)
SCHEDULES = {
    **{name: Static(rule=rule, **MOVING) for name, rule in RULES.items()},
    "supervised": Static(rule=RULES["hebbian"], weak_supervision=True, **MOVING),
    "refreshed": Static(rule=RULES["oja"], refresh_every=2, **MOVING),
    "seldom": Static(rule=RULES["hebbian"], update_every=2, **MOVING),
    "dynamic": Dynamic(EPOCHS, alpha=1, largest=0.9, shift=0.3, rule=RULES["hebbian"], align=False),
    "zero": combine(Constant(Plan()), Approximation(Zero(none=True), layers=slice(None))),
    "topk": combine(Constant(Plan()), Approximation(TopK(3, force=True), layers=slice(None))),
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def sizes_of(step, size):
    """How many samples each rank has: the last batch of an epoch is ragged."""
    return [4] * size if step % STEPS < STEPS - 1 else [1 + (rank + 1) % 3 for rank in range(size)]


def run(schedule, optimizer, rank=0, size=2, alone=True):
    """Train; on one rank of several, or alone on the samples of all."""

    def make():
        driver = Driver(build(rank), SCHEDULES[schedule], example_inputs=(batch(0, 2),))
        driver.optimizer = OPTIMIZERS[optimizer](driver.parameters())
        return driver

    driver = make() if alone else build_in_turn(make)
    driver = driver if alone else replicate(driver)
    for epoch in range(EPOCHS):
        in_turn(alone, driver.start_epoch)
        for step in range(STEPS * epoch, STEPS * epoch + STEPS):
            sizes = sizes_of(step, size)
            x = batch(step, sum(sizes))
            x = x if alone else x.split(sizes)[rank]
            net = in_turn(alone, driver.network)
            loss = net(x).square().mean()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(driver.parameters(), 0.5)
            driver.optimizer.step()
            driver.optimizer.zero_grad()
            driver.observe(loss)
        in_turn(alone, driver.end_epoch) if alone else driver.end_epoch()
    return driver.model.state_dict(), driver.losses, driver.history, float(norm)


def in_turn(alone, function):
    return function() if alone else build_in_turn(function)


def on_rank(rank, schedule, optimizer, size):
    return run(schedule, optimizer, rank, size, alone=False)


CASES = [("hebbian", "adamw", 2), ("dynamic", "sgd", 2)]
OTHERS = [
    (schedule, optimizer, size)
    for schedule, size in [(name, size) for size in (2, 4) for name in SCHEDULES]
    for optimizer in (OPTIMIZERS if size == 2 or schedule in ("hebbian", "oja") else ("adamw",))
]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS if case not in CASES]


@pytest.mark.parametrize(("schedule", "optimizer", "size"), CASES)
def test_ranks_equal_one_process_with_a_moving_boundary(schedule, optimizer, size):
    found = in_threads(on_rank, schedule, optimizer, size, size=size)
    state, losses, history, norm = run(schedule, optimizer, size=size)
    assert len(set(history)) >= {"dynamic": 2, "zero": 1, "topk": 1}.get(schedule, 4)
    for theirs, their_losses, their_history, their_norm in found:
        assert their_history == history
        assert their_losses == pytest.approx(losses, abs=1e-10)
        assert their_norm == pytest.approx(norm, abs=1e-10)
        for name, value in state.items():
            torch.testing.assert_close(theirs[name], value, rtol=0, atol=1e-10)
            assert torch.equal(theirs[name], found[0][0][name]), name

"""Weak supervision: local steps go backwards in the epoch after the mean loss rose."""

from functools import partial

import pytest
import torch
from support import oracle
from support.nets import NETS

import fxlocal
from fxlocal import Custom, Driver, Hebbian, LocalPrefix, Plan
from fxlocal.schedules import Constant, Static


def build():
    return NETS["residual"].build().double()


@pytest.mark.parametrize("weak", [True, False])
def test_local_steps_go_backwards_after_the_loss_has_risen(weak):
    model = build()
    schedule = Static(9, c1=1.0, c2=0.0, rule=Hebbian(0.25), weak_supervision=weak)
    driver = Driver(model, schedule)
    signs, rates = [], []
    for loss in (2.0, 1.0, 3.0, 3.0, 2.5, 4.0, 1.0):
        driver.start_epoch()
        signs.append(driver.sign)
        network = driver.network()
        rates.append(float(network.additions["rate"]))
        driver.observe(torch.tensor(loss))
        driver.end_epoch()
    assert signs == ([1, 1, 1, -1, 1, 1, -1] if weak else [1] * 7)
    assert rates == [0.25 * sign for sign in signs]


def test_twenty_steps_under_weak_supervision_are_the_oracles():
    """Algorithm 2 by hand, on losses as told, so that the sign changes."""
    told = [2.0, 1.0, 3.0, 3.5, 3.0, 2.0, 2.5, 1.0, 0.5, 0.4]
    net, rate = NETS["chain"], 2**-7
    ours, theirs = net.build().double(), net.build().double()
    (x,) = (value.double() for value in net.inputs())
    by_hand = oracle.MomentumSgd(theirs, **oracle.SETTINGS)
    optimizer = torch.optim.SGD(ours.parameters(), **oracle.SETTINGS)
    schedule = Static(10, c1=2.0, c2=0.0, rule=Hebbian(rate))
    driver = Driver(ours, schedule, optimizer=optimizer)
    for epoch, loss in enumerate(told):
        sign = -1 if epoch > 1 and told[epoch - 2] < told[epoch - 1] else 1
        prefix = oracle.Prefix(2, sign * rate)
        forward = partial(oracle.ORACLES["chain"], theirs, prefix=prefix)
        expected = oracle.train(theirs, by_hand, [forward] * 2, x)
        driver.start_epoch()
        trace = [oracle.train(ours, optimizer, [driver.network()], x)[0] for _ in range(2)]
        driver.observe(torch.tensor(loss))
        driver.end_epoch()
        # 1e-8: the delta by hand is summed in another order, and the steps carry it on
        torch.testing.assert_close(trace, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-8, atol=1e-8)


def test_a_step_backwards_undoes_a_step_along_the_same_delta():
    model = NETS["chain"].build()
    network = fxlocal.transform(model, Plan(local=LocalPrefix(1, Custom(lambda w, a, z: w.sign()))))
    before = model.conv1.weight.detach().clone()
    for rate in (0.5, -0.5):
        network.additions["rate"].fill_(rate)
        network(*NETS["chain"].inputs())
    torch.testing.assert_close(model.conv1.weight.detach(), before)


def test_a_plain_schedule_has_no_weak_supervision():
    driver = Driver(build(), Constant(Plan(local=LocalPrefix(1))))
    for loss in (1.0, 2.0):
        driver.start_epoch()
        driver.observe(torch.tensor(loss))
        driver.end_epoch()
    assert driver.sign == 1

"""A rate for each layer before the boundary, which decays from when that layer turned local."""

from functools import partial

import pytest
import torch
from support import oracle
from support.nets import NETS
from torch import nn
from torch.optim.swa_utils import AveragedModel

import fxlocal
from fxlocal import Driver, Freeze, Hebbian, LocalPrefix, Plan, PlanError
from fxlocal.schedules import Dynamic, Static

RATE, LOSSES = 2**-5, [2.0, 1.0, 3.0, 3.5, 3.0, 2.0, 2.5, 1.0]
STATIC = Static(8, "linear", c1=0.0, c2=0.5, rule=Hebbian(RATE), rate_decay=(0.5, 2), align=False)


def rates_by_hand(history):
    """Each layer's rate in the last epoch of a history of boundaries: a loop over both."""
    begun, rates = {}, []
    for epoch, boundary in enumerate(history):
        for layer in range(boundary):
            begun.setdefault(layer, epoch)
    for layer in range(history[-1]):
        decays = (len(history) - 1 - begun[layer]) // 2
        rates.append(RATE * 0.5**decays)
    return tuple(rates)


def test_sixteen_steps_and_a_resume_between_are_the_oracles():
    """Algorithm 2 by hand with the rate lr_L of each layer L, and a sign that changes."""
    net = NETS["chain"]
    (x,) = (value.double() for value in net.inputs())
    theirs = net.build().double()
    by_hand = oracle.MomentumSgd(theirs, **oracle.SETTINGS)

    def driver():
        ours = net.build().double()
        optimizer = torch.optim.SGD(ours.parameters(), **oracle.SETTINGS)
        return Driver(ours, STATIC, optimizer=optimizer)

    ours, history, seen = driver(), [0, 1, 1, 2, 2, 3, 3, 3], set()
    for epoch, loss in enumerate(LOSSES):
        if epoch == 4:
            state, ours = ours.state_dict(), driver()
            ours.load_state_dict(state)
        sign = -1 if epoch > 1 and LOSSES[epoch - 2] < LOSSES[epoch - 1] else 1
        rates = tuple(sign * rate for rate in rates_by_hand(history[: epoch + 1]))
        seen.add(rates)
        prefix = oracle.Prefix(history[epoch], rates)
        forward = partial(oracle.ORACLES["chain"], theirs, prefix=prefix)
        expected = oracle.train(theirs, by_hand, [forward] * 2, x)
        ours.start_epoch()
        trace = [oracle.train(ours.model, ours.optimizer, [ours.network()], x)[0] for _ in "ab"]
        ours.observe(torch.tensor(loss))
        ours.end_epoch()
        # 1e-8: the delta by hand is summed in another order, and the steps carry it on
        torch.testing.assert_close(trace, expected, rtol=1e-8, atol=1e-8)
    assert ours.history == history
    assert (-RATE, -RATE) not in seen and (-RATE / 2, -RATE) in seen
    assert len(ours.networks) == 2  # of the two boundaries since the resume, whatever the rates


@pytest.mark.parametrize(
    "schedule",
    [STATIC, Dynamic(8, alpha=1, rule=Hebbian(RATE), rate_decay=(0.5, 2))],
    ids=["static", "dynamic"],
)
def test_a_schedule_counts_from_the_epoch_of_each_layers_own_move(schedule):
    analysis = fxlocal.analyze(nn.Sequential(*(nn.Linear(2, 2) for _ in range(9))))
    history = []
    for epoch in range(12):
        history.append(schedule.boundary(analysis, epoch))
        plan = schedule.plan(analysis, epoch)
        assert plan.rates == rates_by_hand(history)
        assert plan.rate == min(plan.rates, default=0.0)
        if isinstance(schedule, Dynamic):  # moves after every third epoch
            schedule.end_epoch(analysis, 1.0 if epoch % 3 else 9.0)
    assert len(set(plan.rates)) > 1


def test_the_plans_that_may_come_have_their_least_rates():
    analysis = fxlocal.analyze(nn.Sequential(*(nn.Linear(2, 2) for _ in range(9))))
    schedule = Dynamic(8, alpha=1, rule=Hebbian(RATE), rate_decay=(0.5, 2))
    *_, last = schedule.possible_plans(analysis, 0)
    assert last.rates == rates_by_hand([0, 1, 2, 3, 4, 5, 6, 6])


def test_rates_are_values_in_one_tensor_whatever_the_boundary():
    model, (x,) = NETS["chain"].build(), NETS["chain"].inputs()
    one, two = (Plan(local=LocalPrefix(n, Hebbian(), rates=(0.5, 0.25)[:n])) for n in (1, 2))
    networks = [fxlocal.transform(model, plan) for plan in (Plan(), one, two)]
    kinds = {tuple((b.shape, b.dtype) for b in net.buffers()) for net in networks}
    assert len(kinds) == 1
    AveragedModel(networks[0]).update_parameters(networks[2])
    first, second = model.conv1.weight.detach().clone(), model.conv2.weight.detach().clone()
    networks[2](x)
    assert float((model.conv1.weight.detach() - first).norm()) == pytest.approx(0.5, rel=1e-4)
    assert float((model.conv2.weight.detach() - second).norm()) == pytest.approx(0.25, rel=1e-4)
    assert not fxlocal.verify(networks[2], x).unmet
    assert "%conv2_rate = call_function getitem(%rates, 1)" in fxlocal.explain(networks[2])
    idle = Plan(local=LocalPrefix(2, Hebbian(), rates=[0.0, 0.25]))
    assert not fxlocal.verify(fxlocal.transform(model, idle), x).unmet
    assert eval(repr(two), vars(fxlocal)) == two and "rates" not in repr(LocalPrefix(2))
    assert two.with_rate(0.0) == Plan(local=LocalPrefix(2, Hebbian(0.0), rates=(0.0, 0.0)))


@pytest.mark.parametrize("rates", [(-1.0,), (float("nan"),), (True,), ("a",), 0.1, {0.1}, None])
def test_what_is_no_rate_is_refused(rates):
    with pytest.raises(PlanError, match=r"rates=.*: give a tuple of numbers"):
        LocalPrefix(1, Hebbian(), rates=rates)


def test_rates_that_are_too_few_or_of_no_rule_are_refused():
    with pytest.raises(PlanError, match=r"Freeze\(\) has no rate"):
        LocalPrefix(1, Freeze(), rates=(0.1,))
    plan = Plan(local=LocalPrefix("conv3", Hebbian(), rates=(0.1,)))
    with pytest.raises(PlanError, match="1 rates for the 2 layers before the boundary; give one"):
        fxlocal.transform(NETS["chain"].build(), plan)
    narrow = Plan(local=LocalPrefix("conv3", Hebbian(9.0), rates=(9.0, 1e-6)))
    with pytest.raises(PlanError, match=r"layer 'conv2': .* one of rate 1e-06"):
        fxlocal.transform(NETS["chain"].build().bfloat16(), narrow)

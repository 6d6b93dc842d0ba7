"""The dynamic schedule: both papers' rules against loops by hand, and a driver that feeds it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.drivers import run_by
from support.nets import NETS
from torch import nn

import fxlocal
from fxlocal import CheckpointError, Driver, Freeze, Hebbian, LocalPrefix, Plan, PlanError
from fxlocal.schedules import Dynamic, Static


class Facts:
    def __init__(self, num_layers, edges=None):
        self.layers = tuple(range(num_layers))
        self.boundaries = tuple(range(num_layers)) if edges is None else edges


def fed(schedule, facts, norms):
    """The boundary of each epoch, asked for as the norms come in."""
    boundaries = [schedule.boundary(facts, 0)]
    for epoch, norm in enumerate(norms, 1):
        schedule.end_epoch(facts, norm)
        boundaries.append(schedule.boundary(facts, epoch))
    return boundaries


# --- the rules by hand ---------------------------------------------------------------------------


def exponential_by_hand(norms, alpha, decay, step, most):
    """Frontiers, Algorithm 1, a loop over epochs."""
    boundaries, boundary, average = [0], 0, None
    for norm in norms:
        average = norm if average is None else average + (1 - decay) * (norm - average)
        if norm <= alpha * average and boundary < most:
            boundary = min(boundary + step, most)
        boundaries.append(boundary)
    return boundaries


def window_by_hand(norms, alpha, length, step, most):
    """ICLR, Algorithm 1, a loop over epochs in the order of its lines."""
    boundaries, boundary, waited = [0], 0, 0
    for epoch, norm in enumerate(norms):
        average = sum(norms[max(epoch - length, 0) : epoch]) / length
        if norm <= alpha * average and waited >= length:
            boundary, waited = min(boundary + step, most), 0
        else:
            waited = waited + 1
        boundaries.append(boundary)
    return boundaries


NORMS = st.lists(st.floats(0.01, 10), max_size=20)


@given(NORMS, st.sampled_from([0.1, 0.5, 0.8, 1]), st.sampled_from([0.0, 0.5, 0.9]))
def test_exponential_rule_is_the_papers(norms, alpha, decay):
    schedule = Dynamic(20, alpha=alpha, shift=0.125, decay=decay, align=False)
    expected = exponential_by_hand(norms, alpha, decay, step=3, most=18)
    assert fed(schedule, Facts(24), norms) == expected


@given(NORMS, st.sampled_from([0.5, 0.95, 1]))
def test_window_rule_is_the_papers(norms, alpha):
    schedule = Dynamic(20, "window", alpha, shift=0.125, align=False)
    # K = 20 * 0.125 / 0.75 = 3.3
    expected = window_by_hand(norms, alpha, length=3, step=3, most=18)
    assert fed(schedule, Facts(24), norms) == expected


def test_a_window_lies_on_the_new_transition_layer_alone():
    """K = 3: what is decided in an epoch is not counted, so decisions are K + 1 epochs apart."""
    norms = [10, 10, 10, 9, 1, 1, 1, 1, 1, 0.9, 1, 1, 1, 0.5]
    expected = [0, 0, 0, 0, 4, 4, 4, 4, 4, 4, 8, 8, 8, 8, 12]
    assert window_by_hand(norms, 0.95, length=3, step=4, most=15) == expected
    schedule = Dynamic(12, "window", shift=0.2, largest=0.8, align=False)
    assert fed(schedule, Facts(20), norms) == expected
    blocks = Dynamic(12, "window", largest=0.8)  # four moves, to 4, 8, 12 and 16
    assert fed(blocks, Facts(20, (0, 4, 8, 12, 16)), norms) == expected


def test_a_window_has_the_papers_settings():
    window = Dynamic(12, "window")
    assert (window.alpha, window.shift, window.largest) == (0.95, "block", 0.75)
    plain = Dynamic(12)
    assert (plain.alpha, plain.shift, plain.largest) == (0.5, 0.12, 0.75)
    assert plain == Dynamic(12, alpha=0.5, shift=0.12) and "shift=0.12" in repr(plain)


@pytest.mark.parametrize("align", [True, False])
def test_a_shift_of_one_block_moves_to_the_next_edge(align):
    facts = Facts(20, (0, 1, 3, 8, 13, 17))
    schedule = Dynamic(9, alpha=1, shift="block", align=align)
    assert fed(schedule, facts, [1.0] * 6) == [0, 1, 3, 8, 13, 13, 13]
    # 12 epochs for 4 moves; for one, as many as leave an epoch to move after
    many, one = (Dynamic(12, "window", 1, largest=part) for part in (0.75, 0.1))
    assert [many._window(facts), one._window(facts)] == [3, 10]
    assert fed(one, facts, [1.0] * 11)[-2:] == [0, 1]
    assert fed(Dynamic(9, "window", alpha=1), Facts(1), [1.0] * 9) == [0] * 10
    assert len(list(Dynamic(9, shift="block", rule=Freeze()).possible_plans(facts, 0))) == 5


@given(NORMS, st.sampled_from(["exponential", "window"]), st.integers(4, 30), st.booleans())
def test_the_boundary_never_moves_left_nor_past_the_largest(norms, average, num_layers, align):
    edges = tuple(range(0, num_layers, 3))
    schedule = Dynamic(20, average, alpha=1, largest=0.7, align=align)
    facts = Facts(num_layers, edges)
    boundaries = fed(schedule, facts, norms)
    assert boundaries == sorted(boundaries)
    assert boundaries[-1] <= 0.7 * num_layers
    if align:
        assert set(boundaries) <= set(edges)
    assert [schedule.boundary(facts, epoch) for epoch in range(len(boundaries))] == boundaries


def test_an_aligned_move_snaps_down_but_passes_a_block_at_least():
    facts = Facts(20, (0, 1, 3, 8, 13, 17))
    schedule = Dynamic(9, alpha=1, shift=0.2, largest=0.75)
    assert fed(schedule, facts, [1.0] * 6) == [0, 3, 8, 8 + 5, 13, 13, 13]


def test_the_history_is_replayed_once_an_epoch(monkeypatch):
    calls = []
    rule = fxlocal.schedules.dynamic._exponential
    monkeypatch.setattr(
        "fxlocal.schedules.dynamic._exponential", lambda *a: calls.append(1) or rule(*a)
    )
    schedule, facts, norms = Dynamic(9, alpha=0.9), Facts(20), [1.0, 0.2, 0.1, 1.0]
    for epoch, norm in enumerate(norms, 1):
        schedule.end_epoch(facts, norm)
        for step in range(5):
            schedule.plan(facts, epoch, step)
    assert len(calls) == len(norms)
    one, other = fed(Dynamic(9, alpha=0.9), facts, norms), fed(Dynamic(9), Facts(8), norms)
    assert [schedule.boundary(facts, epoch) for epoch in range(5)] == one
    small = Dynamic(9)
    small.load_state_dict({"update_norms": [1.0] * 4})
    small.boundary(Facts(8), 4)
    small.load_state_dict({"update_norms": norms})
    assert [small.boundary(Facts(8), epoch) for epoch in range(5)] == other


def test_a_loss_of_control_moves_nothing():
    assert fed(Dynamic(9, alpha=1), Facts(20), [1.0, float("nan"), 1.0]) == [0, 2, 2, 2]


REFUSED = [
    ({"average": "mean"}, "average='mean': give 'exponential' or 'window'"),
    ({"epochs": 0}, "epochs=0: give a whole number"),
    ({"alpha": 0}, r"alpha=0: a fraction of the average update norm \(or 1\), in \(0, 1\)"),
    ({"alpha": 1.1}, "alpha=1.1: a fraction"),
    ({"alpha": float("nan")}, "alpha=nan: a fraction"),
    ({"alpha": "half"}, "alpha='half': a fraction"),
    ({"alpha": True}, "alpha=True: a fraction"),
    ({"average": "window", "shift": 0.9}, r"K = .* = 12 epochs: of 10 epochs none is left"),
    ({"average": "window", "shift": 0.75}, r"K = .* = 10 epochs: of 10 epochs none is left"),
    ({"average": "window", "shift": 0.7}, r"K = .* = 9 epochs: of 10 epochs none is left"),
    ({"shift": 0.0}, r'shift=0.0: a fraction of the layers \(or "block"\), in \(0, 1\)'),
    ({"shift": "blocks"}, "shift='blocks': a fraction"),
    ({"average": ["window"]}, "average=.*: give 'exponential' or 'window'"),
    ({"shift": 1.0}, "shift=1.0: a fraction"),
    ({"largest": 1.5}, "largest=1.5: a fraction of the layers"),
    ({"decay": 1.0}, r"decay=1.0: a fraction of the running average, in \[0, 1\)"),
    ({"rule": "oja"}, "rule='oja': give Hebbian"),
    ({"refresh_every": 0}, "refresh_every=0: give a whole number"),
]


@pytest.mark.parametrize("arguments,message", REFUSED, ids=lambda value: str(value)[:30])
def test_dynamic_refuses(arguments, message):
    with pytest.raises(PlanError, match=message):
        Dynamic(**{"epochs": 10, **arguments})


# --- in a driver ---------------------------------------------------------------------------------


def build():
    return NETS["residual"].build().double()


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)


def train(driver, epochs):
    """Train with a learning rate that falls, so that updates become small."""
    for _ in range(epochs):
        for group in driver.optimizer.param_groups:
            group["lr"] = 0.02 * 0.5**driver.epoch
        run_by(driver, 1, lambda net, step: net(batch(step)).square().mean())
    return driver


def driver_of(schedule, optimizer=torch.optim.SGD, **options):
    model = build()
    return Driver(model, schedule, optimizer=optimizer(model.parameters(), lr=0.02, **options))


SCHEDULES = {
    "exponential": Dynamic(10, alpha=0.9, shift=0.2, decay=0.5, rule=Hebbian(2**-7)),
    "window": Dynamic(10, "window", alpha=0.95, shift=0.2, rule=Hebbian(2**-7)),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_twenty_steps_are_those_of_plans_chosen_by_hand(name):
    """Norms and boundary by hand; the steps by transform, whose own oracle is elsewhere."""
    schedule = SCHEDULES[name]
    driver = train(driver_of(schedule), 10)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    analysis = fxlocal.analyze(model)
    edges, norms, losses, boundary, history = analysis.boundaries, [], [], 0, []
    for epoch in range(10):
        optimizer.param_groups[0]["lr"] = 0.02 * 0.5**epoch
        sign = -1 if epoch > 1 and losses[-1] > losses[-2] else 1
        weight = model.get_parameter(analysis.layers[boundary].weight)
        before = weight.detach().clone()
        rule = Hebbian(2**-7)
        net = fxlocal.transform(model, Plan(local=LocalPrefix(boundary, rule)))
        if boundary:
            net.additions["rate"].mul_(sign)
        total = 0.0
        for step in range(2):
            loss = net(batch(2 * epoch + step)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += float(loss.detach())
        losses.append(total / 2)
        norms.append(float((weight.detach() - before).square().sum().sqrt()))
        history.append(boundary)
        if name == "window":  # K = 10 * 0.2 / 0.75 = 2.7
            cells = window_by_hand(norms, 0.95, length=3, step=1, most=99)
        else:
            cells = exponential_by_hand(norms, 0.9, 0.5, step=1, most=99)
        if cells[-1] > cells[-2]:  # 0.2 * 7 layers is one layer: the next edge, up to 5
            boundary = min([edge for edge in edges if boundary < edge <= 5], default=boundary)
    assert driver.history == history
    assert driver.history[-1] > 0
    torch.testing.assert_close(driver.losses, losses, rtol=1e-6, atol=0)  # observed as float32
    torch.testing.assert_close(driver.model.state_dict(), model.state_dict(), rtol=1e-9, atol=1e-9)


def test_a_driver_works_on_a_copy_of_the_schedule():
    schedule = SCHEDULES["exponential"]
    first, second = (train(driver_of(schedule), 3) for _ in range(2))
    assert first.schedule.update_norms == second.schedule.update_norms
    assert schedule.update_norms == []


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "sgd foreach": (torch.optim.SGD, {"momentum": 0.9, "foreach": True, "weight_decay": 0.1}),
    "sgd fused": (torch.optim.SGD, {"momentum": 0.9, "fused": True, "weight_decay": 0.1}),
    "adam": (torch.optim.Adam, {"weight_decay": 0.1}),
    "adamw foreach": (torch.optim.AdamW, {"foreach": True, "weight_decay": 0.1}),
    "adamw fused": (torch.optim.AdamW, {"fused": True, "weight_decay": 0.1}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_form_of_optimizer_moves_a_local_layer(name):
    """Each weight of the prefix moves by the rate alone, though its momentum is not zero."""
    kind, options = OPTIMIZERS[name]
    model = build()
    optimizer = kind(model.parameters(), lr=0.01, **options)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    schedule = Static(4, c1=3.0, c2=1.0, rule=Hebbian(2**-7), weak_supervision=False)
    driver = Driver(model, schedule, optimizer=optimizer)
    for _ in range(4):
        driver.start_epoch()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        loss = driver.network()(batch(0)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        for layer in driver.analysis.layers[: driver.boundary]:
            moved = model.get_parameter(layer.weight).detach() - before[layer.weight]
            assert float(moved.norm()) == pytest.approx(2**-7, rel=1e-6), (name, layer.path)
        driver.end_epoch()
    assert driver.history[-1] == 3


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_resumes_exactly_in_the_middle(name):
    straight = train(driver_of(SCHEDULES[name], torch.optim.AdamW), 10)
    first = train(driver_of(SCHEDULES[name], torch.optim.AdamW), 5)
    second = driver_of(SCHEDULES[name], torch.optim.AdamW)
    second.load_state_dict(first.state_dict())
    train(second, 5)
    assert second.schedule.update_norms == straight.schedule.update_norms
    assert (second.history, second.losses) == (straight.history, straight.losses)
    for key, value in straight.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[key]), key


def test_another_model_is_refused_and_nothing_is_loaded():
    state = train(driver_of(SCHEDULES["exponential"]), 2).state_dict()
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    driver = Driver(model, SCHEDULES["exponential"])
    with pytest.raises(CheckpointError, match="another model"):
        driver.load_state_dict(state)
    assert driver.schedule.update_norms == []


def test_a_layer_whose_weight_is_computed_can_be_the_transition_layer():
    from torch.nn.utils.parametrizations import weight_norm

    model = nn.Sequential(weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    driver = Driver(model, Dynamic(3, rule=Freeze()), optimizer=optimizer)
    driver.start_epoch()
    driver.network()(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    driver.end_epoch()
    assert driver.schedule.update_norms[0] > 0

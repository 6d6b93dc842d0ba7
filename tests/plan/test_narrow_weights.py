"""Weights in bfloat16, float16: a step that rounding would lose is refused, or kept on average."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support import oracle
from support.computed import KINDS, Net
from torch import nn

import fxlocal
from fxlocal import (
    Custom,
    Driver,
    Freeze,
    Hebbian,
    LocalPrefix,
    NoEffectWarning,
    Oja,
    Plan,
    PlanError,
    schedules,
)

NARROW = [torch.bfloat16, torch.float16]
ops = torch.ops.fxlocal


def plan(rule, until=2):
    return Plan(local=LocalPrefix(until=until, rule=rule))


def ones(weight, pre, post):
    return torch.ones_like(weight)


def conv():
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(16, 2)
    return nn.Sequential(*layers), torch.randn(4, 3, 6, 6)


def linear():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.Linear(4, 2)), torch.randn(
        5, 6
    )


MODELS = {"conv": conv, "linear": linear}
RULES = [Hebbian(), Oja(), Custom(ones)]


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_default_rate_is_refused_and_told_what_to_do(name, dtype, rule):
    model, _ = MODELS[name]()
    before = copy.deepcopy(model.to(dtype).state_dict())
    digit = rf"{torch.finfo(dtype).eps:.2g}"
    said = rf"layer '0': its weight is {str(dtype)[6:]}, whose smallest relative step is {digit}"
    said += rf".*float32, with torch.autocast.*{type(rule).__name__}\(\.\.\., stochastic=True\)"
    with pytest.raises(PlanError, match=said):
        fxlocal.transform(model, plan(rule))
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())


def test_one_narrow_layer_is_named():
    model, _ = linear()
    model[2].bfloat16()
    fxlocal.transform(model, plan(Hebbian(), until=1))
    with pytest.raises(PlanError, match="layer '2': its weight is bfloat16"):
        fxlocal.transform(model, plan(Hebbian()))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("relative", [False, True])
def test_the_rate_that_the_refusal_names_is_taken_and_moves_the_weight(dtype, relative):
    model, x = linear()
    weight = model.to(dtype)[0].weight
    digit = torch.finfo(dtype).eps
    least = digit if relative else digit * float(weight.detach().float().norm())
    with pytest.raises(PlanError, match="rounding would lose it"):
        fxlocal.transform(model, plan(Hebbian(0.99 * least, relative=relative), until=1))
    network = fxlocal.transform(model, plan(Hebbian(1.01 * least, relative=relative), until=1))
    before = weight.detach().double()
    network(x.to(dtype))
    moved = float((weight.detach().double() - before).norm() / before.norm())
    assert moved == pytest.approx(digit, rel=0.5)  # a step of one digit, rounded


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *NARROW], ids=str)
@pytest.mark.parametrize("rule", [Freeze(), Hebbian(0.0), Hebbian(1e-9, stochastic=True)], ids=repr)
def test_what_loses_nothing_is_never_refused(rule, dtype):
    model, x = conv()
    fxlocal.transform(model.to(dtype), plan(rule))(x.to(dtype))


def test_zero_weights_take_any_step():
    model, x = linear()
    nn.init.zeros_(model.half()[0].weight)
    fxlocal.transform(model, plan(Hebbian(), until=1))(x.half())
    assert float(model[0].weight.detach().float().norm()) == pytest.approx(1e-4, rel=0.01)


def test_autocast_over_float32_weights_is_not_refused():
    model, x = conv()
    network = fxlocal.transform(model, plan(Hebbian(), until=1))
    before = model[0].weight.detach().clone()
    with torch.autocast("cpu", torch.bfloat16):
        network(x)
    assert float((model[0].weight.detach() - before).norm()) == pytest.approx(1e-4, rel=1e-3)


def test_a_frozen_narrow_weight_is_not_refused():
    model, _ = linear()
    model[0].bfloat16().requires_grad_(False)
    fxlocal.transform(model, plan(Hebbian()))


@pytest.mark.parametrize("name", ["masked", "normed", "symmetric"])
def test_a_computed_weight_is_refused_by_what_it_is_computed_from(name):
    model = Net(KINDS[name].build()).bfloat16()
    with pytest.raises(PlanError, match=r"its weight is bfloat16"):
        fxlocal.transform(model, plan(Hebbian(computed=True), until=1))
    fxlocal.transform(model, plan(Hebbian(computed=True, stochastic=True), until=1))


def test_a_rate_that_decays_below_the_last_digit_is_refused_before_the_first_step():
    model, _ = linear()
    rule, steady = Hebbian(0.5), {"start": 0.0, "largest": 0.9}
    static = schedules.Static(9, rule=rule, rate_decay=(0.1, 3), **steady)
    dynamic = schedules.Dynamic(9, rule=rule, rate_decay=(0.1, 3))
    Driver(model.bfloat16(), schedules.Static(9, rule=rule, **steady))
    for schedule in (static, dynamic):
        with pytest.raises(PlanError, match=r"one of rate 0.005 is"):
            Driver(model, schedule)
        Driver(model.float(), schedule)
        model.bfloat16()


def test_verify_names_weights_that_were_narrowed_afterwards():
    model, x = conv()
    network = fxlocal.transform(model, plan(Hebbian())).bfloat16()
    with pytest.warns(NoEffectWarning) as told:
        fxlocal.verify(network, x.bfloat16())
    texts = [str(one.message) for one in told]
    for layer in ("0", "2"):
        said = f"the local step of '{layer}' is "
        (text,) = (text for text in texts if text.startswith(said))
        assert "long instead of 0.0001: its weight is torch.bfloat16" in text
        assert "Hebbian(..., stochastic=True)" in text
    wide = fxlocal.transform(conv()[0], plan(Hebbian()))
    assert not fxlocal.verify(wide, x).unmet


# --- stochastic rounding -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_rounding_is_right_on_average_and_to_a_neighbour(dtype):
    digit = torch.finfo(dtype).eps
    starts = [1.0, -1.0, 0.75, -3.0, 2.0, 255.0, 1e-3, 0.0, 6.2e-5]
    start, parts = torch.tensor(starts).to(dtype), torch.tensor([0.3, -0.3, 0.01, -0.9])
    before = start.repeat(len(parts), 1).repeat(20_000, 1, 1)
    last = torch.where(start == 0, 2**-20, digit * 2 ** start.float().abs().log2().floor())
    step = (parts[:, None] * last).expand(before.shape)
    weight = before.clone()
    ops.add_steps_([weight], [step], stochastic=True)
    moved = weight.double() - before.double()
    # 20,000 draws of at most one digit: five deviations of the mean are 0.018 digits
    torch.testing.assert_close(moved.mean(0) / last, step[0].double() / last, rtol=0, atol=0.02)
    assert float((moved.abs() / last).max()) <= 1


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_weight_without_a_step_stays_bit_for_bit(dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype)
    values = values[values.isfinite() & (values.abs() >= 2**-24)]
    weight = values.clone()
    for _ in range(3):
        ops.add_steps_([weight], [torch.zeros_like(weight, dtype=torch.float32)], stochastic=True)
    assert torch.equal(weight, values)


@pytest.mark.sample(4)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("oja", [False, True])
def test_many_small_steps_add_up_to_what_float64_makes_of_them(name, oja, dtype):
    """The boundary is behind the first layer: its input is always the same."""
    model, x = MODELS[name]()
    layer, x = model.to(dtype)[0], x.to(dtype)
    before = layer.weight.detach().double()
    rate = torch.finfo(dtype).eps * float(before.norm()) / 20
    rule = Oja(rate, stochastic=True) if oja else Hebbian(rate, stochastic=True)
    network = fxlocal.transform(model, plan(rule, until=1))
    theirs, pre = before.clone(), x.double()
    for _ in range(200):
        network(x)
        bias = layer.bias.detach().double()
        if name == "conv":
            post = F.conv2d(pre, theirs, bias)
            delta = oracle.conv_delta(pre, post, (3, 3), (1, 1), (0, 0), (1, 1))
            energy = post.square().sum((0, 2, 3)).view(-1, 1, 1, 1)
        else:
            post = F.linear(pre, theirs, bias)
            delta, energy = oracle.linear_delta(pre, post), post.square().sum(0)[:, None]
        delta = delta - energy * theirs if oja else delta
        theirs += rate * delta / delta.norm()
    path, moved = theirs - before, layer.weight.detach().double() - before
    assert float((moved * path).sum() / path.square().sum()) == pytest.approx(1, abs=0.15)
    assert float((moved - path).norm() / path.norm()) < 0.5  # what the rounding adds averages out


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_small_steps_of_what_a_weight_is_computed_from_add_up_too(dtype):
    model = Net(KINDS["masked"].build()).to(dtype)
    weight, mask = model.layer.weight, model.layer.mask.view(5, 4).double()
    before, x = weight.detach().double(), torch.randn(3, 5, 4).to(dtype)
    rate = torch.finfo(dtype).eps * float(before.norm()) / 20
    rule = Hebbian(rate, computed=True, stochastic=True)
    network = fxlocal.transform(model, plan(rule, until=1))
    theirs, pre = before.clone(), x.double()
    for _ in range(200):
        network(x)
        post = F.linear(pre, theirs * mask, model.layer.bias.detach().double())
        delta = oracle.linear_delta(pre, post)
        theirs += rate * mask * delta / delta.norm()
    path, moved = theirs - before, weight.detach().double() - before
    assert float((moved * path).sum() / path.square().sum()) == pytest.approx(1, abs=0.15)
    assert torch.equal(moved[mask == 0], torch.zeros_like(moved[mask == 0]))


def test_rounding_to_the_nearest_keeps_nothing_of_such_steps():
    weight = torch.ones(64).bfloat16()
    for _ in range(100):
        ops.normalised_add_(weight, torch.ones(64), torch.tensor(1e-3))
    assert torch.equal(weight, torch.ones(64).bfloat16())
    for _ in range(100):
        ops.normalised_add_(weight, torch.ones(64), torch.tensor(1e-2), stochastic=True)
    assert float(weight.double().mean()) == pytest.approx(1 + 100 * 1e-2 / 8, rel=0.02)


def test_a_seed_decides_and_wide_weights_draw_nothing():
    for dtype, same in ((torch.bfloat16, False), (torch.float32, True)):
        weights = []
        for seed in (3, 3, 4):
            model, _ = linear()
            torch.manual_seed(0)
            for parameter in model.parameters():
                nn.init.normal_(parameter)
            network = fxlocal.transform(model.to(dtype), plan(Hebbian(1e-3, stochastic=True)))
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            network(torch.ones(5, 6, dtype=dtype))
            assert torch.equal(torch.get_rng_state(), before) is same
            weights.append(model[0].weight.detach().clone())
        assert torch.equal(weights[0], weights[1])
        assert torch.equal(weights[0], weights[2]) is same


def test_it_is_an_argument_and_compiles(fresh_compiler):
    model, x = linear()
    network = fxlocal.transform(model.bfloat16(), plan(Hebbian(0.01, stochastic=True), until=1))
    assert "normalised_add_(%_0_weight, %_0_delta, %rate, stochastic=True)" in str(
        fxlocal.format_graph(network)
    )
    before = model[0].weight.detach().double()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    compiled(x.bfloat16())
    moved = model[0].weight.detach().double() - before
    assert float(moved.norm()) == pytest.approx(0.01, rel=0.5)  # and what the rounding adds


def test_the_option_has_to_be_a_switch():
    with pytest.raises(PlanError, match=r"Oja\(stochastic='yes'\): give True or False"):
        Oja(stochastic="yes")
    assert repr(Custom(ones, stochastic=True)).endswith("relative=False, stochastic=True)")

"""Rules beside the plain Hebbian one: Oja's, relative steps, and a user's own function."""

import copy
import pickle
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from expecttest import assert_expected_inline
from support import laws, oracle
from support.nets import NETS
from torch import nn

import fxlocal
from fxlocal import Custom, Hebbian, LocalPrefix, Oja, Plan, PlanError

RATE = 2**-7  # the same number in float32 and float64


def plan(until, rule):
    return Plan(local=LocalPrefix(until=until, rule=rule))


def covariance(weight, pre, post, product):
    return product(pre, post - post.mean(0, keepdim=True))


def decay(weight, pre, post):
    return -weight


def inserted(rule):
    model = NETS["chain"].build()
    diff = fxlocal.diff_graphs(fxlocal.capture(model), fxlocal.transform(model, plan(1, rule)))
    return "\n".join(line.partition("  # ")[0] for line in diff.splitlines() if "conv1_" in line)


# --- golden --------------------------------------------------------------------------------------


def test_oja_has_a_delta_of_its_own():
    assert_expected_inline(
        inserted(Oja()),
        """\
+%conv1_weight = get_attr conv1.weight
+%conv1_delta = call_function fxlocal.conv_oja_delta(%x, %conv1, %conv1_weight, (1, 1), (1, 1), (1, 1), False, 1)
+%conv1_update = call_function fxlocal.normalised_add_(%conv1_weight, %conv1_delta, %rate)""",  # noqa: E501
    )


def test_a_relative_step_is_an_argument():
    assert inserted(Hebbian(relative=True)).endswith("%rate, relative=True)")


def test_a_users_function_stands_in_the_graph_by_its_name():
    assert_expected_inline(
        inserted(Custom(covariance)),
        """\
+%conv1_weight = get_attr conv1.weight
+%conv1_delta = call_function covariance(%x, %conv1, %conv1_weight)
+%conv1_update = call_function fxlocal.normalised_add_(%conv1_weight, %conv1_delta, %rate, skipped=%skipped)""",  # noqa: E501
    )


# --- oracle --------------------------------------------------------------------------------------


def hebbian_by_the_user(weight, pre, post, product):
    return product(pre, post)


RULES = {
    "hebbian": (Hebbian(RATE), {}),
    "hebbian relative": (Hebbian(RATE, relative=True), {"relative": True}),
    "oja": (Oja(RATE), {"oja": True}),
    "oja relative": (Oja(RATE, relative=True), {"oja": True, "relative": True}),
    "custom": (Custom(hebbian_by_the_user, RATE), {}),
    "custom relative": (Custom(hebbian_by_the_user, RATE, True), {"relative": True}),
}


NETS_OF_RULES = [("chain", 3, name) for name in RULES]
NETS_OF_RULES += [("residual", 4, "oja relative"), ("unet", 6, "oja"), ("unet", 6, "custom")]


@pytest.mark.parametrize("name,until,rule", NETS_OF_RULES)
def test_twenty_steps_are_the_oracles(name, until, rule):
    ours_rule, by_hand = RULES[rule]
    net = NETS[name]
    ours, theirs = net.build().double(), net.build().double()
    (x,) = (value.double() for value in net.inputs())
    prefix = oracle.Prefix(until, RATE, **by_hand)
    forward = partial(oracle.ORACLES[name], theirs, prefix=prefix)
    gentle = {**oracle.SETTINGS, "lr": 1e-3}  # 20 steps must not blow up a rounding error
    expected = oracle.train(theirs, oracle.MomentumSgd(theirs, **gentle), [forward] * 20, x)
    network = fxlocal.transform(ours, plan(until, ours_rule))
    optimizer = torch.optim.SGD(ours.parameters(), **gentle)
    trace = oracle.train(ours, optimizer, [network] * 20, x)
    # 1e-8: the delta by hand is summed in another order, and 20 steps carry it on
    torch.testing.assert_close(trace, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-8, atol=1e-8)


def test_oja_finds_the_first_principal_component():
    """The fixed point of the rule, by an independent way: the eigenvector of the covariance."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 4, generator=generator) * torch.tensor([3.0, 1.0, 1.0, 0.5])
    inputs = inputs @ torch.linalg.qr(torch.randn(4, 4, generator=generator)).Q
    model = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(1, 1))
    network = fxlocal.transform(model, plan(1, Oja(0.02)))
    for _ in range(300):
        network(inputs)
    weight = model[0].weight.detach()[0]
    first = torch.linalg.eigh(inputs.T @ inputs).eigenvectors[:, -1]
    assert abs(float(torch.cosine_similarity(weight, first, dim=0))) > 0.999
    assert float(weight.norm()) == pytest.approx(1, abs=0.03)  # to the length of a step


SLOW = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.sample(4)
@pytest.mark.parametrize("rule", [Custom(covariance, 0.1, True), SLOW(Oja(0.1))], ids=repr)
@pytest.mark.parametrize("name", NETS)
def test_rules_keep_the_laws(name, rule):
    net = NETS[name]
    model = net.build()
    last = fxlocal.analyze(model, *net.inputs()).layers[-1].index
    asked = plan(last, rule)
    laws.l2_output_is_exact(model, net.inputs(), asked)
    laws.l3_cut_blocks(model, net.inputs(), asked)
    laws.l5_source_is_untouched(model, net.inputs(), asked)
    laws.l6_same_plan_same_text(model, net.inputs(), asked)
    laws.l7_state_is_shared(model, net.inputs(), asked)


RULES_TO_COMPILE = [Custom(covariance, 0.1), SLOW(Hebbian(0.1, True)), SLOW(Oja(0.1))]


@pytest.mark.parametrize("rule", RULES_TO_COMPILE, ids=repr)
def test_compiled_is_uncompiled(rule):
    ours, theirs = NETS["residual"].build(), NETS["residual"].build()
    inputs = NETS["residual"].inputs()
    network = fxlocal.transform(ours, plan("block2", rule))
    laws.step(torch.compile(network, backend="aot_eager", fullgraph=True), inputs)
    laws.step(fxlocal.transform(theirs, plan("block2", rule)), inputs)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


# --- a user's function ---------------------------------------------------------------------------


def test_a_network_with_a_users_function_is_copied_and_pickled():
    net = NETS["chain"]
    network = fxlocal.transform(net.build(), plan(2, Custom(covariance, 0.1)))
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert fxlocal.diff_graphs(network, other) == ""
        other(*net.inputs())
        moved = other.conv1.weight.detach() - network.conv1.weight.detach()
        assert float(moved.norm()) == pytest.approx(0.1)


def test_the_repr_of_a_users_rule_has_no_address():
    assert repr(Custom(decay)) == f"Custom(delta={__name__}.decay, rate=0.0001, relative=False)"


class Spoiled:
    """A rule that returns NaN where the input is large, which the trial's is not."""

    def __call__(self, weight, pre, post):
        return weight * torch.where(pre.abs().max() > 100, torch.nan, 1.0)


def test_a_delta_that_is_not_finite_moves_nothing_and_is_counted():
    net = NETS["chain"]
    model = net.build()
    network = fxlocal.transform(model, plan(1, Custom(Spoiled(), 0.1)))
    before = model.conv1.weight.detach().clone()
    network(net.inputs()[0] * 1e4)
    assert torch.equal(model.conv1.weight, before)
    assert int(network.additions["skipped"]) == 1
    network(*net.inputs())
    assert float((model.conv1.weight.detach() - before).norm()) == pytest.approx(0.1)
    assert int(network.additions["skipped"]) == 1


REFUSED = {
    "another shape": (lambda weight, pre, post: weight[0], r"returned \(3, 3, 3\) for weight"),
    "no tensor": (lambda weight, pre, post: None, "returned NoneType for weight"),
    "NaN": (lambda weight, pre, post: weight / 0, "returned NaN or inf"),
    "raises": (lambda weight, pre, post: 1 / 0, "failed .*ZeroDivisionError: division by zero"),
    "arguments": (lambda weight: weight, "failed .*TypeError"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_rule_that_cannot_work_is_refused_before_any_edit(name):
    rule, message = REFUSED[name]
    model = NETS["chain"].build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PlanError, match=f"for layer 'conv1' {message}"):
        fxlocal.transform(model, plan(2, Custom(rule)))
    laws.assert_equal(dict(model.state_dict()), dict(before), "state")


def in_place(name):
    def rule(weight, pre, post):
        {"weight": weight, "pre": pre, "post": post}[name].mul_(0.5)
        return weight + 1

    return rule


@pytest.mark.parametrize("name", ["weight", "pre", "post"])
@pytest.mark.parametrize("model", [nn.Linear(3, 2), nn.Conv2d(3, 2, 1)], ids=["linear", "conv"])
def test_a_rule_that_changes_what_it_is_given_is_refused(name, model):
    model = nn.Sequential(model, nn.Linear(2, 2))
    with pytest.raises(PlanError, match=f"layer '0' changed {name} in place.*{name}.clone"):
        fxlocal.transform(model, plan(1, Custom(in_place(name))))


def of_tokens(weight, pre, post):
    return torch.einsum("bto,bti->oi", post, pre)


def test_a_linear_layers_rule_may_ask_for_sequences():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    network = fxlocal.transform(model, plan(1, Custom(of_tokens, 0.5)))
    before = model[0].weight.detach().clone()
    network(torch.randn(2, 5, 3))
    assert float((model[0].weight.detach() - before).norm()) == pytest.approx(0.5)


def test_the_trial_of_a_linear_layer_tells_of_the_rows_if_sequences_fail_too():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.raises(PlanError, match=r"returned \(4,\) for weight \(4, 3\), pre \(2, 3\)"):
        fxlocal.transform(model, plan(1, Custom(lambda weight, pre, post: weight[:, 0])))


def test_a_delta_of_another_shape_is_named_when_it_comes():
    def rule(weight, pre, post):
        return weight if pre.abs().max() < 100 else weight[0]

    model = NETS["chain"].build()
    network = fxlocal.transform(model, plan(2, Custom(rule)))
    said = r"the rule .*\.rule for layer 'conv1' returned \(3, 3, 3\) for weight \(4, 3, 3, 3\)"
    with pytest.raises(ValueError, match=said):
        network(NETS["chain"].inputs()[0] * 1e4)


def noisy(weight, pre, post):
    return torch.randn_like(weight)


def test_the_trial_draws_nothing_from_the_users_generator():
    model = NETS["chain"].build()
    before = torch.get_rng_state()
    fxlocal.transform(model, plan(2, Custom(noisy)))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_lambda_has_a_name_in_the_code():
    network = fxlocal.transform(NETS["chain"].build(), plan(1, Custom(lambda w, a, z: w)))
    assert "call_function custom_rule(" in fxlocal.format_graph(network)
    assert "custom_rule(x, conv1, conv1_weight)" in network.code and "lambda" not in network.code


# --- its name ------------------------------------------------------------------------------------


def scaled(weight, pre, post, by=1.0, like=None):
    return by * weight + 1


@dataclass(frozen=True)
class Scaled:
    by: float

    def __call__(self, weight, pre, post):
        return self.by * weight


NAMES = [
    (decay, f"{__name__}.decay"),
    (Spoiled(), f"{__name__}.Spoiled"),
    (Scaled(2.0), "Scaled(by=2.0)"),
    (partial(scaled, by=2), f"functools.partial({__name__}.scaled, by=2)"),
    (
        partial(partial(scaled, like=decay), by=Spoiled()),
        f"functools.partial({__name__}.scaled, like={__name__}.decay, by={__name__}.Spoiled)",
    ),
]


@pytest.mark.parametrize("rule,name", NAMES, ids=range(len(NAMES)))
def test_a_rules_name_tells_it_from_others_in_each_run(rule, name):
    assert Custom(rule).name == name


def test_a_partial_is_called_with_its_arguments_and_named_by_its_function():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
    network = fxlocal.transform(model, plan(1, Custom(partial(scaled, by=-1.0), 1.0)))
    assert "call_function scaled(" in fxlocal.format_graph(network)
    network(torch.ones(1, 2))  # delta = 1 - eye, of length sqrt(2)
    expected = torch.eye(2) + (1 - torch.eye(2)) / 2**0.5
    torch.testing.assert_close(model[0].weight.detach(), expected)


def test_a_rule_that_cannot_be_hashed_is_refused():
    @dataclass
    class Mutable:
        by: float

        def __call__(self, weight, pre, post):
            return weight

    with pytest.raises(PlanError, match=r"Mutable\(by=1.0\)\): unhashable type.*frozen dataclass"):
        Custom(Mutable(1.0))


class Needing(nn.Module):
    def forward(self, weight, pre, post, product):
        return product(pre, post)


class Asking(nn.Module):
    def forward(self, weight, pre, post, product=None):
        return product(pre, post)


@pytest.mark.parametrize("rule", [Needing(), Asking()], ids=["needed", "optional"])
def test_a_module_gets_the_product_that_its_forward_takes(rule):
    models = [NETS["chain"].build() for _ in range(2)]
    for model, one in zip(models, (Custom(rule, RATE), Hebbian(RATE)), strict=True):
        fxlocal.transform(model, plan(1, one))(*NETS["chain"].inputs())
    laws.assert_equal(models[0].state_dict(), models[1].state_dict(), "state")

"""Rules beside the plain Hebbian one: Oja's, relative steps, and a user's own function."""

import copy
import pickle
from functools import partial

import laws
import oracle
import pytest
import torch
from expecttest import assert_expected_inline
from models import NETS
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


@pytest.mark.parametrize("name,until", [("chain", 3), ("residual", 4), ("unet", 6)])
@pytest.mark.parametrize("rule", RULES)
def test_twenty_steps_are_the_oracles(rule, name, until):
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


@pytest.mark.parametrize("rule", [Oja(0.1), Custom(covariance, 0.1, relative=True)], ids=repr)
@pytest.mark.parametrize("name", NETS)
def test_rules_keep_the_laws(name, rule):
    net = NETS[name]
    model = net.build()
    last = fxlocal.analyze(model, *net.inputs()).layers[-1].index
    try:
        asked = plan(last, rule)
        fxlocal.transform(net.build(), asked, *net.inputs())
    except PlanError:
        pytest.skip("weights tied across the boundary")
    laws.l2_output_is_exact(model, net.inputs(), asked)
    laws.l3_cut_blocks(model, net.inputs(), asked)
    laws.l5_source_is_untouched(model, net.inputs(), asked)
    laws.l6_same_plan_same_text(model, net.inputs(), asked)
    laws.l7_state_is_shared(model, net.inputs(), asked)


@pytest.mark.parametrize("rule", [Hebbian(0.1, True), Oja(0.1), Custom(covariance, 0.1)], ids=repr)
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

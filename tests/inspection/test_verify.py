"""What one step did to each layer: facts against hand computation, and nothing of it lasts."""

import copy
import math
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from support import laws
from support.nets import NETS
from torch import nn

import fxlocal
from fxlocal import Custom, Freeze, Hebbian, LocalPrefix, NoEffectWarning, Oja, Plan
from fxlocal.experiments.training.measure import count_saved_bytes
from fxlocal.inspection.verify import LEARNING_RATE

RATE = 1e-3


def local(until=2, rule=Hebbian(RATE), norm="train"):  # noqa: B008
    return Plan(local=LocalPrefix(until=until, rule=rule, norm=norm))


def rewritten(name, plan):
    """The network of a net with ``plan``, and a batch."""
    net = NETS[name]
    return fxlocal.transform(net.build(), plan), net.inputs()


def column(verification, name):
    return [getattr(layer, name) for layer in verification.layers]


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error", NoEffectWarning)
        yield


CUT = {name: 3 if name == "shared" else 2 for name in NETS}  # the shared layer is 1 and 2


# --- the facts, against hand computation ---------------------------------------------------------


@pytest.mark.sample(7)
@pytest.mark.parametrize("plan", [None, Plan()], ids=["model", "empty plan"])
@pytest.mark.parametrize("name", NETS)
def test_plain_training_is_by_back_propagation(name, plan):
    model, inputs = NETS[name].build(), NETS[name].inputs()
    by_hand = copy.deepcopy(model)
    net = model if plan is None else fxlocal.transform(model, plan)
    torch.manual_seed(3)
    found = fxlocal.verify(net, *inputs, loss=laws.loss_of)
    torch.manual_seed(3)
    loss = laws.loss_of(by_hand(*inputs))
    loss.backward()
    weights = [by_hand.get_parameter(x.weight) for x in fxlocal.analyze(by_hand).layers]
    lengths = [weight.grad.norm().item() for weight in weights]
    assert found.loss == loss.item() and not found.unmet
    assert column(found, "gradient") == pytest.approx(lengths)
    assert column(found, "moved") == pytest.approx([LEARNING_RATE * g for g in lengths], rel=1e-3)
    parts = [LEARNING_RATE * w.grad.norm().item() / w.norm().item() for w in weights]
    assert column(found, "relative") == pytest.approx(parts, rel=1e-3)
    assert column(found, "trained_by") == ["back-propagation" if g else "nothing" for g in lengths]
    assert column(found, "weight_gradient_kernels") == [1] * len(lengths)
    assert all(column(found, "requires_grad")) and all(column(found, "finite"))


@pytest.mark.sample(7)
@pytest.mark.parametrize("rule", [Hebbian(RATE), Oja(RATE)], ids=["hebbian", "oja"])
@pytest.mark.parametrize("name", NETS)
def test_a_local_rule_moves_its_layers_by_the_rate(name, rule):
    net, inputs = rewritten(name, local(CUT[name], rule))
    found = fxlocal.verify(net, *inputs)
    before, after = found.layers[: CUT[name]], found.layers[CUT[name] :]
    for layer in before:
        assert layer.trained_by == "local rule"
        assert layer.moved == pytest.approx(RATE, rel=1e-3)
        assert (layer.has_gradient, layer.saved_bytes) == (False, 0)
        assert layer.weight_gradient_kernels == 1
    for layer in after:
        assert layer.trained_by == ("back-propagation" if layer.gradient else "nothing")
        assert (layer.has_gradient, layer.weight_gradient_kernels) == (True, 1)


@pytest.mark.parametrize("name", NETS)
def test_a_frozen_prefix_does_nothing(name):
    net, inputs = rewritten(name, local(CUT[name], Freeze()))
    for layer in fxlocal.verify(net, *inputs).layers[: CUT[name]]:
        assert (layer.trained_by, layer.moved, layer.gradient) == ("frozen", 0, None)
        assert (layer.weight_gradient_kernels, layer.saved_bytes) == (0, 0)


@pytest.mark.parametrize("rule", [Hebbian(RATE), Freeze()], ids=["hebbian", "freeze"])
@pytest.mark.parametrize("norm", ["train", "eval"])
def test_running_statistics_follow_the_plan(norm, rule):
    net, inputs = rewritten("chain", local(1, rule, norm))
    moved = column(fxlocal.verify(net, *inputs), "statistics_moved")
    assert moved == [norm == "train", True, None, None]


@pytest.mark.sample(7)
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "cut"])
@pytest.mark.parametrize("name", NETS)
def test_the_kept_bytes_are_those_that_the_counter_counts(name, whole):
    plan = Plan() if whole else local(CUT[name], Freeze())
    net, inputs = rewritten(name, plan)
    found = fxlocal.verify(net, *inputs)
    with count_saved_bytes(net) as saved_bytes:
        output = net(*inputs)
    assert sum(column(found, "saved_bytes")) == saved_bytes()
    del output


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["chain", "residual", "unet"])
def test_the_kept_bytes_of_each_layer_are_those_of_the_analysis(name):
    model, inputs = NETS[name].build(), NETS[name].inputs()
    kept = column(fxlocal.verify(model, *inputs), "saved_bytes")
    batch = inputs[0].numel() * 4  # kept by the first layer; the analysis does not count it
    costs = [cost.saved_bytes for cost in fxlocal.analyze(model, *inputs).costs]
    assert kept == [costs[0] + batch, *costs[1:]]


# --- what trained a layer ------------------------------------------------------------------------


def test_frozen_is_what_nothing_tried_to_move_and_nothing_is_what_did_not_move():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.fixed, self.cut, self.lost, self.out = (nn.Linear(4, 4) for _ in range(4))
            self.fixed.weight.requires_grad_(False)

        def forward(self, x):
            with torch.no_grad():
                x = x + self.cut(x)
            self.lost(x)
            return self.out(self.fixed(x))

    layers = {x.path: x for x in fxlocal.verify(Odd(), torch.randn(3, 4)).layers}
    trained = {path: layer.trained_by for path, layer in layers.items()}
    assert trained["fixed"] == trained["cut"] == "frozen"
    assert (trained["lost"], trained["out"]) == ("nothing", "back-propagation")
    assert layers["fixed"].weight_gradient_kernels == layers["lost"].weight_gradient_kernels == 0


def test_a_rate_of_zero_moves_nothing():
    net, inputs = rewritten("chain", local(rule=Hebbian(0)))
    found = fxlocal.verify(net, *inputs)
    assert column(found, "trained_by") == ["nothing"] * 2 + ["back-propagation"] * 2
    assert column(found, "weight_gradient_kernels") == [1] * 4


def test_the_rate_that_counts_is_the_one_in_the_network():
    net, inputs = rewritten("chain", local())
    fxlocal.transform.__globals__["set_rate"](net, -0.5)  # as a driver does, for any rate
    assert column(fxlocal.verify(net, *inputs), "moved")[:2] == pytest.approx([0.5, 0.5], rel=1e-3)


def test_the_step_is_the_users_optimizer_s():
    model, inputs = NETS["chain"].build(), NETS["chain"].inputs()

    def sgd(model):
        some = [*model.conv1.parameters(), *model.conv2.parameters()]
        return torch.optim.SGD(some, lr=0.5, momentum=0.9)

    optimizer = sgd(model)
    laws.loss_of(model(*inputs)).backward()
    optimizer.step()
    optimizer.zero_grad()
    state = copy.deepcopy(optimizer.state_dict())
    found = fxlocal.verify(model, *inputs, loss=laws.loss_of, optimizer=optimizer)
    assert str(optimizer.state_dict()) == str(state)
    expected = copy.deepcopy(model)
    by_hand = sgd(expected)
    by_hand.load_state_dict(state)
    laws.loss_of(expected(*inputs)).backward()
    by_hand.step()
    moved = (expected.conv1.weight - model.conv1.weight).norm().item()
    assert found.layers[0].moved == pytest.approx(moved)
    assert column(found, "trained_by") == ["back-propagation"] * 2 + ["nothing"] * 2
    assert all(column(found, "has_gradient"))


def test_weight_decay_alone_is_no_training():
    model, inputs = NETS["chain"].build(), NETS["chain"].inputs()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    found = fxlocal.verify(model, *inputs, loss=lambda output: 0 * output.sum(), optimizer=sgd)
    assert column(found, "trained_by") == ["nothing"] * 4
    assert column(found, "relative") == pytest.approx([0.01] * 4, rel=1e-3)


def test_a_weight_that_is_no_number_is_named():
    net, inputs = rewritten("chain", local())
    with torch.no_grad():
        net.conv1.weight[0, 0, 0, 0] = math.nan
        net.conv2.weight.zero_()
    with pytest.warns(NoEffectWarning, match="did not move .*'conv2'"):
        found = fxlocal.verify(net, *inputs)
    assert column(found, "finite")[0] is False
    frozen = fxlocal.transform(net, local(rule=Freeze()))
    assert column(fxlocal.verify(frozen, *inputs), "trained_by")[:2] == ["frozen"] * 2
    assert "NaN or infinite after the step: conv1" in str(found) and "the loss is nan" in str(found)


# --- nothing of it lasts -------------------------------------------------------------------------


def everything(model, inputs):
    state = {**model.state_dict(), "grad": [p.grad for p in model.parameters()], "in": inputs}
    numbers = torch.get_rng_state(), torch.from_numpy(np.random.get_state()[1].copy())
    return copy.deepcopy((state, numbers)), random.getstate(), [m.training for m in model.modules()]


@pytest.mark.parametrize("plan", [Plan(), local(), local(rule=Freeze())], ids=str)
@pytest.mark.parametrize("name", ["residual", "dropout", "preactivation"])
def test_the_model_stays_as_it_was(name, plan):
    model, inputs = NETS[name].build(), NETS[name].inputs()
    inputs[0].requires_grad_()
    laws.loss_of(model(*inputs)).backward()
    net = fxlocal.transform(model, plan)
    before = everything(model, inputs)
    fxlocal.verify(net, *inputs)
    fxlocal.verify(model, *inputs, loss=lambda output: output.square().sum() * random.random())
    after = everything(model, inputs)
    laws.assert_equal(after[0], before[0], name)
    assert after[1:] == before[1:]


@pytest.mark.parametrize("trainable", [True, False])
def test_a_loss_of_the_users_own_parameters_leaves_them_no_gradient(trainable):
    model, scale = nn.Linear(4, 4), nn.Parameter(torch.ones(()))
    model.requires_grad_(trainable)
    found = fxlocal.verify(
        model,
        torch.ones(2, 4),
        loss=lambda output: scale * output.sum() + model.weight.square().sum(),
    )
    assert found.layers[0].has_gradient == trainable
    assert [p.grad for p in (scale, *model.parameters())] == [None] * 3


def test_so_it_does_when_the_step_raises():
    class Failing(nn.Module):
        def forward(self, x):
            return F.dropout(x).view(7, 7, 7)

    chain = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), Failing())
    net = fxlocal.transform(chain, local(1, Hebbian(0.5)))
    inputs = (torch.randn(3, 4),)
    before = everything(chain, inputs)
    with pytest.raises(RuntimeError, match=r"^shape '\[7, 7, 7\]' is invalid"):
        fxlocal.verify(net, *inputs)
    after = everything(chain, inputs)
    laws.assert_equal(after[0], before[0], "state")
    assert after[1:] == before[1:] and torch.is_grad_enabled()


# --- a rewrite that changed nothing --------------------------------------------------------------


def unmet(net, inputs):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = fxlocal.verify(net, *inputs)
    said = [str(w.message) for w in caught if w.category is NoEffectWarning]
    assert tuple(said) == found.unmet and all(sentence in str(found) for sentence in said)
    assert all(w.filename == __file__ for w in caught)
    return "\n".join(said)


def test_a_plan_that_trains_everything_as_before_warns():
    plan = local(0)
    assert "changed nothing: every layer was trained as" in unmet(*rewritten("chain", plan))


@pytest.mark.parametrize(
    ("skipped", "norm", "said"),
    [
        ("insert_local_updates", "train", "rate 0.001, which did not move 'conv1', 'conv2'"),
        ("insert_no_grad", "train", "are kept for it by 'conv1', 'conv2'"),
        ("insert_cuts,insert_no_grad", "train", "but a gradient reached 'conv1', 'conv2'"),
        ("replace_norms", "eval", "but they moved between 'conv1', 'conv2' and the next layer"),
        ("insert_local_updates,insert_cuts,insert_no_grad", "train", "changed nothing"),
    ],
)
@pytest.mark.filterwarnings("ignore:FXLOCAL_SKIP")
def test_a_pass_that_is_missing_shows(skipped, norm, said, monkeypatch):
    monkeypatch.setenv("FXLOCAL_SKIP", skipped)
    assert said in unmet(*rewritten("chain", local(norm=norm)))


def test_a_rule_whose_deltas_are_zero_warns():
    net, inputs = rewritten("chain", local(rule=Custom(lambda weight, pre, post: 0 * weight)))
    assert "did not move 'conv1', 'conv2'" in unmet(net, inputs)


# --- what a person reads -------------------------------------------------------------------------


def test_the_table():
    net, _ = rewritten("chain", local(1, Hebbian(0.01), "eval"))
    x = torch.ones(2, 3, 64, 64)
    net.conv3.requires_grad_(False)
    table = str(fxlocal.verify(net, x, loss=lambda output: 0 * output.sum()))
    assert_expected_inline(
        table,
        """\
#  layer  kind    trained by  gradient     moved  of weight  kernels  kept KiB  statistics
0  conv1  conv    local rule      none  1.00e-02      0.84%        1       0.0  kept
1  conv2  conv    nothing     0.00e+00         0          0        1     176.0  moved
2  conv3  conv    frozen          none         0          0        0     112.0
3  fc     linear  nothing     0.00e+00         0          0        1       0.1
4 layers: 1 by a local rule, 1 frozen, 2 by nothing; 3 weight-gradient kernels; 288.1 KiB kept for backward""",  # noqa: E501
    )


@pytest.mark.parametrize(
    ("net", "batch", "loss", "error", "said"),
    [
        (object(), (1,), None, TypeError, "cannot verify a object: give what"),
        (nn.Linear(4, 4), (), None, TypeError, r"got 0 inputs for a forward\(input.*missing"),
        (nn.Linear(4, 4), (1, 2), None, TypeError, "got 2 inputs .* too many"),
        (nn.Linear(4, 4), (torch.ones(2, 4),), len, ValueError, "loss is int: give loss="),
        (nn.Linear(4, 4), (torch.ones(2, 4),), abs, ValueError, r"loss is \(2, 4\): give loss="),
        (nn.Identity(), (torch.ones(2).long(),), None, ValueError, "no floating-point tensor in"),
    ],
)
def test_wrong_inputs_are_named(net, batch, loss, error, said):
    with pytest.raises(error, match=said):
        fxlocal.verify(net, *batch, loss=loss)


def test_an_optimizer_of_another_model_is_named():
    optimizer = torch.optim.SGD(nn.Linear(4, 4).parameters(), lr=1)
    with pytest.raises(ValueError, match="the optimizer holds none of the network's 2 parameters"):
        fxlocal.verify(nn.Linear(4, 4), torch.ones(2, 4), optimizer=optimizer)

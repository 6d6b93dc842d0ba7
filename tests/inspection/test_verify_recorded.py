"""Models that hold what autograd recorded: weights that hooks compute, activations kept."""

import copy
import warnings

import pytest
import torch
from support import laws
from torch import nn
from torch.nn.utils import prune, spectral_norm, weight_norm

import fxlocal
from fxlocal import Custom, Freeze, Hebbian, LocalPrefix, Plan
from fxlocal.inspection.verify import LEARNING_RATE

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


class Keeping(nn.Module):
    """Keeps what ``keep`` makes of an activation, as models do to look at it later."""

    def __init__(self, keep):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)
        self.keep, self.kept = keep, None

    def forward(self, x):
        hidden = torch.relu(self.first(x))
        return self.second(hidden)

    def remember(self, x):
        self.kept = self.keep(self.first(x))
        return self


def chain():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 2)
    )


def old_norm(make):
    def apply(layer):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            make(layer)

    return apply


def structured_and_bias(layer):
    prune.ln_structured(layer, "weight", amount=0.4, n=2, dim=0)
    prune.random_unstructured(layer, "bias", amount=0.5)


COMPUTED = {
    "pruned by size": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    "pruned rows and bias": structured_and_bias,
    "weight norm by a hook": old_norm(weight_norm),
    "spectral norm by a hook": old_norm(spectral_norm),
}


@pytest.mark.sample(10)
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("at", [0, 2, 4])
@pytest.mark.parametrize("how", COMPUTED)
def test_a_weight_that_a_hook_computes_is_reported_as_it_trains(how, at, steps):
    model = chain()
    COMPUTED[how](model[at])
    net = fxlocal.transform(model, Plan(local=LocalPrefix(until="2", rule=Freeze())))
    for _ in range(steps):  # what the hook keeps is then of the last step
        laws.step(net, (X,))
        net.zero_grad()
    by_hand, before = copy.deepcopy(model.state_dict()), model[at].weight
    found = fxlocal.verify(net, X, loss=laws.loss_of)
    assert model[at].weight is before
    laws.assert_equal(model.state_dict(), by_hand, "state")
    assert all(p.grad is None for p in model.parameters())
    layers = {layer.path: layer for layer in found.layers}
    assert list(layers) == ["0", "2", "4", "5"]
    laws.step(net, (X,))
    for path, layer in layers.items():
        if path == "0":
            assert (layer.trained_by, layer.moved) == ("frozen", 0)
            continue
        assert layer.trained_by == "back-propagation"
        weights = [p for n, p in model[int(path)].named_parameters() if "bias" not in n]
        length = torch.stack([p.grad.norm() for p in weights]).norm()
        assert layer.moved == pytest.approx(LEARNING_RATE * float(length), rel=1e-4)


KEPT = {
    "the activation": lambda value: value,
    "a view of it": lambda value: value[:, :2],
    "in a list": lambda value: [value, value.sum()],
    "in a dict, twice": lambda value: {"value": value, "same": (value,)},
}


@pytest.mark.parametrize("how", KEPT)
@pytest.mark.parametrize("rewritten", [False, True], ids=["model", "network"])
def test_a_model_that_keeps_an_activation_is_verified(how, rewritten):
    torch.manual_seed(0)
    model = Keeping(KEPT[how]).remember(X)
    kept, state = model.kept, copy.deepcopy(model.state_dict())
    plan = Plan(local=LocalPrefix(until=1, rule=Hebbian(0.1)))
    net = fxlocal.transform(model, plan) if rewritten else model
    found = fxlocal.verify(net, X)
    expected = "local rule" if rewritten else "back-propagation"
    assert [layer.trained_by for layer in found.layers] == [expected, "back-propagation"]
    assert model.kept is kept
    laws.assert_equal(model.state_dict(), state, "state")


def goodness(weight, pre, post):
    with torch.enable_grad():
        weight = weight.clone().requires_grad_()
        (delta,) = torch.autograd.grad((pre @ weight.T).square().sum(), weight)
    return delta


def test_what_a_rule_keeps_for_its_own_backward_is_not_kept(no_warnings):
    network = fxlocal.transform(chain(), Plan(local=LocalPrefix("2", Custom(goodness))))
    report = fxlocal.verify(network, X)
    assert report.layers[0].saved_bytes == 0 < report.layers[1].saved_bytes

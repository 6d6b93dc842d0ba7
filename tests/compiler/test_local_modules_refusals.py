"""What a split into local modules refuses: of settings, of a model, of targets and of a loss."""

import copy

import pytest
import torch
from support import laws
from support import modules_oracle as oracle
from support.nets import NETS

from fxlocal import ConvHead, InfoProHead, LinearHead, LocalModules, Plan, PlanError, transform


def local(count, link=0, **settings):
    return LocalModules(count, link, **{"num_classes": 5, "balance": "blocks"} | settings)


def make(model, modules, x):
    return transform(model, Plan(modules=modules), x)


BAD_SETTINGS = [
    *({"count": 0}, {"count": 2.0}, {"count": True}, {"link": -1}, {"link": 0.5}),
    *({"alpha": 1.5}, {"alpha": -0.1}, {"alpha": float("nan")}, {"alpha": "half"}),
    *({"num_classes": None}, {"num_classes": 0}, {"head": "linear"}, {"loss": "hinge"}),
    *({"balance": "layers"}, {"balance": ("units.3",)}, {"link": 1, "replay": 4}, {"replay": -1}),
    *({"weighting": "twice"}, {"weighting": None}),
]


@pytest.mark.parametrize("settings", BAD_SETTINGS, ids=str)
def test_refuses_settings(settings):
    *_, wrong = settings
    with pytest.raises(PlanError, match=rf"\b{wrong}\b"):
        LocalModules(**{"count": 3, "num_classes": 5} | settings)


@pytest.fixture
def unchanged():
    """Makes a model with gradients; checks afterwards that it is as it was."""
    made = []

    def trained_once(model):
        for i, p in enumerate(model.parameters()):
            p.grad = torch.full_like(p, i + 1.0)
        made.append((model, copy.deepcopy(model), copy.deepcopy(laws.gradients(model))))
        return model

    yield trained_once
    for model, before, gradients in made:
        laws.assert_equal(model.state_dict(), before.state_dict(), "state")
        laws.assert_equal(laws.gradients(model), gradients, "gradient")
        assert model.training


@pytest.mark.parametrize(
    ("modules", "word"),
    [
        (local(8), "7 blocks"),
        (local(8, balance="memory"), "7 blocks"),
        (local(3, 3), "link"),
        (local(3, 1, balance=("units.3", "units.2")), "units.2"),
        (local(2, 3, balance=("units.2",)), "link"),
        (local(2, balance=("unit.3",)), "unit.3"),
        (local(3, head=lambda shape: None), "head"),
        (local(3, head=lambda shape: 1 / 0), "ZeroDivisionError"),
    ],
)
def test_refuses_what_does_not_fit_the_model(modules, word, unchanged):
    with pytest.raises(PlanError, match=word):
        make(unchanged(oracle.build("plain")), modules, oracle.batch("plain")[0])


def test_refuses_an_output_that_is_no_tensor(unchanged):
    net = NETS["multi_output"]
    with pytest.raises(PlanError, match="output"):
        make(unchanged(net.build()), local(2), *net.inputs())


def test_needs_example_inputs(unchanged):
    with pytest.raises(PlanError, match="batch of inputs"):
        transform(unchanged(oracle.build("plain")), Plan(modules=local(3)))


(_, CLASSES), (_, PIXELS) = oracle.batch("plain"), oracle.batch("unet")
BAD_TARGETS = [
    *(("plain", ()), ("plain", (None,)), ("plain", (CLASSES[:3],)), ("plain", (CLASSES[:, None],))),
    *(("plain", (CLASSES[0],)), ("unet", (PIXELS[:, :4],)), ("unet", (CLASSES,))),
]


@pytest.mark.parametrize(("name", "target"), BAD_TARGETS)
def test_refuses_targets(name, target, unchanged):
    model, (x, _) = oracle.build(name), oracle.batch(name)
    net = make(model, local(3, 1), x)
    unchanged(model)
    with pytest.raises(ValueError, match="target"):
        net(x, *target)
    assert [*laws.gradients(net.get_submodule("fxlocal")).values()] == [None] * 4


def test_a_plain_linear_head_takes_images_of_the_examples_size_alone():
    model, (x, y) = oracle.build("plain"), oracle.batch("plain")
    larger = x.repeat(1, 1, 2, 2)
    with pytest.raises(ValueError, match=r"features of shape \(6, 8, 8\).*LinearHead\(pool=2\)"):
        make(model, local(2), x)(larger, y)
    assert set(laws.gradients(model).values()) == {None}
    net = make(copy.deepcopy(model), local(2, head=LinearHead(pool=2)), x)
    assert net(larger, y)[0].shape == (4, 5)


@pytest.mark.parametrize("pool", [0, -1, 1.5, True, "2"])
@pytest.mark.parametrize("head", [LinearHead, ConvHead, InfoProHead])
def test_refuses_a_pooling_to_no_size(head, pool):
    with pytest.raises(PlanError, match=rf"{head.__name__}\(pool=.*whole number, at least 1"):
        head(pool=pool)


def test_refuses_a_loss_that_is_no_scalar(unchanged):
    model, (x, y) = unchanged(oracle.build("plain")), oracle.batch("plain")
    net = make(model, local(3, loss=lambda output, target: output.sum(1) - target), x)
    with pytest.raises(ValueError, match="scalar"):
        net(x, y)

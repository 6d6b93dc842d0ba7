"""A shrunk model computes what the whole one does with those channels zero, and is smaller."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.nets import NETS, Blocks, Written
from support.shrinking import (
    assert_computes_the_same,
    channels_of,
    numbers_cut,
    places,
    some_kept,
    stirred,
    zeroed,
)
from torch import nn

import fxlocal
from fxlocal import PlanError
from fxlocal.experiments.models.catalogue import build_model

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
SMALL = ["resnet8", "vgg13", "mobilenetv2", "unet"]
ZOO = ["resnet18", "resnet50", "mobilenet_v2", "densenet121", "efficientnet_b0"]


class Excited(nn.Module):
    """EfficientNet's block: expansion, depthwise, squeeze-and-excitation, projection, shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 12, 1, bias=False)
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(12), nn.BatchNorm2d(12), nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.squeeze, self.excite = nn.Conv2d(12, 3, 1), nn.Conv2d(3, 12, 1)
        self.project, self.fc = nn.Conv2d(12, 4, 1, bias=False), nn.Linear(4, 5)

    def forward(self, x):
        x = self.stem(x)
        h = F.silu(self.bn2(self.depthwise(F.silu(self.bn1(self.expand(x))))))
        gate = self.excite(F.silu(self.squeeze(h.mean((2, 3), keepdim=True))))
        h = self.bn3(self.project(h * gate.sigmoid()))
        return self.fc((x + h).mean((2, 3)))


def built(name):
    torch.manual_seed(0)
    if name == "excited":
        return Excited()
    if name in NETS:
        return NETS[name].build()
    return build_model(name, num_classes=5, width=4 if name == "unet" else 8)


def check(model, x, share=0.4):
    model = stirred(model.double().train())
    for module in model.modules():
        if hasattr(module, "p"):  # dropout and stochastic depth, whose masks are drawn by place
            module.p = 0.0
    channels = channels_of(model)
    kept = some_kept(channels, share)
    assert kept
    whole = zeroed(model, channels, kept)
    fxlocal.shrink(model, kept)
    sizes = [sum(p.numel() for p in one.parameters()) for one in (model, whole)]
    assert sizes[0] < 0.9 * sizes[1]
    assert_computes_the_same(model, whole, channels, kept, x, 1e-10)


@pytest.mark.sample(6)
@pytest.mark.parametrize("name", ["excited", *(n for n in NETS if n not in ("dropout", "shared"))])
def test_computes_what_the_whole_one_does_with_those_channels_zero(name):
    check(built(name), X, share=0.7 if name == "functional" else 0.4)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SMALL, *ZOO])
def test_networks_compute_what_they_did_with_those_channels_zero(name):
    torchvision = pytest.importorskip("torchvision")
    model = built(name) if name in SMALL else torchvision.models.get_model(name, weights=None)
    size = 16 if name in SMALL else 64
    check(model, torch.randn(2, 3, size, size, dtype=torch.float64))


def test_by_hand_of_a_chain():
    model = NETS["chain"].build()
    old = copy.deepcopy(model).state_dict()
    fxlocal.shrink(model, {"conv2": torch.tensor([5, 0, 2])})
    state = model.state_dict()
    left = [0, 2, 5]
    assert model.conv2.out_channels == model.bn2.num_features == model.conv3.in_channels == 3
    for name in ("conv2.weight", "conv2.bias", "bn2.weight", "bn2.bias", "bn2.running_var"):
        assert torch.equal(state[name], old[name][left])
    assert torch.equal(state["conv3.weight"], old["conv3.weight"][:, left])
    others = [name for name in old if state[name].shape == old[name].shape]
    assert len(others) == len(old) - 7
    assert all(torch.equal(state[name], old[name]) for name in others)


def test_depthwise_and_group_norm_follow_in_their_attributes():
    parts = [nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, groups=4), nn.GroupNorm(4, 8), nn.PReLU(8)]
    model = nn.Sequential(*parts, nn.Conv2d(8, 1, 1))
    fxlocal.shrink(model, {"0": [1, 2, 3]})
    assert (model[1].groups, model[1].in_channels, model[1].out_channels) == (3, 3, 6)
    assert (model[2].num_groups, model[2].num_channels, model[3].num_parameters) == (3, 6, 6)
    model(X.float())


@pytest.mark.parametrize("kind", ["momentum", "adam"])
def test_the_optimizer_goes_on_as_if_the_rest_had_never_been(kind):
    # The whole model moves by the same steps where the cut channels are zero, and stay so.
    models = [stirred(NETS["chain"].build().double()) for _ in range(2)]
    channels = channels_of(models[0])
    kept = {"conv1": [0, 3], "conv2": [1, 2, 4], "conv3": [0, 1, 2, 6]}
    models[0] = zeroed(models[0], channels, kept)
    models[1].load_state_dict(models[0].state_dict())
    cut = numbers_cut(channels, kept)
    make = {
        "momentum": lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9),
        "adam": lambda ps: torch.optim.Adam(ps, 0.01),
    }[kind]
    optimizers = [make(model.parameters()) for model in models]

    held = None

    def step():
        for model, optimizer in zip(models, optimizers, strict=True):
            loss = model(X).square().sum()
            optimizer.zero_grad()
            loss.backward()
            if model is models[0] or held is None:  # what is zero stays zero
                for use in channels.uses:
                    if (parameter := dict(model.named_parameters()).get(use.tensor)) is not None:
                        parameter.grad.index_fill_(use.axis, places(use, cut), 0.0)
            optimizer.step()
        return loss

    step()
    held = step()  # its graph must not remember the old shapes
    fxlocal.shrink(models[1], kept, optimizer=optimizers[1])
    for _ in range(3):
        step()
    torch.testing.assert_close(models[0](X), models[1](X), rtol=1e-10, atol=1e-12)
    assert models[1].conv2.weight.shape == (3, 2, 3, 3)


def test_gradients_and_layout_are_kept():
    model = NETS["chain"].build().to(memory_format=torch.channels_last)
    model(X.float()).sum().backward()
    grad, weight = model.conv2.weight.grad.clone(), model.conv2.weight
    fxlocal.shrink(model, {"conv1": [1, 3]})
    assert model.conv2.weight is weight
    assert torch.equal(weight.grad, grad[:, [1, 3]])
    assert weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("block", ["one", "two"])
def test_a_branch_without_channels_is_removed(block):
    torch.manual_seed(0)
    model = stirred(Blocks().double())
    fxlocal.shrink(model, {"two.conv2": [0, 1, 2, 4, 5]})  # and its shortcut, which stays
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(X).sum().backward()
    optimizer.step()
    whole = copy.deepcopy(model)
    with torch.no_grad():
        last = whole.get_submodule(f"{block}.bn2")
        last.weight.zero_()
        last.bias.zero_()
    fxlocal.shrink(model, {f"{block}.conv1": []}, optimizer=optimizer)
    assert not [name for name, _ in model.named_parameters() if name.startswith(f"{block}.conv")]
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(X), whole.train(mode)(X))
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert {id(p) for p in optimizer.state} == {id(p) for p in held}
    model.train()(X).sum().backward()
    optimizer.step()
    # A second cut, and the record of both.
    fxlocal.shrink(model, {"stem": [0, 2, 3]} if block == "two" else {"two.conv1": [0, 5]})
    fresh = Blocks().double()
    fxlocal.shrink(fresh, fxlocal.runtime.shrink.kept_channels(model))
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh.eval()(X), model.eval()(X), rtol=0, atol=0)


def test_a_block_that_has_two_names_is_removed_under_both():
    model = Blocks().double()
    model.two = model.one
    model.fc = nn.Linear(4, 5).double()
    fxlocal.shrink(model, {"one.conv1": []})
    assert model.two is model.one
    expected = model.fc(model.stem(X).relu().mean((2, 3)))
    torch.testing.assert_close(model(X), expected)


def test_kept_may_be_an_array():
    model = Blocks()
    fxlocal.shrink(model, {"one.conv1": torch.tensor([1, 3]).numpy(), "fc": torch.arange(5)})
    assert model.one.conv1.out_channels == 2


REFUSED = {
    "no such layer": ("residual", {"block1.conv7": [0]}, "no layer 'block1.conv7'.*block1.conv1"),
    "no layer": ("residual", {"block1": [0]}, "no layer 'block1'"),
    "no dict": ("residual", [0, 1], "give a dict"),
    "out of range": ("residual", {"block1.conv1": [0, 4]}, "has 4: .* from 0 to 3"),
    "negative": ("residual", {"block1.conv1": [-1]}, "has -1: .* from 0 to 3"),
    "no number": ("residual", {"block1.conv1": [0.5]}, "has 0.5"),
    "a flag": ("residual", {"block1.conv1": [True]}, "has True"),
    "no list": ("residual", {"block1.conv1": 2}, "is 2: .* in a list"),
    "twice": ("residual", {"block1.conv1": [1, 1]}, "has 1: .*none twice"),
    "the output": ("residual", {"fc": [0]}, "1 of 'fc' cannot be cut: they leave the model"),
    "both": (
        "residual",
        {"stem.0": [0, 1], "block1.conv2": [1, 2]},
        "2 of 'stem.0' is to be cut, and 2 of 'block1.conv2' kept",
    ),
    "nothing left": ("chain", {"conv2": []}, "no channel of 'conv2' is left"),
    "nothing of the stream": ("residual", {"stem.0": []}, "no channel of 'stem.0' is left"),
    "a sum outside of blocks": ("preactivation", {"convs.0": []}, "is in no block"),
    "nothing to a concat": ("diamond", {"one": []}, "'cat' needs what it computes"),
    "an operator": ("tokens", {"embed": [0]}, "'LayerNorm', node 'norm'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_and_changes_nothing(name):
    net, kept, message = REFUSED[name]
    model = NETS[net].build()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    before, printed = copy.deepcopy(model.state_dict()), str(model)
    with pytest.raises(PlanError, match=message):
        fxlocal.shrink(model, kept, optimizer=optimizer)
    assert str(model) == printed
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_refuses_an_optimizer_that_keeps_another_shape():
    model = NETS["chain"].build()
    optimizer = torch.optim.Adafactor(model.parameters())
    model(X.float()).sum().backward()
    optimizer.step()
    shape = model.conv1.weight.shape
    with pytest.raises(PlanError, match=r"Adafactor keeps '.*' of 'conv1.weight' as .*Adam"):
        fxlocal.shrink(model, {"conv1": [0]}, optimizer=optimizer)
    assert model.conv1.weight.shape == shape


def test_an_unknown_operator_is_refused_by_name():
    parts = {"stem": nn.Conv2d(3, 4, 1), "end": nn.Conv2d(4, 1, 1)}
    model = Written(lambda m, x: m.end(m.stem(x).cumsum(1)), **parts)
    with pytest.raises(PlanError, match="'cumsum', node 'cumsum', may mix them"):
        fxlocal.shrink(model, {"stem": [0]})

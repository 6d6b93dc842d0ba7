"""Which calls are layers, in every form, and how a convolution slides."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from fxlocal.passes import find_layers
from support.captures import ByShape
from support.nets import NETS, Written
from torch import nn
from torch.nn.utils import parametrizations

from fxlocal import capture
from fxlocal.facts import ConvGeometry, Layer


def layers_of(model, *inputs):
    return find_layers(capture(model, *inputs))


def listed(model):
    rows = (
        f"{layer.index} {layer.kind} {layer.path}: {layer.node}({layer.pre}, {layer.weight})"
        for layer in layers_of(model)
    )
    return "\n".join(rows)


# --- golden --------------------------------------------------------------------------------------


def test_modules_in_execution_order():
    assert_expected_inline(
        listed(NETS["residual"].build()),
        """\
0 conv stem.0: stem_0(x, stem.0.weight)
1 conv block1.conv1: block1_conv1(stem_2, block1.conv1.weight)
2 conv block1.conv2: block1_conv2(block1_relu, block1.conv2.weight)
3 conv block2.conv1: block2_conv1(block1_relu_1, block2.conv1.weight)
4 conv block2.conv2: block2_conv2(block2_relu, block2.conv2.weight)
5 conv block2.shortcut.0: block2_shortcut_0(block1_relu_1, block2.shortcut.0.weight)
6 linear fc: fc(mean, fc.weight)""",
    )


def test_functions_by_their_weights():
    assert_expected_inline(
        listed(NETS["functional"].build()),
        """\
0 conv w1: conv2d(x, w1)
1 conv w2: conv2d_1(relu, w2)
2 linear w3: linear(mean, w3)""",
    )


def test_two_calls_are_two_layers_of_one_path():
    assert_expected_inline(
        listed(NETS["shared"].build()),
        """\
0 conv stem: stem(x, stem.weight)
1 conv conv: conv(relu, conv.weight)
2 conv conv: conv_1(relu_1, conv.weight)
3 linear fc: fc(mean, fc.weight)""",
    )


# --- oracle --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NETS if name != "functional"])
def test_layers_are_the_calls_that_hooks_see(name):
    model, called = NETS[name].build(), []
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            module.register_forward_hook(lambda *_, path=path: called.append(path))
    model(*NETS[name].inputs())
    layers = layers_of(model)
    assert [layer.path for layer in layers] == called
    assert [layer.index for layer in layers] == list(range(NETS[name].num_layers))


GEOMETRIES = [
    (nn.Conv1d(3, 4, 3), ConvGeometry((1,), (0,), (1,), 1)),
    (
        nn.Conv2d(4, 8, (3, 5), stride=(1, 2), padding=(1, 2), dilation=2, groups=4),
        ConvGeometry((1, 2), (1, 2), (2, 2), 4),
    ),
    (nn.Conv3d(3, 4, 3, padding="valid"), ConvGeometry((1, 1, 1), (0, 0, 0), (1, 1, 1), 1)),
    (nn.Conv2d(3, 4, 3, padding="same", dilation=2), ConvGeometry((1, 1), (2, 2), (2, 2), 1)),
    (  # an even kernel pads one more on the right: the height by 1 + 1, the width by 1 + 2
        nn.Conv2d(3, 4, (3, 4), padding="same"),
        ConvGeometry((1, 1), (1, 1), (1, 1), 1, pad_input=(0, 1, 0, 0)),
    ),
    (
        nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode="reflect"),
        ConvGeometry((1, 1), (0, 0), (1, 1), 1, False, (2, 2, 1, 1), "reflect"),
    ),
    (
        nn.Conv1d(3, 4, 4, padding="same", padding_mode="circular"),
        ConvGeometry((1,), (0,), (1,), 1, False, (1, 2), "circular"),
    ),
    (
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        ConvGeometry((2, 2), (1, 1), (1, 1), 2, True, output_padding=(1, 1)),
    ),
]


@pytest.mark.parametrize("module,geometry", GEOMETRIES, ids=lambda v: type(v).__name__)
def test_geometry_has_one_entry_per_dimension(module, geometry):
    (layer,) = layers_of(nn.Sequential(module))
    assert layer.geometry == geometry


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ["residual", "functional", "autoencoder", "tokens"])
def test_exported_calls_are_the_same_layers(name):
    modules = layers_of(NETS[name].build())
    exported = layers_of(ByShape(NETS[name].build()), *NETS[name].inputs())
    assert [(layer.path, layer.weight, layer.kind) for layer in exported] == [
        (f"net.{layer.path}", f"net.{layer.weight}", layer.kind) for layer in modules
    ]
    for ours, theirs in zip(exported, modules, strict=True):
        if theirs.geometry is None or theirs.geometry.pad_mode == "constant":
            assert ours.geometry == theirs.geometry, theirs.path


def test_input_and_weight_may_be_keywords():
    def keywords(net, x):
        return F.linear(weight=net.weight, input=net.conv(input=x).mean((2, 3)))

    conv, linear = layers_of(
        Written(keywords, conv=nn.Conv2d(3, 4, 1), weight=nn.Parameter(torch.ones(2, 4)))
    )
    assert (conv.pre, conv.weight) == ("x", "conv.weight")
    assert linear == Layer(1, "weight", "linear", "linear", "weight", "mean")


def test_computed_weight_is_none():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    assert [layer.weight for layer in layers_of(model)] == [None, "1.weight"]


class Sized(nn.Sequential):
    """Only export can capture it."""

    def forward(self, x):
        if x.shape[1] != 4:
            raise ValueError("size")
        return super().forward(x)


@pytest.mark.parametrize("compute", [parametrizations.weight_norm, parametrizations.spectral_norm])
@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv1d, nn.ConvTranspose1d])
def test_a_computed_weight_has_its_modules_path_in_an_export_too(kind, compute):
    size = () if kind is nn.Linear else (1,)
    model = Sized(compute(kind(4, 4, *size)), nn.Flatten(), nn.Linear(4, 4))
    found = layers_of(model, torch.randn(3, 4, *size))
    assert [(layer.path, layer.weight) for layer in found] == [("0", None), ("2", "2.weight")]


# --- does nothing when it should -----------------------------------------------------------------


@pytest.mark.parametrize(
    "model", [nn.ReLU(), nn.BatchNorm2d(3), nn.Embedding(4, 4), nn.Bilinear(2, 2, 2)]
)
def test_other_modules_are_no_layers(model):
    def alone(net, x):
        return net.model(x, x) if isinstance(model, nn.Bilinear) else net.model(x)

    assert layers_of(Written(alone, model=model)) == ()


def test_layers_inside_a_leaf_module_are_not_seen():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.fc = nn.MultiheadAttention(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(self.attention(x, x, x)[0])

    assert [layer.path for layer in layers_of(Attention())] == ["fc"]

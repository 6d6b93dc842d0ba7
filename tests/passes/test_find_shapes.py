"""What shapes each layer meets, against those of a real forward."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from fxlocal.passes import find_layers, find_shapes
from support.captures import ByShape
from support.nets import NETS, Written
from torch import nn
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode

import fxlocal
from fxlocal.facts import Layer, Shapes, map_size
from fxlocal.ir.fakes import run_on_fakes


def shapes_of(model, *inputs):
    captured = fxlocal.capture(model, *inputs)
    layers = find_layers(captured)
    return dict(
        zip(
            [layer.node for layer in layers],
            find_shapes(captured, run_on_fakes(captured, inputs), layers=layers),
            strict=True,
        )
    )


class Calls(TorchFunctionMode):
    """Notes the arguments and the results of all convolutions and linear layers."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name.startswith("conv") or name == "linear":
            call = dict(zip(("input", "weight"), args, strict=False)) | kwargs
            self.seen.append((call["input"], result, call["weight"], name == "linear"))
        return result


def of_a_real_forward(model, *inputs):
    model = copy.deepcopy(model)
    with Calls() as calls, torch.no_grad():
        model(*inputs)
    return [
        Shapes(
            *(tuple(pre.shape), tuple(post.shape), tuple(weight.shape)),
            dtype=str(post.dtype).removeprefix("torch."),
            device="cpu",
            channels_last=linear or pre.stride(1) == 1,
        )
        for pre, post, weight, linear in calls.seen
    ]


# --- golden --------------------------------------------------------------------------------------


def test_the_shapes_of_a_chain():
    found = shapes_of(NETS["chain"].build(), *NETS["chain"].inputs())
    of_float = {"dtype": "float32", "device": "cpu"}
    assert found == {
        "conv1": Shapes((2, 3, 8, 8), (2, 4, 8, 8), (4, 3, 3, 3), **of_float, channels_last=False),
        "conv2": Shapes((2, 4, 8, 8), (2, 6, 4, 4), (6, 4, 3, 3), **of_float, channels_last=False),
        "conv3": Shapes((2, 6, 4, 4), (2, 8, 4, 4), (8, 6, 1, 1), **of_float, channels_last=False),
        "fc": Shapes((2, 8), (2, 5), (5, 8), **of_float, channels_last=True),
    }
    analysis = fxlocal.analyze(NETS["chain"].build(), *NETS["chain"].inputs())
    assert analysis.shapes == tuple(found.values())
    assert fxlocal.analyze(NETS["chain"].build()).shapes is None


# --- oracle --------------------------------------------------------------------------------------


@pytest.mark.sample(14)
@pytest.mark.parametrize("name", [name for name in NETS if name != "autoencoder"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
def test_they_are_those_of_a_real_forward(name, dtype):
    """Under the caller's autocast too."""
    model, inputs = NETS[name].build(), NETS[name].inputs()
    if dtype == torch.float64:
        model, inputs = model.double(), tuple(x.double() for x in inputs)
    with torch.autocast("cpu", dtype) if dtype == torch.bfloat16 else nullcontext():
        found, expected = shapes_of(model, *inputs), of_a_real_forward(model, *inputs)
    assert list(found.values()) == expected
    assert len(found) == NETS[name].num_layers


def test_a_layer_that_pads_its_input_meets_the_unpadded_one():
    model, (x,) = NETS["autoencoder"].build(), NETS["autoencoder"].inputs()
    found = shapes_of(model, x)
    assert list(found) == ["down", "up", "out"]
    assert [s.pre for s in found.values()] == [(2, 3, 8, 8), (2, 6, 4, 4), (2, 4, 8, 8)]
    assert [s.post for s in found.values()] == [(2, 6, 4, 4), (2, 4, 8, 8), (2, 3, 8, 8)]
    assert found["up"].weight == (6, 2, 3, 3)


@pytest.mark.parametrize(
    "layer,shape",
    [
        (nn.Conv1d(3, 4, 3, 2), (2, 3, 9)),
        (nn.Conv3d(4, 6, (1, 2, 3), groups=2), (2, 4, 5, 6, 7)),
        (nn.Conv2d(3, 4, 3), (3, 6, 5)),
        (nn.Conv1d(3, 4, 3), (3, 6)),
        (nn.ConvTranspose2d(3, 4, 3), (3, 6, 5)),
        (nn.Linear(3, 4), (3,)),
        (nn.Linear(3, 4), (2, 5, 6, 3)),
        (parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), (2, 3, 6, 6)),
    ],
)
def test_of_every_number_of_dimensions(layer, shape):
    model, x = nn.Sequential(layer), torch.zeros(shape)
    assert list(shapes_of(model, x).values()) == of_a_real_forward(model, x)
    (found,) = find_layers(fxlocal.capture(model))
    output = model(x)
    linear = found.kind == "linear"
    size = output.shape[1:-1] if linear else output.shape[2 - layer.weight.dim() :]
    assert map_size(found, shapes_of(model, x)[found.node]) == tuple(size)


@pytest.mark.parametrize("last", [False, True])
def test_the_memory_format_is_found(last):
    model, (x,) = NETS["residual"].build(), NETS["residual"].inputs()
    if last:
        model, x = (v.to(memory_format=torch.channels_last) for v in (model, x))
    found, expected = shapes_of(model, x), of_a_real_forward(model, x)
    assert list(found.values()) == expected
    assert all(s.channels_last for s in found.values()) == last


def test_a_module_that_is_called_twice_has_two():
    def twice(net, x):
        return net.conv(net.conv(x))

    first, second = shapes_of(
        Written(twice, conv=nn.Conv2d(3, 3, 3)), torch.zeros(2, 3, 9, 9)
    ).values()
    assert (first.post, second.pre, second.post) == ((2, 3, 7, 7), (2, 3, 7, 7), (2, 3, 5, 5))


class Function(nn.Module):
    def __init__(self, call, *shape):
        super().__init__()
        self.call, self.weight = call, nn.Parameter(torch.zeros(shape))

    def forward(self, x):
        return self.call(x, self.weight)


CALLS = {
    "conv": (lambda x, w: F.conv2d(x, w), (4, 3, 3, 3)),
    "conv, input by name": (lambda x, w: F.conv2d(input=x, weight=w, stride=2), (4, 3, 3, 3)),
    "conv, weight first": (lambda x, w: F.conv2d(weight=w, input=x), (4, 3, 3, 3)),
    "linear": (lambda x, w: F.linear(x, w), (4, 6)),
    "linear, weight first": (lambda x, w: F.linear(weight=w, input=x), (4, 6)),
}


@pytest.mark.parametrize("name", CALLS)
def test_functions_take_their_arguments_by_name_too(name):
    call, shape = CALLS[name]
    model, x = Function(call, *shape), torch.zeros(2, 3, 6, 6)
    assert list(shapes_of(model, x).values()) == of_a_real_forward(model, x)


def test_exported_calls():
    model, (x,) = ByShape(NETS["unet"].build()), NETS["unet"].inputs()
    assert list(shapes_of(model, x).values()) == of_a_real_forward(model, x)


def test_the_models_own_autocast_counts():
    def narrow(net, x):
        with torch.autocast("cpu", torch.bfloat16):
            x = net.conv(x)
        return net.fc(x.float().mean((2, 3)))

    found = shapes_of(
        Written(narrow, conv=nn.Conv2d(3, 4, 3), fc=nn.Linear(4, 2)), torch.zeros(2, 3, 6, 6)
    )
    assert [s.dtype for s in found.values()] == ["bfloat16", "float32"]


def test_a_batch_that_fits_no_memory():
    x = torch.zeros(1).expand(2**20, 3, 2000, 2000)
    found = shapes_of(nn.Sequential(nn.Conv2d(3, 512, 3), nn.ReLU(), nn.Conv2d(512, 4, 1)), x)
    assert found["_2"].pre == (2**20, 512, 1998, 1998)


def test_a_map_is_what_lies_between_batch_and_channels():
    geometry = fxlocal.analyze(nn.Sequential(nn.Conv2d(3, 4, 3))).layers[0].geometry
    conv = Layer(0, "c", "conv", "c", "c.weight", "x", geometry)
    linear = Layer(0, "l", "linear", "l", "l.weight", "x")
    rest = ("float32", "cpu", True)
    assert map_size(conv, Shapes((2, 3, 7, 6), (2, 4, 5, 4), (4, 3, 3, 3), *rest)) == (5, 4)
    assert map_size(conv, Shapes((3, 7, 6), (4, 5, 4), (4, 3, 3, 3), *rest)) == (5, 4)
    assert map_size(linear, Shapes((2, 7, 6, 3), (2, 7, 6, 4), (4, 3), *rest)) == (7, 6)
    assert map_size(linear, Shapes((3,), (4,), (4, 3), *rest)) == ()

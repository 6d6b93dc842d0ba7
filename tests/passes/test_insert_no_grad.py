"""The region before a boundary keeps nothing: how it prints, what it saves, what it leaves."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from fxlocal.passes import insert_no_grad
from support.nets import NETS
from torch import nn

from fxlocal import PlanError, capture, diff_graphs, format_graph


class OwnRegions(nn.Module):
    """A no_grad and an autocast region of its own, and a failing layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        with torch.no_grad():
            x = torch.relu(self.a(x))
        with torch.autocast("cpu", torch.bfloat16):
            x = torch.relu(self.b(x))
        return self.c(x.to(torch.float32))


def region(model, start):
    network = capture(model).clone()
    insert_no_grad(network, start=start)
    return network


# --- golden --------------------------------------------------------------------------------------


def test_region_ends_at_the_boundary():
    text = format_graph(region(NETS["chain"].build(), "conv2"))
    assert_expected_inline(
        text,
        """\
%x = placeholder x
with torch.no_grad():
%conv1 = call_module conv1(%x)
%bn1 = call_module bn1(%conv1)
%relu = call_module relu(%bn1)
end torch.no_grad()
%conv2 = call_module conv2(%relu)
%bn2 = call_module bn2(%conv2)
%relu_1 = call_module relu(%bn2)
%conv3 = call_module conv3(%relu_1)
%relu_2 = call_module relu(%conv3)
%mean = call_method mean(%relu_2, (2, 3))
%fc = call_module fc(%mean)
output %fc""",
    )


def test_regions_of_the_model_stay_inside():
    assert_expected_inline(
        format_graph(region(OwnRegions(), "relu_1")),
        """\
%x = placeholder x
with torch.no_grad():
with torch.no_grad():
%a = call_module a(%x)
%relu = call_function relu(%a)
end torch.no_grad()
with torch.autocast('cpu', dtype=torch.bfloat16, enabled=True):
%b = call_module b(%relu)
end torch.autocast('cpu', dtype=torch.bfloat16, enabled=True)
end torch.no_grad()
with torch.autocast('cpu', dtype=torch.bfloat16, enabled=True):
%relu_1 = call_function relu(%b)
end torch.autocast('cpu', dtype=torch.bfloat16, enabled=True)
%to = call_method to(%relu_1, torch.float32)
%c = call_module c(%to)
output %c""",
    )


# --- oracle --------------------------------------------------------------------------------------


def grad_modes(network, x):
    """What each leaf module sees: (path, gradients recorded?, autocast?)."""
    seen = []
    for path, module in network.named_modules():
        if path in ("a", "b", "c"):
            module.register_forward_hook(
                lambda *_, path=path: seen.append(
                    (path, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"))
                )
            )
    network.recompile()
    network(x)
    return seen


def test_each_layer_runs_under_the_contexts_that_are_printed():
    x = torch.ones(3, 4)
    assert grad_modes(region(OwnRegions(), "c"), x) == [
        ("a", False, False),
        ("b", False, True),
        ("c", True, False),
    ]
    assert grad_modes(capture(OwnRegions()), x) == [
        ("a", False, False),
        ("b", True, True),
        ("c", True, False),
    ]


def test_prefix_keeps_nothing_for_backward():
    x = torch.ones(2, 3, 8, 8)
    kept = []
    network = region(NETS["unet"].build(), "head")
    network.recompile()
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda kept: kept):
        network(x)
    head = [(2, 4, 1, 1), (2, 4, 8, 8)]  # its weight and its input
    assert sorted(tuple(value.shape) for value in kept) == head


# --- refusals ------------------------------------------------------------------------------------


def test_unknown_node_is_refused():
    with pytest.raises(PlanError, match=r"no node 'fc9' in the graph. Nearest: 'fc'"):
        region(NETS["chain"].build(), "fc9")


# --- does nothing when it should -----------------------------------------------------------------


def test_nothing_lies_before_the_first_node():
    captured = capture(NETS["chain"].build())
    assert diff_graphs(captured, region(captured, "conv1")) == ""


def test_the_capture_keeps_its_own_regions():
    captured = capture(OwnRegions())
    before = format_graph(captured)
    region(captured, "c")
    assert format_graph(captured) == before


class Pools(nn.Module):
    """Max pools as a module, which a hook watches, and as functions; one returns its indices."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.pool = nn.MaxPool2d(3, 2, padding=1, ceil_mode=True)
        self.indexed = nn.MaxPool2d(2, return_indices=True)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = F.max_pool2d(self.pool(self.conv(x)), 2, stride=1, dilation=2)
        x, indices = self.indexed(torch.max_pool2d(x, 2))
        return self.last(x) + indices.sum()


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_pools_return_the_same_bits_in_the_same_layout(format):
    torch.manual_seed(0)
    model, seen = Pools(), []
    model.pool.register_forward_hook(lambda pool, taken, made: seen.append((taken[0], made)))
    model.indexed.register_forward_hook(lambda pool, taken, made: seen.append((taken[0], made[1])))
    x = torch.randn(2, 3, 30, 30).to(memory_format=format)
    x[0, 0, 5, 5], x[1] = float("nan"), x[1].round()  # ties
    model(x)
    network = region(model, "last")
    assert str(network.graph).count("target=fxlocal.ops.values.channels_last") == 3
    network(x)
    (pooled, made), (taken, indices), (laid_out, again), (taken_again, same) = seen
    assert pooled.is_contiguous() is (format is torch.contiguous_format)
    assert laid_out.is_contiguous(memory_format=torch.channels_last)
    for mine, other in ((again, made), (taken_again, taken), (same, indices)):
        assert torch.equal(mine.nan_to_num(9.0), other.nan_to_num(9.0))
    assert taken_again.stride() == taken.stride()


def test_a_pool_to_one_pixel_is_laid_out_as_without_the_region():
    model, strides = nn.Sequential(nn.MaxPool2d(4), nn.Conv2d(8, 2, 1)), []
    model[1].register_forward_pre_hook(lambda conv, taken: strides.append(taken[0].stride()))
    x = torch.randn(2, 8, 4, 4)
    for one in (x, x[:, :, :1, :1].repeat(1, 1, 4, 4), x.to(memory_format=torch.channels_last)):
        model(one)
        region(model, "_1")(one)
    assert strides[::2] == strides[1::2]

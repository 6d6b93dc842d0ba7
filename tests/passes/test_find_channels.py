"""Which channels can only be cut together: what must be found, and why what is fixed is fixed."""

import pytest
import torch
import torch.nn.functional as F
from support.nets import NETS, Written
from support.shrinking import channels_of
from torch import nn


def table(model):
    """Each axis with its channels, numbered anew in the order in which they come."""
    channels = channels_of(model)
    numbers: dict[int, int] = {}
    rows = []
    for use in channels.uses:
        own = [numbers.setdefault(channel, len(numbers)) for channel in use.channels]
        rows.append(f"{use.tensor}.{use.axis} {use.role} {own}")
    return rows


def test_a_residual_stream_is_one_in_all_its_layers():
    rows = table(nn.Sequential(nn.Conv2d(3, 2, 1), Small(), nn.Conv2d(2, 3, 1)))
    assert rows == [
        "0.weight.0 out [0, 1]",
        "0.bias.0 other [0, 1]",
        "1.conv1.weight.0 out [2, 3, 4]",
        "1.conv1.weight.1 in [0, 1]",
        "1.bn1.weight.0 other [2, 3, 4]",
        "1.bn1.bias.0 other [2, 3, 4]",
        "1.bn1.running_mean.0 other [2, 3, 4]",
        "1.bn1.running_var.0 other [2, 3, 4]",
        "1.conv2.weight.0 out [0, 1]",
        "1.conv2.weight.1 in [2, 3, 4]",
        "2.weight.0 out [5, 6, 7]",
        "2.weight.1 in [0, 1]",
        "2.bias.0 other [5, 6, 7]",
    ]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.conv2 = nn.Conv2d(3, 2, 1, bias=False)

    def forward(self, x):
        return x + self.conv2(F.relu(self.bn1(self.conv1(x))))


def two(body, **children):
    """A convolution of four channels, ``body``, and one behind it."""
    stem = nn.Conv2d(3, 4, 1, bias=False)
    return Written(lambda m, x: m.end(body(m, m.stem(x))), stem=stem, **children)


CONV = nn.Conv2d(4, 1, 1)
KNOWN = {
    "concat": (
        two(lambda m, x: torch.cat([x, m.b(x)], 1), b=nn.Conv2d(4, 2, 1), end=nn.Conv2d(6, 1, 1)),
        ["end.weight.1 in [0, 1, 2, 3, 4, 5]"],
    ),
    "depthwise": (
        two(
            lambda m, x: m.b(x), b=nn.Conv2d(4, 8, 1, groups=4, bias=False), end=nn.Conv2d(8, 1, 1)
        ),
        [
            "b.weight.0 depthwise [0, 0, 1, 1, 2, 2, 3, 3]",
            "end.weight.1 in [0, 0, 1, 1, 2, 2, 3, 3]",
        ],
    ),
    "grouped": (
        two(
            lambda m, x: m.b(x), b=nn.Conv2d(4, 6, 1, groups=2, bias=False), end=nn.Conv2d(6, 1, 1)
        ),
        [
            "stem.weight.0 out [0, 1, 0, 1]",
            "b.weight.1 in [0, 1]",
            "b.weight.0 out [2, 3, 4, 2, 3, 4]",
        ],
    ),
    "transposed": (
        two(
            lambda m, x: m.b(x),
            b=nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False),
            end=nn.Conv2d(6, 1, 1),
        ),
        ["b.weight.0 in [0, 1, 0, 1]", "b.weight.1 out [2, 3, 4]"],
    ),
    "flatten": (
        two(lambda m, x: x.flatten(1), end=nn.Linear(8, 1)),
        ["end.weight.1 in [0, 0, 1, 1, 2, 2, 3, 3]"],
    ),
    "view": (
        two(lambda m, x: x.view(x.size(0), -1), end=nn.Linear(8, 1)),
        ["end.weight.1 in [0, 0, 1, 1, 2, 2, 3, 3]"],
    ),
    "group norm": (
        two(lambda m, x: m.b(x), b=nn.GroupNorm(2, 4), end=nn.Conv2d(4, 1, 1)),
        ["stem.weight.0 out [0, 0, 1, 1]", "b.weight.0 other [0, 0, 1, 1]"],
    ),
    "other sizes": (
        two(lambda m, x: x / x.size(0) / x.shape[-1] / x.shape[2:4][0] / x.dim(), end=CONV),
        ["end.weight.1 in [0, 1, 2, 3]"],
    ),
    "scale": (
        two(lambda m, x: x * m.b, b=nn.Parameter(torch.ones(4, 1, 1)), end=nn.Conv2d(4, 1, 1)),
        ["b.0 other [0, 1, 2, 3]"],
    ),
    "gate": (
        two(
            lambda m, x: x * m.b(x.mean((2, 3))).sigmoid().view(x.size(0), x.size(1), 1, 1),
            b=nn.Linear(4, 4, bias=False),
            end=nn.Conv2d(4, 1, 1),
        ),
        ["b.weight.0 out [0, 1, 2, 3]", "b.weight.1 in [0, 1, 2, 3]"],
    ),
    "index": (
        two(
            lambda m, x: x * m.b(x.mean((2, 3)))[:, :, None, None],
            b=nn.Linear(4, 4, bias=False),
            end=nn.Conv2d(4, 1, 1),
        ),
        ["b.weight.0 out [0, 1, 2, 3]"],
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_channels_are_followed_through(name):
    model, expected = KNOWN[name]
    found = {row.rpartition(" [")[0]: row for row in table(model)}
    wanted = {row.rpartition(" [")[0]: row for row in expected}
    numbers = {}

    def renumbered(row):
        listed = [int(n) for n in row.partition("[")[2].rstrip("]").split(",")]
        return [numbers.setdefault(n, len(numbers)) for n in listed]

    got = [renumbered(found[key]) for key in wanted]
    numbers = {}
    assert got == [renumbered(wanted[key]) for key in wanted]


FIXED = {
    "output": (nn.Sequential(nn.Conv2d(3, 4, 1)), "0", "leave the model"),
    "softmax": (two(lambda m, x: x.softmax(1), end=nn.Conv2d(4, 1, 1)), "stem", "'softmax'"),
    "mean": (two(lambda m, x: x - x.mean(1, True), end=nn.Conv2d(4, 1, 1)), "stem", "'mean'"),
    "layer norm": (
        two(lambda m, x: m.b(x), b=nn.LayerNorm([4, 2, 1]), end=nn.Conv2d(4, 1, 1)),
        "stem",
        "'LayerNorm'",
    ),
    "slice": (two(lambda m, x: x[:, :2], end=nn.Conv2d(2, 1, 1)), "stem", "'getitem'"),
    "view": (two(lambda m, x: x.view(-1, 8), end=nn.Linear(8, 1)), "stem", "'view'"),
    "input": (
        Written(lambda m, x: m.b(x + m.a(x)), a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 1, 1)),
        "a",
        "'add'",
    ),
    "depthwise of the input": (
        Written(lambda m, x: m.b(m.a(x)), a=nn.Conv2d(3, 3, 1, groups=3), b=nn.Conv2d(3, 1, 1)),
        "a",
        "unknown channels",
    ),
    "shuffle": (
        two(lambda m, x: m.b(x), b=nn.ChannelShuffle(2), end=nn.Conv2d(4, 1, 1)),
        "stem",
        "'ChannelShuffle'",
    ),
    "size": (two(lambda m, x: x / x.size(1), end=nn.Conv2d(4, 1, 1)), "stem", "their number"),
    "numel": (two(lambda m, x: x / x.numel(), end=nn.Conv2d(4, 1, 1)), "stem", "their number"),
    "shape": (
        two(lambda m, x: x * (x.shape[-1] * x.shape[1:][0]) ** -0.5, end=nn.Conv2d(4, 1, 1)),
        "stem",
        "their number",
    ),
    "one for several": (
        two(lambda m, x: x * m.b(x), b=nn.Conv2d(4, 1, 1), end=nn.Conv2d(4, 1, 1)),
        "b",
        "for each of several",
    ),
}


@pytest.mark.parametrize("name", FIXED)
def test_why_channels_are_fixed(name):
    model, path, reason = FIXED[name]
    channels = channels_of(model)
    assert all(reason in channels.fixed.get(channel, "") for channel in channels.outputs[path])


def test_a_layer_called_twice_has_the_same_inputs_as_outputs():
    channels = channels_of(NETS["shared"].build())
    assert len({channels.outputs["stem"], channels.outputs["conv"]}) == 1


def test_a_weight_that_is_also_used_otherwise_is_fixed():
    parts = {"stem": nn.Conv2d(3, 4, 1), "end": nn.Conv2d(4, 1, 1)}
    model = Written(lambda m, x: (m.end(m.stem(x)), m.stem.weight.norm()), **parts)
    channels = channels_of(model)
    assert all("'norm'" in channels.fixed[channel] for channel in channels.outputs["stem"])

"""A local update for each layer of a prefix: what is inserted, and that it learns by the paper."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from fxlocal.passes import find_layers, find_skips, insert_local_updates
from support import laws
from support.nets import NETS
from torch import nn
from torch.nn.utils import parametrizations

import fxlocal
from fxlocal import Freeze, Hebbian, LocalPrefix, NoEffectWarning, Plan, PlanError, capture
from fxlocal.ir.nodes import Origin

RATE = 0.125  # the same number in float32 and float64


def plan(until, rate=RATE):
    return Plan(local=LocalPrefix(until=until, rule=Hebbian(rate)))


def updated(model, start, layers):
    captured = capture(model)
    network = captured.clone()
    found, skips = find_layers(captured)[layers], find_skips(captured)
    insert_local_updates(network, start=start, layers=found, skips=skips, rule=Hebbian(RATE))
    return captured, network


def inserted(name, start, layers):
    """The inserted lines, without the geometry and the stamp that each of them ends with."""
    diff = fxlocal.diff_graphs(*updated(NETS[name].build(), start, layers))
    lines = (line.partition("  # ")[0].partition(", (")[0] for line in diff.splitlines())
    return "\n".join(lines)


# --- golden --------------------------------------------------------------------------------------


def test_update_of_a_layer():
    captured, network = updated(NETS["chain"].build(), "conv2", slice(0, 1))
    assert_expected_inline(
        fxlocal.diff_graphs(captured, network),
        """\
+%rate = get_attr fxlocal.rate  # insert_local_updates @conv1
+%conv1_weight = get_attr conv1.weight  # insert_local_updates @conv1
+%conv1_delta = call_function fxlocal.conv_delta(%x, %conv1, %conv1_weight, (1, 1), (1, 1), (1, 1), False, 1)  # insert_local_updates @conv1
+%conv1_update = call_function fxlocal.normalised_add_(%conv1_weight, %conv1_delta, %rate)  # insert_local_updates @conv1""",  # noqa: E501
    )
    assert float(network.additions["rate"]) == RATE


def test_post_of_a_residual_branch_is_the_sum():
    assert_expected_inline(
        inserted("residual", "fc", slice(4, 6)),
        """\
+%rate = get_attr fxlocal.rate
+%block2_shortcut_0_weight = get_attr block2.shortcut.0.weight
+%block2_shortcut_0_delta = call_function fxlocal.conv_delta(%block1_relu_1, %add_1, %block2_shortcut_0_weight
+%block2_shortcut_0_update = call_function fxlocal.normalised_add_(%block2_shortcut_0_weight, %block2_shortcut_0_delta, %rate)
+%block2_conv2_weight = get_attr block2.conv2.weight
+%block2_conv2_delta = call_function fxlocal.conv_delta(%block2_relu, %add_1, %block2_conv2_weight
+%block2_conv2_update = call_function fxlocal.normalised_add_(%block2_conv2_weight, %block2_conv2_delta, %rate)""",  # noqa: E501
    )


class Functional(nn.Module):
    """A residual branch whose norm and dropout are functions; ``by_shape`` defeats tracing."""

    def __init__(self, by_shape):
        super().__init__()
        self.by_shape = by_shape
        self.stem, self.conv, self.last = (nn.Conv2d(3, 3, 1) for _ in range(3))

    def forward(self, x):
        x = self.stem(x if not self.by_shape or x.shape[0] > 1 else -x)
        return self.last(x + F.dropout2d(F.instance_norm(self.conv(x)), 0.1))


@pytest.mark.parametrize("by_shape", [False, True])
def test_post_behind_functional_norm_and_dropout_is_the_sum(by_shape):
    captured = capture(Functional(by_shape), torch.zeros(2, 3, 4, 4))
    layers, skips, network = find_layers(captured), find_skips(captured), captured.clone()
    start = layers[2].node
    insert_local_updates(network, start=start, layers=layers[:2], skips=skips, rule=Hebbian(RATE))
    posts = [n.args[1].name for n in network.graph.nodes if n.name.endswith("_delta")]
    assert posts == [layers[0].node, "add"]


def test_post_before_a_sum_beyond_the_boundary_is_the_layers_output():
    assert_expected_inline(
        inserted("residual", "block2_shortcut_0", slice(4, 5)),
        """\
+%rate = get_attr fxlocal.rate
+%block2_conv2_weight = get_attr block2.conv2.weight
+%block2_conv2_delta = call_function fxlocal.conv_delta(%block2_relu, %block2_conv2, %block2_conv2_weight
+%block2_conv2_update = call_function fxlocal.normalised_add_(%block2_conv2_weight, %block2_conv2_delta, %rate)""",  # noqa: E501
    )


def test_post_behind_a_long_range_concat_has_the_skip_added():
    assert_expected_inline(
        inserted("unet", "head", slice(5, 6)),
        """\
+%rate = get_attr fxlocal.rate
+%add_where_shapes_agree = call_function add_where_shapes_agree(%dec1_0, %enc1_2)
+%dec1_0_weight = get_attr dec1.0.weight
+%dec1_0_delta = call_function fxlocal.conv_delta(%cat_1, %add_where_shapes_agree, %dec1_0_weight
+%dec1_0_update = call_function fxlocal.normalised_add_(%dec1_0_weight, %dec1_0_delta, %rate)""",
    )


def test_layer_called_twice_gets_one_update_after_the_last_call():
    assert_expected_inline(
        inserted("shared", "fc", slice(1, 3)),
        """\
+%rate = get_attr fxlocal.rate
+%conv_weight = get_attr conv.weight
+%conv_delta = call_function fxlocal.conv_delta(%relu, %conv, %conv_weight
+%conv_1_weight = get_attr conv.weight
+%conv_1_delta = call_function fxlocal.conv_delta(%relu_1, %conv_1, %conv_1_weight
+%add = call_function add(%conv_delta, %conv_1_delta)
+%conv_update = call_function fxlocal.normalised_add_(%conv_weight, %add, %rate)""",
    )


def test_input_of_an_even_same_convolution_is_padded():
    assert_expected_inline(
        inserted("functional", "mean", slice(1, 2)),
        """\
+%rate = get_attr fxlocal.rate
+%pad = call_function pad(%relu
+%conv2d_1_weight = get_attr w2
+%conv2d_1_delta = call_function fxlocal.conv_delta(%pad, %conv2d_1, %conv2d_1_weight
+%conv2d_1_update = call_function fxlocal.normalised_add_(%conv2d_1_weight, %conv2d_1_delta, %rate)""",  # noqa: E501
    )


# --- oracle --------------------------------------------------------------------------------------

ORACLE_CASES = [
    *(("chain", until) for until in (1, 2, 3)),
    *(("residual", until) for until in range(1, 7)),
    *(("unet", until) for until in range(1, 7)),
]


@pytest.mark.sample(7)
@pytest.mark.parametrize("name,until", ORACLE_CASES)
def test_training_is_the_oracles(trained_twice, name, until):
    (ours, trace), (theirs, expected) = trained_twice(name, until, Hebbian(RATE))
    for step in range(2):  # until the first local update has been seen, the arithmetic is the same
        laws.assert_equal(trace[step], expected[step], f"output and gradients of step {step}")
    # 1e-9: the delta by hand is summed in another order, and one step carries it on
    torch.testing.assert_close(trace[2], expected[2], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-9, atol=1e-9)


def test_rate_is_read_from_the_buffer():
    net = NETS["chain"]
    model = net.build()
    network = fxlocal.transform(model, plan(1))
    network.additions["rate"].fill_(0.5)
    before = model.conv1.weight.detach().clone()
    network(*net.inputs())
    assert float((model.conv1.weight.detach() - before).norm()) == pytest.approx(0.5)


def test_rate_stays_float32_when_the_network_is_cast():
    network = fxlocal.transform(NETS["chain"].build(), plan(1, rate=1e-8)).half()
    assert float(network.additions["rate"]) == pytest.approx(1e-8)


@pytest.mark.parametrize("rates", [(), (1e-8,)])
def test_rate_is_float32_whatever_the_default(rates):
    model = NETS["chain"].build()
    torch.set_default_dtype(torch.float16)
    try:
        prefix = LocalPrefix(1, Hebbian(1e-8), rates=rates)
        found = fxlocal.transform(model, Plan(local=prefix)).additions
    finally:
        torch.set_default_dtype(torch.float32)
    kinds = [found[name].dtype for name in found if "rate" in name]
    assert kinds == [torch.float32] * 2
    assert float(found["rates" if rates else "rate"].max()) == pytest.approx(1e-8)


class Ties(nn.Module):
    """``b`` has the weight of ``a`` under a name of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


class UsedLater(Ties):
    """The weight of ``a`` serves once more, in a computation that is no layer."""

    def __init__(self):
        super().__init__()
        self.b = nn.Linear(4, 4)

    def forward(self, x):
        x = torch.relu(self.a(x)) * self.a.weight.mean()
        return self.c(torch.relu(self.b(x)))


class Context(nn.Module):
    """A residual sum that broadcasts: a global context is added at every position."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        make = nn.Linear if linear else lambda i, o: nn.Conv2d(i, o, 1)
        self.stem, self.context, self.head = make(4, 4), make(4, 4), make(4, 2)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        pooled = x.mean((1, 2) if self.linear else (2, 3), keepdim=True)
        return self.head(x + self.context(pooled))


class OutputSize(nn.Module):
    """A transposed convolution that is told the size of its output."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.head(torch.relu(self.up(torch.relu(self.down(x)), output_size=[8, 8])))


class Dead(nn.Module):
    """A layer whose output nobody uses."""

    def __init__(self):
        super().__init__()
        self.a, self.dead, self.b = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = torch.relu(self.a(x))
        self.dead(x)
        return self.b(x)


class Overwritten(nn.Module):
    """The input of ``a`` is gone when its post, the sum, is there."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        with torch.no_grad():  # else plain training could not differentiate it
            x = torch.relu(self.stem(x))
            y = self.a(x)
            x.add_(y)
        return self.b(x)


class Narrow(nn.Module):
    """A long-range concat whose skip has fewer channels than the layer behind it puts out."""

    def __init__(self):
        super().__init__()
        self.down, self.mid = nn.Conv2d(3, 1, 1), nn.Conv2d(1, 4, 1)
        self.up, self.last = nn.Conv2d(5, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        x = torch.relu(self.down(x))
        y = torch.relu(self.mid(F.max_pool2d(x, 2)))
        y = self.up(torch.cat([x, F.interpolate(y, scale_factor=2.0)], 1))
        return self.last(torch.relu(y))


ODD = {
    "tied": (Ties, (3, 4)),
    "used later": (UsedLater, (3, 4)),
    "broadcast conv": (lambda: Context(False), (2, 4, 3, 3)),
    "broadcast linear": (lambda: Context(True), (2, 3, 3, 4)),
    "output size": (OutputSize, (2, 3, 8, 8)),
    "dead": (Dead, (3, 4)),
    "overwritten": (Overwritten, (3, 4)),
    "narrow": (Narrow, (2, 3, 4, 4)),
}


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", ODD)
def test_odd_networks_keep_the_laws(name):
    build, shape = ODD[name]
    torch.manual_seed(0)
    model, inputs = build(), (torch.randn(shape),)
    last = fxlocal.analyze(model).layers[-1].index
    laws.l2_output_is_exact(model, inputs, plan(last))
    laws.l9_delta_is_closed_form(model, inputs, plan(last))


def test_each_node_says_who_made_it_and_for_which_layer():
    captured, network = updated(NETS["chain"].build(), "conv3", slice(0, 2))
    known = {node.name for node in captured.graph.nodes}
    stamps = [n.meta["fxlocal"] for n in network.graph.nodes if n.name not in known]
    expected = [Origin("insert_local_updates", layer) for layer in ("conv1", "conv2")]
    assert sorted(map(repr, set(stamps))) == sorted(map(repr, expected))


# --- refusals ------------------------------------------------------------------------------------


def test_computed_weight_is_refused_before_any_edit():
    model = nn.Sequential(
        nn.Linear(4, 4), parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2)
    )
    with pytest.raises(PlanError, match=r"layer '1' computes its weight.*use Freeze"):
        fxlocal.transform(model, plan(2))
    captured = capture(model)
    network = captured.clone()
    with pytest.raises(PlanError):
        insert_local_updates(
            network, start="_2", layers=find_layers(captured)[:2], skips=(), rule=Hebbian(RATE)
        )
    assert fxlocal.diff_graphs(captured, network) == ""
    assert "rate" not in network.additions
    fxlocal.transform(model, Plan(local=LocalPrefix(until=2, rule=Freeze())))


# --- does nothing when it should -----------------------------------------------------------------


def test_prefix_that_is_frozen_throughout_warns():
    model = NETS["chain"].build()
    model.conv1.requires_grad_(False)
    with pytest.warns(NoEffectWarning, match="insert_local_updates"):
        fxlocal.transform(model, plan(1))


def test_layers_after_the_boundary_get_no_update():
    _, network = updated(NETS["residual"].build(), "block2_conv1", slice(0, 3))
    moved = [n.args[0].target for n in network.graph.nodes if "normalised_add_" in str(n.target)]
    assert moved == ["stem.0.weight", "block1.conv1.weight", "block1.conv2.weight"]

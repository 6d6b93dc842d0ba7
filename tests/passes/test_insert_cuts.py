"""No gradient over a boundary: the goldens, then a frozen prefix by hand, bit for bit."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from fxlocal.passes import insert_cuts
from support import laws
from support.nets import NETS, Written
from torch import nn

from fxlocal import Freeze, LocalPrefix, Plan, PlanError, capture, diff_graphs
from fxlocal.ir.nodes import Origin


def cut(model, start):
    captured = capture(model)
    network = captured.clone()
    insert_cuts(network, start=start, layer="here")
    return diff_graphs(captured, network)


class Pair(nn.Module):
    """A pair and a size cross the boundary at ``b``."""

    def __init__(self, split):
        super().__init__()
        self.split = split
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)

    def forward(self, x):
        pair = self.split(self.a(x))
        width = x.size(-1)
        y = self.b(pair[0]) + pair[1].float().mean()
        return self.c(F.interpolate(y, size=width))


# --- golden --------------------------------------------------------------------------------------


def test_skip_edge_over_the_boundary_is_cut_too():
    assert_expected_inline(
        cut(NETS["residual"].build(), "block1_conv2"),
        """\
-%block1_conv2 = call_module block1.conv2(%block1_relu)
+%detach = call_method detach(%stem_2)  # insert_cuts @here
+%detach_1 = call_method detach(%block1_relu)  # insert_cuts @here
+%block1_conv2 = call_module block1.conv2(%detach_1)
-%block1_shortcut = call_module block1.shortcut(%stem_2)
+%block1_shortcut = call_module block1.shortcut(%detach)""",
    )


def test_every_long_range_skip_is_cut():
    assert_expected_inline(
        cut(NETS["unet"].build(), "up2"),
        """\
-%up2 = call_module up2(%mid_2)
-%cat = call_function cat([%enc2_2, %up2], 1)
+%detach = call_method detach(%enc1_2)  # insert_cuts @here
+%detach_1 = call_method detach(%enc2_2)  # insert_cuts @here
+%detach_2 = call_method detach(%mid_2)  # insert_cuts @here
+%up2 = call_module up2(%detach_2)
+%cat = call_function cat([%detach_1, %up2], 1)
-%cat_1 = call_function cat([%enc1_2, %interpolate], 1)
+%cat_1 = call_function cat([%detach, %interpolate], 1)""",
    )


def test_output_from_before_the_boundary_is_cut():
    assert_expected_inline(
        cut(NETS["multi_output"].build(), "high_0"),
        """\
-%high_0 = call_module high.0(%low_2)
+%detach = call_method detach(%low_2)  # insert_cuts @here
+%detach_1 = call_method detach(%aux)  # insert_cuts @here
+%high_0 = call_module high.0(%detach)
-output {'out': %fc, 'aux': %aux}
+output {'out': %fc, 'aux': %detach_1}""",
    )


def test_pair_is_cut_inside_and_a_size_passes():
    assert_expected_inline(
        cut(Pair(lambda x: x.chunk(2, 1)), "b"),
        """\
-%b = call_module b(%getitem)
-%getitem_1 = call_function getitem(%chunk, 1)
+%detach_all = call_function detach_all(%chunk)  # insert_cuts @here
+%detach = call_method detach(%getitem)  # insert_cuts @here
+%b = call_module b(%detach)
+%getitem_1 = call_function getitem(%detach_all, 1)""",
    )


# --- oracle --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name,until", [("chain", 2), ("residual", 2), ("residual", 5), ("unet", 4), ("unet", 6)]
)
def test_frozen_prefix_is_the_oracles(trained_twice, name, until):
    (ours, trace), (theirs, expected) = trained_twice(name, until, Freeze())
    for step in range(3):
        laws.assert_equal(trace[step][0], expected[step][0], f"output {step}")
        laws.assert_equal(trace[step][1], expected[step][1], f"gradient {step}")
    laws.assert_equal(ours.state_dict(), theirs.state_dict(), "state")


@pytest.mark.parametrize(
    "split",
    [
        lambda x: F.max_pool2d(x[:, :2], 2, return_indices=True),
        lambda x: torch.broadcast_tensors(x[:, :2], x[:, 2:]),
        lambda x: torch.frexp(x[:, :2]),
        lambda x: torch.topk(x, 2, 1),
        lambda x: x.sort(1).values.split(2, 1),
        lambda x: (x[:, :2], x[:, 2:]),
    ],
    ids=["max_pool2d", "broadcast_tensors", "frexp", "topk", "split", "tuple"],
)
def test_whatever_a_call_returns_is_cut(split):
    plan = Plan(local=LocalPrefix(until="b", rule=Freeze()))
    laws.l4_no_leak(Pair(split), NETS["chain"].inputs(), plan)


def test_value_that_is_overwritten_after_the_boundary_is_cut():
    def overwrite(net, x):
        x = net.a(x)
        y = net.b(x.clone())
        x += y
        return x * 2

    plan = Plan(local=LocalPrefix(until="b", rule=Freeze()))
    laws.l3_cut_blocks(
        Written(overwrite, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 4, 1)), NETS["chain"].inputs(), plan
    )


def test_each_cut_says_who_made_it():
    network = capture(NETS["residual"].build()).clone()
    insert_cuts(network, start="block1_conv2", layer="block1.conv2")
    stamps = [node.meta["fxlocal"] for node in network.graph.nodes if node.target == "detach"]
    assert stamps == [Origin("insert_cuts", "block1.conv2")] * 2


# --- refusals ------------------------------------------------------------------------------------


def test_unknown_node_is_refused_with_the_nearest_names():
    with pytest.raises(PlanError, match=r"no node 'conv9' in the graph. Nearest: 'conv\d'"):
        cut(NETS["chain"].build(), "conv9")


def test_one_layer_on_both_sides_is_refused_before_any_edit():
    captured = capture(NETS["shared"].build())
    network = captured.clone()
    message = "'conv.weight' is used before it and after it"
    with pytest.raises(PlanError, match=message):
        insert_cuts(network, start="conv_1", layer="conv")
    assert diff_graphs(captured, network) == ""


def test_tied_weights_of_two_layers_are_refused_by_both_names():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    with pytest.raises(PlanError, match=r"'0.weight' is used before it and, as '2.weight', after"):
        cut(model, "_2")


# --- does nothing when it should -----------------------------------------------------------------


def test_nothing_crosses_before_the_first_node():
    assert cut(NETS["chain"].build(), "conv1") == ""


def test_inputs_parameters_and_sizes_are_not_cut():
    def bare(net, x):
        rows = x.shape[0] * 2
        return F.linear(x, net.weight).repeat(rows, 1)

    assert cut(Written(bare, weight=nn.Parameter(torch.ones(3, 3))), "linear") == ""

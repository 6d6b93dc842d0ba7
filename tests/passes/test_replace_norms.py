"""Batch norms of a prefix that use, and keep, their running statistics."""

import copy

import pytest
import torch
from expecttest import assert_expected_inline
from fxlocal.passes import replace_norms
from support import laws
from support.captures import ByShape
from support.nets import NETS
from torch import nn

import fxlocal
from fxlocal import Freeze, Hebbian, LocalPrefix, NoEffectWarning, Plan, PlanError, diff_graphs


def replaced(model, start):
    captured = fxlocal.capture(model)
    network = captured.clone()
    replace_norms(network, start=start)
    return captured, network


def plan(until, rule=None):
    return Plan(local=LocalPrefix(until=until, rule=rule or Freeze(), norm="eval"))


# --- golden --------------------------------------------------------------------------------------


def test_norm_becomes_a_function_of_its_statistics():
    assert_expected_inline(
        diff_graphs(*replaced(NETS["chain"].build(), "conv2")),
        """\
-%bn1 = call_module bn1(%conv1)
-%relu = call_module relu(%bn1)
+%bn1_running_mean = get_attr bn1.running_mean  # replace_norms @bn1
+%bn1_running_var = get_attr bn1.running_var  # replace_norms @bn1
+%bn1_weight = get_attr bn1.weight  # replace_norms @bn1
+%bn1_bias = get_attr bn1.bias  # replace_norms @bn1
+%batch_norm = call_function batch_norm(%conv1, %bn1_running_mean, %bn1_running_var, %bn1_weight, %bn1_bias, False, 0.1, 1e-05)  # replace_norms @bn1
+%relu = call_module relu(%batch_norm)""",  # noqa: E501
    )


# --- oracle --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [Freeze(), Hebbian(0.125)])
@pytest.mark.parametrize("name,until", [("chain", 2), ("residual", 5), ("unet", 5)])
def test_training_is_the_oracles(trained_twice, name, until, rule):
    (ours, trace), (theirs, expected) = trained_twice(name, until, rule, "eval")
    # 1e-9: the norm by hand divides by a square root where torch multiplies by its inverse
    for mine, other in zip(trace, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "name,until,fixed",
    [
        ("residual", 4, ("stem.1", "block1.bn1", "block1.bn2", "block2.bn1")),
        ("preactivation", 3, ("norms.0", "norms.1")),  # the cut lies before norms.2
    ],
)
def test_statistics_stay_before_the_boundary_and_move_after_it(name, until, fixed):
    model = NETS[name].build()
    laws.step(model, NETS[name].inputs())  # so that they are not those of a fresh model
    before = copy.deepcopy(dict(model.named_buffers()))
    laws.step(fxlocal.transform(model, plan(until)), NETS[name].inputs())
    for path, buffer in model.named_buffers():
        assert torch.equal(buffer, before[path]) == path.startswith(fixed), path


def test_exported_norm_is_fixed_too():
    model, (x,) = ByShape(NETS["chain"].build()), NETS["chain"].inputs()
    network = fxlocal.transform(model, plan(1), x)
    before = copy.deepcopy(dict(model.named_buffers()))
    network(x)
    moved = [n for n, b in model.named_buffers() if not torch.equal(b, before[n])]
    assert moved == [f"net.bn2.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")]


# --- refusals ------------------------------------------------------------------------------------


def test_unknown_node_is_refused():
    with pytest.raises(PlanError, match="no node 'nowhere' in the graph"):
        replaced(NETS["chain"].build(), "nowhere")


# --- does nothing when it should -----------------------------------------------------------------


def test_norm_without_running_statistics_is_left_alone():
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
        *(nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.Conv2d(4, 2, 1)),
    )
    assert diff_graphs(*replaced(model, "_4")) == ""


def test_norms_after_the_boundary_are_left_alone():
    assert diff_graphs(*replaced(NETS["chain"].build(), "bn1")) == ""


def test_a_model_without_norms_warns():
    with pytest.warns(NoEffectWarning, match=r"the pass replace_norms\(.*\) changed nothing"):
        fxlocal.transform(NETS["shared"].build(), plan(1))

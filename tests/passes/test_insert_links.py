"""The tail of a stage runs again in front of the next one; truth is in test_local_modules.py."""

import pytest
import torch
from expecttest import assert_expected_inline
from fxlocal.passes import assign_stages, insert_links
from torch import nn

import fxlocal
from fxlocal import PlanError
from fxlocal.facts import StageBoundary
from fxlocal.ir.nodes import STAGE


class Net(nn.Module):
    def __init__(self, drop=nn.Dropout(0.5)):  # noqa: B008
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.drop = drop

    def forward(self, x):
        y = self.drop(self.norm(self.a(x)))
        return self.b(y) + y


def linked(model, tail, alpha=0.25, inner=(), **weighting):
    before = fxlocal.capture(model).clone()
    stages = (StageBoundary(0, "b", "drop", tail, True, inner),)
    assign_stages(before, stages=stages)
    after = before.clone()
    insert_links(after, stages=stages, alpha=alpha, **weighting)
    after.graph.lint()
    after.recompile()
    return before, after


def test_weights_are_shared_and_both_copies_have_one_mask():
    diff = fxlocal.diff_graphs(*linked(Net(), "norm"))
    assert_expected_inline(
        diff,
        """\
-%norm = call_module norm(%a)
-%drop = call_module drop(%norm)
+%norm_module = get_attr norm  # insert_links @stage 0
+%norm = call_function call_weighted(%norm_module, 0.25, %a)  # insert_links @stage 0
+%drop_ones = call_function ones_like(%norm)  # insert_links @stage 0
+%drop_mask = call_module drop(%drop_ones)  # insert_links @stage 0
+%drop = call_function mul(%norm, %drop_mask)  # insert_links @stage 0
-%b = call_module b(%drop)
-%add = call_function add(%b, %drop)
+%norm_linked = call_function call_again(%norm_module, 0.75, %a)  # insert_links @stage 1
+%drop_linked = call_function mul(%norm_linked, %drop_mask)  # insert_links @stage 1
+%b = call_module b(%drop_linked)
+%add = call_function add(%b, %drop_linked)""",
    )


def test_compound_weights_lie_where_an_error_enters_a_block():
    net = linked(Net(nn.ReLU()), "norm", inner=("drop",), weighting="compound")
    assert_expected_inline(
        fxlocal.diff_graphs(*net),
        """\
-%drop = call_module drop(%norm)
+%norm_weighted = call_function weight_gradient(%norm, 0.25)  # insert_links @stage 0
+%drop = call_module drop(%norm_weighted)
+%drop_weighted = call_function weight_gradient(%drop, 0.25)  # insert_links @stage 0
-%b = call_module b(%drop)
-%add = call_function add(%b, %drop)
+%norm_module = get_attr norm  # insert_links @stage 1
+%norm_linked = call_function call_again(%norm_module, None, %a)  # insert_links @stage 1
+%norm_weighted_linked = call_function weight_gradient(%norm_linked, 0.75)  # insert_links @stage 1
+%drop_linked = call_module drop(%norm_weighted_linked)  # insert_links @stage 1
+%drop_weighted_linked = call_function weight_gradient(%drop_linked, 0.75)  # insert_links @stage 1
+%b = call_module b(%drop_weighted_linked)
+%add = call_function add(%b, %drop_weighted_linked)""",
    )


def test_the_copy_lies_in_the_next_stage_and_changes_no_output():
    model = Net()
    before, after = linked(model, "a")
    stages = {node.name: node.meta[STAGE] for node in after.graph.nodes}
    assert stages["a"] == stages["drop_mask"] == 0 and stages["a_linked"] == 1
    x = torch.randn(3, 4)
    outputs = []
    for net in (before, after):
        torch.manual_seed(0)
        outputs.append(net(x))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("drop", [nn.RReLU(), nn.AlphaDropout(0.1)], ids=repr)
def test_numbers_that_cannot_be_drawn_again_are_refused_before_any_edit(drop):
    net = fxlocal.capture(Net(drop)).clone()
    stages = (StageBoundary(0, "b", "drop", "norm", True),)
    assign_stages(net, stages=stages)
    text = fxlocal.format_graph(net)
    with pytest.raises(PlanError, match="link=0 or another balance"):
        insert_links(net, stages=stages, alpha=0.5)
    assert fxlocal.format_graph(net) == text


def test_a_stage_without_a_tail_is_not_linked():
    before, after = linked(Net(), None)
    assert fxlocal.diff_graphs(before, after) == ""


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_a_dropout_whose_hooks_would_get_its_mask_is_refused(kind):
    model = Net()
    getattr(model.drop, f"register_{kind}_hook")(lambda *args: None)
    with pytest.raises(PlanError, match=r"'drop' .* has hooks, which would get that mask"):
        linked(model, "norm")
    linked(model, None)

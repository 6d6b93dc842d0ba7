"""Stages are tags on nodes, printed where they begin."""

import pytest
import torch
from expecttest import assert_expected_inline
from fxlocal.passes import assign_stages
from torch import nn

import fxlocal
from fxlocal import PlanError
from fxlocal.facts import StageBoundary
from fxlocal.ir.nodes import STAGE


class Overwriting(nn.Module):
    def __init__(self, later):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.later = later

    def forward(self, x):
        x = self.a(x)
        y = self.b(x.view(2, 4).relu_())
        y = self.c(y)
        return y + x if self.later else y


def staged(model, *starts):
    before = fxlocal.capture(model)
    after = before.clone()
    stages = [StageBoundary(k, start, None, None, True) for k, start in enumerate(starts)]
    assign_stages(after, stages=stages)
    return before, after


def test_a_stage_is_printed_where_it_begins():
    diff = fxlocal.diff_graphs(*staged(Overwriting(later=False), "view", "c"))
    assert_expected_inline(
        diff,
        """\
+stage 0:
+stage 1:
+stage 2:""",
    )


def test_every_node_has_a_stage_and_nothing_is_inserted():
    before, after = staged(Overwriting(later=False), "b", "c")
    found = {node.name: node.meta[STAGE] for node in after.graph.nodes}
    assert list(found) == [node.name for node in before.graph.nodes]
    assert found == {"x": 0, "a": 0, "view": 0, "relu_": 0, "b": 1, "c": 2, "output": 2}
    x = torch.randn(2, 4)
    assert torch.equal(before(x), after(x))


def test_what_a_stage_overwrites_and_a_later_one_takes_is_refused():
    with pytest.raises(PlanError, match=r"stage 1 changes 'a' in place \('relu_'\)"):
        staged(Overwriting(later=True), "view", "c")
    staged(Overwriting(later=True), "view")  # the later one is the same stage


def test_a_start_that_is_no_node_is_refused():
    with pytest.raises(PlanError, match=r"no node 'bb' in the graph\. Nearest: 'b'"):
        staged(Overwriting(later=False), "bb")

"""Heads, losses and backwards of local modules; truth is in test_local_modules.py."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

import fxlocal
from fxlocal import InfoProHead, LocalModules, Plan, PlanError


def record_of(name, model, x, **options):
    plan = Plan(modules=LocalModules(2, num_classes=3, balance="blocks", **options))
    history = fxlocal.transform(model, plan, x).meta["fxlocal"]
    return {record.name: record.diff for record in history.records}[name]


def chain():
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


X = torch.ones(2, 4)


def test_a_module_has_a_head_a_loss_and_a_backward():
    assert_expected_inline(
        record_of("insert_losses", chain(), X),
        """\
+%target = placeholder target  # insert_losses @stage 0
+%check_target = call_function require_target(%target, %input_1, (2, 4), (2, 3), None)  # insert_losses @stage 0
+%head_0 = call_module fxlocal.heads.0(%_1)  # insert_losses @stage 0
+%loss_0 = call_function cross_entropy(%head_0, %target)  # insert_losses @stage 0
+%fxlocal_loss_scale = get_attr fxlocal.loss_scale  # insert_losses @stage 0
+%backward_0 = call_function backward(%loss_0, %fxlocal_loss_scale)  # insert_losses @stage 0
-output %_2
+%loss_1 = call_function cross_entropy(%_2, %target)  # insert_losses @stage 1
+%kept_parameter = get_attr fxlocal.heads.0.1.weight  # insert_losses @stage 1
+%loss = call_function keep_gradients(%loss_1, %kept_parameter)  # insert_losses @stage 1
+output (%_2, %loss)""",  # noqa: E501
    )


def test_infopro_reconstructs_the_image():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.AvgPool2d(4))
    model.append(nn.Flatten())
    diff = record_of("insert_losses", model, torch.ones(2, 3, 4, 4), head=InfoProHead())
    lines = [line for line in diff.splitlines() if "_0 = " in line]
    assert_expected_inline(
        "\n".join(lines),
        """\
+%head_0 = call_module fxlocal.heads.0.classifier(%_1)  # insert_losses @stage 0
+%decoded_0 = call_module fxlocal.heads.0.decoder(%_1)  # insert_losses @stage 0
+%scores_loss_0 = call_function cross_entropy(%head_0, %target)  # insert_losses @stage 0
+%loss_0 = call_function combine_losses(%scores_loss_0, %decoded_0, %input_1, 1.0, 1.0)  # insert_losses @stage 0
+%backward_0 = call_function backward(%loss_0, %fxlocal_loss_scale)  # insert_losses @stage 0""",  # noqa: E501
    )


def test_targets_go_through_replay_buffers_too():
    assert_expected_inline(
        record_of("insert_replay", chain(), X, replay=2),
        """\
-%_2: float32[2, 3] = call_module 2(%cut__1)
-%loss_1 = call_function cross_entropy(%_2, %target)  # insert_losses @stage 1
+%replay_0 = call_module fxlocal.replay.0(%target, %cut__1)  # insert_replay @stage 1
+%replayed_target = call_function getitem(%replay_0, 0)  # insert_replay @stage 1
+%replayed_cut__1 = call_function getitem(%replay_0, 1)  # insert_replay @stage 1
+%_2: float32[2, 3] = call_module 2(%replayed_cut__1)
+%loss_1 = call_function cross_entropy(%_2, %replayed_target)  # insert_losses @stage 1""",
    )


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, target):
        return self.b(self.a(target).relu())


def test_an_input_called_target_is_refused():
    with pytest.raises(PlanError, match="rename it"):
        record_of("insert_losses", Named(), X)

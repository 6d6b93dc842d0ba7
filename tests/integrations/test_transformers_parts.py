"""Trainers that put a forward of their own in place of the model's: a part of it is attached."""

from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from support.tiny import same_state
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from support.trainer import BATCH, CLASSES, SCHEDULES, STEADY, WIDTH, rows  # noqa: E402

from fxlocal import Freeze, LocalPrefix, Plan, PlanError  # noqa: E402
from fxlocal.integrations.transformers import ScheduleCallback  # noqa: E402
from fxlocal.schedules import Constant  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:no loss was observed")
PREFIX = Constant(Plan(local=LocalPrefix("second", Freeze())))


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(WIDTH, 8), nn.BatchNorm1d(8)
        self.second, self.drop, self.third = nn.Linear(8, 8), nn.Dropout(0.2), nn.Linear(8, 8)

    def forward(self, x):
        x = self.drop(torch.relu(self.norm(self.first(x))))
        return torch.relu(self.third(torch.relu(self.second(x))))


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = Body(), nn.Linear(8, CLASSES)

    def forward(self, x, labels=None):
        logits = self.head(self.body(x))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Fused(transformers.Trainer):
    """As those of TRL: never computes the logits in training, and calls what lies before them."""

    def __init__(self, model, *args, **options):
        super().__init__(model, *args, **options)

        def fused(self, x, labels=None, fused_head=False):
            if not fused_head:
                return type(self).forward(self, x, labels)
            weight, bias = self.head.weight, self.head.bias
            return {"loss": F.cross_entropy(F.linear(self.body(x), weight, bias), labels)}

        model.forward = MethodType(fused, model)

    def compute_loss(self, model, inputs, *args, **options):
        return super().compute_loss(model, {**inputs, "fused_head": True}, *args, **options)


def trainer(folder, callback=None, freezes=(), **options):
    model = Whole()
    for name in freezes:
        model.get_submodule(name).requires_grad_(False)
    settings = {"save_strategy": "no", "num_train_epochs": 4, "per_device_train_batch_size": 4}
    arguments = transformers.TrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, **settings | STEADY | options
    )
    callbacks = [] if callback is None else [callback]
    return Fused(model, arguments, train_dataset=rows(), callbacks=callbacks)


def body(schedule, path="body"):
    return ScheduleCallback(schedule, {"x": BATCH[0]}, model=path)


@pytest.mark.parametrize(
    ("schedule", "freezes"),
    [(Constant(Plan()), ()), (PREFIX, ("body.first", "body.norm"))],
    ids=["nothing", "prefix"],
)
def test_a_part_trains_as_it_does_by_itself(schedule, freezes, tmp_path):
    plain = trainer(tmp_path, freezes=freezes)
    plain.train()
    attached = trainer(tmp_path, body(schedule))
    attached.train()
    assert same_state(plain.model.state_dict(), attached.model.state_dict())
    assert "forward" not in vars(attached.model.body)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_killed_run_goes_on_exactly(name, tmp_path):
    saved = {"save_strategy": "epoch"}
    whole = trainer(tmp_path / "whole", body(SCHEDULES[name]), **saved)
    whole.train()
    callback = body(SCHEDULES[name])
    resumed = trainer(tmp_path / "whole", callback, **saved)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-12"))
    assert same_state(whole.model.state_dict(), resumed.model.state_dict())
    assert len(callback.driver.history) == 4 and max(callback.driver.history) > 0


def test_the_whole_model_is_refused_where_its_forward_is_another_by_then(tmp_path):
    example = {"x": BATCH[0], "labels": BATCH[1]}
    loop = trainer(tmp_path, ScheduleCallback(Constant(Plan()), example))
    with pytest.raises(RuntimeError, match="attach the part that this calls"):
        loop.train()


def test_a_path_that_the_model_has_not_is_refused(tmp_path):
    with pytest.raises(PlanError, match=r"model='backbone': .*a module in the Whole"):
        trainer(tmp_path, body(PREFIX, "backbone"))

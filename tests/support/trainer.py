"""A model, data and a Trainer of transformers small enough that a run takes a second."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxlocal import Freeze, Hebbian
from fxlocal.integrations.transformers import ScheduleCallback
from fxlocal.schedules import Dynamic, Static

from .tiny import same_state

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

ROWS, WIDTH, CLASSES = 24, 6, 3


class Net(nn.Module):
    """Layers with a norm and dropout, that take their labels as a model of transformers does."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, 8)
        self.norm = nn.BatchNorm1d(8)
        self.second = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.2)
        self.third = nn.Linear(8, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x, labels=None):
        x = torch.relu(self.norm(self.first(x)))
        x = self.drop(torch.relu(self.second(x)))
        logits = self.head(torch.relu(self.third(x)))
        loss = F.cross_entropy(logits, labels) if labels is not None else None
        return {"loss": loss, "logits": logits}


def rows():
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(ROWS, WIDTH, generator=generator)
    return [{"x": one, "labels": int(one.sum() > 0)} for one in x]


BATCH = (torch.zeros(4, WIDTH), torch.zeros(4, dtype=torch.long))


def trainer(folder, schedule, epochs=4, model=None, seed=0, **options):
    torch.manual_seed(seed)
    model = model or Net()
    callback = ScheduleCallback(schedule, BATCH, **options.pop("callback", {}))
    settings = {
        "per_device_train_batch_size": 4,
        "save_strategy": "epoch",
        "learning_rate": 0.01,
        "num_train_epochs": epochs,
    }
    arguments = transformers.TrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, **settings | options
    )
    data = {"train_dataset": rows(), "eval_dataset": rows()[:8]}
    return transformers.Trainer(model, arguments, callbacks=[callback], **data), callback


def trained(folder, schedule, resume=None, **options):
    loop, callback = trainer(folder, schedule, **options)
    loop.train(resume_from_checkpoint=resume)
    return loop, callback


def same(a, b):
    (loop, callback), (other, others) = a, b
    assert same_state(loop.model.state_dict(), other.model.state_dict())
    assert same_state(loop.optimizer.state_dict()["state"], other.optimizer.state_dict()["state"])
    driver, theirs = callback.driver, others.driver
    assert driver.history == theirs.history and driver.losses == theirs.losses
    assert same_state(driver.heads.state_dict(), theirs.heads.state_dict())


FREEZE = Static(epochs=4, rule=Freeze(), norm="eval", start=0.25, largest=0.8)
SCHEDULES = {
    "freeze": FREEZE,
    "hebbian": Static(epochs=4, rule=Hebbian(0.01), start=0.25, largest=0.8),
    "dynamic": Dynamic(epochs=4, alpha=1.0, shift=0.3, largest=0.8, rule=Freeze()),
}

STEADY = {"lr_scheduler_type": "constant"}

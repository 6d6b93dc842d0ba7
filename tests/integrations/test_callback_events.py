"""The callback for transformers in a loop that tells it what the Trainer does; needs no package."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support.tiny import same_state
from torch import nn

import fxlocal
from fxlocal import CheckpointError, Freeze, Hebbian
from fxlocal.integrations.transformers import ScheduleCallback
from fxlocal.schedules import Dynamic, Static

EXAMPLE = (torch.zeros(4, 5),)
SCHEDULES = {
    "static": Static(epochs=3, rule=Hebbian(0.01), start=0.3, largest=0.9),
    "dynamic": Dynamic(epochs=3, rule=Freeze(), alpha=1.0, shift=0.3, largest=0.9),
    "period": Static(epochs=3, rule=Freeze(), start=0.3, largest=0.9, refresh_every=3),
}


class Loop:
    """Tells a callback what the Trainer of transformers tells it; saves model and optimizer."""

    def __init__(self, folder, schedule, seed=0, accumulate=1, **options):
        torch.manual_seed(seed)
        self.model = nn.Sequential(*(nn.Linear(5, 5), nn.ReLU()) * 2, nn.Linear(5, 2))
        self.model[0], self.model[2] = nn.Linear(5, 5), nn.Linear(5, 5)
        self.folder, self.accumulate = folder, accumulate
        self.callback = ScheduleCallback(schedule, EXAMPLE, **options)
        self.arguments = SimpleNamespace(
            torch_compile=False, n_gpu=1, world_size=1, fp16=False, process_index=0,
            gradient_accumulation_steps=accumulate, ddp_find_unused_parameters=None,
            output_dir=str(folder), resume_from_checkpoint=None,
        )  # fmt: skip
        self.state = SimpleNamespace(global_step=0, epoch=0.0)
        self.control = SimpleNamespace(should_training_stop=False)
        self.tell("init_end")
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)

    def tell(self, event):
        told = {"model": self.model, "optimizer": getattr(self, "optimizer", None), "other": None}
        given = self.arguments, self.state, self.control
        assert getattr(self.callback, f"on_{event}")(*given, **told) is None

    def save(self):
        folder = self.folder / f"checkpoint-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(parts | {"epoch": self.state.epoch}, folder / "all.pt")
        self.tell("save")

    def load(self, step):
        parts = torch.load(self.folder / f"checkpoint-{step}" / "all.pt")
        self.model.load_state_dict(parts["model"])
        self.optimizer.load_state_dict(parts["optimizer"])
        self.state.global_step, self.state.epoch = step, parts["epoch"]

    def train(self, epochs=3, save_at=(), per_epoch=4):
        self.tell("train_begin")
        first = self.state.global_step // per_epoch
        skipped = self.state.global_step % per_epoch
        for epoch in range(first, epochs):
            self.tell("epoch_begin")
            for step in range(skipped, per_epoch):
                self.tell("step_begin")
                for part in range(self.accumulate):
                    self.backward(100 * epoch + 10 * step + part)
                self.tell("pre_optimizer_step")
                self.optimizer.step()
                self.tell("optimizer_step")
                self.optimizer.zero_grad()
                self.state.global_step += 1
                self.state.epoch = epoch + (step + 1) / per_epoch
                self.tell("step_end")
                if self.state.global_step in save_at:
                    self.save()
            skipped = 0
            self.evaluate()
            self.tell("epoch_end")
            if -self.state.global_step in save_at:
                self.save()
        self.tell("train_end")
        return self

    def backward(self, seed):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(4, 5, generator=generator)
        self.model.train()
        loss = F.cross_entropy(self.model(x), (x.sum(1) > 0).long())
        self.callback.driver.observe(loss)
        (loss / self.accumulate).backward()

    def evaluate(self):
        self.model.eval()
        with torch.no_grad():
            self.model(torch.ones(4, 5))
        self.tell("evaluate")


def same(a, b):
    assert same_state(a.model.state_dict(), b.model.state_dict())
    driver, other = a.callback.driver, b.callback.driver
    assert (driver.history, driver.losses) == (other.history, other.losses)


@pytest.mark.sample(6)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("at", [6, 8, -8], ids=["inside", "at the end", "between epochs"])
def test_a_killed_run_goes_on_exactly(at, name, accumulate, tmp_path):
    whole = Loop(tmp_path, SCHEDULES[name], accumulate=accumulate).train(save_at=[at])
    again = Loop(tmp_path, SCHEDULES[name], seed=1, accumulate=accumulate)
    again.load(abs(at))
    same(whole, again.train())
    assert max(whole.callback.driver.history) > 0


def test_it_trains_as_a_driver_does(tmp_path):
    loop = Loop(tmp_path, SCHEDULES["static"])
    loop.train()
    other = Loop(tmp_path, SCHEDULES["static"])
    other.callback.driver.detach()
    other.callback = SimpleNamespace(driver=None)
    driver = fxlocal.Driver(other.model, SCHEDULES["static"], other.optimizer)
    other.callback.driver, other.tell = driver, lambda event: None
    for epoch in range(3):
        driver.start_epoch()
        for step in range(4):
            generator = torch.Generator().manual_seed(100 * epoch + 10 * step)
            x = torch.randn(4, 5, generator=generator)
            other.model.train()
            loss = F.cross_entropy(driver.network()(x), (x.sum(1) > 0).long())
            loss.backward()
            driver.observe(loss)
            other.optimizer.step()
            other.optimizer.zero_grad()
        driver.end_epoch()
    same(loop, other)


def test_a_checkpoint_without_state_warns_or_is_refused(tmp_path):
    Loop(tmp_path, SCHEDULES["static"]).train(save_at=[-4])
    (tmp_path / "checkpoint-4" / "fxlocal_0.pt").unlink()
    loop = Loop(tmp_path, SCHEDULES["static"])
    loop.load(4)
    with pytest.warns(UserWarning, match=r"checkpoint-4.fxlocal_0\.pt"):
        loop.train()
    whole = Loop(tmp_path, SCHEDULES["static"]).train()
    assert loop.callback.driver.history == whole.callback.driver.history[1:]
    strict = Loop(tmp_path, SCHEDULES["static"], require_state=True)
    strict.load(4)
    with pytest.raises(CheckpointError, match=r"fxlocal_0\.pt"):
        strict.train()


def test_the_state_of_other_weights_is_refused(tmp_path):
    Loop(tmp_path, SCHEDULES["static"]).train(save_at=[-4])
    loop = Loop(tmp_path, SCHEDULES["static"])
    loop.load(4)
    with torch.no_grad():
        loop.model[4].bias.add_(1.0)
    with pytest.raises(CheckpointError, match="other weights"):
        loop.train()


def test_it_says_when_it_was_given_to_no_trainer():
    with pytest.raises(RuntimeError, match="give it to a Trainer"):
        ScheduleCallback(SCHEDULES["static"]).on_epoch_begin(None, None, None)
    with pytest.raises(AttributeError):
        _ = ScheduleCallback(SCHEDULES["static"]).nothing

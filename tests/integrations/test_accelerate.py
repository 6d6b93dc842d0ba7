"""accelerate: a prepared, attached model; the driver is registered for its checkpoints."""

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

accelerate = pytest.importorskip("accelerate")

from support.ranks import run_ranks  # noqa: E402
from support.tiny import same_state  # noqa: E402

import fxlocal  # noqa: E402
from fxlocal import Freeze, Hebbian, LocalModules, Plan  # noqa: E402
from fxlocal.schedules import Constant, Dynamic, Static  # noqa: E402

GENERATOR = torch.Generator().manual_seed(1)
DATA = TensorDataset(torch.randn(24, 3, 6, 6, generator=GENERATOR), torch.arange(24) % 4)
FREEZE = Static(epochs=4, rule=Freeze(), norm="eval", start=0.25, largest=0.9)
SCHEDULES = {
    "freeze": FREEZE,
    "hebbian": Static(epochs=4, rule=Hebbian(0.01), start=0.25, largest=0.9),
    "dynamic": Dynamic(epochs=4, rule=Freeze(), alpha=1.0, shift=0.3, largest=0.9),
    "modules": Constant(Plan(modules=LocalModules(2, num_classes=4))),
}


def net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Dropout(0.3)),
        *(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(6, 4),
    )


class Run:
    """The recipe of docs/integrations.md."""

    def __init__(self, schedule, seed=0, accumulate=1, precision="no", **kwargs):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=False)
        self.accelerator = accelerate.Accelerator(
            cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=precision, **kwargs
        )
        model = net(seed)
        self.driver = fxlocal.attach(model, schedule, example_inputs=(DATA.tensors[0][:4],))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        # On several ranks accelerate's sampler has a generator that it does not save.
        loader = DataLoader(DATA, batch_size=4, shuffle=self.accelerator.num_processes == 1)
        parts = self.accelerator.prepare(model, optimizer, loader)
        self.model, self.driver.optimizer, self.loader = parts
        self.accelerator.register_for_checkpointing(self.driver)
        self.takes_target = len(self.driver.heads) > 0
        self.plans = []

    def train(self, epochs, folder=None, save_at=None):
        for epoch in range(self.driver.epoch, epochs):
            self.driver.start_epoch()
            for x, y in self.loader:
                self.step(x, y)
            self.driver.end_epoch()
            self.evaluate()
            if epoch + 1 == save_at:
                self.accelerator.save_state(str(folder), safe_serialization=False)
        return self

    def step(self, x, y):
        optimizer = self.driver.optimizer
        self.model.train()
        with self.accelerator.accumulate(self.model):
            if self.takes_target:
                _, loss = self.model(x, y)
            else:
                loss = F.cross_entropy(self.model(x), y)
            self.driver.observe(loss)
            self.plans.append(self.driver.in_use)
            self.accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()

    def evaluate(self):
        before = {name: t.clone() for name, t in self.driver.model.state_dict().items()}
        self.driver.model.eval()  # a wrapper would send the buffers of rank 0 around
        with torch.no_grad():
            self.driver.model(DATA.tensors[0])
        assert same_state(dict(self.driver.model.state_dict()), before)


def same(a, b):
    one, other = a.driver, b.driver
    assert same_state(dict(one.model.state_dict()), dict(other.model.state_dict()))
    assert same_state(one.optimizer.state_dict()["state"], other.optimizer.state_dict()["state"])
    assert same_state(dict(one.heads.state_dict()), dict(other.heads.state_dict()))
    assert (one.history, one.losses) == (other.history, other.losses)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_fresh_objects_go_on_exactly(name, precision, tmp_path):
    whole = Run(SCHEDULES[name], precision=precision).train(4, tmp_path / "state", save_at=2)
    again = Run(SCHEDULES[name], seed=1, precision=precision)
    again.accelerator.load_state(str(tmp_path / "state"))
    assert again.driver.epoch == 2
    same(whole, again.train(4))
    assert name == "modules" or max(whole.driver.history) > 0


def test_accumulated_micro_batches_run_one_network(tmp_path):
    every = Static(epochs=4, rule=Freeze(), start=0.25, largest=0.9, refresh_every=3)
    whole = Run(every, accumulate=2).train(4, tmp_path / "state", save_at=2)
    pairs = list(zip(whole.plans[::2], whole.plans[1::2], strict=True))
    assert len(pairs) == 12 and all(one is other for one, other in pairs)
    assert len({id(one) for one, _ in pairs[-3:]}) == 2  # a full step in three
    again = Run(every, seed=1, accumulate=2)
    again.accelerator.load_state(str(tmp_path / "state"))
    same(whole, again.train(4))


def test_deltas_of_micro_batches_add_up():
    run, seen = Run(SCHEDULES["hebbian"], accumulate=4), []
    run.model[5].p = 0.0  # the loader's shuffling draws from the generator that dropout draws from
    step = run.step
    run.step = lambda *batch: (seen.append(batch), step(*batch))
    run.train(4)

    mine = net(0)
    mine[5].p = 0.0
    driver = fxlocal.Driver(mine, SCHEDULES["hebbian"], example_inputs=(DATA.tensors[0][:4],))
    driver.optimizer = torch.optim.SGD(mine.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(4):
        driver.start_epoch()
        for i, (x, y) in enumerate(seen[6 * epoch : 6 * epoch + 6]):
            if i in (0, 4):
                network = driver.network()
            with nullcontext() if i in (3, 5) else fxlocal.accumulate(driver):
                loss = F.cross_entropy(network(x), y)
            (loss / 4).backward()  # accelerate's two that remain too
            driver.observe(loss)
            if i in (3, 5):
                driver.optimizer.step()
                driver.optimizer.zero_grad()
        driver.end_epoch()
    assert same_state(mine.state_dict(), dict(run.driver.model.state_dict()))
    assert driver.losses == run.driver.losses and max(driver.history) > 0


# Two processes


def rank_of(folder, resume=""):
    handlers = [accelerate.DistributedDataParallelKwargs(find_unused_parameters=True)]
    run, folder = Run(FREEZE, seed=3, kwargs_handlers=handlers), Path(folder)
    if resume:
        run.accelerator.load_state(str(folder / "state"))
    run.train(4, folder / "state", save_at=None if resume else 2)
    end = {"model": dict(run.driver.model.state_dict()), "losses": run.driver.losses}
    torch.save(end, folder / f"end_{run.accelerator.process_index}.pt")


@pytest.mark.slow
def test_two_ranks_train_one_model_and_go_on_exactly(tmp_path):
    first, second = run_ranks(__file__, tmp_path)
    weights = [name for name in first["model"] if "running" not in name]
    assert all(torch.equal(first["model"][name], second["model"][name]) for name in weights)
    assert first["losses"] == second["losses"]
    assert same_state([first, second], run_ranks(__file__, tmp_path, "resume"))


if __name__ == "__main__":
    rank_of(*sys.argv[1:])

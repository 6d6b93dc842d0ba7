"""What an adapter adds to a step: ``python -m fxlocal.experiments.bench.trainers``.

Each trainer trains the same model by the same schedule, in turns of one step, so that a machine
that grows slower slows them all; beside it, the same trainer is given the network of the schedule
itself, which leaves the adapter out, and a hand-written loop with a `Driver` is the reference. Each
is a thread that waits for its turn.

The numbers are processor time, medians over all rounds with their quartiles: of a step, and of what
the adapter adds to it (with - without), also as a part of the loop's step. Where the quartiles of
that lie around 0 it is too noisy to say whether the adapter adds anything: arithmetic scatters by
more than an adapter takes, so take a small job (``--width 1 --size 8 --batch-size 2``) for that.
"""

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ...compiler.transform import transform
from ...plan import Freeze, LocalPrefix, Plan
from ...runtime.attach import attach
from ...runtime.driver import Driver
from ...schedules import Constant
from ..models.catalogue import build_model
from .spread import find_spread, is_noisy

__all__ = ["main", "time_trainers"]

SCHEDULE = Constant(Plan(local=LocalPrefix(until=0.5, rule=Freeze())))
CLASSES = 10
Hook: TypeAlias = Callable[[], None]


class Labelled(nn.Module):
    """A model that takes its labels and returns its loss, as those of transformers do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return loss and logits."""
        logits = self.model(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Rows(Dataset[dict[str, Tensor]]):
    """The same images again and again."""

    def __init__(self, length: int, size: int) -> None:
        self.length, self.images = length, torch.randn(64, 3, size, size)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.images[index % 64], "labels": torch.tensor(index % CLASSES)}


class Job:
    """What all train: a model of one's own each, so many steps."""

    def __init__(self, steps: int, batch_size: int, size: int, width: int) -> None:
        self.steps, self.batch_size, self.size, self.width = steps, batch_size, size, width
        self.rows = Rows(steps * batch_size, size)

    def model(self) -> nn.Module:
        """Return a new one."""
        options = {"num_classes": CLASSES, "in_channels": 3, "width": self.width, "seed": 0}
        return Labelled(build_model("resnet18", **options))

    def loader(self) -> DataLoader[dict[str, Tensor]]:
        """Return the batches."""
        return DataLoader(self.rows, batch_size=self.batch_size)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the model's."""
        return torch.optim.SGD(model.parameters(), lr=0.01)


def _loop(job: Job, hook: Hook, adapter: bool) -> None:
    model = job.model()
    optimizer = job.optimizer(model)
    driver = Driver(model, SCHEDULE, optimizer)
    driver.start_epoch()
    for batch in job.loader():
        model.train()
        loss = driver.network()(**batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        driver.observe(loss)
        hook()
    driver.end_epoch()


def _accelerate(job: Job, hook: Hook, adapter: bool) -> None:
    from accelerate import Accelerator

    accelerator, model = Accelerator(cpu=True), job.model()
    driver = attach(model, SCHEDULE) if adapter else None
    given = model if adapter else transform(model, SCHEDULE.fixed)
    given, optimizer, loader = accelerator.prepare(given, job.optimizer(model), job.loader())
    if driver:
        driver.optimizer = optimizer
        driver.start_epoch()
    for batch in loader:
        given.train()
        loss = given(**batch)["loss"]
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        hook()


def _transformers(job: Job, hook: Hook, adapter: bool) -> None:
    import transformers

    from ...integrations.transformers import ScheduleCallback

    class Watch(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *given: Any, **others: Any) -> None:
            hook()

    model = job.model()
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            per_device_train_batch_size=job.batch_size,
            **{"num_train_epochs": 1, "optim": "sgd", "max_grad_norm": 0.0, "use_cpu": True},
            **{"save_strategy": "no", "logging_strategy": "no", "report_to": []},
            **{"disable_tqdm": True, "lr_scheduler_type": "constant", "learning_rate": 0.01},
        )
        transformers.Trainer(
            model if adapter else transform(model, SCHEDULE.fixed),
            arguments,
            train_dataset=job.rows,
            callbacks=[Watch(), *([ScheduleCallback(SCHEDULE, report=False)] if adapter else [])],
        ).train()


def _lightning(job: Job, hook: Hook, adapter: bool) -> None:
    import lightning.pytorch as lightning

    from ...integrations.lightning import ScheduleCallback

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            model = job.model()
            self.net = model if adapter else transform(model, SCHEDULE.fixed)

        def training_step(self, batch: dict[str, Tensor], index: int) -> Any:
            return self.net(**batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return job.optimizer(self.net)

    class Watch(lightning.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, *given: Any, **others: Any) -> None:
            hook()

    follow = [ScheduleCallback(SCHEDULE, "net", report=False)] if adapter else []
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    lightning.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[Watch(), *follow], enable_model_summary=False,
        **quiet,
    ).fit(Module(), job.loader())  # fmt: skip


TRAINERS = {"accelerate": _accelerate, "lightning": _lightning, "transformers": _transformers}


class Turns:
    """Lets threads take one step each and notes how long each took; every other round backwards.

    Who comes after another trainer finds the caches cold: that befalls each as often.
    """

    def __init__(self, names: list[str]) -> None:
        self.names, self.at, self.changed = names, 0, threading.Condition()
        self.gone: set[str] = set()
        self.seconds: dict[str, list[float]] = {name: [] for name in names}
        self.begun = 0.0

    @property
    def current(self) -> str:
        """Whose turn it is."""
        round, place = divmod(self.at, len(self.names))
        return self.names[-1 - place if round % 2 else place]

    def wait(self, name: str) -> None:
        """Return when it is the turn of ``name``."""
        with self.changed:
            self.changed.wait_for(lambda: self.current == name)
        self.begun = time.process_time()

    def give(self, name: str) -> None:
        """End the step of ``name``; return when it may take another."""
        self.seconds[name].append(time.process_time() - self.begun)
        self._advance()
        self.wait(name)

    def leave(self, name: str) -> None:
        """End the last turn of ``name``."""
        self.gone.add(name)
        self._advance()

    def _advance(self) -> None:
        with self.changed:
            self.at += 1
            while self.current in self.gone and len(self.gone) < len(self.names):
                self.at += 1
            self.changed.notify_all()


def time_trainers(job: Job, names: list[str]) -> dict[str, Any]:
    """Return the spread of a step, and of what each adapter adds, in percent of the loop's too."""
    runs: dict[str, tuple[Callable[..., None], bool]] = {"loop": (_loop, True)}
    for name in names:
        runs |= {name: (TRAINERS[name], True), f"{name} without": (TRAINERS[name], False)}
    turns = Turns(list(runs))

    def run(name: str) -> None:
        function, adapter = runs[name]
        turns.wait(name)
        try:
            function(job, lambda: turns.give(name), adapter)
        finally:
            turns.leave(name)

    threads = [threading.Thread(target=run, args=(name,)) for name in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    steps = {name: seconds[3:] for name, seconds in turns.seconds.items()}  # the first are slower
    found: dict[str, Any] = {"milliseconds": {}, "adapter_microseconds": {}, "adapter_percent": {}}

    def note(name: str, **measured: list[float]) -> None:
        for key, value in find_spread(**measured).items():
            found.setdefault(key, {})[name] = value

    for name, seconds in steps.items():
        note(name, milliseconds=[1000 * own for own in seconds])
    for name in names:
        pairs = zip(steps[name], steps[f"{name} without"], strict=True)
        added = [1e6 * (mine - other) for mine, other in pairs]
        percent = [own / 10 / found["milliseconds"]["loop"] for own in added]
        note(name, adapter_microseconds=added, adapter_percent=percent)
    added_quartiles = found.get("adapter_microseconds_quartiles", {})
    noisy = [name for name, ends in added_quartiles.items() if is_noisy(ends[0], ends[1], 0)]
    return found | {"too_noisy": noisy}


def main() -> None:
    """Print the numbers as JSON."""
    there = [name for name in TRAINERS if find_spec(name)]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, usual in (("steps", 200), ("batch-size", 8), ("size", 32), ("width", 16)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--trainers", nargs="*", choices=there, default=there)
    given = parser.parse_args()
    job = Job(given.steps, given.batch_size, given.size, given.width)
    print(json.dumps(time_trainers(job, given.trainers), indent=2))


if __name__ == "__main__":
    main()

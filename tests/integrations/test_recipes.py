"""The recipes of docs/integrations.md: a killed run goes on bit-equal, evaluation moves nothing."""

import pickle
import re
import textwrap
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.tiny import same_state
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxlocal
from fxlocal import Freeze, Hebbian, LocalPrefix, Plan
from fxlocal.schedules import Constant, Dynamic, Static

PAGE = Path(__file__).parent.parent.parent / "docs" / "integrations.md"
DATA = TensorDataset(
    torch.randn(24, 3, 6, 6, generator=torch.Generator().manual_seed(1)), torch.arange(24) % 4
)
SCHEDULES = {
    "freeze": Static(epochs=4, rule=Freeze(), norm="eval", start=0.25, largest=0.9),
    "hebbian": Static(epochs=4, rule=Hebbian(0.01), start=0.25, largest=0.9, refresh_every=3),
    "dynamic": Dynamic(epochs=4, rule=Freeze(), alpha=1.0, shift=0.3, largest=0.9),
}
each = pytest.mark.parametrize("name", SCHEDULES)


def recipe(title, **names):
    """Run the code below a heading of the page; return what it defines."""
    section = re.search(rf"^#+ {title}\n(.*?)(?=^#+ |\Z)", PAGE.read_text(), re.M | re.S)[1]
    code = "\n".join(line for line in section.splitlines() if line[:4] in ("    ", ""))
    space = {"fxlocal": fxlocal, "torch": torch, "__name__": __name__, **names}
    exec(textwrap.dedent(code), space)
    return space


class Net(nn.Sequential):
    """A part of each kind, whose weights depend on the seed."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        super().__init__(
            *(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
            *(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Dropout(0.3)),
            *(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            nn.Linear(6, 4),
        )


def same(one, other):
    assert same_state(dict(one.model.state_dict()), dict(other.model.state_dict()))
    assert same_state(one.optimizer.state_dict()["state"], other.optimizer.state_dict()["state"])
    assert (one.history, one.losses) == (other.history, other.losses)
    assert len(one.history) == 4 and max(one.history) > 0


def states(driver):
    """Return the model's and the optimizer's state, to be compared with `same` once detached."""
    return driver.model.state_dict(), driver.history, driver.losses


def same_states(one, other):
    assert same_state(dict(one[0]), dict(other[0])) and one[1:] == other[1:]
    assert len(one[1]) == 4 and max(one[1]) > 0


# accelerate


@each
def test_accelerate(name, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    told = recipe("accelerate")

    def run(seed, resume=False):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=False)
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        loader = DataLoader(DATA, batch_size=4, shuffle=True)
        given = accelerator, Net(seed), SCHEDULES[name], loader, DATA.tensors[0][:4]
        model, driver, loader = told["prepare"](*given)
        if resume:
            accelerator.load_state(tmp_path / "state")
        for epoch in range(driver.epoch, 4):
            if epoch == 2 and not resume:
                accelerator.save_state(tmp_path / "state", safe_serialization=False)
            model.train()
            loss_of = lambda model, x, y: F.cross_entropy(model(x), y)  # noqa: E731
            told["train_epoch"](accelerator, model, driver, loader, loss_of)
        return driver

    same(run(0), run(1, resume=True))


# Ignite


@each
def test_ignite(name, tmp_path):
    pytest.importorskip("ignite")
    from ignite.engine import Engine, Events
    from ignite.handlers import Checkpoint, DiskSaver

    told = recipe("Ignite", Events=Events)

    def run(seed, resume=False):
        model = Net(seed)
        driver = fxlocal.attach(model, SCHEDULES[name])
        driver.optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

        def step(engine, batch):
            model.train()
            loss = F.cross_entropy(model(batch[0]), batch[1])
            loss.backward()
            driver.optimizer.step()
            driver.optimizer.zero_grad()
            return loss

        def evaluate(engine):
            model.eval()
            with torch.no_grad():
                model(DATA.tensors[0])

        trainer = Engine(step)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, evaluate)
        to_save = told["follow"](trainer, driver)
        saver = DiskSaver(str(tmp_path), create_dir=True, require_empty=False)
        keeper = Checkpoint(to_save, saver, n_saved=None)
        if resume:
            found = torch.load(next(tmp_path.glob("*12.pt")))
            Checkpoint.load_objects(to_save, found)
        else:
            trainer.add_event_handler(Events.EPOCH_COMPLETED, keeper)
        trainer.run(DataLoader(DATA, batch_size=4, shuffle=True), max_epochs=4)
        return driver

    same(run(0), run(1, resume=True))


# skorch


@each
def test_skorch(name, tmp_path, monkeypatch):
    pytest.importorskip("skorch")
    from skorch import NeuralNetClassifier
    from skorch.callbacks import Callback
    from skorch.dataset import ValidSplit

    told = recipe("skorch", Callback=Callback)
    monkeypatch.setitem(globals(), "Follow", told["Follow"])  # where pickle looks for it

    def run(seed, path, epochs, resume=False, fits=1):
        follow = told["Follow"](SCHEDULES[name], path, resume)
        net = NeuralNetClassifier(
            Net,
            module__seed=seed,
            criterion=nn.CrossEntropyLoss,
            max_epochs=epochs,
            lr=0.05,
            optimizer__momentum=0.9,
            batch_size=4,
            iterator_train__shuffle=True,
            train_split=ValidSplit(4, stratified=False),
            callbacks=[("follow", follow)],
            verbose=0,
        )
        for _ in range(fits):
            torch.manual_seed(seed)
            net.fit(DATA.tensors[0], DATA.tensors[1])
        return follow.driver, net

    whole, net = run(0, tmp_path / "whole.pt", 4)
    run(0, tmp_path / "broken.pt", 2)
    again, _ = run(1, tmp_path / "broken.pt", 2, resume=True)
    same_states(states(whole), states(again))
    twice, _ = run(0, tmp_path / "whole.pt", 4, fits=2)
    same_states(states(whole), states(twice))
    read = pickle.loads(pickle.dumps(net))
    assert same_state(read.module_.state_dict(), net.module_.state_dict())


# fastai


@each
def test_fastai(name, tmp_path):
    pytest.importorskip("fastai.callback.schedule")  # lr_find
    from fastai.callback.core import Callback
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper

    told = recipe("fastai", Callback=Callback, OptimWrapper=OptimWrapper, partial=partial)

    def run(seed, path, epochs, resume=False, find=False):
        loaders = DataLoader(DATA, batch_size=4, shuffle=True), DataLoader(DATA, batch_size=4)
        follow = told["Follow"](SCHEDULES[name], path, resume)
        learner = Learner(
            DataLoaders(*loaders, device=torch.device("cpu")),
            Net(seed),
            loss_func=F.cross_entropy,
            opt_func=told["opt_func"],
            cbs=[follow],
            path=tmp_path,
        )
        with learner.no_logging():
            if find:
                state = torch.get_rng_state()
                learner.lr_find(num_it=5, show_plot=False, suggest_funcs=())
                torch.set_rng_state(state)
            learner.fit(epochs, lr=0.05)
        return follow.driver

    whole = states(run(0, tmp_path / "whole.pt", 4))
    run(0, tmp_path / "broken.pt", 2)
    same_states(whole, states(run(1, tmp_path / "broken.pt", 2, resume=True)))
    same_states(whole, states(run(0, tmp_path / "found.pt", 4, find=True)))


def test_fastai_fine_tunes_what_it_had_frozen(tmp_path):
    """The head alone learns first, and then what lies behind the boundary."""
    pytest.importorskip("fastai.callback.schedule")  # fine_tune
    from fastai.callback.core import Callback
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper

    told = recipe("fastai", Callback=Callback, OptimWrapper=OptimWrapper, partial=partial)
    moved, model = [], Net()
    schedule = Constant(Plan(local=LocalPrefix("3", Freeze())))

    class Watch(Callback):
        def before_fit(self):
            self.before = [model[i].weight.detach().clone() for i in (0, 3, 6, 10)]

        def after_fit(self):
            pairs = zip((0, 3, 6, 10), self.before, strict=True)
            moved.append([i for i, weight in pairs if not torch.equal(weight, model[i].weight)])

    learner = Learner(
        DataLoaders(DataLoader(DATA, 4), DataLoader(DATA, 4), device=torch.device("cpu")),
        model,
        loss_func=F.cross_entropy,
        opt_func=told["opt_func"],
        splitter=lambda net: [
            [*net[0].parameters(), *net[3].parameters(), *net[6].parameters()],
            [*net[10].parameters()],
        ],
        train_bn=False,
        cbs=[told["Follow"](schedule, tmp_path / "driver.pt"), Watch()],
        path=tmp_path,
    )
    with learner.no_logging():
        learner.fine_tune(1, freeze_epochs=1)
    assert moved == [[10], [3, 6, 10]]


# Composer


def test_composer(tmp_path):
    pytest.importorskip("composer")
    from composer import Callback, Trainer
    from composer.models import ComposerClassifier

    told = recipe("Composer", Callback=Callback)

    def run(seed, epochs, load=None):
        follow, model = told["Follow"](SCHEDULES["freeze"]), Net(seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        trainer = Trainer(
            model=ComposerClassifier(model, num_classes=4),
            train_dataloader=DataLoader(DATA, batch_size=4),
            max_duration=f"{epochs}ep",
            optimizers=optimizer,
            callbacks=[follow],
            device="cpu",
            save_folder=str(tmp_path / f"{seed}"),
            load_path=load and str(load),
            progress_bar=False,
        )
        trainer.fit()
        return follow.driver

    whole = states(run(0, 4))
    checkpoint = next((tmp_path / "0").glob("ep2-*"))
    same_states(whole, states(run(1, 4, checkpoint)))

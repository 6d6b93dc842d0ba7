"""Learning-rate schedules: epoch by epoch by hand, exact resume, what is refused, presets."""

import dataclasses
import io
import math

import pytest
import torch
import typer
from support.tiny import SETTINGS, dropout_net, run
from typer.testing import CliRunner

from fxlocal.experiments.cli.console import one_line_errors
from fxlocal.experiments.cli.options import Preset, expand_groups
from fxlocal.experiments.training.settings import Settings, SettingsError, build_scheduler
from fxlocal.plan import Plan
from fxlocal.schedules import Constant


def rates(settings, broken_off=None):
    """The learning rate of each epoch, and in a checkpoint's file before ``broken_off``."""
    found = []

    def make():
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=settings.lr)
        return optimizer, build_scheduler(optimizer, settings)

    optimizer, scheduler = make()
    for epoch in range(settings.epochs):
        if epoch == broken_off:
            file = io.BytesIO()
            torch.save([optimizer.state_dict(), scheduler.state_dict()], file)
            file.seek(0)
            optimizer, scheduler = make()
            for one, state in zip((optimizer, scheduler), torch.load(file), strict=True):
                one.load_state_dict(state)
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def cosine(at, length):
    return (1 + math.cos(math.pi * at / length)) / 2


BY_HAND = {  # of 9 epochs, of a rate of 1
    "step": [1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01],
    "step(factor=0.5)": [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25],
    "step(factor=0.5,every=2)": [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.0625],
    "cosine": [cosine(epoch, 9) for epoch in range(9)],
    "exponential": [0.01 ** (epoch / 9) for epoch in range(9)],
    "exponential(factor=0.5)": [0.5**epoch for epoch in range(9)],
    "constant": [1] * 9,
    "warmup(epochs=3,start=0.4)+cosine": [0.4, 0.6, 0.8, *(cosine(at, 6) for at in range(6))],
    "warmup(epochs=2) + step(every=3)": [0.1, 0.55, 1, 1, 1, 0.1, 0.1, 0.1, 0.01],
    "warmup+constant": [0.1, 0.28, 0.46, 0.64, 0.82, 1, 1, 1, 1],
}


@pytest.mark.parametrize("text", BY_HAND)
def test_each_epoch_has_the_rate_that_is_computed_by_hand_also_after_a_break(text):
    settings = Settings(epochs=9, lr=1.0, lr_schedule=text)
    for broken_off in (None, 1, 2, 3, 5, 8):
        assert rates(settings, broken_off) == pytest.approx(BY_HAND[text], rel=1e-9), broken_off


REFUSED = {
    "stepp": "unknown learning-rate schedule 'stepp'. Nearest: 'step'",
    "": "unknown learning-rate schedule ''",
    "step(": "a bracket or a quote is not closed",
    "step(gamma=0.1)": "step has no argument 'gamma'",
    "step(factor=2)": "factor=2.0: give a fraction above 0, at most 1",
    "step(factor=0)": "factor=0.0: give a fraction",
    "step(factor=1e999)": "factor=inf: give a fraction",
    "step(factor=nan)": "factor=nan is not a number",
    "step(every=0)": "every=0: give a whole number from 1",
    "step(every=1.5)": "every=1.5 is not a whole number or none",
    "exponential(factor=-1)": "factor=-1.0: give a fraction",
    "cosine(factor=0.1)": "cosine takes none",
    "warmup(epochs=0)+cosine": "epochs=0: give a whole number from 1",
    "warmup(start=0)+cosine": "start=0.0: give a fraction",
    "warmup(epochs=9)+cosine": "of 9 epochs none is left behind a warm-up of 9",
    "warmup": r"give what follows it too, as in warmup\(epochs=5\)\+cosine",
    "cosine+warmup": "give what follows it too",
    "cosine+step": "give one schedule, behind one warm-up at most",
    "warmup+warmup+step": "give one schedule, behind one warm-up at most",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_schedule_is_refused_in_one_line(text):
    with pytest.raises(SettingsError, match=REFUSED[text]) as caught:
        Settings(epochs=9, lr_schedule=text)
    assert str(caught.value).startswith(f"lr_schedule={text!r}: ")
    assert "\n" not in str(caught.value)


def test_a_run_behind_its_warm_up_resumes_exactly(tmp_path):
    class Break(Exception):
        pass

    def stop(record):
        if len(record.loss) == 2:
            raise Break

    schedule = "warmup(epochs=1)+step(every=1)"
    settings = dataclasses.replace(SETTINGS, epochs=3, lr_schedule=schedule)
    path = tmp_path / "checkpoint.pt"
    plain = Constant(Plan())
    whole = run(dropout_net(), plain, settings)
    with pytest.raises(Break):
        run(dropout_net(), plain, settings, checkpoint=path, on_epoch=stop)
    again = run(dropout_net(1), plain, settings, checkpoint=path, resume=True)
    assert (again.loss, again.errors) == (whole.loss, whole.errors)


# --- presets -------------------------------------------------------------------------------------


def told(*arguments):
    """The settings that a command gets."""
    found = []

    @one_line_errors
    @expand_groups
    def command(settings: Settings, preset: Preset = ""):
        found.append(settings)

    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, arguments)
    return found[0] if found else (result.exit_code, result.stderr)


STEPS = "step(factor={},every={})".format
PRESETS = {  # epochs, batch, rate, decay, schedule
    "cifar10": (90, 64, 0.05, 5e-4, STEPS(0.1, 10)),
    "cifar100": (150, 64, 0.025, 5e-4, STEPS(0.5, 20)),
    "imagenet": (90, 64, 0.025, 4e-5, STEPS(0.1, 30)),
    "mobilenetv2": (150, 64, 0.0125, 4e-5, "cosine"),
    "backlink-alexnet": (100, 512, 0.01, 1e-4, "cosine"),
    "backlink-vgg16": (150, 512, 0.01, 1e-4, "cosine"),
    "backlink-resnet32": (200, 512, 0.5, 5e-4, "cosine"),
    "backlink-resnet110": (200, 512, 0.3, 5e-4, "cosine"),
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_papers_setting(name):
    own = told("--preset", name)
    found = own.epochs, own.batch_size, own.lr, own.weight_decay, own.lr_schedule
    assert found == PRESETS[name]


def test_the_tenth_epoch_of_the_papers_cifar10_has_a_tenth_of_the_rate():
    found = rates(told("--preset", "cifar10"))
    assert (found[9], found[10]) == (0.05, pytest.approx(0.005))
    assert found[80] == pytest.approx(0.05 * 0.1**8)
    hundred = rates(told("--preset", "cifar100"))
    assert (hundred[19], hundred[20], hundred[40]) == pytest.approx((0.025, 0.0125, 0.00625))


def test_what_is_given_beside_a_preset_wins():
    own = told("--preset", "cifar10", "--epochs", "3", "--lr-schedule", "cosine", "--lr", "0.1")
    assert (own.epochs, own.lr_schedule, own.lr, own.batch_size) == (3, "cosine", 0.1, 64)
    assert told() == Settings()
    code, line = told("--preset", "cifar")
    assert (code, line.count("\n")) == (2, 1) and "'cifar'. Nearest: 'cifar10'" in line
    code, line = told("--lr-schedule", "step(every=0)")
    assert (code, line.count("\n")) == (2, 1) and "every=0: give a whole number" in line

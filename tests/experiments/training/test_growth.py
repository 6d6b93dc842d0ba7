"""Growing batches: the arithmetic, the prediction against what is measured, and exact resume."""

import dataclasses
import io
import math
import re

import pytest
import torch
from rich.console import Console
from support.tiny import SETTINGS, dropout_net, interrupted, resnet, run, same_state
from torch import nn

import fxlocal
from fxlocal import Freeze, LocalPrefix, Plan
from fxlocal.experiments.data.catalogue import load_data
from fxlocal.experiments.models.catalogue import build_model
from fxlocal.experiments.report.tables import print_growth
from fxlocal.experiments.training.growth import Footprint, Growth, find_footprint, scaled_rates
from fxlocal.experiments.training.results import Results, Run
from fxlocal.experiments.training.settings import Machine, Settings, SettingsError
from fxlocal.schedules import Constant, Static

GROWING = dataclasses.replace(SETTINGS, grow_batch=True, batch_size=8)
FREEZE = Static(4, largest=0.8, start=0.25, rule=Freeze())
SGD = Constant(Plan())
THREE = Footprint(per_image=(100.0, 40.0, 10.0), constant=(8, 4, 2), gradients=(60, 50, 20))


@dataclasses.dataclass(frozen=True)
class Table:
    """A boundary for each epoch; every n-th step of an epoch back-propagates through all."""

    boundaries: tuple[int, ...]
    full_every: int = 10**6

    def plan(self, analysis, epoch, step=0, rank=0):
        boundary = self.boundaries[min(epoch, len(self.boundaries) - 1)]
        full = boundary == 0 or (step + 1) % self.full_every == 0
        return Plan() if full else Plan(local=LocalPrefix(boundary, Freeze()))


# Arithmetic


def test_prediction_adds_what_each_image_and_what_the_network_takes():
    growth = Growth(THREE, 4, 100, held=1000)
    assert growth.predict(0, 4) == 1000 + 60 + 8 + 4 * 100
    assert growth.predict(2, 12) == 1000 + 20 + 2 + 12 * 10


def test_prediction_learns_from_the_last_measurement():
    growth = Growth(THREE, 4, 100, held=1000)
    growth.end_epoch(0, measured=1700, held=1200)
    assert growth.budget == 1700
    assert growth.predict(0, 4) == 1700
    unseen = (1700 - 1200 - 60 - 8 - 400) / 4
    assert growth.predict(1, 8) == 1200 + 50 + 4 + 8 * (40 + unseen)


def test_batch_is_the_largest_that_fits_in_steps_of_an_eighth():
    growth = Growth(THREE, 16, 1000)
    assert growth.start_epoch(0) == 16
    growth.end_epoch(0, 16 * 100 + 60 + 8)
    for boundary, batch_size in ((0, 16), (1, 40), (2, 164)):
        assert growth.start_epoch(boundary) == batch_size
        assert growth.predict(boundary, batch_size) <= growth.budget
        assert growth.predict(boundary, batch_size + 2) > growth.budget
        growth.end_epoch(boundary, growth.predict(boundary, batch_size))


def test_first_epoch_has_the_first_batch_whatever_the_budget():
    growth = Growth(THREE, 4, 1000, budget=100_000)
    assert growth.start_epoch(2) == 4
    growth.end_epoch(2, growth.predict(2, 4))
    assert growth.start_epoch(2) == 1000  # capped by the images


def test_an_epoch_over_the_budget_makes_the_batch_smaller_again():
    growth = Growth(THREE, 4, 1000, budget=500)
    growth.end_epoch(0, 468)
    assert growth.start_epoch(2) == 47
    growth.end_epoch(2, 600)
    assert growth.start_epoch(2) == 38
    growth.end_epoch(2, 400)  # and stays, though there is room: no network is compiled twice
    assert growth.start_epoch(2) == 38


@pytest.mark.parametrize(("num_images", "batch_size"), [(100, 50), (97, 48), (60, 30), (9, 9)])
def test_no_more_than_a_tenth_of_the_images_is_left_out(num_images, batch_size):
    growth = Growth(THREE, 4, num_images, budget=530)
    growth.end_epoch(2, growth.predict(2, 4))
    assert growth.start_epoch(2) == batch_size


def test_without_growing_the_batch_stays():
    growth = Growth(THREE, 4, 1000, grows=False)
    growth.end_epoch(0, 468)
    assert growth.start_epoch(2) == 4


def test_learning_rate_follows_the_batch_and_comes_back():
    growth = Growth(THREE, 4, 1000)
    growth.batch_size = 16
    assert [growth.rate_factor(rule) for rule in ("none", "linear", "sqrt")] == [1, 4, 2]
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    with scaled_rates(optimizer, 3.0):
        assert optimizer.param_groups[0]["lr"] == 3.0 * 0.1
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_footprint_tells_constant_from_growing():
    model = resnet()
    one, two = (fxlocal.analyze(model, torch.zeros(n, 3, 8, 8)) for n in (4, 8))
    footprint = find_footprint(one, two, 4, gradients=True)
    assert footprint.gradients[0] == 4 * sum(p.numel() for p in model.parameters())
    assert footprint.constant[0] > 0  # the statistics of the batch norms
    seven = fxlocal.analyze(model, torch.zeros(28, 3, 8, 8))
    for k in range(len(one.layers)):
        predicted = footprint.constant[k] + 28 * footprint.per_image[k]
        assert predicted == seven.saved_bytes(k)


# Prediction against measurement


@pytest.mark.sample(3)
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "size", "width"), [("resnet14", 16, 4), ("unet", 16, 4), ("vgg13", 32, 8)]
)
def test_prediction_is_within_15_percent_of_what_is_measured(name, size, width, amp):
    model = build_model(name, num_classes=10, in_channels=3, width=width, seed=0)
    edges = fxlocal.analyze(model).boundaries
    boundaries = (0, *(edges[int(f * len(edges))] for f in (0.25, 0.5, 0.75)))
    data = load_data("fake", num_train=48, num_test=2, size=size)
    settings = Settings(epochs=4, batch_size=4, grow_batch=True, lr=1e-3, evaluate_every=4)
    record = run(model, Table(boundaries), settings, Machine(amp=amp), data)
    assert record.batch_size == sorted(record.batch_size) and record.batch_size[-1] > 4
    assert record.boundary == list(boundaries)
    for predicted, measured in zip(record.predicted_bytes, record.saved_bytes, strict=True):
        assert predicted == pytest.approx(measured, rel=0.15)
    assert max(record.saved_bytes) <= record.saved_bytes[0] * 1.15


def test_prediction_counts_the_steps_that_go_through_everything():
    record = run(resnet(), Table((0, 6, 6, 6), full_every=4), GROWING)
    assert record.batch_size == [8, 8, 8, 8]
    assert record.boundary == [0, 6, 6, 6]
    assert set(record.saved_bytes) == {record.saved_bytes[0]}
    assert record.predicted_bytes[1:] == record.saved_bytes[1:]


def test_runs_that_do_not_grow_say_what_they_take_too():
    record = run(resnet(), FREEZE)
    assert record.batch_size == [16] * 4 and record.images == 4 * 64
    assert record.predicted_bytes == pytest.approx(record.saved_bytes, rel=0.15)


# What is shown


def text_of_growth(batches, **top):
    run = Run("freeze", 0, 1.0, 1.0, 0.0, [9, 10], [0, 3], [1.0, 0.5], batch_size=batches)
    run = dataclasses.replace(run, predicted_bytes=[9, 11], images=100)
    results = Results("d", "m", 2, Machine(), runs=[run]).to_json() | top
    console = Console(width=80, file=io.StringIO())
    with console.capture() as captured, pytest.MonkeyPatch.context() as patch:
        patch.setattr("fxlocal.experiments.report.tables.Console", lambda: console)
        print_growth(results)
    return captured.get()


def test_a_table_is_printed_only_where_a_batch_grew(capsys):
    assert re.search(r"8 -> 16 .* 10.0%$", text_of_growth([8, 16]), re.MULTILINE)
    assert not text_of_growth([8, 8])
    assert capsys.readouterr().out.startswith("no batch grew: ")


def test_compiled_on_a_cpu_the_prediction_is_not_compared_with_itself():
    assert re.search(r"8 -> 16 .* - +-$", text_of_growth([8, 16], compile=True), re.MULTILINE)


# Runs


def test_sgd_frees_nothing_and_so_never_grows():
    fixed = dataclasses.replace(GROWING, grow_batch=False)
    a, b = dropout_net(), dropout_net()
    assert run(a, SGD, GROWING).loss == run(b, SGD, fixed).loss
    assert same_state(a.state_dict(), b.state_dict())


def test_a_large_budget_grows_sgd_too():
    record = run(dropout_net(), SGD, dataclasses.replace(SETTINGS, memory_budget=1000.0))
    assert record.batch_size == [16, 64, 64, 64]
    assert record.images == 4 * 64


def rates_in(settings):
    """Return the learning rate and the batch of each epoch's steps, as the optimizer used them."""
    rates, model = [], dropout_net()
    original = torch.optim.SGD.step

    def spy(optimizer, *args, **kwargs):
        rates.append(optimizer.param_groups[0]["lr"])
        return original(optimizer, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", spy)
        record = run(model, FREEZE, settings)
    firsts, steps = [], 0
    for batch_size in record.batch_size:
        firsts.append(rates[steps])
        steps += 64 // batch_size
    assert steps == len(rates)
    return firsts, record.batch_size


@pytest.mark.sample(3)
@pytest.mark.parametrize("lr_schedule", ["step", "cosine"])
@pytest.mark.parametrize("rule", ["none", "linear", "sqrt"])
def test_the_rate_is_the_schedulers_times_the_factor(rule, lr_schedule):
    settings = dataclasses.replace(GROWING, grow_lr=rule, lr_schedule=lr_schedule)
    plain, _ = rates_in(dataclasses.replace(settings, grow_batch=False, grow_lr="linear"))
    rates, batches = rates_in(settings)
    assert batches[-1] > batches[0] == 8
    factor = {"none": lambda ratio: 1, "linear": lambda ratio: ratio, "sqrt": math.sqrt}[rule]
    assert rates == [r * factor(b / 8) for r, b in zip(plain, batches, strict=True)]


@pytest.mark.parametrize("settings", [GROWING, dataclasses.replace(GROWING, memory_budget=0.2)])
def test_resume_in_the_middle_of_growing_is_exact(tmp_path, settings):
    settings = dataclasses.replace(settings, lr_schedule="cosine")
    straight = tmp_path / "straight.pt"
    record = run(dropout_net(), FREEZE, settings, checkpoint=straight)
    assert record.batch_size[1] < record.batch_size[-1] and record.batch_size[2] > 8
    for epochs in (1, 2, 3):
        path = tmp_path / f"{epochs}.pt"
        interrupted(path, epochs, dropout_net(), FREEZE, settings=settings)
        run(dropout_net(5), FREEZE, settings, checkpoint=path, resume=True)
        a, b = (torch.load(p)["state"] for p in (straight, path))
        for state in (a, b):  # the clock's
            for key in ("train_seconds", "compile_seconds", "seconds"):
                state["run"].pop(key), state["numbers"].pop(key, None)
        assert same_state(a, b)


# Bad input


def test_budget_below_the_first_batch_is_refused_before_any_weight_moves(tmp_path):
    model = dropout_net()
    before = [p.detach().clone() for p in model.parameters()]
    settings = dataclasses.replace(SETTINGS, memory_budget=0.05)
    with pytest.raises(
        SettingsError, match=r"memory_budget=0.05: .* of 16 images, takes 0\.\d MiB"
    ):
        run(model, SGD, settings, checkpoint=tmp_path / "c.pt")
    assert all(map(torch.equal, before, model.parameters()))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("budget", [0.0, -1.0, float("nan"), float("inf")])
def test_budget_out_of_range_is_refused(budget):
    with pytest.raises(SettingsError, match=re.escape(f"memory_budget={budget}")):
        Settings(memory_budget=budget)


# With the compiler, on a GPU


@pytest.mark.slow
@pytest.mark.usefixtures("without_inductor")
def test_each_batch_size_counts_as_compile_time():
    seen = []
    record = run(
        resnet(),
        Table((0, 6, 6)),
        dataclasses.replace(GROWING, epochs=3),
        Machine(compile=True),
        on_epoch=lambda record: seen.append(record.compile_seconds),
    )
    assert record.batch_size[0] < record.batch_size[1] == record.batch_size[2]
    assert seen[0] > 0 and seen[1] > seen[0] and seen[2] - seen[1] < 0.1
    assert record.predicted_bytes == record.saved_bytes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_prediction_is_within_15_percent_of_the_peak_on_a_gpu():
    model = build_model("resnet18", num_classes=10, in_channels=3, seed=0)
    data = load_data("fake", num_train=1024, num_test=2, size=64)
    settings = Settings(epochs=5, batch_size=64, grow_batch=True, lr=1e-3)
    record = run(model, Table((0, 0, 7, 12, 12)), settings, Machine("cuda"), data)
    assert record.batch_size[-1] > 64
    assert record.predicted_bytes[1:] == pytest.approx(record.saved_bytes[1:], rel=0.15)

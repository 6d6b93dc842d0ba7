"""Steps of any schedule: all measured, the model undisturbed, the ratios of the times right."""

import json

import pytest
import torch
from support.tiny import dropout_net, resnet

import fxlocal
from fxlocal import Checkpoint, Hebbian, LocalPrefix, Plan, PlanError, schedules
from fxlocal.experiments.bench import steps, turns, variants
from fxlocal.experiments.bench.steps import Entry, bench_steps, prefixes
from fxlocal.experiments.bench.turns import place_job
from fxlocal.experiments.bench.variants import Summed
from fxlocal.experiments.models.catalogue import build_model
from fxlocal.experiments.training.parts.stepper import Stepper
from fxlocal.experiments.training.settings import Machine, SettingsError

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(4)
TABLES = ("schedule-1", "schedule-2", "schedule-3")
METHODS = ("zero", "random", "topk")
LINEAR = fxlocal.LinearHead()


def make_job(model=None, machine=None):
    return place_job("tiny", model or resnet(), X, Y, machine or Machine())


def of_prefixes(*boundaries, job=None, **options):
    job = job or make_job()
    return bench_steps(job, prefixes(job, boundaries), **{"repeats": 1, **options})


def approximations(methods, tables, k=1, force=False):
    kinds = {"zero": fxlocal.Zero(), "random": fxlocal.Random()}
    kinds["topk"] = fxlocal.TopK(k, force=force)
    return [
        Entry(f"{name} {table}", schedules.Approximation.named(table, kinds[name]))
        for table in tables
        for name in methods
    ]


def of_approximations(methods=("zero",), tables=TABLES, job=None, k=1, force=False, **options):
    entries = approximations(methods, tables, k, force)
    return bench_steps(job or make_job(), entries, **{"repeats": 1, **options})


def checkpointed(count):
    return schedules.Constant(Plan(checkpoint=Checkpoint(count, "blocks")))


def local_modules(count, link=0, head=LINEAR):
    modules = fxlocal.LocalModules(count, link, head=head, num_classes=10, balance="blocks")
    return schedules.Constant(Plan(modules=modules))


def module_entries(*cells):
    """Every way to train with numbers of modules and lengths of links."""
    entries = []
    for count, link in cells:
        if not link:
            entries += [
                Entry(f"checkpoint, K={count}", checkpointed(count)),
                Entry(f"summed, K={count}", local_modules(count), summed=True),
                Entry(f"infopro, K={count}", local_modules(count, head=fxlocal.InfoProHead())),
            ]
        name = f"backlink, l={link}" if link else "greedy"
        entries.append(Entry(f"{name}, K={count}", local_modules(count, link)))
    return entries


def of_modules(*cells, job=None, **options):
    return bench_steps(job or make_job(), module_entries(*cells), **{"repeats": 1, **options})


@pytest.fixture
def fake_seconds(monkeypatch):
    """Make each step of a variant take the seconds given, times 1, 2 and 16 in the three rounds."""
    now, seconds = [0.0], {}
    real_update = variants.Variant._update

    def update(variant, loss):
        real_update(variant, loss)
        now[0] += seconds.get(variant.name, 8.0) * (1, 2, 16, 1)[len(variant.seconds)]

    for module in (turns, variants):
        monkeypatch.setattr(module, "clock", lambda device: now[0])
    monkeypatch.setattr(variants.Variant, "_update", update)
    return seconds


@pytest.fixture
def watched():
    """A model that must stay as it is, and a list for what is heard of its turns."""
    model = resnet()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    yield model, []
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.fixture(scope="module")
def modules_results():
    torch.set_num_threads(1)
    return of_modules((2, 0), (2, 1), (2, 2), (4, 0), (4, 1))


# Prefixes


def test_every_prefix_is_measured_and_the_model_stays(watched):
    model, heard = watched
    results = of_prefixes(0.5, "layer3", 6, job=make_job(model), repeats=2, on_turn=heard.append)
    rows = results["rows"]
    assert [(row["strategy"], row["path"]) for row in rows] == [
        ("sgd", "conv1"),
        ("local", "layer2.0.conv1"),
        ("freeze", "layer2.0.conv1"),
        ("local", "layer3.0.conv1"),
        ("freeze", "layer3.0.conv1"),
    ]  # "layer3" and 6 are one boundary
    assert rows[0]["speedup"] == rows[0]["time_ratio"] == rows[0]["memory_ratio"] == 1
    assert all(row["milliseconds"] > 0 and row["first_turn_seconds"] > 0 for row in rows)
    assert rows[0]["saved_bytes"] > rows[1]["saved_bytes"] == rows[2]["saved_bytes"]
    assert rows[2]["saved_bytes"] > rows[3]["saved_bytes"] == rows[4]["saved_bytes"]
    assert len(heard) == 5 + 2 * 5
    assert json.loads(json.dumps(results)) == results


def test_a_schedule_is_measured_as_it_stands_in_an_epoch():
    refreshed = schedules.Static(epochs=4, rule=fxlocal.Freeze(), refresh_every=2)
    entry = Entry("refresh", refreshed)
    sgd, before = bench_steps(make_job(), [entry], repeats=1)["rows"]
    assert before["boundary"] == 0 and before["saved_bytes"] == sgd["saved_bytes"]
    results = bench_steps(make_job(), [Entry("sgd", refreshed), entry], epoch=3, repeats=1)
    assert results["steps"] == 2
    sgd, last = results["rows"]
    assert last["boundary"] > 0
    assert last["saved_bytes"] == sgd["saved_bytes"]  # of the step that takes most
    columns = [(row["strategy"], row["steps"]) for row in results["columns"]]
    assert columns == [("refresh", [0]), ("refresh", [1])]


# Approximations


def test_percentages_are_medians_of_each_rounds_ratios(fake_seconds):
    fake_seconds |= {
        "sgd": 4.0,
        "zero schedule-1": 3.0,
        "zero schedule-2": 3.75,
        "zero schedule-2, column 0": 2.0,  # and sgd's: 3 in the mean
        "zero schedule-3": 4.375,
        "zero schedule-3, column 0": 2.0,  # and three times sgd's: 3.5
    }
    results = of_approximations(repeats=3)
    rows = results["rows"]
    assert [row["milliseconds"] for row in rows] == [8000, 6000, 7500, 8750]
    assert [row["time_ratio"] for row in rows] == [1, 0.75, 0.9375, 1.09375]
    assert [row["speedup"] for row in rows][1] == pytest.approx(4 / 3)
    assert [row["switching_percent"] for row in rows] == [None, None, 25, 25]
    assert rows[1]["first_turn_seconds"] == 12  # four steps of three seconds
    columns = [(c["strategy"], c["steps"], c["time_ratio"]) for c in results["columns"]]
    assert columns == [
        ("zero schedule-2", [0], 0.5),
        ("zero schedule-2", [1], 1),
        ("zero schedule-3", [0], 0.5),
        ("zero schedule-3", [1, 2, 3], 1),
    ]


@pytest.mark.slow
def test_every_method_and_table_is_measured_and_the_model_stays(watched):
    model, heard = watched
    options = {"job": make_job(model), "repeats": 1, "force": True, "on_turn": heard.append}
    results = of_approximations(METHODS, ("schedule-2", "cnn2"), **options)
    rows = results["rows"]
    names = [f"{method} {table}" for table in ("schedule-2", "cnn2") for method in METHODS]
    assert [row["strategy"] for row in rows] == ["sgd", *names]
    assert results["steps"] == 2
    assert all(row["milliseconds"] > 0 and row["saved_bytes"] > 0 for row in rows)
    assert all(row["exact_layers"] == [] for row in rows)
    assert [row["num_layers"] for row in rows] == [0, 4, 4, 4, 1, 1, 1]
    assert len(heard) == len(set(heard)) * (1 + 1) == (1 + 6 + 6) * 2
    assert json.loads(json.dumps(results)) == results


def test_what_the_cost_model_leaves_exact_is_named(no_warnings):
    (_, topk) = of_approximations(["topk"], ["schedule-2"])["rows"]  # maps too small to gain
    assert len(topk["exact_layers"]) == topk["num_layers"] == 4
    assert "layer1.0.conv1" in topk["exact_layers"]


def test_a_table_keeps_what_its_greediest_step_keeps():
    class Pools(torch.nn.Sequential):
        """Only the convolution keeps its input: no ReLU has it too."""

        def __init__(self):
            conv, pool = torch.nn.Conv2d, torch.nn.AvgPool2d(2)
            super().__init__(conv(3, 8, 3), pool, conv(8, 4, 3), torch.nn.Flatten())

    results = of_approximations(tables=["schedule-1", "schedule-2"], job=make_job(Pools()))
    sgd, every, second = results["rows"]
    assert every["saved_bytes"] < sgd["saved_bytes"] == second["saved_bytes"]


# Local modules


def test_every_method_of_local_modules_is_measured(modules_results):
    rows = modules_results["rows"]
    rivals = ("checkpoint", "summed", "infopro", "greedy")
    assert [(row["method"], row["modules"], row["link"]) for row in rows] == [
        (None, None, None),
        *((method, 2, 0) for method in rivals),
        *(("backlink", 2, link) for link in (1, 2)),
        *((method, 4, 0) for method in rivals),
        ("backlink", 4, 1),
    ]
    assert rows[1]["strategy"] == "checkpoint, K=2" and rows[5]["strategy"] == "backlink, l=1, K=2"
    assert [row["split"] for row in rows][:2] == [None, [2, 2]]
    assert [row["head"] for row in rows][1:5] == [None, "linear", "conv", "linear"]
    assert all(row["milliseconds"] > 0 and row["saved_bytes"] > 0 for row in rows)
    assert json.loads(json.dumps(modules_results)) == modules_results


def test_memory_is_saved_by_all_but_sums_of_losses(modules_results):
    rows = modules_results["rows"]
    kept = {(r["method"], r["modules"], r["link"]): r["memory_ratio"] for r in rows}
    for count in (2, 4):
        assert kept["greedy", count, 0] < 0.75 < 1 < kept["summed", count, 0]
        assert kept["checkpoint", count, 0] < 0.75
        assert kept["greedy", count, 0] <= kept["backlink", count, 1] < 1
    assert kept["greedy", 4, 0] < kept["greedy", 2, 0]


def test_local_modules_are_measured_once_each_and_the_model_stays(watched):
    model, heard = watched
    of_modules((2, 0), job=make_job(model), on_turn=heard.append)
    assert len(heard) == 5 * 2
    names = ("checkpoint", "summed", "infopro", "greedy")
    assert set(heard) == {"eager sgd", *(f"eager {name}, K=2" for name in names)}


def test_times_of_local_modules_are_medians_of_each_rounds_ratios(fake_seconds):
    fake_seconds |= {"sgd": 4.0, "greedy, K=2": 3.0, "checkpoint, K=2": 5.0}
    rows = {row["method"]: row for row in of_modules((2, 0), repeats=3)["rows"]}
    assert [rows[name]["time_ratio"] for name in (None, "greedy", "checkpoint")] == [1, 0.75, 1.25]
    assert rows["greedy"]["milliseconds"] == 6000


def test_summed_losses_have_the_gradients_of_immediate_backwards():
    gradients, losses = [], []
    for kind in (Stepper, Summed):
        torch.manual_seed(0)
        driver = fxlocal.Driver(resnet().double(), local_modules(3), example_inputs=(X.double(),))
        driver.start_epoch()
        losses.append(kind(driver, Machine()).take(X.double(), Y))
        gradients.append([p.grad for p in driver.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert losses[1] > 2 * losses[0]  # three of them


# What is refused, before anything is measured


NO_CUDA = "cudagraph needs a CUDA device, not 'cpu'"
FAR = Entry("far", schedules.Constant(Plan(local=LocalPrefix(99, Hebbian()))))


def fail(name):
    pytest.fail("measured")


@pytest.mark.parametrize(
    ("measure", "error", "message"),
    [
        (lambda: of_prefixes("layer9", on_turn=fail), PlanError, r"layer9.*layer3"),
        (lambda: of_prefixes(0.5, repeats=0, on_turn=fail), SettingsError, "repeats=0"),
        (lambda: Machine(cudagraph=True), SettingsError, NO_CUDA),
        (lambda: of_approximations(["topk"], k=0, on_turn=fail), PlanError, "k=0"),
        (lambda: of_approximations(["topk"], k=65, on_turn=fail), PlanError, "make k smaller"),
        (lambda: of_modules((2, 0), (4, 3), on_turn=fail), PlanError, "longer than a module"),
        (lambda: of_modules((2, 0), (9, 0), on_turn=fail), PlanError, "the model has 4 blocks"),
        (lambda: bench_steps(make_job(), [FAR], on_turn=fail), PlanError, "past the last layer"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(measure, error, message):
    with pytest.raises(error, match=message):
        measure()


# Compiled


@pytest.mark.slow
@pytest.mark.usefixtures("without_inductor")
def test_compiled_variants_stand_beside_the_eager_ones():
    job = make_job(dropout_net(), Machine(compile=True))
    prefix = prefixes(job, [0.5])
    entries = [*prefix, *approximations(["zero"], ["schedule-2"])]
    entries += module_entries((2, 0))[-1:]
    rows = bench_steps(job, entries, repeats=1)["rows"]
    compiled = [row for row in rows if row["mode"] == "compiled"]
    names = ["sgd", "local", "freeze", "zero schedule-2", "greedy, K=2"]
    assert [row["strategy"] for row in compiled] == names
    assert rows[0]["speedup"] == compiled[0]["speedup"] == 1
    assert compiled[0]["first_turn_seconds"] > rows[0]["first_turn_seconds"]
    assert compiled[0]["saved_bytes"] > compiled[1]["saved_bytes"] > 0
    assert all(row["saved_bytes"] is None for row in compiled[3:])  # of these nothing is predicted


@pytest.mark.slow
def test_sixteen_modules_of_a_deep_network_keep_a_fifth():
    model = build_model("resnet110", num_classes=10, in_channels=3, width=16, seed=0)
    x, y = torch.randn(8, 3, 32, 32), torch.zeros(8, dtype=torch.int64)
    job = place_job("resnet110", model, x, y, Machine())
    rows = bench_steps(job, module_entries((16, 0), (16, 1)), repeats=1)["rows"]
    kept = {(row["method"], row["link"]): row["memory_ratio"] for row in rows}
    assert kept["greedy", 0] <= 0.21 and kept["backlink", 1] <= 0.24 and kept["summed", 0] > 1


def test_what_runs_more_than_a_forward_is_no_cuda_graph():
    for schedule in (schedules.Constant(), checkpointed(2), local_modules(2)):
        contestant = steps._Contestant(Entry("it", schedule), make_job(), 0)
        assert contestant.runs("eager") and contestant.runs("compiled")
        assert contestant.runs("cudagraph") == (schedule == schedules.Constant())

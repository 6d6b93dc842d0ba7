"""What `bench_processes` measures and refuses."""

import json

import pytest
import torch

from fxlocal import LocalModules, Plan, PlanError
from fxlocal.experiments.bench import processes
from fxlocal.experiments.bench.processes import bench_processes
from fxlocal.experiments.bench.steps import Entry
from fxlocal.experiments.bench.turns import build_job
from fxlocal.experiments.report.bench_tables import processes_table
from fxlocal.experiments.training.settings import Machine, SettingsError
from fxlocal.schedules import Constant


def measured(*modules, threads=2, machine=None, **options):
    """Measure pairs of a number of modules and a link."""
    before = torch.get_num_threads()
    plans = [Plan(modules=LocalModules(count, link, num_classes=10)) for count, link in modules]
    entries = [Entry(f"backlink {i}", Constant(plan)) for i, plan in enumerate(plans)]
    try:
        machine = machine or Machine(threads=threads)
        size = {"input_size": "3x8x8", "batch": 4, "classes": 10}
        job = build_job("resnet8", machine, width=2, **size)
        return bench_processes(job, options.pop("entries", entries), **options)
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow  # starts processes
def test_both_sides_take_turns():
    results = measured((2, 0), (2, 1), steps=2, repeats=2)
    assert json.loads(json.dumps(results)) == results
    assert [(row["modules"], row["link"]) for row in results["rows"]] == [(2, 0), (2, 1)]
    for row in results["rows"]:
        assert row["threads"] == 2
        times = [row[f"{side}_milliseconds"] for side in ("sgd", "single", "parallel")]
        assert min(times) > 0
        assert 0.1 < row["speedup"] / (times[1] / times[2]) < 10
    assert processes_table(results).row_count == 2


@pytest.mark.parametrize(
    ("modules", "options", "message"),
    [
        ([(2, 0), (9, 0)], {"threads": 9}, "the model has 4 blocks"),
        ([(2, 0), (2, 4)], {}, "longer than a module"),
        ([(2, 0), (4, 0)], {}, "threads=2: 4 modules take one each"),
        ([(1, 0)], {}, "modules=1: runs in one process"),
        ([(2, 0)], {"repeats": 0}, "repeats=0: must be at least 1"),
        ([(2, 0)], {"steps": 0}, "steps=0: must be at least 1"),
        ([(2, 0)], {"machine": Machine(compile=True)}, "leave out --compile"),
        ([], {"entries": [Entry("topk", Constant(Plan()))]}, "topk has no local modules"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(
    modules, options, message, monkeypatch
):
    monkeypatch.setattr(processes, "_bench", lambda *_: pytest.fail("measured"))
    with pytest.raises((PlanError, SettingsError), match=message):
        measured(*modules, **options)

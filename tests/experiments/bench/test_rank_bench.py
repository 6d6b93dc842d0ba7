"""What `bench_ranks` measures and refuses."""

import json
import subprocess
import sys

import pytest

from fxlocal import Freeze, Hebbian, LocalPrefix, Plan, PlanError
from fxlocal.experiments.bench import ranks
from fxlocal.experiments.bench.ranks import bench_ranks
from fxlocal.experiments.bench.steps import Entry
from fxlocal.experiments.bench.turns import build_job
from fxlocal.experiments.report.bench_tables import ranks_table
from fxlocal.experiments.training.settings import Machine, SettingsError
from fxlocal.schedules import Constant

NET = ("resnet8", "--width", "4", "--input-size", "8", "--batch", "2", "--nproc", "2")


def measured(machine=None, nproc=2, until=2, **options):
    size = {"input_size": "3x8x8", "batch": 4, "classes": 10}
    job = build_job("resnet8", machine or Machine(threads=1), width=4, **size)
    entries = [
        Entry(name, Constant(Plan(local=LocalPrefix(until, rule, norm="eval"))))
        for name, rule in (("freeze", Freeze()), ("local", Hebbian()))
    ]
    return bench_ranks(job, entries, nproc, **options), job


@pytest.mark.slow  # starts processes
def test_ranks_take_turns_with_one_process():
    results, job = measured(steps=1, repeats=2)
    assert json.loads(json.dumps(results)) == results
    sgd, freeze, local = results["rows"]
    assert [row["strategy"] for row in results["rows"]] == ["sgd", "freeze", "local"]
    named = [(p.nbytes, p.dim()) for p in job.model.parameters()]
    prefix = sum(size for size, _ in named[:6])
    deltas = sum(size for size, dim in named[:6] if dim > 1)
    gradients = sum(size for size, _ in named)
    assert gradients - prefix <= freeze["wire_bytes"] <= gradients - prefix + 4 * len(named) + 8
    assert local["wire_bytes"] == freeze["wire_bytes"] + deltas
    assert sgd["wire_bytes"] >= gradients
    for row in results["rows"]:
        assert row["kept"] == row["gain"] / row["gain_alone"] > 0
        speed = 2 * 4 / row["images_per_second"]
        assert row["milliseconds"] == pytest.approx(1000 * speed)
    assert (sgd["gain"], sgd["gain_alone"]) == (1, 1)
    assert ranks_table(results).row_count == 3


def in_own_network(*command):
    whole = ["unshare", "--map-root-user", "--net", *command]
    try:
        return subprocess.run(whole, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return subprocess.CompletedProcess(whole, 1)


@pytest.mark.slow
def test_the_wire_is_slowed_in_a_network_of_its_own(tmp_path):
    tbf = "tc", "qdisc", "replace", "dev", "lo", "root", "tbf", "rate", "1mbit", "burst", "9k"
    if in_own_network(*tbf, "limit", "9k").returncode:
        pytest.skip("no networks of their own here, or no tc")
    command = sys.executable, "-m", "fxlocal", "bench", *NET, "--repeats", "1", "--boundaries", "2"
    out, plots = tmp_path / "found.json", tmp_path / "plots"
    done = in_own_network(*command, "--wires", "1", "--out", out, "--plots", plots)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["wire_megabits"] for row in rows] == [None, 1] * 3
    for row in rows[1::2]:
        shared = 2 * 8 * row["wire_bytes"] / 1e6  # megabits that two ranks send in a step
        burst = 8 * 0.512 / 2  # that went unslowed, in one of a turn's two steps
        assert row["milliseconds"] > 1000 * (shared - burst)
    assert (plots / "gain_over_wire.png").exists()


def test_gains_are_ratios_of_what_took_turns():
    seconds = {
        (0, 1, 0.0): [2.0, 4.0, 3.0], (1, 1, 0.0): [1.0, 2.0, 2.0],  # 2, 2 and 1.5 times as fast
        (0, 4, 9.0): [9.0, 8.0, 7.0], (1, 4, 9.0): [3.0, 2.0, 1.0],  # 3, 4 and 7 times
    }  # fmt: skip
    assert ranks._row(seconds, (1, 4, 9.0), 5) == {
        "alone_milliseconds": 2000,
        "alone_milliseconds_quartiles": [1500, 2000],
        "milliseconds": 2000,
        "milliseconds_quartiles": [1500, 2500],
        "images_per_second": 10,
        "gain_alone": 2,
        "gain_alone_quartiles": [1.75, 2],
        "gain": 4,
        "gain_quartiles": [3.5, 5.5],
        "kept": 2,
        "time_ratio_alone": 1 / 2,
        "time_ratio_alone_quartiles": [1 / 2, pytest.approx(7 / 12)],
        "time_ratio": 1 / 4,
        "time_ratio_quartiles": pytest.approx([(1 / 7 + 1 / 4) / 2, (1 / 4 + 1 / 3) / 2]),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"until": 99}, "99"),
        ({"repeats": 0}, "repeats=0: must be at least 1"),
        ({"steps": 0}, "steps=0: must be at least 1"),
        ({"machine": Machine(compile=True)}, "leave out --compile"),
        ({"wires": (5.0,)}, "give the command a network of its own: unshare"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(options, message, monkeypatch):
    monkeypatch.setattr(ranks, "launch", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(ranks.socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    with pytest.raises((PlanError, SettingsError), match=message):
        measured(**options)

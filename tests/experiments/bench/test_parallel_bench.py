"""What `fxlocal bench-parallel` measures and refuses."""

import json

import pytest
import torch
from typer.testing import CliRunner

from fxlocal.experiments.bench import processes as parallel_bench
from fxlocal.experiments.cli.app import app

SMALL = ["resnet8", "--width", "2", "--input-size", "3x8x8", "--batch", "4", "--threads", "2"]


def run(*options):
    threads = torch.get_num_threads()
    try:
        return CliRunner().invoke(app, ["bench-parallel", *SMALL, *options])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow  # starts processes
def test_both_sides_take_turns_and_are_written(tmp_path):
    out = tmp_path / "parallel.json"
    done = run("--steps", "2", "--repeats", "2", "--links", "0,1", "--out", str(out))
    assert done.exit_code == 0, done.output
    assert "speed-up" in done.output
    results = json.loads(out.read_text())
    assert [(row["modules"], row["link"]) for row in results["rows"]] == [(2, 0), (2, 1)]
    for row in results["rows"]:
        assert row["threads"] == 2
        times = [row[f"{side}_milliseconds"] for side in ("sgd", "single", "parallel")]
        assert min(times) > 0
        assert 0.1 < row["speedup"] / (times[1] / times[2]) < 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threads", "9", "--modules", "2,9"], "the model has 4 blocks"),
        (["--modules", "2", "--links", "0,4"], "longer than a module"),
        (["--modules", "two"], "give integers"),
        (["--modules", "2,4"], "threads=2: 4 modules take one each"),
        (["--modules", "1"], "modules=1: runs in one process"),
        (["--repeats", "0"], "repeats=0: must be at least 1"),
        (["--steps", "0"], "steps=0: must be at least 1"),
        (["--out", "/proc/fxlocal/x.json"], "cannot write into /proc/fxlocal"),
        (["--out", "/proc"], "/proc is a folder"),
        (["--compile"], "leave out --compile"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(options, message, monkeypatch):
    monkeypatch.setattr(parallel_bench, "bench_parallel", lambda *_, **__: pytest.fail("measured"))
    done = run(*options)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())

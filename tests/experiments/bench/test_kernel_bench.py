"""Weight gradients alone: all sides measured, and what is made of the times is right."""

import json

import pytest
import torch

from fxlocal.experiments.bench import kernels as kernel_bench
from fxlocal.experiments.bench.kernels import bench_kernels, default_shapes
from fxlocal.experiments.report.bench_tables import kernels_table
from fxlocal.experiments.training.settings import Machine, SettingsError
from fxlocal.facts import TopKTime
from fxlocal.ops import topk

SHAPES = ((4, 8, 6), (8, 4, 4))
SIDES = {"dense", "topk", "select", "accumulate"}
LAYOUTS = {"contiguous", "channels_last"}


def test_every_side_is_measured_in_both_layouts():
    heard = []
    options = {"dtypes": ("float32", "bfloat16"), "batch": 2, "repeats": 2}
    results = bench_kernels(Machine(), shapes=SHAPES, on_row=heard.append, **options)
    rows = results["rows"]
    found = [(row["dtype"], row["channels_in"], row["size"]) for row in rows]
    assert found == [(d, *one) for d in ("float32", "bfloat16") for one in ((4, 6), (8, 4))]
    for row in rows:
        assert set(row["milliseconds"]) == SIDES
        for by_layout in row["milliseconds"].values():
            assert set(by_layout) == LAYOUTS and min(by_layout.values()) > 0
        assert row["speedup"] > 0 and row["speedup_contiguous"] > 0
        assert row["paper"] is row["bar"] is None  # of other shapes and another batch
    assert len(heard) == 4
    assert results["threads"] == 1 and {"torch", "fxlocal"} <= set(results["versions"])
    assert json.loads(json.dumps(results)) == results


@pytest.fixture
def fake_seconds(monkeypatch):
    """Make each call take the seconds given for its function and layout, later rounds more."""
    seconds, turns = {}, {}
    names = {
        torch.ops.aten.convolution_backward: "dense",
        topk.conv_topk: "topk",
        topk.select: "select",
        topk.accumulate: "accumulate",
    }

    def fake(call, device):
        call()
        side = names[call.func], "contiguous" if call.args[0].is_contiguous() else "channels_last"
        turns[side] = turns.get(side, 0) + 1
        return seconds[side] * (1, 2, 16)[turns[side] - 1]

    monkeypatch.setattr(kernel_bench, "time_call", fake)
    return seconds


@pytest.mark.parametrize(
    ("predicted", "chosen", "speedup_chosen"),
    [(TopKTime(2, 1), "topk", 1.5), (TopKTime(1, 2), "exact", 1), (TopKTime(1, 1), "exact", 1)],
)
def test_speed_ups_are_medians_against_the_better_dense_layout(
    fake_seconds, monkeypatch, predicted, chosen, speedup_chosen
):
    fake_seconds |= {
        **{("dense", "contiguous"): 9.0, ("dense", "channels_last"): 6.0},
        **{("topk", "contiguous"): 8.0, ("topk", "channels_last"): 4.0},
        **{("select", layout): 1.0 for layout in LAYOUTS},
        **{("accumulate", layout): 3.0 for layout in LAYOUTS},
    }
    monkeypatch.setattr(kernel_bench, "predict_topk_time", lambda layer, shapes, k: predicted)
    (row,) = bench_kernels(Machine(), shapes=SHAPES[:1], batch=2, repeats=3)["rows"]
    assert row["milliseconds"]["dense"] == {"contiguous": 18000, "channels_last": 12000}
    assert row["milliseconds"]["accumulate"]["channels_last"] == 6000
    assert row["dense_layout"] == "channels_last"
    assert (row["speedup"], row["speedup_contiguous"]) == (1.5, 0.75)
    assert (row["chosen"], row["speedup_chosen"]) == (chosen, speedup_chosen)
    assert row["predicted"]["contiguous"] == {"exact": predicted.exact, "topk": predicted.topk}


def test_the_paper_and_the_bars_stand_beside_their_own_case_alone():
    shape = [(16, 16, 32)]
    results = bench_kernels(Machine(), shapes=shape, dtypes=("float32", "bfloat16"), repeats=1)
    single, half = results["rows"]
    assert (single["paper"], single["bar"]) == (4.2, 3.5)
    assert (half["paper"], half["bar"]) == (4.2, None)
    (other,) = bench_kernels(Machine(), shapes=shape, k=2, repeats=1)["rows"]
    assert other["paper"] is other["bar"] is None
    table = kernels_table(results, "float32")
    first, *_, paper, bar = (next(iter(column.cells)) for column in table.columns)
    assert (first, paper, bar) == ("16,16,32", "4.2x", "3.5x")
    headings = {str(column.header) for column in table.columns}
    assert {"dense", "stages", "speed-up", "predicted", "chosen"} <= headings


def test_a_gpu_has_larger_shapes_too():
    assert len(default_shapes("cpu")) == 8
    larger = {(64, 64, 56), (128, 128, 28), (256, 256, 14), (512, 512, 7)}
    assert set(default_shapes("cuda")) - set(default_shapes("cpu")) == larger


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtypes": ["float23"]}, "unknown dtype 'float23'. Nearest: 'float32'"),
        ({"repeats": 0}, "repeats=0"),
        ({"batch": 0}, "batch=0"),
        ({"k": 0}, "k=0: must be at least 1 and less than 16"),
        ({"k": 16}, "smallest map, 4x4"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(options, message):
    with pytest.raises(SettingsError, match=message):
        bench_kernels(Machine(), shapes=SHAPES, on_row=pytest.fail, **options)

"""Step times and memory: every variant measured, none disturbing the model."""

import json

import pytest
import torch
from support.tiny import resnet

from fxlocal import PlanError
from fxlocal.experiments.bench.turns import bench
from fxlocal.experiments.training.settings import Machine, SettingsError

X, Y = torch.ones(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64)


def test_every_variant_is_measured_and_the_model_stays():
    model = resnet()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    heard = []
    results = bench(
        "tiny", model, X, Y, [0.5, "layer3", 6], Machine(), repeats=2, on_step=heard.append
    )
    rows = results["rows"]
    assert [(row["strategy"], row["path"]) for row in rows] == [
        ("sgd", "conv1"),
        ("local", "layer2.0.conv1"),
        ("freeze", "layer2.0.conv1"),
        ("local", "layer3.0.conv1"),
        ("freeze", "layer3.0.conv1"),
    ]  # "layer3" and 6 are one boundary
    assert rows[0]["speedup"] == 1
    assert all(row["milliseconds"] > 0 and row["first_call_seconds"] > 0 for row in rows)
    assert rows[0]["saved_bytes"] > rows[1]["saved_bytes"] == rows[2]["saved_bytes"]
    assert rows[2]["saved_bytes"] > rows[3]["saved_bytes"] == rows[4]["saved_bytes"]
    assert len(heard) == 5 + 2 * 5
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert json.loads(json.dumps(results)) == results


def test_bad_input_is_refused_before_anything_is_measured():
    def fail(name):
        pytest.fail("measured")

    with pytest.raises(PlanError, match=r"layer9.*layer3"):
        bench("tiny", resnet(), X, Y, ["layer9"], Machine(), on_step=fail)
    with pytest.raises(SettingsError, match="repeats=0"):
        bench("tiny", resnet(), X, Y, [0.5], Machine(), repeats=0, on_step=fail)
    with pytest.raises(SettingsError, match="cudagraph needs a CUDA device, not 'cpu'"):
        Machine(cudagraph=True)


@pytest.mark.slow
def test_compiled_variants_stand_beside_the_eager_ones():
    rows = bench("tiny", resnet(), X, Y, [0.5], Machine(compile=True), repeats=1)["rows"]
    assert [row["mode"] for row in rows] == ["eager"] * 3 + ["compiled"] * 3
    assert rows[0]["speedup"] == rows[3]["speedup"] == 1
    assert rows[3]["first_call_seconds"] > rows[0]["first_call_seconds"]
    assert rows[3]["saved_bytes"] > rows[4]["saved_bytes"] > 0

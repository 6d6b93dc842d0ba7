"""What ``fxlocal show`` says of a model's costs, and of plans that change over a run."""

import re
import xml.etree.ElementTree as ET

import pytest
import torch
from support.shell import fails, succeeds

import fxlocal
from fxlocal.experiments.cli.show import _plan_of
from fxlocal.experiments.models.catalogue import build_model
from fxlocal.experiments.training.specs import parse_spec
from fxlocal.experiments.training.strategies import STRATEGIES
from fxlocal.schedules import LearningSchedule

MOVES = "boundary at layer 0 from epoch 1, 1 from epoch"
DEPENDS = "so in a run whose loss falls and whose weights settle at once: it depends on that"
# Of a net of 10 layers with edges at 1, 3, 6 and 9, in 12 epochs; by hand.
LINES = {
    "sgd": "the same plan in all 12 epochs; shown: epoch 12",
    # floor(6 - (E - 12)^2 / 6), snapped down to an edge
    "freeze(start=0.5)": f"{MOVES} 7, 3 from epoch 8, 6 from epoch 12; shown: epoch 12",
    "local-dynamic": f"{MOVES} 2, 3 from epoch 3, 6 from epoch 4; {DEPENDS}; shown: epoch 12",
    "zero(approximate=schedule-3,plateau=2)": f"the same plan in all 12 epochs; {DEPENDS}; other "
    "steps have other plans, which repeat after 4; shown: epoch 12, step 1",
    "freeze(start=0.5)+random": f"{MOVES} 7, 3 from epoch 8, 6 from epoch 12; weight gradients "
    "approximated: 2 from epoch 1, 1 from epoch 8, 0 from epoch 12; shown: epoch 12",
    "prune-train(every=3)": "the same plan in all 12 epochs; channels are cut every 3 epochs, none "
    "here yet; shown: epoch 12",
}


@pytest.fixture(scope="module")
def net():
    return build_model("resnet8", num_classes=10, width=4, seed=0)


@pytest.fixture(scope="module")
def facts(net):
    return fxlocal.analyze(net, torch.zeros(2, 3, 16, 16))


@pytest.mark.parametrize("spec", LINES)
def test_a_line_says_how_plans_change_and_which_is_shown(spec, facts):
    assert _plan_of(parse_spec(spec).schedule(12), facts, 12, 12)[1] == LINES[spec]


@pytest.mark.filterwarnings("ignore::fxlocal.NoEffectWarning")
@pytest.mark.parametrize("name", STRATEGIES)
def test_the_plan_of_every_strategy_and_epoch_is_the_runs(name, net, facts):
    for epoch in (1, 9):
        schedule = parse_spec(name).schedule(12)
        plan, _ = _plan_of(schedule, facts, 12, epoch)
        ran = parse_spec(name).schedule(12)
        for _ in range(epoch - 1 if isinstance(ran, LearningSchedule) else 0):
            ran.end_epoch(facts, 0.0, 0.0)
        assert plan == ran.plan(facts, epoch - 1)
    net.train()
    assert fxlocal.transform(net, plan, torch.zeros(2, 3, 16, 16)).history.plan == plan


def test_counts_are_of_an_image_and_of_the_batch(facts):
    text = succeeds("show", "resnet8", "--batch", "4", "--input-size", "16", "--classes", "7")
    assert text.startswith("resnet8, images of 3x16x16, 7 classes, batches of 4\n")
    image, batch = text.splitlines()[-2:]
    assert image.endswith(", of one image") and batch.endswith(", of a batch of 4 images")
    one, four = (float(re.search(r"([\d.]+) MFLOPs forward", x)[1]) for x in (image, batch))
    # A layer's: 2 * weights * pixels; 3 stages of 16, 8 and 4 pixels each way.
    pixels = [(16 * 27 + 2 * 16 * 144) * 256, (32 * 144 + 32 * 288 + 32 * 16) * 64]
    pixels += [(64 * 288 + 64 * 576 + 64 * 32) * 16, 64 * 7]
    assert one == pytest.approx(2 * sum(pixels) / 1e6, abs=0.05)
    assert four == pytest.approx(8 * sum(pixels) / 1e6, abs=0.05)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--epoch 3", "--epoch, --epochs: are of a strategy; give --strategy"),
        ("--strategy sgd --epoch 13", "--epoch 13: the run has 12; give more --epochs"),
        ("--strategy sgdd", "unknown strategy 'sgdd'. Nearest: 'sgd'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_shown(words, said):
    assert said in fails("show", "resnet8", *words.split())


def test_show_prints_the_analysis_and_what_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = succeeds("show", "resnet8", "--until", "layer3", "--draw", "new/blocks.svg")
    assert "10 layers, " in text
    assert "insert_local_updates" in text and "detach" in text
    assert ET.parse(tmp_path / "new/blocks.svg").getroot().tag.endswith("svg")


def test_show_alone_prints_the_analysis_only():
    text = succeeds("show", "resnet8", "--input-size", "1x16x16")
    assert "10 layers, " in text and "detach" not in text


def test_show_of_a_strategy_says_what_its_last_epoch_is_like():
    text = succeeds("show", "resnet8", "--strategy", "freeze-eval(largest=0.5)+topk(force=true)")
    assert "detach" in text and "insert_local_updates" not in text
    assert "freeze-eval(largest=0.5), of freeze-eval(curve=quadratic,largest=0.6," in text
    assert "topk" in text


def test_show_knows_torchvision_and_factories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "layer" in succeeds("show", "torchvision:squeezenet1_1")
    (tmp_path / "mynets.py").write_text(
        "from torch import nn\n"
        "def linear(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.Linear(5, num_classes))\n"
    )
    assert "2 layers" in succeeds("show", "mynets:linear", "--input-size", "4", "--until", "1")

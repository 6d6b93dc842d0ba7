"""Labels of pixels: the Dice loss and score, forms of output, batches, and a run end to end."""

import dataclasses
import json
import math
from collections import namedtuple
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support.shell import TINY, succeeds
from torch import Generator, Tensor

from fxlocal.experiments.data.catalogue import Data, DataError, load_data
from fxlocal.experiments.data.images import InMemory, batches, crop_and_flip, turn_and_flip
from fxlocal.experiments.models.catalogue import build_model
from fxlocal.experiments.report.charts import draw_charts
from fxlocal.experiments.report.page import render_page
from fxlocal.experiments.report.tables import comparison_table
from fxlocal.experiments.training.compare import compare
from fxlocal.experiments.training.objective import count_wrong, loss_of
from fxlocal.experiments.training.settings import Experiment, Settings
from fxlocal.experiments.training.specs import parse_spec


def dice_by_hand(found: list[float], true: list[int], extra: int = 0) -> float:
    """2 sum(p g) / (sum(p^2) + sum(g^2)), pixel by pixel."""
    both, squares = 0.0, float(extra)
    for p, g in zip(found, true, strict=True):
        both += p * g
        squares += p * p + g * g
    return (2 * both + extra) / squares


def example(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = Generator().manual_seed(seed)
    logits = torch.randn(3, 2, 4, 5, generator=generator, dtype=torch.float64)
    return logits, torch.randint(2, (3, 4, 5), generator=generator)


# Dice


def test_the_loss_is_dice_by_hand():
    logits, target = example()
    found = [1 / (1 + math.exp(b - f)) for b, f in logits.movedim(1, -1).reshape(-1, 2).tolist()]
    expected = 1 - dice_by_hand(found, target.flatten().tolist(), extra=1)
    assert loss_of({"out": logits}, target, "segmentation").item() == pytest.approx(expected)


def test_the_score_is_dice_by_hand_over_all_batches():
    counts, found, true = torch.zeros(2, dtype=torch.int64), [], []
    for seed in (0, 1):
        logits, target = example(seed)
        counts += count_wrong(logits, target, "segmentation")
        found += [int(f > b) for b, f in logits.movedim(1, -1).reshape(-1, 2).tolist()]
        true += target.flatten().tolist()
    wrong, total = counts.tolist()
    assert 1 - wrong / total == pytest.approx(dice_by_hand(found, true))


def test_the_gradient_is_that_of_the_loss():
    logits, target = example()
    assert torch.autograd.gradcheck(
        lambda logits: loss_of(logits, target, "segmentation"), logits.requires_grad_()
    )


@pytest.mark.parametrize("label", [0, 1])
def test_perfect_and_opposite_predictions(label):
    target = torch.full((2, 16, 16), label)
    right = torch.stack([20.0 * (1 - target), 20.0 * target], 1)
    assert loss_of(right, target, "segmentation") < 1e-6
    assert loss_of(-right, target, "segmentation") > 0.99
    assert count_wrong(right, target, "segmentation").tolist() == [0, 2 * 512 * label]
    assert count_wrong(-right, target, "segmentation").tolist() == [512, 512]


def test_the_loss_is_computed_in_float32():
    logits, target = torch.randn(4, 2, 128, 128), torch.randint(2, (4, 128, 128))
    for dtype in (torch.float16, torch.bfloat16):
        low = logits.to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(low, target, "segmentation")
        assert loss.dtype == torch.float32
        assert torch.equal(loss, loss_of(low.float(), target, "segmentation"))


@pytest.mark.parametrize("shape", [(3, 2), (3, 2, 2, 2)])
def test_a_model_that_does_not_score_each_pixel_is_refused(shape):
    with pytest.raises(DataError, match=r"label each pixel, \(3, 4, 5\), .* such as unet"):
        loss_of(torch.zeros(shape), example()[1], "segmentation")


# Batches


def numbered(num: int = 12, side: int = 6) -> InMemory:
    """Images with a number of its own in each pixel, which is its label too."""
    labels = torch.arange(num * side * side).view(num, side, side)
    return InMemory(labels[:, None].repeat(1, 2, 1, 1).float(), labels)


@pytest.mark.parametrize("augment", [None, turn_and_flip])
def test_labels_stay_with_their_pixels(augment):
    drawn = batches(numbered(), 5, generator=Generator().manual_seed(1), augment=augment)
    seen = []
    for images, labels in drawn:
        assert labels.dtype == torch.int64 and images.is_contiguous()
        assert torch.equal(images, labels[:, None].expand_as(images).float())
        seen += labels.flatten().tolist()
    assert sorted(seen) == list(range(12 * 36))


def test_labels_of_images_are_left_alone_by_augmentation():
    labels = torch.arange(4)
    data = InMemory(torch.rand(4, 1, 6, 6), labels)
    for augment in (turn_and_flip, lambda x, g: crop_and_flip(x, g, padding=1)):
        _, drawn = next(batches(data, 4, generator=Generator().manual_seed(1), augment=augment))
        assert sorted(drawn.tolist()) == [0, 1, 2, 3]


def test_all_eight_symmetries_are_about_equally_likely():
    image = torch.rand(3, 5, 5)
    possible = [
        image.rot90(turns, (1, 2)).flip(2 if mirror else ())
        for turns in range(4)
        for mirror in (False, True)
    ]
    batch = image.expand(400, -1, -1, -1)
    out = turn_and_flip(batch, Generator().manual_seed(1))
    counts = [(out == option).flatten(1).all(1).sum().item() for option in possible]
    assert sum(counts) == 400 and min(counts) > 25 and max(counts) < 80
    assert torch.equal(out, turn_and_flip(batch, Generator().manual_seed(1)))


# Runs

SGD = {"sgd": parse_spec("sgd")}


def tiny_data() -> Data:
    return load_data("membranes", num_train=32, num_test=16, size=32, strength=0.0)


def build(name, seed):
    return build_model(name, num_classes=2, in_channels=1, width=4, seed=seed)


@pytest.fixture(scope="module")
def results():
    torch.set_num_threads(1)
    settings = Settings(epochs=5, batch_size=8, lr_schedule="constant", lr=0.1)
    experiment = Experiment(tiny_data(), partial(build, "unet"), settings=settings)
    names = SGD | {"freeze": parse_spec("freeze(start=0.5)")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fxlocal.experiments.training.compare._warm_up", lambda *given: None)
        return compare(experiment, names, (0,)).to_json()


def test_a_run_learns_and_its_error_is_one_minus_dice(results):
    assert results["metric"] == "1 - Dice"
    cells = tiny_data().test.labels.float().mean().item()
    all_cell = 100 * (1 - 2 * cells / (1 + cells))
    for run in results["runs"]:
        assert run["error_percent"] < 0.8 * all_cell
        assert run["loss"][-1] < run["loss"][0]
    assert results["runs"][1]["boundary"][-1] > 0


def test_table_page_and_plots_name_the_metric(results):
    assert comparison_table(results, 19).columns[1].header == "1 - Dice %"
    page = render_page(results)
    assert page.count(">test 1 - Dice <small>%") == 2 and "test error" not in page
    labels = {chart.title: chart.figure.yaxis.axis_label for chart in draw_charts(results)}
    assert labels["Error"] == labels["Error against time"] == "test 1 - Dice (%)"


def test_the_error_of_a_run_is_that_of_the_whole_test_set(results):
    data = tiny_data()
    model = build_model("unet", num_classes=2, in_channels=1, width=4, seed=0).eval()
    errors = []
    for size in (3, 16):  # however it is batched
        counts = torch.zeros(2, dtype=torch.int64)
        for x, y in batches(data.test, size):
            counts += count_wrong(model(x), y, data.task)
        errors.append(counts.tolist())
    assert errors[0] == errors[1]


def test_a_classifier_cannot_learn_pixels():
    data = dataclasses.replace(tiny_data(), augment=None)
    with pytest.raises(DataError, match="take a model that scores each pixel"):
        settings = Settings(epochs=1, batch_size=8)
        compare(Experiment(data, partial(build, "resnet8"), settings=settings), SGD, (0,))


def test_loss_reads_every_form_of_output():
    logits, y = torch.randn(4, 10), torch.randint(10, (4,))
    expected = F.cross_entropy(logits, y)
    named = namedtuple("Outputs", ["logits", "aux_logits"])(logits, None)
    for output in (logits, {"out": logits, "aux": None}, named):
        assert torch.equal(loss_of(output, y), expected)


def test_segmentation_counts_pixels():
    logits_BCHW = torch.zeros(2, 3, 4, 4)
    logits_BCHW[:, 1] = 1.0
    wrong, total = count_wrong({"out": logits_BCHW}, torch.tensor([1, 2]))
    assert (int(wrong), total) == (16, 32)
    loss = loss_of(logits_BCHW, torch.ones(2, 4, 4, dtype=torch.int64))
    assert torch.equal(loss, loss_of(logits_BCHW, torch.ones(2, dtype=torch.int64)))


@pytest.mark.slow
@pytest.mark.usefixtures("unrendered")
def test_unet_learns_each_pixel_its_images_label(tmp_path):
    options = ("--size", "16", "--model", "unet", "--width", "2", "--seeds", "0", "--epochs", "1")
    succeeds("compare", *TINY, *options, "--strategies", "sgd,freeze", "--out", tmp_path / "o")
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    assert all(0 <= run["error_percent"] <= 100 for run in results["runs"])

"""Principal components: the numbers against numpy, what is caught of a network, what is refused."""

import json
import re

import numpy as np
import pytest
import torch
from support.shell import TINY, fails, succeeds
from support.tiny import fake_data, resnet
from torch import nn

from fxlocal import analyze
from fxlocal.experiments.data.catalogue import Data
from fxlocal.experiments.data.images import InMemory
from fxlocal.experiments.report.pca import (
    Projection,
    collect_activations,
    find_distance,
    find_last_local,
    find_separation,
    project,
)
from fxlocal.experiments.report.pca_plots import plot_projections
from fxlocal.experiments.training.settings import Machine, SettingsError

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


def clouds(num_classes=4, each=15, num_features=6):
    """Points around one centre per class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(num_classes).repeat(each)
    centres = torch.randn(num_classes, num_features, generator=generator)
    noise = torch.randn(len(labels), num_features, generator=generator)
    return centres[labels] + 0.5 * noise, labels


def caught(model, path, data=None, **options):
    data = data or fake_data()
    options = {"batch_size": 8, "num_images": 100, **options}
    features, labels = collect_activations(model, [path], data, Machine(), **options)
    return features[path], labels


# The numbers


def test_components_are_those_of_the_covariance():
    features, labels = clouds()
    projection = project(features, labels)
    x = features.double().numpy()
    values, vectors = np.linalg.eigh(np.cov(x, rowvar=False))
    for i in range(2):
        vector = vectors[:, -1 - i]
        vector = vector * np.sign(vector[np.abs(vector).argmax()])
        assert projection.scores_N2[:, i].numpy() == pytest.approx((x - x.mean(0)) @ vector)
        assert projection.explained[i] == pytest.approx(values[-1 - i] / values.sum())


def test_more_features_than_images():
    features, labels = clouds(each=5, num_features=50)
    projection = project(features, labels)
    values = np.linalg.eigvalsh(np.cov(features.double().numpy(), rowvar=False))
    assert projection.explained == pytest.approx(tuple(values[:-3:-1] / values.sum()))


def test_a_sign_does_not_depend_on_the_order_of_the_images():
    features, labels = clouds()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    scores, shuffled = (project(f, labels).scores_N2 for f in (features, features[order]))
    torch.testing.assert_close(scores[order], shuffled)


def test_separation_is_the_share_of_the_variance_between_classes():
    features, labels = clouds()
    labels = labels + 3 * (labels > 1)  # classes 0, 1, 5, 6: some may be missing
    x, y = features.numpy().astype(float), labels.numpy()
    between = sum((y == c).sum() * ((x[y == c].mean(0) - x.mean(0)) ** 2).sum() for c in set(y))
    expected = between / ((x - x.mean(0)) ** 2).sum()
    assert find_separation(features.double(), labels) == pytest.approx(expected)
    projection = project(features, labels)
    assert projection.separation == pytest.approx(expected)
    assert projection.separation_plane == find_separation(projection.scores_N2, labels)


def test_separation_of_points_and_of_one_class():
    points = torch.tensor([[0.0, 1], [2, 0], [0, 1], [2, 0]])
    assert find_separation(points, torch.tensor([0, 1, 0, 1])) == pytest.approx(1)
    assert find_separation(points, torch.tensor([0, 0, 0, 0])) == 0
    assert find_separation(points, torch.tensor([0, 0, 1, 1])) == 0


def test_distance_is_the_mean_over_pairs_of_classes():
    points = torch.tensor([[0.0, 1], [0, -1], [3, 4], [3, 4], [3, 0]])
    labels = torch.tensor([2, 2, 0, 0, 5])  # means (0, 0), (3, 4) and (3, 0)
    assert find_distance(points, labels) == pytest.approx((5 + 3 + 4) / 3)
    projection = project(*clouds())
    assert projection.distance == find_distance(projection.scores_N2, projection.labels_N)


@pytest.mark.parametrize(
    "features",
    [torch.ones(5, 3), torch.arange(5.0)[:, None], torch.arange(5.0)[:, None].expand(5, 3)],
    ids=["constant", "one feature", "one direction"],
)
def test_what_spans_no_plane_is_refused(features):
    with pytest.raises(SettingsError, match=r"do not span a plane; .* layer with --pca, or"):
        project(features, torch.zeros(5, dtype=torch.int64))


# What is caught


def test_activations_are_those_of_the_layer_over_the_test_set():
    model, data = resnet(), fake_data()
    model.train()
    features, labels = caught(model, "layer1", data)
    model.eval()
    with torch.no_grad():
        x = data.test.images
        for name, module in model.named_children():
            x = module(x)
            if name == "layer1":
                break
    torch.testing.assert_close(features, x.mean((2, 3)))
    assert torch.equal(labels, data.test.labels)
    torch.testing.assert_close(caught(model, "layer1", data, flatten=True)[0], x.flatten(1))


def test_an_activation_function_that_works_in_place_changes_nothing():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10), nn.ReLU(inplace=True))
    assert caught(model, "1")[0].min() < 0
    assert caught(model, "2")[0].min() == 0


def test_images_are_spread_over_a_sorted_test_set():
    data = fake_data()
    ordered = InMemory(data.test.images, torch.arange(20) // 2)
    data = Data("sorted", data.train, ordered, 10, data.shape)
    assert caught(resnet(), "fc", data, num_images=10)[1].tolist() == list(range(10))


@pytest.mark.parametrize("path", ["layer9", ""])
def test_a_layer_that_is_not_there_is_refused(path):
    with pytest.raises(SettingsError, match=f"no layer '{path}' in the model. Nearest: "):
        caught(resnet(), path)


def test_a_layer_that_runs_twice_is_refused():
    shared = nn.ReLU()
    with pytest.raises(SettingsError, match="layer '0' must run once"):
        caught(nn.Sequential(shared, nn.Flatten(), shared), "0")


def test_the_default_is_the_last_whole_block_before_the_boundary():
    analysis = analyze(resnet())  # stem 0; layer1.0 1-2; layer2.0 3-5; layer3.0 6-8; fc 9
    assert find_last_local(analysis, 6) == "layer2.0"
    assert find_last_local(analysis, 5) == "layer1.0"
    assert find_last_local(analysis, 1) == "conv1"
    with pytest.raises(SettingsError, match="no layer learned locally"):
        find_last_local(analysis, 0)


# What is shown


@pytest.mark.parametrize(
    ("num_classes", "legend"),
    [
        (2, ["class 0", "class 1"]),
        (10, [f"class {i}" for i in range(10)]),
        (12, [*(f"class {i}" for i in range(8)), "the other 4 of 12 classes"]),
    ],
)
def test_every_point_is_drawn_and_classes_look_different(num_classes, legend):
    projection = project(*clouds(num_classes))
    figure = plot_projections({"sgd": projection, "local": projection}, "title")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == legend
    for axes, name in zip(figure.axes, ("sgd", "local"), strict=True):
        assert axes.get_title(loc="left") == name
        assert sum(len(line.get_xdata()) for line in axes.get_lines()) == 15 * num_classes
        looks = {(line.get_color(), line.get_marker()) for line in axes.get_lines()}
        assert len(looks) == 1 + min(num_classes, 10) - 2 * (num_classes > 10)
        assert re.fullmatch(r"first component \(\d+ % of the variance\)", axes.get_xlabel())


def test_a_panel_says_how_far_apart_the_classes_are():
    projection = Projection(torch.eye(2), torch.tensor([0, 1]), (0.5, 0.25), 0.4, 0.3)
    (axes,) = plot_projections({"sgd": projection}, "title").axes
    assert axes.get_ylabel() == "second component (25 % of the variance)"
    assert axes.texts[0].get_text() == "between classes: 40 % (30 % in all features)"


# The command


PCA = ("--strategies", "sgd,local-static(start=0)", "--seeds", "3,4")


@pytest.mark.slow
def test_compare_projects_a_layer_of_the_first_seeds_networks(tmp_path):
    text = succeeds("compare", *TINY, *PCA, "--pca", "last-local", "--out", "o")
    assert re.search(r"^sgd +\d+\.\d\d( +\d+\.\d){4}$", text, re.MULTILINE), text
    results = json.loads((tmp_path / "o" / "pca.json").read_text())
    assert (results["layer"], results["num_images"], results["num_features"]) == ("layer2.0", 20, 8)
    names = ["sgd", "local-static(start=0)"]
    assert [row["strategy"] for row in results["components"]] == names
    errors = {run["strategy"]: run["error_percent"] for run in results["runs"] if run["seed"] == 3}
    for row in results["components"]:
        first, second = row["explained"]
        assert 1 > first >= second > 0 and 0 <= row["separation"] <= 1
        assert row["error_percent"] == errors[row["strategy"]]
    layers = [layer.path for layer in analyze(resnet()).layers]
    assert [list(results["over_layers"][name]) for name in names] == [layers, layers]
    assert results["over_layers"]["sgd"]["fc"]["distance"] > 0
    for name in ("pca.png", "pca_layers.png"):
        assert (tmp_path / "o" / name).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "o" / "report.html").exists()


@pytest.mark.usefixtures("unrendered")
def test_each_position_may_be_a_feature(tmp_path):
    options = ("--strategies", "sgd,local-dynamic", "--seeds", "0", "--out", "o")
    succeeds("compare", *TINY, *options, "--pca", "layer1", "--pca-space", "flatten")
    results = json.loads((tmp_path / "o" / "pca.json").read_text())
    assert (results["num_images"], results["num_features"]) == (20, 4 * 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--pca", "layer9"), "no layer 'layer9'"),
        (("--strategies", "sgd,sgd", "--pca", "fc"), "sgd comes twice"),
        (("--strategies", "sgd,frozen", "--pca", "fc"), "'frozen'.*'freeze'"),
        (("--strategies", "sgd", "--pca", "last-local"), "choose one with --pca"),
        (("--data", "membranes", "--model", "unet", "--pca", "up"), "no class per image"),
    ],
    ids=" ".join,
)
def test_bad_input_is_refused_before_anything_is_trained(arguments, message, tmp_path):
    tiny = TINY[:-6] if "membranes" in arguments else TINY
    size = ("--size", "16") if "membranes" in arguments else ()
    assert re.search(message, fails("compare", *tiny, *arguments, *size))
    assert not list(tmp_path.iterdir())

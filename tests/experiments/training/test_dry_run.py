"""A model's output, checked before training: what is wrong with it, in one line."""

import dataclasses

import pytest
import torch
from support.tiny import SETTINGS, experiment, fake_data
from torch import nn

from fxlocal.experiments.models.catalogue import ModelError
from fxlocal.experiments.training.recipe.dry_run import check_model
from fxlocal.plan import Plan
from fxlocal.schedules import Constant


class Net(nn.Module):
    """Ten logits, or what is made of them and of features."""

    def __init__(self, make):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(4, 10)
        self.make = make

    def forward(self, x):
        features = self.norm(self.conv(x)).relu()
        return self.make(self, self.fc(self.drop(features.mean((2, 3)))), features)


class NoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(10))

    def forward(self, x):
        return x.mean((1, 2, 3))[:, None] * self.scale


class NeverEvaluates(Net):
    def eval(self):
        raise NotImplementedError("eval is not for me\nat all")


def raises_in_evaluation(self, y, _):
    if not self.training:
        raise RuntimeError("statistics are missing\n  for more, see elsewhere")
    return y


def is_odd_in_evaluation(self, y, _):
    return y if self.training else (y, y)


WRONG = {
    "nothing": (lambda self, y, f: None, "", "returned None: let it return logits"),
    "a tuple": (lambda self, y, f: (y, f), "", "a tuple of 2, from '0' on: name the part"),
    "another dict": (lambda self, y, f: {"a": f, "b": y}, "", "dict of 'a', 'b': name the part"),
    "no such name": (lambda self, y, f: {"a": f, "b": y}, "c", "no tensor 'c' in it"),
    "no such place": (lambda self, y, f: (y, f), "2", "no tensor '2' in it"),
    "a text": (lambda self, y, f: {"logits": "y"}, "", "dict of 'logits'"),
    "a scalar": (lambda self, y, f: y.sum(), "", "no tensor of logits"),
    "rank 1": (lambda self, y, f: y[:, 0], "", "the shape (2,); wanted: (2, 10)"),
    "rank 3": (lambda self, y, f: y[:, :, None], "", "the shape (2, 10, 1); wanted: (2, 10)"),
    "another batch": (lambda self, y, f: y.mean(0, keepdim=True), "", "the shape (1, 10)"),
    "too few": (lambda self, y, f: y[:, :7], "", "has 7 outputs, fake 10 classes: build it with"),
    "too few pixels": (lambda self, y, f: f, "", "has 4 outputs, fake 10 classes"),
    "classes": (lambda self, y, f: y.argmax(1, keepdim=True), "", "is of torch.int64"),
    "detached": (lambda self, y, f: y.detach(), "", "depends on no parameter that learns"),
    "raises": (raises_in_evaluation, "", "evaluation mode, on 2 images of 3x8x8: RuntimeError: st"),
    "odd": (is_odd_in_evaluation, "", "a tuple of 2"),
}


def check(model, output="", data=None):
    settings = dataclasses.replace(SETTINGS, output=output)
    return check_model(model, experiment(model, Constant(Plan()), settings, data=data))


def refused(model, output=""):
    with pytest.raises(ModelError) as caught:
        check(model, output)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_output_is_refused_in_one_line_and_changes_nothing(case):
    make, output, message = WRONG[case]
    model = Net(make)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    assert message in refused(model, output)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_models_without_layers_or_evaluation_are_refused():
    assert "has no layers" in refused(NoLayers())
    assert "NotImplementedError: eval is not for me" in refused(NeverEvaluates(lambda s, y, f: y))
    frozen = Net(lambda self, y, f: y).requires_grad_(False)
    assert "all of them frozen" in refused(frozen)


RIGHT = {
    "logits": (lambda self, y, f: {"logits": y, "features": f}, ""),
    "out": (lambda self, y, f: {"aux": f, "out": y}, ""),
    "a name": (lambda self, y, f: {"logits": f, "mine": y}, "mine"),
    "a place": (lambda self, y, f: [f, y], "1"),
    "pixels": (lambda self, y, f: y[:, :, None, None].expand(2, 10, 4, 4), ""),
}


@pytest.mark.parametrize("case", RIGHT)
def test_the_logits_are_found_and_the_model_is_as_before(case):
    make, output = RIGHT[case]
    model = Net(make).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    analysis, notes = check(model, output)
    assert len(analysis.layers) == 2 and notes == [] and not model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_more_outputs_than_classes_are_noted():
    few = dataclasses.replace(fake_data(), num_classes=7)
    _, notes = check(Net(lambda self, y, f: y), data=few)
    assert notes == ["note: the model has 10 outputs, fake 7 classes"]


def test_a_part_of_one_image_is_refused_where_a_norm_cannot_take_it():
    class Small(Net):
        def forward(self, x):
            return self.fc(self.norm(self.conv(x).mean((2, 3), keepdim=True)).flatten(1))

    settings = dataclasses.replace(SETTINGS, accumulate=16)
    model = Small(None)
    with pytest.raises(ModelError, match="on 1 image of 3x8x8: ValueError: Expected more than 1"):
        check_model(model, experiment(model, Constant(Plan()), settings))


def test_a_segmentation_needs_scores_for_each_pixel():
    data = dataclasses.replace(fake_data(), num_classes=2, task="segmentation")
    with pytest.raises(ModelError, match=r"shape \(2, 10\); wanted: \(2, 2, height, width\)"):
        check(Net(lambda self, y, f: y), data=data)

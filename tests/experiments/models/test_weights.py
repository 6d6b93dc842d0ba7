"""Weights to begin with: what is taken of which file, what is said, what is refused."""

import re
import sys
import types

import pytest
import torch
import torchvision
from torch import nn

from fxlocal.experiments.models.catalogue import ModelError, build_model
from fxlocal.experiments.models.weights import load_weights


def resnet(num_classes: int = 10, seed: int = 0) -> nn.Module:
    return build_model("resnet8", num_classes=num_classes, width=4, seed=seed)


WRAPPED = {
    "plain": lambda state: state,
    "a trainer's": lambda state: {"epoch": 3, "optimizer": {"state": {}}, "state_dict": state},
    "timm's": lambda state: {"epoch": 3, "arch": "x", "state_dict": state, "version": 2},
    "ours": lambda state: {"fingerprint": {"seed": 0}, "state": {"driver": {"model": state}}},
    "data parallel": lambda state: {f"module.{name}": t for name, t in state.items()},
    "compiled": lambda state: {f"_orig_mod.{name}": t for name, t in state.items()},
    "lightning's": lambda state: {"state_dict": {f"model.{n}": t for n, t in state.items()}},
    "both": lambda state: {f"module._orig_mod.{name}": t for name, t in state.items()},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_state_dict_is_found_wherever_trainers_put_it(tmp_path, kind):
    state, path = resnet(seed=1).state_dict(), tmp_path / "w.pt"
    torch.save(WRAPPED[kind](state), path)
    model = resnet()
    assert (
        load_weights(model, str(path))
        == f"weights: {len(state)} of {len(state)} tensors from {path}"
    )
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_safetensors_are_read(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    state, path = resnet(seed=1).state_dict(), tmp_path / "w.safetensors"
    safetensors.save_file(state, path)
    model = resnet()
    load_weights(model, str(path))
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_a_partial_match_is_reported_and_the_rest_stays(tmp_path):
    state, path = resnet(num_classes=7, seed=1).state_dict(), tmp_path / "w.pt"
    del state["conv1.weight"]
    torch.save({**state, "extra.weight": torch.ones(1)}, path)
    model, before = resnet(), resnet().state_dict()
    said = load_weights(model, str(path))
    assert "2 of another shape there (fc.weight, fc.bias)" in said
    assert "1 not there (conv1.weight)" in said and "1 not in the model (extra.weight)" in said
    kept = {"conv1.weight", "fc.weight", "fc.bias"}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] if name in kept else state[name]), name


def test_torchvisions_names_fit_our_networks(tmp_path):
    theirs, path = torchvision.models.resnet18(num_classes=3), tmp_path / "w.pt"
    torch.save(theirs.state_dict(), path)
    model = build_model("resnet18", num_classes=3, seed=0)
    said = load_weights(model, str(path))
    assert said.endswith("1 of another shape there (conv1.weight)")  # the stem's kernel
    assert torch.equal(model.get_parameter("layer4.1.conv2.weight"), theirs.layer4[1].conv2.weight)


def test_published_weights_are_fetched_by_their_packages(monkeypatch):
    state = torchvision.models.squeezenet1_1().state_dict()
    asked = []
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url",
        lambda url, *args, **options: asked.append(url) or state,
    )
    model = build_model("torchvision:squeezenet1_1", num_classes=4, seed=0)
    said = load_weights(model, "torchvision:SqueezeNet1_1_Weights.IMAGENET1K_V1")
    assert "squeezenet1_1" in asked[0] and "2 of another shape there (classifier.1" in said
    timm = types.SimpleNamespace(create_model=lambda name, pretrained: resnet(seed=3))
    monkeypatch.setitem(sys.modules, "timm", timm)
    other = resnet()
    load_weights(other, "timm:resnet8.mine")
    assert torch.equal(other.fc.weight, resnet(seed=3).fc.weight)


def write(path, kind):
    match kind:
        case "nothing":
            pass
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("hello")
        case "a model":
            torch.save(nn.Linear(2, 2), path)
        case "no tensors":
            torch.save({"epoch": 1, "names": ["a"]}, path)
        case "a list":
            torch.save([torch.ones(2)], path)
        case "another model":
            torch.save(nn.Linear(2, 2).state_dict(), path)
        case "cut short":
            torch.save(resnet().state_dict(), path)
            path.write_bytes(path.read_bytes()[:999])


REFUSED = {
    "nothing": "there is no such file",
    "empty": "neither safetensors nor a whole state dict",
    "text": "neither safetensors nor a whole state dict",
    "a model": "neither safetensors nor a whole state dict",
    "no tensors": "holds no state dict of a model, but a dict of epoch, names",
    "a list": "holds no state dict of a model, but a list",
    "another model": "nothing in it fits the model by name: it has weight, bias",
    "cut short": "neither safetensors nor a whole state dict",
}


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_holds_no_weights_is_refused_in_one_line(tmp_path, kind, suffix):
    if suffix == "safetensors":
        pytest.importorskip("safetensors")
    path = tmp_path / f"w.{suffix}"
    write(path, kind)
    model, before = resnet(), resnet().state_dict()
    with pytest.raises(ModelError, match=r"^--weights [^\n]*$") as caught:
        load_weights(model, str(path))
    if suffix == "pt":
        assert REFUSED[kind] in str(caught.value)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("torchvision:ResNet18_Weights.NOPE", "ResNet18_Weights.NOPE"),
        ("torchvision:nope", "nope"),
        ("timm:resnet18", "needs timm: pip install timm"),
    ],
)
def test_published_weights_that_are_not_there_are_refused(monkeypatch, source, message):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelError, match=re.escape(message)):
        load_weights(resnet(), source)
    with pytest.raises(ModelError, match="'timm:resnet18' needs timm: pip install timm"):
        build_model("timm:resnet18", num_classes=3)


def test_timms_models_are_built(monkeypatch):
    timm = pytest.importorskip("timm")
    model = build_model("timm:resnet10t", num_classes=3, in_channels=1, seed=0)
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 3)
    near = re.escape("timm has no model 'resnet10tt'. Nearest: 'resnet10t'")
    with pytest.raises(ModelError, match=near):
        build_model("timm:resnet10tt", num_classes=3)
    with pytest.raises(ModelError, match="fixed width"):
        build_model("timm:resnet10t", num_classes=3, width=4)
    assert timm.is_model("resnet10t")

import sys
import textwrap

import pytest
import torch
import torchvision
from torch import nn
from torch.fx import symbolic_trace

from fxlocal.experiments.models.catalogue import MODELS, ModelError, build_model

NAMES = [name for name in MODELS if ":" not in name]
BUILDERS = ["resnet8", "resnet18", "vgg13", "mobilenetv2", "alexnet", "cnn2", "unet"]


def small(name: str, in_channels: int = 3) -> nn.Module:
    return build_model(name, num_classes=5, in_channels=in_channels, width=8, seed=0)


def on_meta(name: str, num_classes: int = 10) -> nn.Module:
    """The model at its usual width, without memory."""
    with torch.device("meta"):
        return build_model(name, num_classes=num_classes)


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in model.state_dict().items()}


def num_layers(model: nn.Module) -> int:
    """Layers as the papers count them: without 1x1 shortcuts."""
    return sum(
        isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1))
        for m in model.modules()
    )


def num_calls(model: nn.Module, word: str) -> int:
    return sum(word in str(node.target) for node in symbolic_trace(model).graph.nodes)


# The networks


@pytest.mark.sample(8)
@pytest.mark.parametrize("name", NAMES)
def test_each_is_traced_and_computes_the_same(name):
    model, x = small(name), torch.randn(2, 3, 32, 32)
    traced = symbolic_trace(model)
    torch.manual_seed(1)
    out = model(x)
    torch.manual_seed(1)
    assert torch.equal(traced(x), out)
    assert out.shape == ((2, 5, 32, 32) if name == "unet" else (2, 5))


@pytest.mark.parametrize("in_channels", [1, 4])
@pytest.mark.parametrize("name", BUILDERS)
def test_each_takes_any_number_of_channels(name, in_channels):
    out = small(name, in_channels)(torch.randn(2, in_channels, 16, 16))
    assert out.shape[:2] == (2, 5)


@pytest.mark.parametrize("side", [8, 33])
@pytest.mark.parametrize("name", BUILDERS[:-1])
def test_classifiers_take_other_sizes(name, side):
    assert small(name)(torch.randn(2, 3, side, side)).shape == (2, 5)


@pytest.mark.parametrize("name", BUILDERS)
def test_every_parameter_gets_a_gradient(name):
    model = small(name)
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["resnet8", "resnet14", "resnet18", "resnet20", "resnet32"])
def test_resnets_have_the_depth_of_their_name(name):
    assert num_layers(small(name)) == int(name.removeprefix("resnet"))


def test_the_deepest_resnet_has_54_blocks():
    model = on_meta("resnet110")
    assert num_layers(model) == 110
    assert sum(isinstance(m, torchvision.models.resnet.BasicBlock) for m in model.modules()) == 54


@pytest.mark.parametrize(("name", "convs"), [("vgg13", 10), ("vgg16", 13), ("vgg19", 16)])
def test_vggs_are_torchvisions_up_to_a_single_linear_layer(name, convs):
    ours = shapes(on_meta(name))
    with torch.device("meta"):
        theirs = shapes(getattr(torchvision.models, f"{name}_bn")().features)
    theirs = {f"features.{key}": shape for key, shape in theirs.items()}
    assert {key: theirs[key] for key in ours if key in theirs} == {
        key: shape for key, shape in ours.items() if key.startswith("features")
    }
    assert num_layers(on_meta(name)) == convs + 1
    assert ours["classifier.weight"] == (10, 512)


def test_the_vgg_of_backlink_has_three_linear_layers_and_dropout_between():
    model = on_meta("vgg16-backlink")
    assert num_layers(model) == 16
    kinds = [type(part).__name__ for part in model.classifier]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Dropout"] * 2 + ["Linear"]
    weights = [p.shape for p in model.classifier.parameters() if p.dim() == 2]
    assert weights == [(512, 512)] * 2 + [(10, 512)]
    assert shapes(model.features) == shapes(on_meta("vgg16").features)


@pytest.mark.parametrize("name", ["alexnet", "vgg16-backlink", "resnet32"])
def test_backlinks_networks_have_a_batch_norm_before_each_relu(name):
    """Section 3.1: also behind fully connected layers."""
    order = [type(part).__name__ for part in on_meta(name).modules()]
    before = [order[at - 1] for at, kind in enumerate(order) if kind == "ReLU"]
    assert set(before) <= {"BatchNorm1d", "BatchNorm2d"}
    assert before.count("BatchNorm1d") == (0 if name == "resnet32" else 2)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_resnets_have_torchvisions_names_and_shapes_but_for_the_stem(name):
    ours = shapes(on_meta(name, 1000))
    with torch.device("meta"):
        theirs = shapes(getattr(torchvision.models, name)())
    assert ours.pop("conv1.weight") == (64, 3, 3, 3) and theirs.pop("conv1.weight")
    assert ours == theirs and list(ours) == list(theirs)


def test_mobilenetv2_has_torchvisions_names_and_shapes():
    with torch.device("meta"):
        theirs = torchvision.models.mobilenet_v2()
    assert shapes(on_meta("mobilenetv2", 1000)) == shapes(theirs)


def test_mobilenetv2_keeps_4_pixels_of_32():
    features = small("mobilenetv2").features
    assert features(torch.zeros(1, 3, 32, 32)).shape[2:] == (4, 4)


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    # As published, give or take: ResNet-20 0.27 M and ResNet-110 1.7 M, ResNet-18 with a 3x3 stem
    # 11.17 M, U-Net 31.0 M.
    [("resnet20", 0.27e6), ("resnet110", 1.73e6), ("resnet18", 11.17e6), ("unet", 31.0e6)],
)
def test_the_usual_width_is_the_published_one(name, num_parameters):
    found = sum(p.numel() for p in on_meta(name).parameters())
    assert found == pytest.approx(num_parameters, rel=0.015)


def test_the_other_shapes_are_the_papers():
    assert [num_layers(small(name)) for name in ("cnn2", "alexnet")] == [2 + 3, 5 + 3]
    assert num_calls(on_meta("resnet18"), "add") == 8
    assert num_calls(on_meta("mobilenetv2"), "add") == 10


def test_unet_joins_each_resolution_with_its_own_on_the_way_down():
    graph = symbolic_trace(small("unet")).graph
    joins = [node.args[0] for node in graph.nodes if node.target is torch.cat]
    paths = [[str(node.target).split(".")[:2] for node in nodes] for nodes in joins]
    assert paths == [[["encoder", str(3 - i)], ["up", str(i)]] for i in range(4)]


@pytest.mark.parametrize("shape", [(8, 8), (24, 32), (32, 40)])
def test_unet_refuses_other_sizes_also_when_traced(shape):
    for model in (small("unet"), symbolic_trace(small("unet"))):
        with pytest.raises(AssertionError, match="make height and width multiples of 16"):
            model(torch.zeros(1, 3, *shape))


# Names and options


def test_the_seed_fixes_the_weights_and_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    first, again, other = (
        build_model("resnet8", num_classes=3, seed=seed).fc.weight for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_seed_the_global_random_state_is_drawn_from():
    torch.manual_seed(3)
    first, other = (build_model("resnet8", num_classes=3).fc.weight for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(build_model("resnet8", num_classes=3).fc.weight, first)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("name", "near"),
    [("resnet81", "'resnet8', 'resnet18'"), ("VGG16", "'vgg16'"), ("u-net", "'unet'")],
)
def test_an_unknown_name_is_answered_with_the_nearest(name, near):
    with pytest.raises(ModelError) as error:
        build_model(name, num_classes=3)
    assert str(error.value).startswith(f"unknown model '{name}'. Nearest: ")
    assert all(word in str(error.value) for word in near.split(", "))
    assert "or give 'torchvision:NAME' or 'package.module:factory'" in str(error.value)


@pytest.mark.parametrize("option", ["num_classes", "in_channels", "width"])
def test_a_count_below_one_is_refused(option):
    options = {"num_classes": 3, option: 0}
    with pytest.raises(ModelError, match=f"{option} of 'resnet8' must be 1 or more, not 0"):
        build_model("resnet8", **options)


# torchvision's


@pytest.fixture
def no_download(monkeypatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("downloads")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)


@pytest.mark.parametrize(
    ("name", "last"),
    [("mobilenet_v3_small", "classifier.3"), ("lraspp_mobilenet_v3_large", "low_classifier")],
)
def test_any_of_torchvisions_is_built_without_its_weights(no_download, name, last):
    model = build_model(f"torchvision:{name}", num_classes=7, seed=0)
    weight = dict(model.named_parameters())
    found = [value.shape[0] for key, value in weight.items() if last in key and "weight" in key]
    assert found == [7]


def test_an_unknown_torchvision_name_is_answered_with_the_nearest():
    with pytest.raises(ModelError, match=r"torchvision has no model 'resnet51'.*'resnet50'"):
        build_model("torchvision:resnet51", num_classes=3)


def test_torchvision_takes_three_channels_and_no_width():
    message = r"'torchvision:resnet18' takes images of 3 channels, not 1: .* resnet8, "
    with pytest.raises(ModelError, match=message):
        build_model("torchvision:resnet18", num_classes=3, in_channels=1)
    message = "'torchvision:resnet18' has a fixed width: leave width=8 out"
    with pytest.raises(ModelError, match=message):
        build_model("torchvision:resnet18", num_classes=3, width=8)


def test_a_torchvision_model_without_classes_is_refused():
    message = r"cannot build 'torchvision:raft_small', called with \(weights=None, num_classes=3\)"
    with pytest.raises(ModelError, match=message):
        build_model("torchvision:raft_small", num_classes=3)


# The user's own

SOURCE = """
from torch import nn

def plain():
    return nn.Linear(2, 2)

def classes(num_classes):
    return nn.Linear(2, num_classes)

def everything(num_classes, in_channels, width=6):
    return nn.Bilinear(in_channels, width, num_classes)

def keywords(**options):
    return nn.Linear(2, **{"out_features": options.pop("num_classes"), **options})

class Net(nn.Linear):
    def __init__(self, num_classes):
        super().__init__(2, num_classes)

def number():
    return 3

def broken(num_classes):
    raise OSError("no disk")

def demanding(depth):
    return nn.Linear(depth, depth)

ready = nn.Linear(2, 2)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module in the current folder, which is not on the path, as for an installed command."""
    (tmp_path / "own_nets.py").write_text(textwrap.dedent(SOURCE))
    (tmp_path / "own_broken.py").write_text("import own_missing_requirement\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield
    sys.modules.pop("own_nets", None)


@pytest.mark.parametrize(
    ("factory", "shape"),
    [
        ("plain", (2, 2)),
        ("classes", (7, 2)),
        ("everything", (7, 4, 6)),
        ("keywords", (7, 2)),
        ("Net", (7, 2)),
    ],
)
def test_a_factory_gets_what_it_takes(own, factory, shape):
    model = build_model(f"own_nets:{factory}", num_classes=7, in_channels=4)
    assert model.weight.shape == shape


def test_a_factory_gets_the_width_if_it_names_it(own):
    model = build_model("own_nets:everything", num_classes=7, in_channels=4, width=9)
    assert model.weight.shape == (7, 4, 9)
    message = "'own_nets:classes' takes no width: leave width=9 out"
    with pytest.raises(ModelError, match=message):
        build_model("own_nets:classes", num_classes=7, width=9)


def test_a_factory_is_seeded(own):
    first, again = (build_model("own_nets:plain", num_classes=2, seed=4).weight for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_nets:clases", r"module 'own_nets' has no 'clases'\. Nearest: 'classes'"),
        ("own_nets:", r"module 'own_nets' has no ''\. Nearest: "),
        ("own_net:plain", "cannot import 'own_net' .*ModuleNotFoundError: No module named"),
        ("own_broken:plain", "cannot import 'own_broken' .*'own_missing_requirement'"),
        ("own_nets:ready", "'own_nets:ready' is a Linear, not a function that builds one"),
        ("own_nets:__name__", "'own_nets:__name__' is a str, not a function that builds one"),
        ("own_nets:number", r"called with \(\), returned int, not an nn.Module"),
        ("own_nets:broken", r"called with \(num_classes=7\): OSError: no disk"),
        ("own_nets:demanding", r"called with \(\): TypeError: .*'depth'"),
        (":plain", "cannot import ''"),
    ],
)
def test_a_factory_that_does_not_work_says_why(own, name, message):
    with pytest.raises(ModelError, match=message):
        build_model(name, num_classes=7)

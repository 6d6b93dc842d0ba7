"""`fxlocal.backend` on models that people train, by inductor, against their compiled networks."""

import copy

import pytest
import torch
from support import laws
from support.zoo import torchvision_model

import fxlocal
from fxlocal import Freeze, Hebbian, LocalPrefix, Plan, TopK, Zero
from fxlocal.experiments.models.networks import UNet

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_compiler")]


def bert():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=50, intermediate_size=64, **sizes)
    ids = torch.arange(16).view(2, 8)
    return Output(transformers.BertForSequenceClassification(config)), (ids,)


class Output(torch.nn.Module):
    """The logits of a model, as a tensor."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids).logits


def vision_transformer():
    vision = pytest.importorskip("torchvision.models.vision_transformer")
    sizes = {"num_layers": 3, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
    model = vision.VisionTransformer(32, 8, **sizes, num_classes=4, dropout=0.1)
    return model, (torch.randn(2, 3, 32, 32),)


def resnet10():
    resnet = pytest.importorskip("torchvision.models.resnet")
    model = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=4)
    return model, (torch.randn(4, 3, 64, 64),)


def short_mobilenet():
    blocks = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 1, 2]]  # of its seventeen the first four
    model = torchvision_model("mobilenet_v2", 64, num_classes=4, inverted_residual_setting=blocks)
    return model, (torch.randn(4, 3, 64, 64),)


# How it is made; the first layer behind the boundary; layers whose weight gradient is another.
MODELS = {
    "resnet10": (resnet10, "layer3", ["layer4.0.conv2", "fc"]),
    "mobilenet": (short_mobilenet, "features.3", ["features.4.conv.2", "classifier.1"]),
    "unet": (
        lambda: (UNet(3, 4, 4), (torch.randn(2, 3, 32, 32),)),
        "up.1",
        ["decoder.2.0", "head"],
    ),
    "vit": (
        vision_transformer,
        "encoder.layers.encoder_layer_1.mlp",
        ["encoder.layers.encoder_layer_2.mlp.0", "heads.head"],
    ),
    "bert": (
        bert,
        "model.bert.encoder.layer.1",
        ["model.bert.encoder.layer.1.output.dense", "model.classifier"],
    ),
}


def trained(model, net, inputs):
    """Three steps by SGD with momentum: outputs, gradients and state after each."""
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9), []
    for _ in range(3):
        optimizer.zero_grad()
        outputs = laws.step(net, inputs)
        seen.append(copy.deepcopy([outputs, laws.gradients(model)]))
        optimizer.step()
        seen.append(copy.deepcopy(model.state_dict()))
    return seen


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("rule", [Hebbian(rate=0.01), Freeze()], ids=["hebbian", "freeze"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_trains_as_its_compiled_network_does(name, rule, inner):
    make, until, (first, last) = MODELS[name]
    model, inputs = make()
    other = copy.deepcopy(model)
    grads = {first: TopK(2, force=True), last: Zero()}
    plan = Plan(local=LocalPrefix(until, rule), weight_grads=grads)
    with torch._inductor.config.patch(fallback_random=True):  # else its dropout is its own
        net = torch.compile(model, backend=fxlocal.backend(plan, inner), fullgraph=True)
        ours = trained(model, net, inputs)
        network = fxlocal.transform(other, plan, *inputs)
        theirs = trained(other, torch.compile(network, backend=inner), inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_detector_learns_by_a_plan_that_ends_in_its_backbone():
    """Transform refuses it; its own oracle is what each part must and must not get."""
    detection = pytest.importorskip("torchvision.models.detection")
    weights = {"weights": None, "weights_backbone": None}
    build = detection.fasterrcnn_resnet50_fpn
    model = build(**weights, trainable_backbone_layers=5, num_classes=3, min_size=64, max_size=64)
    images = [torch.rand(3, 64, 64) for _ in range(2)]
    boxes = {"boxes": torch.tensor([[5.0, 5.0, 30.0, 30.0]]), "labels": torch.tensor([1])}
    plan = Plan(local=LocalPrefix("backbone.body.layer3", Hebbian(rate=0.01)))
    with pytest.raises(fxlocal.CaptureError):
        fxlocal.transform(model, plan)
    state = copy.deepcopy(model.state_dict())
    net = torch.compile(model, backend=fxlocal.backend(plan, "eager"))
    sum(net(images, [boxes] * 2).values()).backward()
    before = tuple(f"backbone.body.{part}." for part in ("conv1", "bn1", "layer1", "layer2"))
    for name, parameter in model.named_parameters():
        inside = name.startswith(before)
        assert (parameter.grad is None) == inside, name
        learns = inside and parameter.dim() == 4  # norms do not
        assert torch.equal(parameter, state[name]) == (not learns), name
    other = copy.deepcopy(model)  # one evaluation, which moves nothing
    net.eval()(images)
    laws.assert_equal(dict(model.state_dict()), dict(other.state_dict()), "state")

"""Every classification and segmentation model of torchvision: captured exactly, cut and updated.

Each model is built once with cheap random weights and goes through all checks on the smallest
image that it takes, a batch of two, in train mode. ``EXPECTTEST_ACCEPT=1`` rewrites golden/zoo.txt.
"""

import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from support import laws, prefixes
from torch import nn

import fxlocal
from fxlocal import CaptureError, Freeze, Hebbian, LocalPrefix, Plan

models = pytest.importorskip("torchvision.models")

SEGMENTATION = models.list_models(module=models.segmentation)
NAMES = [*models.list_models(module=models), *SEGMENTATION]
UNSUPPORTED = {}  # name: what its CaptureError says
SIZES = {"alexnet": 63, "inception_v3": 299, "maxvit_t": 224, "vit_h_14": 28}
GOLDEN = Path(__file__).parent.parent / "golden" / "zoo.txt"
RATE = 0.125
# Weights of more elements get no gradient and no update: in VGG, ViT-H and RegNetY-128GF they would
# take two thirds of the sweep's time, and are called like all others.
LARGE = 4_000_000


def fill(tensor, *args, **kwargs):
    """Repeat one tile of random numbers: initial weights for hundreds of millions in a second."""
    with torch.no_grad():
        flat = tensor.view(-1)
        tile = torch.randn(min(flat.numel(), 65537)) * 0.02
        whole = flat.numel() // tile.numel() * tile.numel()
        flat[:whole].view(-1, tile.numel()).copy_(tile)
        flat[whole:].copy_(tile[: flat.numel() - whole])
    return tensor


@pytest.fixture(autouse=True)
def cheap(monkeypatch):
    for name in ("normal", "uniform", "trunc_normal", "kaiming_normal", "kaiming_uniform"):
        monkeypatch.setattr(nn.init, f"{name}_", fill)
    monkeypatch.setattr(nn.init, "xavier_uniform_", fill)
    torch.use_deterministic_algorithms(False)  # it fills each new tensor; the CPU needs it not


def build(name):
    size, options = SIZES.get(name, 32), {}
    if name in SEGMENTATION:
        options["weights_backbone"] = None
    if name.startswith("vit"):
        options["image_size"] = size
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = True
    model = models.get_model(name, weights=None, **options).train()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.numel() <= LARGE)
    return model, (torch.randn(2, 3, size, size),)


def facts(name, captured):
    """Return the golden line of a model."""
    analysis = fxlocal.analyze(captured)
    kinds = Counter(edge.kind for edge in analysis.skips)
    long_range = sum(edge.long_range for edge in analysis.skips)
    projections = sum(edge.projection for edge in analysis.skips)
    return (
        f"{name}: {len(captured.graph.nodes)} nodes, {len(analysis.layers)} layers, "
        f"{kinds['residual']} residual ({projections} projection), {kinds['concat']} concat, "
        f"{kinds['gate']} gate, {long_range} long-range, {len(analysis.blocks)} blocks"
    )


def golden():
    lines = GOLDEN.read_text().splitlines() if GOLDEN.exists() else []
    return {line.partition(":")[0]: line for line in lines}


def check_facts(name, captured):
    line, pinned = facts(name, captured), golden()
    if os.environ.get("EXPECTTEST_ACCEPT"):
        pinned[name] = line
        GOLDEN.write_text("".join(f"{pinned[n]}\n" for n in NAMES if n in pinned))
    assert pinned.get(name) == line


def check_state(model, captured):
    """The same objects under the same names, in the same order."""
    assert list(captured.state_dict()) == list(model.state_dict())
    ours, theirs = (dict(m.named_parameters(remove_duplicate=False)) for m in (captured, model))
    assert list(ours) == list(theirs) and all(ours[n] is theirs[n] for n in theirs)
    shared = dict(captured.named_buffers())
    assert all(shared[name] is buffer for name, buffer in model.named_buffers())


class Bench:
    """Runs one step at a time from the same weights, buffers and seed."""

    def __init__(self, model, inputs):
        self.model, self.inputs = model, inputs
        self.start = {name: b.clone() for name, b in model.named_buffers()}

    def step(self, net):
        """Return the outputs, the gradients and the buffers after one step of ``net``."""
        for name, buffer in self.model.named_buffers():
            buffer.copy_(self.start[name])
        outputs = laws.step(net, self.inputs)
        gradients = laws.gradients(self.model)
        self.model.zero_grad()
        buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        return outputs, gradients, buffers


def check_structure(captured, model, inputs):
    """Dicts have the same keys in the same order, named tuples the same fields."""
    with torch.no_grad():
        ours, theirs = captured(*inputs), model(*inputs)
    if isinstance(theirs, dict):
        assert isinstance(ours, dict) and list(ours) == list(theirs)
    else:
        assert type(ours) is type(theirs)


def check_plan(bench, captured, expected, until, rule):
    """One step: the source's outputs, its gradients after the cut, None before it."""
    plan = Plan(local=LocalPrefix(until, rule))
    net = fxlocal.transform(captured, plan)
    before = prefixes.prefix_parameters(bench.model, captured, plan)
    weights = [
        bench.model.get_parameter(f.weight) for f in fxlocal.analyze(captured).layers[:until]
    ]
    watched = [(weight, weight.detach().clone()) for weight in (weights[0], weights[-1])]
    outputs, gradients, buffers = bench.step(net)
    laws.assert_equal(outputs, expected[0], "output")
    wanted = {name: None if name in before else g for name, g in expected[1].items()}
    laws.assert_equal(gradients, wanted, "gradient")
    laws.assert_equal(buffers, expected[2], "buffer")
    for weight, start in watched:
        length = RATE if rule == Hebbian(RATE) and weight.requires_grad else 0
        # 1e-3: float32 sums over many elements
        assert float((weight.detach() - start).norm()) == pytest.approx(length, rel=1e-3)
    return net


def check_evaluation(net, model, inputs):
    tensors = [*model.parameters(), *model.buffers()]
    versions = [t._version for t in tensors]
    with torch.no_grad():
        ours, theirs = laws.tensors(net.eval()(*inputs)), laws.tensors(model.eval()(*inputs))
    laws.assert_equal(ours, theirs, "evaluated output")
    assert [t._version for t in tensors] == versions, "evaluation moved something"
    net.train()


@pytest.mark.zoo
@pytest.mark.parametrize("name", [name for name in NAMES if name not in UNSUPPORTED])
def test_model(name):
    model, inputs = build(name)
    captured = fxlocal.capture(model)
    analysis = fxlocal.analyze(captured)
    check_facts(name, captured)
    check_state(model, captured)
    bench = Bench(model, inputs)
    expected = bench.step(model)
    assert all(bool(output.isfinite().all()) for output in expected[0])
    untouched = bench.step(captured)
    for ours, theirs, what in zip(
        untouched, expected, ("output", "gradient", "buffer"), strict=True
    ):
        laws.assert_equal(ours, theirs, what)
    del untouched
    check_structure(captured, model, inputs)
    edge = analysis.boundaries[len(analysis.blocks) // 2]
    check_plan(bench, captured, expected, edge, Freeze())
    net = check_plan(bench, captured, expected, len(analysis.layers) * 3 // 4, Hebbian(RATE))
    check_evaluation(net, model, inputs)


@pytest.mark.zoo
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_model_that_cannot_be_captured(name):
    with pytest.raises(CaptureError, match=UNSUPPORTED[name]):
        fxlocal.capture(build(name)[0])


def test_every_model_is_pinned():
    assert len(NAMES) >= 86
    assert set(golden()) == set(NAMES) - set(UNSUPPORTED)
    assert UNSUPPORTED == {}


@pytest.mark.parametrize(
    "name,residual,projection,layers",
    [("resnet18", 8, 3, 21), ("resnet50", 16, 4, 54), ("mobilenet_v2", 10, 0, 53)],
)
def test_the_counts_that_are_known(name, residual, projection, layers):
    """Of the architectures themselves, whatever golden/zoo.txt says."""
    with torch.device("meta"):
        line = facts(name, fxlocal.capture(build(name)[0]))
    assert line == golden()[name]
    assert f" {layers} layers, {residual} residual ({projection} projection)," in line

"""A network with local modules, module by module: as stages, compiled, and in a driver."""

import copy
from itertools import pairwise

import pytest
import torch
from support.drivers import run_by
from support.nets import NETS
from torch import nn

import fxlocal
from fxlocal import ConvHead, Driver, Freeze, InfoProHead, LocalModules, Plan, PlanError, TopK, Zero
from fxlocal.errors import CheckpointError
from fxlocal.experiments.models.catalogue import build_model
from fxlocal.ir.stages import find_stages
from fxlocal.ops.local_modules import let_backward_compile
from fxlocal.runtime.compile import ByModule, compile_network
from fxlocal.schedules import Approximation, Constant, Static, combine

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 3])
PIXELS = torch.zeros(4, 16, 16, dtype=torch.int64)


def network(name, *, classes=5, **options):
    model = build_model(name, num_classes=classes, width=4, seed=0)
    torch.manual_seed(0)
    modules = LocalModules(num_classes=classes, balance="blocks", **options)
    return fxlocal.transform(model, Plan(modules=modules), X)


def step(call, net, target=Y):
    """One step's results: output, loss, gradients, state."""
    torch.manual_seed(3)
    output, loss = call(X, target)
    loss.backward()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    return output.detach(), loss.detach(), [p.grad for p in net.parameters()], state


def run_stages(stages):
    def call(x, target):
        values = {"x": x, "input": x, "target": target}
        for stage in stages:
            made, (output, loss) = stage(*(values[name] for name in stage.inputs))
            values.update(zip(stage.outputs, made, strict=True))
            if stage is not stages[-1]:
                loss.backward()
        return output, loss

    return call


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet14", {"count": 3}),
        ("resnet14", {"count": 3, "link": 2, "head": ConvHead(8)}),
        ("alexnet", {"count": 4, "link": 2}),  # links as long as modules, dropout among them
        ("unet", {"count": 4, "link": 1, "head": InfoProHead(8)}),
        ("resnet14", {"count": 3, "replay": 2}),
        ("unet", {"count": 3, "replay": 2, "head": InfoProHead(8)}),
    ],
)
def test_stages_in_a_row_are_the_network(name, options):
    net = network(name, **options)
    target = PIXELS if name == "unet" else Y
    apart = copy.deepcopy(net)
    stages = find_stages(apart)
    torch.testing.assert_close(
        step(run_stages(stages), apart, target), step(net, net, target), rtol=0, atol=0
    )
    assert [stage.index for stage in stages] == list(range(options["count"]))


def test_stages_share_the_parameters_of_a_link_with_their_neighbours():
    stages = find_stages(network("resnet14", count=3, link=1))
    assert set(stages[0].linked) == {1}
    assert set(stages[1].linked) == {0, 2}
    assert stages[0].linked[1] == stages[1].linked[0]
    assert all(name.startswith("layer1.1.") for name in stages[0].linked[1])
    assert not any(stage.linked for stage in find_stages(network("resnet14", count=3)))


def test_with_replay_a_stage_takes_from_its_neighbour_alone():
    stages = find_stages(network("unet", count=4, replay=1))
    for before, after in pairwise(stages):
        assert set(after.inputs) == set(before.outputs)


def test_a_network_without_local_modules_has_no_stages():
    net = fxlocal.transform(build_model("resnet8", num_classes=5), Plan())
    with pytest.raises(PlanError, match="give what transform returned"):
        find_stages(net)


def whole(net):
    return torch.compile(net, fullgraph=True, backend="aot_eager")


def by_module(net):
    return ByModule(net, {"fullgraph": True, "backend": "aot_eager"})


@pytest.mark.slow  # compiles
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compiled", [whole, by_module])
@pytest.mark.parametrize(
    "options",
    [
        {"count": 3, "link": 1, "head": ConvHead(8)},
        {"count": 2, "link": 2, "weighting": "compound"},
        {"count": 3, "head": InfoProHead(8)},
        {"count": 3, "replay": 2},
    ],
    ids=["backlink", "compound", "infopro", "dgl"],
)
def test_compiled_it_learns_as_it_does_uncompiled(compiled, options):
    if compiled is whole and "replay" in options:
        pytest.skip("a graph holds no buffer of batches: the driver compiles module by module")
    if compiled is whole and not let_backward_compile():
        pytest.skip("traces no backward: the driver compiles module by module")
    net = network("resnet8", **options)
    ours = copy.deepcopy(net)
    call = compiled(ours)
    for _ in range(2):  # the second adds to the gradients of the first
        torch.testing.assert_close(step(call, ours), step(net, net), rtol=1e-5, atol=1e-6)
    ours.eval(), net.eval()
    torch.testing.assert_close(call(X), net(X), rtol=1e-5, atol=1e-5)


@pytest.mark.slow  # compiles
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.skipif(not let_backward_compile(), reason="traces no backward")
def test_inductor_compiles_them_whole():
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Linear(4, 4)]
    model = nn.Sequential(*layers, nn.Linear(4, 5))
    modules = LocalModules(2, link=2, num_classes=5, balance=("4",), weighting="compound")
    x = torch.randn(4, 4)
    net = fxlocal.transform(model, Plan(modules=modules), x)
    ours, results = copy.deepcopy(net), []
    for one, call in ((ours, torch.compile(ours, fullgraph=True)), (net, net)):
        output, loss = call(x, Y)
        loss.backward()
        results.append([output, loss, *(p.grad for p in one.parameters()), *one.buffers()])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.slow  # compiles
@pytest.mark.usefixtures("fresh_compiler")
def test_another_scale_of_the_losses_recompiles_nothing():
    net = network("resnet8", count=2)
    call = compile_network(net, {"backend": "eager"})
    step(call, net)
    net.zero_grad()
    with torch._dynamo.config.patch(error_on_recompile=True):
        fxlocal.scale_losses(call, 0.5)
        _, _, halved, _ = step(call, net)
    plain = network("resnet8", count=2)
    step(plain, plain)
    plain.zero_grad()
    _, _, whole_gradients, _ = step(plain, plain)
    torch.testing.assert_close(2 * halved[0], whole_gradients[0])


MODULES = LocalModules(3, link=1, head=ConvHead(8), num_classes=5)
STATIC = Static(4, rule=Freeze(), largest=0.6, start=0.2)
SCHEDULES = {
    "alone": Constant(Plan(modules=MODULES)),
    "dgl": Constant(Plan(modules=LocalModules(3, num_classes=5, replay=2))),
    "prefix": combine(STATIC, Constant(Plan(modules=MODULES))),
    "zero": combine(Constant(Plan(modules=MODULES)), Approximation.named("schedule-2", Zero())),
    "both": combine(
        combine(STATIC, Constant(Plan(modules=MODULES))),
        Approximation(TopK(force=True), slice(5, 9)),
    ),
}


def loss_of(net, step):
    return net(X, Y)[1]


def driver_of(schedule):
    torch.manual_seed(0)
    model = build_model("resnet14", num_classes=5, width=4, seed=0)
    driver = Driver(model, schedule, example_inputs=(X,))
    driver.optimizer = torch.optim.SGD(driver.parameters(), lr=0.05, momentum=0.9)
    return driver


@pytest.mark.sample(2)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_driver_keeps_its_heads_and_resumes_exactly(schedule):
    driver, resumed = driver_of(schedule), driver_of(schedule)
    assert len(driver.heads) == 2
    run_by(driver, 2, loss_of)
    state = copy.deepcopy(driver.state_dict())
    run_by(driver, 2, loss_of)
    with torch.no_grad():
        for p in resumed.parameters():
            p.fill_(1.0)
    resumed.load_state_dict(state)
    run_by(resumed, 2, loss_of)
    torch.testing.assert_close([*resumed.parameters()], [*driver.parameters()], rtol=0, atol=0)
    assert resumed.losses == driver.losses
    assert driver.losses[-1] < driver.losses[0]


def test_a_checkpoint_with_other_heads_is_refused():
    other = driver_of(Constant(Plan(modules=LocalModules(3, link=1, num_classes=5))))
    with pytest.raises(CheckpointError, match="heads"):
        other.load_state_dict(driver_of(SCHEDULES["alone"]).state_dict())


def test_a_schedule_cannot_change_the_split():
    fewer = LocalModules(2, head=ConvHead(8), num_classes=5)
    with pytest.raises(PlanError, match="A model is split in one way"):
        driver_of(combine(SCHEDULES["alone"], Constant(Plan(modules=fewer))))
    net = network("resnet8", count=2)
    with pytest.raises(PlanError, match="Transform the model anew"):
        fxlocal.transform(net, Plan(modules=fewer), X)


def test_a_network_transformed_again_keeps_its_heads():
    net = network("resnet8", count=3)
    plan = Plan(local=fxlocal.LocalPrefix("layer1.0", Freeze()), modules=find_plan(net).modules)
    again = fxlocal.transform(net, plan, X)
    assert [*map(id, again.parameters())] == [*map(id, net.parameters())]


def find_plan(net):
    return net.meta["fxlocal"].plan


def test_a_prefix_ends_the_modules_that_lie_in_it():
    model = build_model("resnet14", num_classes=5, width=4, seed=0)
    modules = LocalModules(3, link=1, num_classes=5, balance=("layer2.0", "layer3.0"))
    plan = Plan(local=fxlocal.LocalPrefix("layer2.1", Freeze()), modules=modules)
    net = fxlocal.transform(model, plan, X)
    _, loss = net(X, Y)
    loss.backward()
    names = [node.name for node in net.graph.nodes]
    assert "backward_0" not in names
    assert "backward_1" in names
    learned = {n.partition(".conv")[0] for n, p in net.named_parameters() if p.grad is not None}
    assert not any(name.startswith(("conv1", "layer1", "layer2.0")) for name in learned)
    assert {"layer2.1", "layer3.0", "layer3.1"} <= learned


def test_clearing_gradients_between_forward_and_backward_is_refused():
    net = network("resnet8", count=3)
    _, loss = net(X, Y)
    net.zero_grad()
    with pytest.raises(RuntimeError, match="before the forward"):
        loss.backward()


def test_checkpointing_around_the_network_is_refused():
    net = network("resnet8", count=3)
    with pytest.raises(RuntimeError, match="learns in its forward"):
        torch.utils.checkpoint.checkpoint(net, X, Y, use_reentrant=False)


def test_a_cuda_graph_cannot_hold_local_modules():
    model = build_model("resnet8", num_classes=5, width=4)
    schedule = Constant(Plan(modules=LocalModules(2, num_classes=5)))
    with pytest.raises(PlanError, match="CUDA graph"):
        Driver(model, schedule, compile="cudagraph", example_inputs=(X,))


class Attention(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.embed, self.mix = nn.Linear(3, 4), nn.MultiheadAttention(4, 2, p, batch_first=True)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        x = self.embed(x.flatten(2).transpose(1, 2))
        return self.fc(self.mix(x, x, x)[0].mean(1))


class Alpha(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 5)
        self.drop = nn.AlphaDropout(p)

    def forward(self, x):
        return self.second(self.drop(self.first(x.mean((2, 3)))))


@pytest.mark.parametrize("kind", [Attention, Alpha])
def test_randomness_that_cannot_be_repeated_is_refused_in_a_link_only(kind):
    def modules(link):
        return Plan(modules=LocalModules(2, link=link, num_classes=5, balance="blocks"))

    with pytest.raises(PlanError, match="cannot be drawn again"):
        fxlocal.transform(kind(0.5), modules(1), X)
    net = fxlocal.transform(kind(0.5), modules(0), X)
    net(X, Y)[1].backward()


@pytest.mark.parametrize("name", [n for n in NETS if n not in ("autoencoder", "multi_output")])
def test_verify_runs_local_modules(name):
    net = NETS[name]
    x, classes = net.inputs()[0], 2 if name == "unet" else 5
    target = torch.zeros(2, 8, 8, dtype=torch.int64) if name == "unet" else torch.tensor([0, 1])
    modules = LocalModules(2, num_classes=classes, balance="blocks")
    report = fxlocal.verify(fxlocal.transform(net.build(), Plan(modules=modules), x), x, target)
    assert all(layer.gradient is not None for layer in report.layers)
    assert not report.unmet

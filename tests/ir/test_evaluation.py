"""In evaluation mode a network is its source, whichever tool runs, copies or exports it."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.fx.passes.split_module import split_module

import fxlocal
from fxlocal import Checkpoint, Freeze, Hebbian, LocalModules, LocalPrefix, Plan, TopK
from fxlocal.ir.stages import find_stages
from fxlocal.schedules import Constant, Dynamic, Static


class Net(nn.Module):
    """A norm and both dropouts differ between the modes, so does the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.drop = nn.Conv2d(8, 8, 3, padding=1), nn.Dropout(0.3)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        x = self.norm(self.conv1(x)).relu()
        x = self.drop(self.conv2(x)).relu().mean((2, 3))
        x = self.fc(F.dropout(x, 0.5, self.training))
        if not self.training:
            x = x.softmax(1)
        return x * scale


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PLANS = {
    "nothing": Plan(),
    "hebbian": Plan(local=LocalPrefix(until="conv2", rule=Hebbian(0.1))),
    "freeze": Plan(local=LocalPrefix(until="fc", rule=Freeze(), norm="eval")),
    "topk": Plan(weight_grads={"conv2": TopK(1, force=True)}),
    "modules": Plan(modules=LocalModules(2, num_classes=5)),
    "checkpoint": Plan(checkpoint=Checkpoint(2)),
}


def make(name="hebbian"):
    torch.manual_seed(0)
    model = Net()
    return model, fxlocal.transform(model, PLANS[name], X)


def exported(strict):
    return lambda net: torch.export.export(net, (X,), strict=strict).module()


TOOLS = {
    "itself": lambda net: net,
    "interpreter": lambda net: fx.Interpreter(net).run,
    "shapes": lambda net: lambda x: ShapeProp(net).propagate(x),
    "split_module": lambda net: split_module(net, None, lambda node: 0),
    "symbolic_trace": fx.symbolic_trace,
    "transformer": lambda net: fx.Transformer(net).transform(),
    "graph_module": lambda net: fx.GraphModule(net, net.graph),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "export": exported(strict=False),
    "strict_export": exported(strict=True),
    "compiled": lambda net: torch.compile(net, backend="eager", fullgraph=True),
    "jit_trace": lambda net: torch.jit.trace(net, X),
    "functional": lambda net: lambda x: torch.func.functional_call(net, net.state_dict(), x),
}


@functools.cache
def trained(plan):
    model, net = make(plan)
    target = {"target": torch.zeros(4, dtype=torch.long)} if plan == "modules" else {}
    for _ in range(2):
        net.train()(X, **target)
    return model, net.eval()


@pytest.mark.sample(12)
@pytest.mark.filterwarnings("ignore:.*jit.*:DeprecationWarning")
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_meets_the_model_in_evaluation_mode(tool, plan):
    model, net = trained(plan)
    expected, state = model(X), copy.deepcopy(model.state_dict())
    run = TOOLS[tool](net)
    for _ in range(2):
        torch.testing.assert_close(run(X), expected)
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)


@pytest.mark.packages
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("plan", PLANS)
def test_what_onnx_exports_is_the_model(plan):
    pytest.importorskip("onnxruntime")
    model, net = trained(plan)
    expected, state = model(X), copy.deepcopy(model.state_dict())
    program = torch.onnx.export(net, (X,), dynamo=True, verbose=False)
    for _ in range(2):
        (found,) = program(X)
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)


def test_the_model_itself_may_have_been_put_in_evaluation_mode():
    model, net = make()
    model.eval()
    torch.testing.assert_close(fx.Interpreter(net).run(X), model(X))


@pytest.mark.sample(12)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("tool", ["itself", "deepcopy", "compiled", "functional"])
def test_without_gradients_it_is_the_model_in_train_mode(tool, plan):
    """As when running statistics are estimated anew: weights stay, norms and dropout train."""
    model, net = make(plan)
    plain = copy.deepcopy(model)
    run = TOOLS[tool](net)
    state = run.state_dict() if tool == "deepcopy" else model.state_dict()
    with torch.no_grad():
        for x in (X, X + 1):
            torch.manual_seed(1)
            expected = plain(x)
            torch.manual_seed(1)
            assert torch.equal(run(x), expected)
    for name, value in plain.state_dict().items():
        assert torch.equal(state[name], value), name


def test_a_capture_is_its_model_too():
    model, _ = make()
    net = fxlocal.capture(model.eval())
    torch.testing.assert_close(fx.Interpreter(net).run(X), model(X))
    assert [n.op for n in net.graph.nodes].count("call_function") == 1


@pytest.mark.parametrize("tool", ["split_module", "transformer", "graph_module"])
def test_what_a_tool_makes_has_the_models_state(tool):
    model, net = make()
    made = TOOLS[tool](net.eval())
    assert {id(p) for p in made.parameters()} == {id(p) for p in model.parameters()}


def test_inputs_by_keyword_reach_the_source():
    model, net = make()
    net.eval()
    torch.testing.assert_close(net(X, scale=2.0), model(X, scale=2.0))


def test_hooks_of_the_model_run_in_evaluation_mode():
    model, net = make()
    model.register_forward_hook(lambda module, args, output: output + 1)
    net.eval()
    for run in (net, fx.Interpreter(net).run, copy.deepcopy(net)):
        torch.testing.assert_close(run(X), model(X))


def test_the_graph_of_training_is_there_again_in_train_mode():
    _, net = make()
    trained, code = str(net.graph), net.code
    graph = net.eval().graph
    graph.lint()
    assert "normalised_add_" not in str(graph)
    assert net.graph is graph
    assert net.code == code
    assert str(net.train().graph) == trained


@pytest.mark.parametrize("plan", PLANS)
def test_transform_is_the_same_of_a_model_in_evaluation_mode(plan):
    _, trained = make(plan)
    torch.manual_seed(0)
    model = Net().eval()
    model.norm.train()
    net = fxlocal.transform(model, PLANS[plan], X)
    assert net.code == trained.code
    assert [name for name, m in model.named_modules() if m.training] == ["norm"]
    assert str(net.train().graph) == str(trained.graph)


@pytest.mark.parametrize("plan", PLANS)
def test_a_network_is_printed_as_it_trains_in_either_mode(plan):
    model, net = make(plan)
    printed = fxlocal.format_graph(net)
    model.eval()
    model.norm.train()
    assert fxlocal.format_graph(net) == printed
    assert [name for name, m in model.named_modules() if m.training] == ["norm"]


def test_stages_are_found_in_evaluation_mode():
    _, net = make("modules")
    names = [stage.outputs for stage in find_stages(net)]
    assert [stage.outputs for stage in find_stages(net.eval())] == names


SCHEDULES = [
    *(Dynamic(4, alpha=1, shift=0.4, rule=Hebbian(0.1), align=False), Static(epochs=4)),
    Constant(PLANS["modules"]),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
def test_an_epoch_may_begin_and_end_in_evaluation_mode(schedule):
    drivers = []
    for evaluated in (False, True):
        torch.manual_seed(0)
        model = Net()
        driver = fxlocal.Driver(model, schedule, example_inputs=(X,))
        driver.optimizer = torch.optim.SGD(driver.parameters(), lr=0.1)
        target = {"target": torch.zeros(4, dtype=torch.long)} if driver.heads else {}
        for _ in range(3):
            model.train(not evaluated)
            driver.start_epoch()
            model.train()
            result = driver.network()(X, **target)
            loss = result[1] if target else result.square().mean()
            loss.backward()
            driver.optimizer.step()
            driver.optimizer.zero_grad()
            driver.observe(loss)
            model.train(not evaluated)
            driver.end_epoch()
            driver.load_state_dict(driver.state_dict())
        drivers.append(driver)
    one, other = drivers
    assert one.history == other.history
    assert one.losses == other.losses
    torch.testing.assert_close(dict(one.model.state_dict()), dict(other.model.state_dict()))


def test_a_driver_can_be_made_in_evaluation_mode():
    model, _ = make()
    driver = fxlocal.Driver(model.eval(), fxlocal.schedules.Constant(PLANS["hebbian"]))
    driver.start_epoch()
    with pytest.warns(UserWarning, match="in evaluation mode"):
        net = driver.network()
    torch.testing.assert_close(net(X), model(X))
    before = model.conv1.weight.clone()
    model.train()
    driver.network()(X)
    assert not torch.equal(before, model.conv1.weight)

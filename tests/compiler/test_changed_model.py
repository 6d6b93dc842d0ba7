"""A model that changes after `transform`: frozen, thawed, given other modules, or checkpointed."""

import copy

import pytest
import torch
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import fxlocal
from fxlocal import Driver, Freeze, Hebbian, LocalPrefix, Oja, Plan, Random, Zero, schedules


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(4, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))),
        *(nn.ReLU(), nn.Linear(8, 2)),
    )


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
PLAN = Plan(local=LocalPrefix(until="4", rule=Hebbian(0.1)))


def moved(model, forward):
    """Return the paths of the weights that a forward moves."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    forward()
    return [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]


# --- frozen and thawed ---------------------------------------------------------------------------


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("rule", "compiled"),
    [
        *((rule, False) for rule in (Hebbian(0.1), Oja(0.1), Hebbian(0.1, relative=True))),
        (Oja(0.1, relative=True), True),
    ],
    ids=str,
)
def test_a_weight_learns_while_it_is_not_frozen(rule, compiled):
    model = make_model()
    net = fxlocal.transform(model, Plan(local=LocalPrefix(until="4", rule=rule)))
    run = torch.compile(net, backend="eager", fullgraph=True) if compiled else net
    assert moved(model, lambda: run(X)) == ["0.weight", "2.0.weight"]
    model[2].requires_grad_(False)
    assert moved(model, lambda: run(X)) == ["0.weight"]
    model[2].requires_grad_(True)
    model[0].weight.requires_grad = False
    assert moved(model, lambda: run(X)) == ["2.0.weight"]
    model.requires_grad_(False)
    with pytest.warns(fxlocal.NoEffectWarning, match="insert_local_updates"):
        assert moved(model, lambda: run(X)) == []
    model.requires_grad_(True)
    assert moved(model, lambda: run(X)) == ["0.weight", "2.0.weight"]


def test_the_step_after_is_that_of_a_network_made_then():
    model, other = make_model(), make_model()
    net = fxlocal.transform(model, PLAN)
    for one in (model, other):
        one[0].requires_grad_(False)
    fresh = fxlocal.transform(other, PLAN)
    for network in (net, fresh):
        network(X).square().sum().backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        assert (a.grad is None) == (b.grad is None)
    assert net.code == fresh.code
    assert fxlocal.explain(net) == fxlocal.explain(fresh)


@pytest.mark.parametrize("frozen_at_first", [False, True])
def test_rate_and_counters_outlive_the_new_graph(frozen_at_first):
    model = make_model()
    model.requires_grad_(not frozen_at_first)
    model[4].requires_grad_(True)
    model[2].requires_grad_(True)
    net = fxlocal.transform(model, PLAN)
    net.additions["rate"].fill_(0.5)
    own = net.additions["rate"]
    model[0].requires_grad_(frozen_at_first)
    before = model[2][0].weight.detach().clone()
    net(X)
    assert net.additions["rate"] is own
    assert float((model[2][0].weight - before).norm().detach()) == pytest.approx(0.5, rel=1e-5)


def test_freezing_what_the_plan_leaves_alone_keeps_the_graph():
    model = make_model()
    net = fxlocal.transform(model, PLAN)
    graph = net.graph
    model[4].requires_grad_(False)
    net(X)
    assert net.graph is graph


@pytest.mark.parametrize("compile", [False, {"backend": "eager"}], ids=["eager", "compiled"])
def test_a_driver_sees_what_is_frozen_between_epochs_and_steps(compile):
    model = make_model()
    driver = Driver(model, schedules.Constant(PLAN), compile=compile)
    for frozen in ([0], [], [0, 2], [2]):
        driver.start_epoch()
        model.requires_grad_(True)
        for i in frozen:
            model[i].requires_grad_(False)
        left = [n for i, n in ((0, "0.weight"), (2, "2.0.weight")) if i not in frozen]
        assert moved(model, lambda: driver.network()(X)) == left
        model.requires_grad_(True)
        assert moved(model, lambda: driver.network()(X)) == ["0.weight", "2.0.weight"]
        driver.end_epoch()


def test_a_copy_sees_what_is_frozen_of_its_own_model():
    model = make_model()
    net = fxlocal.transform(model, PLAN)
    twin = copy.deepcopy(net)
    model.requires_grad_(False)
    twin.source_model[0].requires_grad_(False)
    assert moved(twin, lambda: twin(X)) == ["2.0.weight"]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_made_after_freezing_sees_it(copied):
    net = fxlocal.transform(make_model(), PLAN)
    net.get_parameter("0.weight").requires_grad_(False)
    assert moved(other := copied(net), lambda: other(X)) == ["2.0.weight"]


def test_tensors_that_stand_in_for_parameters_freeze_nothing():
    model = make_model()
    net = fxlocal.transform(model, PLAN)
    graph, values = net.graph, {n: p.detach().clone() for n, p in net.named_parameters()}
    before = values["0.weight"].clone()
    torch.func.functional_call(net, values, X)
    assert net.graph is graph
    assert not torch.equal(values["0.weight"], before)


def test_a_checkpoint_of_other_frozen_parameters_is_refused():
    driver = Driver(make_model(), schedules.Constant(PLAN))
    state = driver.state_dict()
    driver.model[2].requires_grad_(False)
    with pytest.raises(fxlocal.CheckpointError, match=r"another frozen: .*'2\.0\.weight'"):
        driver.load_state_dict(state)
    driver.model[2].requires_grad_(True)
    driver.load_state_dict(state)
    del state["fingerprint"]["frozen"]  # of before it was part of it
    driver.load_state_dict(state)


# --- other modules -------------------------------------------------------------------------------


def replace_head(model):
    model[4] = nn.Linear(8, 3)
    return "4"


def replace_inside(model):
    model[2][0] = nn.Linear(8, 8)
    return "2.0"


def add_child(model):
    model.append(nn.ReLU())
    return "5"


def remove_child(model):
    del model[3]
    return "3"


def convert_norms(model):
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return "2.1"


def quantize(model):
    quantize_dynamic(model, {nn.Linear}, inplace=True).train()
    return "0"


def prune_layer(model):
    prune.l1_unstructured(model[0], "weight", 0.5)
    return "0"


def parametrize(model):
    parametrizations.weight_norm(model[2][0])
    return "2.0"


def compile_child(model):
    model[2] = torch.compile(model[2], backend="eager")
    return "2"


CHANGES = [
    *(replace_head, replace_inside, add_child, remove_child, convert_norms),
    *(quantize, prune_layer, parametrize, compile_child),
]
PLANS = [
    Plan(),
    PLAN,
    Plan(local=LocalPrefix(until="4", rule=Freeze(), norm="eval")),
    Plan(weight_grads={"2.0": Random()}),
]


@pytest.mark.sample(14)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("plan", PLANS, ids=["nothing", "hebbian", "freeze", "random"])
def test_a_graph_of_other_modules_does_not_train(change, plan):
    model = make_model()
    net = fxlocal.transform(model, plan)
    twin = copy.deepcopy(net)
    path = change(model)
    state = copy.deepcopy(model.state_dict())
    for run in (net, torch.compile(net, backend="eager")):
        with pytest.raises(RuntimeError, match=f"'{path}' is another module.*Transform the model"):
            run(X)
    after = model.state_dict()
    assert all(torch.equal(after[n], v) for n, v in state.items() if torch.is_tensor(v))
    twin(X)  # a copy of before
    net.eval()
    torch.testing.assert_close(net(X), model(X), rtol=0, atol=0)
    assert list(net.state_dict()) == list(model.state_dict())
    assert [type(m) for m in net.children()][:-1] == [type(m) for m in model.children()]


def test_a_copy_of_a_changed_model_does_not_train_either():
    model = make_model()
    net = fxlocal.transform(model, PLAN)
    replace_head(model)
    with pytest.raises(RuntimeError, match="'4' is another module"):
        copy.deepcopy(net)(X)
    with pytest.raises(RuntimeError, match="'4' is another module"):
        fxlocal.transform(net, Plan())


def test_a_changed_model_can_be_transformed_again():
    model = make_model()
    fxlocal.transform(model, PLAN)
    replace_head(model)
    convert_norms(model)
    net = fxlocal.transform(model, PLAN)
    assert type(net.get_submodule("2.1")) is nn.SyncBatchNorm
    assert net.eval()(X).shape == (6, 3)


def test_a_driver_says_that_the_model_has_changed():
    model = make_model()
    driver = Driver(model, schedules.Constant(PLAN))
    driver.start_epoch()
    driver.network()(X)
    replace_head(model)
    with pytest.raises(RuntimeError, match=r"'4' is another module.*make a new Driver"):
        driver.network()(X)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_put_into_the_network_reaches_the_model():
    model = make_model()
    net = fxlocal.transform(model, PLAN).eval()
    twin = quantize_dynamic(net, {nn.Linear})
    torch.testing.assert_close(twin(X), quantize_dynamic(model, {nn.Linear})(X))
    assert torch.equal(net(X), model(X))
    net.add_module("4", nn.Linear(8, 3))
    assert net(X).shape == model(X).shape == (6, 3)
    with pytest.raises(RuntimeError, match="'4' is another module"):
        net.train()(X)


def test_what_lies_inside_a_leaf_may_change():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner = nn.Linear(4, 4), make_model()

        def forward(self, x):
            return self.inner(self.first(x))

    model = Outer()
    net = fxlocal.capture(model, leaf_modules=(nn.Sequential,))
    replace_head(model.inner)
    assert net(X).shape == model(X).shape == (6, 3)


def test_other_parameters_under_the_same_names_are_used():
    model = make_model()
    net = fxlocal.transform(model, PLAN)
    model[0].weight = nn.Parameter(torch.zeros(8, 4))
    assert moved(model, lambda: net(X)) == ["0.weight", "2.0.weight"]


# --- activation checkpointing around it ----------------------------------------------------------


def compiled(net):
    return torch.compile(net, backend="eager")


def compiled_in_place(net):
    net.compile(backend="eager")
    return net


def called_before(net):
    run = compiled(net)
    run(X).sum().backward()
    return run


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("make_run", [compiled, compiled_in_place, called_before])
def test_checkpointing_around_a_compiled_network_is_refused(make_run, reentrant):
    model = make_model()
    run, x = make_run(fxlocal.transform(model, PLAN)), X.clone().requires_grad_()

    def step():
        with pytest.raises(RuntimeError, match="activation checkpointing around a network"):
            checkpoint(run, x, use_reentrant=reentrant).sum().backward()

    assert moved(model, step) == []


def test_checkpointing_around_a_drivers_compiled_network_is_refused():
    driver = Driver(make_model(), schedules.Constant(PLAN), compile={"backend": "eager"})
    driver.start_epoch()
    with pytest.raises(RuntimeError, match="activation checkpointing around a network"):
        checkpoint(driver.network(), X, use_reentrant=False)


def test_checkpointing_around_what_learns_by_gradients_alone_is_exact():
    one, other = make_model(), make_model()
    plan = Plan(weight_grads={"2.0": Zero()})
    run = torch.compile(fxlocal.transform(one, plan, X), backend="eager")
    checkpoint(run, X, use_reentrant=False).sum().backward()
    fxlocal.transform(other, plan, X)(X).sum().backward()
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)

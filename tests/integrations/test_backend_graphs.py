"""`fxlocal.backend` where Dynamo makes several graphs, makes them anew, or shows no model."""

import copy
import pickle

import pytest
import torch
from support import laws
from support.nets import NETS
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxlocal
from fxlocal import (
    Checkpoint,
    Freeze,
    Hebbian,
    LinearHead,
    LocalModules,
    LocalPrefix,
    NoEffectWarning,
    Plan,
    PlanError,
    TopK,
    Zero,
)

pytestmark = pytest.mark.usefixtures("fresh_compiler")

HEBBIAN = Hebbian(rate=0.05)


class Detector(nn.Module):
    """A backbone, then as many heads as the values say, and a break between them."""

    def __init__(self, heads=2):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)
        )
        self.neck = nn.Conv2d(4, 4, 1)
        self.heads = nn.ModuleList(nn.Linear(4, 5) for _ in range(heads))

    def forward(self, x):
        x = self.neck(torch.relu(self.backbone(x))).mean((2, 3))
        for head in self.heads[: 1 + int(x.sum().item() > -1e9)]:
            x = torch.cat([x[:, :1], head(x[:, :4])[:, :3]], 1)
        return x


def detector():
    torch.manual_seed(0)
    return Detector()


def batch():
    return NETS["chain"].inputs()


def prefix(until, rule=HEBBIAN, **others):
    return Plan(local=LocalPrefix(until, rule), **others)


def moved(model, before):
    return [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]


@pytest.mark.parametrize(
    ("until", "rule"), [("neck", HEBBIAN), ("backbone.3", Freeze())], ids=["hebbian", "freeze"]
)
def test_a_model_that_breaks_learns_by_its_plan(until, rule):
    """Its backbone alone, as transform has it learn, is the oracle."""
    model, (x,) = detector(), batch()
    other = copy.deepcopy(model)
    with pytest.raises(fxlocal.CaptureError):
        fxlocal.transform(model, prefix(until, rule))
    by_plan = fxlocal.backend(prefix(until, rule, weight_grads={"heads.1": Zero()}), "aot_eager")
    net = torch.compile(model, backend=by_plan)
    body = fxlocal.transform(
        nn.Sequential(other.backbone, nn.ReLU(), other.neck),
        prefix({"neck": "2", "backbone.3": "0.3"}[until], rule),
    )
    for _ in range(2):
        laws.step(net, (x,))
        y = body(x).mean((2, 3))
        for head in other.heads:
            z = nn.functional.linear(y[:, :4], *head.parameters())
            y = torch.cat([y[:, :1], z[:, :3]], 1)
        laws.loss_of(y).backward()
        other.heads[1].weight.grad.zero_()
        ours = laws.gradients(model), dict(model.state_dict())
        theirs = laws.gradients(other), dict(other.state_dict())
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert "'heads.1'" in repr(by_plan) and by_plan.explain().count("graph ") >= 2


class Plain(nn.Module):
    """Nothing in it asks for its mode, so that Dynamo alone would not look at it."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.fc = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(torch.relu(self.second(torch.relu(self.first(x)))))


def test_evaluation_moves_nothing_and_training_goes_on():
    model, x = Plain(), torch.randn(2, 8)
    net = torch.compile(model, backend=fxlocal.backend(prefix("fc"), "eager"))
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        net(x)
    net.eval()
    net(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not moved(model, state)
    net.train()
    net(x).sum().backward()
    assert moved(model, state) == ["first.weight", "second.weight"]
    assert [n for n, p in model.named_parameters() if p.grad is not None] == [
        "fc.weight",
        "fc.bias",
    ]
    state = copy.deepcopy(model.state_dict())
    model.eval()
    net(x)
    assert not moved(model, state)


def test_a_weight_that_is_frozen_or_thawed_counts_at_once():
    model, x = Plain(), torch.randn(2, 8)
    net = torch.compile(model, backend=fxlocal.backend(prefix("fc"), "eager"))
    for frozen in (True, False, True):
        model.second.weight.requires_grad_(not frozen)
        state = copy.deepcopy(model.state_dict())
        net(x)
        assert moved(model, state) == ["first.weight", "second.weight"][: 2 - frozen]


def test_another_model_of_the_class_learns_by_itself():
    x, by_plan = torch.randn(2, 8), fxlocal.backend(prefix("fc"), "eager")
    models = [Plain(), Plain()]
    for model in models:
        model.second.weight.grad = torch.ones_like(model.second.weight)
        state = [copy.deepcopy(one.state_dict()) for one in models]
        torch.compile(model, backend=by_plan)(x).sum().backward()
        assert moved(model, state[models.index(model)]) == ["first.weight", "second.weight"]
        assert model.second.weight.grad is None
    assert not moved(models[0], state[0])


@pytest.mark.parametrize("how", ["module", "in place", "function", "method", "sequential"])
def test_a_model_is_found_however_it_is_compiled(how):
    model, x, by_plan = Plain(), torch.randn(2, 8), fxlocal.backend(prefix("fc"), "eager")
    state = copy.deepcopy(model.state_dict())

    class Trainer:
        def __init__(self):
            self.model = model

        def step(self, x):
            return self.model(x)

    if how == "in place":
        model.compile(backend=by_plan)
        net = model
    elif how == "sequential":
        parts = [model.first, nn.ReLU(), model.second, nn.ReLU(), model.fc]
        by_plan = fxlocal.backend(prefix("4"), "eager")
        net = torch.compile(nn.Sequential(*parts), backend=by_plan)
    else:
        given = {"module": model, "function": lambda x: model(x), "method": Trainer().step}[how]
        net = torch.compile(given, backend=by_plan)
    net(x)
    assert moved(model, state) == ["first.weight", "second.weight"]


def test_a_penalty_leaves_no_gradient_before_the_boundary():
    model, x = Plain(), torch.randn(2, 8)
    net = torch.compile(model, backend=fxlocal.backend(prefix("fc", Freeze()), "eager"))
    (net(x).sum() + sum(p.square().sum() for p in model.parameters())).backward()
    assert [n for n, p in model.named_parameters() if p.grad is not None] == [
        "fc.weight",
        "fc.bias",
    ]


def test_checkpointing_around_local_updates_is_refused():
    model, x = Plain(), torch.randn(2, 8, requires_grad=True)
    net = torch.compile(model, backend=fxlocal.backend(prefix("fc"), "eager"))
    net(x)
    with pytest.raises(RuntimeError, match="activation checkpointing around"):
        checkpoint(net, x, use_reentrant=False)


def test_equal_plans_are_one_backend():
    one = fxlocal.backend(prefix("fc"))
    assert one is fxlocal.backend(plan=prefix("fc"), inner="inductor")
    assert one is pickle.loads(pickle.dumps(one)) is copy.deepcopy(one)
    assert one is not fxlocal.backend(prefix("fc"), "eager")
    assert one is not fxlocal.backend(prefix("fc", Freeze()))


MODULES = LocalModules(2, head=LinearHead(), num_classes=5)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (prefix(2), r"until=2: .*Give the path of a layer"),
        (prefix(0), r"until=0: "),
        (prefix(0.5), r"until=0.5: "),
        (Plan(modules=MODULES), r"LocalModules\(.*Use fxlocal.transform"),
        (Plan(checkpoint=Checkpoint(2)), r"Checkpoint\(.*Use fxlocal.transform"),
        ("layer3", "give a Plan"),
    ],
)
def test_what_a_backend_cannot_do_is_refused_at_once(plan, words):
    with pytest.raises(PlanError, match=words):
        fxlocal.backend(plan)


def test_an_unknown_compiler_is_refused_at_once():
    with pytest.raises(Exception, match="inducter"):
        fxlocal.backend(Plan(), inner="inducter")
    with pytest.raises(PlanError, match=r"inner=.*hash"):
        fxlocal.backend(Plan(), inner=[])


class Broken(Plain):
    """A graph break before the layer called ``at``."""

    def __init__(self, at, tied=False):
        super().__init__()
        self.at, self.norm = at, nn.LayerNorm(8)
        if tied:
            self.fc = self.first

    def forward(self, x):
        x = self.norm(x)
        if self.at == "first":
            torch._dynamo.graph_break()
        x = torch.relu(self.first(x))
        if self.at == "second":
            torch._dynamo.graph_break()
        x = torch.relu(self.second(x))
        if self.at == "fc":
            torch._dynamo.graph_break()
        return self.fc(x)


def refusal(model, plan):
    torch._dynamo.reset()
    net = torch.compile(model, backend=fxlocal.backend(plan, "eager"))
    with pytest.raises(PlanError) as caught:
        net(torch.randn(2, 8))
    return str(caught.value)


def test_a_plan_that_does_not_fit_the_graphs_is_refused_by_name():
    assert "Nearest: 'second'" in refusal(Plain(), prefix("secnd"))
    grads = Plan(weight_grads={"thrid": TopK(1)})
    assert "weight_grads['thrid']" in refusal(Plain(), grads)
    inside = prefix("second", weight_grads={"first": Zero()})
    assert "inside the local prefix" in refusal(Plain(), inside)
    late = refusal(Broken("second"), prefix("fc"))
    assert "until='fc' is not in the first graph with layers" in late
    assert "1 layer, 'first'" in late and "graph 0/0 of forward (test_backend_graphs.py" in late
    assert "and 1 more outside" in refusal(Broken("first"), prefix("second"))


def test_a_frozen_part_may_run_before_the_graph_of_the_boundary():
    model, x = Broken("first"), torch.randn(2, 8)
    model.norm.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    torch.compile(model, backend=fxlocal.backend(prefix("fc"), "eager"))(x).sum().backward()
    assert moved(model, state) == ["first.weight", "second.weight"]


def test_weights_tied_over_the_boundary_are_refused_unless_frozen():
    tied = Plain()
    tied.fc = nn.Linear(8, 8)
    tied.fc.weight = tied.first.weight
    assert "Tied weights must lie on one side" in refusal(tied, prefix("second"))
    apart = refusal(Broken("fc", tied=True), prefix("second"))
    assert "'first.bias', which also lies before the boundary at 'second'" in apart
    frozen = Broken("fc", tied=True)
    frozen.first.requires_grad_(False)
    torch.compile(frozen, backend=fxlocal.backend(prefix("second"), "eager"))(torch.randn(2, 8))


def test_a_function_of_two_models_is_refused():
    student, teacher, x = Plain(), Plain(), torch.randn(2, 8)
    by_plan = fxlocal.backend(prefix("fc"), "eager")
    net = torch.compile(lambda x: student(x) - teacher(x), backend=by_plan)
    with pytest.raises(PlanError, match="calls 2 models, Plain, Plain: which"):
        net(x)
    weight = nn.Parameter(torch.randn(4, 8))
    net = torch.compile(lambda x: nn.functional.linear(x, weight), backend=by_plan)
    with pytest.raises(PlanError, match="shows no module that has it"):
        net(x)


class Uncompiled(Plain):
    def forward(self, x):
        return self.fc(self.unseen(self.first(x)))

    @torch._dynamo.disable
    def unseen(self, x):
        return torch.relu(self.second(x))


def test_a_layer_that_is_in_no_graph_is_warned_of():
    plan = Plan(weight_grads={"second": Zero(), "fc": Zero()})
    net = torch.compile(Uncompiled(), backend=fxlocal.backend(plan, "eager"))
    with pytest.warns(NoEffectWarning, match="weight_grads of 'second': .* no graph of Uncompiled"):
        net(torch.randn(2, 8)).sum().backward()


def test_explain_shows_each_graph():
    by_plan = fxlocal.backend(prefix("second", Freeze(), weight_grads={"fc": Zero()}), "eager")
    assert "no graph was compiled yet" in by_plan.explain()
    net = torch.compile(Broken("fc"), backend=by_plan)
    net(torch.randn(2, 8))
    net.eval()(torch.randn(2, 8))
    text = by_plan.explain()
    assert "graph 0/0 of forward (test_backend_graphs.py" in text
    assert "2 layers, 'first' to 'second'" in text
    assert "call_method detach(%" in text and "fxlocal.linear_zero" in text
    assert "evaluation: as it is" in text


@pytest.mark.slow
@pytest.mark.parametrize("mixed", [False, True])
def test_batches_of_any_size_train_as_the_network_does(mixed):
    model = Plain()
    other = copy.deepcopy(model)
    plan = prefix("second", weight_grads={"fc": TopK(1)})
    net = torch.compile(model, backend=fxlocal.backend(plan, "aot_eager"))
    network = fxlocal.transform(other, plan)
    for size in (2, 5, 3, 7):
        x = torch.randn(size, 4, 8)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            ours, theirs = laws.step(net, (x,)), laws.step(network, (x,))
        close = {"rtol": 0.02, "atol": 0.02} if mixed else {}  # bfloat16 has 8 bits
        torch.testing.assert_close(ours, theirs, **close)
        torch.testing.assert_close(laws.gradients(model), laws.gradients(other), **close)
        torch.testing.assert_close(dict(model.state_dict()), dict(other.state_dict()), **close)

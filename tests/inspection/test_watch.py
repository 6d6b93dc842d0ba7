"""What is seen of a step in networks of every form: exported, cast, compiled, of a driver."""

import pytest
import torch
import torch.nn.functional as F
from support.captures import ByShape
from support.nets import NETS, Written
from torch import nn

import fxlocal
from fxlocal import Freeze, Hebbian, LocalPrefix, Plan, schedules

RATE = 1e-3


def local(until=2, rule=Hebbian(RATE), norm="train"):  # noqa: B008
    return Plan(local=LocalPrefix(until=until, rule=rule, norm=norm))


def rewritten(name, plan):
    """The network of a net with ``plan``, and a batch."""
    return fxlocal.transform(NETS[name].build(), plan), NETS[name].inputs()


def column(verification, name):
    return [getattr(layer, name) for layer in verification.layers]


def test_each_call_of_a_module_has_a_name():
    net, inputs = rewritten("shared", local(3))
    found = fxlocal.verify(net, *inputs).as_dict()
    assert list(found) == ["stem", "conv", "conv#2", "fc"]
    assert [found[name]["weight_gradient_kernels"] for name in found] == [1, 1, 1, 1]
    assert found["conv"]["moved"] == found["conv#2"]["moved"] == pytest.approx(RATE, rel=1e-3)
    assert found["stem"]["has_gradient"] is False and found["fc"]["trained_by"]


@pytest.mark.parametrize("rule", [Hebbian(RATE), Freeze()], ids=["hebbian", "freeze"])
@pytest.mark.parametrize("norm", ["train", "eval"])
def test_an_exported_graph_reports_what_a_traced_one_does(rule, norm):
    inputs = NETS["chain"].inputs()
    plan = local(rule=rule, norm=norm)
    exported = fxlocal.transform(ByShape(NETS["chain"].build()), plan, *inputs)
    assert not any(node.op == "call_module" for node in exported.graph.nodes)
    found = fxlocal.verify(exported, *inputs).as_dict()
    expected = fxlocal.verify(fxlocal.transform(NETS["chain"].build(), plan), *inputs).as_dict()
    for path, facts in expected.items():
        assert found[f"net.{path}"] == {
            **{name: pytest.approx(value) if value else value for name, value in facts.items()},
            **{"path": f"net.{path}", "kind": facts["kind"], "trained_by": facts["trained_by"]},
        }


def test_under_autocast_the_products_are_counted_too():
    for name in ("chain", "tokens"):
        net, inputs = rewritten(name, local())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = fxlocal.verify(net, *inputs)
        assert column(found, "weight_gradient_kernels") == [1] * 4
        assert column(found, "trained_by") == ["local rule"] * 2 + ["back-propagation"] * 2


def test_the_models_own_contexts_are_kept():
    def mixed(net, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = net.one(x)
        return net.two(x.float())

    dtypes = []
    model, x = Written(mixed, one=nn.Linear(4, 4), two=nn.Linear(4, 4)), torch.randn(3, 4)
    model.one.register_forward_hook(lambda *call: dtypes.append(call[2].dtype))
    assert column(fxlocal.verify(model, x), "weight_gradient_kernels") == [1, 1]
    assert dtypes == [torch.bfloat16]
    assert not torch.is_autocast_enabled("cpu")


def test_a_computed_weight_is_reported_by_what_it_is_computed_from():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))
            self.w = nn.Parameter(torch.randn(3, 6))

        def forward(self, x):
            return F.linear(self.normed(x).relu(), self.w * 2)

    found = fxlocal.verify(Scaled(), torch.randn(5, 4))
    assert column(found, "trained_by") == ["back-propagation"] * 2
    assert column(found, "weight_gradient_kernels") == [1, 1]


def test_a_compiled_network_is_the_graph_inside_it():
    net, inputs = rewritten("chain", local())
    expected = fxlocal.verify(net, *inputs)
    assert fxlocal.verify(torch.compile(net, backend="eager"), *inputs) == expected


@pytest.mark.parametrize("compiled", [False, {"backend": "eager"}])
def test_a_drivers_network(compiled):
    model, inputs = NETS["chain"].build(), NETS["chain"].inputs()
    driver = fxlocal.Driver(model, schedules.Constant(local()), compile=compiled)
    driver.start_epoch()
    found = fxlocal.verify(driver.network(), *inputs)
    assert column(found, "trained_by") == ["local rule"] * 2 + ["back-propagation"] * 2


def test_a_network_in_evaluation_mode_is_verified_in_train_mode():
    net, inputs = rewritten("dropout", local())
    trained = fxlocal.verify(net, *inputs)
    net.eval()
    with torch.no_grad(), pytest.warns(UserWarning, match="evaluation mode"):
        assert fxlocal.verify(net, *inputs) == trained
    assert not net.training


def test_the_heads_of_local_modules_are_reported():
    torch.manual_seed(0)
    layers = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)
    model, x, target = nn.Sequential(*layers), torch.ones(3, 4), torch.zeros(3, dtype=torch.long)
    plan = fxlocal.Plan(modules=fxlocal.LocalModules(2, balance="blocks", num_classes=2))
    net = fxlocal.transform(model, plan, x)
    (head,) = fxlocal.verify(net, x, target).heads
    assert head.moved == pytest.approx(0.1 * head.gradient, rel=1e-4)  # plain SGD's
    without = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(fxlocal.NoEffectWarning, match="nothing trained the head of module 0"):
        assert fxlocal.verify(net, x, target, optimizer=without).heads[0].moved == 0

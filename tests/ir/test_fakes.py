"""One run on fake tensors: what each node makes and computes, in the graph's own contexts."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from support.nets import NETS
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fxlocal
from fxlocal import LocalModules, Plan, format_graph
from fxlocal.facts import TensorSpec
from fxlocal.ir.fakes import run_on_fakes
from fxlocal.ir.operators import is_container, is_plain


class Everything(nn.Module):
    """A size, a container, a leaf module that returns a tuple, a context."""

    def __init__(self):
        super().__init__()
        self.fc, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        x, _ = self.attend(x, x, x)
        with torch.autocast("cpu", torch.bfloat16):
            a, b = self.fc(x).chunk(2, dim=1)
        return (a + b) * self.scale, x.size(0), a.dtype


def specs(value):
    return (
        TensorSpec(
            tuple(value.shape), str(value.dtype)[6:], value.device.type, tuple(value.stride())
        )
        if isinstance(value, torch.Tensor)
        else value
    )


# --- values --------------------------------------------------------------------------------------


def test_each_node_keeps_what_it_makes():
    captured = fxlocal.capture(Everything())
    run = run_on_fakes(captured, (torch.zeros(3, 6, 4),))
    assert_expected_inline(
        format_graph(captured),
        """\
%x: float32[3, 6, 4] = placeholder x
%attend = call_module attend(%x, %x, %x)
%getitem: float32[3, 6, 4] = call_function getitem(%attend, 0)
%getitem_1: float32[3, 6, 6] = call_function getitem(%attend, 1)
with torch.autocast('cpu', dtype=torch.bfloat16, enabled=True):
%fc: bfloat16[3, 6, 4] = call_module fc(%getitem)
%chunk = call_method chunk(%fc, 2, dim=1)
%getitem_2: bfloat16[3, 3, 4] = call_function getitem(%chunk, 0)
%getitem_3: bfloat16[3, 3, 4] = call_function getitem(%chunk, 1)
end torch.autocast('cpu', dtype=torch.bfloat16, enabled=True)
%add: bfloat16[3, 3, 4] = call_function add(%getitem_2, %getitem_3)
%scale: float32[4] = get_attr scale
%mul: float32[3, 3, 4] = call_function mul(%add, %scale)
%size = call_method size(%getitem, 0)
%getattr_1 = call_function getattr(%getitem_2, 'dtype')
output (%mul, %size, %getattr_1)""",
    )
    assert run.values["size"] == 3 and run.values["getattr_1"] is torch.bfloat16
    assert run.values["fc"] == TensorSpec((3, 6, 4), "bfloat16", "cpu", (24, 4, 1))
    assert run.values == {n.name: n.meta["val"] for n in captured.graph.nodes if n.op != "output"}


@pytest.mark.sample(5)
@pytest.mark.parametrize("name", NETS)
def test_values_are_those_of_a_real_run(name):
    model, inputs = NETS[name].build(), NETS[name].inputs()
    captured = fxlocal.capture(model, *inputs)
    run = run_on_fakes(captured, inputs)
    made = {}

    class Real(torch.fx.Interpreter):
        def run_node(self, n):
            made[n.name] = result = super().run_node(n)
            return result

    with torch.enable_grad():
        Real(copy.deepcopy(captured)).run(*inputs)
    made.pop("output")
    assert run.values == {
        node: torch.utils._pytree.tree_map(specs, value) for node, value in made.items()
    }


def test_what_is_no_tensor_and_what_a_container_is_known_exactly():
    class Odd(nn.Module):  # a leaf from outside torch
        def forward(self, x):
            return x, 2

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.odd, self.fc = Odd(), nn.Linear(4, 2)

        def forward(self, x):
            both = self.odd(x)
            return self.fc(both[0] * both[1])

    x = torch.zeros(3, 4)
    for inputs, expected in (((), [True, False, False, False]), ((x,), [True, False, False, True])):
        captured = fxlocal.capture(Model(), leaf_modules=(Odd,))
        if inputs:
            run_on_fakes(captured, inputs)
        odd, *items = [n for n in captured.graph.nodes if n.name.startswith(("odd", "getitem"))]
        found = [is_container(captured, odd), is_plain(odd), *map(is_plain, items)]
        assert found == expected


def test_a_value_of_a_strange_kind_is_left_out():
    class Pair:
        def __init__(self, x):
            self.first = x

    class Strange(nn.Module):
        def forward(self, x):
            return Pair(x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.odd, self.fc = Strange(), nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(self.odd(x).first)

    captured = fxlocal.capture(Model(), leaf_modules=(Strange,))
    run = run_on_fakes(captured, (torch.zeros(3, 4),))
    assert "odd" not in run.values and run.values["fc"].shape == (3, 2)


# --- graphs that carry values --------------------------------------------------------------------

MODULES = Plan(modules=LocalModules(2, num_classes=5, link=1))


def test_the_same_plan_gives_the_same_text_whatever_becomes_of_the_network():
    model, inputs = NETS["residual"].build(), NETS["residual"].inputs()
    network = fxlocal.transform(model, MODULES, *inputs)
    text = format_graph(network)
    assert "float32[2, " in text
    assert text == format_graph(fxlocal.transform(model, MODULES, *inputs))
    assert text == format_graph(copy.deepcopy(network)) == format_graph(network.clone())
    assert text == format_graph(pickle.loads(pickle.dumps(network)))


def test_values_hold_neither_the_model_nor_tensors():
    model, inputs = NETS["residual"].build(), NETS["residual"].inputs()
    captured = fxlocal.capture(model)
    run = run_on_fakes(captured, inputs)
    assert len(pickle.dumps(run)) < 20_000
    gone = weakref.ref(model)
    del model, captured
    gc.collect()
    assert gone() is None


def test_without_inputs_nothing_is_known():
    captured = fxlocal.capture(NETS["chain"].build())
    fxlocal.analyze(captured)
    assert not [node for node in captured.graph.nodes if "val" in node.meta]


# --- state ---------------------------------------------------------------------------------------


def test_a_norm_that_averages_over_all_batches():
    """It reads the number of batches, which is no shape."""
    norm = nn.BatchNorm1d(4, momentum=None)
    model = nn.Sequential(nn.Conv1d(3, 4, 3), norm, nn.ReLU(), nn.Conv1d(4, 2, 1))
    analysis = fxlocal.analyze(model, torch.zeros(2, 3, 8))
    assert [c.parameters for c in analysis.costs] == [40 + 8, 10]
    assert model[1].num_batches_tracked == 0


def test_a_number_in_the_state_is_its_own_and_stays():
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)
            self.register_buffer("step", torch.tensor(3))

        def forward(self, x):
            self.step.add_(1)
            return self.fc(x.repeat(self.step.item(), 1))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.steps, self.fc = Steps(), nn.Linear(2, 2)

        def forward(self, x):
            return self.fc(self.steps(x))

    model = Model()
    captured = fxlocal.capture(model, leaf_modules=(Steps,))
    assert run_on_fakes(captured, (torch.zeros(5, 4),)).values["fc"].shape == (20, 2)
    assert model.steps.step == 3


def test_the_callers_modes_do_not_matter():
    model, inputs = NETS["residual"].build(), NETS["residual"].inputs()
    expected = fxlocal.analyze(model, *inputs)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert fxlocal.analyze(model, *inputs) == expected


# --- attention -----------------------------------------------------------------------------------

B, HEADS, L, S, E, V = 2, 4, 16, 24, 8, 6
ATTENTION = 2 * B * HEADS * L * S * (E + E)
CALLS = {
    "plain": ({}, HEADS, E),
    "causal": ({"is_causal": True}, HEADS, E),
    "mask": ({"attn_mask": torch.zeros(L, S)}, HEADS, E),
    "mask of booleans": ({"attn_mask": torch.ones(L, S, dtype=torch.bool)}, HEADS, E),
    "dropout": ({"dropout_p": 0.5}, HEADS, E),
    "scale": ({"scale": 0.5}, HEADS, E),
    "fewer heads": ({"enable_gqa": True}, HEADS // 2, E),
    "other values": ({}, HEADS, V),
}


class Attend(nn.Module):
    def __init__(self, options, exported=False):
        super().__init__()
        self.options, self.exported = options, exported

    def forward(self, q, k, v):
        if self.exported and q.shape[1] > 2**10:  # which symbolic tracing cannot follow
            return q
        return F.scaled_dot_product_attention(q, k, v, **self.options)


@pytest.mark.sample(8)
@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_attention_counts_its_two_products(name, exported):
    options, heads, width = CALLS[name]
    inputs = (
        torch.zeros(B, HEADS, L, E),
        torch.zeros(B, heads, S, E),
        torch.zeros(B, heads, S, width),
    )
    expected = 2 * B * HEADS * L * S * (E + width)
    for learned in (False, True):  # another kernel may be chosen where no gradient is wanted
        for x in inputs:
            x.requires_grad_(learned)
        captured = fxlocal.capture(Attend(options, exported), *inputs)
        assert sum(run_on_fakes(captured, inputs).flops.values()) == expected


def test_attention_without_heads_counts_too():
    inputs = torch.zeros(B, L, E), torch.zeros(B, S, E), torch.zeros(B, S, E)
    captured = fxlocal.capture(Attend({}))
    assert sum(run_on_fakes(captured, inputs).flops.values()) == 2 * B * L * S * (E + E)


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("learned", [False, True])
def test_multi_head_attention_counts_the_same_however_it_computes(weights, training, learned):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend = nn.MultiheadAttention(E, HEADS, batch_first=True)

        def forward(self, x):
            return self.attend(x, x, x, need_weights=weights)[0]

    model = Model().requires_grad_(learned)
    model.attend.train(training)
    flops = run_on_fakes(fxlocal.capture(model), (torch.zeros(B, L, E),)).flops
    assert sum(flops.values()) == 2 * B * L * 4 * E * E + 2 * B * L * L * 2 * E


@pytest.mark.parametrize("name", ["flash", "efficient", "cudnn"])
def test_an_attention_of_the_gpu_counts_once(name):
    from fxlocal.ir.fakes import _FlopMeter

    with FakeTensorMode():
        q, k = (
            torch.empty(B, HEADS, L, E, device="meta"),
            torch.empty(B, HEADS, S, E, device="meta"),
        )
        call = getattr(torch.ops.aten, f"_scaled_dot_product_{name}_attention")
        args = (q, k, k) if name == "flash" else (q, k, k, None, False)
        with _FlopMeter() as meter:
            call(*args)
    assert meter.total == ATTENTION

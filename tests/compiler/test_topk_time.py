"""When TopK is predicted to be faster than the exact gradient, and what transform makes of it."""

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import laws
from support.copies import COPIES
from torch import nn

import fxlocal
from fxlocal import NoEffectWarning, Plan, PlanError, Random, TopK, Zero
from fxlocal.compiler.topk_time import predict_topk_time
from fxlocal.facts import ConvGeometry, Layer, Shapes, TopKTime

# --- laws of the prediction ----------------------------------------------------------------------


def predict(
    k, *, batch=8, inputs=16, outputs=16, size=(12, 10), taps=(3, 3), kind="conv",
    dtype="float32", device="cpu", channels_last=True,
):  # fmt: skip
    """Of a layer that keeps the map's size."""
    if kind == "conv":
        each = (1,) * len(size)
        geometry = ConvGeometry(each, tuple(t // 2 for t in taps), each, 1)
        pre, post, weight = (inputs, *size), (outputs, *size), (outputs, inputs, *taps)
    else:
        geometry, weight = None, (outputs, inputs)
        pre, post = (*size, inputs), (*size, outputs)
    batched = () if batch is None else (batch,)
    layer = Layer(0, "layer", kind, "layer", "layer.weight", "x", geometry)
    shapes = Shapes((*batched, *pre), (*batched, *post), weight, dtype, device, channels_last)
    return predict_topk_time(layer, shapes, k)


CASES = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 256),
        "inputs": st.sampled_from([1, 3, 16, 64, 512]),
        "outputs": st.sampled_from([1, 8, 64, 512]),
        "size": st.tuples(st.integers(2, 200), st.integers(2, 200)),
        "taps": st.sampled_from([(1, 1), (3, 3), (5, 1), (7, 7)]),
        "kind": st.sampled_from(["conv", "conv", "linear"]),
        "dtype": st.sampled_from(["float32", "bfloat16", "float16", "float64"]),
        "device": st.sampled_from(["cpu", "cuda"]),
        "channels_last": st.booleans(),
    }
)


@given(CASES)
def test_where_all_positions_are_kept_the_times_are_equal(case):
    time = predict(math.prod(case["size"]), **case)
    assert time.exact == time.topk > 0
    assert time.exact == predict(1, **case).exact  # which knows of no k


@given(CASES, st.sampled_from(["batch", "inputs", "outputs", "size"]), st.integers(1, 3))
def test_a_larger_layer_takes_longer_either_way(case, name, k):
    small = predict(k, **case)
    grown = tuple(2 * n for n in case["size"]) if name == "size" else 2 * case[name]
    large = predict(k, **{**case, name: grown})
    assert 0 < small.exact < large.exact < math.inf
    assert 0 < small.topk < large.topk < math.inf


@given(CASES, st.integers(1, 3))
def test_more_kept_positions_take_longer_and_channels_last_does_not(case, k):
    within = {**case, "size": (7, 11)}
    assert predict(k, **within).topk < predict(3 * k + 1, **within).topk
    last, first = (predict(k, **{**case, "channels_last": c}) for c in (True, False))
    assert last.topk <= first.topk and last.exact == first.exact
    assert predict(k, **case) == predict(k, **case)  # no clock is read


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_extremes(device, dtype):
    one = predict(1, batch=1, inputs=1, outputs=1, size=(2, 2), device=device, dtype=dtype)
    assert one.topk > 0.5 * one.exact  # there is nothing to gain
    wide = {"batch": 64, "inputs": 256, "outputs": 256, "device": device, "dtype": dtype}
    gains = []
    for side in (14, 56, 224):
        time = predict(1, size=(side, side), **wide)
        gains.append(time.exact / time.topk)
    assert gains == sorted(gains) and gains[-1] > 1
    many = predict(224 * 224 - 1, size=(224, 224), **wide)
    assert many.topk > many.exact  # a patch for each position


def test_without_a_batch_dimension_it_is_a_batch_of_one():
    for size, taps in (((40,), (3,)), ((20, 30), (3, 3)), ((4, 5, 6), (1, 1, 1))):
        assert predict(2, batch=None, size=size, taps=taps) == predict(
            2, batch=1, size=size, taps=taps
        )


# --- what transform makes of it ------------------------------------------------------------------

FASTER, SLOWER, EQUAL = TopKTime(2.0, 1.0), TopKTime(1.0, 2.0), TopKTime(1.0, 1.0)


@pytest.fixture
def predicted(monkeypatch):
    """Faster for the layers whose path begins with "fast", the same time for "equal"."""
    seen = []

    def predict(layer, shapes, k):
        seen.append((layer.path, k))
        return FASTER if layer.path[0] == "f" else EQUAL if layer.path[0] == "e" else SLOWER

    monkeypatch.setattr("fxlocal.compiler.resolve.predict_topk_time", predict)
    return seen


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fast, self.slow = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.equal, self.fast2 = nn.Conv2d(4, 4, 1), nn.Linear(4, 4)

    def forward(self, x):
        x = self.slow(torch.relu(self.fast(x)))
        return self.fast2(self.equal(x).flatten(2).mT)


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
ALL = ("fast", "slow", "equal", "fast2")


def replaced(net):
    """The paths whose layers an operator stands for."""
    return {
        node.meta["fxlocal"].layer
        for node in net.graph.nodes
        if node.op == "call_function" and "fxlocal" in node.meta
    }


def test_layers_that_would_not_be_faster_keep_their_exact_gradient(predicted):
    model, plain = Net(), Net()
    plain.load_state_dict(model.state_dict())
    net = fxlocal.transform(model, Plan(weight_grads=dict.fromkeys(ALL, TopK(2))), X)
    assert predicted == [(path, 2) for path in ALL]
    assert replaced(net) == {"fast", "fast2"}
    text = fxlocal.explain(net)
    assert "'slow': 'exact 1.00 ms, TopK 2.00 ms'" in text
    assert "'equal': 'exact 1.00 ms, TopK 1.00 ms'" in text
    assert "exact 2.00 ms" not in text
    laws.assert_equal(laws.step(net, (X,)), laws.step(plain, (X,)), "output")
    ours, theirs = laws.gradients(model), laws.gradients(plain)
    for name in ("slow.weight", "slow.bias", "equal.weight"):
        laws.assert_equal(ours[name], theirs[name], name)
    assert not torch.allclose(ours["fast.weight"], theirs["fast.weight"])


def test_the_scale_changes_no_decision(predicted):
    """It is a factor within the kernel that adds up, known when it runs: no time of its own."""
    net = fxlocal.transform(Net(), Plan(weight_grads=dict.fromkeys(ALL, TopK(2, None))), X)
    assert predicted == [(path, 2) for path in ALL]
    assert replaced(net) == {"fast", "fast2"}


def test_force_and_missing_example_inputs_apply_it_everywhere(predicted):
    forced = Plan(weight_grads=dict.fromkeys(ALL, TopK(2, force=True)))
    plan = Plan(weight_grads=dict.fromkeys(ALL, TopK(2)))
    for net in (fxlocal.transform(Net(), forced, X), fxlocal.transform(Net(), plan)):
        assert replaced(net) == set(ALL)
        assert "exact={}" in fxlocal.explain(net)
    assert predicted == []


def test_the_other_methods_are_not_asked_for(predicted):
    methods = {"slow": Zero(), "equal": Random(), "fast": TopK(1)}
    assert replaced(fxlocal.transform(Net(), Plan(weight_grads=methods), X)) == set(methods)
    assert predicted == [("fast", 1)]


def test_where_no_layer_is_left_explain_says_why(predicted):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        net = fxlocal.transform(Net(), Plan(weight_grads={"slow": TopK(1)}), X)
    assert replaced(net) == set()
    assert "'slow': 'exact 1.00 ms, TopK 2.00 ms'" in fxlocal.explain(net)


def test_a_k_that_does_not_fit_is_refused_wherever_it_is(predicted):
    for path in ("slow", "fast"):
        with pytest.raises(PlanError, match=f"'{path}', whose map of"):
            fxlocal.transform(Net(), Plan(weight_grads={path: TopK(37)}), X)


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_keeps_the_decisions(predicted, copied):
    net = fxlocal.transform(Net(), Plan(weight_grads=dict.fromkeys(ALL, TopK(2))), X)
    other = copied(net)
    assert fxlocal.format_graph(other) == fxlocal.format_graph(net)
    assert fxlocal.explain(other) == fxlocal.explain(net)


def test_a_real_prediction():
    """Nothing is computed: the images are one element, expanded."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 256, 3), nn.Conv2d(256, 256, 3))
    plan = Plan(weight_grads={"0": TopK(), "2": TopK()})
    net = fxlocal.transform(model, plan, torch.zeros(1).expand(64, 1, 114, 114))
    assert replaced(net) == {"2"}
    assert "exact={'0': 'exact" in fxlocal.explain(net)

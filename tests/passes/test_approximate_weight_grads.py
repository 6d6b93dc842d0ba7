"""The operators of approximated weight gradients in the place of layers."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from support import laws, oracle
from support.captures import ByShape
from support.copies import COPIES
from support.nets import NETS
from torch import nn

import fxlocal
from fxlocal import Freeze, Hebbian, LocalPrefix, Plan, Random, TopK, Zero, capture, diff_graphs
from fxlocal.ir.nodes import Origin
from fxlocal.ops.weight_grads import OPERATORS


def approximated(model, *inputs, **methods):
    """The capture and the rewritten network; ``__`` in a name stands for a dot."""
    captured = capture(model, *inputs)
    plan = Plan(weight_grads={name.replace("__", "."): m for name, m in methods.items()})
    return captured, fxlocal.transform(captured, plan, *inputs)


class InContext(nn.Module):
    """Layers in the model's own contexts; the one in bfloat16 pads its input."""

    def __init__(self):
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.narrow = nn.Conv2d(4, 4, 2, padding="same")

    def forward(self, x):
        with torch.no_grad():
            x = self.stem(x)
        with torch.autocast("cpu", torch.bfloat16):
            x = self.narrow(x)
        return self.last(x.float())


# --- golden --------------------------------------------------------------------------------------


def test_a_module():
    model = NETS["autoencoder"].build()
    assert_expected_inline(
        diff_graphs(*approximated(model, down=TopK(2), up=Zero(), out=Random())),
        """\
-%down = call_module down(%x)
+%down_weight = get_attr down.weight  # approximate_weight_grads @down
+%down_bias = get_attr down.bias  # approximate_weight_grads @down
+%down = call_function fxlocal.conv_topk(%x, %down_weight, %down_bias, [2, 2], [1, 1], [1, 1], False, [0, 0], 1, k=2, scale=1.0)  # approximate_weight_grads @down
-%up = call_module up(%relu)
+%up_weight = get_attr up.weight  # approximate_weight_grads @up
+%up_bias = get_attr up.bias  # approximate_weight_grads @up
+%up = call_function fxlocal.conv_zero(%relu, %up_weight, %up_bias, [2, 2], [1, 1], [1, 1], True, [1, 1], 2, none=False)  # approximate_weight_grads @up
-%out = call_module out(%relu_1)
+%out_weight = get_attr out.weight  # approximate_weight_grads @out
+%out_bias = get_attr out.bias  # approximate_weight_grads @out
+%pad = call_function pad(%relu_1, (1, 1, 1, 1), 'reflect')  # approximate_weight_grads @out
+%out = call_function fxlocal.conv_random(%pad, %out_weight, %out_bias, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, std=None)  # approximate_weight_grads @out""",  # noqa: E501
    )


def test_functions():
    model = NETS["functional"].build()
    assert_expected_inline(
        diff_graphs(*approximated(model, w1=Zero(none=True), w2=TopK(2, 0.5), w3=Random(0.5))),
        """\
-%conv2d = call_function conv2d(%x, %w1, stride=2, padding=1)
+%conv2d = call_function fxlocal.conv_zero(%x, %w1, None, [2, 2], [1, 1], [1, 1], False, [0, 0], 1, none=True)  # approximate_weight_grads @w1
-%conv2d_1 = call_function conv2d(%relu, weight=%w2, bias=%bias, padding='same', groups=2)
+%pad = call_function pad(%relu, (0, 1, 0, 1), 'constant')  # approximate_weight_grads @w2
+%conv2d_1 = call_function fxlocal.conv_topk(%pad, %w2, %bias, [1, 1], [0, 0], [1, 1], False, [0, 0], 2, k=2, scale=0.5)  # approximate_weight_grads @w2
-%linear = call_function linear(%mean, %w3)
+%linear = call_function fxlocal.linear_random(%mean, %w3, None, std=0.5)  # approximate_weight_grads @w3""",  # noqa: E501
    )


def test_exported_calls():
    model = ByShape(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2), nn.Linear(9, 5)))
    options = {"force": True}
    methods = {"net__0": TopK(2, **options), "net__2": TopK(1, **options)}
    diff = diff_graphs(*approximated(model, torch.zeros(2, 3, 5, 5), **methods))
    assert_expected_inline(
        diff,
        """\
-%conv2d: float32[2, 4, 3, 3] = call_function aten.conv2d(%require_shape, %net_0_weight, %net_0_bias)
+%conv2d: float32[2, 4, 3, 3] = call_function fxlocal.conv_topk(%require_shape, %net_0_weight, %net_0_bias, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, k=2, scale=1.0)  # approximate_weight_grads @net.0
-%linear: float32[2, 4, 5] = call_function aten.linear(%flatten, %net_2_weight, %net_2_bias)
+%linear: float32[2, 4, 5] = call_function fxlocal.linear_topk(%flatten, %net_2_weight, %net_2_bias, k=1, scale=1.0)  # approximate_weight_grads @net.2""",  # noqa: E501
    )


def test_contexts():
    methods = {"stem": Zero(), "narrow": TopK(1), "last": Zero()}
    captured, network = approximated(InContext(), **methods)
    assert_expected_inline(
        diff_graphs(captured, network),
        """\
+%stem_weight = get_attr stem.weight  # approximate_weight_grads @stem
+%stem_bias = get_attr stem.bias  # approximate_weight_grads @stem
-%stem = call_module stem(%x)
+%stem = call_function fxlocal.conv_zero(%x, %stem_weight, %stem_bias, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, none=False)  # approximate_weight_grads @stem
+%narrow_weight = get_attr narrow.weight  # approximate_weight_grads @narrow
+%narrow_bias = get_attr narrow.bias  # approximate_weight_grads @narrow
-%narrow = call_module narrow(%stem)
+%pad = call_function pad(%stem, (0, 1, 0, 1), 'constant')  # approximate_weight_grads @narrow
+%narrow = call_function fxlocal.conv_topk(%pad, %narrow_weight, %narrow_bias, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, k=1, scale=1.0)  # approximate_weight_grads @narrow
-%last = call_module last(%float_1)
+%last_weight = get_attr last.weight  # approximate_weight_grads @last
+%last_bias = get_attr last.bias  # approximate_weight_grads @last
+%last = call_function fxlocal.conv_zero(%float_1, %last_weight, %last_bias, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, none=False)  # approximate_weight_grads @last""",  # noqa: E501
    )


def test_the_nodes_keep_their_names_and_contexts_and_each_new_one_is_stamped():
    methods = {"stem": Zero(), "narrow": TopK(1), "last": Random()}
    captured, network = approximated(InContext(), **methods)
    old = {node.name: node for node in captured.graph.nodes}
    new = {node.name: node for node in network.graph.nodes}
    assert [name for name in new if name in old] == list(old)
    for name in methods:
        inserted = [n for n in new if n not in old and new[n].meta["fxlocal"].layer == name]
        assert {f"{name}_weight", f"{name}_bias"} <= set(inserted)
        assert new[name].meta["fxlocal"] == Origin("approximate_weight_grads", name)
        assert new[name].target in OPERATORS.values()
        for made in (new[name], *(new[n] for n in inserted if new[n].op != "get_attr")):
            assert made.meta.get("fxlocal_contexts") == old[name].meta.get("fxlocal_contexts")
            assert made.meta["fxlocal"].pass_name == "approximate_weight_grads"
    assert all("fxlocal" not in old[name].meta for name in old)


# --- oracle --------------------------------------------------------------------------------------


def by_hand(method):
    """What `oracle.LargestErrors` takes."""
    if isinstance(method, TopK):
        return method.k, method.scale
    return None if method.none else (0, 1.0)


# Behind them comes a mean, which makes errors equal: of those, any may be kept.
MEANED = {
    *("chain conv3", "shared conv", "dropout conv2", "preactivation convs.3"),
    *("functional w1", "functional w2", "tokens down"),
}
CHOICES = [Zero(), TopK(1), TopK(3, 0.5), Zero(none=True), TopK(2)]


def plan_of(name, choices, boundary=0):
    """A plan for all layers from the boundary on: the choices in turn, as far as they fit."""
    analysis = fxlocal.analyze(NETS[name].build(), *NETS[name].inputs())
    methods, turn = {}, itertools.cycle(choices)
    for layer in analysis.layers[boundary:]:
        method, post = next(turn), analysis.shapes[layer.index].post
        if isinstance(method, TopK):
            size = post[2:] if layer.kind == "conv" else post[1:-1]
            k = torch.Size(size).numel()
            k = k if f"{name} {layer.path}" in MEANED else min(method.k, k)
            transposed = layer.geometry is not None and layer.geometry.transposed
            method = Zero() if transposed else TopK(k, method.scale)
        methods[layer.path] = method
    weights = {layer.path: layer.weight for layer in analysis.layers}
    return Plan(weight_grads=methods), {weights[path]: m for path, m in methods.items()}


SHIFTED = [CHOICES[i:] + CHOICES[:i] for i in (0, 1)]


@pytest.mark.sample(5)
@pytest.mark.parametrize("choices", [*SHIFTED, [TopK(2, -0.5)]], ids=["first", "second", "topk"])
@pytest.mark.parametrize("name", NETS)
def test_every_network_trains_as_by_hand(name, choices):
    """Three steps: named weights by the oracle, all other gradients those of plain training."""
    plan, methods = plan_of(name, choices)
    ours, hand = NETS[name].build().double(), NETS[name].build().double()
    inputs = tuple(x.double() for x in NETS[name].inputs())
    net = fxlocal.transform(ours, plan)
    mode = oracle.LargestErrors(hand, {w: by_hand(m) for w, m in methods.items()})
    optimizer = torch.optim.SGD(ours.parameters(), **oracle.SETTINGS)
    sgd = oracle.MomentumSgd(hand, **oracle.SETTINGS)
    biases = {weight.removesuffix("weight") + "bias" for weight in methods} | {"bias"}
    for _ in range(3):
        plain = copy.deepcopy(ours)
        laws.assert_equal(laws.step(net, inputs), laws.step(plain, inputs), "output")
        with mode:
            laws.step(hand, inputs)
        mode.finish()
        expected = laws.gradients(plain) | {w: hand.get_parameter(w).grad for w in methods}
        for parameter, gradient in laws.gradients(ours).items():
            if parameter in methods or parameter in biases:  # 1e-9: summed in another order
                close = {"rtol": 1e-9, "atol": 1e-9}
                torch.testing.assert_close(gradient, expected[parameter], **close)
            else:
                laws.assert_equal(gradient, expected[parameter], f"gradient of {parameter}")
        assert {w for w in methods if ours.get_parameter(w).grad is None} == {
            w for w, m in methods.items() if m == Zero(none=True)
        }
        for stepping in (optimizer, sgd):
            stepping.step()
            stepping.zero_grad()
    torch.testing.assert_close(ours.state_dict(), hand.state_dict(), rtol=1e-9, atol=1e-9)


@pytest.mark.sample(5)
@pytest.mark.parametrize("name", NETS)
def test_random_numbers_change_no_other_gradient(name):
    plan, methods = plan_of(name, [Random(0.5)])
    ours, inputs = NETS[name].build(), NETS[name].inputs()
    plain = copy.deepcopy(ours)
    net = fxlocal.transform(ours, plan)
    laws.assert_equal(laws.step(net, inputs), laws.step(plain, inputs), "output")
    expected = laws.gradients(plain)
    for parameter, gradient in laws.gradients(ours).items():
        if parameter in methods:
            assert not torch.allclose(gradient, expected[parameter])
        else:  # biases are summed in another order
            torch.testing.assert_close(gradient, expected[parameter], rtol=1e-5, atol=1e-5)


@pytest.mark.sample(3)
@pytest.mark.parametrize("rule", [Freeze(), Hebbian(0.125)], ids=repr)
@pytest.mark.parametrize(
    "name,until", [("chain", 1), ("residual", 3), ("residual", 5), ("unet", 4)]
)
def test_the_transition_layer_behind_its_cut(name, until, rule):
    """All layers from it on are approximated; those before it learn by the rule."""
    ours, hand = NETS[name].build().double(), NETS[name].build().double()
    plan, methods = plan_of(name, CHOICES[1:], until)
    plan = Plan(local=LocalPrefix(until, rule), weight_grads=plan.weight_grads)
    mode = oracle.LargestErrors(hand, {w: by_hand(m) for w, m in methods.items()})
    prefix = oracle.Prefix(until, getattr(rule, "rate", 0.0))
    (x,) = (value.double() for value in NETS[name].inputs())

    class Finishing(oracle.MomentumSgd):
        def step(self):
            mode.finish()
            super().step()

    def forward(x):
        with mode:
            return oracle.ORACLES[name](hand, x, prefix)

    expected = oracle.train(hand, Finishing(hand, **oracle.SETTINGS), [forward] * 3, x)
    optimizer = torch.optim.SGD(ours.parameters(), **oracle.SETTINGS)
    trace = oracle.train(ours, optimizer, [fxlocal.transform(ours, plan)] * 3, x)
    # 1e-9: summed in another order
    for mine, other in zip(trace, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.state_dict(), hand.state_dict(), rtol=1e-9, atol=1e-9)


def test_a_transition_layer_that_pads_its_input():
    model, (x,) = NETS["autoencoder"].build(), NETS["autoencoder"].inputs()
    plan = Plan(local=LocalPrefix("out", Freeze()), weight_grads={"out": TopK(64)})
    other = copy.deepcopy(model)
    laws.assert_equal(
        laws.step(fxlocal.transform(model, plan), (x,)), laws.step(other, (x,)), "output"
    )
    for name, gradient in laws.gradients(model).items():
        expected = other.get_parameter(name).grad if name.startswith("out") else None
        torch.testing.assert_close(gradient, expected)


def test_layers_in_the_models_own_contexts():
    model, x = InContext(), torch.randn(2, 3, 8, 8)
    other = copy.deepcopy(model)
    methods = {"stem": TopK(1), "narrow": TopK(36), "last": TopK(36)}
    _, net = approximated(model, **methods)
    laws.assert_equal(laws.step(net, (x,)), laws.step(other, (x,)), "output")
    ours, theirs = laws.gradients(model), laws.gradients(other)
    assert ours["stem.weight"] is ours["stem.bias"] is None
    for name in ours:  # 2^-7: the bias's, a sum in bfloat16
        torch.testing.assert_close(ours[name], theirs[name], rtol=2**-7, atol=0.1)


class Standardised(nn.Conv2d):
    """A convolution that computes its weight in the forward, for autograd to go through."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


def test_a_computed_weight_gets_its_gradient_through_the_computation():
    model, x = nn.Sequential(Standardised(3, 4, 3)), torch.randn(2, 3, 6, 6)
    other = copy.deepcopy(model)
    (layer,) = fxlocal.analyze(model).layers
    laws.step(fxlocal.transform(model, Plan(weight_grads={layer.path: TopK(16)})), (x,))
    laws.step(other, (x,))
    torch.testing.assert_close(laws.gradients(model), laws.gradients(other))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def test_of_a_tied_weight_only_the_named_layers_part_is_approximated():
    model, x = Tied(), torch.randn(3, 4)
    cut = copy.deepcopy(model)
    _, net = approximated(model, first=Zero())
    laws.step(net, (x,))
    hand = cut.second(torch.relu(F.linear(x, cut.first.weight.detach(), cut.first.bias)))
    laws.loss_of(hand).backward()
    laws.assert_equal(model.first.weight.grad, cut.second.weight.grad, "gradient")


# --- the network ---------------------------------------------------------------------------------


def test_state_mode_copies_and_evaluation():
    net = NETS["residual"]
    plan, _ = plan_of("residual", CHOICES)
    laws.l2_output_is_exact(net.build(), net.inputs(), plan)
    laws.check_bookkeeping(net.build(), net.inputs(), plan, Plan())
    network = fxlocal.transform(net.build(), plan)
    for copied in COPIES:
        other = copied(network)
        assert fxlocal.format_graph(other) == fxlocal.format_graph(network)
        assert fxlocal.explain(other) == fxlocal.explain(network)
        assert other.stem[0].weight is not network.stem[0].weight
        laws.assert_equal(laws.step(other, net.inputs()), laws.step(network, net.inputs()), "")
        laws.assert_equal(laws.gradients(other), laws.gradients(network), "gradient")
        network.zero_grad()

"""Products with a parameter are linear layers, as if `torch.nn.Linear` had computed them.

The oracle is a twin of linear modules, their weights transposed where the product's are not.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from fxlocal.passes import find_layers
from torch import nn

from fxlocal import Custom, Freeze, Hebbian, LocalPrefix, Oja, Plan, Random, TopK, Zero, transform
from fxlocal.errors import PlanError
from fxlocal.tracing.capture import capture
from fxlocal.tracing.examples import Examples
from fxlocal.tracing.exported.capture import capture_by_export


class Flattened(nn.Module):
    """As transformers' Conv1D: rows of all samples in one product, then in their shape again."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.outputs = outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * 0.3)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        size = x.size()[:-1] + (self.outputs,)  # noqa: RUF005 - a traced size has no items
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


class Product(nn.Module):
    """A product by ``forward``, with a weight of (inputs, outputs) or the other way round."""

    def __init__(self, inputs, outputs, form):
        super().__init__()
        shape = (outputs, inputs) if form in TURNED else (inputs, outputs)
        self.weight, self.product = nn.Parameter(torch.randn(shape) * 0.3), FORMS[form]

    def forward(self, x):
        return self.product(x, self.weight)


def _covariance(weight, pre, post, product):
    rows = tuple(range(post.dim() - 1))
    return product(pre, post - post.mean(rows, keepdim=True)) - 0.1 * weight


FORMS = {
    "@": lambda x, w: x @ w,
    "matmul": torch.matmul,
    "method": lambda x, w: x.matmul(w),
    "named": lambda x, w: torch.matmul(input=x, other=w),
    "mm": lambda x, w: torch.mm(x.flatten(0, 1), mat2=w).unflatten(0, (-1, 5)),
    "t": lambda x, w: x @ w.t(),
    "T": lambda x, w: torch.matmul(x, w.T),
    "mT": lambda x, w: x @ w.mT,
    "transpose": lambda x, w: x @ w.transpose(-1, -2),
    "permute": lambda x, w: x @ w.permute(1, 0),
}
# Some processors take another kernel for each orientation of a weight.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
TURNED = {"t", "T", "mT", "transpose", "permute"}
RULES = [Hebbian(rate=0.1), Oja(rate=0.1), Custom(_covariance, rate=0.1)]


class Net(nn.Module):
    """Two residual branches of two layers each, and a head."""

    def __init__(self, make):
        super().__init__()
        self.a, self.b, self.c, self.d = make(4, 6), make(6, 4), make(4, 6), make(6, 4)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x):
        x = x + self.b(torch.relu(self.a(x)))
        x = x + F.dropout(self.d(torch.tanh(self.c(self.norm(x)))), 0.3, self.training)
        return self.head(x)


def _linear(layer):
    twin = nn.Linear(4, 6, bias=hasattr(layer, "bias"))
    weight = layer.weight.detach()
    turned = isinstance(layer, Product) and layer.product in [FORMS[form] for form in TURNED]
    twin.weight = nn.Parameter(weight.clone() if turned else weight.t().contiguous())
    if hasattr(layer, "bias"):
        twin.bias = nn.Parameter(layer.bias.detach().clone())
    return twin


def _pair(form):
    torch.manual_seed(0)
    net = Net(Flattened if form == "flattened" else lambda i, o: Product(i, o, form))
    twin = copy.deepcopy(net)
    for name in "abcd":
        setattr(twin, name, _linear(getattr(net, name)))
    return net, twin, torch.randn(2, 5, 4)


def _step(net, plan, x, by_export):
    network = transform(
        capture_by_export(net, Examples(net, (x,), {})) if by_export else net, plan, x
    )
    torch.manual_seed(1)
    x.requires_grad_().grad = None
    output = network(x)
    output.square().sum().backward()
    return output.detach(), x.grad


def _same(one, other):
    """Return whether two are equal, in either orientation."""
    if (one is None) != (other is None):
        return False
    return one is None or any(
        o.shape == other.shape and torch.allclose(o, other, **CLOSE)
        for o in (one, one.t() if one.dim() == 2 else one)
    )


def _assert_same(net, twin, values):
    for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert _same(values(p), values(q)), name


@pytest.mark.sample(3)
@pytest.mark.parametrize("form", [*FORMS, "flattened"])
def test_products_with_a_parameter_are_layers(form):
    net, _, x = _pair(form)
    for graph in (capture(net), capture_by_export(net, Examples(net, (x,), {}))):
        layers = find_layers(graph)
        assert [layer.path for layer in layers] == ["a", "b", "c", "d", "head"]
        assert [layer.weight for layer in layers] == [f"{p}.weight" for p in "abcd"] + [
            "head.weight"
        ]
        assert [layer.transposed for layer in layers] == [form not in TURNED] * 4 + [False]


@pytest.mark.sample(3)
@pytest.mark.parametrize("by_export", [False, True], ids=["symbolic", "export"])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("form", ["@", "named", "mm", "t", "T", "flattened"])
def test_products_learn_as_linear_layers_do(form, rule, by_export):
    net, twin, x = _pair(form)
    before = copy.deepcopy(net)
    plan = Plan(local=LocalPrefix(until=3, rule=rule))
    found, expected = (_step(model, plan, x, by_export) for model in (net, twin))
    torch.testing.assert_close(found, expected, **CLOSE)
    _assert_same(net, twin, lambda p: p.detach())
    _assert_same(net, twin, lambda p: p.grad)
    assert all(not torch.equal(getattr(net, n).weight, getattr(before, n).weight) for n in "abc")
    assert net.a.weight.grad is None and net.d.weight.grad is not None


def test_the_hebbian_delta_of_a_product_by_hand():
    torch.manual_seed(0)
    net = nn.Sequential(Flattened(4, 6), nn.Linear(6, 2))
    x, weight = torch.randn(2, 5, 4), net[0].weight.detach().clone()
    post = (x @ weight + net[0].bias.detach()).flatten(0, 1)
    delta = x.flatten(0, 1).t() @ post
    transform(net, Plan(local=LocalPrefix(until=1, rule=Hebbian(rate=0.5))))(x)
    torch.testing.assert_close(net[0].weight.detach(), weight + 0.5 * delta / delta.norm())


def test_a_weight_used_as_it_is_and_transposed_gets_the_sum():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.head = nn.Parameter(torch.randn(4, 6)), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(F.linear(x @ self.weight, self.weight))

    net, x = Tied(), torch.randn(3, 4)
    weight = net.weight.detach().clone()
    hidden = x @ weight
    delta = x.t() @ hidden + (hidden @ weight.t()).t() @ hidden
    transform(net, Plan(local=LocalPrefix(until=2, rule=Hebbian(rate=0.5))))(x)
    torch.testing.assert_close(net.weight.detach(), weight + 0.5 * delta / delta.norm())


class Others(nn.Module):
    """Products that are no layers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2, 4))
        self.batched = nn.Parameter(torch.randn(3, 4, 4))
        self.register_buffer("fixed", torch.randn(4, 4))

    def forward(self, x):
        y = x @ x.transpose(-1, -2) @ x  # of two activations
        y = y @ self.fixed  # of a buffer, as a transform of frequencies
        y = y @ self.batched[1]  # of a part of a parameter
        y = y @ (self.a @ self.b)  # of parameters, and with what they make
        flat = y.flatten(0, 1)
        y = y + torch.addmm(flat, flat, self.fixed).view(y.shape)
        y = y + torch.addmm(flat, flat, self.batched[0]).view(y.shape)
        return self.fixed.matmul(y.transpose(-1, -2)).sum() + self.b.t().matmul(self.b)


class Scaled(nn.Module):
    """Sums of products that are no layer's output."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
        self.row = nn.Parameter(torch.randn(1, 4))

    def forward(self, x):
        y = torch.addmm(self.bias, x, self.weight, alpha=0.5)
        y = torch.addmm(self.bias, y, self.weight, beta=2)
        y = torch.addmm(x, y, self.weight)  # an activation in the place of the bias
        return torch.addmm(self.row, y, self.weight)


@pytest.mark.parametrize("net, shape", [(Others(), (3, 5, 4)), (Scaled(), (3, 4))])
def test_what_is_no_product_with_a_parameter_is_no_layer(net, shape):
    x = torch.randn(shape)
    assert not find_layers(capture(net))
    assert not find_layers(capture_by_export(net, Examples(net, (x,), {})))


@pytest.mark.sample(8)
@pytest.mark.parametrize("by_export", [False, True], ids=["symbolic", "export"])
@pytest.mark.parametrize("method", [Zero(), Zero(none=True), Random(std=0.1), Random()], ids=str)
@pytest.mark.parametrize("form", ["@", "mm", "t", "flattened"])
def test_products_have_approximate_weight_gradients(form, method, by_export):
    net, twin, x = _pair(form)
    found = _step(net, Plan(weight_grads={"b": method, "c": method}), x, by_export)
    expected = _step(twin, Plan(), x, by_export)
    torch.testing.assert_close(found, expected, **CLOSE)
    for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        if name not in ("b.weight", "c.weight"):
            assert _same(p.grad, q.grad), name
        elif isinstance(method, Zero):
            assert p.grad is None if method.none else not p.grad.any()
        else:
            assert p.grad.any() and not _same(p.grad, q.grad)


@pytest.mark.parametrize("form", ["@", "T"])
def test_products_have_the_gradient_of_the_largest_errors(form):
    net, twin, x = _pair(form)
    plan = Plan(weight_grads={"b": TopK(k=2, scale=1.0, force=True)})
    torch.testing.assert_close(_step(net, plan, x, False), _step(twin, plan, x, False), **CLOSE)
    _assert_same(net, twin, lambda p: p.grad)


@pytest.mark.parametrize("form", ["flattened", "mm"])
def test_rows_without_their_samples_have_no_largest_errors(form):
    net, _, x = _pair(form)
    with pytest.raises(PlanError, match="layer 'b' multiplies rows that the forward flattens"):
        transform(net, Plan(weight_grads={"b": TopK(k=2, force=True)}), x)


@pytest.mark.parametrize("form", ["@", "flattened"])
def test_a_product_is_cut_behind_and_freezes(form):
    net, twin, x = _pair(form)
    plan = Plan(local=LocalPrefix(until=2, rule=Freeze()))
    found, expected = (_step(model, plan, x, False) for model in (net, twin))
    torch.testing.assert_close(found, expected, **CLOSE)
    _assert_same(net, twin, lambda p: p.grad)
    assert net.b.weight.grad is None and net.c.weight.grad is not None

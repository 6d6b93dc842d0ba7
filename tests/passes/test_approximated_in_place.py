"""What changes an approximated layer's output in place, or a view of it, stays exact."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxlocal import Plan, Random, TopK, Zero, transform
from fxlocal.plan import WeightGrad


def _adds(x: Tensor) -> Tensor:
    x += 1.5
    return x


def _scales_by_itself(x: Tensor) -> Tensor:
    return x.mul_(x.detach() + 2)


def _scales_a_view(x: Tensor) -> Tensor:
    x.view(-1).mul_(2.0)
    return x


def _sets_a_row(x: Tensor) -> Tensor:  # for torch.export: a traced value cannot be assigned to
    x[0] = 0
    return x


def _clears_a_row(x: Tensor) -> Tensor:
    x[0].zero_()
    return x


def _adds_to_a_part(x: Tensor) -> Tensor:
    x[:, :2].add_(1)
    return x


def _adds_to_a_transposed(x: Tensor) -> Tensor:
    x.transpose(0, 1).add_(0.5)
    return x


def _drops(x: Tensor) -> Tensor:
    return F.dropout(x, 0.5, True, inplace=True)


CHANGES = [torch.relu_, nn.ReLU(inplace=True), _adds, _scales_by_itself, _drops]
CHANGES += [_scales_a_view, _clears_a_row, _adds_to_a_part, _adds_to_a_transposed]
METHODS = [TopK(k=2, scale=1.0, force=True), Zero(), Random()]


class Changed(nn.Module):
    """A layer, something in place, and another layer."""

    def __init__(self, layer: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(6, 6), layer, nn.Linear(6, 3)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.change(self.layer(self.first(x))))


def _layer(kind: str) -> nn.Module:
    return {
        "linear": nn.Linear(6, 6),
        "without bias": nn.Linear(6, 6, bias=False),
        "conv1d": nn.Conv1d(4, 4, 3, padding=1),
        "unbatched conv2d": nn.Conv2d(2, 2, 3, padding=1),
    }[kind]


def _step(net: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    torch.manual_seed(1)
    output = net(x)
    output.square().sum().backward()
    return output.detach()


def _assert_exact(
    kind: str, change: Callable[[Tensor], Tensor], method: WeightGrad, backend: str | None
) -> None:
    torch.manual_seed(0)
    model = Changed(_layer(kind), change)
    own = copy.deepcopy(model)
    x = torch.randn(2, 6, 6) if "unbatched" in kind else torch.randn(5, 4, 6)
    net: Callable[[Tensor], Tensor] = transform(model, Plan(weight_grads={"layer": method}), x)
    if backend:
        torch._dynamo.reset()
        net = torch.compile(net, backend=backend, fullgraph=True)
    torch.testing.assert_close(_step(net, x), _step(own, x), rtol=0, atol=0)
    for (name, p), q in zip(model.named_parameters(), own.parameters(), strict=True):
        if name != "layer.weight":
            assert p.grad is not None
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.sample(16)
@pytest.mark.parametrize("kind", ["linear", "without bias", "conv1d", "unbatched conv2d"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda c: getattr(c, "__name__", "ReLU"))
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_what_changes_the_output_in_place_stays_exact(
    kind: str, change: Callable[[Tensor], Tensor], method: WeightGrad
) -> None:
    _assert_exact(kind, change, method, None)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_so_it_does_in_an_exported_graph(method: WeightGrad) -> None:
    _assert_exact("linear", _sets_a_row, method, None)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("change", "method"), list(zip([_adds, _scales_a_view, _sets_a_row], METHODS, strict=True))
)
def test_it_stays_exact_compiled(change: Callable[[Tensor], Tensor], method: WeightGrad) -> None:
    _assert_exact("linear", change, method, "aot_eager")

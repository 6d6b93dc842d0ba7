"""Sizes of a buffer are known while tracing; its value is fetched in each step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxlocal import CaptureError
from fxlocal.tracing.capture import capture

Forward = Callable[[Any, Tensor], Tensor]


class Tabled(nn.Module):
    """A layer, and something done with its output and two buffers."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.layer, self.done = nn.Linear(3, 3), forward
        self.register_buffer("table", torch.arange(9.0).view(3, 3))
        self.register_buffer("flag", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.done(self, self.layer(x))


def _unpacked(model: Any, x: Tensor) -> Tensor:
    a, b, c = model.table
    return x * a + b - c


def _asserts(model: Any, x: Tensor) -> Tensor:
    assert model.table.numel() == 9 and model.table.dim() == 2 and not model.flag.ndim
    return x @ model.table


SIZES: dict[str, Forward] = {
    "shape as a bound": lambda m, x: sum((x * m.table[i] for i in range(m.table.shape[0])), x),
    "length": lambda m, x: x * len(m.table),
    "rows": lambda m, x: sum((x * row for row in m.table), x),
    "unpacked": _unpacked,
    "dimensions": lambda m, x: x * m.table.sum() if m.table.ndim == 2 else x,
    "size as a number": lambda m, x: x * int(m.table.size(0)) + m.flag,
    "asserts": _asserts,
    "given to view": lambda m, x: x.view(-1, *m.table.shape[1:]) + m.table[0],
    "table of positions": lambda m, x: (
        x + torch.arange(m.table.shape[1]).to(m.table.device, m.table.dtype)
    ),
}
FACTS: dict[str, Forward] = {
    "dtype": lambda m, x: x * 2 if m.table.dtype == torch.float32 else x,
    "one of dtypes": lambda m, x: x * 2 if m.table.dtype in (torch.half, torch.float) else x,
    "by dtype": lambda m, x: x * {torch.float32: 2, torch.float64: 3}[m.table.dtype],
    "floating": lambda m, x: x * 2 if m.table.is_floating_point() else x,
    "device": lambda m, x: x * 2 if m.table.device == torch.device("cpu") else x,
    "type of device": lambda m, x: x * 2 if m.table.device.type != "cuda" else x,
}


@pytest.mark.parametrize("forward", [*SIZES.values(), *FACTS.values()], ids=[*SIZES, *FACTS])
def test_sizes_and_facts_are_known_and_values_are_not(forward: Forward) -> None:
    model, x = Tabled(forward), torch.randn(2, 3)
    network = capture(model)  # without inputs: by symbolic tracing
    torch.testing.assert_close(network(x), model(x), rtol=0, atol=0)
    with torch.no_grad():
        model.table.mul_(-0.5)
        model.flag.add_(1)
    torch.testing.assert_close(network(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("forward", SIZES.values(), ids=SIZES)
def test_a_buffer_of_another_size_is_refused(forward: Forward) -> None:
    model = Tabled(forward)
    network = capture(model)
    model.table, model.flag = torch.ones(4, 4), torch.ones(4)
    with pytest.raises(RuntimeError, match=r"graph holds for a size of (3|4) in dimension"):
        network(torch.randn(2, 3))


def test_what_a_branch_saw_of_a_dtype_is_checked() -> None:
    network = capture(Tabled(FACTS["dtype"])).double()
    with pytest.raises(RuntimeError, match=r"captured with torch\.float32"):
        network(torch.randn(2, 3, dtype=torch.double))


def test_a_dtype_that_is_only_given_to_a_call_follows_the_model() -> None:
    model = Tabled(lambda m, x: x.to(m.table.dtype) + torch.zeros(3, dtype=m.table.dtype))
    network = capture(model)
    assert network(torch.randn(2, 3)).dtype == torch.float
    assert network.double()(torch.randn(2, 3, dtype=torch.double)).dtype == torch.double


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: x if m.flag else -x,
        lambda m, x: x if m.table[0, 0] > 0 else -x,
        lambda m, x: x * int(m.flag),
        lambda m, x: x * float(m.table.sum()),
        lambda m, x: sum((x * i for i in range(int(m.flag))), x),
    ],
)
def test_a_value_is_never_kept(forward: Forward) -> None:
    with pytest.raises(CaptureError):
        capture(Tabled(forward))

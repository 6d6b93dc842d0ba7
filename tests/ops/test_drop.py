"""Rows of a batch: gradients, layouts, and how often each is drawn."""

import pytest
import torch

from fxlocal.ops.drop import add_rows, draw_blocks, draw_each_row, draw_rows, take_rows

ROWS = [(1, 3), (4, 3), (0, 5), (5, 1), torch.tensor([4, 0, 3]), None]


@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_gradients_of_rows(rows):
    torch.manual_seed(0)
    x, shortcut = (torch.randn(6, 2, 3, dtype=torch.double, requires_grad=True) for _ in range(2))

    def forward(x, shortcut):
        return add_rows(shortcut, take_rows(x, rows).square(), rows, 1.5)

    assert torch.autograd.gradcheck(forward, (x, shortcut))
    assert torch.autograd.gradgradcheck(forward, (x, shortcut))


@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_rows_keep_channels_innermost(rows):
    x = torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    taken = take_rows(x, rows)
    total = add_rows(x, taken.bfloat16(), rows)
    (grad,) = torch.autograd.grad(total.square().sum(), x)
    made = (taken, total, grad)
    assert all(v.is_contiguous(memory_format=torch.channels_last) for v in made)
    assert total.dtype == torch.float32


def test_each_row_survives_as_often_and_apart_from_other_draws():
    torch.manual_seed(0)
    x, num = torch.empty(5, 1), 1000
    counts, both = torch.zeros(5), 0
    for _ in range(num):
        drawn = [take_rows(torch.arange(5), draw_rows(x, 0.6, "")).tolist() for _ in range(2)]
        counts[drawn[0]] += 1
        both += 2 in drawn[0] and 2 in drawn[1]
    # Five standard deviations of a share of so many draws.
    assert (counts / num - 0.6).abs().max() < 5 * (0.24 / num) ** 0.5
    assert abs(both / num - 0.36) < 5 * (0.2304 / num) ** 0.5


def test_each_row_by_itself_survives_with_its_probability():
    torch.manual_seed(0)
    sizes = torch.tensor([float(len(draw_each_row(torch.empty(8, 1), 0.6))) for _ in range(2000)])
    # A binomial's mean and variance, five standard deviations of so many draws.
    assert abs(sizes.mean() - 4.8) < 5 * (1.92 / 2000) ** 0.5
    assert abs(sizes.var() - 1.92) < 5 * 1.92 * (2 / 2000) ** 0.5


def test_blocks_are_drawn_by_seed_and_step():
    shares = (0.9, 0.5, 0.2)
    draws = [draw_blocks(shares, 1, (0, step)) for step in range(2000)]
    assert draws[:20] == [draw_blocks(shares, 1, (0, step)) for step in range(20)]
    assert draws[:20] != [draw_blocks(shares, 2, (0, step)) for step in range(20)]
    for share, kept in zip(shares, zip(*draws, strict=True), strict=True):
        assert abs(sum(kept) / 2000 - share) < 5 * (share * (1 - share) / 2000) ** 0.5

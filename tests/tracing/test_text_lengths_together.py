"""Texts of other lengths where what is asked is about several sizes, or about those of others."""

import copy

import pytest
import torch
from support import laws
from test_text_lengths import PLAN, Text, ids, steps_agree

import fxlocal


def made(body, **modules):
    torch.manual_seed(0)
    model = Text(body)
    for name, module in modules.items():
        setattr(model, name, module.requires_grad_(False))
    return model, copy.deepcopy(model)


def agree(net, model, eager, *batch):
    for one in (model, eager):
        one.zero_grad()
    steps_agree(net, model, eager, *batch)
    for (name, mine), theirs in zip(model.named_buffers(), eager.buffers(), strict=True):
        laws.assert_equal(mine, theirs, name)


# --- sizes that turn out to be another's ----------------------------------------------------------


def test_what_was_asked_of_a_size_before_it_was_tied_holds():
    def body(net, h, weights):
        h = h * 2 if weights.shape[1] % 3 == 0 else h
        return h * weights[..., None]

    model, eager = made(body)
    net = fxlocal.transform(model, PLAN, ids(4, 8), torch.rand(4, 8))
    for rows, length in ((4, 8), (3, 7)):
        agree(net, model, eager, ids(rows, length), torch.rand(rows, length))
    with pytest.raises(RuntimeError, match="7 to 8 in dimension 1"):
        net(ids(4, 6), torch.rand(4, 6))

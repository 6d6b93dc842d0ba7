"""One name for an operator, whichever way it is called."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from fxlocal.ir.operators import arguments_of, operator_name

aten = torch.ops.aten
CALLS = {
    "add": [operator.add, torch.add, aten.add.Tensor, aten.add.Scalar, "add"],
    "add_": [torch.Tensor.add_, aten.add_.Tensor, "add_"],
    "cat": [torch.cat, aten.cat.default],
    "getitem": [operator.getitem],
    "chunk": [torch.chunk, aten.chunk.default, "chunk"],
    "dropout": [F.dropout, torch.dropout, aten.dropout.default],
    "conv2d": [F.conv2d, aten.conv2d.default, aten.conv2d.padding],
    "normalised_add_": [torch.ops.fxlocal.normalised_add_.default],
}


@pytest.mark.parametrize("name", CALLS)
def test_name_of_each_form(name):
    for target in CALLS[name]:
        op = "call_method" if isinstance(target, str) else "call_function"
        assert operator_name(fx.Graph().create_node(op, target)) == name


@pytest.mark.parametrize("op", ["placeholder", "get_attr", "call_module"])
def test_what_calls_no_operator_has_no_name(op):
    assert operator_name(fx.Graph().create_node(op, "add")) == ""


def test_arguments_by_name():
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    call = graph.call_function(F.conv2d, (x, weight), {"stride": 2})
    names = ("input", "weight", "bias")
    assert arguments_of(call, names) == {"input": x, "weight": weight, "stride": 2}

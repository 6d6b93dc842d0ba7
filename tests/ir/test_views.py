"""What may share memory is told by names; here, of each name, whether it does."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from fxlocal.ir.operators import overwrites


def first_of(other, t):
    return t[0] if len(other) else other


fx.wrap("first_of")
VIEWS = {
    "adjoint": lambda t: t.adjoint(),
    "as_strided": lambda t: t.as_strided((2, 2), (1, 1)),
    "atleast_3d": lambda t: torch.atleast_3d(t),
    "broadcast_tensors, the first": lambda t: torch.broadcast_tensors(t, t[:1])[0],
    "broadcast_tensors, the second": lambda t: torch.broadcast_tensors(torch.ones(4, 4, 6), t)[1],
    "chunk by keyword": lambda t: torch.chunk(input=t, chunks=2)[0],
    "conj": lambda t: t.conj(),
    "contiguous": lambda t: t.contiguous(),
    "cpu": lambda t: t.cpu(),
    "data": lambda t: t.data,
    "a function of the user's": lambda t: first_of(torch.ones(3), t),
    "diagonal": lambda t: torch.diagonal(t, 0, 1, 2),
    "einsum": lambda t: torch.einsum("abc->acb", t),
    "ellipsis": lambda t: t[..., 0],
    "float": lambda t: t.float(),
    "hsplit": lambda t: t.hsplit(2)[0],
    "mT": lambda t: t.mT,
    "H": lambda t: t[0].H,
    "meshgrid": lambda t: torch.meshgrid(t[0, 0], t[1, 0], indexing="ij")[1],
    "movedim": lambda t: t.movedim(0, 1),
    "new dimension": lambda t: t[None],
    "plus": lambda t: +t,
    "positive": lambda t: torch.positive(t),
    "real": lambda t: t.real,
    "requires_grad_": lambda t: t.requires_grad_(),
    "linalg.diagonal": lambda t: torch.linalg.diagonal(t),
    "resolve_conj": lambda t: t.resolve_conj(),
    "resolve_neg": lambda t: t.resolve_neg(),
    "sum_to_size": lambda t: t.sum_to_size(t.shape),
    "tensor_split": lambda t: t.tensor_split(2)[1],
    "to": lambda t: t.to("cpu"),
    "to_dense": lambda t: t.to_dense(),
    "unfold": lambda t: t.unfold(0, 2, 1),
    "unsafe_chunk": lambda t: t.unsafe_chunk(2)[0],
    "unsafe_split": lambda t: t.unsafe_split(2)[1],
    "view_as_complex": lambda t: torch.view_as_complex(t.unflatten(-1, (-1, 2))),
    "vsplit": lambda t: torch.vsplit(t, 2)[1],
    "idle dropout": lambda t: F.dropout(t, 0.3, False),
    "idle dropout2d": lambda t: F.dropout2d(t, 0.0),
    "idle alpha dropout": lambda t: F.alpha_dropout(t, 0.3),
    "idle feature alpha dropout": lambda t: F.feature_alpha_dropout(t, 0.3, training=False),
    "idle module": nn.AlphaDropout(0.0),
    "identity": nn.Identity(),
    "a view of a view": lambda t: t.flatten(1).cpu().adjoint(),
}
COPIES = {
    "clone": lambda t: t.clone(),
    "relu": lambda t: torch.relu(t),
    "cat": lambda t: torch.cat([t]),
    "product": lambda t: t * 1.0,
    "flip": lambda t: t.flip(0),
    "dropout": lambda t: F.dropout(t, 0.3),
    "alpha dropout": lambda t: F.alpha_dropout(t, 0.3, True),
}


class Net(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, t):
        made = self.make(t)
        t.mul_(2.0)
        return made


@pytest.mark.sample(24)
@pytest.mark.parametrize("name", [*VIEWS, *COPIES])
def test_a_change_of_the_tensor_is_one_of_what_shares_its_memory(name):
    make, tensor = (VIEWS | COPIES)[name], torch.ones(4, 4, 6)
    shares = make(tensor).untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    assert shares == (name in VIEWS)
    gm = fx.symbolic_trace(Net(make))
    (change,) = (node for node in gm.graph.nodes if node.target == "mul_")
    (made,) = gm.graph.output_node().args
    assert overwrites(gm, change, made) == shares

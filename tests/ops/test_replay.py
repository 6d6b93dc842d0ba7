"""The replay buffer: which batch comes out, and that nothing else leaks out of it."""

import copy

import pytest
import torch

from fxlocal.ops.replay import ReplayBuffer


def test_the_least_used_comes_out_and_the_oldest_of_those():
    buffer = ReplayBuffer(3)
    taken = []
    for arrived in ("a", "b", None, None, "c", "d", None, None, None, None):
        if arrived:
            buffer.put(arrived)
        else:
            taken += buffer.take()
    # a and b are used once before c and d come, which drives out a.
    assert taken == ["a", "b", "c", "d", "b", "c"]


@pytest.mark.parametrize("size", [1, 4])
def test_as_a_module_it_is_a_batch_behind(size):
    buffer = ReplayBuffer(size)
    for step, expected in enumerate([0, 0, 1, 2, 3, 4]):
        out, passed = buffer(torch.full((2, 3), float(step)), (step, [torch.tensor(step)]))
        assert torch.equal(out, torch.full((2, 3), float(expected)))
        assert passed == (expected, [torch.tensor(expected)])


def test_it_keeps_no_more_than_its_size():
    buffer = ReplayBuffer(2)
    for step in range(5):
        buffer.put(step)
    assert [buffer.take() for _ in range(2)] == [(3,), (4,)]


def test_unused_batches_are_counted():
    buffer = ReplayBuffer(2)
    assert buffer.num_unused == 0
    buffer.put(1)
    buffer.put(2)
    buffer.take()
    assert buffer.num_unused == 1
    buffer.refill([])
    assert buffer.num_unused == 0
    with pytest.raises(IndexError, match="put a batch in first"):
        buffer.take()


def test_what_comes_out_may_be_overwritten():
    buffer = ReplayBuffer(1)
    buffer.put(torch.ones(3))
    buffer.take()[0].zero_()
    assert torch.equal(buffer.take()[0], torch.ones(3))


def test_no_gradient_flows_through_it():
    x = torch.ones(2, requires_grad=True)
    (out,) = ReplayBuffer(1)(x * 2)
    assert not out.requires_grad


def test_its_contents_are_no_state():
    buffer = ReplayBuffer(2)
    buffer.put(torch.ones(3))
    assert not buffer.state_dict()
    assert not list(buffer.parameters()) and not list(buffer.buffers())
    assert copy.deepcopy(buffer).num_unused == 1


def test_a_buffer_for_nothing_is_refused():
    with pytest.raises(ValueError, match="size=0"):
        ReplayBuffer(0)

"""The operators of local rules as torch sees them: their schemas, and the halves of a step."""

import pytest
import torch

ops = torch.ops.fxlocal


def rand(*shape):
    return torch.randn(shape, dtype=torch.float64)


CONV = (rand(2, 4, 5, 5), rand(2, 6, 3, 3), rand(6, 2, 3, 3), [2, 2], [1, 1], [1, 1])
SAMPLES = {
    ops.conv_delta.default: (*CONV, False, 2),
    ops.linear_delta.default: (rand(2, 5, 3), rand(2, 5, 4), rand(4, 3)),
    ops.normalised_add_.default: (rand(3, 2), rand(3, 2), torch.tensor(0.5)),
}


def test_only_the_step_is_mutable():
    assert [op._schema.is_mutable for op in SAMPLES] == [False, False, True]


@pytest.mark.sample(1)
@pytest.mark.parametrize("op", SAMPLES, ids=str)
def test_an_operator_checks_and_compiles(op):
    arguments = SAMPLES[op]
    torch.library.opcheck(op, arguments)
    ours, theirs = (
        [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments] for _ in range(2)
    )
    compiled = torch.compile(lambda *a: op(*a), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*ours), op(*theirs))
    torch.testing.assert_close(ours[0], theirs[0])


HALVES = {  # of the step, where the weight is computed
    ops.normalised_step.default: (rand(3, 2), rand(3, 2), torch.tensor(0.5)),
    ops.add_steps_.default: ([rand(3, 2), rand(4)], [rand(3, 2), rand(4)]),
}


@pytest.mark.parametrize("op", HALVES, ids=str)
def test_half_a_step_checks(op):
    torch.library.opcheck(op, HALVES[op])


def test_the_two_halves_are_the_step():
    weight, delta, rate = rand(3, 2), rand(3, 2), torch.tensor(0.5)
    halves, other = weight.clone(), rand(4)
    step = ops.normalised_step(halves, delta, rate, relative=True)
    ops.add_steps_([halves, other], [step, torch.zeros(4)])
    ops.normalised_add_(weight, delta, rate, relative=True)
    assert torch.equal(halves, weight)


def test_one_step_that_is_not_finite_stops_all():
    weights, skipped = [rand(3), rand(2)], torch.zeros(())
    before = [weight.clone() for weight in weights]
    ops.add_steps_(weights, [torch.ones(3), torch.tensor([0.0, torch.inf])], skipped=skipped)
    assert all(map(torch.equal, weights, before))
    assert int(skipped) == 1

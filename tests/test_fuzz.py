"""Random models and plans: refused by name, or what eager PyTorch computes; never wrong in silence.

Each example writes the source of a model, draws a plan for it, and compares one training step,
evaluation, a deepcopy and an export with the model's own (`support.fuzzing.check`). What is refused
is counted by reason and printed: a fuzzer that only meets refusals tests nothing.
"""

import pytest
from support.fuzzing import Tally
from support.programs import programs

MOST_REFUSED = 0.4  # of the examples; a third of the programs hold only what every model has


def run(capsys, examples, number, most):
    tally = Tally()
    tally.run(examples, number, programs(most))
    with capsys.disabled():
        print(f"\n{tally}")
    assert tally.refused.total() <= MOST_REFUSED * (tally.held + tally.refused.total())


def test_random_models_are_refused_or_exact(capsys):
    run(capsys, examples=30, number=0, most=6)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, 6))
def test_a_thousand_random_models_are_refused_or_exact(capsys, number):
    run(capsys, examples=200, number=number, most=10)

"""The mean loss of several ranks, of which not each observes each step."""

import math

import pytest
import torch
from support.drivers import X, small
from torch import distributed, multiprocessing

from fxlocal import Driver
from fxlocal.runtime.losses import MeanLoss
from fxlocal.schedules import Constant

RANKS = 2
OBSERVED = [  # by epoch and rank, as (value, dtype); and the mean over what was observed
    ([[100.0], []], 100.0),
    ([[], [4.0, 2.0]], 3.0),
    ([[1.0, 2.0, 3.0], [10.0]], 4.0),
    ([[], []], math.nan),
    ([[0.5], [0.25, 0.25, 1.0]], 0.5),
    ([[2.0, 2.0], [4.0, 4.0]], 3.0),
]
MEANS = [mean for _, mean in OBSERVED]
DTYPES = [torch.float32, torch.float64]  # by rank


def train(rank, store, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=RANKS)
    driver, sums = Driver(small(), Constant()), []
    for values, _ in OBSERVED:
        driver.start_epoch()
        driver.network()(*X).sum().backward()
        for value in values[rank]:
            driver.observe(torch.tensor(value, dtype=DTYPES[rank]))
        driver.end_epoch()
        mine = torch.tensor(float(rank + 1))
        distributed.all_reduce(mine)  # the user's own
        sums.append(float(mine))
    torch.save({"losses": driver.losses, "sums": sums}, f"{folder}/{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.mark.slow  # starts two processes
def test_ranks_that_observe_nothing_take_part_too(tmp_path):
    multiprocessing.spawn(train, (tmp_path / "store", tmp_path), nprocs=RANKS)
    for rank in range(RANKS):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["losses"] == pytest.approx(MEANS, nan_ok=True)
        assert found["sums"] == [3.0] * len(OBSERVED)


@pytest.fixture
def reduced(tmp_path, monkeypatch):
    """A group of this process alone; what it reduces, as if the other had observed 5 and 7."""
    distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    seen = []

    def all_reduce(tensor):
        seen.append(tensor.clone())
        tensor += torch.tensor([12.0, 2.0, 1.0])

    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    yield seen
    distributed.destroy_process_group()


@pytest.mark.parametrize("observed", [[], [3.0], [1.0, 2.0, 3.0]], ids=str)
def test_one_collective_an_epoch_whatever_was_observed(reduced, observed):
    driver = Driver(small(), Constant())
    driver.start_epoch()
    for value in observed:
        driver.observe(torch.tensor(value, dtype=torch.bfloat16))
    driver.end_epoch()
    (total,) = reduced
    assert total.tolist() == [sum(observed), len(observed), 1] and total.dtype == torch.float64
    assert driver.losses == [pytest.approx((sum(observed) + 12) / (len(observed) + 2))]


@pytest.mark.parametrize("share", [1.0, 0.5, torch.tensor(0.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_losses_are_added_in_float32_or_wider_and_left_as_they_were(dtype, shape, share):
    losses = [torch.full(shape, value, dtype=dtype) for value in (300, 301)]
    mean = MeanLoss()
    for loss in losses:
        mean.observe(loss, share)
    expected = sum(float(loss) * float(share) for loss in losses) / 2
    assert mean.mean(()) == expected and mean.state()[0].dtype == torch.promote_types(
        dtype, torch.float32
    )
    assert [int(loss) for loss in losses] == [int(torch.tensor(v, dtype=dtype)) for v in (300, 301)]

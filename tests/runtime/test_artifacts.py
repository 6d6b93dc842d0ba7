"""What torch compiled is found by the next process, and a damaged or full disk stops no run."""

import pytest
import torch
from support import laws
from support.drivers import X, small
from torch import nn
from torch._dynamo.utils import counters

from fxlocal import Driver
from fxlocal.schedules import Constant


@pytest.mark.slow  # compiles
def test_the_next_process_finds_what_was_compiled(tmp_path):
    from torch._inductor.utils import fresh_cache

    hits = []
    for _ in range(2):  # each as in a process of its own
        torch._dynamo.reset()
        with fresh_cache(), torch._inductor.config.patch(fx_graph_cache=True):
            counters.clear()
            driver = Driver(small(), Constant(), compile="blocks", artifacts=tmp_path)
            driver.start_epoch()
            laws.step(driver.network(), X)
            driver.end_epoch()
            hits.append(counters["inductor"]["fxgraph_cache_hit"])
    assert hits[0] == 0 < hits[1]
    assert "saved" in driver.explain()


def test_artifacts_that_are_damaged_or_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    made = (b"artifacts", None)
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: made)

    def epoch_of(model):
        driver = Driver(model, Constant(), compile={}, artifacts=tmp_path)
        driver.start_epoch(), driver.network(), driver.end_epoch()
        return driver

    assert "saved" in epoch_of(small()).explain()
    epoch_of(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    files = [*tmp_path.iterdir()]  # one of each model
    assert len(files) == 2
    files[0].write_bytes(b"no artifacts"), files[1].write_bytes(b"")
    driver = Driver(small(), Constant(), compile={}, artifacts=tmp_path)
    assert "damaged, to be made anew" in driver.explain()
    monkeypatch.setattr("pathlib.Path.write_bytes", raise_full)
    with pytest.warns(UserWarning, match="not saved: .*No space"):
        epoch_of(small())
    with pytest.raises(ValueError, match="no such folder; make it"):
        Driver(small(), Constant(), compile=True, artifacts=tmp_path / "none")
    with pytest.raises(ValueError, match="compile=False makes none"):
        Driver(small(), Constant(), artifacts=tmp_path)


def raise_full(*_):
    raise OSError(28, "No space left on device")

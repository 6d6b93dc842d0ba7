"""A prefix computed once: bit for bit what computing it again trains, or refused, or made anew."""

import copy
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from support import laws
from support.cached import DATA, RESIDUAL, Moving, prefix, train
from support.nets import NETS, Written
from support.tiny import DropoutNet
from torch import nn

from fxlocal import ActivationCache, Driver, Freeze, Hebbian, PlanError
from fxlocal.runtime.cache.kept import Kept
from fxlocal.runtime.cache.rows import Rows
from fxlocal.schedules import Static

FROZEN = dict(rule=Freeze(), weak_supervision=False, norm="eval")


@pytest.fixture(autouse=True)
def always_pays(monkeypatch):
    """Else the clock of a busy machine decides."""
    monkeypatch.setattr(Kept, "compute_seconds", 1.0)


@pytest.fixture
def computed(monkeypatch):
    """The number of samples of each forward of a prefix, but for trials."""
    sizes, values = [], Kept.values

    def counting(self, before, ids, given):
        def count(*inputs):
            sizes.append(len(inputs[0]))
            return before(*inputs)

        return values(self, count, ids, given)

    monkeypatch.setattr(Kept, "values", counting)
    return sizes


@pytest.mark.parametrize(
    "name, edge, budget, files",
    [("residual", 3, "1MiB", False), ("diamond", 4, "9kB", False), ("unet", 2, "9kB", True)],
)
def test_it_trains_bit_for_bit_as_without(name, edge, budget, files, tmp_path, computed):
    cache = ActivationCache(budget, tmp_path if files else None)
    models = [NETS[name].build() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    schedule = Moving(0, 1, edge, edge, edge)
    plain, losses = (
        train(model, schedule, one)[0] for model, one in zip(models, (None, cache), strict=True)
    )
    assert losses == plain
    laws.assert_equal(models[0].state_dict(), models[1].state_dict(), "state")
    # Two batches in each of four epochs; what is left out of the first comes in a later one.
    assert sum(computed) <= 6 * 8 if files or budget == "1MiB" else 6 * 8 < sum(computed) < 8 * 8
    assert bool(list(tmp_path.glob("*/*.npy"))) == files
    cache.drop()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_its_parts_are_compiled_apart(computed):
    how = {"backend": "aot_eager"}
    runs = [
        train(RESIDUAL(), Moving(0, 3, 3, 3), cache, epochs=4, batch=16, compile=own)[0]
        for cache, own in ((None, False), (ActivationCache("1MiB"), how))
    ]
    assert runs[0] == pytest.approx(runs[1], rel=1e-5) and 2 <= len(computed) <= 3


def test_bfloat16_takes_half_and_rounds(computed):
    caches = [ActivationCache("1MiB", dtype=dtype) for dtype in (None, torch.bfloat16)]
    runs = []
    for cache in caches:
        torch.manual_seed(0)
        runs.append(train(RESIDUAL(), prefix(3), cache, epochs=3)[0])
    whole, half = (cache.kept._rows.nbytes for cache in caches)
    assert half == whole // 2
    assert runs[0][:2] == runs[1][:2]  # the epoch that fills computes as ever
    assert runs[0] != runs[1] and runs[0] == pytest.approx(runs[1], rel=0.02)


def test_a_batch_of_another_size_is_computed_whole(computed):
    net = Driver(RESIDUAL(), prefix(3), cache=ActivationCache("1MiB"))
    net.start_epoch()
    for rows in (8, 8, 5, 8):
        net.network()(DATA[:rows], sample_ids=range(rows))
    assert computed == [8]


def test_sizes_and_tables_that_cross_are_kept_once(computed):
    def body(self, x):
        table = self.table.weight.t() * 2
        h = self.first(x)
        batch, width = h.shape
        return self.last(h.view(batch, width) @ table) + h.mean(1, keepdim=True)

    model = Written(body, first=nn.Linear(4, 6), table=nn.Linear(6, 5), last=nn.Linear(5, 2))
    x = torch.randn(3, 4)
    driver = Driver(model, prefix("last", norm="train"), cache=ActivationCache("1MiB"))
    driver.start_epoch()
    outputs = [driver.network()(x, sample_ids=[4, 5, 6]) for _ in range(3)]
    assert computed == [3]
    laws.assert_equal(outputs[0], outputs[2], "output")


def test_reading_that_takes_longer_is_left(monkeypatch, computed):
    monkeypatch.setattr(Kept, "compute_seconds", 0.0)
    cache = ActivationCache("1MiB")
    _, driver = train(RESIDUAL(), prefix(3), cache, epochs=4)
    assert cache.kept._rows is None and len(computed) < 4
    assert "not used: the prefix takes 0 us a sample, reading" in driver.explain()


# --- what changes ---------------------------------------------------------------------------------


EDITS = [
    lambda model: model.stem[0].weight.data.mul_(2),  # no version tells: it is read in each epoch
    lambda model: model.load_state_dict({n: 2 * p for n, p in model.state_dict().items()}),
    lambda model: model.stem[1].running_mean.add_(1),
    lambda model: setattr(model.stem[0], "dilation", (2, 2)),
    lambda model: model.stem[0].register_forward_hook(lambda module, given, made: 2 * made),
]


@pytest.mark.parametrize("edit", EDITS)
def test_a_changed_prefix_is_computed_anew(edit, computed):
    model = RESIDUAL()
    driver = Driver(model, prefix(3), cache=ActivationCache("1MiB"))
    for _ in range(2):
        driver.start_epoch()
        driver.network()(DATA[:4], sample_ids=range(4))
        driver.end_epoch()
    assert computed == [4]
    with torch.no_grad():
        edit(model)
    driver.start_epoch()
    found = driver.network()(DATA[:4], sample_ids=range(4))
    assert computed == [4, 4]
    other = Driver(model, prefix(3))
    other.start_epoch()
    laws.assert_equal(found, other.network()(DATA[:4]), "output")


def test_another_model_of_the_same_graph_has_its_own_values(computed):
    cache, found, model = ActivationCache("1MiB"), [], RESIDUAL()
    for _ in range(2):
        model = copy.deepcopy(model)
        torch.nn.init.normal_(model.stem[0].weight)
        driver = Driver(model, prefix(3), cache=cache)
        driver.start_epoch()
        found.append(driver.network()(DATA[:4], sample_ids=range(4)))
    assert computed == [4, 4] and not torch.equal(*found)


def test_writing_the_same_values_changes_nothing(computed):
    model = RESIDUAL()
    driver = Driver(model, prefix(3), cache=ActivationCache("1MiB"))
    driver.start_epoch()
    for _ in range(3):
        model.stem[1].running_mean.copy_(model.stem[1].running_mean.clone())  # as a broadcast does
        driver.network()(DATA[:4], sample_ids=range(4))
    assert computed == [4]


def cut_short(path):
    with path.open("r+b") as file:
        file.truncate(200)


def scribbled(path):
    with path.open("r+b") as file:
        file.seek(300)
        file.write(bytes(range(100, 160)))


@pytest.mark.parametrize("damage", [cut_short, scribbled, lambda path: path.unlink()])
def test_a_damaged_file_is_noticed_and_made_anew(damage, tmp_path, computed):
    driver = Driver(RESIDUAL(), prefix(3), cache=ActivationCache(1, tmp_path))
    driver.start_epoch()
    first = driver.network()(DATA[:4], sample_ids=range(4))
    damage(next(tmp_path.glob("*/*.npy")))
    with pytest.warns(UserWarning, match=r"cache: .*fxlocal-cache-.*: it is filled anew"):
        again = driver.network()(DATA[:4], sample_ids=range(4))
    laws.assert_equal(first, again, "output")
    assert computed == [4, 4]
    driver.network()(DATA[:4], sample_ids=range(4))
    assert computed == [4, 4]


def test_a_dead_process_s_files_go_and_a_stranger_s_stay(tmp_path):
    (tmp_path / "fxlocal-cache-dead").mkdir()
    (tmp_path / "fxlocal-cache-dead" / "lock").touch()
    (tmp_path / "0-0.npy").write_text("mine")
    driver = Driver(RESIDUAL(), prefix(3), cache=ActivationCache(1, tmp_path))
    driver.start_epoch()
    driver.network()(DATA[:4], sample_ids=range(4))
    assert not (tmp_path / "fxlocal-cache-dead").exists()
    assert (tmp_path / "0-0.npy").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 2


def test_files_that_are_no_faster_are_given_up(tmp_path, monkeypatch, computed):
    monkeypatch.setattr(Rows, "seconds_of_reading", lambda self, slots: 2.0 * len(slots))
    cache = ActivationCache("9kB", tmp_path)
    train(RESIDUAL(), prefix(3), cache, epochs=2)
    assert cache.kept._full and 0 < len(cache.kept._places) < 16 < sum(computed)
    assert "from files 2000000 us" in cache.explain() and "not used" in cache.explain()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_a_share(tmp_path, monkeypatch, computed):
    full = mock.Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr("os.posix_fallocate", full)
    cache = ActivationCache("9kB", tmp_path)
    with pytest.warns(UserWarning, match="cache: .*No space left.*: no more samples are kept"):
        train(RESIDUAL(), prefix(3), cache, epochs=2)
    assert cache.kept._full and 0 < len(cache.kept._places) < 16
    assert full.call_count == 1 and list(tmp_path.glob("*/*.npy")) == []


def test_it_is_in_no_checkpoint():
    _, driver = train(RESIDUAL(), prefix(3), ActivationCache("1MiB"), epochs=1)
    _, plain = train(RESIDUAL(), prefix(3), None, epochs=1)
    assert driver.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(driver.state_dict())  # nor does it tell two runs apart


# --- refusals -------------------------------------------------------------------------------------


def functional_dropout(self, x):
    return self.last(F.dropout(self.first(x), 0.5, self.training))


def own_norm(self, x):
    h = self.first(x)
    return self.last(h - h.mean(0))


def transposed(self, x):
    return self.last(self.first(x).t())


def noisy(self, x):
    return self.last(self.first(x).exponential_())


def two_linear(body):
    return Written(
        body, first=nn.Linear(3, 6), last=nn.Linear(6 if body is not transposed else 4, 2)
    )


REFUSED = {
    "a rule": (RESIDUAL, prefix(3, rule=Hebbian(0.1)), r"Hebbian\(.*Freeze"),
    "norm='train'": (
        RESIDUAL,
        prefix(3, norm="train"),
        r"'stem_1' is BatchNorm2d, whose batch statistics.*norm='eval'",
    ),
    "dropout": (DropoutNet, prefix("conv2"), "'drop' is Dropout2d, drawn anew"),
    "refresh": (
        RESIDUAL,
        Static(epochs=4, largest=0.8, start=0.2, refresh_every=4, **FROZEN),
        r"trains what it had frozen\. Give refresh_every=None",
    ),
    "F.dropout": (lambda: two_linear(functional_dropout), prefix("last"), "'dropout' draws"),
}


@pytest.mark.parametrize("build, schedule, message", REFUSED.values(), ids=REFUSED)
def test_what_draws_or_learns_is_refused_when_the_driver_is_made(build, schedule, message):
    with pytest.raises(PlanError, match=message):
        Driver(build(), schedule, cache=ActivationCache())


TRIED = {
    own_norm: "a row of 'detach' depends on other samples",
    transposed: "'detach' crosses the boundary and has no row for each of 4 samples",
    noisy: "'exponential_' draws random numbers",
}


@pytest.mark.parametrize("body, message", TRIED.items())
def test_what_a_graph_does_not_tell_is_tried(body, message):
    driver = Driver(two_linear(body), prefix("last"), cache=ActivationCache())
    driver.start_epoch()
    with pytest.raises(PlanError, match=message):
        driver.network()(torch.randn(4, 3), sample_ids=range(4))


@pytest.mark.parametrize(
    "rows, ids, message",
    [
        (DATA[:4], None, "sample_ids are missing.*WithIds"),
        (DATA[:4], [0, 1, 2, 1], "sample_ids: 1 comes twice in a batch"),
        (DATA[:4], torch.arange(4)[:, None], "one id for each row"),
        (DATA[:4], 3, "one id for each row"),
        (DATA[:4], range(5), r"5 ids, and an input of shape \(4, 3, 8, 8\)"),
        (DATA[:4].flip(3), range(4), "sample 0 came with another input.*augmentations=4"),
        (DATA[:4], [0, 1, 3, 2], "sample 3 came with another input"),
    ],
)
def test_ids_that_mean_nothing_are_refused(rows, ids, message):
    driver = Driver(RESIDUAL(), prefix(3), cache=ActivationCache())
    driver.start_epoch()
    driver.network()(DATA[:4], sample_ids=range(4))
    with pytest.raises(ValueError, match=message):
        driver.network()(rows, sample_ids=ids)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(bytes="much"), "bytes='much': give a number"),
        (dict(bytes=True), "bytes=True"),
        (dict(bytes="0.5"), "bytes='0.5'"),  # of a byte
        (dict(dtype=torch.int8), "dtype=torch.int8"),
        (dict(folder="/nowhere"), "'/nowhere': there is none"),
    ],
)
def test_a_cache_that_is_none_is_refused(given, message):
    with pytest.raises(PlanError, match=message):
        ActivationCache(**given)


def test_bytes_alone_are_no_cache():
    with pytest.raises(PlanError, match="cache='4GiB': give an fxlocal"):
        Driver(RESIDUAL(), prefix(3), cache="4GiB")


def test_evaluation_asks_for_no_ids():
    model = RESIDUAL()
    driver = Driver(model, prefix(3), cache=ActivationCache())
    driver.start_epoch()
    network = driver.network()
    model.eval()
    laws.assert_equal(network(DATA[:4]), model(DATA[:4]), "output")
    model.train()
    with torch.no_grad():
        network(DATA[:4])

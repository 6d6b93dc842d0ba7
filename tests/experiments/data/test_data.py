import hashlib
import pickle
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision import datasets

from fxlocal.experiments.data.catalogue import DATA, DataError, batches, load_data
from fxlocal.experiments.data.images import InMemory

MEAN = torch.tensor([0.4914, 0.4822, 0.4465])[:, None, None]
STD = torch.tensor([0.2470, 0.2435, 0.2616])[:, None, None]


def rows(images: Tensor) -> list[tuple[float, ...]]:
    return sorted(tuple(row) for row in images.flatten(1).tolist())


def assert_same(first: InMemory, second: InMemory) -> None:
    assert torch.equal(first.images, second.images) and torch.equal(first.labels, second.labels)


# digits, glyphs, fake


@pytest.fixture
def load_digits():
    """As torchvision, sklearn takes seconds to import."""
    from sklearn.datasets import load_digits

    return load_digits


def test_digits_are_split_without_loss_and_normalised(load_digits):
    data = load_data("digits")
    images = torch.cat([data.train.images, data.test.images])
    assert data.name == "digits" and data.num_classes == 10 and data.augment is None
    assert images.shape == (1797, *data.shape) and data.shape == (1, 8, 8)
    expected = (torch.tensor(load_digits().images, dtype=torch.float32) / 16 - 0.305) / 0.376
    torch.testing.assert_close(
        torch.tensor(rows((images * 16).round())), torch.tensor(rows((expected * 16).round()))
    )
    assert abs(data.train.images.mean()) < 0.02 and abs(data.train.images.std() - 1) < 0.02
    assert torch.cat([data.train.labels, data.test.labels]).bincount().min() > 170


def test_digits_keep_their_labels(load_digits):
    data = load_data("digits")
    bunch = load_digits()
    known = {tuple(row): label for row, label in zip(bunch.data, bunch.target, strict=True)}
    pixels = ((data.test.images * 0.376 + 0.305) * 16).round().flatten(1)
    for row, label in zip(pixels.tolist(), data.test.labels.tolist(), strict=True):
        assert known[tuple(row)] == label


@pytest.mark.parametrize(
    ("name", "options"),
    [("digits", {}), ("glyphs", {"num_train": 60, "num_test": 30}), ("fake", {"num_train": 60})],
)
def test_the_seed_fixes_the_data_and_nothing_else_does(name, options):
    before = torch.get_rng_state()
    first, again, other = (load_data(name, seed=seed, **options) for seed in (0, 0, 1))
    assert_same(first.train, again.train)
    assert_same(first.test, again.test)
    assert not torch.equal(first.train.images, other.train.images)
    assert not torch.equal(first.test.images, other.test.images)
    assert torch.equal(torch.get_rng_state(), before)


def test_glyphs_have_the_asked_number_size_and_strength():
    data = load_data("glyphs", num_train=300, num_test=20, size=16, strength=0.0)
    assert data.num_classes == 36 and data.shape == (3, 16, 16)
    assert data.train.images.shape == (300, 3, 16, 16) and data.test.images.shape[0] == 20
    assert abs(data.train.images.mean()) < 0.1 and abs(data.train.images.std() - 1) < 0.1
    top = data.train.images[:, :, 0]
    assert torch.equal(top, top[..., :1].expand_as(top))  # clean: nothing above the glyph
    hard = load_data("glyphs", num_train=300, num_test=20, size=16, strength=1.0)
    assert hard.train.images[:, :, 0].std(2).min() > 0


def test_no_glyph_for_testing_is_one_for_training():
    sets = [load_data("glyphs", num_train=50, num_test=50, seed=seed) for seed in (0, 1)]
    images = [row for data in sets for part in (data.train, data.test) for row in rows(part.images)]
    assert len(set(images)) == 200


def test_fake_has_the_asked_number_and_size():
    data = load_data("fake", num_train=50, num_test=7, size=20)
    assert data.shape == (3, 20, 20) and data.num_classes == 10
    assert data.train.images.shape == (50, 3, 20, 20) and len(data.test) == 7
    assert set(data.train.labels.tolist()) <= set(range(10)) and data.train.images.std() > 0.9


# CIFAR


def write(path: Path, content: object) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=2))
    return hashlib.md5(path.read_bytes()).hexdigest()


def cifar_part(num: int, seed: int, labels: str, num_classes: int) -> dict[str, object]:
    draw = np.random.default_rng(seed)
    return {
        "data": draw.integers(0, 256, (num, 3072), dtype=np.uint8),
        labels: draw.integers(0, num_classes, num).tolist(),
    }


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """Five training batches of 4 images, a test batch of 3, and the names, as published."""
    source, folder = datasets.CIFAR10, tmp_path / "cifar-10-batches-py"
    parts = {
        name: cifar_part(3 if name == "test_batch" else 4, seed, "labels", 10)
        for seed, (name, _) in enumerate([*source.train_list, *source.test_list])
    }
    sums = {name: write(folder / name, part) for name, part in parts.items()}
    names = write(folder / "batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(source, "train_list", [[n, sums[n]] for n in sums if n != "test_batch"])
    monkeypatch.setattr(source, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": names})
    return tmp_path, parts


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    source, folder = datasets.CIFAR100, tmp_path / "cifar-100-python"
    parts = {
        "train": cifar_part(9, 0, "fine_labels", 100),
        "test": cifar_part(5, 1, "fine_labels", 100),
    }
    sums = {name: write(folder / name, part) for name, part in parts.items()}
    names = write(folder / "meta", {"fine_label_names": [str(i) for i in range(100)]})
    monkeypatch.setattr(source, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(source, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": names})
    return tmp_path, parts


def test_cifar10_is_read_in_order_and_normalised(cifar10):
    root, parts = cifar10
    data = load_data("cifar10", root=root)
    assert data.num_classes == 10 and data.shape == (3, 32, 32)
    assert data.train.images.shape == (20, 3, 32, 32) and len(data.test) == 3
    pixels = torch.tensor(parts["data_batch_2"]["data"]).view(4, 3, 32, 32)
    torch.testing.assert_close(data.train.images[4:8] * STD + MEAN, pixels / 255)
    assert data.train.labels[4:8].tolist() == parts["data_batch_2"]["labels"]
    assert data.test.labels.tolist() == parts["test_batch"]["labels"]
    assert data.train.images.is_contiguous()


def test_cifar100_has_the_fine_labels(cifar100):
    root, parts = cifar100
    data = load_data("cifar100", root=str(root))
    assert data.num_classes == 100 and len(data.train) == 9 and len(data.test) == 5
    assert data.train.labels.tolist() == parts["train"]["fine_labels"]
    assert abs(data.train.images.mean()) < 0.2


def test_cifar_is_augmented_in_training(cifar10):
    data = load_data("cifar10", root=cifar10[0])
    generator = torch.Generator().manual_seed(0)
    first = next(batches(data.train, 20, generator=generator, augment=data.augment))[0]
    border = torch.cat([first[:, :, (0, -1)].flatten(1), first[..., (0, -1)].flatten(1)], 1)
    assert (border == 0).float().mean() > 0.3  # a shift by up to 4 pixels lets zeros in
    assert (first == 0).all(1).all(1).sum(1).max() <= 4


def test_cifar_that_is_there_is_not_downloaded(cifar10, monkeypatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("downloads")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refuse)
    assert len(load_data("cifar10", root=cifar10[0], download=True).train) == 20


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_missing_cifar_says_where_to_point(name, tmp_path):
    base = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]
    with pytest.raises(DataError) as error:
        load_data(name, root=tmp_path)
    assert str(error.value) == (
        f"cannot load '{name}' from {tmp_path / base}: there is no such folder. Point --data-root "
        f"at the folder that holds {base}, or add --download"
    )
    assert not list(tmp_path.iterdir())


def test_cifar_is_looked_for_in_data_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"from data.cifar-10-batches-py: there is no such folder"):
        load_data("cifar10")


@pytest.mark.parametrize("hurt", [Path.unlink, lambda path: path.write_bytes(b"cut")])
def test_damaged_cifar_is_refused(cifar10, hurt):
    root, _ = cifar10
    hurt(root / "cifar-10-batches-py" / "data_batch_3")
    with pytest.raises(DataError, match=r"it is incomplete or damaged\. Point --data-root"):
        load_data("cifar10", root=root)


def test_a_failed_download_says_why(tmp_path, monkeypatch):
    def fail(*args: object, **kwargs: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fail)
    with pytest.raises(DataError, match=r"cannot download 'cifar10' to .*no route to host"):
        load_data("cifar10", root=tmp_path, download=True)


# Names and options


@pytest.mark.parametrize(
    ("name", "near"),
    [("digit", "digits"), ("cifar", "cifar10"), ("folder", "folder:PATH"), ("folder:", "folder")],
)
def test_an_unknown_name_is_answered_with_the_nearest(name, near):
    with pytest.raises(DataError, match=rf"unknown data '{name}'\. Nearest: '{near}"):
        load_data(name)


@pytest.mark.parametrize("option", ["num_train", "num_test", "size"])
@pytest.mark.parametrize("count", [0, -3])
def test_a_count_below_one_is_refused(option, count):
    with pytest.raises(DataError, match=f"{option} of 'fake' must be 1 or more, not {count}"):
        load_data("fake", **{option: count})


def test_glyphs_too_small_to_read_are_refused():
    with pytest.raises(DataError, match="size of 'glyphs' must be 8 or more, not 7"):
        load_data("glyphs", size=7)


@pytest.mark.parametrize("strength", [-0.1, 1.5, float("nan")])
def test_a_strength_out_of_range_is_refused(strength):
    message = f"strength of 'glyphs' must be between 0 and 1, not {strength}"
    with pytest.raises(DataError, match=message):
        load_data("glyphs", strength=strength)


@pytest.mark.parametrize(
    ("name", "option", "takes"),
    [
        ("digits", "num_train", "none of num_train, num_test, size, strength, split, skip_damaged"),
        ("cifar10", "size", "none of num_train, num_test, size, strength, split, skip_damaged"),
        ("fake", "strength", "num_train, num_test, size"),
        ("folder:somewhere", "num_test", "size, split, skip_damaged"),
    ],
)
def test_an_option_that_does_not_apply_is_refused(name, option, takes):
    message = f"{option}=1 does not apply to '{name}', which takes {takes}"
    with pytest.raises(DataError, match=f"^{message}$"):
        load_data(name, **{option: 1})


def test_every_listed_name_is_known(cifar10, cifar100, tmp_path):
    options = {"glyphs": {"num_train": 2, "num_test": 2}, "fake": {"num_train": 2, "num_test": 2}}
    for name in DATA:
        if name not in ("folder:PATH", "isbi2012"):  # these have tests of their own
            assert load_data(name, root=tmp_path, **options.get(name, {})).name == name

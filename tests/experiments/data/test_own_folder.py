"""Folders as users have them: other files, damage, giants, shares; and data of their own."""

import dataclasses
import warnings

import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from fxlocal.experiments.data import own
from fxlocal.experiments.data.catalogue import Data, DataError, batches, load_data
from fxlocal.experiments.data.images import FileError, InMemory


@pytest.fixture
def photos(tmp_path):
    """Eight images each of cats and dogs, of which two are damaged, and other files."""
    for name in ("cat", "dog"):
        for i in range(8):
            path = tmp_path / name / f"{i}.png"
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (20, 16), (30 * i, 7, 100)).save(path)
    (tmp_path / "cat" / "1.png").write_bytes(b"")
    (tmp_path / "dog" / "3.png").write_bytes((tmp_path / "dog" / "3.png").read_bytes()[:50])
    for name in ("notes.txt", "cat/readme.TXT", "dog/film.mp4", "dog/LICENSE", ".DS_Store"):
        (tmp_path / name).write_text("")
    return tmp_path


def load(path, **options):
    return load_data(f"folder:{path}", size=8, **options)


def test_damaged_files_are_left_out_and_counted(photos):
    with pytest.raises(FileError, match=r"cannot read .*png: .*--skip-damaged leaves it out"):
        list(batches(load(photos).train, 2, workers=0))
    data = load(photos, skip_damaged=True)
    assert len(data.train) + len(data.test) == 14
    assert (
        sum(len(y) for part in (data.train, data.test) for _, y in batches(part, 4, workers=0))
        == 14
    )
    (damaged,) = (note for note in data.notes if "left out" in note)
    assert damaged == f"{photos}: 2 damaged files are left out (1.png, 3.png)"
    assert data.classes == ("cat", "dog")


def test_other_files_are_counted_but_hidden_ones(photos):
    (note,) = load(photos).notes
    assert note.startswith(f"{photos}: 4 other files are ignored (")
    for kind in ("1 .txt", "1 .TXT", "1 .mp4", "1 no suffix"):
        assert kind in note


def test_a_class_of_damaged_files_is_refused(photos):
    for path in (photos / "cat").glob("*.png"):
        path.write_bytes(b"x")
    with pytest.raises(DataError, match=r"cannot read any image of .*cat"):
        load(photos, skip_damaged=True)


@pytest.mark.parametrize("split", [0.25, 0.5, 0.9])
def test_the_share_to_test_with_is_the_users(photos, split):
    data = load(photos, split=split)
    assert len(data.test) == int(16 * split) and len(data.train) == 16 - int(16 * split)


def test_a_split_is_refused_where_there_is_one(photos, tmp_path_factory):
    root = tmp_path_factory.mktemp("split")
    for part in ("train", "val"):
        (root / part).symlink_to(photos)
    with pytest.raises(DataError, match=r"split=0.2 does not apply to .*, which has val/"):
        load(root, split=0.2)
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(DataError, match="must be between 0 and 1"):
            load(photos, split=share)


def test_a_giant_is_named_in_one_line(photos, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    data = load(photos)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(FileError, match=r"cannot read .*png: .*exceeds limit"):
            list(batches(data.train, 2, workers=0))
    assert not any("cannot" in note for note in data.notes)


def test_an_image_too_narrow_to_resize_is_named(photos):
    path = photos / "cat" / "1.png"
    Image.new("L", (1, 30_000)).save(path)
    data = load_data(f"folder:{photos}", size=224, skip_damaged=True)
    assert any("1.png" in note for note in data.notes)


def test_a_folders_path_alone_is_answered_with_its_name(photos):
    with pytest.raises(DataError, match=f"is a folder: give folder:{photos}"):
        load_data(str(photos))


# --- data of the user's own ----------------------------------------------------------------------


class Squares:
    """A map-style set that is no `TensorDataset`."""

    classes = ("small", "large")

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return torch.full((1, 4, 4), float(index)), index % 2


def pair(dtype=torch.float32):
    images, labels = torch.zeros(6, 3, 4, 4, dtype=dtype), torch.tensor([0, 1, 2, 2, 1, 0])
    return TensorDataset(images, labels), TensorDataset(images[:2], labels[:2])


def whole():
    part = InMemory(torch.zeros(4, 1, 4, 4), torch.tensor([0, 1, 0, 1]))
    return Data("whole", part, part, 2, (1, 4, 4), statistics=((0.5,), (0.5,)))


class Unnamed(Squares):
    classes = ()


class Texts(Squares):
    def __getitem__(self, index):
        return "image", index


def fails():
    raise OSError("the disk is on fire")


MADE = {
    "pair": pair,
    "squares": lambda: (Squares(), Squares()),
    "whole": whole,
    "sized": lambda size, strength=1: pair(),
    "fails": fails,
    "nothing": lambda: None,
    "three": lambda: (*pair(), 3),
    "empty": lambda: ([], []),
    "bytes": lambda: pair(torch.uint8),
    "unnamed": lambda: (Unnamed(), Unnamed()),
    "texts": lambda: (Texts(), Texts()),
    "number": 3,
}


@pytest.fixture
def made(monkeypatch):
    monkeypatch.setattr(own, "import_own", lambda name, what, error: MADE[name.split(":")[1]])


def test_what_a_function_returns_is_a_data_set(made):
    data = load_data("mine:pair")
    assert (data.num_classes, data.shape, len(data.train), len(data.test)) == (3, (3, 4, 4), 6, 2)
    assert isinstance(data.train, InMemory) and data.name == "mine:pair"
    data = load_data("mine:squares")
    assert (data.num_classes, data.shape, data.classes) == (2, (1, 4, 4), ("small", "large"))
    (x, y), *_ = batches(data.train, 4, workers=0)
    assert x.shape == (4, 1, 4, 4) and y.tolist() == [0, 1, 0, 1]
    assert load_data("mine:whole") == dataclasses.replace(whole(), train=_any(), test=_any())
    assert load_data("mine:sized", size=3).num_classes == 3


class _any:
    def __eq__(self, other):
        return True


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fails", {}, "'mine:fails' raises OSError: the disk is on fire"),
        ("nothing", {}, "returned NoneType: give .train, test."),
        ("three", {}, "returned tuple: give .train, test."),
        ("empty", {}, "returned tuple"),
        ("bytes", {}, r"its first image is torch.uint8 \(3, 4, 4\): give float32"),
        ("unnamed", {}, "give its train set an attribute classes"),
        ("texts", {}, "its first image is <class 'str'>"),
        ("number", {}, "is a int, not a function"),
        ("pair", {"size": 8}, "size=8 does not apply to 'mine:pair'"),
        ("sized", {}, "raises TypeError"),
    ],
)
def test_what_is_no_data_set_is_refused_in_one_line(made, name, options, message):
    with pytest.raises(DataError, match=message) as caught:
        load_data(f"mine:{name}", **options)
    assert "\n" not in str(caught.value)


def test_a_module_that_is_not_there_is_refused():
    with pytest.raises(DataError, match="cannot import 'no_such' for data 'no_such:thing'"):
        load_data("no_such:thing")

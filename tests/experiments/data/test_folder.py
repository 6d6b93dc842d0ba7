"""A folder of the user's images as a data set."""

import re
import struct
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fxlocal.experiments.cli.app import app
from fxlocal.experiments.data.catalogue import Data, DataError, batches, load_data
from fxlocal.experiments.data.decode import read_image

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def paint(path: Path, colour: tuple[int, int, int] = RED, size: tuple[int, int] = (20, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def fill(root: Path, classes: str = "ab", num: int = 4) -> None:
    """Write ``num`` images for each class, one letter a class, each image of its own colour."""
    for index, name in enumerate(classes):
        for i in range(num):
            paint(root / name / f"{i}.png", (10 * i, 100 * index, 7))


def load(root: Path, size: int = 16, **options: int) -> Data:
    return load_data(f"folder:{root}", size=size, **options)


def refuse(root: Path, *words: str) -> None:
    with pytest.raises(DataError) as error:
        load(root)
    for word in (f"cannot load 'folder:{root}'", *words):
        assert word in str(error.value)


def contents(data: Data) -> tuple[list[bytes], list[bytes]]:
    train, test = (
        [image.numpy().tobytes() for image, _ in (part[i] for i in range(len(part)))]
        for part in (data.train, data.test)
    )
    return train, test


@pytest.mark.parametrize("name", ["val", "test"])
def test_the_folders_own_split_is_kept(tmp_path, name):
    fill(tmp_path / "train", "abc", 3)
    fill(tmp_path / name, "abc", 1)
    data = load(tmp_path)
    assert (len(data.train), len(data.test), data.num_classes) == (9, 3, 3)
    assert data.name == f"folder:{tmp_path}" and data.shape == (3, 16, 16)
    assert [label for _, label in (data.train[i] for i in range(9))] == [0] * 3 + [1] * 3 + [2] * 3


def test_val_is_preferred_to_test(tmp_path):
    for name, num in (("train", 3), ("val", 1), ("test", 2)):
        fill(tmp_path / name, "ab", num)
    assert len(load(tmp_path).test) == 2


@pytest.mark.parametrize("train", ["", "train"])
def test_without_a_split_a_fifth_is_held_out_by_the_seed(tmp_path, train):
    fill(tmp_path / train, "ab", 10)
    first, again, other = (contents(load(tmp_path, seed=seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert len(first[1]) == 4 and len(set(first[0] + first[1])) == 20


def test_two_images_are_enough_for_a_split(tmp_path):
    fill(tmp_path, "ab", 1)
    data = load(tmp_path)
    assert len(data.train) == len(data.test) == 1


def test_images_of_any_mode_are_normalised_as_imagenet_is(tmp_path):
    paint(tmp_path / "train" / "a" / "0.png", RED)
    Image.new("L", (18, 18), 255).save(tmp_path / "train" / "a" / "1.png")
    Image.new("RGBA", (18, 18), (0, 255, 0, 255)).save(tmp_path / "train" / "a" / "2.png")
    fill(tmp_path / "train", "b", 1)
    fill(tmp_path / "val", "ab", 1)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    data = load(tmp_path)
    for index, colour in enumerate([(1, 0, 0), (1, 1, 1), (0, 1, 0)]):
        image, label = data.train[index]
        expected = ((torch.tensor(colour) - mean) / std)[:, None, None].expand(3, 16, 16)
        torch.testing.assert_close(image, expected)
        assert type(label) is int and label == 0


def test_images_are_resized_and_cropped_in_the_middle(tmp_path):
    fill(tmp_path / "train", "ab", 1)
    fill(tmp_path / "val", "ab", 1)
    striped = Image.new("RGB", (96, 32), BLUE)
    striped.paste(GREEN, (32, 0, 64, 32))
    striped.save(tmp_path / "train" / "a" / "0.png")
    image, _ = load(tmp_path, size=56).train[0]
    assert image.shape == (3, 56, 56)
    # The shorter side becomes 64 pixels, so that the middle 56 lie in the green middle third.
    assert torch.equal(image, image[:, :1, :1].expand_as(image)) and image[1, 0, 0] > 2


def test_batches_are_decoded_shuffled_and_augmented(tmp_path):
    fill(tmp_path / "train", "ab", 4)
    fill(tmp_path / "val", "ab", 1)
    data = load(tmp_path)

    def epoch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        drawn = list(batches(data.train, 3, generator=generator, augment=data.augment))
        assert [len(labels) for _, labels in drawn] == [3, 3, 2]
        return torch.cat([x for x, _ in drawn]), torch.cat([y for _, y in drawn])

    (images, labels), (again, _), (other, _) = epoch(1), epoch(1), epoch(2)
    assert torch.equal(images, again) and not torch.equal(images, other)
    assert labels.bincount().tolist() == [4, 4]
    assert isinstance(data.augment, partial) and data.augment.keywords == {"padding": 2}


def test_the_usual_size_is_imagenets(tmp_path):
    fill(tmp_path, "ab", 1)
    data = load_data(f"folder:{tmp_path}")
    assert data.shape == (3, 224, 224) and data.train[0][0].shape == data.shape


def test_the_home_folder_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    fill(tmp_path / "pictures" / "train", "abc", 1)
    fill(tmp_path / "pictures" / "val", "abc", 1)
    assert load_data("folder:~/pictures", size=8).num_classes == 3


def test_a_missing_folder_is_refused(tmp_path):
    refuse(tmp_path / "nowhere", "No such file", f"Expected {tmp_path / 'nowhere'}/CLASS/*.jpg")


def test_a_file_is_refused(tmp_path):
    paint(tmp_path / "a.png")
    refuse(tmp_path / "a.png", "Not a directory")


def test_an_empty_folder_is_refused(tmp_path):
    refuse(tmp_path, "Couldn't find any class folder", "with at least two classes")


def test_a_class_without_images_is_refused(tmp_path):
    fill(tmp_path, "ab", 1)
    (tmp_path / "empty").mkdir()
    refuse(tmp_path, "no valid file for the classes empty")


def test_a_single_class_is_refused(tmp_path):
    fill(tmp_path, "a", 3)
    refuse(tmp_path, "holds only one class folder, 'a'; expected at least two")


def test_a_split_without_train_is_refused(tmp_path):
    fill(tmp_path / "val", "ab", 1)
    fill(tmp_path / "test", "ab", 1)
    refuse(tmp_path, "found val, test in it, but no train")


def test_splits_with_different_classes_are_refused(tmp_path):
    fill(tmp_path / "train", "abc", 1)
    fill(tmp_path / "val", "abd", 1)
    refuse(tmp_path, "train and val differ in the classes c, d")


def test_a_damaged_image_names_its_file(tmp_path):
    fill(tmp_path / "train", "ab", 1)
    fill(tmp_path / "val", "ab", 1)
    (tmp_path / "train" / "a" / "0.png").write_bytes(b"no image")
    data = load(tmp_path)
    with pytest.raises(OSError, match=re.escape(str(tmp_path / "train" / "a" / "0.png"))):
        list(batches(data.train, 1))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_grey_of_16_bits_keeps_its_depth(tmp_path, suffix):
    fill(tmp_path / "train", "ab", 1)
    fill(tmp_path / "val", "ab", 1)
    paint(tmp_path / "val" / "a" / "0.png", (51, 51, 51))
    levels = (0, 13107, 13108, 65535)
    for i, level in enumerate(levels):
        pixels = np.full((20, 24), level, dtype=np.uint16)
        path = tmp_path / "train" / "a" / f"{i}.{suffix}"
        if suffix == "pgm":
            path.write_bytes(b"P5 24 20 65535\n" + pixels.astype(">u2").tobytes())
        else:
            Image.fromarray(pixels).save(path)
    (tmp_path / "train" / "a" / "0.png").unlink(missing_ok=suffix != "png")
    if suffix == "png":
        Image.fromarray(np.zeros((20, 24), dtype=np.uint16)).save(tmp_path / "train/a/0.png")
    data = load(tmp_path)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for i, level in enumerate(levels):
        expected = ((level / 65535 - mean) / std)[:, None, None].expand(3, 16, 16)
        torch.testing.assert_close(data.train[i][0], expected)
    torch.testing.assert_close(data.train[1][0], data.test[0][0])  # 8 bits of the same grey
    assert not torch.equal(data.train[1][0], data.train[2][0])


@pytest.mark.parametrize(("bits", "photometric"), [(12, 1), (16, 1), (16, 0)])
def test_grey_of_a_tiff_file_is_on_the_scale_that_its_tags_say(tmp_path, bits, photometric):
    path = tmp_path / "grey.tif"
    value = 0x400 if bits == 12 else 0x4000
    pixels = b"\x40\x04\x00" * 8 if bits == 12 else value.to_bytes(2, "little") * 16
    write_tiff(path, pixels, bits, photometric)
    level = value / (2**bits - 1)
    expected = np.full((4, 4), level if photometric else 1 - level, dtype=np.float32)
    np.testing.assert_allclose(np.asarray(read_image(str(path))), expected, rtol=1e-6)


def write_tiff(path: Path, pixels: bytes, bits: int, photometric: int) -> None:
    tags = [(256, 4), (257, 4), (258, bits), (259, 1), (262, photometric), (273, 122)]
    tags += [(277, 1), (278, 4), (279, len(pixels))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    path.write_bytes(struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + pixels)


@pytest.mark.parametrize(("mode", "value"), [("F", 0.5), ("F", 200.0), ("I", 70000), ("I", -1)])
def test_pixels_without_a_scale_are_refused_by_mode(tmp_path, mode, value):
    path = tmp_path / "image.tif"
    Image.new(mode, (8, 8), value).save(path)
    with pytest.raises(DataError, match=re.escape(f"cannot read {path}: ") + f".*{mode}"):
        read_image(str(path))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_pixels_of_8_bits_are_read_as_ever(tmp_path, mode):
    path = tmp_path / "image.tif"
    picture = Image.linear_gradient("L").convert("RGB").convert(mode)
    picture.save(path)
    assert read_image(str(path)).tobytes() == picture.convert("RGB").tobytes()


def test_hidden_files_and_folders_are_no_classes_and_no_images(tmp_path):
    root = tmp_path / ".hidden" / "root"  # what is above the set does not matter
    for folder in ("train", "val"):
        fill(root / folder, "ab", 2)
        (root / folder / ".ipynb_checkpoints").mkdir()
        paint(root / folder / ".thumbnails" / "0.png")
        paint(root / folder / "a" / ".cache" / "deep" / "0.png")
        (root / folder / "b" / "._0.png").write_bytes(b"\0\5\26\7")
        (root / folder / ".DS_Store").write_bytes(b"")
    data = load(root)
    assert (data.num_classes, len(data.train), len(data.test)) == (2, 4, 4)
    assert sum(len(labels) for _, labels in batches(data.train, 1)) == 4


def test_hidden_folders_alone_are_no_set(tmp_path):
    paint(tmp_path / ".a" / "0.png")
    paint(tmp_path / ".b" / "0.png")
    refuse(tmp_path, "Couldn't find any class folder")


SUFFIXES = ("jpg", "png", "webp", "tif", "bmp", "ppm")


@pytest.mark.sample(5)
@pytest.mark.parametrize(
    ("suffix", "kept"), [*product(SUFFIXES, (0.02, 0.9)), *product(SUFFIXES[:2], (0.0, 0.5))]
)
def test_an_image_cut_off_is_named_in_one_line(tmp_path, suffix, kept):
    fill(tmp_path / "train", "ab", 2)
    fill(tmp_path / "val", "ab", 1)
    path = tmp_path / "train" / "a" / f"cut.{suffix}"
    Image.effect_noise((64, 64), 90).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(DataError) as error:
        list(batches(load(tmp_path).train, 2))
    message = str(error.value)
    assert message.startswith(f"cannot read {path}: ") and "\n" not in message
    assert "Traceback" not in message and message.endswith("Replace or remove the file")


def test_the_command_line_names_a_damaged_image_in_one_line(tmp_path):
    fill(tmp_path / "data", "ab", 4)
    path = tmp_path / "data" / "b" / "2.png"
    path.write_bytes(path.read_bytes()[:60])
    command = f"train --data folder:{tmp_path / 'data'} --size 32 --model resnet8 --width 4"
    command += f" --epochs 1 --batch-size 2 --strategy sgd --out {tmp_path / 'out'}"
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()[-1:]
    assert line.startswith(f"error: cannot read {path}: ") and "Traceback" not in result.output

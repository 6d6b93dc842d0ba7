"""The challenge's stacks: read as published, cut, split, and refused when they are not as said."""

import struct
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from fxlocal.experiments.data.catalogue import Data, DataError, load_data
from fxlocal.experiments.data.isbi2012 import LABELS, VOLUME


def write(path: Path, stack_SHW: Tensor, mode: str = "L") -> None:
    """Write a multi-page TIFF file, as Fiji writes stacks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = (Image.fromarray(page).convert(mode) for page in stack_SHW.numpy())
    first.save(path, save_all=True, append_images=rest)


def stacks(num: int = 10, height: int = 64, width: int = 64) -> tuple[Tensor, Tensor]:
    """Random pixels; they are cell where they are bright."""
    generator = torch.Generator().manual_seed(1)
    volume = torch.randint(256, (num, height, width), generator=generator, dtype=torch.uint8)
    return volume, (volume > 60).to(torch.uint8) * 255


def write_both(folder: Path, volume: Tensor, labels: Tensor) -> None:
    write(folder / VOLUME, volume)
    write(folder / LABELS, labels)


def load(root: Path, size: int = 32, **options: bool) -> Data:
    return load_data("isbi2012", root=root, size=size, **options)


def refuse(root: Path, *words: str) -> None:
    with pytest.raises(DataError) as error:
        load(root)
    for word in ("cannot load 'isbi2012' from", "Point --data-root", "no --download", *words):
        assert word in str(error.value)


@pytest.mark.parametrize("folder", ["", "isbi2012"])
def test_slices_are_cut_into_tiles_row_by_row_and_the_last_fifth_is_held_out(tmp_path, folder):
    volume, labels = stacks(height=64, width=96)
    write_both(tmp_path / folder, volume, labels)
    data = load(tmp_path)
    assert (data.name, data.task, data.num_classes) == ("isbi2012", "segmentation", 2)
    assert data.shape == (1, 32, 32) and (len(data.train), len(data.test)) == (8 * 6, 2 * 6)
    mean, std = volume[:8].float().mean(), volume[:8].float().std()
    for part, tile, (page, top, left) in (
        (data.train, 0, (0, 0, 0)),
        (data.train, 7, (1, 0, 32)),
        (data.train, 47, (7, 32, 64)),
        (data.test, 3, (8, 32, 0)),
    ):
        here = (page, slice(top, top + 32), slice(left, left + 32))
        torch.testing.assert_close(part.images[tile, 0], (volume[here].float() - mean) / std)
        assert torch.equal(part.labels[tile], (labels[here] == 255).long())


def test_white_is_the_foreground_whatever_its_value(tmp_path):
    volume, labels = stacks()
    write_both(tmp_path, volume, labels // 255 + 3)
    assert torch.equal(load(tmp_path, 64).test.labels, (labels[8:] == 255).long())


def test_the_default_tile_has_128_pixels_and_two_slices_are_enough(tmp_path):
    write_both(tmp_path, *stacks(2, 128, 256))
    data = load_data("isbi2012", root=tmp_path)
    assert data.shape == (1, 128, 128) and len(data.train) == len(data.test) == 2


def test_missing_files_are_named(tmp_path):
    refuse(tmp_path, f"there is no {VOLUME}")
    write(tmp_path / VOLUME, stacks()[0])
    refuse(tmp_path, f"there is no {LABELS}")


def test_damaged_files_are_named(tmp_path):
    write_both(tmp_path, *stacks())
    content = (tmp_path / VOLUME).read_bytes()
    for damaged in (b"", b"no picture", *(content[:n] for n in range(4, len(content), 1500))):
        (tmp_path / VOLUME).write_bytes(damaged)
        refuse(tmp_path)
    (tmp_path / VOLUME).write_bytes(b"no picture")
    refuse(tmp_path, f"{VOLUME} is damaged or no TIFF file")


def test_stacks_that_differ_are_refused(tmp_path):
    volume, labels = stacks()
    write_both(tmp_path, volume, labels[:9])
    refuse(tmp_path, "10 x 64 x 64 and 9 x 64 x 64 (slices x height x width) differ")
    write_both(tmp_path, volume, labels[:, :32])
    refuse(tmp_path, "10 x 64 x 64 and 10 x 32 x 64")


def test_labels_of_other_than_two_values_are_refused(tmp_path):
    volume, labels = stacks()
    labels[3, 5, 7] = 128
    write_both(tmp_path, volume, labels)
    refuse(tmp_path, f"{LABELS} must have two values, membrane and cell, not [0, 128, 255]")
    write_both(tmp_path, volume, torch.zeros_like(labels))
    refuse(tmp_path, "not [0]")


def test_pages_in_colour_and_single_slices_are_refused(tmp_path):
    volume, labels = stacks()
    write_both(tmp_path, volume, labels)
    write(tmp_path / VOLUME, volume, "RGB")
    refuse(tmp_path, f"{VOLUME} must hold 8-bit grey pages of one size, not RGB 64x64")
    write_both(tmp_path, volume[:1], labels[:1])
    refuse(tmp_path, "one slice cannot be split")


def test_tiles_must_fit_and_there_is_no_download(tmp_path):
    write_both(tmp_path, *stacks())
    with pytest.raises(DataError, match=r"size of 'isbi2012' must divide the slices' 64x64 .* 48"):
        load(tmp_path, 48)
    with pytest.raises(DataError, match=r"cannot download 'isbi2012'.*--data-root"):
        load(tmp_path, download=True)


def write_as_imagej(
    path: Path,
    stack: Tensor,
    num: int | None = None,
    order: str = "<",
    photometric: int = 1,
    per_strip: int = 0,
) -> None:
    """Write one directory entry, the text in which ImageJ says how many slices, and the slices."""
    slices, height, width = stack.shape
    text = f"ImageJ=1.54f\nimages={num or slices}\nslices={num or slices}\nloop=false\n\0".encode()
    rows = per_strip or height
    num_strips = height // rows
    tail = 8 + 2 + 12 * 10 + 4
    pixels = tail + len(text) + 8 * num_strips
    starts = [pixels + i * rows * width for i in range(num_strips)]
    counts = [rows * width] * num_strips
    lists = struct.pack(f"{order}{2 * num_strips}I", *starts, *counts)
    at = tail + len(text)
    one = num_strips == 1
    tags = [(256, 1, width), (257, 1, height), (258, 1, 8), (259, 1, 1), (262, 1, photometric)]
    tags += [(270, len(text), tail), (273, num_strips, starts[0] if one else at), (277, 1, 1)]
    tags += [(278, 1, rows), (279, num_strips, counts[0] if one else at + 4 * num_strips)]
    out = struct.pack(f"{order}2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(tags))
    for tag, count, value in tags:
        out += struct.pack(f"{order}HHII", tag, 2 if tag == 270 else 4, count, value)
    path.write_bytes(out + bytes(4) + text + lists + stack.numpy().tobytes())


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("num", [2, 5, 30])
def test_stacks_of_imagej_with_one_entry_are_read_whole(tmp_path, order, num):
    volume, labels = stacks(num, 64, 96)
    write_both(tmp_path, volume, labels)
    published = load(tmp_path)
    for name, stack in ((VOLUME, volume), (LABELS, labels)):
        write_as_imagej(tmp_path / name, stack, order=order)
    data = load(tmp_path)
    for part, other in ((data.train, published.train), (data.test, published.test)):
        assert torch.equal(part.images, other.images) and torch.equal(part.labels, other.labels)


@pytest.mark.parametrize(
    "form", [{"photometric": 0}, {"per_strip": 16}, {"per_strip": 32, "order": ">"}]
)
def test_stacks_of_imagej_in_another_form_are_refused_with_their_number(tmp_path, form):
    volume, labels = stacks(7)
    write_both(tmp_path, volume, labels)
    write_as_imagej(tmp_path / LABELS, labels, **form)
    refuse(tmp_path, f"{LABELS} holds 7 slices by ImageJ's header, but entries for 1 only")


def test_compressed_and_partly_entered_stacks_of_imagej_are_refused_with_their_number(tmp_path):
    volume, labels = stacks(4)
    write_both(tmp_path, volume, labels)
    first, *rest = (Image.fromarray(page) for page in volume.numpy())
    said = {"description": "ImageJ=1.54f\nimages=9\n"}
    first.save(tmp_path / VOLUME, compression="tiff_deflate", **said)
    refuse(tmp_path, f"{VOLUME} holds 9 slices by ImageJ's header, but entries for 1 only")
    first.save(tmp_path / VOLUME, save_all=True, append_images=rest, **said)
    refuse(tmp_path, f"{VOLUME} holds 9 slices by ImageJ's header, but entries for 4 only")


def test_a_stack_of_imagej_cut_off_is_refused_with_its_number(tmp_path):
    volume, labels = stacks(4)
    write_both(tmp_path, volume, labels)
    write_as_imagej(tmp_path / VOLUME, volume, num=5)
    refuse(tmp_path, f"{VOLUME} is damaged: it ends before the last of ImageJ's 5 slices")


def test_an_entry_for_each_slice_is_believed(tmp_path):
    volume, labels = stacks(4)
    write_both(tmp_path, volume, labels)
    first, *rest = (Image.fromarray(page) for page in volume.numpy())
    said = {"description": "ImageJ=1.54f\nimages=4\n"}
    first.save(tmp_path / VOLUME, save_all=True, append_images=rest, **said)
    assert len(load(tmp_path).train) == 3 * 4

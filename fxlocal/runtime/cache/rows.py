"""Rows of several tensors, kept by slot: in memory first, then in memory-mapped files.

The files are numpy's, in a folder of their own that goes when the rows do, or when the process
ends; what a process left that was killed is removed by the next one. A row that was read from a
file and is no longer what was written raises `DamagedError`.
"""

import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any
from weakref import finalize

import torch
from torch import Tensor

__all__ = ["DamagedError", "RowSpec", "Rows"]

_CHUNK_BYTES = 32 * 2**20
_FREE = 0.05  # of a disk that is left to others
_NAME = "fxlocal-cache-"


class DamagedError(RuntimeError):
    """A file is no longer what was written."""


@dataclass(frozen=True)
class RowSpec:
    """How rows of one value lie in memory, and what they were.

    Attributes:
        shape: of a row as it is kept, in the order in which it lay in memory.
        back: the dimensions, batch included, that put a kept batch into the value's order.
        kept: dtype that is kept.
        dtype: of the value.
    """

    shape: tuple[int, ...]
    back: tuple[int, ...]
    kept: torch.dtype
    dtype: torch.dtype

    @classmethod
    def of(cls, value: Tensor, dtype: torch.dtype | None) -> "RowSpec":
        """Return the spec of a value with a row per sample; floats are kept in ``dtype``."""
        order = sorted(range(1, value.dim()), key=value.stride, reverse=True)
        back = [0, *(order.index(dim) + 1 for dim in range(1, value.dim()))]
        kept = dtype if dtype is not None and value.is_floating_point() else value.dtype
        return cls(tuple(value.shape[dim] for dim in order), tuple(back), kept, value.dtype)

    @property
    def nbytes(self) -> int:
        """What a row takes."""
        return prod(self.shape) * self.kept.itemsize

    def laid(self, value: Tensor) -> Tensor:
        """Return a value with its dimensions in the order in which they lie in memory."""
        order = sorted(range(len(self.back)), key=self.back.__getitem__)
        return value.detach().permute(order)

    def pack(self, value: Tensor) -> Tensor:
        """Return rows as they are kept."""
        return self.laid(value).to("cpu", self.kept)

    def moved(self, rows: Tensor, device: torch.device) -> Tensor:
        """Return kept rows on a device, in the value's dtype."""
        return rows.to(device, non_blocking=True).to(self.dtype)

    def restored(self, rows: Tensor) -> Tensor:
        """Return such rows as the value was."""
        return rows.permute(self.back)


class Rows:
    """Keeps rows of several values.

    Args:
        specs: one per value.
        budget: bytes that they may take in memory.
        folder: where files hold what is more, until the disk is almost full; None for nowhere.
        pinned: read into memory from which a GPU copies faster.

    Attributes:
        nbytes: of one row of all values.
        in_memory: rows that memory has room for.
        num_memory: rows that are in memory.
        num_files: rows that are in files.
    """

    def __init__(
        self, specs: Sequence[RowSpec], budget: int, folder: Path | None, pinned: bool = False
    ) -> None:
        self.specs, self.pinned, self.folder = specs, pinned, folder
        self.nbytes = max(sum(spec.nbytes for spec in specs), 1)
        self.in_memory = budget // self.nbytes
        self.size = max(_CHUNK_BYTES // self.nbytes, 1)  # rows of a chunk
        self.num_memory = self.num_files = 0
        self._memory: list[list[Tensor]] = []
        self._files: list[_FileChunk] = []
        self._own: Path | None = None

    def place(self, count: int) -> list[int]:
        """Return the slots of up to ``count`` more rows: fewer where there is no room."""
        slots = list(range(self.num_memory, min(self.num_memory + count, self.in_memory)))
        self.num_memory += len(slots)
        more = count - len(slots)
        while more and len(self._files) * self.size < self.num_files + more:
            if not self._add_file():
                break
        room = min(more, len(self._files) * self.size - self.num_files)
        slots += range(self.in_memory + self.num_files, self.in_memory + self.num_files + room)
        self.num_files += room
        return slots

    def write(self, slots: Sequence[int], values: Sequence[Tensor]) -> None:
        """Write rows of all values, packed, in ascending slots."""
        at = 0
        for chunk, found in groupby(slots, self._where):
            inside = list(found)
            first, rows = inside[0] % self.size, slice(at, at + len(inside))
            if chunk < 0:
                first = (inside[0] - self.in_memory) % self.size
                self._files[-1 - chunk].write(first, [value[rows] for value in values])
            else:
                for own, value in zip(self._chunk(chunk), values, strict=True):
                    own[first : first + len(inside)].copy_(value[rows])
            at += len(inside)

    def read(self, slots: Sequence[int]) -> list[Tensor]:
        """Return rows of all values, packed; a DamagedError if a file is not as it was written."""
        files = {-1 - chunk for chunk in map(self._where, slots) if chunk < 0}
        for number in files:
            self._files[number].refuse_short()
        found = [self._stacked(v, slots) for v in range(len(self.specs))]
        if files:
            inside = [i for i, slot in enumerate(slots) if slot >= self.in_memory]
            places = [divmod(slots[i] - self.in_memory, self.size) for i in inside]
            wanted = torch.stack([self._files[chunk].sums[row] for chunk, row in places])
            if not torch.equal(wanted, _sums([rows[inside] for rows in found])):
                raise DamagedError(f"a file in {self._own} was changed")
        return found

    def seconds_of_reading(self, slots: Sequence[int]) -> float:
        """Return what reading these rows takes from the disk itself, where they are in files."""
        taken = []
        for _ in range(3):
            for chunk in self._files:
                chunk.forget()
            begin = time.perf_counter()
            self.read(slots)
            taken.append(time.perf_counter() - begin)
        return statistics.median(taken)

    def close(self) -> None:
        """Let go of all rows and remove the files."""
        self._memory.clear()
        self.num_memory = 0
        self.close_files()

    def close_files(self) -> None:
        """Let go of the files, and make no more."""
        self._files.clear()
        self.num_files, self.folder = 0, None
        if self._own is not None:
            self._remove()

    def _where(self, slot: int) -> int:
        """Return the number of the chunk in memory, or -1 less that of the file."""
        if slot < self.in_memory:
            return slot // self.size
        return -1 - (slot - self.in_memory) // self.size

    def _chunk(self, number: int) -> list[Tensor]:
        while len(self._memory) <= number:
            rows = min(self.size, self.in_memory - len(self._memory) * self.size)
            made = [torch.empty(rows, *spec.shape, dtype=spec.kept) for spec in self.specs]
            self._memory.append(made)
        return self._memory[number]

    def _stacked(self, v: int, slots: Sequence[int]) -> Tensor:
        spec, size, rows = self.specs[v], self.size, []
        for slot in slots:
            if slot < self.in_memory:
                rows.append(self._memory[slot // size][v].select(0, slot % size))
            else:
                chunk, row = divmod(slot - self.in_memory, size)
                rows.append(self._files[chunk].values[v].select(0, row))
        out = torch.empty(len(slots), *spec.shape, dtype=spec.kept, pin_memory=self.pinned)
        return torch.stack(rows, out=out)

    def _add_file(self) -> bool:
        """Add files for a chunk's rows, if the disk has room."""
        if self.folder is None:
            return False
        try:
            if self._own is None:
                self._own, lock = _make_folder(self.folder)
                self._remove = finalize(self, _remove_folder, self._own, lock)
            disk = shutil.disk_usage(self._own)
            if disk.free - self.size * self.nbytes < _FREE * disk.total:
                raise OSError(f"5 % of the disk of {self._own} are to stay free")
            path = self._own / str(len(self._files))
            self._files.append(_FileChunk(path, self.size, self.specs))
        except OSError as error:  # read-only, or full
            warnings.warn(f"cache: {error}: no more samples are kept", stacklevel=2)
            self.folder = None
            return False
        return True


class _FileChunk:
    """Files of one chunk, one per value."""

    def __init__(self, path: Path, size: int, specs: Sequence[RowSpec]) -> None:
        import numpy as np
        from numpy.lib.format import open_memmap

        self.sums = torch.zeros(size, len(specs), dtype=torch.int64)
        self.values: list[Tensor] = []
        self._maps: list[Any] = []
        self._paths: list[tuple[Path, int]] = []
        for v, spec in enumerate(specs):
            name = path.with_name(f"{path.name}-{v}.npy")
            of_numpy = "int16" if spec.kept is torch.bfloat16 else str(spec.kept).split(".")[1]
            mapped = open_memmap(name, "w+", np.dtype(of_numpy), (size, *spec.shape))
            nbytes = name.stat().st_size
            try:
                with name.open("r+b") as file:  # a page that finds no room would end the process
                    os.posix_fallocate(file.fileno(), 0, nbytes)
            except OSError:
                name.unlink()
                raise
            self._maps.append(mapped)
            self._paths.append((name, nbytes))
            self.values.append(torch.from_numpy(mapped).view(spec.kept))

    def write(self, first: int, values: Sequence[Tensor]) -> None:
        rows = slice(first, first + len(values[0]))
        for own, value in zip(self.values, values, strict=True):
            own[rows].copy_(value)
        self.sums[rows] = _sums(values)

    def refuse_short(self) -> None:
        """Refuse files that were cut short: their pages would end the process."""
        for path, nbytes in self._paths:
            if not path.exists() or path.stat().st_size != nbytes:
                raise DamagedError(f"{path} was cut short or removed")

    def forget(self) -> None:
        """Have the next read go to the disk."""
        for mapped, (path, _) in zip(self._maps, self._paths, strict=True):
            mapped.flush()
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _sums(values: Sequence[Tensor]) -> Tensor:
    """Return a checksum of each row of each value, (rows, values)."""
    found = [torch.hash_tensor(value.flatten(1), 1) for value in map(_bits, values)]
    return torch.stack([one.view(torch.int64) for one in found], 1)


def _bits(value: Tensor) -> Tensor:
    value = value.unsqueeze(1) if value.dim() == 1 else value
    return torch.view_as_real(value) if value.is_complex() else value


def _make_folder(folder: Path) -> tuple[Path, Any]:
    """Return a new folder in ``folder``, locked; those that nobody locks any more are removed."""
    import fcntl  # of POSIX

    for old in folder.glob(f"{_NAME}*"):
        for lock in _locked(old):
            _remove_folder(old, lock)
    own = Path(tempfile.mkdtemp(prefix=_NAME, dir=folder))
    lock = (own / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return own, lock


def _locked(folder: Path) -> Iterator[Any]:
    """Yield the lock of a folder, taken, if no process holds it."""
    import fcntl

    try:
        lock = (folder / "lock").open("r")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return
    yield lock


def _remove_folder(folder: Path, lock: Any) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.close()

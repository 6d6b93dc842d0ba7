"""What is kept of one prefix: filled, read, and weighed against computing it again."""

import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...ir.network import Network
from ...ir.stages import Halves
from .guard import Guard
from .probes import Probes
from .rows import DamagedError, Rows, RowSpec
from .trial import rows_of, try_prefix

__all__ = ["Kept"]

_MEASURED = 3  # computed batches, of which the first is slower
_MOST_NEW = 0.25  # of the rows of later epochs: from there on new ones are computed alone


class Kept:
    """The values of samples at one boundary, for inputs of one look.

    Args:
        halves: of the network.
        key: what the inputs look like, and how they are computed with.
        budget: bytes in memory.
        folder: for more.
        dtype: to keep floats in.

    Attributes:
        code: of the prefix.
        guard: watches its weights.
        epoch: the one in which it was asked last.
    """

    def __init__(
        self, halves: Halves, key: Any, budget: int, folder: Path | None, dtype: torch.dtype | None
    ) -> None:
        self.halves, self.key, self.code = halves, key, halves.before.code
        self._budget, self._folder, self._dtype = budget, folder, dtype
        self.guard = Guard(halves.before)
        self.epoch: Any = None
        self._filled_in: Any = None
        self._asked = self._new = 0  # rows, in the epochs behind that one
        self._compute_seconds: list[float] = []  # of a batch
        self._read_seconds: list[float] = []
        self._file_seconds: float | None = None
        self._device: torch.device | None = None
        self.pays = True
        self._start()

    def _start(self) -> None:
        """Begin with nothing."""
        self._places: dict[Any, int] = {}  # by id, in the order in which they came
        self._slots: list[int] = []
        self._rows: Rows | None = None
        self._probes = Probes()
        self._full = False

    def is_of(self, prefix: Network) -> bool:
        """Tell whether what is kept is what ``prefix`` makes, another model's graph being alike."""
        return self.code == prefix.code and self.halves.before.source_model is prefix.source_model

    def close(self) -> None:
        """Let go of all values."""
        if self._rows is not None:
            self._rows.close()
        self._start()

    def values(
        self, before: Callable[..., Any], ids: Sequence[Any], given: Sequence[Any]
    ) -> tuple[Any, ...]:
        """Return what crosses the boundary for a batch: read as far as it is kept.

        Args:
            before: the prefix.
            ids: of the samples.
            given: its inputs.

        Raises:
            ValueError: if a sample comes with another input than before.
            PlanError: if the prefix does not make the same of a sample each time.
        """
        leaves = pytree.tree_leaves(list(given))
        probe = self._checked(ids, leaves)
        missing = self._missing(ids)
        if not missing:
            try:
                return self._measured_read(ids)
            except DamagedError as error:
                warnings.warn(f"cache: {error}: it is filled anew", stacklevel=4)
                self.close()
                missing = list(range(len(ids)))
        alone = self._full or self._new > _MOST_NEW * self._asked  # without rows that are kept
        if alone and len(missing) < len(ids):
            return self._completed(before, ids, missing, given, probe)
        measures = len(self._compute_seconds) < _MEASURED
        begin = self._clock() if measures else 0.0
        values = before(*given)
        if measures:
            self._compute_seconds.append(self._clock() - begin)
        if self._rows is None:
            self._prepare(values, given, len(ids))
        self._keep(ids, missing, values, probe)
        return tuple(values)

    def _checked(self, ids: Sequence[Any], leaves: Sequence[Any]) -> Tensor:
        """Return some numbers of each sample; refuse those that are not what they were."""
        probe = self._probes.look([leaf for leaf in leaves if isinstance(leaf, Tensor)])
        known = [i for i, one in enumerate(ids) if one in self._places]
        if known:
            at = [self._places[ids[i]] for i in known]
            found = self._probes.differing(probe[known] if len(known) < len(ids) else probe, at)
            if found is not None:
                who = f"sample {ids[known[found]]!r}" if found >= 0 else "a sample"
                raise ValueError(
                    f"sample_ids: {who} came with another input than before: an id has to mean the "
                    "same sample in each batch and epoch, and random augmentation has to go, or to "
                    "be drawn from a few, fxlocal.WithIds(data, augmentations=4)"
                )
        return probe

    def _missing(self, ids: Sequence[Any]) -> list[int]:
        """Return which of the ids nothing is kept of."""
        missing = [i for i, one in enumerate(ids) if one not in self._places]
        if self._filled_in is None:
            self._filled_in = self.epoch
        if self.epoch != self._filled_in:
            self._asked, self._new = self._asked + len(ids), self._new + len(missing)
        return missing

    def _prepare(self, values: Sequence[Any], given: Sequence[Any], count: int) -> None:
        """Try whether the prefix may be kept, and note how its values lie in memory."""
        try_prefix(self.halves, self.guard, values, given, count)
        leaves, self._tree = pytree.tree_flatten(tuple(values))
        self._at = rows_of(self.halves, values, count)
        self._plain = [None if i in self._at else leaf for i, leaf in enumerate(leaves)]
        rows = [leaves[i] for i in self._at]
        specs = [RowSpec.of(value, self._dtype) for value in rows]
        self._device = device = rows[0].device if rows else torch.device("cpu")
        self._rows = Rows(specs, self._budget, self._folder, device.type == "cuda")

    def _keep(self, ids: Sequence[Any], new: Sequence[int], values: Any, probe: Tensor) -> None:
        """Keep the rows of samples that are new, as far as there is room."""
        assert self._rows is not None
        leaves = pytree.tree_leaves(tuple(values))
        packed = [spec.pack(leaves[i]) for i, spec in zip(self._at, self._rows.specs, strict=True)]
        slots = self._rows.place(len(new))
        self._full = len(slots) < len(new)
        new = new[: len(slots)]
        if len(new) < len(ids):
            packed, probe = [rows[list(new)] for rows in packed], probe[list(new)]
        if not new:
            return
        self._rows.write(slots, packed)
        self._probes.add(len(self._slots), probe)
        self._places |= {ids[i]: len(self._slots) + k for k, i in enumerate(new)}
        self._slots += slots
        self._weigh(ids, new, slots)

    def _weigh(self, ids: Sequence[Any], new: Sequence[int], slots: Sequence[int]) -> None:
        """Measure reading; give up files, or all, where computing takes no longer."""
        assert self._rows is not None
        compute = self.compute_seconds
        if self._file_seconds is None and slots[-1] >= self._rows.in_memory and compute:
            inside = [slot for slot in slots if slot >= self._rows.in_memory]
            self._file_seconds = self._rows.seconds_of_reading(inside) / len(inside)
            if self._file_seconds >= compute:
                self._give_up_files()
        kept_all = all(one in self._places for one in ids)
        if len(self._read_seconds) < _MEASURED and len(new) == len(ids) and kept_all:
            self._measured_read(ids)

    def _give_up_files(self) -> None:
        """Keep what is in memory alone."""
        assert self._rows is not None
        least = self._rows.in_memory
        self._places = {one: at for one, at in self._places.items() if self._slots[at] < least}
        self._rows.close_files()
        self._folder, self._full = None, True

    def _measured_read(self, ids: Sequence[Any]) -> tuple[Any, ...]:
        """Return what crosses, read; the first times tell whether to go on."""
        if len(self._read_seconds) == _MEASURED:
            return self._joined(self._read(ids))
        begin = time.perf_counter()
        crossing = self._joined(self._read(ids))
        self._read_seconds.append(self._clock() - begin)
        known = len(self._read_seconds) == _MEASURED and len(self._compute_seconds) > 1
        if known and self.read_seconds >= self.compute_seconds:
            self.pays = False
            self.close()
        return crossing

    def _clock(self) -> float:
        """Return the time, once the device has done what it was given."""
        if self._device is not None and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    @property
    def compute_seconds(self) -> float:
        """What the prefix takes, a sample; 0 until it is known."""
        return min(self._compute_seconds[1:], default=0.0) / int(self.key[0])

    @property
    def read_seconds(self) -> float:
        """What reading takes, a sample; 0 until it is known."""
        return min(self._read_seconds[1:], default=0.0) / int(self.key[0])

    def _read(self, ids: Sequence[Any]) -> list[Tensor]:
        """Return the rows of samples that are kept, on the device."""
        assert self._rows is not None and self._device is not None
        found = self._rows.read([self._slots[self._places[one]] for one in ids])
        return [
            spec.moved(rows, self._device)
            for spec, rows in zip(self._rows.specs, found, strict=True)
        ]

    def _joined(self, rows: Sequence[Tensor]) -> tuple[Any, ...]:
        """Return what crosses, of rows and of what is the same for each batch."""
        assert self._rows is not None
        leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self._plain]
        for i, spec, value in zip(self._at, self._rows.specs, rows, strict=True):
            leaves[i] = spec.restored(value)
        crossing: tuple[Any, ...] = pytree.tree_unflatten(leaves, self._tree)
        return crossing

    def _completed(
        self,
        before: Callable[..., Any],
        ids: Sequence[Any],
        missing: Sequence[int],
        given: Sequence[Any],
        probe: Tensor,
    ) -> tuple[Any, ...]:
        """Return what crosses, of which only the missing rows are computed."""
        assert self._rows is not None
        some = torch.tensor(missing, device=self._device)
        values = before(*pytree.tree_map_only(Tensor, lambda rows: rows[some], list(given)))
        own = pytree.tree_leaves(tuple(values))
        there = [i for i in range(len(ids)) if i not in set(missing)]
        read = self._read([ids[i] for i in there])
        order = torch.tensor([*there, *missing], device=self._device).argsort()
        specs = self._rows.specs
        joined = [
            torch.cat([rows, spec.laid(own[i])])[order]
            for i, spec, rows in zip(self._at, specs, read, strict=True)
        ]
        crossing = self._joined(joined)
        if not self._full:
            new = [ids[i] for i in missing]
            self._keep(new, range(len(new)), values, probe[some])
        return crossing

    def explain(self) -> str:
        """Say what is kept, and what reading it and computing it take."""
        rows, names = self._rows, ", ".join(map(repr, self.halves.values))
        compute, read = (1e6 * s for s in (self.compute_seconds, self.read_seconds))
        times = f"the prefix takes {compute:.0f} us a sample, reading {read:.0f} us"
        if not self.pays:
            return f"not used: {times}"
        if rows is None:
            return "nothing is kept yet"
        if read:
            times += f" ({rows.nbytes / read / 1e3:.1f} GB/s)"
        if self._file_seconds is not None:
            files = 1e6 * self._file_seconds
            used = "used" if rows.num_files else "not used"
            times += f", from files {files:.0f} us ({rows.nbytes / files / 1e3:.1f} GB/s, {used})"
        read_rows = self._asked - self._new
        return (
            f"{len(self._places)} samples of {rows.nbytes:,} bytes ({names}), "
            f"{rows.num_memory * rows.nbytes / 2**20:.1f} MiB in memory, "
            f"{rows.num_files * rows.nbytes / 2**20:.1f} MiB in files"
            f"{', full' if self._full else ''}; {times}; "
            f"{read_rows} of {self._asked} read since the epoch that filled it"
        )

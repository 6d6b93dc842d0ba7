"""Compute what crosses the boundary of a frozen prefix once per sample, and read it from then on.

    epoch 1 at a boundary:  x -> [prefix] -> values -> [rest] -> loss     values are kept by sample
    later epochs:           sample_ids    -> values -> [rest] -> loss     the prefix does not run

Only what makes the same of a sample each time can be kept: `refuse_uncacheable` says what cannot.
What it cannot see is tried when the first batch comes: that no random numbers are drawn, no buffer
moves, and a row depends on its own sample alone. From then on the weights are watched (`Guard`),
and with each batch some numbers of each input are compared with those that its sample had before.

Values that are kept as they are, in batches of one size, are those that the prefix would compute:
training is equal to the last bit, on a CPU in eager. A batch of another size is computed whole and
not kept, as kernels may round rows of such batches otherwise. Where samples go on to be new, as
when the data are larger than the cache, those rows alone are computed, and may differ in rounding.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...compiler.resolve import ResolvedPlan
from ...errors import NoEffectWarning, PlanError
from ...ir.network import Network
from ...ir.source import arguments
from ...ir.stages import Halves, find_halves
from ..cudagraph import GraphedNetwork
from .kept import Kept
from .refusals import refuse_cut

__all__ = ["ActivationCache", "CachedNetwork", "cached"]

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


class ActivationCache:
    """What crosses the boundary of a `Driver`'s frozen prefix, sample by sample.

    ``Driver(..., cache=ActivationCache("4GiB"))``, then ``driver.network()(x, sample_ids=ids)``; a
    `WithIds` data set makes the ids. It is filled in the first epoch at a boundary, used from the
    next one on, and dropped when the boundary moves. It is never part of a checkpoint: a run that
    is resumed fills it again. Where reading takes longer than the prefix, it is left unused.

    Args:
        bytes: the most to keep in memory, a number or a text such as "512MiB".
        folder: an existing one, for memory-mapped files with what is more; 5 % of its disk stay
            free. None keeps no more: the samples that came first.
        dtype: to keep floating-point values in, `torch.bfloat16` say, which halves the bytes and
            rounds; None keeps them as they are.

    Raises:
        PlanError: if the bytes or the dtype are none, or the folder cannot be written.

    Example:
        >>> from torch import nn
        >>> from fxlocal import Driver, Freeze, LocalPrefix, Plan, schedules
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> schedule = schedules.Constant(Plan(local=LocalPrefix("2", Freeze(), norm="eval")))
        >>> driver = Driver(model, schedule, cache=ActivationCache("1MiB"))
        >>> driver.start_epoch()
        >>> loss = driver.network()(torch.ones(3, 4), sample_ids=[7, 8, 9]).square().mean()
    """

    def __init__(
        self,
        bytes: int | str = "4GiB",
        folder: str | Path | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.bytes, self._told = read_bytes(bytes), bytes
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise PlanError(f"ActivationCache(dtype={dtype!r}): give torch.bfloat16, say, or None")
        self.dtype = dtype
        self.folder = None if folder is None else _writable(Path(folder))
        self.kept: Kept | None = None
        self._warned = False

    def __repr__(self) -> str:
        told = f", folder={str(self.folder)!r}" if self.folder else ""
        told += f", dtype={self.dtype}" if self.dtype else ""
        return f"ActivationCache({self._told!r}{told})"

    def explain(self) -> str:
        """Say what is kept at the boundary in use, what reading and computing take, and which."""
        if self.kept is None:
            return f"{self!r}: nothing is kept: no prefix has run"
        return f"{self!r}: {self.kept.explain()}"

    def drop(self) -> None:
        """Let go of all that is kept, memory and files."""
        if self.kept is not None:
            self.kept.close()
        self.kept = None

    def find(self, halves: Halves, ids: Sequence[Any], inputs: Mapping[str, Any]) -> Kept | None:
        """Return what is kept of a prefix for inputs like these; None if it is of other inputs.

        Raises:
            ValueError: if a tensor among them has not a row for each id.
        """
        leaves = pytree.tree_leaves([inputs[name] for name in halves.inputs])
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf.shape[:1] != (len(ids),):
                raise ValueError(
                    f"sample_ids: {len(ids)} ids, and an input of shape {tuple(leaf.shape)}: give "
                    "one id for each row, and inputs with a row for each sample"
                )
        looks = [(v.shape, v.dtype, v.device.type) if isinstance(v, Tensor) else v for v in leaves]
        casts = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _DEVICES]
        epoch = halves.before.place[0] if halves.before.place else None
        if self.kept is not None and not self.kept.is_of(halves.before):
            self.drop()
        if self.kept is not None and self.kept.guard.changed(epoch) is not None:
            self._warn_of_change(self.kept.epoch == epoch)
            self.drop()
        if self.kept is None:
            self.kept = Kept(halves, (len(ids), looks, casts), self.bytes, self.folder, self.dtype)
        self.kept.epoch = epoch
        return self.kept if self.kept.key == (len(ids), looks, casts) else None

    def _warn_of_change(self, within_epoch: bool) -> None:
        if within_epoch and not self._warned:
            self._warned = True
            warnings.warn(
                "cache: weights or buffers before the boundary were changed within an epoch; what "
                "was kept is dropped each time, so that nothing is gained by it",
                NoEffectWarning,
                stacklevel=5,
            )


_DEVICES = ("cpu", "cuda")


class CachedNetwork:
    """A network's callable, which takes ``sample_ids`` too; its prefix runs once per sample.

    Args:
        network: what a Plan was rewritten to.
        start: the first node behind its boundary; empty if it has none.
        make: makes the callable of a network, compiled or not.
        cache: keeps the values.
    """

    def __init__(
        self,
        network: Network,
        start: str,
        make: Callable[[Network], Callable[..., Any]],
        cache: ActivationCache,
    ) -> None:
        self.network, self._start, self._make, self._cache = network, start, make, cache
        self._whole = make(network)
        self._code = ""
        self._halves: Halves | None = None

    def __call__(self, *args: Any, sample_ids: Any = None, **kwargs: Any) -> Any:
        """Return the network's output.

        Args:
            args: its inputs.
            sample_ids: which sample each row is: whole numbers, or what else can be a dict's key.
            kwargs: inputs by name.

        Raises:
            ValueError: if ids are missing, repeat, are not one per row, or a sample comes with
                another input than before; no weight has been changed then.
            PlanError: if the prefix does not make the same of a sample each time.
        """
        if not self.network.trains:
            return self._whole(*args, **kwargs)
        ids = _read_ids(sample_ids)
        if not self._start or self._is_off:
            return self._whole(*args, **kwargs)
        self.network.prepare_call(*args, **kwargs)
        if self.network.code != self._code:  # made anew, as a weight was frozen or thawed
            self._part()
        halves = self._halves
        assert halves is not None
        halves.before.place = halves.behind.place = self.network.place
        inputs = arguments(self.network.graph, args, kwargs)
        kept = self._cache.find(halves, ids, inputs)
        given = [inputs[name] for name in halves.inputs]
        values = self._before(*given) if kept is None else kept.values(self._before, ids, given)
        output = self._behind(*values, *(inputs[name] for name in halves.others))
        return self.network.finish_call(output)

    @property
    def _is_off(self) -> bool:
        """Whether reading was measured to take longer than this prefix."""
        kept = self._cache.kept
        return kept is not None and not kept.pays and kept.halves is self._halves

    def release(self) -> None:
        """Let go of what the callables of a boundary that is no more hold."""
        kept = self._cache.kept
        if kept is not None and kept.halves is self._halves:
            self._cache.drop()
        for one in (self._whole, getattr(self, "_behind", None)):
            if isinstance(one, GraphedNetwork):
                one.release()

    def _part(self) -> None:
        refuse_cut(self.network, self._start)
        self._halves = find_halves(self.network, self._start)
        self._code = self.network.code
        self._before = self._make(self._halves.before)
        self._behind = self._make(self._halves.behind)


def cached(
    cache: ActivationCache | None,
    resolved: ResolvedPlan,
    make: Callable[[Network], Callable[..., Any]],
) -> Callable[[Network], Callable[..., Any]]:
    """Return what makes the callable of a Plan's network: ``make``, by way of a cache if any."""
    if cache is None:
        return make
    start = resolved.start if resolved.boundary else ""
    return partial(CachedNetwork, start=start, make=make, cache=cache)


def read_bytes(text: int | str) -> int:
    """Read a number of bytes: 1000, "512MiB" or "4GB"; a PlanError if it is none."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", str(text))
    unit = found and _UNITS.get(found[2].lower())
    if isinstance(text, bool) or not found or not unit or float(found[1]) * unit < 1:
        raise PlanError(f"bytes={text!r}: give a number of bytes above 0, or a text as '512MiB'")
    return int(float(found[1]) * unit)


def _writable(folder: Path) -> Path:
    import os

    if not folder.is_dir():
        raise PlanError(f"cache folder {str(folder)!r}: there is none; make it")
    if not os.access(folder, os.W_OK):
        raise PlanError(f"cache folder {str(folder)!r}: cannot be written; give another")
    if not hasattr(os, "posix_fallocate"):
        raise PlanError("cache folder: this system cannot reserve room on a disk; give folder=None")
    return folder


def _read_ids(given: Any) -> list[Any]:
    """Return the ids of a batch, which may not be missing, repeat or lie in more than one row."""
    advice = "wrap the data set in fxlocal.WithIds and give network(x, sample_ids=ids)"
    if given is None:
        raise ValueError(f"sample_ids are missing, by which a cache knows samples again: {advice}")
    ids = given.tolist() if hasattr(given, "tolist") else given
    ids = list(ids) if isinstance(ids, Iterable) else [[ids]]
    if any(isinstance(one, list) for one in ids):
        raise ValueError("sample_ids: give one id for each row, in a list or a tensor of one axis")
    if len(set(ids)) < len(ids):
        twice = next(one for one in ids if ids.count(one) > 1)
        raise ValueError(
            f"sample_ids: {twice!r} comes twice in a batch: give each sample an id of its own, "
            f"drawn without replacement; {advice}"
        )
    return ids

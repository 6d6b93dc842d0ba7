"""Run `torch.export` with sizes of the inputs that may be any: of batches, and of texts.

The first dimension of each tensor is taken as the batch. What token ids, masks and labels have as
their second one is a length, wherever it is met: batches that are padded to their longest text
differ in it. A model that fixes its lengths so, as an image may be as wide as a text is long, is
exported with those of texts and their embeddings alone, and else for those of the example.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import UserError, UserErrorType
from torch.export import ExportedProgram
from torch.fx.experimental import _config
from torch.utils import _pytree as pytree

from ..examples import Examples
from .asked import Asked, has_batch

__all__ = ["export_with_any_sizes", "fixes_batch"]

_DIM, _MOST = torch.export.Dim, 2**16  # rows: some questions have an answer up to a bound alone
_TEXT = (torch.int64, torch.int32, torch.bool)  # dtypes of ids, masks and labels


def export_with_any_sizes(model: nn.Module, examples: Examples) -> ExportedProgram:
    """Export ``model`` for batches of any size, and texts of any length if it takes them.

    First dimensions are their own, or equal, or some of them fixed, as the model has them.

    Raises:
        Exception: whatever `torch.export` raises.
    """
    for lengths, alike in _ways(examples):
        hook = partial(_tie, alike)
        tie = model.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
        try:
            program = _export(model, examples, _DIM.DYNAMIC, lengths)
            if Asked(program).takes_other_lengths() and not fixes_batch(program, examples):
                return program
        except Exception:  # those for these lengths alone tell what is wrong
            pass
        finally:
            tie.remove()
    try:
        return _export(model, examples, _DIM.DYNAMIC)
    except UserError as error:
        if error.error_type is not UserErrorType.CONSTRAINT_VIOLATION:
            raise
        return _export(model, examples, _DIM.AUTO)
    except Exception as error:
        if not re.search(r"\bs\d+\b|\bVR\[", str(error)):  # of a size that is not known
            raise
        with suppress(Exception):
            return _export(model, examples, _DIM.DYNAMIC, oblivious=False)
        with suppress(Exception):
            return _export(model, examples, _DIM("batch", max=_MOST))
        raise


def _export(
    model: nn.Module,
    examples: Examples,
    rows: Any,
    lengths: Callable[[Tensor], Iterable[int]] = lambda value: (),
    *,
    oblivious: bool = True,
) -> ExportedProgram:
    """Export ``model`` with first dimensions as ``rows`` says, and any for its ``lengths``.

    One row beside a batch stays, as that of a mask for all of it. If ``oblivious``, a size of one
    is one as any other. ``rows`` with a name are those of the first input, and of all that are as
    large.
    """
    fixed = 1 if {v.shape[0] for v in _tensors(examples)} - {1} else 0
    named = _batch_of(examples) if isinstance(rows, _DIM) else None

    def shape_of(value: object) -> Any:
        if not has_batch(value):
            return None
        found: dict[int, Any] = dict.fromkeys(lengths(value), _DIM.AUTO)
        batch = value.shape[0]
        return {**found, 0: rows if batch != fixed and named in (None, batch) else None}

    met = set[int]()

    def apart(value: Tensor) -> Tensor:
        """Return a copy of a tensor that was met before: export takes it for the same input."""
        if id(value) not in met:
            met.add(id(value))
            return value
        return value.detach().clone().requires_grad_(value.requires_grad)

    shapes = {name: pytree.tree_map(shape_of, v) for name, v in examples.by_argument.items()}
    with _config.patch(backed_size_oblivious=oblivious):  # type: ignore[attr-defined]
        args, kwargs = examples.map(apart)
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)


def _ways(
    examples: Examples,
) -> Iterator[tuple[Callable[[Tensor], list[int]], Callable[[list[Tensor]], list[Tensor]]]]:
    """Yield, until a model takes other lengths, what may be one, and what are as long as another.

    A dimension of a tensor may be a length; the latter are those of all inputs.
    """
    values = _tensors(examples)
    texts, sequences = _texts(values), _sequences(values)
    if not (lengths := {text.shape[1] for text in texts} - {1}):
        return

    def met(value: Tensor) -> list[int]:
        return [i for i, n in enumerate(value.shape) if n in lengths]

    def of_texts(value: Tensor) -> list[int]:
        return [i for i in met(value) if i == 1 and any(value is one for one in sequences)]

    yield met, _texts
    if len(sequences) > len(texts):  # those of another text are not tied for nothing
        yield met, _sequences
    if any({*met(value)} - {0, *of_texts(value)} for value in values):
        yield of_texts, _sequences


def _texts(values: Iterable[Any]) -> list[Tensor]:
    return [v for v in values if has_batch(v) and v.dim() == 2 and v.dtype in _TEXT]


def _sequences(values: Iterable[Any]) -> list[Tensor]:
    """Return the texts, and what embeddings of them there are by their size."""
    texts = _texts(values := [*values])
    sizes = {(*map(_told, text.shape),) for text in texts}
    tensors = (v for v in values if has_batch(v) and v.dim() == 3 and v.is_floating_point())
    return [*texts, *(v for v in tensors if (*map(_told, v.shape[:2]),) in sizes)]


def _tie(
    alike: Callable[[list[Tensor]], list[Tensor]], model: nn.Module, args: Any, kwargs: Any
) -> None:
    """Let export know that texts that are alike in size are so in each batch, as masks are."""
    sizes: dict[tuple[int, int], Any] = {}
    for text in alike(pytree.tree_leaves((args, kwargs))):
        for dimension, size in enumerate(text.shape[:2]):
            torch._check(size == sizes.setdefault((dimension, _told(size)), size))


def _told(size: Any) -> Any:
    """Return what a size is in the example."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def fixes_batch(program: ExportedProgram, examples: Examples) -> bool:
    """Tell whether a first dimension that was to be any is a number now: that of the batch."""
    sizes = [v.shape[0] for v in Asked(program).inputs]
    symbols: list[Any] = [size for size in sizes if isinstance(size, torch.SymInt)]
    fixed = [int(size) for size in symbols if size.node.expr.is_Integer]
    # A table's rows are no batch; where a table comes first, nothing else tells which is.
    return bool(fixed) and (len(fixed) == len(symbols) or _batch_of(examples) in fixed)


def _tensors(examples: Examples) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(examples.by_argument) if has_batch(leaf)]


def _batch_of(examples: Examples) -> int | None:
    """Return how many rows the first tensor of the example has."""
    return next((tensor.shape[0] for tensor in _tensors(examples)), None)

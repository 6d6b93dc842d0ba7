"""Local modules: parts of a network that learn from losses of their own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from ..errors import PlanError
from .checks import check_amounts, check_balance, check_counts, is_number
from .rules import name_of

__all__ = ["ConvHead", "Head", "InfoProHead", "LinearHead", "LocalModules"]


@dataclass(frozen=True)
class LinearHead:
    """One linear layer on the flattened features (BackLink, section 3.1).

    It has a weight for each class and feature, so that images must be of the example's size; one on
    pooled features has fewer, and takes images of any size. Where the model's output has a score
    for each pixel, the head is a 1x1 convolution that is up-sampled, and nothing is flattened.

    Args:
        pool: side of the map that features are averaged to beforehand; None for all features.
    """

    pool: int | None = None

    def __post_init__(self) -> None:
        if self.pool is not None:
            check_counts(self, "pool")


@dataclass(frozen=True)
class ConvHead:
    """One 3x3 convolution and two linear layers (BackLink, section 3.3).

    Where the model's output has a score for each pixel, the linear layers are 1x1 convolutions.
    Features without a map get the linear layers alone.

    Args:
        hidden: features between the linear layers.
        pool: side of the map that the convolution's output is averaged to.
    """

    hidden: int = 128
    pool: int = 2

    def __post_init__(self) -> None:
        check_counts(self, "hidden", "pool")


@dataclass(frozen=True)
class InfoProHead:
    """A `ConvHead`, and a decoder that reconstructs the model's input (InfoPro, section 3).

    The decoder is a bilinear up-sampling and two 3x3 convolutions. The module's loss is
    ``classification * loss + reconstruction * mean squared error``.

    Args:
        hidden, pool: as in `ConvHead`.
        width: channels between the decoder's convolutions.
        classification: weight of the local loss.
        reconstruction: weight of the reconstruction error.
    """

    hidden: int = 128
    pool: int = 2
    width: int = 12
    classification: float = 1.0
    reconstruction: float = 1.0

    def __post_init__(self) -> None:
        check_counts(self, "hidden", "pool", "width")
        check_amounts(self, "weight", "classification", "reconstruction")


_BUILT_IN = (LinearHead, ConvHead, InfoProHead)
Head: TypeAlias = LinearHead | ConvHead | InfoProHead | Callable[[tuple[int, ...]], Any]


@dataclass(frozen=True)
class LocalModules:
    """Split the network into modules that each learn from a loss of their own.

    A module's loss is that of a small auxiliary head on its output. It is back-propagated inside
    the forward as soon as it is known, and the module's activations are freed. Gradients do not
    cross from one module to another (greedy local learning), but for ``link``.

    BackLink: the last ``link`` blocks of each module run a second time in front of the next module,
    from their detached input, with the same weights. The gradients of their parameters are the sum
    of the local and the next module's, weighted by ``alpha`` and ``1 - alpha``:

    - ``weighting="once"``, ours: each gradient by these. The layers below the linked blocks get the
      local error unweighted.
    - ``weighting="compound"``, eq. 4 to 7 to the letter: each linked block weights the errors that
      enter it. The block d blocks before the module's end gets ``alpha**(d + 1)`` and
      ``(1 - alpha)**(d + 1)`` of them, and what lies below ``alpha**link`` of the local error, so
      that with ``alpha=0`` it learns nothing: the layers of the module below its linked blocks, and
      the blocks of the module before that run again in it.

    Args:
        count: number of modules; 1 is plain back-propagation with the loss inside the network.
        link: blocks over which the next module's error flows back; 0 for none.
        alpha: weight of the local error in those blocks, in [0, 1].
        weighting: ``"once"`` or ``"compound"``.
        head: the auxiliary head of each module but the last: `LinearHead`, `ConvHead`,
            `InfoProHead`, or a function that gets the shape of the features, batch first as in
            (B, C, H, W), and returns a module.
        num_classes: outputs of each head; needed by the heads of fxlocal.
        loss: ``"cross_entropy"``, or a function (output, target) -> scalar; the same for heads
            and for the model's own output.
        output: which part of what the model returns is its prediction, where that is no tensor: a
            name, as "logits", or an index.
        balance: what modules have an equal share of: ``"memory"`` (bytes kept for backward),
            ``"blocks"`` (as the paper; what does not divide goes to the lower modules) or
            ``"time"`` (FLOPs); or the names of the blocks or stages that begin modules 2 to
            ``count``.
        replay: batches that a buffer before each module but the first keeps, of which the module
            takes the one used least (DGL, Algorithm 2): the one before the newest in one process,
            so that output and loss belong to a batch ``count - 1`` steps ago; with
            `fxlocal.ModelParallel` whichever is there. 0 for none; else ``link`` must be 0.

    Raises:
        PlanError: if a value is of the wrong type or out of range.
    """

    count: int
    link: int = 0
    alpha: float = 0.5
    head: Head = LinearHead()
    num_classes: int | None = None
    loss: str | Callable[[Any, Any], Any] = "cross_entropy"
    balance: Literal["memory", "blocks", "time"] | tuple[str, ...] = "memory"
    replay: int = 0
    output: str | int | None = None
    weighting: Literal["once", "compound"] = "once"

    def __post_init__(self) -> None:
        check_counts(self, "count")
        check_counts(self, "link", "replay", least=0)
        if not (is_number(self.alpha) and 0 <= self.alpha <= 1):
            raise PlanError(f"LocalModules(alpha={self.alpha!r}): give a number in [0, 1]")
        if self.weighting not in ("once", "compound"):
            raise PlanError(
                f"LocalModules(weighting={self.weighting!r}): give 'once' or 'compound'"
            )
        if self.link and self.replay:
            raise PlanError(
                f"LocalModules(link={self.link}, replay={self.replay}): a linked module learns "
                "from the batch of the module before it, one with a replay buffer from another; "
                "give one of them"
            )
        self._check_head()
        check_balance(self)
        if isinstance(self.output, int):
            check_counts(self, "output", least=0)
        elif not isinstance(self.output, str | None):
            raise PlanError(
                f"LocalModules(output={self.output!r}): give the name or the index of the model's "
                "prediction in what it returns, or None"
            )
        if self.loss != "cross_entropy" and not callable(self.loss):
            raise PlanError(
                f"LocalModules(loss={self.loss!r}): give 'cross_entropy' or a function "
                "(output, target) -> scalar"
            )
        try:
            hash(self)
        except TypeError as error:
            raise PlanError(f"{self!r}: {error}, and a Plan has to be hashable") from None

    def _check_head(self) -> None:
        built_in = isinstance(self.head, _BUILT_IN)
        head: object = self.head
        if head in _BUILT_IN or not (built_in or callable(self.head)):  # its () forgotten
            raise PlanError(
                f"LocalModules(head={self.head!r}): give LinearHead(), ConvHead(), InfoProHead(), "
                "or a function that gets the shape of the features and returns a module"
            )
        if self.num_classes is not None:
            check_counts(self, "num_classes")
        if built_in and self.num_classes is None and self.count > 1:
            raise PlanError(
                f"LocalModules(head={self.head!r}) needs num_classes: how many outputs each head "
                "has"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> "LocalModules":
        return self  # frozen; a copied function would be another one

    def prediction(self, output: Any) -> Any:
        """Return the prediction in what the model returned."""
        if self.output is None:
            return output
        if isinstance(output, Mapping) or isinstance(self.output, int):
            return output[self.output]
        return getattr(output, self.output)

    def __repr__(self) -> str:  # functions by name: their own repr has an address
        shown = {"count": self.count} | {
            name: value
            for name, value in vars(self).items()
            if name != "count" and value != getattr(type(self), name)
        }
        return f"LocalModules({', '.join(f'{n}={_text(v)}' for n, v in shown.items())})"


def _text(value: Any) -> str:
    plain = isinstance(value, (*_BUILT_IN, str, tuple, int, float))
    return repr(value) if plain or value is None else name_of(value)

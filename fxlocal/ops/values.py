"""Small functions on the values that cross a boundary or feed a local rule."""

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["add_where_shapes_agree", "detach_all"]


def detach_all(value: Any) -> Any:
    """Return ``value``, any nesting of containers, with each tensor detached."""
    return pytree.tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, value)


def add_where_shapes_agree(post: Tensor, skip: Tensor) -> Tensor:
    """Return ``post + skip`` where their shapes agree, else ``post`` (LoCal+SGD, section 3.7)."""
    return post + skip if post.shape == skip.shape else post

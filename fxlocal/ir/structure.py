"""What a graph relies on in its source: which modules there are, and which parameters learn."""

from collections.abc import Collection

from torch import Tensor, nn

__all__ = ["Structure"]


class Structure:
    """The modules of ``source`` as its graph was made, but for what lies inside its leaves.

    Args:
        source: the model.
        leaves: paths of the modules that the graph calls whole.
    """

    def __init__(self, source: nn.Module, leaves: Collection[str]) -> None:
        inside = tuple(f"{leaf}." for leaf in leaves)
        self._modules = [
            (path, module, None if path in leaves else dict(module._modules), {*module._parameters})
            for path, module in source.named_modules()
            if not path.startswith(inside)
        ]

    def read(self) -> tuple[bool, ...] | None:
        """Return which parameters require a gradient; None while others stand in for them.

        Raises:
            RuntimeError: if a module is another one, or has other parameters.
        """
        flags = []
        for path, module, children, names in self._modules:
            own = module._parameters
            if children not in (None, module._modules) or own.keys() != names:
                raise RuntimeError(_changed(path, module, children))
            for parameter in own.values():
                if type(parameter) is Tensor:  # of torch.func.functional_call
                    return None
                flags.append(parameter is not None and parameter.requires_grad)
        return tuple(flags)


def _changed(path: str, module: nn.Module, children: dict[str, nn.Module | None] | None) -> str:
    children = module._modules if children is None else children
    names = [n for n in (*children, *module._modules) if module._modules.get(n) != children.get(n)]
    what = ".".join(filter(None, (path, names[0] if names else "")))
    return (
        f"{what!r} is another module, or has other parameters, than when the graph was made (a new "
        "head, converted norms, pruning, a parametrisation): the graph would train what was there "
        "before. Transform the model again, or make a new Driver"
    )

"""Weight gradients by the operators of TopK, and errors to give them."""

import torch

ops = torch.ops.fxlocal
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def rand(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


def conv_weight_grad(pre, weight, error_of, sliding, k, scale=1.0):
    """The operator's, of ``error_of`` the output; ``sliding`` ends with the number of groups."""
    *sliding, groups = sliding
    weight = weight.detach().requires_grad_()
    nothing = [0] * (weight.dim() - 2)
    sliding = [list(value) for value in sliding]
    args = (pre, weight, None, *sliding, False, nothing, groups)
    output = ops.conv_topk(*args, k=k, scale=scale)
    error = error_of(output)
    output.backward(error)
    return weight.grad, error


def linear_weight_grad(pre, error, k, scale=1.0):
    weight = torch.zeros(error.shape[-1], pre.shape[-1], dtype=pre.dtype, requires_grad=True)
    ops.linear_topk(pre, weight, None, k=k, scale=scale).backward(error)
    return weight.grad


def seeded_errors(output):
    return torch.randn(output.shape, dtype=output.dtype)


def distinct_errors(output):
    """Of no two equal sizes in a map, and exact in every dtype."""
    sizes = torch.rand(output.shape).flatten(2).argsort(2).view(output.shape) + 1
    signs = torch.randint(0, 2, output.shape) * 2 - 1
    return (sizes * signs / 16).to(output.dtype)


def formatted(value, channels_last):
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(value.dim())
    return value.contiguous(memory_format=last) if channels_last and last else value

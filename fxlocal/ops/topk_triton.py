"""The weight gradient of a 2-D convolution's k largest errors, on CUDA: two Triton kernels.

Equation (gradient approximation, section 2.3, Algorithm 1, with k positions for its one), where
p_1 .. p_k are the positions of the k largest |dO[n, c, p]|, and of equals the lower one first::

    value_j = scale * (dO[n, c, p_j] + (sum over p of dO[n, c, p] - sum of the kept) / k)
    dW[c, i, t] = sum over n, j of value_j * pre[n, i, p_j * stride + t * dilation - padding]

`fxlocal.ops.topk` is the same for other devices and dimensions.

Layout: all is channels last, so that both kernels read contiguous channels, and dW is written as
(C_out, KH, KW, C_in / groups). Nothing is transposed.

Two launches, no atomics:

1. `_select` reads dO once (k times for k > 1). A program has a sample, a split of its positions
   and a block of channels. Each lane of its tile keeps its own best, position and sum; lanes are
   compared once, at the end: in the loop they would wait for each other in every step. The next
   tiles are on their way to shared memory meanwhile (``STAGES``); with registers as their goal,
   the assembler moves each load down to its use. For k = 1, splits make programs enough for the
   whole device.
2. `_sum_patches` compares the splits as it reads them, and gathers. A program has an output
   channel, a block of taps, a block of input channels and *all* samples, ``BB`` at a time: their
   loads do not wait for each other, and no partial sums are left for a third launch to add up.

Cost: one read of dO and N * k * C_out patches; nothing grows with the input's map. On small maps
(7 by 7) of many channels, that is more than the dense gradient takes.

Limits: the same bits in every call, but each tuning (eager's, a compiled graph's, another
process's) may choose tiles that add up in another order. A NaN or an infinity in a channel of dO
makes that channel's gradient NaN or infinite.

Shapes in the kernels: H a block of positions, C of channels, B of rows (a sample and its j), S
splits, T taps.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

__all__ = ["conv2d_topk_weight_grad"]

_INTERPRETED: bool = triton.knobs.runtime.interpret
# torch 2.11's own refuses an interpreted kernel, which is launched as it is.
wrap_triton: Any = (lambda kernel: kernel) if _INTERPRETED else torch.library.wrap_triton

# Values of the blocks that the kernels name, and warps; the last is the narrowest.
SELECT_TILES = [(16, 64, 4, 4), (32, 64, 4, 8), (64, 64, 3, 8), (64, 64, 1, 8), (8, 64, 4, 2)]
SELECT_TILES += [(32, 32, 4, 4), (64, 16, 4, 4)]
PATCH_TILES = [(128, 1, 64, 4), (128, 1, 64, 8), (64, 1, 64, 4), (32, 4, 64, 4), (64, 1, 128, 4)]
PATCH_TILES += [(32, 1, 256, 4), (128, 1, 16, 4), (128, 8, 1, 4)]


def _tuned(key: str, names: str, tiles: list[tuple[int, int, int, int]]) -> Callable[..., Any]:
    """Compile by Triton, timing each of the tiles at the first call with new values of ``key``."""
    if _INTERPRETED:
        tiles = tiles[:1]  # with nothing to choose, nothing is timed: there is no device
    configs = [
        triton.Config(dict(zip(names.split(), tile, strict=True)), num_warps=warps)
        for *tile, warps in tiles
    ]
    options = {"prune_configs_by": {"early_config_prune": _not_too_wide}}
    return lambda kernel: triton.autotune(configs, key.split(), **options)(triton.jit(kernel))


def _not_too_wide(configs: list[Any], args: dict[str, Any], **_: Any) -> list[Any]:
    """Keep the tiles of whose channels more than half are there."""
    return [config for config in configs if config.kwargs["BC"] < 2 * args["C"]] or configs[-1:]


@_tuned("N HW C K", "BH BC STAGES", SELECT_TILES)
def _select(  # type: ignore[no-untyped-def]
    grad,
    top,
    position,
    share,
    N,
    HW,
    C,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    BH: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write where dO is largest, and what the rest of it sums to, as (C, N, SPLITS * K).

    For K = 1: top is the largest |dO| of the split, share the split's sum.
    For K > 1: top are the K kept values of dO, share what each of them takes of the rest.
    """
    chunks = tl.cdiv(C, BC)
    pid = tl.program_id(0)
    split = pid // chunks % SPLITS
    n = pid // chunks // SPLITS
    c_C = pid % chunks * BC + tl.arange(0, BC)
    inside_C = c_C < C
    row_H1 = tl.arange(0, BH)[:, None]
    start = split * tl.cdiv(HW, SPLITS)
    end = tl.minimum(start + tl.cdiv(HW, SPLITS), HW)
    sample = grad + n.to(tl.int64) * HW * C
    tile_HC = sample + row_H1 * C + c_C[None, :]
    slot_C = (c_C.to(tl.int64) * N + n) * SPLITS + split

    size_C = tl.full([BC], float("inf"), tl.float32)
    position_C = tl.full([BC], -1, tl.int32)
    sum_C = tl.zeros([BC], tl.float32)
    kept_C = tl.zeros([BC], tl.float32)
    for j in range(K):
        best_HC = tl.full([BH, BC], -1.0, tl.float32)  # below every size: a NaN is never above it
        at_HC = tl.zeros([BH, BC], tl.int32)
        sum_HC = tl.zeros([BH, BC], tl.float32)
        for h in tl.range(start, end, BH, num_stages=STAGES):
            inside_HC = (h + row_H1 < end) & inside_C[None, :]
            value_HC = tl.load(tile_HC + h * C, mask=inside_HC, other=0.0).to(tl.float32)
            size_HC = tl.abs(value_HC)
            better_HC = size_HC > best_HC  # strictly: a lane sees its positions in order
            if K > 1:  # only what comes after the last that was kept
                tied_HC = (size_HC == size_C[None, :]) & (h + row_H1 > position_C[None, :])
                better_HC = better_HC & ((size_HC < size_C[None, :]) | tied_HC)
            best_HC = tl.where(better_HC, size_HC, best_HC)
            at_HC = tl.where(better_HC, h, at_HC)
            sum_HC += value_HC
        size_C = tl.max(best_HC, 0)
        # A row past the end has a zero to offer: it wins no tie, and where all else is NaN, HW - 1
        # is lower.
        at_HC = tl.where(best_HC == size_C[None, :], at_HC + row_H1, HW - 1)
        position_C = tl.min(at_HC, 0)
        sum_C = tl.sum(sum_HC, 0)
        tl.store(position + slot_C * K + j, position_C, mask=inside_C)
        if K == 1:
            tl.store(top + slot_C, size_C, mask=inside_C)
        else:
            value_C = tl.load(sample + position_C * C + c_C, mask=inside_C, other=0.0)
            value_C = value_C.to(tl.float32)
            tl.store(top + slot_C * K + j, value_C, mask=inside_C)
            kept_C += value_C
    tl.store(share + slot_C, (sum_C - kept_C) / K, mask=inside_C)


@_tuned("N H W C C_OUT KH KW K", "BB BT BC", PATCH_TILES)
def _sum_patches(  # type: ignore[no-untyped-def]
    pre,
    top,
    position,
    share,
    out,
    scale,
    N,
    H,
    W,
    C_IN,
    C,
    C_OUT,
    GROUPS,
    OW,
    STRIDE_H,
    STRIDE_W,
    PADDING_H,
    PADDING_W,
    DILATION_H,
    DILATION_W,
    KH: tl.constexpr,
    KW: tl.constexpr,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    MEAN: tl.constexpr,
    BB: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """Sum value * patch over all samples and their K positions; C is the channels of a group.

    MEAN: over the samples.
    """
    tap_T = tl.program_id(0) * BT + tl.arange(0, BT)
    i_C = tl.program_id(1) * BC + tl.arange(0, BC)
    c = tl.program_id(2)
    group = c // (C_OUT // GROUPS)
    down_T = tap_T // KW * DILATION_H - PADDING_H
    right_T = tap_T % KW * DILATION_W - PADDING_W
    written_TC = (tap_T < KH * KW)[:, None] & (i_C < C)[None, :]
    channel_C = pre + group * C + i_C
    first_slot = c.to(tl.int64) * N * SPLITS

    sum_BTC = tl.zeros([BB, BT, BC], tl.float32)
    for first in range(0, N * K, BB):
        row_B = first + tl.arange(0, BB)
        inside_B = row_B < N * K
        n_B = row_B // K
        slot_BS = first_slot + row_B[:, None] * SPLITS + tl.arange(0, SPLITS)[None, :]
        inside_B1 = inside_B[:, None]
        if K == 1:  # the best of the splits; of equals, the lowest position
            top_BS = tl.load(top + slot_BS, mask=inside_B1, other=-1.0)
            position_BS = tl.load(position + slot_BS, mask=inside_B1, other=0)
            is_best_BS = top_BS == tl.max(top_BS, 1)[:, None]
            position_B = tl.min(tl.where(is_best_BS, position_BS, 2147483647), 1)
        else:
            position_B = tl.load(position + first_slot * K + row_B, mask=inside_B, other=0)
        y_BT = (position_B // OW * STRIDE_H)[:, None] + down_T[None, :]
        x_BT = (position_B % OW * STRIDE_W)[:, None] + right_T[None, :]
        inside_BT = (y_BT >= 0) & (y_BT < H) & (x_BT >= 0) & (x_BT < W) & inside_B1
        pixel_BT = n_B.to(tl.int64)[:, None] * (H * W) + (y_BT * W + x_BT)
        patch_BTC = tl.load(
            channel_C[None, None, :] + pixel_BT[:, :, None] * C_IN,
            mask=inside_BT[:, :, None] & written_TC[None, :, :],
            other=0.0,
        )
        if K == 1:  # after the patches are asked for: both are waited for at once
            value_B = tl.sum(tl.load(share + slot_BS, mask=inside_B1, other=0.0), 1)
        else:
            value_B = tl.load(top + first_slot * K + row_B, mask=inside_B, other=0.0)
            value_B += tl.load(share + first_slot + n_B, mask=inside_B, other=0.0)
        sum_BTC += value_B[:, None, None] * patch_BTC.to(tl.float32)
    sum_TC = tl.sum(sum_BTC, 0) * scale
    if MEAN:
        sum_TC = sum_TC / N
    tl.store(out + (c * KH * KW + tap_T[:, None]) * C + i_C[None, :], sum_TC, mask=written_TC)


def _num_splits(num_samples: int, channels: int, positions: int) -> int:
    """Return how many splits of the positions give about 8 programs to each SM of a large GPU.

    Not tuned: the size of the buffers depends on it, and a traced graph has to know that.
    """
    splits = 1
    while (
        splits < 32
        and splits * num_samples * triton.cdiv(channels, 64) < 1024
        and positions >= 128 * splits
    ):
        splits *= 2
    return splits


@torch.library.triton_op("fxlocal::conv2d_topk_weight_grad", mutates_args=())
def conv2d_topk_weight_grad(
    pre: Tensor,
    grad: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    k: int,
    scale: float | None,
) -> Tensor:
    """Approximate a convolution's weight gradient by the k largest entries of each channel.

    Arguments as in `fxlocal.ops.topk.conv_topk`, of float32, bfloat16 or float16; ``pre`` and
    ``grad`` are copied if they are not channels_last. Of ``k`` positions all are kept at most.
    The gradient is float32, channels_last.
    """
    pre = pre.contiguous(memory_format=torch.channels_last)
    grad = grad.contiguous(memory_format=torch.channels_last)
    num_samples, channels_in, height, width = pre.shape
    _, channels_out, out_height, out_width = grad.shape
    num_positions = out_height * out_width
    k = min(k, num_positions)
    splits = _num_splits(num_samples, channels_out, num_positions) if k == 1 else 1

    top = grad.new_empty((channels_out, num_samples, splits, k), dtype=torch.float32)
    position = torch.empty_like(top, dtype=torch.int32)
    share = grad.new_empty((channels_out, num_samples, splits), dtype=torch.float32)
    wrap_triton(_select)[
        lambda tile: (triton.cdiv(channels_out, tile["BC"]) * splits * num_samples,)
    ](grad, top, position, share, num_samples, num_positions, channels_out, K=k, SPLITS=splits)

    in_group = channels_in // groups
    taps = kernel_size[0] * kernel_size[1]
    out = pre.new_empty((channels_out, *kernel_size, in_group), dtype=torch.float32)
    wrap_triton(_sum_patches)[
        lambda tile: (
            triton.cdiv(taps, tile["BT"]),
            triton.cdiv(in_group, tile["BC"]),
            channels_out,
        )
    ](
        *(pre, top, position, share, out, 1.0 if scale is None else scale),
        *(num_samples, height, width, channels_in, in_group, channels_out, groups, out_width),
        *(*stride, *padding, *dilation),
        KH=kernel_size[0],
        KW=kernel_size[1],
        K=k,
        SPLITS=splits,
        MEAN=scale is None,
    )
    return out.permute(0, 3, 1, 2)

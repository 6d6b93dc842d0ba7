"""Predict whether the weight gradient of the largest errors is faster than the exact one.

A linear model of the time. The exact gradient is bound by arithmetic, `TopK`'s by memory: once for
the errors and once for the patches that it adds up::

    exact = launch + flops / rate
    topk  = launch + bytes of dO / select + maps of dO / maps per ms
            + patches / patches per ms + bytes of patches / gather
            + bytes of the input / convert, where that is not channels last

The constants are fitted to measurements, see docs/results/gradient-approximation.md. No clock is
read: the same model gets the same graph in every run.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..facts import Layer, Shapes, TopKTime, map_size

__all__ = ["predict_topk_time"]


@dataclass(frozen=True)
class _Machine:
    """What a device does in a millisecond, and what a call takes."""

    exact_launch: float  # ms
    topk_launch: float  # ms
    rate: Mapping[str, float]  # flops, by dtype
    select: float  # bytes of dO
    maps: float  # maps of dO: one per sample and output channel
    patches: float  # rows of patches: one pixel's channels each
    gather: float  # bytes of patches
    convert: float  # bytes


_CPU_THREAD = _Machine(  # one thread of two, AMD EPYC, AVX2
    exact_launch=0.2,
    topk_launch=0.4,
    rate={"float32": 58e6, "bfloat16": 58e6, "float16": 10e6, "float64": 25e6},
    select=3e6,
    maps=14e3,
    patches=46e3,
    gather=50e6,
    convert=0.75e6,
)
_CUDA = _Machine(  # an H200; float32 means TF32
    exact_launch=0.010,
    topk_launch=0.007,
    rate={"float32": 6.6e10, "bfloat16": 3.7e11, "float16": 3.7e11, "float64": 3e10},
    select=3.7e9,
    maps=1e9,
    patches=1e9,
    gather=4e9,
    convert=1e9,
)


def predict_topk_time(layer: Layer, shapes: Shapes, k: int) -> TopKTime:
    """Return what the weight gradient of ``layer`` is predicted to take, exact and by ``TopK(k)``.

    Where k positions are all that there are, both times are the exact one's.
    """
    machine, threads = (
        (_CPU_THREAD, torch.get_num_threads()) if shapes.device == "cpu" else (_CUDA, 1)
    )
    item = torch.finfo(getattr(torch, shapes.dtype)).bits // 8
    positions = math.prod(map_size(layer, shapes))
    maps = math.prod(shapes.post) // positions  # one per sample and output channel
    taps, channels = math.prod(shapes.weight[2:]), shapes.weight[1]
    flops = 2 * maps * positions * taps * channels
    exact = machine.exact_launch + flops / machine.rate[shapes.dtype] / threads
    if k == positions:
        return TopKTime(exact, exact)
    patches = maps * k * taps
    memory = math.prod(shapes.post) * item / machine.select + maps / machine.maps
    memory += patches / machine.patches + patches * channels * item / machine.gather
    if not shapes.channels_last:
        memory += math.prod(shapes.pre) * item / machine.convert
    return TopKTime(exact, machine.topk_launch + memory / threads)

"""The weight gradient of `TopK` alone against the dense one.

Source: gradient approximation, Table 1, with its shapes of 3x3 convolutions at batch 128; on a GPU
also those of ResNet-18 at 224 pixels. The paper's speed-ups are of its own kernel against cuDNN on
a Titan Xp.

Dense is ATen's `convolution_backward` for the weight alone, in the better of both layouts. `TopK`
counts in channels-last layout, which it needs, and from contiguous tensors, which it copies first.
Sides take turns, round after round; ratios are of one round's two. On a GPU a turn replays a
CUDA graph of many calls, cuDNN picks its algorithm by measuring, and float32 may be TF32.

The results hold selection and accumulation apart as well, to fit `fxlocal.compiler.topk_time` to.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch

from ...compiler.topk_time import predict_topk_time
from ...errors import nearest
from ...facts import ConvGeometry, Layer, Shapes
from ...ops import topk
from ..papers.runner import KERNELS
from ..training.measure import find_versions
from ..training.settings import Machine, SettingsError
from .spread import find_spread, ratios
from .turns import WARM_UP_TURNS, refuse_none, take_turns, time_call

__all__ = ["DTYPES", "bench_kernels", "default_shapes"]

Shape: TypeAlias = tuple[int, int, int]  # input channels, output channels, height and width

_BATCH = 128
_LARGER: tuple[Shape, ...] = ((64, 64, 56), (128, 128, 28), (256, 256, 14), (512, 512, 7))

DTYPES = ("float32", "bfloat16", "float16", "float64")
_LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
_KERNEL, _ONE = [3, 3], [1, 1]  # kernel; stride, padding and dilation
_STAGES = {"select": "_select", "accumulate": "_sum_patches"}  # Triton kernels
_CALLS = 20  # in one CUDA graph, so that its launch does not count
_PROFILED = 10

_Side: TypeAlias = tuple[str, str]  # what is computed, in which layout


def default_shapes(device: str) -> tuple[Shape, ...]:
    """Return the shapes of the table on ``device``."""
    return (*KERNELS, *(_LARGER if torch.device(device).type == "cuda" else ()))


def bench_kernels(
    machine: Machine,
    *,
    shapes: Sequence[Shape] | None = None,
    dtypes: Sequence[str] = ("float32",),
    k: int = 1,
    batch: int = _BATCH,
    repeats: int = 20,
    on_row: Callable[[str], object] = lambda name: None,
) -> dict[str, Any]:
    """Measure the weight gradient of 3x3 convolutions, padded by 1.

    Args:
        machine: device and threads count.
        shapes: input channels, output channels, size of the map; None for `default_shapes`.
        dtypes: of `DTYPES`.
        k: positions that TopK keeps, fewer than the smallest map has.
        batch: samples.
        repeats: rounds measured.
        on_row: called with the row when its turn comes.

    Returns:
        What ran, where, and "rows": one dict per dtype and shape; ready for JSON.

    Raises:
        SettingsError: if an argument is out of range; before anything is measured.
    """
    shapes = default_shapes(machine.device) if shapes is None else shapes
    refuse_none(repeats=repeats, batch=batch)
    _refuse_unfit(shapes, dtypes, k)
    if machine.threads is not None:
        torch.set_num_threads(machine.threads)
    rows = []
    fastest = torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True)
    with torch.no_grad(), fastest:
        for dtype in dtypes:
            for shape in shapes:
                on_row(f"{dtype} {shape}")
                rows.append(_measure(shape, dtype, k, batch, repeats, machine))
    return {
        "batch_size": batch,
        "k": k,
        "repeats": repeats,
        "device": machine.name,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "versions": find_versions(),
        "rows": rows,
    }


def _refuse_unfit(shapes: Sequence[Shape], dtypes: Sequence[str], k: int) -> None:
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise SettingsError(f"unknown dtype {dtype!r}. Nearest: {nearest(dtype, DTYPES)}")
    smallest = min(size for _, _, size in shapes)
    if not 1 <= k < smallest**2:
        raise SettingsError(
            f"k={k}: must be at least 1 and less than {smallest**2}, the positions of the "
            f"smallest map, {smallest}x{smallest}"
        )


def _measure(
    shape: Shape, dtype: str, k: int, batch: int, repeats: int, machine: Machine
) -> dict[str, Any]:
    """Return one row."""
    device = torch.device(machine.device)
    sides = _sides(shape, getattr(torch, dtype), k, batch, device)
    if machine.compile:
        torch._dynamo.reset()  # every row has shapes of its own, and there is a limit to those
        compiled = torch.compile(topk.conv_topk, fullgraph=True, dynamic=False)
        for layout in _LAYOUTS:
            sides["compiled", layout] = partial(compiled, *sides["topk", layout].args)
    turns = {side: _turn(call, device) for side, call in sides.items()}
    seconds = take_turns(turns, repeats)
    spread: dict[str, dict[str, dict[str, Any]]] = {}
    for (what, layout), values in seconds.items():
        for name, value in find_spread(milliseconds=[1000 * own for own in values]).items():
            spread.setdefault(name, {}).setdefault(what, {})[layout] = value
    milliseconds = spread["milliseconds"]
    kernels = {}
    if device.type == "cuda":
        kernels = _profile(sides["topk", "channels_last"])
        for stage, name in _STAGES.items():
            if name in kernels:  # not where there is no Triton
                milliseconds[stage] = {"channels_last": kernels[name]}
    dense = min(_LAYOUTS, key=milliseconds["dense"].__getitem__)

    rivals = {"": ("topk", "channels_last"), "_contiguous": ("topk", "contiguous")}
    if machine.compile:
        rivals["_compiled"] = "compiled", "channels_last"
    speedups = find_spread(
        **{
            f"speedup{name}": ratios(seconds["dense", dense], seconds[side])
            for name, side in rivals.items()
        }
    )
    predicted = {layout: _predict(shape, dtype, k, batch, device, layout) for layout in _LAYOUTS}
    times = predicted["channels_last"]
    chosen = "topk" if times["topk"] < times["exact"] else "exact"
    paper = KERNELS[shape] if k == 1 and batch == _BATCH and shape in KERNELS else {}
    has_bar = device.type == "cpu" and dtype == "float32"
    return {
        "dtype": dtype,
        "channels_in": shape[0],
        "channels_out": shape[1],
        "size": shape[2],
        **spread,
        "dense_layout": dense,
        "speedup_compiled": None,
        **speedups,
        "predicted": predicted,
        "chosen": chosen,
        "speedup_chosen": speedups["speedup"] if chosen == "topk" else 1.0,
        "paper": paper.get("speedup"),
        "bar": paper.get("bar") if has_bar else None,
        "kernels": kernels,
    }


def _sides(
    shape: Shape, dtype: torch.dtype, k: int, batch: int, device: torch.device
) -> dict[_Side, partial[Any]]:
    """Return what is measured: each a call of one computation in one layout."""
    channels_in, channels_out, size = shape
    random = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    values = (
        random(batch, channels_in, size, size),
        random(batch, channels_out, size, size),
        random(channels_out, channels_in, *_KERNEL),
    )
    sliding = (_KERNEL, _ONE, _ONE, _ONE, 1)
    sides: dict[_Side, partial[Any]] = {}
    for layout, memory_format in _LAYOUTS.items():
        pre, grad, weight = (v.to(device, dtype, memory_format=memory_format) for v in values)
        sides["dense", layout] = partial(
            torch.ops.aten.convolution_backward,
            *(grad, pre, weight, None, _ONE, _ONE, _ONE, False, [0, 0], 1, [False, True, False]),
        )
        sides["topk", layout] = partial(topk.conv_topk, pre, grad, *sliding, k, 1.0)
        if device.type != "cuda":
            kept = topk.select(grad, k, 1.0)
            sides["select", layout] = partial(topk.select, grad, k, 1.0)
            summing: Callable[..., object] = topk.accumulate
            sides["accumulate", layout] = partial(summing, pre, *kept, grad.shape[2:], *sliding)
    return sides


def _turn(call: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """Warm up, and return what tells the seconds of one call."""
    for _ in range(1 + WARM_UP_TURNS):
        call()
    if device.type != "cuda":
        return partial(time_call, call, device)
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # where a capture runs, allocators and libraries warm up too
        call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(_CALLS):
            call()
    graph.replay()
    return lambda: time_call(graph.replay, device) / _CALLS


def _profile(call: Callable[[], object]) -> dict[str, float]:
    """Return the milliseconds of each kernel of one call, on a GPU."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(_PROFILED):
            call()
        torch.cuda.synchronize()
    kernels: dict[str, float] = {}
    for event in profile.events() or []:
        if event.device_type.name == "CUDA":
            milliseconds = event.time_range.elapsed_us() / 1000 / _PROFILED
            kernels[event.name] = kernels.get(event.name, 0.0) + milliseconds
    return kernels


def _predict(
    shape: Shape, dtype: str, k: int, batch: int, device: torch.device, layout: str
) -> dict[str, float]:
    """Return the milliseconds by the cost model."""
    channels_in, channels_out, size = shape
    one = (1, 1)
    geometry = ConvGeometry(one, one, one, 1)
    layer = Layer(0, "conv", "conv", "conv", "conv.weight", "x", geometry=geometry)
    shapes = Shapes(
        (batch, channels_in, size, size),
        (batch, channels_out, size, size),
        (channels_out, channels_in, *_KERNEL),
        dtype=dtype,
        device=device.type,
        channels_last=layout == "channels_last",
    )
    time = predict_topk_time(layer, shapes, k)
    return {"exact": time.exact, "topk": time.topk}

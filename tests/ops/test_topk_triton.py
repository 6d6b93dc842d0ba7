"""TopK on CUDA against a dense oracle: on a GPU, or in the interpreter (conftest.py).

conftest.py turns the interpreter on. It takes a quarter of a millisecond for each operation of each
program, which is why the tensors are tiny.
"""

import os
import subprocess
import sys

import numpy
import pytest
import torch
from torch.nn.grad import conv2d_weight

triton = pytest.importorskip("triton")

from fxlocal.ops import topk_triton  # noqa: E402
from fxlocal.ops.topk_triton import conv2d_topk_weight_grad  # noqa: E402

pytestmark = pytest.mark.slow  # the interpreter is

CUDA = torch.cuda.is_available()
OLD_TRITON = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
NEW_NUMPY = tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4)
needs_kernels = pytest.mark.skipif(
    OLD_TRITON and NEW_NUMPY and not CUDA,
    reason="this interpreter cannot loop to a bound with numpy 2.4",
)
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU")


def use_tiles(monkeypatch, select, patches):
    """Let the kernels know these tiles alone."""
    for kernel, names, tile in (
        (topk_triton._select, ("BH", "BC", "STAGES"), select),
        (topk_triton._sum_patches, ("BB", "BT", "BC"), patches),
    ):
        config = triton.Config(dict(zip(names, tile, strict=False)), num_warps=tile[-1])
        monkeypatch.setattr(kernel, "configs", [config])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that small tensors have several blocks of everything; and no time goes to tuning."""
    use_tiles(monkeypatch, (32, 4, 1, 4), (2, 8, 4, 4))


def inputs(n=3, groups=1, size=(7, 6), kernel=(3, 3), dtype=torch.float32, in_=3, out=3, **sliding):
    """Input, gradient of the output, and the rest of the arguments up to the groups."""
    sliding = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), **sliding}
    dtype, grad_dtype = dtype if isinstance(dtype, tuple) else (dtype, dtype)
    pre = torch.randn(n, in_, *size)
    weight = torch.empty(out, in_ // groups, *kernel)
    grad = torch.randn_like(torch.conv2d(pre, weight, **sliding, groups=groups))
    like = {"device": "cuda" if CUDA else "cpu", "memory_format": torch.channels_last}
    arguments = [list(kernel), *map(list, sliding.values()), groups]
    return pre.to(dtype=dtype, **like), grad.to(dtype=grad_dtype, **like), *arguments


def dense(pre, grad, kernel, stride, padding, dilation, groups, k, scale):
    """The kept values scattered into zeros, then the exact weight gradient, in float64."""
    pre, maps = pre.double().cpu(), grad.double().cpu().flatten(2)
    k, scale = min(k, maps.shape[2]), 1 / len(pre) if scale is None else scale
    kept = maps.abs().sort(dim=2, descending=True, stable=True).indices[:, :, :k]
    values = maps.gather(2, kept)
    values = values + (maps.sum(2, keepdim=True) - values.sum(2, keepdim=True)) / k
    sparse = torch.zeros_like(maps).scatter(2, kept, scale * values).view(grad.shape)
    shape = (grad.shape[1], pre.shape[1] // groups, *kernel)
    return conv2d_weight(pre, shape, sparse, stride, padding, dilation, groups)


def assert_is_dense(arguments, k=1, scale=1.0):
    """The kernels' result is the oracle's, float32 and channels last; return it."""
    result = conv2d_topk_weight_grad(*arguments, k, scale)
    expected = dense(*arguments, k, scale)
    assert result.dtype == torch.float32
    assert result.shape == expected.shape
    in_group, height, width = result.shape[1:]
    assert result.stride() == (height * width * in_group, 1, width * in_group, in_group)
    # float32 sums of at most a few hundred terms
    torch.testing.assert_close(result.double().cpu(), expected, rtol=1e-5, atol=5e-5)
    return result


CASES = {
    "3x3": {},
    "1x1": {"kernel": (1, 1), "padding": (0, 0)},
    "5x3": {"kernel": (5, 3), "padding": (2, 1)},
    "unpadded": {"padding": (0, 0)},
    "padded unevenly": {"padding": (0, 2)},
    "strided": {"stride": (2, 2), "size": (9, 7)},
    "strided unevenly": {"stride": (1, 2), "padding": (2, 1), "size": (6, 9)},
    "dilated": {"dilation": (2, 2), "padding": (2, 2)},
    "dilated unevenly": {"dilation": (1, 3), "padding": (1, 2), "size": (5, 9)},
    "two groups": {"groups": 2, "in_": 6, "out": 2},
    "depthwise": {"groups": 3},
    "depthwise, two each": {"groups": 2, "in_": 2, "out": 4, "stride": (2, 1)},
    "two blocks of channels": {"n": 1, "in_": 9, "out": 5},
    "one of everything": {"n": 1, "in_": 1, "out": 1, "size": (1, 1), "kernel": (1, 1)},
}


@needs_kernels
@pytest.mark.parametrize("case", CASES)
def test_equals_the_dense_oracle(case):
    assert_is_dense(inputs(**CASES[case]), k=1, scale=0.5)
    assert_is_dense(inputs(**CASES[case]), k=3, scale=-2.0)
    assert_is_dense(inputs(**CASES[case]), k=1, scale=None)


@needs_kernels
@pytest.mark.parametrize("k", [2, 5, 20, 21])
def test_any_number_is_kept(k):
    arguments = inputs(n=2, size=(4, 5), out=2)
    result = assert_is_dense(arguments, k)
    if k >= 20:  # all there are: the exact gradient
        pre, grad, *sliding = (a.double() if torch.is_tensor(a) else a for a in arguments)
        exact = conv2d_weight(pre, result.shape, grad, *sliding[1:])
        torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=5e-5)


NARROW = [torch.bfloat16, torch.float16]
MIXED = [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)]


@needs_kernels
@pytest.mark.parametrize("dtype", NARROW + MIXED)
def test_any_dtype_in_and_float32_out(dtype):
    arguments = inputs(dtype=dtype, out=2)
    for k in (1, 2):
        assert_is_dense(arguments, k)


@needs_kernels
def test_large_maps_are_split():
    arguments = inputs(n=2, size=(24, 23), in_=2, out=2, padding=(1, 0))
    assert topk_triton._num_splits(2, 2, 24 * 21) == 4
    assert_is_dense(arguments)


@needs_kernels
@pytest.mark.parametrize("k", [1, 2, 4])
def test_of_equals_the_lowest_position_is_kept(k):
    pre, grad, *sliding = inputs(n=2, size=(13, 12), out=5)
    assert topk_triton._num_splits(2, 5, 13 * 12) == 2
    grad.zero_()
    grad[0, 1] = 2.0  # a constant
    grad[1, 1, 3:, 1] = -1.0  # among zeros, in both splits
    grad[:, 2, 2, 5], grad[:, 2, 9, 3] = 3.0, -3.0  # the signs differ
    grad[0, 3, 12, 11] = 1.0  # the last of all
    assert not assert_is_dense((pre, grad, *sliding), k)[[0, 4]].any()


@needs_kernels
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize("k", [1, 3])
def test_what_is_not_finite_stays_in_its_channel(k):
    pre, grad, *sliding = inputs(n=2, out=5)
    finite = conv2d_topk_weight_grad(pre, grad, *sliding, k, 1.0)
    grad[0, 1] = grad[1, 2, 2, 2] = float("nan")
    grad[0, 3], grad[1, 4, 2, 2] = float("inf"), -float("inf")
    result = conv2d_topk_weight_grad(pre, grad, *sliding, k, 1.0)
    assert torch.equal(result[0], finite[0])
    assert not result[1:].isfinite().flatten(1).any(1)[:3].any()
    assert not result[4].isfinite().all()


@needs_kernels
@pytest.mark.parametrize("k", [1, 3])
def test_every_position_is_on_the_map(k):
    """Also where no value is larger than another: what lies past the map is not memory of ours."""
    grad = torch.full((2, 5, 7, 6), float("nan"), device="cuda" if CUDA else "cpu")
    position = torch.full((5, 2, 1, k), -1, dtype=torch.int32, device=grad.device)
    top, share = torch.empty_like(position, dtype=torch.float32), grad.new_empty(5, 2, 1)
    topk_triton._select[(4,)](grad, top, position, share, 2, 42, 5, K=k, SPLITS=1)
    assert position.min() >= 0
    assert position.max() < 42


@needs_kernels
@pytest.mark.parametrize("k", [1, 2])
def test_the_memory_format_of_the_inputs_changes_no_bit(k):
    pre, grad, *sliding = inputs(stride=(2, 1))
    result = conv2d_topk_weight_grad(pre, grad, *sliding, k, 1.0)
    pre, grad = pre.contiguous(), grad.contiguous()
    assert not grad.is_contiguous(memory_format=torch.channels_last)
    for _ in range(3 if CUDA else 1):
        other = conv2d_topk_weight_grad(pre, grad, *sliding, k, 1.0)
        assert torch.equal(other, result)
        assert other.stride() == result.stride()


@needs_kernels
@pytest.mark.parametrize("tile", topk_triton.PATCH_TILES)
def test_each_tile_gives_the_same(tile, monkeypatch):
    at = topk_triton.PATCH_TILES.index(tile) % len(topk_triton.SELECT_TILES)
    use_tiles(monkeypatch, topk_triton.SELECT_TILES[at], tile)
    large = {"n": 130, "in_": 70, "out": 66, "size": (17, 15)}
    small = {"n": 3, "in_": 3, "out": 2, "size": (6, 7)}
    arguments = inputs(**(large if CUDA else small))
    pre, grad, *sliding = arguments
    for k in (1, 2) if CUDA else (1,):
        expected = dense(*arguments, k, 1.0)
        result = conv2d_topk_weight_grad(pre, grad, *sliding, k, 1.0).double().cpu()
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-3 if CUDA else 5e-5)


TRACE = """
import torch, triton
from torch._subclasses import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from fxlocal.ops.topk_triton import conv2d_topk_weight_grad

if not torch.cuda.is_available():  # the analysis of what a kernel writes asks for the target
    class Hopper:
        @staticmethod
        def get_current_target():
            return triton.backends.compiler.GPUTarget("cuda", 90, 32)
    triton.runtime.driver.set_active(Hopper)

def run(pre, grad):
    return conv2d_topk_weight_grad(pre, grad, [5, 3], [2, 1], [2, 0], [1, 1], 4, k, scale)

for k, scale in ((1, 0.5), (3, None)):
    with FakeTensorMode():
        pre = torch.empty(16, 64, 56, 56, device="cuda", dtype=torch.bfloat16)
        grad = torch.empty(16, 96, 28, 54, device="cuda")
        result = run(pre, grad)
        assert result.dtype == torch.float32 and result.device.type == "cuda"
        assert result.shape == (96, 16, 5, 3), result.shape
        assert result.stride() == (240, 1, 48, 16), result.stride()
        graph = make_fx(dispatch_functionalize(run))(pre, grad).graph
    written = [n.kwargs["tensors_to_clone"] for n in graph.nodes if "kernel_idx" in n.kwargs]
    assert written == [["top", "position", "share"], ["out"]], written
    for node in graph.nodes:
        assert "fxlocal" not in str(node.target), "opaque to the compiler"
"""


def test_a_graph_holds_two_kernels_that_write_their_results_alone():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", TRACE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@needs_gpu
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_eager(k, dtype, monkeypatch):
    monkeypatch.undo()  # all tiles, to be tuned
    pre, grad, *sliding = inputs(n=33, in_=48, out=72, size=(29, 31), dtype=dtype)
    pre = pre.contiguous()

    def run(pre, grad):
        return conv2d_topk_weight_grad(pre.relu(), grad * 2, *sliding, k, 1.0)

    expected, result = run(pre, grad), torch.compile(run, fullgraph=True)(pre, grad)
    assert result.stride() == expected.stride()
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-3)

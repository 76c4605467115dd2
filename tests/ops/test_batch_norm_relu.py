"""fastres.ops.batch_norm_relu: what it computes, how it is registered, and what it refuses."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastres.ops import batch_norm_relu
from fastres.ops.batch_norm_relu import batch_norm_relu_twin, reference

two_outputs = partial(batch_norm_relu_twin, training=True, momentum=0.1, eps=1e-5, relu=True, num_batches_tracked=None)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LAYOUTS = ["channels_last", "contiguous", "strided"]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def tensor(shape, layout="channels_last", dtype=torch.float32, device="cpu"):
    """Normally distributed; "strided" has gaps between its elements."""
    if layout == "strided":
        return torch.randn(*shape[:-1], 2 * shape[-1]).to(device, dtype)[..., ::2]
    x = torch.randn(shape).to(device, dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "channels_last" else x.contiguous()


def parameters(channels, dtype=torch.float32, device="cpu"):
    """weight, bias, running_mean and running_var; float32 beside half activations, as under autocast."""
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias, mean = torch.randn(3, channels).to(device, dtype).unbind()
    return weight, bias, mean, (torch.rand(channels) + 0.5).to(device, dtype)


def run(function, x, residual, parameters, grad, dtype=None, **options):
    """The output, the running statistics afterwards and the gradients of x, residual, weight and bias."""

    def leaf(t):
        return None if t is None else t.detach().to(dtype or t.dtype).requires_grad_()

    x, residual, weight, bias = leaf(x), leaf(residual), leaf(parameters[0]), leaf(parameters[1])
    running = [p.to(dtype or p.dtype, copy=True) for p in parameters[2:]]
    y = function(x, *running, weight, bias, residual=residual, **options)
    leaves = [t for t in (x, residual, weight, bias) if t is not None]
    return [y.detach(), *running, *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


def assert_close(actual, expected, tolerance):
    for a, e in zip(actual, expected, strict=True):  # torch.testing.assert_close takes five times as long
        assert a.shape == e.shape
        difference = (a.double() - e.double()).abs().max() / max(1.0, e.abs().max().item())
        assert difference <= tolerance  # also where one is NaN


HERE = Path(__file__)
OLDER = ["-k", "(test_grid or test_large) and cpu and not strided", __file__]  # torch copies what is strided
# tests that need a process of their own: the arguments of pytest, and what must be in the environment from the start
PROCESSES = {
    "triton_interpreter": ([HERE.with_name("triton_interpreter.py")], {"TRITON_INTERPRET": "1"}),
    "triton_compiled": ([HERE.with_name("triton_compile.py")], {}),
    "default_instruction_set": (OLDER, {"ATEN_CPU_CAPABILITY": "default"}),
    "avx2": (OLDER, {"ATEN_CPU_CAPABILITY": "avx2"}),
}


@pytest.fixture(scope="session", autouse=True)
def processes(request):
    """Those of PROCESSES whose tests run: started with the first test of this file, and waited for by its last ones."""
    chosen = {getattr(item, "callspec", None) and item.callspec.params.get("process") for item in request.session.items}
    started = {}
    for name in PROCESSES.keys() & chosen:
        arguments, environment = PROCESSES[name]
        started[name] = subprocess.Popen(
            ["nice", sys.executable, "-m", "pytest", "-q", *map(str, arguments)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            text=True,
        )
    yield started
    for process in started.values():
        process.kill()


class TestAgainstFloat64:
    """Output, running statistics and every gradient, against PyTorch's own operators in float64."""

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize(
        "shape", [(4, 64, 8, 8), (3, 5, 7, 3), (5, 33, 1, 1), (1, 7, 9, 10), (6, 17), (2, 50, 70)], ids=str
    )
    @pytest.mark.parametrize("has_residual", [False, True])
    def test_grid(self, device, dtype, layout, shape, has_residual):
        torch.manual_seed(0)
        x = tensor(shape, layout, dtype, device) * 2 + 1
        other_layout = "contiguous" if layout == "channels_last" else "channels_last"
        residual = tensor(shape, other_layout, dtype, device) if has_residual else None
        grad = tensor(shape, "contiguous", dtype, device)
        for training in (True, False):
            for relu in (True, False):
                arguments = x, residual, parameters(shape[1], dtype, device), grad
                options = {"training": training, "relu": relu, "momentum": 0.3, "eps": 1e-3}
                actual = run(batch_norm_relu, *arguments, **options)
                expected = run(reference.batch_norm_relu, *arguments, dtype=torch.float64, **options)
                assert_close(actual, expected, TOLERANCE[dtype])

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("shape", [(9, 40, 91, 65), (9, 96, 48, 64)], ids=str)
    @pytest.mark.parametrize("has_residual", [False, True])
    def test_large(self, device, dtype, layout, shape, has_residual):
        """On a CPU all threads work, and results are streamed past the caches, but for rows of the first shape that do
        not begin where a vector may; on a GPU x is read in two passes."""
        torch.manual_seed(0)
        x, grad = tensor(shape, layout, dtype, device), tensor(shape, device=device)
        affine = parameters(shape[1], dtype, device)
        # of so many results, none may be within rounding of 0
        residual = 16 * tensor(shape, layout, dtype, device).sign() if has_residual else None
        if residual is None:
            affine[1].copy_(16 * affine[1].sign())
        arguments = x, residual, affine, grad
        actual = run(batch_norm_relu, *arguments)
        assert_close(actual, run(reference.batch_norm_relu, *arguments, dtype=torch.float64), TOLERANCE[dtype])

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_the_same_every_time(self, device, layout):
        shape = 9, 96, 48, 64
        x, residual, grad = (tensor(shape, layout, torch.bfloat16, device) for _ in range(3))
        arguments = x, residual, parameters(shape[1], device=device), grad
        first, second = (run(batch_norm_relu, *arguments) for _ in range(2))
        assert all(map(torch.equal, first, second))

    @pytest.mark.last
    @pytest.mark.parametrize("process", PROCESSES)
    def test_older_processors_and_triton(self, process, processes):
        """The CPU kernels with what an older processor has; Triton's in its interpreter, and compiled for an H100."""
        if process.startswith("triton"):
            pytest.importorskip("triton")
        output, _ = processes[process].communicate()
        assert processes[process].returncode == 0, output


class TestRegistration:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("requires_grad", [True, False])
    @pytest.mark.parametrize("has_residual", [True, False])
    @pytest.mark.parametrize("training", [True, False])
    def test_opcheck(self, device, layout, dtype, requires_grad, has_residual, training):
        x, residual, grad = (tensor((3, 6, 4, 5), layout, dtype, device) for _ in range(3))
        weight, bias, *running = parameters(6, dtype, device)
        for t in (x, residual, weight, bias):
            t.requires_grad_(requires_grad)
        residual = residual if has_residual else None
        options = training, 1e-5, True
        batches = torch.tensor(0, device=device)
        arguments = x, residual, weight, bias, *running, batches, training, 0.1, *options[1:]
        torch.library.opcheck(torch.ops.fastres.batch_norm_relu.default, arguments)
        torch.library.opcheck(torch.ops.fastres.batch_norm_relu_twin.default, arguments)
        with torch.no_grad():
            y, mean, var, _ = torch.ops.fastres.batch_norm_relu(*arguments)
        if not training:
            mean, var = running
        torch.library.opcheck(
            torch.ops.fastres.batch_norm_relu_backward.default,
            (grad, grad, *(t.detach() for t in (x, y)), None, bias.detach(), mean, var, *options),
        )

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("relu", [True, False])
    def test_gradcheck(self, layout, training, relu):
        torch.manual_seed(0)
        x, residual = (tensor((3, 3, 2, 2), layout, torch.float64).detach() for _ in range(2))
        weight, bias, *running = parameters(3, torch.float64)

        def function(x, residual, weight, bias):
            return batch_norm_relu(
                x,
                *(r.clone() for r in running),
                weight,
                bias,
                residual=residual,
                training=training,
                relu=relu,
            )

        leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradcheck(lambda x, w, b: function(x, None, w, b), [x, weight, bias])

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
    def test_compiled_agrees_without_a_graph_break(self, device, layout):
        torch.compiler.reset()
        torch.manual_seed(0)
        shape = (4, 16, 6, 6)
        arguments = [tensor(shape, layout, device=device), tensor(shape, layout, device=device)]
        arguments += [parameters(16, device=device), tensor(shape, "contiguous", device=device)]
        compiled = torch.compile(batch_norm_relu, fullgraph=True)
        assert_close(run(compiled, *arguments), run(batch_norm_relu, *arguments), 1e-5)

    @pytest.mark.parametrize("device", DEVICES)
    def test_twin_compiled(self, device):
        torch.compiler.reset()
        x, residual, grad, twin_grad = (tensor((4, 16, 6, 6), device=device) for _ in range(4))
        affine = parameters(16, device=device)[:2]

        def loss(x):
            y, twin = two_outputs(x, None, None, *affine, residual=residual)
            return (y * grad + twin * twin_grad).sum()

        x.requires_grad_()
        grads = [torch.autograd.grad(f(x), x)[0] for f in (torch.compile(loss, fullgraph=True), loss)]
        torch.testing.assert_close(*grads)

    def test_layout_of_the_result(self):
        for layout in ("channels_last", "contiguous"):
            x = tensor((2, 3, 4, 5), layout).requires_grad_()
            y = batch_norm_relu(x, None, None)
            y.backward(tensor((2, 3, 4, 5), "contiguous"))
            assert y.stride() == x.grad.stride() == x.stride()


class TestAutograd:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("shape", [(4, 8, 5, 5), (9, 40, 91, 65)], ids=str)
    @pytest.mark.parametrize("has_residual", [True, False])
    @pytest.mark.parametrize("used", ["both", "first", "second"])
    def test_two_outputs_of_one_memory(self, device, dtype, shape, has_residual, used):
        torch.manual_seed(0)
        x, residual, grad, other = (tensor(shape, layout, dtype, device) for layout in LAYOUTS[:2] * 2)
        affine = parameters(shape[1], dtype, device)
        # of so many results, none may be within rounding of 0
        residual = 16 * residual.sign() if has_residual else None
        if residual is None:
            affine[1].copy_(16 * affine[1].sign())

        weights = {"both": grad + other, "first": grad, "second": other}[used]
        arguments = x, residual, affine
        expected = run(reference.batch_norm_relu, *arguments, weights, dtype=torch.float64)
        leaves = [t if t is None else t.detach().requires_grad_() for t in (x, residual, *affine[:2])]
        running = [t.clone() for t in affine[2:]]
        y, twin = two_outputs(leaves[0], *running, *leaves[2:], residual=leaves[1])
        assert y.data_ptr() == twin.data_ptr()
        outputs = [(y, grad), (twin, other)][{"both": slice(2), "first": slice(1), "second": slice(1, 2)}[used]]
        given = [t for t in leaves if t is not None]
        grads = torch.autograd.grad([y for y, _ in outputs], given, [g for _, g in outputs])
        assert_close([y.detach(), *running, *grads], expected, TOLERANCE[dtype])

    def test_one_tensor_as_input_and_residual(self):
        x = tensor((4, 8, 5, 5)).requires_grad_()
        same = batch_norm_relu(x, None, None, residual=x)
        grad = torch.randn_like(same)
        (actual,) = torch.autograd.grad(same, x, grad)
        (expected,) = torch.autograd.grad(reference.batch_norm_relu(x, None, None, residual=x), x, grad)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("leaf", range(4))
    def test_only_one_input_requires_grad(self, leaf):
        x, residual = tensor((4, 8, 5, 5)), tensor((4, 8, 5, 5))
        weight, bias, *_ = parameters(8)
        leaves = [x, residual, weight, bias]
        leaves[leaf].requires_grad_()
        grads = []
        for function in (batch_norm_relu, reference.batch_norm_relu):
            y = function(x, None, None, weight, bias, residual=residual)
            grads += torch.autograd.grad(y.square().sum(), leaves[leaf])
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("device", DEVICES)
    def test_statistics_that_have_moved_on_are_noticed(self, device):
        x = tensor((4, 8, 5, 5), device=device).requires_grad_()
        running = torch.zeros(8, device=device), torch.ones(8, device=device)
        y = batch_norm_relu(x, *running, training=False)
        batch_norm_relu(x.detach(), *running)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    @pytest.mark.parametrize("device", DEVICES)
    def test_running_statistics_with_gaps(self, device):
        x = tensor((4, 8, 5, 5), device=device)
        both = []
        for function in (batch_norm_relu, reference.batch_norm_relu):
            statistics = torch.ones(8, 2, device=device)
            function(x, *statistics.unbind(1), momentum=0.5)
            both.append(statistics)
        torch.testing.assert_close(*both)

    def test_there_is_no_second_derivative(self):
        x = tensor((4, 8, 5, 5)).requires_grad_()
        y = batch_norm_relu(x, None, None)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(y.square().sum(), x, create_graph=True)

    def test_no_input_requires_grad(self):
        assert not batch_norm_relu(tensor((4, 8, 5, 5)), None, None).requires_grad


class TestStability:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize(
        ("dtype", "mean", "std"),
        [(torch.float32, 1e4, 1e-1), (torch.bfloat16, 128, 1), (torch.float32, 1e4, 0)],
        ids=str,
    )
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_large_mean(self, device, dtype, mean, std, layout):
        torch.manual_seed(0)
        x = tensor((16, 20, 16, 16), layout, torch.float32, device) * std + mean
        x = x.to(dtype)
        running = torch.zeros(20, device=device), torch.ones(20, device=device)
        y = batch_norm_relu(x, *running, momentum=1.0, relu=False)
        exact = x.double()
        torch.testing.assert_close(running[0].double(), exact.mean([0, 2, 3]), rtol=1e-6, atol=0)
        torch.testing.assert_close(running[1].double(), exact.var([0, 2, 3]), rtol=1e-4, atol=1e-12)
        # The mean is kept in float32: half its spacing over the standard deviation is what y may be off by.
        tolerance = 3e-2 if dtype == torch.bfloat16 else 0.5 * 2**-10 / max(std, 1e-5**0.5) + 1e-4
        expected = F.batch_norm(exact, None, None, training=True)
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=tolerance)

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("where", [(0, 0), (-1, -1)], ids=["first", "last"])
    def test_an_outlier_where_the_shift_is_sampled(self, device, layout, where):
        x = tensor((16, 4, 32, 32), layout, device=device)
        image, pixel = where
        x[image, :, pixel, pixel] = 1e4
        running = torch.zeros(4, device=device), torch.ones(4, device=device)
        batch_norm_relu(x, *running, momentum=1.0)
        torch.testing.assert_close(running[1].double(), x.double().var([0, 2, 3]), rtol=2e-3, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("where", [0, 77])
    def test_what_is_not_finite_goes_through_as_in_torch(self, dtype, value, where):
        torch.manual_seed(0)
        x = tensor((4, 5, 6, 6), "contiguous", dtype)
        x[where // 36, 2, where % 36 // 6, where % 6] = value
        arguments = x, None, parameters(5, dtype), tensor((4, 5, 6, 6), "contiguous", dtype)
        actual = run(batch_norm_relu, *arguments)
        expected = run(reference.batch_norm_relu, *arguments)
        for a, e in zip(actual[:3], expected[:3], strict=True):
            assert torch.equal(a.isnan(), e.isnan())
            assert torch.equal(a.isinf(), e.isinf())
        assert actual[3][:, [0, 1, 3, 4]].isfinite().all()

    def test_evaluation_passes_nan_and_infinity(self):
        x = torch.tensor([float("nan"), float("inf"), float("-inf"), 1.0]).view(4, 1, 1, 1)
        running = torch.zeros(1), torch.ones(1)
        actual = batch_norm_relu(x, *running, training=False)
        expected = reference.batch_norm_relu(x, *running, training=False)
        torch.testing.assert_close(actual, expected, equal_nan=True)


class TestArguments:
    def test_an_empty_batch_is_as_in_torch(self):
        for function in (batch_norm_relu, reference.batch_norm_relu):
            x = torch.empty(0, 3, 4, 4, requires_grad=True)
            weight, bias, *running = parameters(3)
            before = [r.clone() for r in running]
            y = function(x, *running, weight.requires_grad_(), bias)
            y.sum().backward()
            assert y.shape == x.grad.shape == x.shape
            assert torch.equal(weight.grad, torch.zeros(3))
            assert all(map(torch.equal, before, running))

    def test_one_value_per_channel(self):
        messages = []
        for function in (batch_norm_relu, reference.batch_norm_relu):
            with pytest.raises(ValueError, match="more than 1 value per channel") as error:
                function(torch.randn(1, 3, 1, 1), None, None)
            messages.append(str(error.value))
        assert messages[0] == messages[1]
        assert batch_norm_relu(torch.randn(1, 3, 1, 1), *parameters(3)[2:], training=False).shape == (
            1,
            3,
            1,
            1,
        )

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"x": torch.ones(3)}, "shape"),
            ({"running_mean": torch.ones(3)}, "neither be None"),
            ({"training": False}, "needed"),
            ({"weight": torch.ones(4)}, "weight has shape"),
            ({"bias": torch.ones(3, 1)}, "bias has shape"),
            ({"residual": torch.ones(2, 3, 4, 1)}, "residual"),
            ({"residual": torch.ones(2, 3, 4, 4).bfloat16()}, "residual"),
        ],
        ids=str,
    )
    def test_refused(self, arguments, message):
        defaults = {"x": torch.randn(2, 3, 4, 4), "running_mean": None, "running_var": None}
        with pytest.raises(ValueError, match=message):
            batch_norm_relu(**{**defaults, **arguments})

    def test_without_the_extension_the_error_says_how_to_build_it(self):
        script = """
import sys
sys.modules["fastres._C"] = None  # importing it fails
import torch
from fastres.ops import batch_norm_relu
batch_norm_relu(torch.randn(2, 3, 4, 4), None, None)
"""
        command = [sys.executable, "-c", script]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "RuntimeError" in result.stderr
        assert "make setup" in result.stderr

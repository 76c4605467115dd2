import copy
import inspect
import io

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.ao import quantization
from torch.ao.quantization.quantize_fx import convert_fx, fuse_fx, prepare_fx
from torch.autograd import forward_ad
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.distributed.fsdp.wrap import always_wrap_policy
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vmap
from torch.fx.experimental.optimization import fuse, optimize_for_inference
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import update_bn
from torch.utils.mkldnn import to_mkldnn
from torchvision.ops._utils import split_normalization_params

from fastres.models import create_model, create_to_count
from fastres.nn import BatchNormReLU2d, EagerBatchNormReLU2d, SmallMapConv2d, SyncBatchNormReLU2d

LAYERS = [BatchNormReLU2d, EagerBatchNormReLU2d, SyncBatchNormReLU2d]


def both(*args, **kwargs):
    """A fused and an eager layer with the same state."""
    fused, eager = BatchNormReLU2d(*args, **kwargs), EagerBatchNormReLU2d(*args, **kwargs)
    eager.load_state_dict(fused.state_dict())
    return fused, eager


@pytest.mark.parametrize("layer", [BatchNormReLU2d, EagerBatchNormReLU2d])
def test_state_dict_of_batch_norm(layer):
    assert layer(4).state_dict().keys() == nn.BatchNorm2d(4).state_dict().keys()
    layer(4).load_state_dict(nn.BatchNorm2d(4).state_dict())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"relu": False},
        {"momentum": None},
        {"affine": False},
        {"track_running_stats": False},
        {"momentum": 0.0},
        {"eps": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("has_residual", [True, False])
def test_agrees_with_torch(options, has_residual):
    torch.manual_seed(0)
    fused, eager = both(6, **options)
    plain = nn.BatchNorm2d(6, **{k: v for k, v in options.items() if k != "relu"})
    for training in (True, True, False):
        x = torch.randn(4, 6, 5, 5)
        residual = torch.randn(4, 6, 5, 5) if has_residual else None
        for module in (fused, eager, plain):
            module.train(training)
        expected = plain(x) if residual is None else plain(x) + residual
        expected = F.relu(expected) if options.get("relu", True) else expected
        for module in (fused, eager):
            torch.testing.assert_close(module(x, residual), expected, rtol=1e-4, atol=1e-5)
            for actual, wanted in zip(module.buffers(), plain.buffers(), strict=True):
                torch.testing.assert_close(actual, wanted)


def test_refuses_other_than_four_dimensions():
    with pytest.raises(ValueError, match="4D"):
        BatchNormReLU2d(3)(torch.randn(2, 3, 4))


def test_bfloat16_under_autocast():
    torch.manual_seed(0)
    for module in both(8):
        with torch.autocast("cpu", torch.bfloat16):
            y = module(nn.Conv2d(3, 8, 3)(torch.randn(4, 3, 8, 8)))
        assert y.dtype == torch.bfloat16
        y.sum().backward()
        assert module.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("layer", [BatchNormReLU2d, EagerBatchNormReLU2d])
def test_a_float32_residual_under_autocast(layer):
    x = torch.randn(4, 3, 8, 8, requires_grad=True)
    conv, norm = nn.Conv2d(3, 3, 3, padding=1, bias=False), layer(3)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(conv(x), residual=x)
    assert y.dtype == torch.bfloat16
    expected = layer(3)(conv(x), residual=x)
    torch.testing.assert_close(y.float(), expected, rtol=3e-2, atol=3e-2)
    y.sum().backward()
    assert x.grad.dtype == torch.float32


def losses_of_fifty_steps(fused):
    """ResNet-20 on one batch of noise, whose loss falls fast at a small rate. At larger rates eager training in float32
    strays as far from float64: rounding differences grow with every ReLU that they flip."""
    generator = torch.Generator().manual_seed(0)
    x, label = torch.randn(4, 3, 32, 32, generator=generator), torch.randint(10, (4,), generator=generator)
    x = x.to(memory_format=torch.channels_last)
    torch.manual_seed(0)
    model = create_model("resnet20", 10, fused=fused).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=4e-4)
    losses = []
    for _ in range(50):
        loss = F.cross_entropy(model(x), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("norm_layer", [BatchNormReLU2d, EagerBatchNormReLU2d, nn.BatchNorm2d])
def test_batches_are_counted_in_training_alone(norm_layer):
    norm, x = norm_layer(3), torch.randn(4, 3, 5, 5)
    norm(x)
    norm.eval()(x)
    norm.running_mean = norm.running_var = None  # then evaluation uses the batch's statistics, too
    norm(x)
    assert norm.num_batches_tracked == 1


def test_fifty_steps_of_training_fused_and_eager():
    fused, eager = losses_of_fifty_steps(True), losses_of_fifty_steps(False)
    torch.testing.assert_close(fused, eager, rtol=0, atol=1e-4)
    assert fused[-1] < 0.75 * fused[0]


@pytest.mark.parametrize(
    ("kernel", "stride", "shape"),
    [
        *((1, 1, (3, 6, *size)) for size in ((4, 4), (2, 7), (1, 1), (5, 4))),
        *(
            (3, stride, (images, 6, *size))
            for stride in (1, 2)
            for images in (3, 33)
            for size in ((2, 2), (1, 2), (2, 3))
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_of_small_maps_is_a_convolution(kernel, stride, shape, dtype, channels_last, bias, monkeypatch):
    torch.manual_seed(0)
    is_product = shape[2] * shape[3] <= 16 if kernel == 1 else shape == (33, 6, 2, 2)
    if is_product and stride == 1 and dtype == torch.bfloat16 and channels_last:
        monkeypatch.setattr(nn.Conv2d, "forward", None)  # which is not called
    conv = SmallMapConv2d(6, 10, kernel, stride, bias=bias)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = conv(x)
    exact = x.detach().double().requires_grad_()
    parameters = [parameter.detach().double().requires_grad_() for parameter in conv.parameters()]
    expected = F.conv2d(exact, *parameters, stride=stride, padding=kernel // 2)
    grad = torch.randn(expected.shape).to(dtype)
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    actual = torch.autograd.grad(y, [x, *conv.parameters()], grad)
    wanted = torch.autograd.grad(expected, [exact, *parameters], grad.double())
    for a, w in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a.double(), w, rtol=tolerance, atol=4 * tolerance)


def test_a_convolution_of_small_maps_is_1x1_or_3x3():
    with pytest.raises(ValueError, match="kernel_size must be 1 or 3, not 5"):
        SmallMapConv2d(6, 10, 5)


@pytest.mark.parametrize("fused", [True, False])
def test_a_vgg_is_exported_for_batches_of_any_size(fused):
    model = create_model("vgg11", 3, fused=fused).eval().to(torch.bfloat16, memory_format=torch.channels_last)
    few, many = (torch.randn(n, 3, 32, 32).bfloat16().to(memory_format=torch.channels_last) for n in (2, 40))
    program = torch.export.export(model, (few,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(many), model(many), rtol=0.05, atol=0.05)


def test_a_model_that_is_not_fused_has_pytorchs_convolutions():
    for name in ("vgg11", "resnet50", "preact_resnet18"):
        modules = create_to_count(name, 3, fused=False).modules()
        assert {type(module) for module in modules if isinstance(module, nn.Conv2d)} == {nn.Conv2d}


class Block(nn.Module):
    """Both kinds of convolution, and a norm without and with a residual; its statistics are not those of a new norm."""

    def __init__(self, layer, **options):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1 = layer(4, **options)
        self.conv2 = SmallMapConv2d(4, 4, 1, bias=True)
        self.bn2 = layer(4, **options)
        for norm in (self.bn1, self.bn2):
            for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                nn.init.uniform_(values, 0.5, 1.5)

    def forward(self, x):
        x = self.bn1(self.conv1(x))
        return self.bn2(self.conv2(x), residual=x)


def evaluated(layer, dtype=torch.float32, **options):
    torch.manual_seed(0)
    return Block(layer, **options).to(dtype).eval(), torch.randn(3, 3, 4, 4, dtype=dtype)


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("layer", LAYERS)
class TestFunctionsThatRebuildNorms:
    @pytest.mark.parametrize(
        "rebuild",
        [
            nn.SyncBatchNorm.convert_sync_batchnorm,
            to_mkldnn,
            lambda model: fuse_conv_bn_eval(model[0], model[1]),
            lambda model: nn.BatchNorm2d.forward(model[1], torch.randn(2, 4, 3, 3)),
        ],
        ids=["convert_sync_batchnorm", "to_mkldnn", "fuse_conv_bn_eval", "plain forward"],
    )
    def test_the_relu_is_never_lost_silently(self, layer, rebuild):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), layer(4)).eval()
        with pytest.raises(TypeError, match=r"applies ReLU.*create_model\(\.\.\., sync_bn=True\)"):
            rebuild(model)

    def test_a_plain_norm_with_its_state_dict_can_be_folded(self, layer):
        norm = evaluated(layer)[0].bn1
        conv, plain, x = nn.Conv2d(3, 4, 3).eval(), nn.BatchNorm2d(4).eval(), torch.randn(2, 3, 6, 6)
        plain.load_state_dict(norm.state_dict())
        torch.testing.assert_close(fuse_conv_bn_eval(conv, plain)(x).relu(), norm(conv(x)))

    @pytest.mark.parametrize(
        "rebuild",
        [
            lambda model: fuse_conv_bn_eval(model[0], model[1]),
            nn.SyncBatchNorm.convert_sync_batchnorm,
        ],
        ids=["fuse_conv_bn_eval", "convert_sync_batchnorm"],
    )
    def test_without_relu_it_is_a_plain_norm(self, layer, rebuild):
        block, x = evaluated(layer, relu=False)
        model = nn.Sequential(SmallMapConv2d(3, 4, 1), block.bn1).eval()
        expected = model(x)
        assert expected.min() < 0
        torch.testing.assert_close(rebuild(model)(x), expected)

    @pytest.mark.parametrize(
        "transform",
        [
            fuse,
            optimize_for_inference,
            fuse_fx,
            quantization.quantize_dynamic,
        ],
        ids=["fuse", "optimize_for_inference", "fuse_fx", "quantize_dynamic"],
    )
    def test_functions_that_go_by_the_exact_type_leave_it_as_it_is(self, layer, transform):
        model, x = evaluated(layer)
        expected = model(x)
        torch.testing.assert_close(transform(copy.deepcopy(model))(x), expected)

    def test_quantised_by_fx_but_for_the_norm(self, layer):
        model, x = evaluated(layer)
        prepared = prepare_fx(copy.deepcopy(model), quantization.get_default_qconfig_mapping("x86"), (x,))
        prepared(x)
        quantised = convert_fx(prepared)
        assert type(quantised.conv1) is torch.ao.nn.quantized.Conv2d
        expected = model(x)
        torch.testing.assert_close(quantised(x), expected, rtol=0, atol=0.05 * expected.max().item())

    def test_quantised_eagerly_is_an_error(self, layer):
        model, x = evaluated(layer)
        model = quantization.QuantWrapper(model)
        model.qconfig = quantization.get_default_qconfig("x86")
        prepared = quantization.prepare(model)
        prepared(x)
        with pytest.raises(NotImplementedError, match="QuantizedCPU"):
            quantization.convert(prepared)(x)
        with pytest.raises((AssertionError, NotImplementedError), match=layer.__name__):
            quantization.fuse_modules(model.module, ["conv1", "bn1"])

    def test_eps_can_be_set_and_is_read_as_epsilon(self, layer):
        norm, plain = layer(4).eval(), nn.BatchNorm2d(4, eps=0.5).eval()
        norm.eps = 0.5
        x = torch.randn(2, 4, 3, 3)
        assert norm.epsilon == 0.5
        assert "eps=0.5" in repr(norm)
        torch.testing.assert_close(norm(x), plain(x).relu())
        assert dict(inspect.getmembers(norm))["epsilon"] == 0.5  # reads every attribute


@pytest.mark.parametrize("layer", LAYERS)
class TestFunctionsThatRecogniseNorms:
    def test_update_bn(self, layer):
        plain, x = evaluated(nn.BatchNorm2d)[0].bn1, [torch.randn(4, 4, 5, 5) + i for i in range(3)]
        norm = layer(4)
        update_bn(x, norm)
        update_bn(x, plain)
        torch.testing.assert_close(norm.running_mean, plain.running_mean)
        torch.testing.assert_close(norm.running_var, plain.running_var)
        assert norm.num_batches_tracked == 3

    def test_weight_decay_filters_and_freezing(self, layer):
        model, x = evaluated(layer)
        norms, others = split_normalization_params(model)
        assert {id(p) for p in norms} == {id(p) for m in (model.bn1, model.bn2) for p in m.parameters()}
        assert {id(p) for p in others} == {id(p) for m in (model.conv1, model.conv2) for p in m.parameters()}
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval().requires_grad_(False)
        before = model.bn2.running_mean.clone()
        model(x).sum().backward()
        assert torch.equal(model.bn2.running_mean, before)
        assert model.bn2.weight.grad is None

    def test_fsdp_leaves_the_norms_in_float32(self, layer, process_group):
        model, x = evaluated(layer)
        half = MixedPrecision(param_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16)
        sharded = FullyShardedDataParallel(
            copy.deepcopy(model),
            auto_wrap_policy=always_wrap_policy,
            mixed_precision=half,
            device_id=torch.device("cpu"),
        )
        dtypes = {}
        for name, module in sharded.named_modules():
            if isinstance(module, layer | nn.Conv2d):
                module.register_forward_pre_hook(
                    lambda m, x, name=name: dtypes.update({name: next(m.parameters()).dtype})
                )
        y = sharded.train()(x)
        expected = model.train()(x)
        assert sorted(map(str, dtypes.values())) == ["torch.bfloat16"] * 2 + ["torch.float32"] * 2
        torch.testing.assert_close(y.float(), expected, rtol=5e-2, atol=5e-2)
        for actual, wanted in zip(sharded.buffers(), model.buffers(), strict=True):
            torch.testing.assert_close(actual, wanted, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("layer", LAYERS)
class TestTransforms:
    """`torch.func` and forward-mode AD in evaluation, against ordinary differentiation in float64."""

    def test_grad(self, layer):
        model, x = evaluated(layer, torch.float64)
        parameters = dict(model.named_parameters())
        actual = grad(lambda p: functional_call(model, p, (x,)).square().sum())(parameters)
        expected = torch.autograd.grad(model(x).square().sum(), parameters.values())
        for a, e in zip(actual.values(), expected, strict=True):
            torch.testing.assert_close(a, e)

    def test_first_and_second_derivatives(self, layer):
        model, x = evaluated(layer, torch.float64)
        exact = evaluated(EagerBatchNormReLU2d, torch.float64)[0]
        x, tangent = x[:1, :, :2, :2], torch.randn(1, 3, 2, 2, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(exact, x)
        torch.testing.assert_close(jacrev(model)(x), jacobian)
        torch.testing.assert_close(torch.autograd.functional.jacobian(model, x, vectorize=True), jacobian)
        along = torch.tensordot(jacobian, tangent, dims=4)
        torch.testing.assert_close(jvp(model, (x,), (tangent,)), (exact(x), along))
        with forward_ad.dual_level():
            y = forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent)))
        torch.testing.assert_close(y.tangent, along)
        actual = hessian(lambda x: model(x).square().sum())(x)
        expected = torch.autograd.functional.hessian(lambda x: exact(x).square().sum(), x)
        torch.testing.assert_close(actual, expected)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_vmap_over_images_and_over_models(self, layer, dtype):
        models = [evaluated(layer, dtype)[0] for _ in range(3)]
        for number, model in enumerate(models):
            model.bn1.running_mean += number
        x = torch.randn(2, 3, 4, 4, dtype=dtype).contiguous(memory_format=torch.channels_last)
        state, base = stack_module_state(models), copy.deepcopy(models[0]).to("meta")
        expected = torch.stack([model(x) for model in models])
        ensemble = vmap(lambda state: functional_call(base, state, (x,)))(state)
        images = vmap(lambda image: models[0](image[None])[0])(x)
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
        torch.testing.assert_close(ensemble, expected, **tolerance)
        torch.testing.assert_close(images, expected[0], **tolerance)

    def test_vmap_over_residuals_only(self, layer):
        norm = evaluated(layer)[0].bn1
        x, residuals = torch.randn(2, 4, 3, 3), torch.randn(5, 2, 4, 3, 3)
        expected = torch.stack([norm(x, residual) for residual in residuals])
        torch.testing.assert_close(vmap(lambda residual: norm(x, residual))(residuals), expected)

    def test_training_without_running_statistics(self, layer):
        norm = torch.func.replace_all_batch_norm_modules_(layer(3))
        batches = torch.randn(2, 4, 3, 5, 5)
        expected = torch.stack([F.batch_norm(x, None, None, training=True).relu() for x in batches])
        torch.testing.assert_close(vmap(norm)(batches), expected)

    def test_training_with_running_statistics_is_refused_by_torch(self, layer):
        with pytest.raises(RuntimeError, match="running_mean or running_var"):
            vmap(layer(3))(torch.randn(2, 4, 3, 5, 5))


def test_the_synchronised_norm_does_not_train_under_transforms(process_group):
    norm = torch.func.replace_all_batch_norm_modules_(SyncBatchNormReLU2d(3))
    with pytest.raises(RuntimeError, match="use BatchNormReLU2d"):
        vmap(norm)(torch.randn(2, 4, 3, 5, 5))


@pytest.mark.parametrize("layer", LAYERS)
class TestTracing:
    def test_by_fx(self, layer):
        """The traced model trains and evaluates like the model, whatever mode it was traced in."""
        torch.manual_seed(0)
        model = Block(layer)
        twin = copy.deepcopy(model)
        traced = torch.fx.symbolic_trace(model)
        assert model.bn1.num_batches_tracked == 0
        for training in (True, True, False):
            x = torch.randn(4, 3, 5, 5)
            torch.testing.assert_close(traced.train(training)(x), twin.train(training)(x))
        for actual, expected in zip(traced.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(actual, expected)

    def test_by_jit_trace_and_export(self, layer):
        model, x = evaluated(layer)
        saved = io.BytesIO()
        torch.jit.save(torch.jit.trace(model, x), saved)
        saved.seek(0)
        torch.testing.assert_close(torch.jit.load(saved)(x), model(x))
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))

    def test_jit_script_says_what_to_use(self, layer):
        for module in (nn.Sequential(layer(3)), SmallMapConv2d(3, 4, 1)):
            with pytest.raises(RuntimeError, match=r"torch\.export\.export or torch\.jit\.trace"):
                torch.jit.script(module)

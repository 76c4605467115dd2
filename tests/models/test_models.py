"""Against torchvision's modules with copied weights, and against the published parameter counts."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from fastres.errors import UserError
from fastres.models import create_model, init_dirac, list_models
from fastres.models.resnet import BasicBlock, Bottleneck
from fastres.nn import BatchNormReLU2d, EagerBatchNormReLU2d


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("resnet18", 11.173962), ("resnet50", 23.520842), ("vgg19_bn_4096", 38.958922),
        ("preact_resnet18", 11.172170), ("wide_resnet16_8", 10.961370), ("wide_resnet28_10", 36.479194),
    ],
)  # fmt: skip
def test_parameter_counts_are_the_published_ones(name, millions):
    assert parameters(create_model(name, 10)) == round(millions * 1e6)


@pytest.mark.parametrize(
    ("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)]
)  # He et al. 2015, table 6
def test_parameters_of_the_resnets_for_cifar(depth, millions):
    plain, projecting = (parameters(create_model(name, 10)) for name in (f"resnet{depth}", f"resnet{depth}_b"))
    assert plain / 1e6 == pytest.approx(millions, abs=0.05 if depth == 110 else 0.005)
    assert projecting - plain == 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64


def conv(state, name, x, stride=1):
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)


def norm(state, name, x, training):
    statistics = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    return F.batch_norm(x, *statistics, state[f"{name}.weight"], state[f"{name}.bias"], training)


def head(state, x):
    return F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"])


def cifar_resnet(state, x, layers, training):
    """He et al. 2015, section 4.2, with option A or B."""
    x = F.relu(norm(state, "bn1", conv(state, "conv1", x), training))
    for stage, blocks in enumerate(layers):
        for block in range(blocks):
            name, stride = f"layer{stage + 1}.{block}", 2 if stage and not block else 1
            y = F.relu(norm(state, f"{name}.bn1", conv(state, f"{name}.conv1", x, stride), training))
            y = norm(state, f"{name}.bn2", conv(state, f"{name}.conv2", y), training)
            if f"{name}.downsample.0.weight" in state:
                x = norm(state, f"{name}.downsample.1", conv(state, f"{name}.downsample.0", x, stride), training)
            elif stride == 2:
                x = F.avg_pool2d(x, 1, stride)
                x = torch.cat([x, torch.zeros_like(x)], 1)
            x = F.relu(x + y)
    return head(state, x)


def preact_resnet(state, x, layers, training):
    """He et al. 2016, figure 4e, and Zagoruyko & Komodakis 2016, table 1."""
    x = conv(state, "conv1", x)
    halving = [sum(layers[:stage]) for stage in range(1, len(layers))]
    for number in range(sum(layers)):
        name, stride = f"blocks.{number}", 2 if number in halving else 1
        y = F.relu(norm(state, f"{name}.bn1", x, training))
        if f"{name}.downsample.weight" in state:
            x = conv(state, f"{name}.downsample", y, stride)
        y = F.relu(norm(state, f"{name}.bn2", conv(state, f"{name}.conv1", y, stride), training))
        x = x + conv(state, f"{name}.conv2", y)
    return head(state, F.relu(norm(state, "bn", x, training)))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("name", "reference", "layers"),
    [
        ("resnet20", cifar_resnet, (3, 3, 3)),
        ("resnet32_b", cifar_resnet, (5, 5, 5)),
        ("preact_resnet18", preact_resnet, (2, 2, 2, 2)),
        ("wide_resnet16_8", preact_resnet, (2, 2, 2)),
    ],
)
def test_networks_are_those_of_their_papers(name, reference, layers, fused):
    model = with_other_statistics(create_model(name, 7, fused=fused)).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for training in (False, True):
        expected = reference(
            {key: value.clone() for key, value in model.state_dict().items()}, images, layers, training
        )
        torch.testing.assert_close(model.train(training)(images), expected)


def torchvision_resnet(name):
    model = getattr(torchvision.models, name)(num_classes=7)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def torchvision_vgg(name):
    model = getattr(torchvision.models, name)(num_classes=7, init_weights=False)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    return model


def with_other_statistics(model):
    """Norms whose parameters and buffers differ from channel to channel."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.0)
    return model


def assert_same_function(ours, theirs):
    for size, mode in ((32, False), (32, True), (64, False)):
        images = torch.randn(3, 3, size, size, dtype=torch.float64)
        torch.testing.assert_close(ours.double().train(mode)(images), theirs.double().train(mode)(images))
    ours, theirs = dict(ours.named_buffers()), dict(theirs.named_buffers())  # the running statistics moved alike
    for name, buffer in ours.items():
        torch.testing.assert_close(buffer, theirs[name])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnets_are_torchvisions(name, fused):
    theirs = with_other_statistics(torchvision_resnet(name))
    ours = create_model(name, 7, fused=fused)
    ours.load_state_dict(theirs.state_dict())
    assert_same_function(ours, theirs)


@pytest.mark.parametrize("name", ["resnet34", "resnet101"])
def test_deeper_resnets_have_torchvisions_state_dict(name):
    create_model(name, 7).load_state_dict(torchvision_resnet(name).state_dict())


@pytest.mark.parametrize("name", ["vgg11", "vgg13", "vgg16"])
def test_vggs_are_torchvisions_with_a_single_fc(name):
    theirs = with_other_statistics(torchvision_vgg(name + "_bn"))
    theirs.classifier = nn.Linear(512, 7)
    for module in theirs.features:
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.bias)
    ours = create_model(name, 7)
    missing = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not missing.missing_keys
    assert all(key.startswith("features.") and key.endswith(".bias") for key in missing.unexpected_keys)
    assert_same_function(ours, theirs)


@pytest.mark.parametrize(("name", "source"), [("vgg19_bn_4096", "vgg19_bn"), ("vgg19_4096", "vgg19")])
def test_study_b_vggs_are_torchvisions(name, source):
    theirs = torchvision_vgg(source)
    theirs.classifier[0] = nn.Linear(512, 4096)
    for module in theirs.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ours = create_model(name, 7)
    ours.load_state_dict(theirs.state_dict())
    assert [module.p for module in ours.modules() if isinstance(module, nn.Dropout)] == [0.5, 0.5]
    for module in ours.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert_same_function(ours, theirs)


@pytest.mark.parametrize("name", ["resnet18", "vgg16", "vgg19_4096"])
def test_weights_begin_as_torchvisions(name):
    for module in create_model(name, 1000).modules():
        if isinstance(module, nn.Conv2d):  # He et al. 2015, arXiv:1502.01852, by the outputs
            expected = (2 / (module.out_channels * module.kernel_size[0] ** 2)) ** 0.5
            assert module.weight.std().item() == pytest.approx(expected, rel=0.05)
        if isinstance(module, nn.Linear) and name.startswith("vgg"):
            assert module.weight.std().item() == pytest.approx(0.01, rel=0.05)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None and name.startswith("vgg"):
            assert not module.bias.any()


@pytest.mark.parametrize("name", ["resnet18", "vgg19_bn_4096", "vgg19_4096"])
def test_weights_begin_as_study_b_has_them(name):
    torch.manual_seed(0)
    for path, module in create_model(name, 1000, init="study-b").named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        inputs, outputs = (module.weight[0].numel(), len(module.weight) * module.weight[0, 0].numel())
        if isinstance(module, nn.Linear) or path == "features.0":  # PyTorch's default: uniform, also the bias
            bound = inputs**-0.5
            assert 0.9 * bound < module.bias.abs().max() <= bound
            assert 0.99 * bound < module.weight.abs().max() <= bound
            assert module.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        else:
            scale = inputs if name == "resnet18" else outputs
            assert module.weight.std().item() == pytest.approx((2 / scale) ** 0.5, rel=0.05)
            assert module.bias is None or not module.bias.any()


@pytest.mark.parametrize("fused", [True, False])
def test_fused_or_eager_norms(fused):
    norms = {type(m) for m in create_model("resnet18", 10, fused=fused).modules() if isinstance(m, nn.BatchNorm2d)}
    assert norms == {BatchNormReLU2d if fused else EagerBatchNormReLU2d}


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_zero_gamma_makes_every_plain_block_the_identity(name):
    model = create_model(name, 10, zero_gamma=True)
    blocks = [module for module in model.modules() if isinstance(module, BasicBlock | Bottleneck)]
    plain_blocks = [block for block in blocks if isinstance(block.downsample, nn.Identity)]
    assert len(plain_blocks) == len(blocks) - (3 if name == "resnet18" else 4)  # a stage begins with a projection
    for block in plain_blocks:
        x = torch.rand(2, block.bn1.num_features * block.expansion, 8, 8)
        torch.testing.assert_close(block(x), x)
    plain = create_model(name, 10)
    assert sum((module.weight == 0).all() for module in model.modules() if isinstance(module, nn.BatchNorm2d)) == len(
        blocks
    )
    assert not any((module.weight == 0).any() for module in plain.modules() if isinstance(module, nn.BatchNorm2d))


def test_every_model_gives_logits():
    for name in list_models():
        assert create_model(name, 5).eval()(torch.randn(2, 3, 32, 32)).shape == (2, 5)


def test_what_cannot_be_made():
    with pytest.raises(UserError, match="--model: invalid choice 'resnet17'; choose from resnet18, resnet34"):
        create_model("resnet17", 10)
    with pytest.raises(UserError, match="--zero-gamma: vgg16 has no residual blocks"):
        create_model("vgg16", 10, zero_gamma=True)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("name", "size", "nodes"),
    [
        ("resnet18", 16, ["bn1", "layer1.0", "layer2", "layer2.0.bn2", "layer4.1"]),
        ("resnet50", 16, ["layer1", "layer4"]),
        ("vgg11", 32, ["features.4", "features"]),
    ],
)
def test_features_can_be_extracted(name, size, nodes, fused):
    model = with_other_statistics(create_model(name, 5, fused=fused))
    outputs = {}
    for node in nodes:
        model.get_submodule(node).register_forward_hook(lambda _, __, y, node=node: outputs.update({node: y}))
    extractor = create_feature_extractor(model, nodes)
    x = torch.randn(2, 3, size, size)
    for training in (False, True):
        model.train(training)(x)
        expected = dict(outputs)
        actual = extractor.train(training)(x)
        assert actual.keys() == expected.keys()
        for node in nodes:
            torch.testing.assert_close(actual[node], expected[node])


def test_convolutions_in_groups_begin_as_they_are():
    convolution = nn.Conv2d(8, 8, 3, groups=8)
    before = convolution.weight.clone()
    init_dirac(convolution)
    assert torch.equal(convolution.weight, before)


@pytest.mark.parametrize("name", ["vgg16", "resnet18", "resnet50"])
def test_3x3_convolutions_begin_as_the_identity(name):
    torch.manual_seed(0)
    plain = dict(create_model(name, 3).named_modules())
    torch.manual_seed(0)
    found = 0
    for path, module in create_model(name, 3, init="dirac").named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        channels = module.in_channels
        kept = module.weight
        if module.kernel_size == (3, 3) and module.stride == (1, 1) and channels > 3:
            found += 1
            x = torch.randn(2, channels, 5, 5)
            torch.testing.assert_close(module(x)[:, :channels], x)
            kept = module.weight[channels:]
        assert torch.equal(kept, plain[path].weight[module.out_channels - len(kept) :])
    assert found == {"vgg16": 12, "resnet18": 13, "resnet50": 13}[name]


def resnets():
    """The same small ResNet with the fused operator and in eager PyTorch."""
    torch.manual_seed(0)
    fused, eager = (create_model("resnet20_b", 4, fused=fused) for fused in (True, False))
    eager.load_state_dict(fused.state_dict())
    return fused, eager


@pytest.mark.parametrize("training", [True, False])
def test_blocks_and_stages_can_be_replaced(training):
    x, outputs = torch.randn(4, 3, 8, 8), []
    for model in resnets():
        model.train(training).layer2[1] = nn.Identity()
        model.layer1 = nn.Sequential(model.layer1, nn.Dropout(0.0))
        outputs.append(model(x))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["layer2", "layer2.0", "layer2.1"])
def test_parts_are_traced_by_fx(name):
    part = resnets()[0].get_submodule(name)
    x = torch.randn(4, 16 if name == "layer2" or name.endswith("0") else 32, 8, 8)
    torch.testing.assert_close(torch.fx.symbolic_trace(part)(x), part(x))


@pytest.mark.parametrize("name", ["layer1", "layer2.0", "layer3"])
def test_hooks_see_one_tensor_and_its_whole_gradient(name):
    x, seen = torch.randn(4, 3, 8, 8), []
    for model in resnets():
        part = model.get_submodule(name)
        part.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
        part.register_full_backward_hook(lambda _, inputs, outputs: seen.extend((*inputs, *outputs)))
        model(x).square().sum().backward()
    for fused, eager in zip(seen[:3], seen[3:], strict=True):
        torch.testing.assert_close(fused, eager, rtol=1e-3, atol=1e-3)

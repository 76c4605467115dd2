"""Models by name: ResNets with the CIFAR stem, Wide ResNets and VGGs, all for images of 32x32 and more."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from fastres.data.splits import IMAGE_SIZE
from fastres.errors import UserError
from fastres.models import resnet
from fastres.models.own import import_model
from fastres.models.preact import PreActResNet
from fastres.models.resnet import BasicBlock, Bottleneck, ResNet
from fastres.models.vgg import VGG, head_4096
from fastres.nn import BatchNormReLU2d, EagerBatchNormReLU2d, SmallMapConv2d, SyncBatchNormReLU2d

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": partial(ResNet, BasicBlock, (2, 2, 2, 2)),
    "resnet34": partial(ResNet, BasicBlock, (3, 4, 6, 3)),
    "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3)),
    "resnet101": partial(ResNet, Bottleneck, (3, 4, 23, 3)),
    # He et al. 2015, section 4.2, with shortcuts of option A, as there, and B
    **{f"resnet{6 * n + 2}": partial(ResNet, BasicBlock, (n, n, n), width=16, option="A") for n in (3, 5, 7, 9, 18)},
    **{f"resnet{6 * n + 2}_b": partial(ResNet, BasicBlock, (n, n, n), width=16) for n in (3, 5, 7, 9, 18)},
    "preact_resnet18": partial(PreActResNet, (2, 2, 2, 2), 64, 64),
    "wide_resnet16_8": partial(PreActResNet, (2, 2, 2), 16, 8 * 16),
    "wide_resnet28_10": partial(PreActResNet, (4, 4, 4), 16, 10 * 16),
    "vgg11": partial(VGG, 11),
    "vgg13": partial(VGG, 13),
    "vgg16": partial(VGG, 16),
    "vgg19": partial(VGG, 19),
    # of study B: torchvision's vgg19_bn and vgg19 with their classifier of 4096 units, after pooling to 1x1
    "vgg19_bn_4096": partial(VGG, 19, head=head_4096, bias=True),
    "vgg19_4096": partial(VGG, 19, head=head_4096, bias=True, batch_norm=False),
}


def list_models() -> list[str]:
    """The names that ``create_model`` takes."""
    return list(MODELS)


def create_model(
    name: str,
    num_classes: int,
    zero_gamma: bool = False,
    fused: bool = True,
    sync_bn: bool = False,
    init: str = "default",
    image_size: int = IMAGE_SIZE,
) -> nn.Module:
    """A newly initialised model from images ``[B, 3, image_size, image_size]`` to logits ``[B, num_classes]``.

    The state dict has the same keys and shapes for every choice of ``fused`` and ``sync_bn``.

    Args:
        name: one of ``list_models()``, or what ``register_model`` took.
        zero_gamma: ResNets only: the last BatchNorm of each residual block starts with weight 0, so that the block
            starts as the identity (Goyal et al. 2017, arXiv:1706.02677, section 5.1).
        fused: BatchNorm, residual add and ReLU in one operator, and convolutions as products where that is faster;
            otherwise in PyTorch's own.
        sync_bn: BatchNorm over the whole batch of all processes; needs the fused operator.
        init: initial weights: ``default`` as torchvision draws them, ``dirac`` and ``study-b`` as ``init_dirac`` and
            ``init_as_study_b`` do.
        image_size: pixels a side, with which a function of your own is tried.
    """
    check_name(name)
    if name not in MODELS:
        raise UserError(
            f"--model {name}: a function is imported only where it is given as a flag or argument; add --model {name}"
        )
    eager = None if is_function(name) else EagerBatchNormReLU2d
    norm_layer = SyncBatchNormReLU2d if sync_bn else BatchNormReLU2d if fused else eager
    options = {"image_size": image_size} if is_function(name) else {}
    model = MODELS[name](num_classes, norm_layer=norm_layer, **options)
    own: list[nn.Module] = [module for module in model.modules() if isinstance(module, SmallMapConv2d)]
    for conv in () if fused else own:
        conv.__class__ = nn.Conv2d  # which has the same parameters
    INITS[init](model)
    if zero_gamma and not resnet.zero_gamma(model):
        raise UserError(
            f"--zero-gamma: {name} has no residual blocks that end with a norm; remove it or choose a resnet"
        )
    return model


def create_to_count(
    name: str, num_classes: int, fused: bool = True, image_size: int = IMAGE_SIZE, zero_gamma: bool = False
) -> nn.Module:
    """A model to count with: without memory for its weights, unless it is the user's own, which may need that. Draws no
    random numbers."""
    if not is_function(name):
        with torch.device("meta"):
            return create_model(name, num_classes, zero_gamma, fused)
    with torch.random.fork_rng(devices=()):
        return create_model(name, num_classes, zero_gamma, fused, image_size=image_size)


def check_name(name: str) -> None:
    """Refuses what is neither a model's name nor ``package.module:function`` or ``file.py:function``."""
    if name not in MODELS and not name.partition(":")[2]:
        raise UserError(
            f"--model: invalid choice {name!r}; choose from {', '.join(MODELS)}, or name a function of your own as "
            "file.py:function"
        )


def is_vgg(name: str) -> bool:
    """Whether it is one of fastres' VGGs, which need images of 32x32 or more."""
    return name.startswith("vgg") and not is_function(name)


def is_function(name: str) -> bool:
    """Whether it is ``package.module:function`` or ``file.py:function``."""
    return ":" in name


def function_name(name: str) -> str:
    """The model's name without the file or module of a function."""
    return name.rpartition(":")[2]


def register_model(name: str) -> None:
    """Imports ``name`` for ``create_model``, if it is ``package.module:function`` or ``file.py:function``.

    Only for a name that the user gave as a flag or an argument.
    """
    check_name(name)
    if is_function(name):
        MODELS[name] = import_model(name)


def init_dirac(model: nn.Module) -> None:
    """Lets each 3x3 convolution of stride 1 and one group, but the first, begin as the identity: output i is input i.
    Outputs beyond the number of inputs keep their weights (Zagoruyko & Komodakis 2017, arXiv:1706.00388; Jordan 2024,
    arXiv:2404.00498, section 3.2)."""
    for module in model.modules():
        if not isinstance(module, nn.Conv2d):
            continue
        if (module.kernel_size, module.stride, module.groups) != ((3, 3), (1, 1), 1):
            continue
        if 3 < module.in_channels <= module.out_channels:
            nn.init.dirac_(module.weight[: module.in_channels].detach())


def init_as_study_b(model: nn.Module) -> None:
    """Draws the weights of ``model`` again, as study B's code does.

    ResNets: Kaiming's normal distribution with the fan-in instead of the fan-out. VGGs: torchvision's, but the first
    convolution and the linear layers have PyTorch's default, as study B replaces those layers in a finished model.
    """
    for name, module in model.named_modules():
        if isinstance(model, VGG):
            if name == "features.0" or isinstance(module, nn.Linear):
                module.reset_parameters()
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")


INITS: dict[str, Callable[[nn.Module], None]] = {
    "default": lambda model: None, "dirac": init_dirac, "study-b": init_as_study_b,
}  # fmt: skip

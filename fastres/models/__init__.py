"""The models by name: ResNets with the CIFAR stem and VGGs, both for 32x32 images."""

from collections.abc import Callable
from functools import partial

from torch import nn

from fastres.errors import UserError
from fastres.models.resnet import BasicBlock, Bottleneck, ResNet
from fastres.models.vgg import VGG, head_4096
from fastres.nn import BatchNormReLU2d, EagerBatchNormReLU2d, SyncBatchNormReLU2d

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": partial(ResNet, BasicBlock, (2, 2, 2, 2)),
    "resnet34": partial(ResNet, BasicBlock, (3, 4, 6, 3)),
    "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3)),
    "resnet101": partial(ResNet, Bottleneck, (3, 4, 23, 3)),
    "vgg11": partial(VGG, 11),
    "vgg13": partial(VGG, 13),
    "vgg16": partial(VGG, 16),
    "vgg19": partial(VGG, 19),
    # Study B's: torchvision's vgg19_bn and vgg19, pooled to 1x1, with their head of 4096 units and dropout
    "vgg19_bn_4096": partial(VGG, 19, head=head_4096, bias=True),
    "vgg19_4096": partial(VGG, 19, head=head_4096, bias=True, norm=False),
}
INITS = ("default", "study-b")


def list_models() -> list[str]:
    """The names that ``create_model`` knows."""
    return list(MODELS)


def create_model(
    name: str,
    num_classes: int,
    zero_gamma: bool = False,
    fused: bool = True,
    sync_bn: bool = False,
    init: str = "default",
) -> nn.Module:
    """A freshly initialised model, ``[B, 3, 32, 32]`` to ``[B, num_classes]`` logits.

    Args:
        name: one of ``list_models()``.
        zero_gamma: the last norm of each residual block starts at weight 0, so that the block starts as the identity
            (Goyal et al. 2017, arXiv:1706.02677, section 5.1).
        fused: norm, residual add and ReLU in one operator; otherwise torch's own modules, with the same state dict.
        sync_bn: the fused operator over the joined batch of all processes; also with the same state dict.
        init: ``default``, torchvision's initial weights, or ``study-b``, see ``init_as_study_b``.

    Raises UserError for an unknown name, and for ``zero_gamma`` of a model without residual blocks.
    """
    if name not in MODELS:
        raise UserError(f"--model {name}: unknown; there are {', '.join(MODELS)}")
    norm_layer = SyncBatchNormReLU2d if sync_bn else BatchNormReLU2d if fused else EagerBatchNormReLU2d
    if zero_gamma and not name.startswith("resnet"):
        raise UserError(f"--zero-gamma: {name} has no residual blocks; take it off or choose a resnet")
    options = {"zero_gamma": True} if zero_gamma else {}
    model = MODELS[name](num_classes, norm_layer=norm_layer, **options)
    if init == "study-b":
        init_as_study_b(model)
    return model


def init_as_study_b(model: nn.Module) -> None:
    """Draws the weights of ``model`` again, as study B's code does.

    Its ResNet scales them by a convolution's inputs, not by its outputs. Its VGGs are torchvision's, whose first
    convolution and linear layers it replaces after they were initialised, by new ones with PyTorch's defaults.
    """
    for name, module in model.named_modules():
        if isinstance(model, VGG):
            if name == "features.0" or isinstance(module, nn.Linear):
                module.reset_parameters()
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

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


def list_models() -> list[str]:
    """The names that ``create_model`` knows."""
    return list(MODELS)


def create_model(
    name: str, num_classes: int, zero_gamma: bool = False, fused: bool = True, sync_bn: bool = False
) -> nn.Module:
    """A freshly initialised model, ``[B, 3, 32, 32]`` to ``[B, num_classes]`` logits.

    Args:
        name: one of ``list_models()``.
        zero_gamma: the last norm of each residual block starts at weight 0, so that the block starts as the identity
            (Goyal et al. 2017, arXiv:1706.02677, section 5.1).
        fused: norm, residual add and ReLU in one operator; otherwise torch's own modules, with the same state dict.
        sync_bn: the fused operator over the joined batch of all processes; also with the same state dict.

    Raises UserError for an unknown name, and for ``zero_gamma`` of a model without residual blocks.
    """
    if name not in MODELS:
        raise UserError(f"--model {name}: unknown; there are {', '.join(MODELS)}")
    norm_layer = SyncBatchNormReLU2d if sync_bn else BatchNormReLU2d if fused else EagerBatchNormReLU2d
    if name.startswith("resnet"):
        return MODELS[name](num_classes, norm_layer=norm_layer, zero_gamma=zero_gamma)
    if zero_gamma:
        raise UserError(f"--zero-gamma: {name} has no residual blocks; take it off or choose a resnet")
    return MODELS[name](num_classes, norm_layer=norm_layer)

"""The models by name: ResNets with the CIFAR stem and VGGs, both for 32x32 images."""

from collections.abc import Callable

from torch import nn

from fastres.errors import UserError
from fastres.models.resnet import resnet18, resnet34, resnet50, resnet101
from fastres.models.vgg import vgg11, vgg13, vgg16, vgg19, vgg19_4096, vgg19_bn_4096
from fastres.nn import BatchNormReLU2d, EagerBatchNormReLU2d, SyncBatchNormReLU2d

MODELS: dict[str, Callable[..., nn.Module]] = {
    model.__name__: model
    for model in (
        resnet18, resnet34, resnet50, resnet101,
        vgg11, vgg13, vgg16, vgg19, vgg19_bn_4096, vgg19_4096,
    )
}  # fmt: skip


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

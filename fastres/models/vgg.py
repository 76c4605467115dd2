"""VGGs (Simonyan & Zisserman 2014, arXiv:1409.1556) for 32x32 images, which the five max-pools bring to 1x1.

Layers bear torchvision's numbers. ReLU, which torchvision counts as a layer of its own, is part of the norm here, so
its number is left out. Torchvision's weights load, but for the head and, in ``vgg11`` to ``vgg19``, for the bias of the
convolutions, which the norm makes idle.
"""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn

NormLayer = Callable[..., nn.Module]

CONVOLUTIONS = {  # at each resolution; channels are 64, 128, 256, 512, 512
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


class VGG(nn.Module):
    """Convolutions of 3x3 with norm and ReLU, or ReLU alone where ``norm_layer`` is None, then ``classifier``.

    ``bias`` gives the convolutions one, which a norm after them makes redundant.
    """

    def __init__(self, depth: int, classifier: nn.Module, norm_layer: NormLayer | None, bias: bool = False) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        number, in_channels = 0, 3
        for stage, convolutions in enumerate(CONVOLUTIONS[depth]):
            channels = min(64 << stage, 512)
            for _ in range(convolutions):
                layers[str(number)] = nn.Conv2d(in_channels, channels, 3, padding=1, bias=bias)
                layers[str(number + 1)] = norm_layer(channels) if norm_layer else nn.ReLU(inplace=True)
                number += 3 if norm_layer else 2
                in_channels = channels
            layers[str(number)] = nn.MaxPool2d(2)
            number += 1
        self.features = nn.Sequential(layers)
        self.classifier = classifier

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


def vgg11(num_classes: int, norm_layer: NormLayer) -> VGG:
    return VGG(11, nn.Linear(512, num_classes), norm_layer)


def vgg13(num_classes: int, norm_layer: NormLayer) -> VGG:
    return VGG(13, nn.Linear(512, num_classes), norm_layer)


def vgg16(num_classes: int, norm_layer: NormLayer) -> VGG:
    return VGG(16, nn.Linear(512, num_classes), norm_layer)


def vgg19(num_classes: int, norm_layer: NormLayer) -> VGG:
    return VGG(19, nn.Linear(512, num_classes), norm_layer)


def vgg19_bn_4096(num_classes: int, norm_layer: NormLayer) -> VGG:
    """Study B's: torchvision's vgg19_bn, pooled to 1x1, with its head of 4096 units and dropout."""
    return VGG(19, head_4096(num_classes), norm_layer, bias=True)


def vgg19_4096(num_classes: int, norm_layer: NormLayer) -> VGG:
    """Study B's without batch norm: torchvision's vgg19. ``norm_layer`` is not used."""
    return VGG(19, head_4096(num_classes), None, bias=True)


def head_4096(num_classes: int) -> nn.Sequential:
    """512 to 4096 to 4096 to ``num_classes``, dropout 1/2 in between, in torchvision's order."""
    return nn.Sequential(
        nn.Linear(512, 4096), nn.ReLU(inplace=True), nn.Dropout(),
        nn.Linear(4096, 4096), nn.ReLU(inplace=True), nn.Dropout(),
        nn.Linear(4096, num_classes),
    )  # fmt: skip

"""VGGs (Simonyan & Zisserman 2014, arXiv:1409.1556) for 32x32 images, which the five max-pools bring to 1x1; of larger
ones the mean is taken.

Layers have torchvision's numbers; BatchNorm includes the ReLU, whose number is skipped. Torchvision's weights load
except for the classifier and, in ``vgg11`` to ``vgg19``, the convolutions' biases, which are redundant before a norm.
"""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn

from fastres.models.resnet import init_convolutions
from fastres.nn import SmallMapConv2d

CONVOLUTIONS = {  # by depth: at each of five resolutions, with 64, 128, 256, 512 and 512 channels
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


class VGG(nn.Module):
    """3x3 convolutions, each followed by BatchNorm (if ``batch_norm``) and ReLU, then ``head(num_classes)``.

    ``head``: by default one linear layer.
    ``bias``: the convolutions have one.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int,
        norm_layer: Callable[..., nn.Module],
        head: Callable[[int], nn.Module] | None = None,
        bias: bool = False,
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        number, in_channels = 0, 3
        for stage, convolutions in enumerate(CONVOLUTIONS[depth]):
            channels = min(64 << stage, 512)
            for _ in range(convolutions):
                layers[str(number)] = SmallMapConv2d(in_channels, channels, 3, bias=bias)
                layers[str(number + 1)] = norm_layer(channels) if batch_norm else nn.ReLU(inplace=True)
                number += 3 if batch_norm else 2
                in_channels = channels
            layers[str(number)] = nn.MaxPool2d(2)
            number += 1
        self.features = nn.Sequential(layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = head(num_classes) if head else nn.Linear(512, num_classes)

        init_convolutions(self)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def head_4096(num_classes: int) -> nn.Sequential:
    """Torchvision's classifier for 512 features: linear layers of 4096, 4096 and ``num_classes`` with dropout 0.5."""
    return nn.Sequential(
        nn.Linear(512, 4096), nn.ReLU(inplace=True), nn.Dropout(),
        nn.Linear(4096, 4096), nn.ReLU(inplace=True), nn.Dropout(),
        nn.Linear(4096, num_classes),
    )  # fmt: skip

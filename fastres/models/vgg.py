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
    """Convolutions of 3x3 with norm and ReLU, without ``norm`` with ReLU alone, then ``head(num_classes)``, by default
    one linear layer.

    ``bias`` gives the convolutions one, which a norm after them makes redundant.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int,
        norm_layer: NormLayer,
        head: Callable[[int], nn.Module] | None = None,
        bias: bool = False,
        norm: bool = True,
    ) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        number, in_channels = 0, 3
        for stage, convolutions in enumerate(CONVOLUTIONS[depth]):
            channels = min(64 << stage, 512)
            for _ in range(convolutions):
                layers[str(number)] = nn.Conv2d(in_channels, channels, 3, padding=1, bias=bias)
                layers[str(number + 1)] = norm_layer(channels) if norm else nn.ReLU(inplace=True)
                number += 3 if norm else 2
                in_channels = channels
            layers[str(number)] = nn.MaxPool2d(2)
            number += 1
        self.features = nn.Sequential(layers)
        self.classifier = head(num_classes) if head else nn.Linear(512, num_classes)

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


def head_4096(num_classes: int) -> nn.Sequential:
    """512 to 4096 to 4096 to ``num_classes``, dropout 1/2 in between, in torchvision's order."""
    return nn.Sequential(
        nn.Linear(512, 4096), nn.ReLU(inplace=True), nn.Dropout(),
        nn.Linear(4096, 4096), nn.ReLU(inplace=True), nn.Dropout(),
        nn.Linear(4096, num_classes),
    )  # fmt: skip

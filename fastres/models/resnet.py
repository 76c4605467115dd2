"""ResNets (He et al. 2015, arXiv:1512.03385) with the CIFAR stem: 3x3 convolution of stride 1, no max-pool.

Modules have torchvision's names; of its state dicts only the shapes of ``conv1.weight`` and ``fc`` differ.
"""

from collections.abc import Callable

import torch
from torch import nn

from fastres.nn import PointwiseConv2d, has_hooks

NormLayer = Callable[..., nn.BatchNorm2d]
Output = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, norm_layer: NormLayer) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = norm_layer(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = norm_layer(channels)
        self.downsample = projection(in_channels, channels, stride, norm_layer)

    def forward(self, x: torch.Tensor, shortcut: torch.Tensor | None = None) -> Output:
        out = self.bn1(self.conv1(x))
        residual = self.downsample(x if shortcut is None else shortcut)
        return self.bn2(self.conv2(out), residual=residual, twin=shortcut is not None)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and the shortcut; the 3x3 has the stride, as in torchvision."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, norm_layer: NormLayer) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = PointwiseConv2d(in_channels, channels, bias=False)
        self.bn1 = norm_layer(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = norm_layer(channels)
        self.conv3 = PointwiseConv2d(channels, out_channels, bias=False)
        self.bn3 = norm_layer(out_channels)
        self.downsample = projection(in_channels, out_channels, stride, norm_layer)

    def forward(self, x: torch.Tensor, shortcut: torch.Tensor | None = None) -> Output:
        out = self.bn1(self.conv1(x))
        out = self.bn2(self.conv2(out))
        residual = self.downsample(x if shortcut is None else shortcut)
        return self.bn3(self.conv3(out), residual=residual, twin=shortcut is not None)


def projection(in_channels: int, out_channels: int, stride: int, norm_layer: NormLayer) -> nn.Module:
    """The shortcut: a 1x1 convolution and BatchNorm where the shapes differ, otherwise the identity."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), norm_layer(out_channels, relu=False)
    )


class Stage(nn.Sequential):
    """Residual blocks of one resolution.

    While training, the fused norm that ends a block gives its output twice, for the next block's branch and shortcut,
    except where a hook is to see one tensor with its whole gradient.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x
        for block in self:
            output = block(x) if has_hooks(block) else block(x, shortcut)
            x, shortcut = output if isinstance(output, tuple) else (output, output)
        return x


class ResNet(nn.Module):
    """Four stages of ``layers`` blocks at 64, 128, 256 and 512 channels; stride 2 at the start of stages 2 to 4."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: tuple[int, int, int, int],
        num_classes: int,
        norm_layer: NormLayer,
        zero_gamma: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = norm_layer(64)
        wide = block.expansion

        def stage(in_channels: int, channels: int, num_blocks: int, stride: int) -> Stage:
            rest = (block(channels * wide, channels, 1, norm_layer) for _ in range(num_blocks - 1))
            return Stage(block(in_channels, channels, stride, norm_layer), *rest)

        self.layer1 = stage(64, 64, layers[0], stride=1)
        self.layer2 = stage(64 * wide, 128, layers[1], stride=2)
        self.layer3 = stage(128 * wide, 256, layers[2], stride=2)
        self.layer4 = stage(256 * wide, 512, layers[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512 * wide, num_classes)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_gamma and isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)
            elif zero_gamma and isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))

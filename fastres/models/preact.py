"""Residual networks with norm and ReLU before each convolution (He et al. 2016, arXiv:1603.05027).

Wide ResNets (Zagoruyko & Komodakis 2016, arXiv:1605.07146) are such networks of three wide stages.
"""

from collections.abc import Sequence

import torch
from torch import nn

from fastres.models.resnet import NormLayer, blocks_of, init_convolutions
from fastres.nn import SmallMapConv2d


class PreActBlock(nn.Module):
    """Norm, ReLU and 3x3 convolution, twice, and the shortcut: where shapes differ, a 1x1 convolution of the first
    ReLU's output."""

    def __init__(self, in_channels: int, channels: int, stride: int, norm_layer: NormLayer) -> None:
        super().__init__()
        self.bn1 = norm_layer(in_channels)
        self.conv1 = SmallMapConv2d(in_channels, channels, 3, stride)
        self.bn2 = norm_layer(channels)
        self.conv2 = SmallMapConv2d(channels, channels, 3)
        self.downsample = None
        if stride > 1 or in_channels != channels:
            self.downsample = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn1(x)
        residual = x if self.downsample is None else self.downsample(out)
        return self.conv2(self.bn2(self.conv1(out))) + residual


class PreActResNet(nn.Module):
    """A 3x3 convolution to ``stem`` channels, then stages of ``layers`` blocks: the first with ``width`` channels, each
    further one with twice as many and half the size."""

    def __init__(self, layers: Sequence[int], stem: int, width: int, num_classes: int, norm_layer: NormLayer) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        self.blocks, in_channels = nn.Sequential(), stem
        for _, channels, stride in blocks_of(layers, width):
            self.blocks.append(PreActBlock(in_channels, channels, stride, norm_layer))
            in_channels = channels
        self.bn = norm_layer(in_channels)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(in_channels, num_classes)
        init_convolutions(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.flatten(self.avgpool(self.bn(self.blocks(self.conv1(x)))), 1))

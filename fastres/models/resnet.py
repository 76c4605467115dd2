"""ResNets (He et al. 2015, arXiv:1512.03385) with the CIFAR stem: 3x3 convolution of stride 1, no max-pool.

Modules have torchvision's names; of its state dicts only the shapes of ``conv1.weight`` and ``fc`` differ. Those of
section 4.2, for CIFAR-10, have three stages of 16, 32 and 64 channels.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastres.nn import SmallMapConv2d, has_hooks

NormLayer = Callable[..., nn.BatchNorm2d]
OneOrTwo = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def twice(x: OneOrTwo) -> tuple[torch.Tensor, torch.Tensor]:
    """A block's input for its branch and for its shortcut."""
    return x if isinstance(x, tuple) else (x, x)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, norm_layer: NormLayer, option: str = "B") -> None:
        super().__init__()
        self.conv1 = SmallMapConv2d(in_channels, channels, 3, stride)
        self.bn1 = norm_layer(channels)
        self.conv2 = SmallMapConv2d(channels, channels, 3)
        self.bn2 = norm_layer(channels)
        self.downsample = shortcut_of(option, in_channels, channels, stride, norm_layer)

    def forward(self, x: OneOrTwo) -> OneOrTwo:
        branch, shortcut = twice(x)
        out = self.bn1(self.conv1(branch))
        return self.bn2(self.conv2(out), residual=self.downsample(shortcut), twin=isinstance(x, tuple))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and the shortcut; the 3x3 has the stride, as in torchvision."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, norm_layer: NormLayer, option: str = "B") -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = SmallMapConv2d(in_channels, channels, 1)
        self.bn1 = norm_layer(channels)
        self.conv2 = SmallMapConv2d(channels, channels, 3, stride)
        self.bn2 = norm_layer(channels)
        self.conv3 = SmallMapConv2d(channels, out_channels, 1)
        self.bn3 = norm_layer(out_channels)
        self.downsample = shortcut_of(option, in_channels, out_channels, stride, norm_layer)

    def forward(self, x: OneOrTwo) -> OneOrTwo:
        branch, shortcut = twice(x)
        out = self.bn1(self.conv1(branch))
        out = self.bn2(self.conv2(out))
        return self.bn3(self.conv3(out), residual=self.downsample(shortcut), twin=isinstance(x, tuple))


class PaddedShortcut(nn.Module):
    """Every ``stride``-th pixel, and zeros for the channels that are missing: a shortcut without parameters."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.missing, self.stride = out_channels - in_channels, stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.missing))


def shortcut_of(option: str, in_channels: int, out_channels: int, stride: int, norm_layer: NormLayer) -> nn.Module:
    """The identity where the shapes agree; otherwise, of the options in section 3.3, A: without parameters; B: a 1x1
    convolution and BatchNorm."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    if option == "A":
        return PaddedShortcut(in_channels, out_channels, stride)
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), norm_layer(out_channels, relu=False)
    )


class Stage(nn.Sequential):
    """Residual blocks of one resolution."""

    def forward(self, x: OneOrTwo) -> OneOrTwo:
        output = in_turn(self, x)
        return output if isinstance(x, tuple) else twice(output)[0]


def in_turn(modules: Iterable[nn.Module], x: OneOrTwo) -> OneOrTwo:
    """Runs stages or blocks one after another.

    While training, the fused norm that ends a block gives its output twice, for the next block's branch and shortcut.
    Modules of another kind get it once, and so do those with hooks, which are to see one tensor and its whole gradient.
    """
    for module in modules:
        once = not isinstance(module, Stage | BasicBlock | Bottleneck) or has_hooks(module)
        x = module(twice(x)[0] if once else twice(x))
    return x


class ResNet(nn.Module):
    """Stages of ``layers`` blocks: the first of ``width`` channels, each further one of twice as many and stride 2.

    ``option``: of the shortcuts where shapes differ.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        num_classes: int,
        norm_layer: NormLayer,
        width: int = 64,
        option: str = "B",
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = norm_layer(width)
        in_channels, stages = width, [Stage() for _ in layers]
        for stage, channels, stride in blocks_of(layers, width):
            stages[stage].append(block(in_channels, channels, stride, norm_layer, option))
            in_channels = channels * block.expansion
        self.stages = len(stages)
        for number, module in enumerate(stages, 1):
            self.add_module(f"layer{number}", module)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(in_channels, num_classes)
        init_convolutions(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x))
        x, _ = twice(in_turn((self.get_submodule(f"layer{number + 1}") for number in range(self.stages)), x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def blocks_of(layers: Sequence[int], width: int) -> Iterator[tuple[int, int, int]]:
    """Stage, channels and stride of each block: ``layers`` blocks a stage, the first stage of ``width`` channels, each
    further one of twice as many, beginning with stride 2."""
    for stage, blocks in enumerate(layers):
        for block in range(blocks):
            yield stage, width << stage, 2 if stage and not block else 1


def init_convolutions(model: nn.Module) -> None:
    """Draws their weights as He et al. 2015, arXiv:1502.01852, by the outputs."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def zero_gamma(model: nn.Module) -> bool:
    """Sets the weight of the last norm of each residual block to 0; whether there is such a block."""
    norms: list[Any] = [module.bn2 for module in model.modules() if isinstance(module, BasicBlock)]
    norms += [module.bn3 for module in model.modules() if isinstance(module, Bottleneck)]
    for norm in norms:
        nn.init.zeros_(norm.weight)
    return bool(norms)

"""VGG-16 and ResNet-18 trained by plain PyTorch, for their accuracies beside fastres': nothing of fastres is used.

    python benchmarks/plain_pytorch.py DIR FILE

DIR holds train/<class>/ and test/<class>/, of which airplane, automobile and bird are taken. Writes a row of FILE (CSV)
for each model, seed and epoch. For fastres the same settings are those of parity.toml beside this file:

    python -m fastres.study benchmarks/parity.toml --dataset folder --data-dir DIR --seeds 0,1,2 --no-eager-cost
"""

import argparse
import csv
import platform
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

CLASSES = ["airplane", "automobile", "bird"]
EPOCHS, BATCH = 3, 128
LR = {"vgg16": 0.01, "resnet18": 0.1}
NORMALIZE = transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
AUGMENT = transforms.Compose(
    [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor(), NORMALIZE]
)
PLAIN = transforms.Compose([transforms.ToTensor(), NORMALIZE])


class ThreeClasses(ImageFolder):
    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        return CLASSES, {name: label for label, name in enumerate(CLASSES)}


def vgg16() -> nn.Module:
    layers: list[nn.Module] = []
    channels = 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        if width:
            layers += [
                nn.Conv2d(channels, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            channels = width
        else:
            layers.append(nn.MaxPool2d(2))
    linear = nn.Linear(512, len(CLASSES))
    nn.init.normal_(linear.weight, 0, 0.01)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(*layers, nn.Flatten(), linear)


class Block(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.shortcut(x))


def resnet18() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
    channels = 64
    for width in (64, 64, 128, 128, 256, 256, 512, 512):
        layers.append(Block(channels, width, stride=2 if width > channels else 1))
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, len(CLASSES)))


def train(
    model: nn.Module, lr: float, training: DataLoader, test: DataLoader, device: str
) -> Iterator[tuple[float, float]]:
    """Yields each epoch's mean training loss and test accuracy, in percent."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = EPOCHS * len(training)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(EPOCHS):
        model.train()
        losses = []
        for images, labels in training:
            loss = F.cross_entropy(model(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            right = sum((model(images.to(device)).argmax(1).cpu() == labels).sum().item() for images, labels in test)
        yield sum(losses) / len(losses), 100 * right / len(test.dataset)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    on_gpu = torch.device(given.device).type == "cuda"
    device = torch.cuda.get_device_name(given.device) if on_gpu else platform.machine()
    training = DataLoader(
        ThreeClasses(given.folder / "train", AUGMENT), BATCH, shuffle=True, drop_last=True, num_workers=1
    )
    test = DataLoader(ThreeClasses(given.folder / "test", PLAIN), 250, num_workers=1)
    with given.file.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "seed", "epoch", "train_loss", "test_accuracy", "device", "torch"])
        for seed in given.seeds:
            for create in (vgg16, resnet18):
                torch.manual_seed(seed)
                model = create()
                for epoch, (loss, accuracy) in enumerate(
                    train(model, LR[create.__name__], training, test, given.device), 1
                ):
                    writer.writerow([create.__name__, seed, epoch, loss, accuracy, device, torch.__version__])
                    file.flush()


if __name__ == "__main__":
    main()

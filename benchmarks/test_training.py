"""Images a second of the studies' four models, fastres' defaults against plain PyTorch: the forward pass, a training
step, and training with the loader; and what Muon adds to a step.

    python -m pytest benchmarks/test_training.py --benchmark-only

`eager` is float32 in NCHW, with PyTorch's own modules, a DataLoader and the profile's plain loop.
FASTRES_BENCHMARK_BATCH sets the batch size: 128 on a GPU unless it is given, 32 on a CPU.
"""

import os
from dataclasses import replace
from itertools import count

import pytest
import torch
import torch.nn.functional as F

from fastres.config import TrainConfig, over_recipe
from fastres.data.datasets import synthetic
from fastres.data.sizes import image_sizes
from fastres.models import create_model
from fastres.profiling.measure import (
    EAGER,
    ContinuingLoader,
    RepeatedBatch,
    create_trainer,
    first_batch,
    interleave,
    planned_loader,
    train,
)
from fastres.training.hardware import resolve, steps_per_epoch
from fastres.training.trainer import AMP_DTYPES, compiled

MODELS = ("resnet18", "resnet50", "vgg16", "vgg19_bn_4096")
ON_GPU = torch.cuda.is_available()
BATCH = int(os.environ.get("FASTRES_BENCHMARK_BATCH", "128" if ON_GPU else "32"))
STEPS = 20 if ON_GPU else 2  # in a round, of which waiting for a GPU at its end is then a small part
ROUNDS = 20 if ON_GPU else 5


@pytest.fixture(scope="module")
def dataset():
    return synthetic(50_000)


def settings(model, dataset):
    """The default settings of fastres.train for an epoch of CIFAR-10's length, and those of plain PyTorch."""
    fastres, _ = resolve(TrainConfig(model=model, batch_size=BATCH), dataset)
    return {"fastres": fastres, "eager": replace(fastres, **EAGER)}


def seconds_of_a_step(candidates):
    return {name: seconds / STEPS for name, seconds in interleave(candidates, ROUNDS).items()}


@pytest.mark.parametrize("model", MODELS)
def test_forward(report, model, dataset):
    """The forward pass in evaluation mode."""
    torch.compiler.reset()
    configs = settings(model, dataset)
    configs["compiled"] = replace(configs["fastres"], compile=True)

    def forward(config):
        memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        images = torch.randn(BATCH, 3, 32, 32, device=config.device).to(memory_format=memory_format)
        network = create_model(config.model, 10, fused=config.fused).to(config.device, memory_format=memory_format)
        predict = compiled(network.eval(), config)

        @torch.no_grad()
        def run():
            for _ in range(STEPS):
                with torch.autocast(config.device, AMP_DTYPES[config.amp], enabled=config.amp != "off"):
                    predict(images)

        return run

    candidates = {name: forward(config) for name, config in configs.items()}
    report("forward", model, BATCH, configs["fastres"].device, seconds_of_a_step(candidates))


def training(config, dataset, loader, numbers):
    """Trains a warmed-up trainer of ``config`` on ``loader``, once a call; ``numbers`` are the epochs'."""
    trainer = create_trainer(config, dataset, plain=not config.fused)
    if config.fused:
        trainer.warm_up(evaluation=False)
    return lambda: train(trainer, loader, next(numbers))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["step", "epoch"])
def test_training(report, name, model, dataset):
    """A step on a batch that is already on the device, and as in an epoch, from each candidate's loader."""
    configs = settings(model, dataset)
    batch, numbers = first_batch(configs["fastres"], dataset), count()

    def loader(config):
        if name == "step":
            return RepeatedBatch(batch, STEPS)
        steps = steps_per_epoch(config, len(dataset.train))
        return ContinuingLoader(planned_loader(config, dataset, steps), STEPS)

    candidates = {name: training(config, dataset, loader(config), numbers) for name, config in configs.items()}
    report(name, model, BATCH, configs["fastres"].device, seconds_of_a_step(candidates))


@pytest.mark.parametrize("model", ["resnet18", "resnet50", "vgg16"])
def test_muon(report, model, dataset):
    """A step of the fast recipe, at its batch size and sizes of images, and with SGD at full size."""
    muon, _ = resolve(TrainConfig(**over_recipe({"recipe": "fast", "model": model})), dataset)
    (images, labels), numbers = first_batch(replace(muon, image_size_schedule="none"), dataset), count()
    candidates = {
        "sgd": training(replace(muon, optimizer="sgd"), dataset, RepeatedBatch((images, labels), STEPS), numbers)
    }
    for size, _ in image_sizes(muon.image_size_schedule):
        loader = RepeatedBatch((F.adaptive_avg_pool2d(images, size), labels), STEPS)
        candidates[f"muon, {size}x{size}"] = training(muon, dataset, loader, numbers)
    report("optimizer", model, muon.batch_size, muon.device, seconds_of_a_step(candidates))

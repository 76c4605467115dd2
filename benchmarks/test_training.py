"""Training steps and epochs of the studies' four models, fastres' defaults against the studies' loop; compiling.

    python -m pytest benchmarks/test_training.py --benchmark-only --benchmark-json=FILE

FASTRES_BENCHMARK_BATCH sets the batch size: 128 on a GPU unless it is given, 32 on a CPU. On a CPU an epoch is one of
8 steps, and ResNet-18 stands for the others in compiling.
"""

import os
from dataclasses import replace
from itertools import count

import pytest
import torch
from interleave import interleave, percentiles, ratios

from fastres.config import ENGINE, TrainConfig
from fastres.data.datasets import synthetic
from fastres.models import create_model
from fastres.training.baseline import EAGER, StudyLoop
from fastres.training.measure import Resident, first_batch, planned_loader, train
from fastres.training.run import resolve, steps_per_epoch
from fastres.training.trainer import Trainer

MODELS = ("resnet18", "resnet50", "vgg16", "vgg19_bn_4096")
ON_GPU = torch.cuda.is_available()
BATCH = int(os.environ.get("FASTRES_BENCHMARK_BATCH", "128" if ON_GPU else "32"))
IMAGES = 50_000 if ON_GPU else 8 * BATCH
STEP_ROUNDS = 20 if ON_GPU else 3
STEPS = 20 if ON_GPU else 1  # in a round, of which waiting for a GPU at its end is then a small part
EPOCH_ROUNDS = 3 if ON_GPU else 1


@pytest.fixture(scope="module")
def dataset():
    return synthetic(IMAGES)


def defaults(model, dataset):
    """What fastres.train takes for a run of 30 epochs of CIFAR-10's length."""
    config, _ = resolve(TrainConfig(model=model, batch_size=BATCH), synthetic(50_000) if ON_GPU else dataset)
    return config


def make_trainer(config, dataset):
    torch.manual_seed(config.seed)
    model = create_model(config.model, 10, config.zero_gamma, config.fused)
    return Trainer(model, config, torch.device(config.device), 10, steps_per_epoch(config, len(dataset.train)))


def make_eager(config):
    torch.manual_seed(config.seed)
    config = replace(config, **EAGER)
    return StudyLoop(
        create_model(config.model, 10, config.zero_gamma, fused=False), config, torch.device(config.device)
    )


def describe(benchmark, what, config):
    names = "model", "batch_size", "device", *ENGINE
    benchmark.extra_info.update(what=what, **{name: getattr(config, name) for name in names})


@pytest.mark.parametrize("model", MODELS)
def test_step(benchmark, model, dataset):
    config = defaults(model, dataset)
    trainer, eager = make_trainer(config, dataset), make_eager(config)
    trainer.warm_up()
    steps = Resident(first_batch(config, dataset), STEPS)
    candidates = {
        "fastres": lambda: train(trainer, steps),
        "eager": lambda: train(eager, steps),
    }
    seconds = {name: values / STEPS for name, values in interleave(candidates, STEP_ROUNDS).items()}
    describe(benchmark, "step", config)
    benchmark.extra_info.update(
        seconds={name: percentiles(values) for name, values in seconds.items()},
        images_per_second=BATCH / percentiles(seconds["fastres"])["p50"],
        times_as_long=ratios(seconds, "fastres"),
    )
    benchmark.pedantic(candidates["fastres"], rounds=STEP_ROUNDS)


@pytest.mark.parametrize("model", MODELS)
def test_epoch(benchmark, model, dataset):
    config = defaults(model, dataset)
    trainer, loader = make_trainer(config, dataset), planned_loader(config, dataset, IMAGES // BATCH)
    trainer.warm_up()
    numbers, results = count(), []
    benchmark.pedantic(lambda: results.append(train(trainer, loader, next(numbers))), rounds=EPOCH_ROUNDS)
    describe(benchmark, "epoch", config)
    benchmark.extra_info.update(
        images_per_epoch=results[0].images,
        images_per_second=sum(result.images for result in results) / sum(result.seconds for result in results),
        data_wait_fraction=sum(result.data_wait_seconds for result in results)
        / sum(result.seconds for result in results),
    )


@pytest.mark.parametrize("model", MODELS if ON_GPU else MODELS[:1])
def test_compile_warm_up(benchmark, model, dataset, monkeypatch):
    """The first step of a compiled model, with nothing in the compiler's caches."""
    monkeypatch.setattr(torch.compiler.config, "force_disable_caches", True)
    torch.compiler.reset()
    config = replace(defaults(model, dataset), compile=True)
    trainer, step = make_trainer(config, dataset), Resident(first_batch(config, dataset), 1)
    describe(benchmark, "compile", config)
    benchmark.pedantic(lambda: train(trainer, step), rounds=1)

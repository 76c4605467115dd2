"""Images a second of the DALI loader and of the eager one, from arrays and from JPEG files, crop-flip-cutout.

    python -m pytest benchmarks/test_loaders.py --benchmark-only --benchmark-json=FILE

Each candidate gives an epoch of the same images to nobody; candidates run in interleaved rounds. The JPEG files are
those of CIFAR-10 as an image folder, in the folder that FASTRES_CIFAR10_JPEG names. The DALI loader decodes them once
when it is made, which `decode_seconds` times; the eager one decodes them in every epoch.
"""

import os
import time
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from interleave import interleave, percentiles, ratios

from fastres.config import TrainConfig
from fastres.data.datasets import folder, synthetic
from fastres.training.measure import planned_loader

BATCH = 128
IMAGES = 390 * BATCH  # an epoch of CIFAR-10
ROUNDS = 5
WORKERS = 2
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(scope="module", params=["arrays", "jpeg"])
def dataset(request):
    if request.param == "arrays":
        return synthetic(IMAGES)
    root = os.environ.get("FASTRES_CIFAR10_JPEG")
    if not root:
        pytest.skip("FASTRES_CIFAR10_JPEG does not name the folder of CIFAR-10's JPEG files")
    return folder(Path(root))


@pytest.mark.parametrize("device", DEVICES)
def test_loader(benchmark, dataset, device):
    pytest.importorskip("nvidia.dali")
    loaders, made = {}, {}
    for name in ("dali", "eager"):
        config = TrainConfig(
            loader=name, batch_size=BATCH, augmentation="crop-flip-cutout", workers=WORKERS, device=device
        )
        start = time.perf_counter()
        loaders[name] = planned_loader(config, dataset, IMAGES // BATCH)
        made[name] = time.perf_counter() - start

    def epoch(loader):
        numbers = count()

        def run():
            seen = sum(len(images.to(device)) for images, _ in loader.epoch(next(numbers)))
            assert seen == IMAGES
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    candidates = {name: epoch(loader) for name, loader in loaders.items()}
    seconds = interleave(candidates, ROUNDS)
    benchmark.extra_info.update(
        what="loader",
        images="jpeg" if dataset.train.encoded else "arrays",
        device=device,
        workers=WORKERS,
        batch_size=BATCH,
        images_per_epoch=IMAGES,
        decode_seconds=made["dali"] if dataset.train.encoded else 0.0,
        images_per_second={name: percentiles(IMAGES / np.array(values)) for name, values in seconds.items()},
        times_as_long=ratios(seconds, "dali"),
    )
    benchmark.pedantic(candidates["dali"], rounds=ROUNDS)

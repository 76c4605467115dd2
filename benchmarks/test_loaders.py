"""Images a second of the DALI loader and of the eager one, from arrays and from JPEG files, crop-flip-cutout.

    python -m pytest benchmarks/test_loaders.py --benchmark-only

Each loader gives an epoch of the same images, which no model consumes. The JPEG files are those of CIFAR-10 as an image
folder, in the folder that FASTRES_CIFAR10_JPEG names. The DALI loader decodes them once, when it is made, which is
measured by itself; the eager one decodes them in every epoch.
"""

import os
import time
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch

from fastres.config import TrainConfig
from fastres.data.datasets import synthetic
from fastres.data.image_folder import folder
from fastres.profiling.measure import interleave, planned_loader

BATCH = int(os.environ.get("FASTRES_BENCHMARK_BATCH", "128"))
IMAGES = 390 * BATCH  # an epoch of CIFAR-10
ROUNDS = 3
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
def test_loader(report, dataset, device):
    pytest.importorskip("nvidia.dali")
    images = "jpeg" if dataset.train.encoded else "arrays"

    def epoch(name):
        config = TrainConfig(loader=name, batch_size=BATCH, augmentation="crop-flip-cutout", workers=2, device=device)
        loader, numbers = planned_loader(config, dataset, IMAGES // BATCH), count()

        def run():
            assert sum(len(images.to(device)) for images, _ in loader.epoch(next(numbers))) == IMAGES

        return run

    start = time.perf_counter()
    candidates = {"dali": epoch("dali")}
    decode_seconds = time.perf_counter() - start
    candidates["eager"] = epoch("eager")
    report("loader", images, IMAGES, device, interleave(candidates, ROUNDS))
    if dataset.train.encoded:
        report("decoding", images, IMAGES, device, {"dali": np.array([decode_seconds])})

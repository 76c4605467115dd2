"""A trained model from a run's folder, ready to predict."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from fastres.config import WEIGHTS
from fastres.data.image_folder import IMAGE_SUFFIXES, decode_image, images_in
from fastres.errors import UserError, examples
from fastres.fields import path
from fastres.files import read_json
from fastres.models import create_model, register_model
from fastres.training.checkpoint import load_weights
from fastres.training.hardware import choose_fused
from fastres.training.start import read_saved


class Prediction(NamedTuple):
    """The most probable class of an image file."""

    file: Path
    class_name: str
    probability: float


class TrainedModel(nn.Module):
    """``model`` behind the normalisation that it was trained with, in evaluation mode.

    Shape: images float32 ``[N, 3, image_size, image_size]``, RGB in [0, 1], to logits ``[N, len(class_names)]``.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        model: nn.Module,
        class_names: tuple[str, ...],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        image_size: int,
    ) -> None:
        super().__init__()
        self.model, self.class_names, self.image_size = model, class_names, image_size
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model((images - self.mean) / self.std)

    @torch.no_grad()
    def predict(self, files: Iterable[str | Path], batch_size: int = 250) -> Iterator[Prediction]:
        """The most probable class of each image file, and of each one in or below a folder.

        Images are resized as in training. Files that are not readable as images are left out; after the last
        prediction they are named in a UserError.
        """
        paths, bad = iter(image_files(files)), []
        while chunk := list(islice(paths, batch_size)):
            read = [(file, self._read(file)) for file in chunk]
            bad += [file for file, pixels in read if pixels is None]
            images = [(file, pixels) for file, pixels in read if pixels is not None]
            if images:
                batch = torch.stack([pixels for _, pixels in images]).to(self.mean.device)
                best = self(batch).softmax(1).max(1)
                for (file, _), probability, label in zip(images, *map(torch.Tensor.tolist, best), strict=True):
                    yield Prediction(file, self.class_names[label], probability)
        if bad:
            raise UserError(f"not readable as images: {examples(bad)}; replace them or leave them out")

    def _read(self, file: Path) -> torch.Tensor | None:
        """Its pixels, float32 ``[3, image_size, image_size]`` in [0, 1]."""
        try:
            image = decode_image(np.fromfile(file, np.uint8))
        except Exception:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
            return None
        pixels = np.asarray(image.resize((self.image_size, self.image_size), Image.Resampling.BILINEAR))
        return torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)


def image_files(files: Iterable[str | Path]) -> list[Path]:
    """Each of ``files``, and in the place of a folder the image files in and below it, as training reads folders."""
    found = []
    for file in map(path, map(str, files)):
        try:
            inner = images_in(file, []) if file.stat() and file.is_dir() else [file]
        except OSError as error:
            raise UserError(f"{error.filename or file}: {error.strerror}") from error
        if not inner:
            raise UserError(f"{file}: holds no image file ({', '.join(IMAGE_SUFFIXES)})")
        found += inner
    return found


def load_model(
    run: str | Path, weights: str | None = None, model: str | None = None, fused: bool | None = None
) -> TrainedModel:
    """The model of the run in the folder ``run``, on the CPU.

    Args:
        weights: ``last`` or ``best``, the epoch that they are of; by default the run's ``--select``.
        model: the run's ``--model`` if that is a function, which is imported only if it is named here.
        fused: with the fused operator; by default where its kernels can run.
    """
    folder = path(str(run))
    if weights not in (None, *WEIGHTS):
        raise UserError(f"weights {weights!r}: choose from {', '.join(WEIGHTS)}")
    saved = read_saved(read_json(folder / "config.json"), folder / "config.json")
    config = saved.config
    if model is not None:
        register_model(model)
        config = replace(config, model=model)
    fused, _ = choose_fused(fused, torch.device("cpu"), sync_bn=False)
    network = create_model(config.model, len(saved.class_names), fused=fused, image_size=config.image_size)
    load_weights(network, folder / f"{weights or config.select}.safetensors")
    return TrainedModel(network, saved.class_names, saved.mean, saved.std, config.image_size)

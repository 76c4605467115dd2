"""A trained model from a run's folder, ready to predict."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from fastres.config import WEIGHTS
from fastres.errors import UserError
from fastres.fields import path
from fastres.files import read_json
from fastres.models import create_model, register_model
from fastres.training.checkpoint import load_weights
from fastres.training.hardware import choose_fused
from fastres.training.start import read_saved


class TrainedModel(nn.Module):
    """``model`` behind the normalisation that it was trained with, in evaluation mode.

    Shape: images float32 ``[N, 3, image_size, image_size]``, RGB in [0, 1], to logits ``[N, len(class_names)]``.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self, model: nn.Module, class_names: tuple[str, ...], mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.model, self.class_names = model, class_names
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model((images - self.mean) / self.std)


def load_model(run: str | Path, weights: str | None = None, model: str | None = None) -> TrainedModel:
    """The model of the run in the folder ``run``, on the CPU.

    Args:
        weights: ``last`` or ``best``, the epoch that they are of; by default the run's ``--select``.
        model: the run's ``--model`` if that is a function, which is imported only if it is named here.
    """
    folder = path(str(run))
    if weights not in (None, *WEIGHTS):
        raise UserError(f"weights {weights!r}: choose from {', '.join(WEIGHTS)}")
    saved = read_saved(read_json(folder / "config.json"), folder / "config.json")
    config = saved.config
    if model is not None:
        register_model(model)
        config = replace(config, model=model)
    fused, _ = choose_fused(None, torch.device("cpu"), sync_bn=False)
    network = create_model(config.model, len(saved.class_names), fused=fused, image_size=config.image_size)
    load_weights(network, folder / f"{weights or config.select}.safetensors")
    return TrainedModel(network, saved.class_names, saved.mean, saved.std)

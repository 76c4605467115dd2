"""Where a trained network is wrong, as pictures: its most confident mistakes, and its confusion matrix."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

from fastres.files import write_atomically
from fastres.report.figures import draw_confusion, side_of
from fastres.report.style import styled
from fastres.training.run import Run

COLUMNS, ROWS = 6, 4


class Mistake(NamedTuple):
    """A test image, uint8 ``[S, S, 3]``, its class, and the one that it was taken for with ``probability``."""

    image: np.ndarray
    true: str
    predicted: str
    probability: float


def most_confident_mistakes(run: Run, number: int = COLUMNS * ROWS) -> list[Mistake]:
    """Of the weights that ``run`` has loaded, on its test split: the most probable wrong predictions."""
    found: list[Mistake] = []
    classes = run.dataset.classes
    mean, std = torch.tensor(run.dataset.mean), torch.tensor(run.dataset.std)
    for images, labels, logits in run.trainer.predictions(run.test_loader, 0):
        best = logits.softmax(1).max(1)
        for i in (best.indices != labels).nonzero().flatten().tolist():
            pixels = (images[i].permute(1, 2, 0).cpu() * std + mean).clamp(0, 1) * 255
            true, predicted = (classes[int(label[i])] for label in (labels, best.indices))
            found.append(Mistake(pixels.round().byte().numpy(), true, predicted, best.values[i].item()))
        found = sorted(found, key=lambda mistake: -mistake.probability)[:number]
    return found


@styled
def draw_gallery(run: Run, confusion: list[list[int]]) -> list[Path]:
    """Draws mistakes.png and confusion.png to the run's folder, and returns their paths."""
    mistakes = most_confident_mistakes(run)
    name = f"{run.config.model} on {run.dataset.name}"
    rows = max(-(-len(mistakes) // COLUMNS), 1)
    gallery = Figure(figsize=(1.7 * COLUMNS, 2.1 * rows), layout="constrained")
    gallery.suptitle(f"{name}: the most confident mistakes" if mistakes else f"{name}: no mistake")
    for i, axes in enumerate(gallery.subplots(rows, COLUMNS, squeeze=False).flat):
        axes.set_axis_off()
        if i < len(mistakes):
            image, true, predicted, probability = mistakes[i]
            axes.imshow(image, interpolation="nearest")
            axes.set_title(f"{true}\ntaken for {predicted}, {100 * probability:.1f} %", fontsize="x-small")
    classes = list(run.dataset.classes)
    side = side_of(classes)
    matrix = Figure(figsize=(side, side + 0.2), layout="constrained")
    draw_confusion(matrix.subplots(), np.array(confusion), classes, name)
    paths = [run.folder / "mistakes.png", run.folder / "confusion.png"]
    for figure, path in zip((gallery, matrix), paths, strict=True):
        write_atomically(path, partial(figure.savefig, dpi=150, format="png"), then="draw it again")
    return paths

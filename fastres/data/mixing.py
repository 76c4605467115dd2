"""mixup and CutMix: each image of a batch mixed with its neighbour in the plan, after all other augmentation."""

import numpy as np
import torch
import torch.nn.functional as F

from fastres.data.plan import EpochPlan

Batch = tuple[torch.Tensor, torch.Tensor]


def mixed(images: torch.Tensor, labels: torch.Tensor, plan: EpochPlan, rows: slice, num_classes: int) -> Batch:
    """The batch of the plan's ``rows`` with its images mixed, and the classes' shares as labels.

    Shape: images float32 ``[B, 3, H, W]``; labels int64 ``[B]``, in the result float32 ``[B, num_classes]``.
    """
    # neighbours are images 0 and 1, 2 and 3, ...; the last of an odd number is its own
    partner = (torch.arange(len(labels), device=images.device) ^ 1).clamp(max=len(labels) - 1)
    others = images[partner]
    if plan.mixup is not None:
        share = _column(plan.mixup[rows], images)
        images = torch.lerp(others, images, share[:, None, None, None])
    else:
        assert plan.cutmix is not None
        top, left, height, width = _column(plan.cutmix[rows], images).T[:, :, None, None, None]
        column = torch.arange(images.size(3), device=images.device)
        row = column[:, None]
        inside = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)
        images = torch.where(inside, others, images)
        share = 1 - inside.flatten(1).float().mean(1)
    one_hot = F.one_hot(labels, num_classes).float()
    return images, torch.lerp(one_hot[partner], one_hot, share[:, None])


def larger_part(labels: torch.Tensor) -> torch.Tensor:
    """The class of each image, or the one with the largest share: int64 ``[B]``, of labels ``[B]`` or ``[B, C]``."""
    return labels if labels.ndim == 1 else labels.argmax(1)


def _column(values: np.ndarray, images: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(images.device)

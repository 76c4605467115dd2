"""Compares a loader of the user's own with the epoch plan."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import ArrayLike

from fastres.data import Batch, as_split
from fastres.data.eager import _PlannedImages
from fastres.data.plan import EpochPlan, crop_padding
from fastres.data.splits import CIFAR10_MEAN, CIFAR10_STD, Split
from fastres.errors import UserError, first_line


def check_loader(
    mine: Iterable[Batch],
    data: Split | tuple[ArrayLike, ArrayLike],
    plan: EpochPlan,
    *,
    mean: tuple[float, float, float] = CIFAR10_MEAN,
    std: tuple[float, float, float] = CIFAR10_STD,
    tolerance: float = 1e-3,
) -> None:
    """Raises UserError at the first image of ``mine`` that differs from the plan's, with the likely kind of difference.

    Args:
        mine: batches of float images ``[B, 3, 32, 32]``, normalised, and integer labels ``[B]``; any batch size.
        data, mean, std: as in EagerLoader, whose images are the reference.
        plan: the epoch that ``mine`` should give.
        tolerance: largest difference of a normalised value. A level of 255 is about 0.016; decoders of JPEG files
            differ by up to three, so take 0.05 for another one than Pillow's.
    """
    if plan.mixes:
        raise UserError("plan: check_loader compares images before they are mixed; leave mixup and cutmix out of it")
    split = as_split(data)
    if len(plan) and max(plan.order) >= len(split):
        raise UserError(f"plan: it names image {max(plan.order)}, and the data has {len(split)}")
    planned = _PlannedImages(split, plan, mean, std)
    i = 0
    for batch in mine:
        try:
            images, labels = map(torch.as_tensor, batch)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"image {i}: batches must be pairs of images and labels ({first_line(error)})") from error
        size = split.size if plan.size is None else plan.size[min(i, len(plan) - 1)]
        if images.ndim != 4 or images.shape[1:] != (3, size, size) or not images.is_floating_point():
            raise UserError(
                f"image {i}: shape or dtype: batches must be float [B, 3, {size}, {size}], not {images.dtype} "
                f"{list(images.shape)}"
            )
        if labels.shape != images.shape[:1] or labels.is_floating_point():
            raise UserError(
                f"image {i}: labels must be integers [{len(images)}] like the images, not {labels.dtype} "
                f"{list(labels.shape)}"
            )
        for image, label in zip(images.detach().cpu().float(), labels.tolist(), strict=True):
            if i == len(plan):
                raise UserError(f"image {i}: extra; the plan has {len(plan)} images")
            expected, expected_label = planned[i]
            if not _close(image, expected, tolerance):
                raise UserError(f"image {i}: {_difference(image, planned, i, tolerance)}")
            if label != expected_label:
                raise UserError(f"image {i}: label {label}, not {expected_label}")
            i += 1
    if i < len(plan):
        raise UserError(f"image {i}: missing; the plan has {len(plan)} images")


def _close(image: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    return bool(((image - expected).abs() <= tolerance).all())  # False for NaN


def _difference(image: torch.Tensor, planned: _PlannedImages, i: int, tolerance: float) -> str:
    """The first single change to the plan's image ``i``, or other image of the plan, that gives ``image``."""
    plan = planned.plan
    row = replace(plan, **{name: column[i : i + 1] for name, column in vars(plan).items() if column is not None})
    mean, std = (torch.tensor(value)[:, None, None] for value in (planned.mean, planned.std))
    expected = planned[i][0]
    raw = expected * std + mean
    changes = {
        "normalisation: pixels in [0, 1], without mean and std": raw,
        "scale: pixels in [0, 255], without mean and std": 255 * raw,
        "scale: pixels in [0, 255], normalised by mean and std of [0, 1]": (255 * raw - mean) / std,
        "colour order: BGR": ((raw.flip(0)) - mean) / std,
        "colour order: BGR, normalised in that order": expected.flip(0),
        "layout: rows and columns exchanged": expected.transpose(1, 2),
    }
    if row.flip is not None:
        other = replace(planned, plan=replace(row, flip=1 - row.flip))
        changes["flip: " + ("missing" if row.flip[0] else "the plan has none here")] = other[0][0]
    for kind, changed in changes.items():
        if _close(image, changed, tolerance):
            return kind
    if row.crop is not None:
        padding = crop_padding(planned.split.size)
        for top, left in np.ndindex(2 * padding + 1, 2 * padding + 1):
            crop = np.array([[top - padding, left - padding]], np.int32)
            if _close(image, replace(planned, plan=replace(row, crop=crop))[0][0], tolerance):
                return f"crop: at {crop[0].tolist()}, not {row.crop[0].tolist()}"
    for j in range(len(planned)):
        if _close(image, planned[j][0], tolerance):
            return f"order: it is the plan's image {j}"
    if image.isfinite().all() and _is_linear(image, expected, tolerance):
        return "normalisation: another mean or std"
    largest = float((image - expected).abs().max())
    return f"differs by up to {largest:.3g}; of no single known kind (several at once?)"


def _is_linear(image: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """Whether each channel of ``image`` is that of ``expected``, scaled and shifted."""
    ours, theirs = (channels.flatten(1)[..., None].double() for channels in (image, expected))
    basis = torch.cat([theirs, torch.ones_like(theirs)], 2)
    return _close(basis @ torch.linalg.lstsq(basis, ours).solution, ours, tolerance)

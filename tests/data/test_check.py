"""check_loader accepts the plan's batches and names each kind of fault that is injected into them."""

from dataclasses import replace

import pytest
import torch

import fastres
from fastres.data.eager import EagerLoader
from fastres.data.plan import training_plan
from fastres.data.splits import CIFAR10_MEAN, CIFAR10_STD
from fastres.errors import UserError

MEAN, STD = (torch.tensor(value)[:, None, None] for value in (CIFAR10_MEAN, CIFAR10_STD))
PLAN = training_plan(0, 0, 60, "crop-flip-cutout")
UNCUT = replace(PLAN, cutout=None)


def batches(split, plan, **options):
    return list(EagerLoader(split, lambda epoch: plan, 16, workers=0, **options).epoch(0))


def test_the_plans_batches_pass(arrays):
    fastres.check_loader(batches(arrays.train, PLAN), (arrays.train.images, arrays.train.labels), PLAN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x * STD + MEAN, "image 0: normalisation: pixels in"),
        (lambda x: (x * STD + MEAN) * 255, r"image 0: scale: pixels in \[0, 255\], without"),
        (lambda x: ((x * STD + MEAN) * 255 - MEAN) / STD, r"image 0: scale: .* normalised by"),
        (lambda x: ((x * STD + MEAN).flip(1) - MEAN) / STD, "image 0: colour order: BGR$"),
        (lambda x: x.flip(1), "image 0: colour order: BGR, normalised in that order"),
        (lambda x: x.mT, "image 0: layout"),
        (lambda x: x.permute(0, 2, 3, 1), "image 0: shape or dtype: .* not torch.float32 .16, 32, 32, 3"),
        (lambda x: x.to(torch.uint8), "image 0: shape or dtype: .* not torch.uint8"),
        (lambda x: x * torch.nan, "image 0: differs by up to nan"),
        (lambda x: 0.9 * x + 0.1, "image 0: normalisation: another mean or std"),
        (lambda x: x.square(), "image 0: differs by up to"),
    ],
)
def test_a_change_of_values_or_layout_is_named(change, message, arrays):
    mine = [(change(images), labels) for images, labels in batches(arrays.train, UNCUT)]
    with pytest.raises(UserError, match=message):
        fastres.check_loader(mine, arrays.train, UNCUT)


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        ("crop", lambda crop: -crop, "crop: at"),
        ("flip", lambda flip: 1 - flip, "flip: "),
        ("order", lambda order: order, "order: it is the plan's image 6"),
    ],
)
def test_a_change_of_the_plan_is_named_at_its_first_image(column, change, message, arrays):
    if column == "order":
        mine = batches(arrays.train, UNCUT)
        mine[0][0][[5, 6]] = mine[0][0][[6, 5]]
        first = 5
    else:
        changed = getattr(UNCUT, column).copy()
        first = next(i for i in range(5, 60) if (change(changed[i]) != changed[i]).any())
        changed[first:] = change(changed[first:])
        mine = batches(arrays.train, replace(UNCUT, **{column: changed}))
    with pytest.raises(UserError, match=f"image {first}: {message}"):
        fastres.check_loader(mine, arrays.train, UNCUT)


def test_missing_and_extra_images_and_wrong_labels(arrays):
    mine = batches(arrays.train, PLAN)
    wrong = [(images, labels + 1) for images, labels in mine]
    floats = [(images, labels.float()) for images, labels in mine]
    for loader, message in (
        (mine[:-1], "image 48: missing"),
        (mine + mine[:1], "image 60: extra"),
        (wrong, "image 0: label"),
        (floats, "image 0: labels must be integers"),
        ([None], "image 0: batches must be pairs"),
        ([images for images, _ in mine], "image 0: batches must be pairs"),
    ):
        with pytest.raises(UserError, match=message):
            fastres.check_loader(loader, arrays.train, PLAN)


def test_numpy_batches_and_a_plan_of_other_data(arrays):
    mine = [(images.numpy(), labels.numpy()) for images, labels in batches(arrays.train, PLAN)]
    fastres.check_loader(mine, arrays.train, PLAN)
    with pytest.raises(UserError, match="plan: it names image 59, and the data has 20"):
        fastres.check_loader(mine, arrays.test, PLAN)

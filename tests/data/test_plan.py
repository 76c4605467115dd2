import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import RandomErasing

from fastres.data.plan import canonical_augmentation, evaluation_plan, training_plan, with_steps
from fastres.data.sizes import image_sizes, size_of_steps, steps_of_sizes
from fastres.errors import UserError

IMAGES = 50_000
ALL_STEPS = "crop-flip-cutout-erasing"
AUGMENTATIONS = ("none", "crop-flip", "crop-flip-cutout", "erasing", ALL_STEPS, "cutmix-crop")


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_is_a_pure_function_of_its_arguments(augmentation):
    first, again = (training_plan(3, 7, 1000, augmentation) for _ in range(2))
    for name, value in vars(first).items():
        np.testing.assert_array_equal(value, getattr(again, name))


@pytest.mark.parametrize(("seed", "epoch"), [(0, 1), (1, 0), (1, 1)])
def test_other_seeds_and_epochs_draw_anew(seed, epoch):
    first, other = training_plan(0, 0, 1000, ALL_STEPS), training_plan(seed, epoch, 1000, ALL_STEPS)
    for name, value in vars(first).items():
        assert value is None or (value != getattr(other, name)).any(), name


def test_no_two_seeds_have_an_epoch_in_common():
    orders = {training_plan(seed, epoch, 1000, "none").order.tobytes() for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_every_image_comes_once(augmentation):
    order = training_plan(0, 0, 1234, augmentation).order
    np.testing.assert_array_equal(np.sort(order), np.arange(1234))
    assert (order != np.arange(1234)).any()


def test_augmentations_draw_only_what_they_apply():
    drawn = {name: {key for key, value in vars(training_plan(0, 0, 8, name)).items() if value is not None}
             for name in AUGMENTATIONS}  # fmt: skip
    assert drawn == {
        "none": {"order"},
        "crop-flip": {"order", "crop", "flip"},
        "crop-flip-cutout": {"order", "crop", "flip", "cutout"},
        "erasing": {"order", "erasing"},
        "crop-flip-cutout-erasing": {"order", "crop", "flip", "cutout", "erasing"},
        "cutmix-crop": {"order", "crop", "cutmix"},
    }


def test_an_epoch_is_drawn_as_it_always_was():
    """Runs that were stopped earlier go on with the data that they would have seen."""
    plan = training_plan(3, 2, 6, "crop-flip-cutout-erasing")
    assert plan.order.tolist() == [5, 0, 2, 1, 3, 4]
    assert plan.crop.tolist() == [[-3, 4], [-2, -3], [-1, 4], [2, 2], [-1, -3], [1, -1]]
    assert plan.flip.tolist() == [0, 1, 0, 0, 0, 1]
    centres = [[4, 30], [25, 19], [15, 11], [15, 8], [7, 23], [24, 14]]
    for (row, column), (top, left, height, width) in zip(centres, plan.cutout, strict=True):
        assert (top, top + height) == (max(row - 8, 0), min(row + 8, 32))
        assert (left, left + width) == (max(column - 8, 0), min(column + 8, 32))


@pytest.mark.parametrize(
    ("given", "canonical"),
    [("none", "none"), ("flip-crop", "crop-flip"), ("erasing-crop-cutout-flip", "crop-flip-cutout-erasing")],
)
def test_the_order_of_the_steps_does_not_matter(given, canonical):
    assert canonical_augmentation(given) == canonical
    plan, same = training_plan(0, 0, 100, given), training_plan(0, 0, 100, canonical)
    for name, column in vars(plan).items():
        np.testing.assert_array_equal(column, getattr(same, name))


@pytest.mark.parametrize(
    "given",
    [
        "",
        "crop-crop",
        "crop-none",
        "none-none",
        "crop-",
        "Crop",
        "x\ny",
        "x" * 500,
        "flip-altflip",
        "crop-reflectcrop",
        "mixup-cutmix",
    ],
)
def test_unknown_and_repeated_steps(given):
    with pytest.raises(
        UserError,
        match=r"steps are crop, .*; not flip with altflip, crop with reflectcrop, or mixup with cutmix$",
    ) as error:
        canonical_augmentation(given)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 280


def test_rectangles_are_drawn_as_torchvision_draws_them():
    boxes = training_plan(0, 0, IMAGES, "erasing").erasing
    erased = boxes[:, 2] > 0
    np.testing.assert_array_equal(boxes[~erased], 0)
    assert erased.mean() == pytest.approx(RandomErasing().p, abs=4 * 0.5 / IMAGES**0.5)
    assert boxes[:, 2:].max() == 31

    image, draws, defaults = torch.empty(3, 32, 32), 4000, RandomErasing()
    torch.manual_seed(0)
    drawn = [RandomErasing.get_params(image, defaults.scale, defaults.ratio, [0.0])[:4] for _ in range(draws)]
    for ours, theirs in zip(figures_of(boxes[erased]), figures_of(np.array(drawn)), strict=True):
        assert kolmogorov_smirnov(ours, theirs) < 1.95 * (1 / len(ours) + 1 / draws) ** 0.5  # p = 0.001


def figures_of(boxes):
    """Of rectangles (top, left, height, width): area, logarithm of the aspect, and where they lie, from 0 to 1."""
    top, left, height, width = boxes.T.astype(float)
    return height * width, np.log(height / width), top / (32 - height), left / (32 - width)


def kolmogorov_smirnov(first, second):
    """The largest distance between two samples' distribution functions."""
    values = np.concatenate([first, second])
    one, other = (np.searchsorted(np.sort(sample), values, side="right") / len(sample) for sample in (first, second))
    return np.abs(one - other).max()


def test_half_of_the_images_are_mixed_as_cutmixs_code_does():
    boxes = training_plan(0, 0, IMAGES, "cutmix").cutmix
    rng = np.random.default_rng(0)
    centre, side = rng.integers(32, size=(IMAGES, 2)), (32 * np.sqrt(1 - rng.random(IMAGES))).astype(int)
    low, high = ((centre + offset[:, None]).clip(0, 32) for offset in (-(side // 2), side // 2))
    theirs = (high - low).prod(1)
    theirs = np.where(rng.random(IMAGES) < 0.5, theirs, 0)
    ours = boxes[:, 2] * boxes[:, 3]
    assert (ours == 0).mean() == pytest.approx((theirs == 0).mean(), abs=0.01)
    assert kolmogorov_smirnov(ours, theirs) < 1.95 * (2 / IMAGES) ** 0.5  # p = 0.001
    assert boxes.min() == 0
    assert (boxes[:, :2] + boxes[:, 2:]).max() == 32


def test_draws_are_uniform_over_their_ranges():
    plan = training_plan(0, 0, IMAGES, "crop-flip-cutout")
    top_left, bottom_right = plan.cutout[:, :2], plan.cutout[:, :2] + plan.cutout[:, 2:]
    centre = np.where(bottom_right < 32, bottom_right - 8, top_left + 8)
    for values, low, count in ((plan.crop, -4, 9), (centre, 0, 32), (plan.flip[:, None], 0, 2)):
        for column in values.T:
            seen = np.bincount(column.astype(int) - low, minlength=count)
            assert len(seen) == count
            expected = IMAGES / count
            assert np.abs(seen - expected).max() < 5 * np.sqrt(expected)


def test_alternating_flips_show_every_image_both_ways():
    plans = [training_plan(3, epoch, 1000, "reflectcrop-altflip-cutout") for epoch in range(4)]
    flips = np.array([plan.flip[np.argsort(plan.order)] for plan in plans])  # by image
    assert set(np.unique(flips)) == {0, 1}
    assert ((flips[1:] + flips[:-1]) == 1).all()
    assert 400 < flips[0].sum() < 600
    for epoch, plan in enumerate(plans):  # all else is drawn as with flip
        other = training_plan(3, epoch, 1000, "crop-flip-cutout")
        for name, same in (("order", "order"), ("reflectcrop", "crop"), ("cutout", "cutout")):
            np.testing.assert_array_equal(getattr(plan, name), getattr(other, same))


def test_evaluation_shows_the_images_as_they_are():
    plan = evaluation_plan(5)
    np.testing.assert_array_equal(plan.order, np.arange(5))
    assert plan.crop is plan.flip is plan.cutout is plan.erasing is None


@settings(deadline=None)
@given(
    images=st.integers(0, 200),
    processes=st.integers(1, 5),
    per_process=st.integers(1, 20),
    drop_last=st.booleans(),
    unit=st.sampled_from([1, 2]),
)
def test_shards_make_up_the_plan_batch_by_batch(images, processes, per_process, drop_last, unit):
    per_process *= unit
    batch_size = processes * per_process
    plan = training_plan(0, 0, images, ALL_STEPS + "-cutmix" * (unit == 2))
    shards = [plan.shard(rank, processes, batch_size, drop_last) for rank in range(processes)]
    starts = [0] * processes
    shown = images - images % batch_size if drop_last else images
    for first in range(0, shown, batch_size):
        batch = slice(first, min(first + batch_size, shown))
        # what a loader takes of each: the next per_process rows
        parts = [slice(start, start + per_process) for start in starts]
        starts = [part.stop for part in parts]
        sizes = [len(shard.order[part]) for shard, part in zip(shards, parts, strict=True)]
        units = [-(-size // unit) for size in sizes]
        assert max(units) - min(units) <= 1
        assert all(size % unit == 0 for size in list(filter(None, sizes))[:-1])  # pairs stay together
        assert sizes == sorted(sizes, reverse=True)
        for name, column in ((name, value) for name, value in vars(plan).items() if value is not None):
            joined = [getattr(shard, name)[part] for shard, part in zip(shards, parts, strict=True)]
            np.testing.assert_array_equal(np.concatenate(joined), column[batch])
    assert sum(map(len, shards)) == shown


@pytest.mark.parametrize(
    ("augmentation", "steps", "both"),
    [
        ("crop-flip", "altflip", "crop-altflip"),
        ("crop-flip", "cutout", "crop-flip-cutout"),
        ("none", "reflectcrop", "reflectcrop"),
        ("crop-flip", "altflip-reflectcrop", "reflectcrop-altflip"),
        ("crop-flip", "crop", "crop-flip"),
        ("crop-flip", "none", "none"),
    ],
)
def test_steps_replace_their_alternatives(augmentation, steps, both):
    assert with_steps(augmentation, steps) == both


def test_sizes_of_a_run():
    assert image_sizes("none") == [(32, 1.0)]
    assert image_sizes("16:.3, 24:0.65") == [(16, 0.3), (24, 0.65), (32, 1.0)]
    for schedule, total in (("none", 5), ("24:0.65", 100), ("16:0.3,24:0.65", 37), ("24:0.1", 2), ("8:0.9", 1)):
        counts = steps_of_sizes(schedule, total, total)
        assert sum(counts.values()) == total
        assert counts[32] >= (1 - max([0, *(until for _, until in image_sizes(schedule)[:-1])])) * total - 0.5
        sizes = size_of_steps(schedule, np.arange(total), total)
        assert sizes.dtype == np.int32
        assert sizes.tolist() == [size for size, count in counts.items() for _ in range(count)]
    assert steps_of_sizes("24:0.65", 100, 100) == {24: 65, 32: 35}


@pytest.mark.parametrize(
    "schedule",
    [
        "",
        "24",
        "24:1",
        "24:0",
        "24:0.00001",
        "24:65",
        "33:0.5",
        "32:0.5",
        "7:0.5",
        "24:0.5,16:0.6",
        "16:0.6,24:0.5",
        "x\n",
    ],
)
def test_sizes_that_are_no_schedule(schedule):
    with pytest.raises(UserError, match=r"^--image-size-schedule .*: must be none, or increasing sizes from 8 to 31"):
        image_sizes(schedule)

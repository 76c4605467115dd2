import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastres.data.plan import AUGMENTATIONS, evaluation_plan, training_plan

IMAGES = 50_000


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_is_a_pure_function_of_its_arguments(augmentation):
    first, again = (training_plan(3, 7, 1000, augmentation) for _ in range(2))
    for name, value in vars(first).items():
        np.testing.assert_array_equal(value, getattr(again, name))


@pytest.mark.parametrize(("seed", "epoch"), [(0, 1), (1, 0), (1, 1)])
def test_other_seeds_and_epochs_draw_anew(seed, epoch):
    first, other = training_plan(0, 0, 1000, "crop-flip-cutout"), training_plan(seed, epoch, 1000, "crop-flip-cutout")
    for name, value in vars(first).items():
        assert (value != getattr(other, name)).any(), name


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
    }


def test_draws_are_uniform_over_their_ranges():
    plan = training_plan(0, 0, IMAGES, "crop-flip-cutout")
    for values, low, count in ((plan.crop, -4, 9), (plan.cutout, 0, 32), (plan.flip[:, None], 0, 2)):
        for column in values.T:
            seen = np.bincount(column.astype(int) - low, minlength=count)
            assert len(seen) == count
            expected = IMAGES / count
            assert np.abs(seen - expected).max() < 5 * np.sqrt(expected)


def test_evaluation_shows_the_images_as_they_are():
    plan = evaluation_plan(5)
    np.testing.assert_array_equal(plan.order, np.arange(5))
    assert plan.crop is plan.flip is plan.cutout is None


@given(
    images=st.integers(0, 200),
    processes=st.integers(1, 5),
    per_process=st.integers(1, 20),
    drop_last=st.booleans(),
)
def test_shards_make_up_the_plan_batch_by_batch(images, processes, per_process, drop_last):
    plan, batch_size = training_plan(0, 0, images, "crop-flip-cutout"), processes * per_process
    shards = [plan.shard(rank, processes, batch_size, drop_last) for rank in range(processes)]
    starts = [0] * processes
    shown = images - images % batch_size if drop_last else images
    for first in range(0, shown, batch_size):
        batch = slice(first, min(first + batch_size, shown))
        # what a loader takes of each: the next per_process rows
        parts = [slice(start, start + per_process) for start in starts]
        starts = [part.stop for part in parts]
        sizes = [len(shard.order[part]) for shard, part in zip(shards, parts, strict=True)]
        assert max(sizes) - min(sizes) <= 1
        assert sizes == sorted(sizes, reverse=True)
        for name, column in vars(plan).items():
            joined = [getattr(shard, name)[part] for shard, part in zip(shards, parts, strict=True)]
            np.testing.assert_array_equal(np.concatenate(joined), column[batch])
    assert sum(map(len, shards)) == shown

import numpy as np
import pytest

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

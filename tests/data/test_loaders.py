"""Both loaders apply one plan: their batches are compared with a NumPy reference and with each other."""

import io
import pkgutil
import struct
from functools import partial

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torchvision.transforms import functional as F

from fastres.data import choose_loader, create_loader, pixels_in_memory
from fastres.data.eager import mean_and_std
from fastres.data.image_folder import decode_image, folder
from fastres.data.plan import EpochPlan, evaluation_plan, resized, training_plan
from fastres.data.splits import CIFAR10_MEAN, CIFAR10_STD, Dataset, Split
from fastres.errors import UserError
from tests.conftest import write_folder

dali = pytest.importorskip("fastres.data.dali")

LOADERS = ("dali", "eager")
AUGMENTATIONS = ("none", "crop-flip", "crop-flip-cutout", "erasing", "reflectcrop-altflip-cutout-erasing")
CPU = torch.device("cpu")
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


def make_loader(name, split, plan_of_epoch, dataset, batch_size=16, device="cpu", **options):
    return create_loader(
        name,
        split,
        plan_of_epoch,
        batch_size=batch_size,
        mean=dataset.mean,
        std=dataset.std,
        device=torch.device(device),
        **options,
    )


def epoch_of(loader, epoch=0):
    batches = list(loader.epoch(epoch))  # kept, so that a buffer that is used again would be seen
    assert len(batches) == len(loader)
    return torch.cat([images.cpu() for images, _ in batches]), torch.cat([labels.cpu() for _, labels in batches])


def reference(dataset: Dataset, split: Split, plan: EpochPlan) -> np.ndarray:
    """The definition, in float64; a list of images where sizes differ."""
    out = []
    for i, index in enumerate(plan.order):
        image = split.images[index]
        full = len(image)
        around = ((full // 8, full // 8), (full // 8, full // 8), (0, 0))
        if plan.crop is not None:
            top, left = plan.crop[i] + full // 8
            image = np.pad(image, around)[top : top + full, left : left + full]
        if plan.reflectcrop is not None:
            top, left = plan.reflectcrop[i] + full // 8
            image = np.pad(image, around, mode="reflect")[top : top + full, left : left + full]
        if plan.flip is not None and plan.flip[i]:
            image = image[:, ::-1]
        image = (image / 255.0 - dataset.mean) / dataset.std
        if plan.size is not None:
            weights = triangles(plan.size[i], full)
            image = np.einsum("yh,xw,hwc->yxc", weights, weights, image)
        for box in (plan.cutout, plan.erasing):
            if box is not None:
                top, left, height, width = box[i].astype(int)
                image[top : top + height, left : left + width] = 0
        out.append(image.transpose(2, 0, 1))
    return np.stack(out) if plan.size is None else out


def triangles(size: int, full: int) -> np.ndarray:
    """The weights [size, full] of bilinear interpolation whose filter is as wide as the scale (antialiased), with the
    border's values beyond the border."""
    scale = full / size
    pixels = np.arange(-full, 2 * full)
    distance = np.abs(pixels + 0.5 - (np.arange(size)[:, None] + 0.5) * scale)
    weights = np.zeros((size, full))
    np.add.at(weights.T, pixels.clip(0, full - 1), np.maximum(1 - distance / scale, 0).T)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("pair", [lambda images, labels: (images, labels.astype(np.uint8)),
                                  lambda images, labels: (torch.from_numpy(images), labels.tolist())])  # fmt: skip
def test_a_pair_of_arrays_does_for_a_split(pair, name, arrays):
    split = arrays.train
    options = {"mean": CIFAR10_MEAN, "std": CIFAR10_STD, "device": torch.device("cpu"), "workers": 2}
    expected = create_loader(name, split, lambda epoch: training_plan(0, epoch, 60, "crop-flip"), 128, **options)
    loader = create_loader(
        name, pair(split.images, split.labels), lambda epoch: training_plan(0, epoch, 60, "crop-flip")
    )
    for ours, theirs in zip(epoch_of(loader, 1), epoch_of(expected, 1), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("name", LOADERS)
def test_arrays_that_no_loader_takes(name, arrays):
    images, labels = arrays.train.images, arrays.train.labels
    for data, message in (
        ((images / 255, labels), r"images: must be uint8 \[60, 32, 32, 3\] like the labels, not float64 \[60, 32"),
        ((images.transpose(0, 3, 1, 2), labels), r"not uint8 \[60, 3, 32, 32\]"),
        ((images[:59], labels), r"not uint8 \[59, 32, 32, 3\]"),
        ((images, labels == 1), r"labels: must be integers \[N\], not bool \[60\]"),
        ((images, np.eye(2, dtype=int)[labels]), r"labels: must be integers \[N\], not int64 \[60, 2\]"),
    ):
        with pytest.raises(UserError, match=message):
            create_loader(name, data, lambda epoch: evaluation_plan(60))


@pytest.mark.parametrize(
    ("name", "target", "argument"),
    [
        ("dali", "fastres.data.dali.Pipeline", "num_threads"),
        ("eager", "fastres.data.eager.DataLoader", "num_workers"),
    ],
)
def test_as_many_workers_as_asked_for(name, target, argument, arrays, monkeypatch):
    seen, kind = [], pkgutil.resolve_name(target)
    monkeypatch.setattr(target, lambda *args, **options: seen.append(options[argument]) or kind(*args, **options))
    epoch_of(make_loader(name, arrays.test, lambda epoch: evaluation_plan(20), arrays, workers=1))
    assert set(seen) == {1}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("name", LOADERS)
def test_batches_are_what_the_plan_says(name, augmentation, device, arrays, monkeypatch):
    monkeypatch.setattr(dali, "REFLECTED_AT_ONCE", 16)
    split = Split(arrays.train.images, np.arange(60))
    plan_of_epoch = partial(training_plan, 5, num_images=60, augmentation=augmentation)
    loader = make_loader(name, split, plan_of_epoch, arrays, device=device)
    for epoch in (0, 1):
        plan = plan_of_epoch(epoch)
        images, labels = epoch_of(loader, epoch)
        np.testing.assert_array_equal(labels, plan.order)
        np.testing.assert_allclose(images, reference(arrays, split, plan), atol=2e-6)


@pytest.mark.parametrize("name", LOADERS)
def test_a_plan_of_ones_own_may_crop_twice(name, arrays):
    crops = (training_plan(5, 0, 60, "crop").crop, training_plan(6, 0, 60, "crop").crop)
    plan = EpochPlan(np.arange(60), crop=crops[0], reflectcrop=crops[1])
    images, _ = epoch_of(make_loader(name, arrays.train, lambda epoch: plan, arrays))
    np.testing.assert_allclose(images, reference(arrays, arrays.train, plan), atol=2e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", LOADERS)
def test_batches_of_smaller_images(name, device, arrays):
    sizes = np.repeat([12, 24, 27, 32], 16)[:60].astype(np.int32)  # by batch
    plan = resized(training_plan(5, 0, 60, "crop-flip-cutout-erasing"), sizes)
    assert {int(width) for width in plan.cutout[:16, 3]} <= set(range(3, 7))
    loader = make_loader(name, arrays.train, lambda epoch: plan, arrays, device=device)
    batches = [images.cpu() for images, _ in loader.epoch(0)]
    assert [list(images.shape[1:]) for images in batches] == [[3, size, size] for size in (12, 24, 27, 32)]
    images = [image for batch in batches for image in batch]
    for ours, expected in zip(images, reference(arrays, arrays.train, plan), strict=True):
        np.testing.assert_allclose(ours, expected, atol=2e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("steps", ["crop-flip-cutout-erasing", "reflectcrop"])
@pytest.mark.parametrize("name", LOADERS)
def test_batches_of_larger_images(name, steps, device, arrays, rng):
    split = Split(rng.integers(0, 256, (20, 40, 40, 3), np.uint8), np.arange(20), size=40)
    plan = training_plan(5, 0, 20, steps, image_size=40)
    column = plan.crop if plan.reflectcrop is None else plan.reflectcrop
    assert (column.min(), column.max()) == (-5, 5)
    if plan.cutout is not None:
        assert plan.cutout[:, 2:].max() == 20
        assert (plan.cutout[:, :2] + plan.cutout[:, 2:]).max() == 40
    for smaller in (plan, resized(plan, np.repeat([16, 40], 10).astype(np.int32), 40)):
        batches = make_loader(name, split, lambda epoch, plan=smaller: plan, arrays, 10, device).epoch(0)
        images = [image.cpu() for batch, _ in batches for image in batch]
        for ours, expected in zip(images, reference(arrays, split, smaller), strict=True):
            np.testing.assert_allclose(ours, expected, atol=2e-5)


@pytest.mark.parametrize("decode", ["once", "every-epoch"])
@pytest.mark.parametrize("name", LOADERS)
def test_files_are_resized_to_the_size_asked_for(name, decode, arrays, tmp_path):
    """As Pillow resizes them, to within the three levels by which decoders of JPEG files differ, and rounding."""
    root = write_folder(tmp_path, arrays, size=40)
    split = folder(root, size=64).train
    assert (split.size, split.resize, folder(root, size=40).train.resize) == (64, True, False)
    loader = make_loader(name, split, lambda epoch: evaluation_plan(60), arrays, decode=decode)
    whole = epoch_of(loader)[0] * torch.tensor(arrays.std)[:, None, None] + torch.tensor(arrays.mean)[:, None, None]
    files = [decode_image(file).resize((64, 64), Image.Resampling.BILINEAR) for file in split.images]
    expected = torch.from_numpy(np.stack([np.asarray(file) for file in files])).permute(0, 3, 1, 2)
    assert (whole * 255 - expected).abs().max() < 4.6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", [(32,) * 4, (12, 24, 27, 32)])
@pytest.mark.parametrize("step", ["mixup", "cutmix"])
@pytest.mark.parametrize("name", LOADERS)
def test_neighbours_in_a_batch_are_mixed(name, step, sizes, device, arrays):
    labels = np.arange(59) % 5
    split = Split(arrays.train.images[:59], labels)
    plan = training_plan(5, 0, 59, f"crop-cutout-{step}")
    if sizes[0] < 32:
        plan = resized(plan, np.repeat(sizes, 15)[:59].astype(np.int32))
    whole = reference(arrays, split, plan)
    loader = make_loader(name, split, lambda epoch: plan, arrays, batch_size=15, device=device, num_classes=7)
    mixed, shares = zip(*((images.cpu(), labels.cpu()) for images, labels in loader.epoch(0)), strict=True)
    assert [list(part.shape) for part in shares] == [[15, 7]] * 3 + [[14, 7]]
    shares = torch.cat(shares)
    for i, image in enumerate(image for batch in mixed for image in batch):
        start = i - i % 15
        partner = start + ((i - start) ^ 1)
        if partner - start >= min(15, 59 - start):
            partner = i
        expected = whole[i].copy()
        if step == "mixup":
            share = plan.mixup[i]
            expected = share * expected + (1 - share) * whole[partner]
        else:
            top, left, height, width = plan.cutmix[i].astype(int)
            inside = np.s_[:, top : top + height, left : left + width]
            expected[inside] = whole[partner][inside]
            share = 1 - height * width / sizes[i // 15] ** 2
        np.testing.assert_allclose(image, expected, atol=2e-5)
        target = np.zeros(7)
        target[labels[plan.order[i]]] += share
        target[labels[plan.order[partner]]] += 1 - share
        np.testing.assert_allclose(shares[i], target, atol=1e-6)


def test_the_number_of_classes_where_it_is_not_given(arrays):
    plan = training_plan(5, 0, 60, "mixup")
    assert epoch_of(make_loader("eager", arrays.train, lambda epoch: plan, arrays))[1].shape == (60, 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", LOADERS)
def test_erasing_is_torchvisions(name, device, arrays):
    boxes = [(0, 0, 0, 0), (0, 0, 31, 31), (3, 7, 12, 5), (30, 31, 2, 1), (31, 0, 1, 31)]
    plan = EpochPlan(np.arange(5), erasing=np.array(boxes, np.float32))
    erased, _ = epoch_of(make_loader(name, arrays.train, lambda epoch: plan, arrays, device=device))
    whole, _ = epoch_of(make_loader(name, arrays.train, lambda epoch: evaluation_plan(5), arrays, device=device))
    expected = [F.erase(image, *box, torch.zeros(1)) for image, box in zip(whole, boxes, strict=True)]
    torch.testing.assert_close(erased, torch.stack(expected), rtol=0, atol=0)


@pytest.mark.gpu
def test_a_batch_is_kept_while_the_device_lags_behind(arrays):
    split = Split(arrays.train.images, np.arange(60))
    plan_of_epoch = partial(training_plan, 5, num_images=60, augmentation="crop-flip-cutout")
    loader = make_loader("dali", split, plan_of_epoch, arrays, device="cuda")
    seen = []
    for epoch in range(5):
        for images, labels in loader.epoch(epoch):
            torch.cuda._sleep(10**7)  # clock cycles
            seen.append((images.clone(), labels.clone()))
            del images, labels
    images, labels = (torch.cat(parts).cpu() for parts in zip(*seen, strict=True))
    plans = [plan_of_epoch(epoch) for epoch in range(5)]
    np.testing.assert_array_equal(labels, np.concatenate([plan.order for plan in plans]))
    expected = np.concatenate([reference(arrays, split, plan) for plan in plans])
    np.testing.assert_allclose(images, expected, atol=2e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp"])
def test_loaders_agree_on_files(suffix, augmentation, device, arrays, tmp_path):
    dataset = folder(write_folder(tmp_path, arrays, suffix))
    plan_of_epoch = partial(training_plan, 1, num_images=60, augmentation=augmentation)
    dali, eager = (
        epoch_of(make_loader(name, dataset.train, plan_of_epoch, dataset, device=device)) for name in LOADERS
    )
    # JPEG decoders may differ by 3 of 255 levels; the others are exact, but for the rounding of float32
    levels = (dali[0] - eager[0]).abs() * torch.tensor(dataset.std).view(3, 1, 1) * 255
    assert levels.max() <= (3 if suffix == ".jpg" else 0) + 1e-3
    torch.testing.assert_close(dali[1], eager[1])


def odd_images():
    """JPEG, PNG, WebP and BMP files of one smooth image in modes and variants that occur, by name."""
    rows, columns = np.mgrid[:32, :32] * 8
    image = Image.fromarray(np.stack([rows, columns, (rows + columns) // 2], axis=-1).astype(np.uint8))
    grey, palette, turned = image.convert("L"), image.quantize(64), image.rotate(90)
    transparent = image.copy()
    transparent.putalpha(grey)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    xmp = b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    deep = np.random.default_rng(0).integers(0, 2**16, (32, 32)).astype(np.uint16)
    variants = {
        "jpeg-grey": (grey, "JPEG", {}),
        "jpeg-cmyk": (image.convert("CMYK"), "JPEG", {}),
        "jpeg-progressive": (image, "JPEG", {"progressive": True}),
        "jpeg-turned-by-exif": (image, "JPEG", {"exif": exif}),
        "jpeg-turned-by-xmp": (image, "JPEG", {"xmp": xmp}),
        "jpeg-of-several": (image, "MPO", {"save_all": True, "append_images": [turned]}),
        "png-grey": (grey, "PNG", {}),
        "png-bits": (grey.convert("1"), "PNG", {}),
        "png-16-bit": (Image.fromarray(deep), "PNG", {}),
        "png-palette": (palette, "PNG", {}),
        "png-palette-transparent": (palette, "PNG", {"transparency": bytes(range(64))}),
        "png-transparent": (transparent, "PNG", {}),
        "png-grey-transparent": (transparent.convert("LA"), "PNG", {}),
        "png-turned-by-exif": (image, "PNG", {"exif": exif}),
        "webp-lossy": (image, "WEBP", {"quality": 50}),
        "webp-lossless": (image, "WEBP", {"lossless": True}),
        "webp-transparent": (transparent, "WEBP", {}),
        "webp-lossless-transparent": (transparent, "WEBP", {"lossless": True, "exact": True}),
        "webp-turned-by-exif": (image, "WEBP", {"exif": exif}),
        "webp-lossless-turned-by-exif": (image, "WEBP", {"exif": exif, "lossless": True}),  # which DALI refuses
        "webp-turned-by-xmp": (image, "WEBP", {"xmp": xmp}),
        "webp-animated": (image, "WEBP", {"save_all": True, "append_images": [turned]}),
        "bmp": (image, "BMP", {}),
        "bmp-grey": (grey, "BMP", {}),
        "bmp-bits": (grey.convert("1"), "BMP", {}),
        "bmp-palette": (palette, "BMP", {}),
        "bmp-transparent": (transparent, "BMP", {}),
        "png-animated": (image, "PNG", {"save_all": True, "append_images": [turned]}),
    }
    for name, (source, kind, options) in variants.items():
        file = io.BytesIO()
        source.save(file, kind, **options)
        yield name, file.getvalue()
    yield "png-without-its-end", file.getvalue()[:-12]  # which DALI refuses


def bmp_by_hand(bits, compression, pixels, masks=b"", palette=b"", height=32):
    """A BMP of 32 columns in one of the forms that Pillow reads and does not write."""
    start = 54 + len(masks) + len(palette)
    file = struct.pack("<2sIHHI", b"BM", start + len(pixels), 0, 0, start)
    image = struct.pack("<IiiHHIIiiII", 40, 32, height, 1, bits, compression, len(pixels), 0, 0, len(palette) // 4, 0)
    return file + image + masks + palette + pixels


def odd_bmps():
    rng = np.random.default_rng(0)
    palette = rng.bytes(4 * 256)
    runs8 = b"".join(bytes([12, *rng.bytes(1), 20, *rng.bytes(1), 0, 0]) for _ in range(32)) + b"\0\1"
    runs4 = b"".join(bytes([32, *rng.bytes(1), 0, 0]) for _ in range(32)) + b"\0\1"
    yield "bmp-32-bit", bmp_by_hand(32, 0, rng.bytes(4096))
    yield "bmp-masks", bmp_by_hand(32, 3, rng.bytes(4096), struct.pack("<III", 0xFF0000, 0xFF00, 0xFF))
    yield "bmp-top-down", bmp_by_hand(24, 0, rng.bytes(3072), height=-32)
    yield "bmp-4-bit", bmp_by_hand(4, 0, rng.bytes(512), palette=palette[:64])
    yield "bmp-runs", bmp_by_hand(8, 1, runs8, palette=palette)
    yield "bmp-4-bit-runs", bmp_by_hand(4, 2, runs4, palette=palette[:64])  # which DALI refuses


@pytest.mark.parametrize("masks", [(0xF800, 0x7E0, 0x1F), (0x7C00, 0x3E0, 0x1F)])
def test_a_bmp_that_the_loaders_decode_differently_is_refused(masks, arrays, tmp_path):
    content = bmp_by_hand(16, 3, np.random.default_rng(0).bytes(2048), struct.pack("<III", *masks))
    assert np.asarray(Image.open(io.BytesIO(content))).std() > 50
    root = write_folder(tmp_path, arrays, ".png")
    (root / "train/dark/0000.bmp").write_bytes(content)
    with pytest.raises(UserError, match=r"not readable as .*: train/dark/0000.bmp; replace"):
        folder(root)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.filterwarnings("error:::PIL.Image")
@pytest.mark.parametrize(
    ("name", "content"), [*odd_images(), *odd_bmps()], ids=lambda value: value if isinstance(value, str) else ""
)
def test_loaders_agree_on_odd_images(name, content, device, arrays, tmp_path):
    for part, suffix in (("train", ".jpg"), ("test", ".png")):
        (tmp_path / part / "one").mkdir(parents=True)
        (tmp_path / part / "one" / f"image{suffix}").write_bytes(content)  # the content says what it is, not the name
    dataset = folder(tmp_path)
    dali, eager = (
        epoch_of(make_loader(loader, dataset.train, lambda epoch: evaluation_plan(1), dataset, device=device))[0]
        for loader in LOADERS
    )
    levels = (dali - eager).abs() * torch.tensor(dataset.std).view(3, 1, 1) * 255
    assert levels.max() <= (3 if name.startswith("jpeg") else 0) + 1e-3
    assert dali.std() > 0.1


def test_what_comes_after_a_refused_image_is_not_displaced(arrays, tmp_path):
    root = write_folder(tmp_path, arrays, ".png", 48)
    damaged = root / "train/dark/0040.png"
    damaged.write_bytes(damaged.read_bytes()[:-12])
    split = folder(root).train
    eager = (decode_image(content).resize((32, 32), Image.Resampling.BILINEAR) for content in split.images)
    pixels = dali.decode(split, 1, CPU).astype(int)
    assert len(pixels) > 3 * dali.DECODE_BATCH_LARGE
    for ours, theirs in zip(pixels, eager, strict=True):
        assert abs(ours - np.asarray(theirs)).mean() < 3


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize(("size", "augmentation"), [(32, "crop-flip"), (48, "reflectcrop-flip")])
def test_decoding_once_is_decoding_in_every_epoch(name, size, augmentation, arrays, tmp_path):
    root = write_folder(tmp_path, arrays, ".png", size)
    if size == 32:  # where DALI refuses a file, a resized one may differ by rounding
        damaged = root / "train/dark/0040.png"
        damaged.write_bytes(damaged.read_bytes()[:-12])
    split = folder(root).train
    plan_of_epoch = partial(training_plan, 5, num_images=60, augmentation=augmentation)
    once, every = (
        [epoch_of(make_loader(name, split, plan_of_epoch, arrays, decode=decode), epoch) for epoch in (0, 1)]
        for decode in ("once", "every-epoch")
    )
    for ours, theirs in zip(once, every, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("name", LOADERS)
def test_another_word_for_decode_is_refused(name, arrays):
    with pytest.raises(UserError, match="decode 'never': must be one of auto, once, every-epoch"):
        make_loader(name, arrays.train, lambda epoch: evaluation_plan(60), arrays, decode="never")


def test_the_largest_image_is_resized_alike(tmp_path):
    for part in ("train", "test"):
        (tmp_path / part / "one").mkdir(parents=True)
        Image.linear_gradient("L").resize((8192, 8192)).save(tmp_path / part / "one/image.png", compress_level=1)
    dataset = folder(tmp_path)
    dali, eager = (
        epoch_of(make_loader(loader, dataset.train, lambda epoch: evaluation_plan(1), dataset))[0] for loader in LOADERS
    )
    assert ((dali - eager).abs() * torch.tensor(dataset.std).view(3, 1, 1) * 255).max() <= 2


def test_a_larger_image_is_refused(arrays, tmp_path, recwarn):
    root = write_folder(tmp_path, arrays, ".png")
    Image.new("L", (10_000, 9_000)).save(root / "train/dark/0000.png", compress_level=1)
    with pytest.raises(UserError, match=r"up to 67 megapixels: train/dark/0000.png; replace"):
        folder(root)
    assert not recwarn.list


def test_loaders_agree_on_real_photographs(cifar10_jpeg):
    plan_of_epoch = partial(training_plan, 1, num_images=len(cifar10_jpeg.train), augmentation="crop-flip-cutout")
    dali, eager = (
        epoch_of(make_loader(name, cifar10_jpeg.train, plan_of_epoch, cifar10_jpeg, 128)) for name in LOADERS
    )
    levels = (dali[0] - eager[0]).abs() * torch.tensor(cifar10_jpeg.std).view(3, 1, 1) * 255
    assert levels.max() <= 3
    torch.testing.assert_close(dali[1], eager[1])


@pytest.mark.parametrize("size", [48, 20])
def test_images_of_another_size_are_resized_alike(size, arrays, tmp_path):
    dataset = folder(write_folder(tmp_path, arrays, ".png", size))
    assert dataset.train.resize
    plan_of_epoch = partial(training_plan, 0, num_images=60, augmentation="crop-flip")
    dali, eager = (epoch_of(make_loader(name, dataset.train, plan_of_epoch, dataset))[0] for name in LOADERS)
    levels = (dali - eager).abs() * torch.tensor(dataset.std).view(3, 1, 1) * 255
    # noise is the hardest case; the two antialiasing filters differ in their support
    assert levels.mean() < 0.5
    assert levels.max() <= 10


@pytest.mark.parametrize(("images", "sizes"), [(60, [25, 25, 10]), (50, [25, 25]), (0, [])])
@pytest.mark.parametrize("name", LOADERS)
def test_as_many_batches_as_the_plan_fills(name, images, sizes, arrays):
    loader = make_loader(name, arrays.train, lambda epoch: evaluation_plan(images), arrays, 25)
    assert len(loader) == len(sizes)
    for epoch in (0, 1):
        assert [len(labels) for _, labels in loader.epoch(epoch)] == sizes


@pytest.mark.parametrize("name", LOADERS)
def test_epochs_out_of_sequence_and_half_read(name, arrays):
    plan_of_epoch = partial(training_plan, 0, num_images=60, augmentation="crop-flip")
    loader = make_loader(name, arrays.train, plan_of_epoch, arrays)
    in_sequence = [epoch_of(loader, epoch)[0] for epoch in (0, 1, 2)]
    fresh = make_loader(name, arrays.train, plan_of_epoch, arrays)
    torch.testing.assert_close(epoch_of(fresh, 2)[0], in_sequence[2])
    next(iter(fresh.epoch(0)))
    torch.testing.assert_close(epoch_of(fresh, 1)[0], in_sequence[1])
    torch.testing.assert_close(epoch_of(fresh, 1)[0], in_sequence[1])


@pytest.mark.parametrize("name", LOADERS)
def test_an_epoch_can_begin_in_its_middle(name, arrays):
    plan_of_epoch = partial(training_plan, 0, num_images=60, augmentation="crop-flip-cutout")
    loader = make_loader(name, arrays.train, plan_of_epoch, arrays)
    whole = [images.clone() for images, _ in loader.epoch(1)]
    rest = [images.clone() for images, _ in loader.epoch(1, first_batch=2)]
    torch.testing.assert_close(rest, whole[2:], rtol=0, atol=0)
    assert list(loader.epoch(1, first_batch=len(loader))) == []


def test_dali_gives_channels_last(arrays):
    loader = make_loader("dali", arrays.train, lambda epoch: evaluation_plan(60), arrays)
    images, labels = next(iter(loader.epoch(0)))
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)


def test_pixels_stay_in_memory_up_to_a_quarter_of_what_is_free(monkeypatch):
    monkeypatch.setattr("fastres.data.free_memory", lambda: 4 * 10 * 3 * 40 * 40)
    assert pixels_in_memory(10)
    assert not pixels_in_memory(11)


def test_without_dali_the_choice_is_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "nvidia.dali", None)
    name, why = choose_loader("auto")
    assert name == "eager"
    assert "DALI does not import" in why
    with pytest.raises(UserError, match=r"--loader dali.*pip install"):
        choose_loader("dali")


def test_mean_and_std_of_the_channels(arrays, image_folder):
    pixels = arrays.train.images.reshape(-1, 3) / 255
    ours = mean_and_std(arrays.train)
    np.testing.assert_allclose(ours, [pixels.mean(0), pixels.std(0)], rtol=1e-9)
    np.testing.assert_allclose(mean_and_std(folder(image_folder, size=16).train)[0], ours[0], atol=0.01)
    black = Split(np.zeros((2, 32, 32, 3), np.uint8), np.arange(2))
    assert mean_and_std(black) == ((0.0,) * 3, (1.0,) * 3)

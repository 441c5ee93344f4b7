import gc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoImageProcessor

from hf_ctxseg import CtxSegImageProcessor
from hf_ctxseg.picture_reading import to_8_bit, to_rgb

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (13, 17, 3), np.uint8)
GREY = PIXELS[..., 0]
DARK = (GREY.astype(int) * 10 // 257).astype(np.uint8)  # 16-bit values far below the top
INKS = [*(255 - PIXELS).transpose(2, 0, 1), np.zeros_like(GREY)]
ALPHA = RNG.integers(0, 256, (13, 17), np.uint8)
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def normalised(pixels, mean=MEAN, std=STD):
    """The formula: (H, W, 3) or (H, W) bytes to (3, H, W)."""
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    return ((pixels / 255 - mean) / std).transpose(2, 0, 1).astype(np.float32)


def check(image, pixels, processor=None, **arguments):
    values = (processor or CtxSegImageProcessor())(image, return_tensors="pt", **arguments)["pixel_values"]
    assert values.dtype == torch.float32
    assert values.shape == (1, 3, *pixels.shape[:2])
    np.testing.assert_allclose(values[0].numpy(), normalised(pixels), atol=2e-6)


def with_palette(transparency=None):
    image = Image.fromarray(GREY // 64)
    image.putpalette([10, 20, 30, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image, np.array([[10, 20, 30], [200, 0, 0], [0, 200, 0], [0, 0, 200]], np.uint8)[GREY // 64]


def big_endian(values):
    return Image.frombytes("I;16B", values.shape[::-1], values.astype(">u2").tobytes())


def floating(values):
    return Image.fromarray(values.astype(np.float32))


PICTURES = {
    "RGB": (Image.fromarray(PIXELS), PIXELS),
    "L": (Image.fromarray(GREY), GREY),
    "LA": (Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)]), GREY),
    "RGBA": (Image.fromarray(np.dstack([PIXELS, ALPHA])), PIXELS),
    "P": with_palette(),
    "P, one transparent colour": with_palette(1),
    "P, alpha for each colour": with_palette(bytes([0, 128, 255])),
    "1": (Image.fromarray(GREY > 127), (GREY > 127).astype(np.uint8) * 255),
    "CMYK": (Image.merge("CMYK", [Image.fromarray(plane) for plane in INKS]), PIXELS),
    "I;16": (Image.fromarray(GREY.astype(np.uint16) * 257), GREY),
    "I;16, dark": (Image.fromarray(GREY.astype(np.uint16) * 10), DARK),
    "I;16B": (big_endian(GREY.astype(np.uint16) * 257), GREY),
    "I;16B, dark": (big_endian(GREY.astype(np.uint16) * 10), DARK),
    "I, 8 bit": (Image.fromarray(GREY.astype(np.int32)), GREY),
    "I, 16 bit": (Image.fromarray(GREY.astype(np.int32) * 257), GREY),
    "F, 0 to 1": (floating(GREY / 255), GREY),
    "F, 0 to 255": (floating(GREY), GREY),
    "F, 16 bit": (floating(GREY * 257.0), GREY),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_of_every_mode(name):
    image, pixels = PICTURES[name]
    assert image.mode == name.partition(",")[0]
    check(image, pixels)
    assert to_rgb(image).mode == "RGB"


ARRAYS = {
    "uint8": (PIXELS, PIXELS),
    "channels first": (PIXELS.transpose(2, 0, 1), PIXELS),
    "grey": (GREY, GREY),
    "one channel": (GREY[..., None], GREY),
    "four channels": (np.dstack([PIXELS, ALPHA]), PIXELS),
    "bool": (PIXELS > 127, (PIXELS > 127).astype(np.uint8) * 255),
    "grey bool": (GREY > 127, (GREY > 127).astype(np.uint8) * 255),
    "uint16": (PIXELS.astype(np.uint16) * 257, PIXELS),
    "int64": (PIXELS.astype(np.int64), PIXELS),
    "int32 of 16 bit": (PIXELS.astype(np.int32) * 257, PIXELS),
    "float64, 0 to 1": (PIXELS / 255, PIXELS),
    "float32, 0 to 255": (PIXELS.astype(np.float32), PIXELS),
    "float32 with alpha, 0 to 1": (np.dstack([PIXELS, ALPHA]).astype(np.float32) / 255, PIXELS),
}


@pytest.mark.parametrize("kind", ["array", "tensor"])
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_and_tensors_of_every_type(name, kind):
    array, pixels = ARRAYS[name]
    check(array if kind == "array" else torch.from_numpy(np.ascontiguousarray(array)), pixels)


def test_half_precision_tensors_are_read():
    ones_and_zeros = torch.tensor(GREY > 127).to(torch.bfloat16).expand(3, -1, -1)
    check(ones_and_zeros, (GREY > 127).astype(np.uint8) * 255)


def test_read_only_arrays_are_read_and_left():
    view = np.asarray(Image.fromarray(PIXELS))
    assert not view.flags.writeable
    check(view, PIXELS)
    array = PIXELS.copy()
    CtxSegImageProcessor()(array, return_tensors="pt")
    assert np.array_equal(array, PIXELS)


def test_scaled_arrays_pass_unchanged_where_rescaling_is_off():
    array = (PIXELS / 255 - 0.5).astype(np.float32)
    values = CtxSegImageProcessor(do_rescale=False, do_normalize=False)(array, return_tensors="pt")["pixel_values"]
    np.testing.assert_allclose(values[0].numpy(), array.transpose(2, 0, 1), atol=1e-7)


@pytest.mark.parametrize("values", [PIXELS.astype(np.float32) - 300, PIXELS.astype(np.int32) * 1000])
def test_values_of_unknown_range_are_refused(values):
    for image in (values, torch.from_numpy(values), Image.fromarray(values[..., 0].copy())):
        with pytest.raises(ValueError, match=r"values run from .* do_rescale"):
            CtxSegImageProcessor()(image)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("do_rescale", [True, False])
def test_values_that_are_no_numbers_are_refused(bad, do_rescale):
    values = PIXELS.astype(np.float32)
    values[3, 4, 1] = bad
    for image in (values, torch.from_numpy(values), Image.fromarray(values[..., 1].copy())):
        with pytest.raises(ValueError, match="NaN or infinite"):
            CtxSegImageProcessor(do_rescale=do_rescale)(image)


def test_to_8_bit_keeps_the_order_of_all_16_bit_values():
    values = np.arange(65536, dtype=np.uint16)
    scaled = to_8_bit(values)
    assert scaled[0] == 0 and scaled[-1] == 255
    assert set(np.unique(scaled)) == set(range(256))
    assert (np.diff(scaled.astype(int)) >= 0).all()


UPRIGHT = {  # what a viewer does to stored pixels, by the EXIF standard
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).swapaxes(0, 1),
    8: lambda stored: np.rot90(stored, 1),
}


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_rotation_in_exif_is_applied(orientation, suffix, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"picture.{suffix}"
    Image.fromarray(PIXELS).save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    check(str(path), UPRIGHT[orientation](PIXELS))
    with Image.open(path) as image:
        check(image, UPRIGHT[orientation](PIXELS))


def test_paths_are_opened_and_freed(tmp_path):
    first, second = Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)
    several = {"save_all": True, "append_images": [second]}
    for name, arguments in {"a.png": {}, "a.tif": several, "a.webp": several | {"lossless": True}}.items():
        first.save(tmp_path / name, **arguments)
        check(tmp_path / name, PIXELS)  # the first of several pages
        check(str(tmp_path / name), PIXELS)
    gc.collect()  # a file left open would be a ResourceWarning here
    two = CtxSegImageProcessor()([tmp_path / "a.png", str(tmp_path / "a.tif")], return_tensors="pt")
    assert two["pixel_values"].shape == (2, 3, 13, 17)


def test_normalisation_can_be_chosen():
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    values = CtxSegImageProcessor(image_mean=mean, image_std=std)(PIXELS, return_tensors="pt")["pixel_values"]
    np.testing.assert_allclose(values[0].numpy(), normalised(PIXELS, np.array(mean), np.array(std)), atol=2e-6)


@pytest.mark.parametrize(
    ("backbone", "mean", "std"),
    [
        ("tf_efficientnet_lite0", [0.5] * 3, [0.5] * 3),
        ("mobilenetv2_100", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ("resnet50", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ("resnet50.a1_in1k", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ],
)
def test_normalisation_is_that_of_the_backbone(backbone, mean, std):
    processor = CtxSegImageProcessor.for_backbone(backbone)
    assert list(processor.image_mean) == mean
    assert list(processor.image_std) == std
    own = CtxSegImageProcessor.for_backbone(backbone, image_mean=[0.1, 0.2, 0.3], align_corners=True)
    assert (list(own.image_mean), list(own.image_std), own.align_corners) == ([0.1, 0.2, 0.3], std, True)


@pytest.mark.parametrize("form", ["array", "int64", "L", "P", "tensor", "whole floats", "list"])
def test_label_maps_come_through_unchanged(form):
    labels = RNG.integers(0, 11, (13, 17), np.uint8)
    labels[0] = 255
    maps = {
        "array": labels,
        "int64": labels.astype(np.int64),
        "L": Image.fromarray(labels),
        "P": Image.fromarray(labels).convert("P"),
        "tensor": torch.from_numpy(labels),
        "whole floats": labels.astype(np.float32),
        "list": [labels],
    }[form]
    encoded = CtxSegImageProcessor()(PIXELS, maps, return_tensors="pt")
    assert encoded["labels"].dtype == torch.int64
    assert np.array_equal(encoded["labels"][0].numpy(), labels)
    np.testing.assert_allclose(encoded["pixel_values"][0].numpy(), normalised(PIXELS), atol=2e-6)


def test_l5_label_maps_are_resized_to_the_nearest():
    labels = np.zeros((8, 8), np.uint8)
    labels[2:, 4:] = 9
    labels[6:, :] = 255
    encoded = CtxSegImageProcessor(do_resize=True, size={"height": 24, "width": 16})(
        np.zeros((8, 8, 3), np.uint8), labels, return_tensors="pt"
    )
    assert encoded["pixel_values"].shape == (1, 3, 24, 16)
    assert np.array_equal(encoded["labels"][0].numpy(), labels.repeat(3, axis=0).repeat(2, axis=1))
    smaller = CtxSegImageProcessor(do_resize=True, size={"height": 5, "width": 3})
    shrunk = smaller(PIXELS, RNG.choice([0, 7, 255], (13, 17)).astype(np.uint8), return_tensors="pt")["labels"]
    assert set(shrunk.unique().tolist()) <= {0, 7, 255}


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (np.zeros((13, 16), np.uint8), r"label map of size \(13, 16\) .* picture of size \(13, 17\)"),
        (np.zeros((17, 13), np.uint8), r"label map of size \(17, 13\)"),
        ([np.zeros((13, 17), np.uint8)] * 2, "2 label maps for 1 pictures"),
        (Image.fromarray(PIXELS), "3 channels"),
        (np.full((13, 17), 1.5, np.float32), "one class index per pixel"),
    ],
)
def test_unfit_label_maps_are_refused(labels, text):
    with pytest.raises(ValueError, match=text):
        CtxSegImageProcessor()(PIXELS, labels, return_tensors="pt")


def test_mixed_sizes_need_a_size():
    images = [PIXELS, PIXELS[:7]]
    with pytest.raises(ValueError, match=r"2 sizes and cannot be one tensor: .*do_resize=True"):
        CtxSegImageProcessor()(images, return_tensors="pt")
    values = CtxSegImageProcessor()(images)["pixel_values"]
    assert [tuple(item.shape) for item in values] == [(3, 13, 17), (3, 7, 17)]
    np.testing.assert_allclose(values[1].numpy(), normalised(PIXELS[:7]), atol=2e-6)
    size = {"height": 6, "width": 9}
    assert CtxSegImageProcessor(do_resize=True, size=size)(images, return_tensors="pt")["pixel_values"].shape == (
        (2, 3, 6, 9)
    )


@pytest.mark.parametrize(("size", "expected"), [((100, 200), (25, 50)), ((200, 100), (40, 20)), ((80, 100), (40, 50))])
def test_largest_size_keeps_the_proportions(size, expected):
    processor = CtxSegImageProcessor(do_resize=True, size={"max_height": 40, "max_width": 50})
    values = processor(np.zeros((*size, 3), np.uint8), return_tensors="pt")["pixel_values"]
    assert values.shape == (1, 3, *expected)


def test_settings_are_saved(tmp_path):
    settings = {
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
        "do_resize": True,
        "size": {"max_height": 40, "max_width": 50},
        "align_corners": True,
    }
    processor = CtxSegImageProcessor(**settings)
    processor.save_pretrained(tmp_path)
    for loaded in (
        CtxSegImageProcessor.from_pretrained(tmp_path),
        AutoImageProcessor.from_pretrained(tmp_path, backend="torchvision"),
    ):
        assert type(loaded) is CtxSegImageProcessor
        assert loaded.to_dict() == processor.to_dict()
        assert loaded.align_corners is True
        image = np.zeros((80, 100, 3), np.uint8) + 7
        assert torch.equal(
            loaded(image, return_tensors="pt")["pixel_values"], processor(image, return_tensors="pt")["pixel_values"]
        )


@pytest.mark.parametrize("align_corners", [False, True])
def test_masks_are_the_argmax_of_upsampled_logits(align_corners):
    logits = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    sizes = [(45, 61), (3, 2)]
    processor = CtxSegImageProcessor(align_corners=align_corners)
    masks = processor.post_process_semantic_segmentation(SimpleNamespace(logits=logits), sizes)
    scored = processor.post_process_semantic_segmentation(
        SimpleNamespace(logits=logits), torch.tensor(sizes), return_segmentation_scores=True
    )
    for index, size in enumerate(sizes):
        scores = F.interpolate(logits[index : index + 1], size, mode="bilinear", align_corners=align_corners)[0]
        assert torch.equal(masks[index], scores.argmax(0))
        assert torch.equal(scored[index]["segmentation"], scores.argmax(0))
        assert torch.equal(scored[index]["segmentation_scores"], scores)


def test_masks_without_sizes_have_the_size_of_the_logits():
    logits = torch.randn(2, 4, 5, 6)
    masks = CtxSegImageProcessor().post_process_semantic_segmentation(SimpleNamespace(logits=logits))
    assert all(map(torch.equal, masks, logits.argmax(1)))


def test_masks_of_half_precision_logits():
    logits = torch.randn(1, 4, 5, 6).bfloat16()
    (mask,) = CtxSegImageProcessor().post_process_semantic_segmentation(SimpleNamespace(logits=logits), [(45, 61)])
    assert torch.equal(mask, F.interpolate(logits.float(), (45, 61), mode="bilinear")[0].argmax(0))


def test_a_size_for_each_picture_is_wanted():
    outputs = SimpleNamespace(logits=torch.randn(2, 4, 5, 6))
    with pytest.raises(ValueError, match="1 target_sizes for 2 pictures"):
        CtxSegImageProcessor().post_process_semantic_segmentation(outputs, [(45, 61)])

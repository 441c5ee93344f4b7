import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from torchvision import tv_tensors

from hf_ctxseg.augmentation import resize_pair, training_transform


def _pair(mask):
    """An image that shows its mask: class c is grey 20 * c."""
    mask = torch.as_tensor(mask, dtype=torch.uint8)
    return tv_tensors.Image((mask * 20).expand(3, *mask.shape).clone()), tv_tensors.Mask(mask)


def _blobs(height, width, seed=0, classes=5):
    """Random blocks of 8 pixels, so that most pixels are far from an edge."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, classes, (height // 8 + 1, width // 8 + 1))
    return blocks.repeat(8, 0).repeat(8, 1)[:height, :width]


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    crop=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    seed=st.integers(0, 1000),
)
def test_l5_any_size_gives_the_crop_and_no_new_label(height, width, crop, seed):
    torch.manual_seed(seed)
    image, mask = _pair(_blobs(height, width, seed))
    new_image, new_mask = training_transform(crop)(image, mask)
    assert new_image.shape == (3, *crop) and new_image.dtype == torch.uint8
    assert isinstance(new_image, tv_tensors.Image) and isinstance(new_mask, tv_tensors.Mask)
    assert new_mask.shape == crop
    assert set(new_mask.unique().tolist()) <= set(mask.unique().tolist()) | {255}


@pytest.mark.parametrize("size", [(60, 90), (200, 150), (1, 40), (40, 1)])
def test_image_and_mask_stay_aligned(size):
    transform = training_transform((64, 64), max_class_ratio=1.0, photometric=False, image_fill=(7, 7, 7))
    for seed in range(30):
        torch.manual_seed(seed)
        image, mask = transform(*_pair(_blobs(*size, seed)))
        expected = torch.where(mask == 255, 7, mask.to(torch.int64) * 20)
        wrong = (image[0].to(torch.int64) - expected).abs() > 3
        # Away from the edges of the 8-pixel blocks bilinear and nearest agree; at scale 1/2 edges take the larger part
        still = torch.nn.functional.max_pool2d(mask[None].float(), 5, 1, 2)[0] == mask
        still &= -torch.nn.functional.max_pool2d(-mask[None].float(), 5, 1, 2)[0] == mask
        assert still.any()
        assert not wrong[still].any()


def test_resize_samples_the_pixel_under_each_centre():
    mask = torch.arange(7 * 9).reshape(7, 9).to(torch.int32)
    for size in [(3, 4), (7, 9), (14, 18), (1, 1), (20, 5)]:
        rows = [int((i + 0.5) * 7 / size[0]) for i in range(size[0])]
        columns = [int((j + 0.5) * 9 / size[1]) for j in range(size[1])]
        _, resized = resize_pair(torch.zeros(3, 7, 9, dtype=torch.uint8), mask, size)
        assert torch.equal(resized.as_subclass(torch.Tensor), mask[rows][:, columns])
        pillow = PILImage.fromarray(mask.numpy()).resize(size[::-1], PILImage.Resampling.NEAREST)
        assert np.array_equal(np.asarray(pillow), resized.numpy())


def test_resized_image_agrees_with_pillow():
    pixels = torch.randint(256, (3, 40, 60), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    pillow = PILImage.fromarray(pixels.permute(1, 2, 0).numpy()).resize((25, 15), PILImage.Resampling.BILINEAR)
    image, _ = resize_pair(pixels, torch.zeros(40, 60, dtype=torch.uint8), (15, 25))
    assert np.abs(np.asarray(pillow).astype(int) - image.permute(1, 2, 0).numpy().astype(int)).max() <= 1


def test_scale_is_what_was_asked():
    # A 40-pixel square in a 200-pixel image: its area in the crop tells the scale
    mask = torch.zeros(200, 200, dtype=torch.uint8)
    mask[80:120, 80:120] = 1
    for scale in (0.5, 1.0, 1.6):
        transform = training_transform(
            (400, 400), scale=(scale, scale), max_class_ratio=1.0, photometric=False, flip=0.0
        )
        _, new = transform(*_pair(mask))
        assert (new == 1).sum().item() == pytest.approx((40 * scale) ** 2, rel=0.01)
        assert (new != 255).sum().item() == pytest.approx((200 * scale) ** 2, rel=0.01)
        assert (new[: int(200 * scale), : int(200 * scale)] != 255).all()  # padded right and below only


def test_padding_has_the_fill_colour_and_the_ignore_index():
    image, mask = _pair(torch.ones(10, 12))
    transform = training_transform((40, 40), (1.0, 1.0), 0.0, photometric=False, ignore_index=9, image_fill=(1, 2, 3))
    image, mask = transform(image, mask)
    assert (mask[:10, :12] == 1).all() and (mask[10:] == 9).all() and (mask[:, 12:] == 9).all()
    assert (image[:, 10:] == torch.tensor([1, 2, 3]).view(3, 1, 1)).all()


@pytest.mark.parametrize("ignore_index", [-100, 300])
def test_ignore_index_beyond_8_bits(ignore_index):
    transform = training_transform((8, 8), (1.0, 1.0), ignore_index=ignore_index)
    _, mask = transform(*_pair(torch.ones(4, 4)))
    assert mask.unique().tolist() == sorted({1, ignore_index})


def test_equal_seed_gives_equal_result_and_others_differ():
    transform = training_transform((32, 32))
    image, mask = tv_tensors.Image(torch.randint(256, (3, 80, 90)).to(torch.uint8)), _pair(_blobs(80, 90))[1]
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(transform(image, mask))
    assert torch.equal(drawn[0][0], drawn[1][0]) and torch.equal(drawn[0][1], drawn[1][1])
    assert not torch.equal(drawn[0][0], drawn[2][0])


def test_flip_flips_both():
    image, mask = _pair(_blobs(16, 24))
    flipped = training_transform((16, 24), (1.0, 1.0), 1.0, 1.0, photometric=False)(image, mask)
    assert torch.equal(flipped[0], image.flip(-1)) and torch.equal(flipped[1], mask.flip(-1))


def test_crops_avoid_one_class_where_they_can():
    # Left three quarters are class 0: a crop of the middle is mixed, most others are not
    mask = torch.zeros(40, 160, dtype=torch.uint8)
    mask[:, 120:] = 1
    mask[:, ::10] = 255  # ignored pixels count for no class

    def shares(limit):
        transform = training_transform((40, 40), (1.0, 1.0), max_class_ratio=limit, photometric=False)
        result = []
        for seed in range(60):
            torch.manual_seed(seed)
            _, crop = transform(*_pair(mask))
            valid = crop[crop != 255]
            result.append(torch.bincount(valid).max().item() / len(valid))
        return np.array(result)

    free, bounded = shares(1.0), shares(0.75)
    good = 20 / 121  # positions whose share is at most 3/4
    assert (free > 0.75).mean() > 0.6
    # All ten tries fail with probability (1 - good)^10 = 0.16
    assert (bounded > 0.75).mean() < 2 * (1 - good) ** 10


def test_one_class_or_only_ignored_is_cropped_all_the_same():
    for value in (3, 255):
        _, mask = training_transform((10, 10))(*_pair(torch.full((30, 30), value)))
        assert value in mask.unique().tolist()


def test_photometric_distortion_touches_the_image_alone():
    image, mask = _pair(_blobs(32, 32))
    transform = training_transform((32, 32), (1.0, 1.0), 0.0, 1.0)
    changed = 0
    for seed in range(10):
        torch.manual_seed(seed)
        new_image, new_mask = transform(image, mask)
        assert torch.equal(new_mask, mask)
        changed += not torch.equal(new_image, image)
    assert changed > 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop_size": (0, 5)}, "crop_size"),
        ({"crop_size": (5, 5), "scale": (2.0, 0.5)}, "lowest"),
        ({"crop_size": (5, 5), "scale": (0.0, 0.5)}, "scale is"),
        ({"crop_size": (5, 5), "flip": 1.5}, "flip is 1.5"),
        ({"crop_size": (5, 5), "max_class_ratio": 0.0}, "max_class_ratio"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        training_transform(**arguments)

"""Rows I1 to I4 and I8 of the reliability sheet: what is read of a picture file, and what is refused."""

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageFile

from hf_ctxseg import CtxSegImageProcessor, open_image
from hf_ctxseg.picture_reading import read_picture, to_rgb
from hf_ctxseg.samples import FolderSamples

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (37, 45, 3), np.uint8)
PICTURE = Image.fromarray(PIXELS)
PROCESSOR = CtxSegImageProcessor(do_normalize=False)


def pixels_of(image, processor=PROCESSOR, **arguments):
    values = processor(image, return_tensors="pt", **arguments)["pixel_values"]
    assert len(values) == 1
    return (values[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


def encoded(image=PICTURE, format="PNG", **arguments):
    stream = io.BytesIO()
    image.save(stream, format, **arguments)
    return stream.getvalue()


def png_file(width, height, depth, kind, data):
    """A PNG file of zlib data, by the PNG specification; kinds are grey, colour and both with alpha: 0, 2, 4, 6."""
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    sealed = (struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(sealed)


def png_16_bit(pixels, kind):
    rows = np.ascontiguousarray(pixels, ">u2")
    lines = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return png_file(rows.shape[1], rows.shape[0], 16, kind, lines)


def big_tiff(pixels):
    """An RGB file of more than 4 GiB's kind, by the BigTIFF design."""
    height, width, _ = pixels.shape
    offset = 16 + 8 + 10 * 20 + 8
    depths = 8 | 8 << 16 | 8 << 32
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, depths), (259, 3, 1, 1), (262, 3, 1, 2)]
    tags += [(273, 16, 1, offset), (277, 3, 1, 3), (278, 4, 1, height), (279, 16, 1, pixels.size), (284, 3, 1, 1)]
    entries = b"".join(struct.pack("<HHQQ", *tag) for tag in tags)
    return struct.pack("<2sHHHQQ", b"II", 43, 8, 0, 16, len(tags)) + entries + bytes(8) + pixels.tobytes()


WIDE = PIXELS.astype(np.uint16) * 257


@pytest.mark.parametrize(
    ("pixels", "kind", "expected"),
    [
        (WIDE[..., 0], 0, PIXELS[..., :1].repeat(3, axis=2)),
        (WIDE, 2, PIXELS),
        (WIDE[..., :2], 4, PIXELS[..., :1].repeat(3, axis=2)),
        (np.dstack([WIDE, WIDE[..., :1]]), 6, PIXELS),
    ],
    ids=["grey", "RGB", "grey with alpha", "RGBA"],
)
def test_i2_16_bit_png_files_keep_their_levels(pixels, kind, expected):
    assert np.array_equal(pixels_of(png_16_bit(pixels, kind)), expected)


@pytest.mark.parametrize("high", [1.001, 1.4, 256.0, 400.0])
def test_i2_a_range_between_two_known_ones_is_refused(high):
    values = (PIXELS / 255 * high).astype(np.float32)
    for image in (values, torch.from_numpy(values), Image.fromarray(values[..., 0].copy())):
        with pytest.raises(ValueError, match=r"values run from .* to .*clip or convert .* do_rescale=False"):
            PROCESSOR(image)


@pytest.mark.parametrize("form", [">u2", ">f4", ">i4", "flipped", "needs a gradient"])
def test_i2_arrays_that_torch_does_not_take_are_read(form):
    if form == "flipped":
        assert np.array_equal(pixels_of(PIXELS[::-1, :, ::-1]), PIXELS[::-1, :, ::-1])
    elif form == "needs a gradient":
        assert np.array_equal(pixels_of((torch.from_numpy(PIXELS) / 255).requires_grad_()), PIXELS)
    else:
        assert np.array_equal(pixels_of((WIDE if form == ">u2" else PIXELS).astype(form)), PIXELS)


@pytest.mark.parametrize("kind", [np.complex64, str, object, np.longdouble])
def test_i2_arrays_of_no_numbers_that_torch_knows_are_refused(kind):
    array = PIXELS.astype(kind)
    for image in (array, torch.from_numpy(array)) if array.dtype.kind == "c" else (array,):
        with pytest.raises(ValueError, match="give whole or floating-point numbers"):
            PROCESSOR(image)


@pytest.mark.parametrize("mode", ["YCbCr", "LAB", "HSV", "RGBX", "RGBa"])
def test_i1_colour_spaces_come_back_as_rgb(mode):
    smooth = PICTURE.resize((9, 7)).resize((45, 37), Image.Resampling.BICUBIC)
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(smooth, *profiles, outputMode="LAB")
    else:
        image = (smooth.convert("RGBA") if mode == "RGBa" else smooth).convert(mode)
    assert image.mode == mode
    assert np.abs(pixels_of(image).astype(int) - np.asarray(smooth)).mean() < 2


def test_i1_premultiplied_grey_and_palettes_with_alpha():
    grey = Image.fromarray(PIXELS[..., 0])
    opaque = Image.merge("LA", [grey, Image.new("L", grey.size, 255)]).convert("La")
    assert np.array_equal(pixels_of(opaque)[..., 0], PIXELS[..., 0])
    palette = PICTURE.quantize(16)
    assert np.array_equal(pixels_of(palette.convert("PA")), np.asarray(palette.convert("RGB")))


def test_i1_inverted_inks_of_adobe_jpeg_files():
    smooth = PICTURE.resize((5, 4)).resize((45, 37), Image.Resampling.BICUBIC)
    inks = Image.merge("CMYK", [*Image.fromarray(255 - np.asarray(smooth)).split(), Image.new("L", smooth.size)])
    content = encoded(inks, "JPEG", quality=100)
    assert b"Adobe" in content[:64]  # whose inks are stored inverted
    assert np.abs(pixels_of(content).astype(int) - np.asarray(smooth)).mean() < 3


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_i1_the_first_frame_of_several_is_read(format):
    first = PICTURE.quantize(200)
    second = Image.fromarray(255 - PIXELS).quantize(200)
    arguments = {"lossless": True} if format == "WEBP" else {}
    content = encoded(first, format, save_all=True, append_images=[second], **arguments)
    with Image.open(io.BytesIO(content)) as opened:
        assert opened.n_frames == 2
    assert np.array_equal(pixels_of(content), np.asarray(first.convert("RGB")))


def test_i1_tiff_files_of_both_kinds():
    assert np.array_equal(pixels_of(big_tiff(PIXELS)), PIXELS)
    assert np.array_equal(pixels_of(encoded(format="TIFF", compression="tiff_lzw")), PIXELS)


UPRIGHT = {  # what a viewer does to stored pixels, by the EXIF standard
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).swapaxes(0, 1),
    8: lambda stored: np.rot90(stored, 1),
}


def turned(orientation, format="PNG", image=PICTURE, **arguments):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, format, exif=exif, **arguments)


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_i3_rotated_jpeg_photos_are_turned_upright(orientation, tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(turned(orientation, "JPEG"))
    with Image.open(path) as stored:
        expected = UPRIGHT[orientation](np.asarray(stored))
    assert np.array_equal(pixels_of(path), expected)
    assert np.array_equal(np.asarray(open_image(path)), expected)
    assert np.array_equal(np.asarray(FolderSamples([(path, path)], tmp_path).image(0)), expected)  # in training


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "F"])
def test_i3_rotated_16_bit_and_floating_point_pictures(mode):
    values = WIDE[..., 0] if mode != "F" else PIXELS[..., 0].astype(np.float32)
    if mode == "I;16B":
        image = Image.frombytes(mode, (45, 37), values.astype(">u2").tobytes())
    else:
        image = Image.fromarray(values)
    assert image.mode == mode
    assert np.array_equal(pixels_of(turned(6, "TIFF", image))[..., 0], np.rot90(PIXELS[..., 0], -1))


def test_i3_the_stored_direction_can_be_kept(tmp_path):
    content = turned(6)
    kept = CtxSegImageProcessor(do_normalize=False, do_exif_transpose=False)
    kept.save_pretrained(tmp_path)
    for processor in (kept, CtxSegImageProcessor.from_pretrained(tmp_path)):
        for image in (content, Image.open(io.BytesIO(content))):
            assert np.array_equal(pixels_of(image, processor), PIXELS)
            assert np.array_equal(np.asarray(processor.picture(image)), PIXELS)
    assert np.array_equal(pixels_of(content, do_exif_transpose=False), PIXELS)
    assert np.array_equal(pixels_of(content, kept, do_exif_transpose=True), np.rot90(PIXELS, -1))


def test_i3_label_maps_turn_with_their_pictures():
    labels = RNG.integers(0, 5, (37, 45), np.uint8)
    maps = turned(6, image=Image.fromarray(labels))
    for label in (maps, Image.open(io.BytesIO(maps))):
        found = PROCESSOR(turned(6), label, return_tensors="pt")
        assert np.array_equal(found["labels"][0].numpy(), np.rot90(labels, -1))


def test_i3_a_turned_picture_is_not_turned_again():
    picture = open_image(turned(6))
    assert np.array_equal(pixels_of(picture), np.rot90(PIXELS, -1))
    assert np.array_equal(np.asarray(to_rgb(picture)), np.rot90(PIXELS, -1))


@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0", b"MM\0*"])
def test_i3_damaged_exif_data_do_not_spoil_the_pixels(exif):
    assert np.array_equal(pixels_of(encoded(exif=exif)), PIXELS)


def test_i3_the_orientation_counts_where_other_exif_data_are_damaged():
    resolution = struct.pack("<HHI4s", 0x011A, 2, 4, b"abc")  # a text where a number is expected
    tags = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + resolution
    content = encoded(exif=b"Exif\0\0" + struct.pack("<2sHIH", b"II", 42, 8, 2) + tags + bytes(4))
    for image in (content, Image.open(io.BytesIO(content))):
        assert np.array_equal(pixels_of(image), np.rot90(PIXELS, -1))


FORMATS = ["JPEG", "PNG", "TIFF", "GIF", "WEBP", "BMP"]
DAMAGE = {
    "truncated": (lambda whole: whole[: len(whole) // 2], "."),
    "only its first bytes": (lambda whole: whole[:12], "."),
    "empty": (lambda whole: b"", "the file is empty"),
    "text": (lambda whole: b"hello, world", "it is no picture of a known format"),
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_i4_damaged_files_are_refused_by_name_and_cause(damage, format, tmp_path):
    spoil, cause = DAMAGE[damage]
    path = tmp_path / f"bad.{format.lower()}"
    path.write_bytes(spoil(encoded(format=format)))
    for read in (PROCESSOR, PROCESSOR.picture, open_image):
        with pytest.raises(ValueError, match=rf"bad\.{format.lower()} cannot be read: {cause}"):
            read(path)
    with pytest.raises(ValueError, match=rf"^bad\.{format.lower()} cannot be read: {cause}"):
        FolderSamples([(path, path)], tmp_path).image(0)


def test_i4_a_damaged_picture_that_pillow_has_only_opened_is_refused(tmp_path):
    path = tmp_path / "bad.png"
    path.write_bytes(encoded()[:-900])
    with Image.open(path) as image, pytest.raises(ValueError, match=r"bad\.png cannot be read: "):
        PROCESSOR(image)
    with pytest.raises(ValueError, match="The picture cannot be read: "):
        PROCESSOR(encoded()[:-900])


@pytest.mark.parametrize("format", FORMATS)
def test_i4_the_content_and_not_the_suffix_tells_the_format(format, tmp_path):
    path = tmp_path / "named.jpg"
    path.write_bytes(encoded(PICTURE.quantize(64).convert("RGB"), format))
    with Image.open(path, formats=[format]) as image:
        assert np.array_equal(pixels_of(path), np.asarray(image.convert("RGB")))


def gigapixel(width, height):
    """A whole 1-bit PNG file, black, of about 100 kB: one compressed block again and again."""
    packer = zlib.compressobj(9, wbits=-15)
    block = packer.compress(bytes(1 + (width + 7) // 8) * 100) + packer.flush(zlib.Z_FULL_FLUSH)
    count = (1 + (width + 7) // 8) * height
    check = struct.pack(">HH", count % 65521, 1)  # Adler-32 of zeros
    return png_file(width, height, 1, 0, b"\x78\xda" + block * (height // 100) + packer.flush() + check)


def forbid_decoding(monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("the picture was decoded"))


@pytest.mark.parametrize("size", [(30000, 30000), (16001, 16000)])
def test_i8_bombs_are_refused_before_decoding(size, tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    path.write_bytes(gigapixel(*size))
    assert path.stat().st_size < 200_000
    forbid_decoding(monkeypatch)
    count = size[0] * size[1]
    message = rf"bomb\.png cannot be read: it has {count} pixels \({size[0]}x{size[1]}, .*CTXSEG_MAX_PIXELS={count} in"
    for read in (PROCESSOR, PROCESSOR.picture, open_image):
        with pytest.raises(ValueError, match=message):
            read(path)
    with pytest.raises(ValueError, match=message):
        FolderSamples([(path, path)], tmp_path).image(0)


@pytest.mark.parametrize("format", [*FORMATS, "ICO", "PPM"])
def test_i8_the_limit_can_be_set_and_holds_for_every_format(format, monkeypatch):
    content = encoded(format=format)
    with Image.open(io.BytesIO(content)) as image:
        size = image.size
        monkeypatch.setenv("CTXSEG_MAX_PIXELS", str(size[0] * size[1]))
        assert open_image(content).size == size
        monkeypatch.setenv("CTXSEG_MAX_PIXELS", str(size[0] * size[1] - 1))
        for source in (content, image):
            with pytest.raises(ValueError, match=rf"it has {size[0] * size[1]} pixels \({size[0]}x{size[1]}"):
                PROCESSOR(source)


@pytest.mark.parametrize("text", ["1e9", "-1", "many"])
def test_i8_a_limit_that_is_no_number_is_refused(text, monkeypatch):
    monkeypatch.setenv("CTXSEG_MAX_PIXELS", text)
    with pytest.raises(ValueError, match=r"CTXSEG_MAX_PIXELS is .*but a whole number of pixels is expected"):
        open_image(encoded())


@pytest.mark.parametrize("format", [*FORMATS, "MPO"])
def test_i8_pillow_s_own_limit_neither_warns_nor_refuses_nor_changes(format, monkeypatch):
    content = encoded(format=format)
    for limit in (37 * 45 - 1, 100):  # of which Pillow would warn, and raise an error
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with ThreadPoolExecutor(8) as pool:
            assert {picture.size for picture in pool.map(open_image, [content] * 40)} == {(45, 37)}
        with pytest.raises(ValueError, match="known format"):
            open_image(b"nothing")
        assert Image.MAX_IMAGE_PIXELS == limit


@pytest.mark.slow
@pytest.mark.parametrize("size", [(10000, 10000), (14000, 14000)])
def test_i8_large_pictures_below_the_limit_are_read_without_a_warning(size, tmp_path):
    assert open_image(gigapixel(*size)).size == size
    path = tmp_path / "large.tif"  # Pillow looks at the size of a TIFF file twice
    Image.new("1", size).save(path, compression="group4")
    assert read_picture(path, "large", lambda image: image).size == size

"""Row I11 of the reliability sheet: the forms in which a picture is given, and what is none."""

import http.server
import io
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import hf_ctxseg
from hf_ctxseg import CtxSegImageProcessor, open_image

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (37, 45, 3), np.uint8)
PICTURE = Image.fromarray(PIXELS)
PROCESSOR = CtxSegImageProcessor(do_normalize=False)


def pixels_of(image, **arguments):
    values = PROCESSOR(image, return_tensors="pt", **arguments)["pixel_values"]
    assert len(values) == 1
    return (values[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


def encoded():
    stream = io.BytesIO()
    PICTURE.save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("form", ["bytes", "bytearray", "memoryview", "stream", "file", "cell", "path cell"])
def test_i11_encoded_pictures_come_in_every_form(form, tmp_path):
    path = tmp_path / "日本 é.png"
    path.write_bytes(encoded())
    forms = {
        "bytes": encoded,
        "bytearray": lambda: bytearray(encoded()),
        "memoryview": lambda: memoryview(encoded()),
        "stream": lambda: io.BytesIO(encoded()),
        "file": lambda: path.open("rb"),
        "cell": lambda: {"bytes": encoded(), "path": "lost.png"},  # as a table of the Hub holds it
        "path cell": lambda: {"bytes": None, "path": str(path)},
    }
    for wrapped in (lambda image: image, lambda image: [image]):
        image = forms[form]()
        assert np.array_equal(pixels_of(wrapped(image)), PIXELS)
        if form == "file":
            assert not image.closed  # whoever opens a file closes it
            image.close()
    if form != "file":
        assert np.array_equal(np.asarray(PROCESSOR.picture(forms[form]())), PIXELS)


THIN = RNG.integers(0, 256, (4, 9, 3), np.uint8)


@pytest.mark.parametrize("height", [1, 3, 4])
def test_i11_shapes_that_can_be_read_in_two_ways(height):
    pixels = THIN[:height]
    assert np.array_equal(pixels_of(pixels), pixels)  # an array: channels last
    assert np.array_equal(pixels_of(torch.from_numpy(pixels).permute(2, 0, 1)), pixels)  # a tensor: channels first
    if height != 4:
        first = pixels_of(pixels, input_data_format="channels_first")
        assert np.array_equal(first, np.broadcast_to(pixels, (3, 9, 3)).transpose(1, 2, 0))


@pytest.mark.parametrize("shape", [(1, 1), (17, 3), (3, 17), (4, 1), (1, 4)])
def test_i11_thin_grey_arrays_have_no_channels(shape):
    grey = RNG.integers(0, 256, shape, np.uint8)
    for image in (grey, torch.from_numpy(grey)):
        for data_format in (None, "channels_first", "channels_last"):
            assert np.array_equal(pixels_of(image, input_data_format=data_format), grey[..., None].repeat(3, axis=2))


def test_i11_an_array_of_several_pictures_is_a_batch():
    batch = np.stack([PIXELS, 255 - PIXELS])
    for images in (batch, torch.from_numpy(batch).permute(0, 3, 1, 2), [[PIXELS], [255 - PIXELS]]):
        values = PROCESSOR(images, return_tensors="pt")["pixel_values"]
        assert torch.equal(values, PROCESSOR(list(batch), return_tensors="pt")["pixel_values"])
    with pytest.raises(ValueError, match="2 pictures were given where one is expected"):
        PROCESSOR.picture(batch)


@pytest.mark.parametrize("shape", [(37, 45, 2), (5, 37, 45), (7,), (0, 5, 3), (1, 0, 3), (2, 2, 2, 2, 2)])
def test_i11_arrays_that_are_no_picture_are_refused(shape):
    for image in (np.zeros(shape, np.uint8), torch.zeros(shape)):
        with pytest.raises(ValueError, match=r"A picture of shape .* was given, but \(H, W\)"):
            PROCESSOR(image)


@pytest.mark.parametrize("image", [None, 3, object(), [None], [PICTURE, None], [[1, 2], [3, 4]]])
def test_i11_what_is_no_picture_at_all_is_refused(image):
    for read in (PROCESSOR, PROCESSOR.picture):
        with pytest.raises(ValueError, match=r"is no picture: give a path, encoded bytes, an open file, a Pillow"):
            read(image)


@pytest.mark.parametrize("cell", [{}, {"bytes": None, "path": None}, {"bytes": b"", "path": ""}, {"bytes": 3}, ""])
def test_i11_an_empty_cell_is_refused(cell):
    for read in (PROCESSOR, PROCESSOR.picture, open_image):
        with pytest.raises(ValueError, match=r"The picture (is empty|holds a int|cannot be read: ).*"):
            read(cell)


@pytest.mark.parametrize("images", [[], (), [[]]])
def test_i11_an_empty_list_is_refused(images):
    with pytest.raises(ValueError, match="list of pictures is empty: give at least one"):
        PROCESSOR(images)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.png", r"There is no picture .*gone\.png: check the path"),
        ("日本 é.png", r"There is no picture .*日本 é\.png"),
        (".", "cannot be read: Is a directory"),
        ("a\0b.png", "cannot be read: embedded null"),
        ("x" * 5000 + ".png", r"x \u2026 x.*cannot be read: File name too long"),
    ],
)
def test_i11_paths_without_a_picture_are_named_in_a_sentence(name, message, tmp_path):
    for path in (f"{tmp_path}/{name}", tmp_path / name):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            PROCESSOR(path)
        assert len(str(caught.value)) < 500


@pytest.fixture
def web():
    """A web server on the loopback interface with one picture, and the paths that were asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200 if self.path == "/photo.png" else 404)
            self.end_headers()
            self.wfile.write(encoded())

        def log_message(self, *arguments):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


def test_i11_urls_are_fetched_only_when_asked(web):
    address, asked = web
    url = f"{address}/photo.png"
    cell = {"bytes": None, "path": url}
    for read in (PROCESSOR, PROCESSOR.picture, open_image):
        for source in (url, [url] if read is PROCESSOR else url, cell, url.replace("http", "HTTP")):
            with pytest.raises(ValueError, match=r"is a URL, which is not fetched unasked: .*allow_url=True"):
                read(source)
    assert asked == []
    assert np.array_equal(np.asarray(open_image(url, allow_url=True)), PIXELS)
    assert asked == ["/photo.png"]
    with pytest.raises(ValueError, match=r"none\.png cannot be fetched \(HTTP Error 404"):
        open_image(f"{address}/none.png", allow_url=True)


@pytest.mark.parametrize(
    "url", ["ftp://example.org/a.png", "s3://b/a.png", "file:///a.png", "data:image/png;base64,AA"]
)
def test_i11_other_addresses_are_never_fetched(url):
    for arguments in ({}, {"allow_url": True}):
        with pytest.raises(ValueError, match="is a URL, which is not fetched unasked"):
            open_image(url, **arguments)


def test_i11_open_image_is_public():
    assert hf_ctxseg.open_image is open_image and "open_image" in hf_ctxseg.__all__

"""The page in a real browser: a picture goes up, the overlay is seen, a class is hidden, the mask comes down."""

import io
import re
import shutil
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import expect, sync_playwright

import hf_ctxseg
from hf_ctxseg.page import Page

_WAIT = 120_000  # milliseconds; a busy machine takes its time


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as started:
        # Debian's, or the one that `playwright install chromium` fetched
        chromium = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def model(tiny, live):
    torch.manual_seed(0)
    config = tiny(
        hf_ctxseg.DeepLabV3Config,
        id2label={0: "ground", 1: "<b>disc</b>", 2: "box"},
        nonlocal_mode="embedded_gaussian",
        output_stride=8,
    )
    return live(hf_ctxseg.DeepLabV3ForSemanticSegmentation(config))


@pytest.fixture(scope="module")
def address(model):
    page = Page(model)
    _, url, _ = page.serve(prevent_thread_lock=True, quiet=True)
    yield url
    page.blocks.close()


@pytest.fixture
def photo(picture, tmp_path):
    file = tmp_path / "photo.png"
    picture.resize((610, 450)).save(file)
    return file


@pytest.fixture
def tab(browser, address):
    page = browser.new_page(viewport={"width": 1200, "height": 1500})
    page.asked = []
    page.on("request", lambda request: page.asked.append(request.url))
    page.set_default_timeout(_WAIT)
    page.goto(address)
    yield page
    page.close()


def upload(tab, file):
    tab.locator("#given input[type=file]").set_input_files(file)


def seen(tab, where="#drawn"):
    """The picture that is shown, RGB (H, W, 3)."""
    source = tab.locator(f"{where} img").get_attribute("src")
    with urllib.request.urlopen(source) as answer:
        return np.asarray(Image.open(io.BytesIO(answer.read())).convert("RGB")).astype(int)


def test_page_shows_what_predict_gives(tab, photo, model, address, tmp_path):
    upload(tab, photo)
    tab.wait_for_selector("#drawn img")
    prediction = hf_ctxseg.predict(model, photo)
    assert len(prediction.areas) > 1
    legend = tab.locator("#legend").inner_text()
    for name, share in prediction.areas.items():
        assert f"{name} · {share:.1%}" in legend  # names are text, never markup
    whole = seen(tab)
    assert whole.shape[:2] == prediction.mask.shape

    with tab.expect_download() as download:
        tab.locator("#mask").click()
    download.value.save_as(tmp_path / "mask.png")
    assert download.value.suggested_filename == "photo_mask.png"
    mask = Image.open(tmp_path / "mask.png")
    assert mask.mode == "P"
    np.testing.assert_array_equal(np.asarray(mask), prediction.mask)

    first = next(iter(prediction.areas))
    shown = tab.locator("#drawn img").get_attribute("src")
    tab.locator("#classes label").first.click()
    expect(tab.locator("#drawn img")).not_to_have_attribute("src", shown, timeout=_WAIT)
    hidden = prediction.mask == prediction.names.index(first)
    original, now = np.asarray(Image.open(photo)).astype(int), seen(tab)
    assert np.abs(now - original)[hidden].mean() < 10 < np.abs(whole - original)[hidden].mean()
    assert np.abs(now - whole)[~hidden].mean() < 5

    tab.locator("#drawn img").click(position={"x": 100, "y": 60})
    tab.wait_for_selector("#attention img")
    assert seen(tab, "#attention").std() > 1
    elsewhere = [url for url in tab.asked if not url.startswith((address, "data:", "blob:"))]
    assert not elsewhere


def test_views_and_crf_are_those_of_predict(tab, photo, model, tmp_path):
    upload(tab, photo)
    tab.wait_for_selector("#drawn img")
    expected = hf_ctxseg.predict(model, photo, flip=True, scales=(0.75, 1.0, 1.25), crf="default").mask
    for name in ("flip", "scales", "crf"):
        shown = tab.locator("#drawn img").get_attribute("src")
        tab.locator(f"#{name} input").check()
        expect(tab.locator("#drawn img")).not_to_have_attribute("src", shown, timeout=_WAIT)
    with tab.expect_download() as download:
        tab.locator("#mask").click()
    download.value.save_as(tmp_path / "mask.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "mask.png")), expected)


@pytest.mark.parametrize("content", ["torn", "text", "empty"])
def test_a_broken_picture_gives_a_sentence_and_takes_the_former_away(content, tab, photo):
    upload(tab, photo)
    tab.wait_for_selector("#drawn img")
    broken = {"torn": photo.read_bytes()[:2000], "text": b"text", "empty": b""}[content]
    upload(tab, {"name": "broken.png", "mimeType": "image/png", "buffer": broken})
    expect(tab.get_by_text(re.compile(r"broken\.png cannot be read")).first).to_be_visible(timeout=_WAIT)
    expect(tab.locator("#drawn img")).to_have_count(0, timeout=_WAIT)
    expect(tab.locator("#legend")).not_to_contain_text("%", timeout=_WAIT)
    expect(tab.locator("#mask")).to_be_disabled(timeout=_WAIT)

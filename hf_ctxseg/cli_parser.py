"""The verbs of the command `ctxseg`, and how their arguments are read."""

import argparse

VERBS = {
    "train": "fine-tune a model on a folder of images and masks",
    "eval": "score a model on labelled pictures",
    "predict": "segment pictures: masks and overlays",
    "convert": "open a checkpoint of another code base, or write one for it",
    "export": "write a model as ONNX or for torch.export, and compare the file with it",
    "card": "write a run folder's card anew, or a folder to be published",
    "push": "publish a run folder on the Hub",
    "models": "list heads, presets and backbones",
    "doctor": "verify a run folder or a saved model; without one, what the package runs on",
    "demo": "train on generated scenes, from nothing to an overlay, in a few minutes",
}


def make_parser(verb: str, example: str) -> argparse.ArgumentParser:
    """Make the parser of a verb, whose help shows the example first."""
    return argparse.ArgumentParser(
        prog=f"ctxseg {verb}",
        usage=f"{example}\n\n{VERBS[verb][0].upper()}{VERBS[verb][1:]}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

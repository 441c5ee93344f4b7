"""A prediction that dies at a chosen moment, run in a process of its own by test_dataset_prediction."""

import os
import signal

from hf_ctxseg import mask_shards
from hf_ctxseg.dataset_prediction import predict_dataset
from hf_ctxseg.inference import Predictor

# Four shards of three pictures, the fifth of which is broken and not segmented; each run goes on after the one before.
MOMENTS = ["picture 2", "picture 3", "before rename", "after rename"]  # the first shard is there
MOMENTS += ["picture 4", "after rename", "picture 1", "after rename", "before summary"]


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def predict_and_die(run, data, out, moment):
    """Predict, and be killed: at the start of the n-th picture, or around a shard's renaming, or at the very end."""
    segment, replace, calls = Predictor.__call__, os.replace, iter(range(1, 100))

    def mortal_segment(self, image):
        return die() if moment == f"picture {next(calls)}" else segment(self, image)

    def mortal_replace(old, new):
        is_shard = str(new).endswith(".parquet")
        if is_shard and moment == "before rename":
            die()
        replace(old, new)
        if is_shard and moment == "after rename":
            die()

    Predictor.__call__, os.replace = mortal_segment, mortal_replace
    if moment == "before summary":
        mask_shards._summarize = die
    predict_dataset(run, data, out, shard_size=3, say=str)

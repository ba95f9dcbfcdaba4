"""Runs traker (the peer) on saved weights and data, without a sketch; writes its scores.

A script, not a test: ``python traker_scores.py FOLDER RIDGE``. FOLDER holds arrays.npz with the
weights of one checkpoint (``0:0.weight`` and so on), train and test inputs and labels.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from trak import TRAKer
from trak.projectors import NoOpProjector


def main(folder, ridge):
    arrays = {k: torch.as_tensor(v) for k, v in np.load(folder / "arrays.npz").items()}
    state = {key.partition(":")[2]: value for key, value in arrays.items() if ":" in key}
    hidden, inputs = state["0.weight"].shape
    model = nn.Sequential(
        nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, len(state["2.bias"]))
    ).eval()
    numbers = sum(p.numel() for p in model.parameters())
    train, test = ((arrays[f"{side}_x"], arrays[f"{side}_y"]) for side in ("train", "test"))
    traker = TRAKer(
        model=model,
        task="image_classification",
        train_set_size=len(train[0]),
        save_dir=str(folder / "traker"),
        device="cpu",
        projector=NoOpProjector(numbers, numbers, 0, "na", device="cpu"),
        proj_dim=numbers,
        use_half_precision=False,
        lambda_reg=ridge,
    )
    traker.load_checkpoint(state, model_id=0)
    traker.featurize(batch=train, num_samples=len(train[0]))
    traker.finalize_features()
    traker.start_scoring_checkpoint(
        exp_name="test", checkpoint=state, model_id=0, num_targets=len(test[0])
    )
    traker.score(batch=test, num_samples=len(test[0]))
    scores = traker.finalize_scores(exp_name="test")
    np.save(folder / "traker.npy", np.array(scores, dtype=np.float64))


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))

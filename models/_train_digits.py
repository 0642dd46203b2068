"""Train the network of ``digits.py``, and write its weights and the held-out images beside it.

    python -m models._train_digits

It takes the images from scikit-learn, which carries them, and downloads nothing.  Half of the
images of each digit are held out: that many, so that one image is a tenth of a percent and some are
hard.  The seed alone chooses them, and nothing was tuned on them; but writers are on both sides, so
they don't tell how well the network reads a stranger's hand.  On one machine every run gives the
same files; on another processor sums are rounded in another order, and training goes another way.
"""

import hashlib
import importlib
import json

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from models.digits import HELD_OUT, LABELS, WEIGHTS, Digits

SEED = 0
EPOCHS = 40
BATCH = 64
LEARNING_RATE = 1e-2
WEIGHT_DECAY = 5e-2


def split(labels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which images (N) are held out: half of those of each digit."""
    generator = np.random.default_rng(SEED)
    held_out = np.zeros(len(labels), dtype=bool)
    for digit in np.unique(labels):
        of_it = np.flatnonzero(labels == digit)
        held_out[generator.choice(of_it, size=len(of_it) // 2, replace=False)] = True
    return held_out


def train(images: Tensor, labels: Tensor) -> nn.Module:
    """A network trained on these images (Nx1x8x8) and digits (N), in eval mode."""
    torch.manual_seed(SEED)
    network = Digits()
    batches = len(images) // BATCH
    optimiser = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, LEARNING_RATE, total_steps=EPOCHS * batches
    )
    for _ in range(EPOCHS):
        order = torch.randperm(len(images))
        for batch in order[: batches * BATCH].view(batches, BATCH):
            loss = functional.cross_entropy(
                network(images[batch]), labels[batch], label_smoothing=0.05
            )
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
    return network.eval()


def main() -> None:
    """Train, write the three files, and print the accuracy on the held-out images."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    digits = importlib.import_module("sklearn.datasets").load_digits()
    images = digits.images.astype(np.float32)[:, np.newaxis]
    labels = digits.target.astype(np.uint8)
    held_out = split(labels)

    network = train(torch.from_numpy(images[~held_out]), torch.from_numpy(labels[~held_out]).long())
    with torch.no_grad():
        told = network(torch.from_numpy(images[held_out])).argmax(1).numpy()
    correct = int((told == labels[held_out]).sum())

    np.savez_compressed(HELD_OUT, input=images[held_out])
    np.save(LABELS, labels[held_out])
    made = {
        "script": "models/_train_digits.py",
        "seed": SEED,
        "epochs": EPOCHS,
        "torch": torch.__version__,
        "scikit-learn": importlib.import_module("sklearn").__version__,
        "held_out": len(told),
        "held_out_correct": correct,
        "held_out_sha256": hashlib.sha256(HELD_OUT.read_bytes()).hexdigest(),
        "labels_sha256": hashlib.sha256(LABELS.read_bytes()).hexdigest(),
    }
    # One entry alone: safetensors writes several in another order every time.
    save_file(network.state_dict(), WEIGHTS, metadata={"made": json.dumps(made)})
    print(f"{correct} of {len(told)} held-out images are read correctly: {correct / len(told):.2%}")


if __name__ == "__main__":
    main()

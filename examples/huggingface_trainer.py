"""Hugging Face's Trainer with one call added: the same CLIPModel, the same batches, the same losses.

    pip install '.[train]' accelerate
    python examples/huggingface_trainer.py [--steps 40] [--seed 0]

Trains a small CLIPModel with random weights on scikit-learn's handwritten digits twice, without and with
`patch_transformers()`. Prints the losses side by side, and fails if their relative difference
exceeds 1e-4.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from typing import Any

import numpy as np
import torch
from transformers import CLIPConfig, CLIPModel, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from fastclip.data.spec import open_source
from fastclip.integrations import patch_transformers, unpatch

TOLERANCE = 1e-4  # rounding errors grow over many steps
BATCH_SIZE = 64
CONTEXT_LENGTH = 12  # tokens; the longest caption has 8, plus start and end token


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a CLIPModel without and with fastclip's loss.")
    parser.add_argument("--steps", type=int, default=40, help="training steps (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed of the weights and the batches (default: %(default)s)"
    )
    args = parser.parse_args()

    logging.set_verbosity_error()
    data = digits()
    theirs = train_losses(data, args.steps, args.seed)
    patch_transformers()  # the added call
    ours = train_losses(data, args.steps, args.seed)
    unpatch()

    print("step   transformers     fastclip   relative difference")
    differences = [abs(a - b) / abs(a) for a, b in zip(theirs, ours)]
    for step, (a, b, difference) in enumerate(zip(theirs, ours, differences), start=1):
        print(f"{step:4d}   {a:12.7f}   {b:10.7f}   {difference:.1e}")
    print(f"largest relative difference {max(differences):.1e}, allowed {TOLERANCE:.0e}")
    if not all(difference <= TOLERANCE for difference in differences):  # NaN fails too
        sys.exit("the losses differ")


def train_losses(data: list[dict[str, Any]], steps: int, seed: int) -> list[float]:
    """Train a model and return the loss of each step. Weights and batches depend only on `seed`."""
    set_seed(seed)
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
    ends = {"bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": PAD}
    config = CLIPConfig(
        text_config=tower | ends | {"vocab_size": 64, "max_position_embeddings": CONTEXT_LENGTH},
        vision_config=tower | {"image_size": 32, "patch_size": 8},
        projection_dim=64,
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=2e-3,
            warmup_steps=5,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,  # to compare losses in float32 on a CPU; leave it out to train
            seed=seed,
        )
        trainer = Trainer(model=CLIPModel(config), args=arguments, train_dataset=data, data_collator=collate)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


PAD, BEGIN, END = 0, 1, 63


def digits() -> list[dict[str, Any]]:
    """Return the pixels (3, 32, 32) and the token ids of one caption of each training image. A token is a word."""
    source = open_source("digits")
    words: dict[str, int] = {}
    data = []
    for k in range(len(source)):
        record = source[k]
        caption = record.captions[k % len(record.captions)]
        ids = [BEGIN, *(words.setdefault(word, len(words) + 2) for word in caption.split()), END]
        pixels = torch.from_numpy(np.array(record.image)).permute(2, 0, 1) / 127.5 - 1
        padding = [PAD] * (CONTEXT_LENGTH - len(ids))
        data.append({"pixel_values": pixels, "input_ids": torch.tensor(ids + padding)})
    return data


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack rows into a batch, with the attention mask and with return_loss=True, so that CLIPModel returns a loss."""
    batch: dict[str, Any] = {key: torch.stack([row[key] for row in rows]) for key in ("pixel_values", "input_ids")}
    return batch | {"attention_mask": (batch["input_ids"] != PAD).long(), "return_loss": True}


if __name__ == "__main__":
    main()

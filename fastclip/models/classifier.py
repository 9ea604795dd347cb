"""Fine-tuned classifiers: an image tower with a linear head over named classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from reprlib import repr as shown

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastclip.models.checkpoints.writing import CLASSES, CLASSIFIER_FILES, HEAD, new_model, write_weights
from fastclip.models.dual_encoder import DualEncoder
from fastclip.system.durable import write_json
from fastclip.system.reading import read_json, read_tensors

__all__ = ["ImageClassifier", "load_classifier", "save_classifier"]


class ImageClassifier(nn.Module):
    """Classifier with the logits W u + b for the unit vector u of an image.

    Images (B, 3, H, W) become logits (B, C), float32. If W holds the class embeddings times the logit scale and b is 0,
    the module is the zero-shot classifier (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", section 2).
    The head computes in float32 even under autocast, because bfloat16 has steps of 0.5 at logits of 100.

    Args:
        visual: image tower, images (B, 3, H, W) -> features (B, D).
        weight: initial weight of the head, (C, D), which is copied. The bias begins at 0.
        class_names: names of the C classes.
        freeze_image: freeze the image tower: no gradients, and always in eval mode.
    """

    def __init__(
        self, visual: nn.Module, weight: Tensor, class_names: Sequence[str], *, freeze_image: bool = False
    ) -> None:
        super().__init__()
        classes, width = weight.shape
        assert classes == len(class_names)
        self.visual = visual
        self.head = nn.Linear(width, classes, device=weight.device)
        with torch.no_grad():
            self.head.weight.copy_(weight)
            self.head.bias.zero_()
        self.class_names = tuple(class_names)
        self.freeze_image = freeze_image
        visual.requires_grad_(not freeze_image)

    def forward(self, images: Tensor) -> Tensor:
        features = self.visual(images)
        with torch.autocast(images.device.type, enabled=False):
            return self.head(F.normalize(features.float(), dim=-1))

    @torch.no_grad()
    def largest_score(self) -> float:
        """Return an upper bound of the logits of any image: the largest norm of a weight row plus the largest |b|."""
        return float(self.head.weight.norm(dim=1).max() + self.head.bias.abs().max())

    def train(self, mode: bool = True) -> ImageClassifier:
        super().train(mode)
        if self.freeze_image:
            self.visual.eval()  # in training mode, the statistics of BatchNorm would move even without gradients
        return self


def save_classifier(classifier: ImageClassifier, model: DualEncoder, folder: Path) -> None:
    """Write a classifier and the model that its image tower belongs to.

    The folder contains the files of `DualEncoder.save_pretrained`, ``head.safetensors`` with ``weight`` (C, D) and
    ``bias`` (C,), and ``classes.json`` with the C names.
    """
    assert model.visual is classifier.visual
    with new_model(folder, CLASSIFIER_FILES) as half:
        model.write_files(half)
        write_weights(half / HEAD, classifier.head.state_dict())
        write_json(half / CLASSES, {"class_names": list(classifier.class_names)})


def load_classifier(folder: str | Path, *, device: torch.device | str = "cpu") -> ImageClassifier:
    """Load a classifier, in eval mode, from a folder that `save_classifier` wrote.

    Raises:
        FileNotFoundError: the folder contains no classifier.
        ValueError: the files of the folder do not fit together.
    """
    from fastclip.models.factory import create_model

    folder = Path(folder)
    if not (folder / HEAD).is_file():
        raise FileNotFoundError(f"{folder} contains no classifier: {HEAD} is missing")
    names = read_json(folder / CLASSES).get("class_names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{folder / CLASSES}: class_names must be a list of names, got {shown(names)}")
    head = read_tensors(folder / HEAD, ("weight", "bias"), device=str(device))
    model = create_model(pretrained=folder, device=device)
    assert model.config is not None
    for name, wanted in (("weight", (len(names), model.config.embed_dim)), ("bias", (len(names),))):
        if (shape := tuple(head[name].shape)) != wanted or not head[name].is_floating_point():
            raise ValueError(
                f"{folder / HEAD}: the head's {name} has the shape {shape} and the dtype {head[name].dtype}, but to "
                f"fit its classes and the model's features it must have the shape {wanted} and a floating-point dtype"
            )
    classifier = ImageClassifier(model.visual, head["weight"], names)
    classifier.head.load_state_dict(head)
    return classifier.eval()

"""Texts of a step: sorted by length, cut to the longest of their call, and back in the order of the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from support import needs

needs("models")

from fastclip.data.batch import Batch
from fastclip.models import DualEncoder, create_model
from fastclip.training.ranks import World
from fastclip.training.step.losses import named_loss
from fastclip.training.step.micro_batches import by_length, micro_batches
from fastclip.training.step.optim import build_optimizer
from fastclip.training.step.update import Stepper

CPU = torch.device("cpu")
B, L, END = 24, 16, 49407


def model_of(name: str = "ViT-tiny") -> DualEncoder:
    torch.manual_seed(0)
    return create_model(name, context_length=L).eval()  # without BERT's dropout


def pieces(name: str = "ViT-tiny", size: int = 8) -> list[Batch]:
    """Return micro-batches of texts of 2 to L tokens."""
    generator = torch.Generator().manual_seed(1)
    side = 32 if name == "ViT-tiny" else 64
    images, ids = torch.randn(B, 3, side, side, generator=generator), torch.zeros(B, L, dtype=torch.int64)
    lengths = torch.randint(2, L + 1, (B,), generator=generator)
    for row, n in zip(ids, lengths.tolist()):
        row[:n] = torch.randint(1, 90, (n,), generator=generator)
        if name == "ViT-tiny":
            row[n - 1] = END
    whole = Batch(images, ids, torch.arange(B), tuple(map(str, range(B))))
    return [Batch(*(x[k : k + size] for x in whole[:4])) for k in range(0, B, size)]


@pytest.mark.parametrize("name", ["ViT-tiny", "align-tiny"])
@pytest.mark.parametrize(("size", "group"), [(8, None), (B, 5), (B, None), (7, 3)])
def test_features_are_those_of_whole_texts_in_the_order_of_the_batch(name: str, size: int, group: int | None) -> None:
    model, batches = model_of(name), pieces(name, size)
    with torch.no_grad():
        true = torch.cat([model.encode_text(batch.ids) for batch in batches])
        ours, order = micro_batches(batches, model, CPU, group=group)
        features = [model.encode_text(piece.arguments()[1]) for piece in ours]
    assert [len(x) for x in features] == [len(batch.keys) for batch in batches]
    torch.testing.assert_close(order.in_batch_order(torch.cat(features)), true, rtol=1e-5, atol=2e-6)
    for piece, batch in zip(ours, batches):
        assert torch.equal(piece.arguments()[0], batch.images)


def test_gradient_of_the_order_is_its_inverse() -> None:
    _, order = micro_batches(pieces(), model_of(), CPU)
    x = torch.randn(B, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(order.in_batch_order, (x,))
    assert not torch.equal(order.in_batch_order(x), x)


def test_text_tower_sees_little_padding() -> None:
    """A call takes texts of like length and is as wide as the longest of them."""
    model, batches = model_of(), pieces(size=6)
    lengths = model.text.lengths(torch.cat([batch.ids for batch in batches])).sort(descending=True).values
    widths = [int(x.max()) for x in lengths.split(6)]
    shapes = [piece.arguments()[1][0].shape for piece in micro_batches(batches, model, CPU)[0]]
    assert shapes == [(6, width) for width in widths]
    assert widths[0] > widths[-1]


@pytest.mark.parametrize(
    ("multiple", "widths"), [(1, [15, 9, 2]), (8, [16, 16, 8]), (16, [16, 16, 16]), (64, [20] * 3)]
)
def test_widths_are_multiples(multiple: int, widths: list[int]) -> None:
    lengths = torch.tensor([2, 15, 9, 1, 14, 3])
    order, calls = by_length(lengths, [2, 2, 2], multiple=multiple, context_length=20, group=None)
    assert order is not None and lengths[order].tolist() == [15, 14, 9, 3, 2, 1]
    assert calls == [[(2, width)] for width in widths]


def test_equal_lengths_keep_their_order() -> None:
    order, _ = by_length(torch.full((9,), 4), [5, 4], multiple=1, context_length=8, group=2)
    assert order is not None and order.tolist() == list(range(9))


def test_groups_depend_on_sizes_alone() -> None:
    """One call takes all texts if there are too few for two groups, and groups differ by at most one text."""
    lengths = torch.arange(1, 11)
    assert by_length(lengths, [10], multiple=1, context_length=10, group=6) == (None, [[(10, 10)]])
    _, calls = by_length(lengths, [10], multiple=1, context_length=10, group=3)
    assert calls == [[(3, 10), (3, 7), (4, 4)]]


def test_models_without_lengths_get_whole_texts() -> None:
    model, batches = model_of(), pieces()

    class Tower(torch.nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            return ids[:, :2].float()

    ours, order = micro_batches(batches, DualEncoder(model.visual, Tower()), CPU, group=2)
    assert [[x.shape for x in piece.arguments()[1]] for piece in ours] == [[(8, L)]] * 3
    assert order.in_batch_order(batches[0].ids) is batches[0].ids


class Reads(TorchDispatchMode):
    """List of the operations that change weights and of the reads for which a GPU would make the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "_fused_adamw_"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_a_step_waits_once_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of a step are read together, after the update was given to the device."""
    model, batches, reads = model_of(), pieces(), Reads()
    plain = Tensor.tolist
    optimizer = build_optimizer("adamw", model, lr=1e-3, weight_decay=0.1)
    stepper = Stepper(model, model, named_loss("clip"), optimizer, World(0, 1, CPU, None), max_grad_norm=1.0)
    function = stepper.loss.function

    def loss(*args: Tensor) -> Tensor:
        with torch.utils._python_dispatch._disable_current_modes():  # the loss on a CPU may read its numbers
            return function(*args)

    def tolist(x: Tensor) -> Any:
        if x.dtype.is_floating_point:
            reads.seen.append("tolist")
        return plain(x)

    monkeypatch.setattr(Tensor, "tolist", tolist)
    stepper.loss = stepper.loss._replace(function=loss)
    with reads:
        stepper.step(batches, step=0)
    updates = reads.seen.count("_fused_adamw_")
    # The host reads four numbers of its own before: the longest text of each call, and the sum of the lengths. After
    # the one read of the device's numbers it rounds the loss to the loss's dtype
    host = "_local_scalar_dense"
    assert updates and reads.seen == [host] * 4 + ["_fused_adamw_"] * updates + ["tolist", host]

"""The cached step gives the gradients of the plain step, which would not fit into memory."""

from __future__ import annotations

import functools
import multiprocessing
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.utils.parametrizations import spectral_norm

import fastclip
from fastclip.training import cached_step
from support import needs
from support.cached import Pair, Towers, assert_same, clip, cut, gradients, kept_whole, rows, sigmoid, unicl
from support.processes import join_group


@pytest.mark.parametrize("loss", [clip, unicl, sigmoid])
def test_gradients_are_the_one_shot_steps(loss: Callable[..., Tensor]) -> None:
    """Gradients equal those of one whole batch for all parameters, including scale and bias, with micro-batches of
    different sizes, one of them a single row.
    """
    ours = gradients(Pair(), lambda model: cached_step(model, cut(*rows()), loss))
    assert_same(ours, gradients(Pair(), kept_whole(loss, [rows()])))


def test_a_clip_model_of_this_package() -> None:
    needs("models")
    model = fastclip.create_model("ViT-tiny").train()
    images, ids = torch.randn(6, 3, 32, 32), torch.randint(1, 40, (6, model.config.text_cfg.context_length))
    loss = fastclip.contrastive_loss
    ours = gradients(model, lambda m: cached_step(m, zip(images.split(2), ids.split(2)), loss))
    assert_same(ours, gradients(model, kept_whole(loss, [(images, ids)])), rtol=2e-4)


def test_dropout_is_replayed() -> None:
    """Both passes draw the same dropout masks, and the generator ends in the state that one pass would leave."""
    torch.manual_seed(3)
    ours = gradients(Pair(dropout=0.5), lambda model: cached_step(model, cut(*rows()), clip))
    after = torch.rand(1)
    torch.manual_seed(3)
    true = gradients(Pair(dropout=0.5), kept_whole(clip, cut(*rows())))
    assert torch.equal(after, torch.rand(1))
    assert_same(ours, true)


def test_loss_draws_numbers_of_its_own() -> None:
    """The loss draws new random numbers in every step, and none of those that dropout draws."""

    def noisy(*outputs: Tensor) -> Tensor:
        drawn.append(float(torch.rand(1)))
        return clip(*outputs) * drawn[-1]

    def run(step: Callable[[], Tensor]) -> list[float]:
        drawn.clear()
        torch.manual_seed(3)
        for _ in range(3):
            step()
        return [*drawn, float(torch.rand(1))]

    drawn: list[float] = []
    for dropout in (0.0, 0.5):
        model = Pair(dropout=dropout)
        true = run(lambda model=model: kept_whole(noisy, cut(*rows()))(model))  # type: ignore[misc]
        assert run(lambda model=model: cached_step(model, cut(*rows()), noisy)) == true  # type: ignore[misc]


def test_batch_norm_is_a_micro_batchs_and_its_statistics_move_once() -> None:
    batches = cut(*rows())[:3]  # a single row has no variance
    models = [Pair(norm=True), Pair(norm=True), Pair(norm=True)]
    cached_step(models[0], batches, clip)
    kept_whole(clip, batches)(models[1])
    kept_whole(clip, [[torch.cat(x) for x in zip(*batches)]])(models[2])
    for ours, true in zip(models[0].buffers(), models[1].buffers()):
        torch.testing.assert_close(ours, true)
    weight = [model.image[0].weight.grad for model in models]
    torch.testing.assert_close(weight[0], weight[1], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(weight[0], weight[2], rtol=1e-3), "a whole batch is normalised by its own statistics"


class Running(Pair):
    """A model that reads and updates a buffer, in place or by assignment; `read` lists the values that the
    passes read.
    """

    def __init__(self, in_place: bool, start: float = 1.0) -> None:
        super().__init__()
        self.in_place, self.read = in_place, []
        self.register_buffer("mean", torch.full((7,), start, dtype=torch.float64))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, ...]:
        mean = self.mean.clone()
        self.read.append(mean)
        moved = 0.7 * mean + 0.3 * images.mean(0)
        if self.in_place:
            self.mean.copy_(moved)
        else:
            self.mean = moved
        return super().forward(images - mean, texts)


def test_buffers_that_a_pass_makes_are_as_it_found_them() -> None:
    """The second pass starts from the buffers of the first, even if the first changes their shapes or creates them."""

    class Grows(Pair):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.zeros(1))
            self.register_buffer("last", None)
            self.read: list[Any] = []

        def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, ...]:
            self.read.append((self.table.shape, self.last is None))
            self.table, self.last = torch.zeros(len(images)), images.sum()
            return super().forward(images, texts)

    model, batches = Grows(), cut(*rows())
    cached_step(model, batches, clip)
    assert model.read[:4] == model.read[4:] and len(model.table) == len(batches[-1][0]) and model.last is not None


@pytest.mark.parametrize("in_place", [True, False])
def test_running_statistics_are_replayed(in_place: bool) -> None:
    models = [Running(in_place) for _ in range(2)]
    values = cached_step(models[0], cut(*rows()), clip), kept_whole(clip, cut(*rows()))(models[1])
    ours, true = ((value, [p.grad for p in model.parameters()]) for value, model in zip(values, models))
    assert_same(ours, true)
    torch.testing.assert_close(models[0].mean, models[1].mean)


def test_buffers_that_a_pass_reads_and_changes_are_replayed() -> None:
    model = Pair()
    for tower in (model.image, model.text):
        spectral_norm(tower[0])
    step = kept_whole(clip, cut(*rows()))
    ours = gradients(model, lambda m: cached_step(m, cut(*rows()), clip))
    assert_same(ours, gradients(model, step))


@pytest.mark.fault("A micro-batch differs between the two passes of `cached_step`", "An error states this")
def test_micro_batches_that_change_are_refused() -> None:
    model, (images, texts) = Pair(), rows()

    def in_place(images: Tensor, texts: Tensor) -> tuple[Tensor, ...]:
        return model(images.sub_(0.1), texts)

    def one_buffer() -> Iterator[tuple[Tensor, Tensor]]:
        buffer = torch.empty(11, 7, dtype=images.dtype)
        for image, text in zip(images.split(11), texts.split(11)):
            yield buffer.copy_(image), text

    for forward, batches in ((in_place, [(images.clone(), texts)]), (model, one_buffer())):
        with pytest.raises(ValueError, match=r"a tensor of a micro-batch has changed: .* reads each of them twice"):
            cached_step(forward, batches, clip)
    with torch.inference_mode():
        fixed = images.clone(), texts.clone()  # inference tensors have no version counter
    true = gradients(model, lambda m: cached_step(m, [(images, texts)], clip))
    copied = gradients(model, lambda m: cached_step(lambda i, t: m(i.clone(), t.clone()), [fixed], clip))
    assert_same(copied, true)


def test_autocast() -> None:
    """Weights that the first pass casts without a gradient are not reused in the second."""
    model = Pair(dtype=torch.float32)
    batches = cut(*rows(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        ours = gradients(model, lambda m: cached_step(m, batches, clip))
        true = gradients(model, kept_whole(clip, batches))
    assert_same(ours, true, rtol=2e-2)


class Saved:
    """A tensor that a graph keeps for its backward pass."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


def most_saved(step: Callable[[], Any]) -> int:
    """Return the largest number of bytes that graphs keep at any time."""
    alive: weakref.WeakSet[Saved] = weakref.WeakSet()
    most = 0

    def pack(x: Tensor) -> Saved:
        nonlocal most
        saved = Saved(x)
        alive.add(saved)
        most = max(most, sum(one.x.nbytes for one in alive))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.x):
        step()
    return most


def test_one_graph_at_a_time() -> None:
    model, batches = Pair(), list(zip(*(x.split(10) for x in rows(size=400))))

    def loss(image: Tensor, text: Tensor, *_: Tensor) -> Tensor:
        return (image * text).sum()

    one = most_saved(lambda: kept_whole(loss, batches[:1])(model))
    features = 2 * 400 * 6 * 8
    assert most_saved(lambda: cached_step(model, batches, loss)) <= one + features
    assert most_saved(lambda: kept_whole(loss, batches)(model)) > 20 * one


def test_gradients_add_up_and_the_scaler_scales() -> None:
    model = Pair()
    true = gradients(model, lambda m: cached_step(m, cut(*rows()), clip))

    class Scaler:
        def scale(self, x: Tensor) -> Tensor:
            return 8 * x

    def thrice(m: nn.Module) -> Tensor:
        cached_step(m, cut(*rows()), clip)
        return cached_step(m, cut(*rows()), clip, grad_scaler=Scaler(), keep_on="cpu")

    ours = gradients(model, thrice)
    assert_same(ours, (true[0], [None if g is None else 9 * g for g in true[1]]))


def test_locked_towers_and_three_features() -> None:
    """A frozen tower gets no gradients, and a third view's features are treated as features."""
    model = Pair()
    model.image.requires_grad_(False)

    def forward(images: Tensor, texts: Tensor) -> tuple[Tensor, ...]:
        image, text, scale, _ = model(images, texts)
        return image, text, model.text(texts + 1), scale

    def loss(*outputs: Tensor) -> Tensor:
        return fastclip.multiview_loss(outputs[:3], outputs[3])

    value = cached_step(forward, cut(*rows()), loss)
    assert all(p.grad is None for p in model.image.parameters())
    ours = [p.grad.clone() for p in model.text.parameters()]
    model.zero_grad()
    whole = loss(*forward(*rows()))
    whole.backward()
    torch.testing.assert_close(value, whole.detach())
    for a, p in zip(ours, model.text.parameters()):
        torch.testing.assert_close(a, p.grad, rtol=1e-10, atol=1e-12)


def by_itself(model: Pair) -> Callable[..., Tensor]:
    """Return a loss that reads two parameters of the model directly; the bias is among the model's outputs as well."""

    def loss(image: Tensor, text: Tensor, *rest: Tensor) -> Tensor:
        group = dist.group.WORLD if dist.is_initialized() else None
        value = fastclip.sigmoid_loss(image, text, model.log_scale.exp(), model.bias, group=group)
        return value + 0.1 * model.image[0].weight.square().sum()

    return loss


@pytest.mark.parametrize("modules", [True, False], ids=["told", "not told"])
def test_parameters_that_the_loss_reads_by_itself(modules: bool) -> None:
    """Gradients of parameters that the loss reads directly are added to the existing ones, and
    a hook sees each gradient once.
    """

    def cached(model: Pair) -> Tensor:
        forward = (lambda *batch: model(*batch)[:2]) if not modules else model
        return cached_step(forward, cut(*rows()), by_itself(model))

    def twice(step: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
        def run(model: Any) -> Tensor:
            seen.clear()
            for p in (model.bias, model.image[0].weight):
                p.register_hook(lambda grad: 3 * grad)
            model.bias.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
            step(model)
            return step(model)

        return run

    seen: list[Tensor] = []
    ours = gradients(Pair(), twice(cached)), [*seen]
    true = gradients(Pair(), twice(whole)), [*seen]
    assert_same(ours[0], true[0])
    torch.testing.assert_close(ours[1], true[1])


def whole(model: Pair) -> Tensor:
    value = by_itself(model)(*model(*rows()))
    value.backward()
    return value.detach()


@pytest.mark.parametrize(
    ("forward", "batches", "loss", "message"),
    [
        (Pair(), [], clip, "at least one micro-batch"),
        (
            lambda x: x,
            [(torch.ones(2, 3),)],
            clip,
            r"forward must return two or more features .* got a tensor \(2, 3\)",
        ),
        (lambda x: (x, x.sum(1)), [(torch.ones(2, 3),)], clip, r"got \(a tensor \(2, 3\), a tensor \(2,\)\)"),
        (Pair(), [rows()], lambda *x: x[0], r"loss must return a scalar tensor, got a tensor \(22, 6\)"),
    ],
)
def test_misfit_raises(forward: Any, batches: Any, loss: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cached_step(forward, batches, loss)


@pytest.mark.parametrize(
    "batches", [[{"images": 1}], torch.ones(2, 2, 3), ["ab"]], ids=lambda batches: str(type(batches))
)
def test_micro_batches_are_arguments(batches: Any) -> None:
    message = r"must be the arguments of forward, .* got (dict|Tensor|str)\. .*, pass \[\(batch,\) for batch in"
    with pytest.raises(TypeError, match=message):
        cached_step(Pair(), batches, clip)


def ddp_reads(rank: int, micro_batches: Any) -> Any:
    """Take two steps with one bucket per parameter. State that the first step leaves must not disturb the second."""
    model = Pair()
    wrapped = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1e-6, gradient_as_bucket_view=True)
    for _ in range(2):
        cached_step(lambda *batch: wrapped(*batch)[:2], micro_batches, by_itself(model), modules=[wrapped])
    return [p.grad / 2 for p in model.parameters()]


def ddp_reads_unused(rank: int, micro_batches: Any) -> Any:
    """Take a step in which DistributedDataParallel looks for unused parameters: one that only the loss reads looks
    unused.
    """
    model = Towers()
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    cached_step(wrapped, micro_batches, by_itself(model))
    return [p.grad for p in model.parameters()]


def ddp_reads_static(rank: int, micro_batches: Any) -> Any:
    model = Pair()
    wrapped = nn.parallel.DistributedDataParallel(model, static_graph=True)
    with pytest.raises(ValueError, match=r"static_graph=True\) does not support: let forward return"):
        cached_step(lambda *batch: wrapped(*batch)[:2], micro_batches, by_itself(model), modules=[wrapped])
    return []


def ddp_reads_untold(rank: int, micro_batches: Any) -> Any:
    model = Pair()
    wrapped = nn.parallel.DistributedDataParallel(model)
    images, texts = (torch.cat(x) for x in zip(*micro_batches))
    cached_step(lambda *batch: wrapped(*batch)[:2], [(images, texts)], by_itself(model))
    return [p.grad for p in model.parameters()]


def towers_exchange_once(rank: int, micro_batches: Any) -> Any:
    """Wrap each tower separately. Ranks with unequal numbers of micro-batches would hang if each one exchanged."""
    model = Pair()
    model.image, model.text = (nn.parallel.DistributedDataParallel(x) for x in (model.image, model.text))
    exchanged = []

    def hook(state, bucket):
        exchanged.append(bucket.buffer().numel())
        return allreduce_hook(dist.group.WORLD, bucket)

    for tower in (model.image, model.text):
        tower.register_comm_hook(None, hook)
    cached_step(model, micro_batches, lambda *x: fastclip.sigmoid_loss(*x, group=dist.group.WORLD))
    return [p.grad for p in model.parameters()], sum(exchanged)


def ddp_buffers(rank: int, micro_batches: Any, compiled: bool = False) -> Any:
    """Return what both passes of two steps read. DistributedDataParallel broadcasts the buffers of rank 0 first."""
    model = Running(in_place=True, start=float(rank))
    wrapped: Any = nn.parallel.DistributedDataParallel(model)
    if compiled:
        wrapped = torch.compile(wrapped, backend="eager")
    for _ in range(2):
        cached_step(wrapped, micro_batches, lambda *x: fastclip.sigmoid_loss(*x, group=dist.group.WORLD))
        with torch.no_grad():
            model.mean += rank
    return torch.stack(model.read).reshape(2, 2, len(micro_batches), 7)


BY_ITSELF = {
    "ddp": ddp_reads,
    "ddp, not told": ddp_reads_untold,
    "ddp, unused": ddp_reads_unused,
    "ddp, static": ddp_reads_static,
    "towers": towers_exchange_once,
    "buffers": ddp_buffers,
    "buffers, compiled": functools.partial(ddp_buffers, compiled=True),
}


def work(rank: int, W: int, folder: str) -> None:
    torch.set_num_threads(1)
    join_group(rank, W, folder)
    model = Pair()
    wrapped = nn.parallel.DistributedDataParallel(model)
    exchanged = 0

    def hook(state, bucket):
        nonlocal exchanged
        exchanged += bucket.buffer().numel()
        return allreduce_hook(dist.group.WORLD, bucket)

    wrapped.register_comm_hook(None, hook)
    images, texts = (x[rank::W] for x in rows())
    # the ranks have different numbers of micro-batches
    micro_batches = list(zip(images.split(4 + rank), texts.split(4 + rank)))

    def loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return fastclip.sigmoid_loss(image, text, scale, bias, group=dist.group.WORLD)

    cached_step(wrapped, micro_batches, loss)
    by_themselves = {name: step(rank, micro_batches) for name, step in BY_ITSELF.items()}
    torch.save(([p.grad for p in model.parameters()], exchanged, by_themselves), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks() -> list[Any]:
    """Results of both ranks."""
    if not hasattr(os, "fork"):
        pytest.skip("the ranks are forked")
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=work, args=(rank, 2, folder)) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [0, 0]
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_ddp_exchanges_once(ranks: list[Any]) -> None:
    """Two ranks with different numbers and sizes of micro-batches exchange once, and give the gradients of
    one process.
    """
    model = Pair()
    image, text, scale, bias = model(*rows())
    fastclip.sigmoid_loss(image, text, scale, bias).backward()
    size = sum(p.numel() for p in model.parameters())
    for grads, exchanged, _ in ranks:
        assert exchanged == size
        for ours, p in zip(grads, model.parameters()):
            torch.testing.assert_close(ours, p.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["ddp", "ddp, not told", "ddp, unused"])
def test_ddp_averages_what_the_loss_reads_by_itself(name: str, ranks: list[Any]) -> None:
    """Every rank has the gradients of one process, including those of scale and bias."""
    model = Pair()
    whole(model)
    for *_, found in ranks:
        for ours, p in zip(found[name], model.parameters()):
            torch.testing.assert_close(ours, p.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["buffers", "buffers, compiled"])
def test_ddp_replays_the_buffers_that_it_gave(name: str, ranks: list[Any]) -> None:
    found = [by_themselves[name] for *_, by_themselves in ranks]
    for steps in found:
        assert torch.equal(steps[:, 0], steps[:, 1])  # the second pass reads what the first read
    assert torch.equal(found[0][:, :, 0], found[1][:, :, 0])  # broadcast from rank 0


def test_towers_in_a_module_exchange_once(ranks: list[Any]) -> None:
    model = Pair()
    fastclip.sigmoid_loss(*model(*rows())).backward()
    for *_, found in ranks:
        grads, exchanged = found["towers"]
        assert exchanged == sum(p.numel() for p in (*model.image.parameters(), *model.text.parameters()))
        scalars = {p.shape for p in (model.log_scale, model.bias)}
        for ours, p in zip(grads, model.parameters()):
            if p.shape not in scalars:  # the caller averages the scalars
                torch.testing.assert_close(ours, p.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [iter, lambda modules: modules[0]], ids=["iterator", "module"])
def test_modules_of_any_kind(kind: Callable[[Any], Any]) -> None:
    """Any iterable of modules, or a single module, is accepted, and the second pass undoes changes of their buffers."""
    batches = cut(*rows())[:3]
    models = [Pair(norm=True), Pair(norm=True)]
    cached_step(lambda *x: models[0](*x), batches, clip, modules=kind([models[0]]))
    kept_whole(clip, batches)(models[1])
    for ours, true in zip(models[0].buffers(), models[1].buffers()):
        torch.testing.assert_close(ours, true)

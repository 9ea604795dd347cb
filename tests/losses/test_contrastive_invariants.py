"""Properties of the loss that need no reference: symmetries, identities, repeatability, thread counts."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastclip
from fastclip._backends import cpu
from fastclip._backends.cpu import blocks, contrastive, native
from fastclip._backends.problem import SideGrads
from fastclip.ops.contrastive import flat
from support.accuracy import counted_products, pairs
from support.processes import ended, forked, forks


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    if cpu.missing() is None:
        native.module.select_threads("borrowed")


def run(image: Tensor, text: Tensor, scale: float = 14.3, **options: object) -> tuple[Tensor, ...]:
    """Return loss, d_image, d_text and d_scale."""
    given = image.clone().requires_grad_(), text.clone().requires_grad_(), torch.tensor(scale, requires_grad=True)
    loss = fastclip.contrastive_loss(*given, **options)
    return loss.detach(), *torch.autograd.grad(loss, given)


def assert_same(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> None:
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)


def test_native_code_is_what_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """The native module serves the calls of these tests. The test fails, and is never skipped, if the module is
    missing.
    """
    assert fastclip.backends()["cpu"] == "available"
    monkeypatch.delenv("FASTCLIP_BACKEND", raising=False)
    calls = []
    real = native.module

    class Spy:
        def __getattr__(self, name: str) -> object:
            if name.endswith(("_fwd", "_bwd")):
                calls.append(name)
            return getattr(real, name)

    monkeypatch.setattr(native, "module", Spy())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        calls.clear()
        image, text = (x.to(dtype).requires_grad_() for x in pairs(8, 8, 4))
        fastclip.contrastive_loss(image, text).backward()
        assert calls == ["loss_fwd", "loss_bwd"]
        fastclip.contrastive_loss(image, text, reduction="sum").backward()
        assert calls[2:] == ["contrastive_fwd", "contrastive_bwd"]


def test_modalities_swap() -> None:
    image, text = pairs(70, 90, 16)
    y = {"image_labels": torch.arange(70) % 31, "text_labels": torch.arange(90) % 37}
    loss, d_image, d_text, d_scale = run(image, text, image_weight=0.75, **y)
    y = {"image_labels": y["text_labels"], "text_labels": y["image_labels"]}
    mirrored = run(text, image, image_weight=0.25, **y)
    for ours, theirs in zip((loss, d_text, d_image, d_scale), mirrored):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def test_pairs_permute() -> None:
    image, text = pairs(600, 600, 16)
    order = torch.arange(600) * 7 % 600
    loss, d_image, d_text, d_scale = run(image, text)
    permuted = run(image[order], text[order])
    for ours, theirs in zip((loss, d_image[order], d_text[order], d_scale), permuted):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def test_gradients_obey_euler() -> None:
    """The logits are linear in images, texts and scale, so that <I, dI> = <T, dT> = s ds."""
    image, text = pairs(300, 300, 32)
    image, text = image / 6, text / 6
    _, d_image, d_text, d_scale = run(image, text, 9.0, normalize=False)
    whole = 9.0 * d_scale.double()
    torch.testing.assert_close((image.double() * d_image).sum(), whole, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close((text.double() * d_text).sum(), whole, rtol=1e-5, atol=1e-9)


def test_normalised_gradient_is_tangent() -> None:
    image, text = pairs(300, 300, 32)
    _, d_image, d_text, _ = run(image, text)
    for x, d in ((image, d_image), (text, d_text)):
        cosine = (x * d).sum(1) / (x.norm(dim=1) * d.norm(dim=1))
        assert cosine.abs().max() < 1e-5


@pytest.mark.parametrize("N", [1, 2, 65, 1000])
def test_identical_features_give_log_n(N: int) -> None:
    x = torch.ones(N, 5)
    assert abs(run(x, x)[0].item() - math.log(N)) < 1e-6


def test_labels_of_pairs_change_nothing() -> None:
    image, text = pairs(200, 200, 16)
    y = torch.arange(200) + 5
    for ours, theirs in zip(run(image, text), run(image, text, image_labels=y, text_labels=y)):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_runs_bitwise_repeatable(dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    image, text = (x.to(dtype) for x in pairs(700, 700, 40))
    y = torch.arange(700) % 300
    for options in ({}, {"image_labels": y, "text_labels": y}):
        first = run(image, text, **options)
        for _ in range(20):
            assert_same(first, run(image, text, **options))


def block_results(threads: int) -> tuple[Tensor, ...]:
    """Run both native passes over one given block of dot products."""
    M, N = 500, 1300
    generator = torch.Generator().manual_seed(0)
    dot = torch.randn(M, N, generator=generator)
    label = (torch.arange(M, dtype=torch.int32) % 90, torch.arange(N, dtype=torch.int32) % 110)
    factors = (
        {"factor": torch.full((M,), 2.0), "factor_low": torch.zeros(M)},
        {"factor": torch.ones(N), "factor_low": None},
    )
    rows, cols = contrastive.State(M, factors[0], label[0]), contrastive.State(N, factors[1], label[1])
    block = blocks.native_block((dot.data_ptr(), N, M, N, 0, 0), offset=0)
    native.module.contrastive_fwd(block, rows.native, cols.native, threads)
    sides = []
    for size, side, y, state in ((M, factors[0], label[0], rows), (N, factors[1], label[1], cols)):
        d, ones = torch.linspace(0.1, 1.0, size), torch.ones(size)
        sides.append(contrastive.Weights(side, ones, y, state.results(ones), SideGrads(d, -d, d), 1.0))
    d_scale = native.module.contrastive_bwd(block, sides[0].native, sides[1].native, threads)
    stats = flat((rows.results(torch.ones(M)), cols.results(torch.ones(N))))
    return *stats, dot, torch.tensor(d_scale, dtype=torch.float64)


def test_native_passes_bitwise_equal_over_thread_counts() -> None:
    """The native passes give the same bits with any number of threads. The matrix products of the library do not on
    most machines, so the dot products are given.
    """
    first = block_results(1)
    for kind in ("borrowed", "pool"):
        native.module.select_threads(kind)
        assert native.module.threads() == kind
        for threads in (2, 3, 8):
            for _ in range(10):
                assert_same(first, block_results(threads))


def test_loss_agrees_over_thread_counts() -> None:
    image, text = pairs(700, 700, 40)
    torch.set_num_threads(1)
    first = run(image, text)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        for ours, theirs in zip(first, run(image, text)):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def test_threads_of_python_do_not_disturb_each_other() -> None:
    problems = [tuple(x * (k + 1) for x in pairs(300 + k, 300 + k, 16, seed=k)) for k in range(4)]
    expected = [run(*problem) for problem in problems]
    for kind in ("borrowed", "pool"):
        native.module.select_threads(kind)
        found: dict[int, list[tuple[Tensor, ...]]] = {k: [] for k in range(4)}

        def work(k: int, found: dict[int, list[tuple[Tensor, ...]]] = found) -> None:
            for _ in range(10):
                found[k].append(run(*problems[k]))

        threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for k, results in found.items():
            assert len(results) == 10
            for result in results:
                for ours, theirs in zip(result, expected[k]):
                    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


@forks
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("kind", ["borrowed", "pool"])
def test_native_passes_work_after_fork(kind: str) -> None:
    native.module.select_threads(kind)
    expected = block_results(2)  # started before the fork, so that the parent has threads

    def works() -> None:
        torch.set_num_threads(1)  # torch's threads do not survive a fork; the call below asks for 2
        assert all(torch.equal(a, b) for a, b in zip(expected, block_results(2)))
        assert native.module.threads() == "pool"

    assert ended(forked(works), 30) == 0


def test_graph_can_be_used_twice() -> None:
    image, text = pairs(300, 300, 16)
    image.requires_grad_()
    loss = fastclip.contrastive_loss(image, text)
    (first,) = torch.autograd.grad(loss, image, retain_graph=True)
    (second,) = torch.autograd.grad(loss, image)
    assert torch.equal(first, second)


@pytest.mark.parametrize("megabytes", ["64", "0.5"])
def test_kept_block_is_the_forward_pass_own(monkeypatch: pytest.MonkeyPatch, megabytes: str) -> None:
    """The backward pass uses the block in the workspace only if its own forward pass left it there."""
    monkeypatch.setenv("FASTCLIP_WORKSPACE_MB", megabytes)
    first, second = pairs(400, 400, 16, seed=1), pairs(400, 400, 16, seed=2)
    expected = [run(*first), run(*second)]
    given = [[x.clone().requires_grad_() for x in problem] for problem in (first, second)]
    losses = [fastclip.contrastive_loss(*problem, 14.3) for problem in given]
    for k in (0, 1):  # the block of the first loss has been overwritten by that of the second
        found = torch.autograd.grad(losses[k], given[k])
        assert_same(found, expected[k][1:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("megabytes", "most"), [("0.05", 8), ("64", 6)])
def test_work_is_four_products_at_most(
    monkeypatch: pytest.MonkeyPatch, megabytes: str, most: int, dtype: torch.dtype
) -> None:
    """Forward and backward take at most 8 M N D operations in any number of blocks, and 6 M N D if the forward pass
    leaves its only block in the workspace.
    """
    monkeypatch.setenv("FASTCLIP_WORKSPACE_MB", megabytes)
    image, text = (x.to(dtype) for x in pairs(700, 700, 16))
    operations = counted_products(monkeypatch)
    y = torch.arange(700) % 300
    for options in ({}, {"image_labels": y, "text_labels": y, "label_smoothing": 0.1}):
        operations.clear()
        run(image, text, **options)
        assert 6 * 700 * 700 * 16 <= sum(operations) <= most * 700 * 700 * 16


def test_workspace_stays_within_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    for megabytes in (8, 1):
        monkeypatch.setenv("FASTCLIP_WORKSPACE_MB", str(megabytes))
        run(*pairs(3000, 3000, 8))
        assert blocks.workspace.buffer is not None
        assert blocks.workspace.buffer.numel() * 4 <= megabytes * 2**20

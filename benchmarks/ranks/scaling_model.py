"""Analytical model of the loss on 8 to 1,024 GPUs: time of a step, its parts, and memory per rank.

Nothing here was measured on several GPUs. Measurements on one GPU are marked; docs/scaling.md has the sources.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastclip.system.env import WORKSPACE_MB

# Measured on one H200, 2026-11-27, torch 2.11, bf16, forward and backward on the 8 M N D basis: the last rows of
# results/cuda.csv, at N = 32,768 x 512, 65,536 x 768 and 131,072 x 1,024.
RATE = {512: 605e12, 768: 677e12, 1024: 664e12}
GEMM = 734e12  # a large product: 734 to 809 measured in the same runs
# Assumed rates of other parts of a GPU
MEMORY = 4.0e12  # bytes/s; 4.8e12 are specified
PROCESSORS, TILE = 132, (128, 192)  # of the CUDA kernels
CALL = 100e-6  # s of the host to launch one block's forward and backward pass, 14 kernels
WORKSPACE = WORKSPACE_MB["cuda"] * 2**20  # bytes
# Links, assumed from published reports (docs/scaling.md)
NODE = 8  # GPUs
BUS_NODE, BUS = 360e9, 350e9  # bytes/s per rank of a collective inside one node, and over several nodes
NIC, NVLINK = 46e9, 360e9  # bytes/s from one GPU to another
HOP_NODE, HOP, BASE = 3.4e-6, 14e-6, 8.4e-6  # s, from NCCL's own model of its ring (Simple protocol)
BF16, FP32, STATISTIC = 2, 4, 8  # bytes; log-sum-exps are sent in fp64
AGREEMENT = 504  # bytes by which each rank announces its arguments before a call; equal_shards=True omits them
# Bytes per element of the n x N logits that open_clip's two cross-entropies read and write (counted from the executed
# ops, bf16 features, no autocast; 84 under autocast), and that they hold at once
LOGIT_TRAFFIC, LOGIT_MEMORY = 36, 8
# Bytes per element of texts: the finish of a gradient (write, read twice, features twice, store), and the addition of
# each further chunk of rows. The ring adds the fp32 sums, and those of the images for every block
FINISH, CHUNK, RING_FINISH = 18, 8, 64
CHUNK_ROWS = 8192
STATISTICS = 80  # bytes per text that every rank holds: log-sum-exps, factors, their gradients

FORMS = ("fastclip_gather", "fastclip_ring", "open_clip_local")


def sent(form: str, W: int, n: int, D: int, size: int) -> tuple[float, float]:
    """Return the bytes that a rank sends forward and backward, with features of `size` bytes;
    counting.py defines the counts.
    """
    shard = n * D
    columns = (W - 1) * n * STATISTIC  # log-sum-exps to the columns' owners, and their gradients back
    if form == "fastclip_gather":
        there = (W - 1) * shard * size + columns
        return there + (W - 1) * AGREEMENT, there
    if form == "fastclip_ring":
        there = (W - 1) * shard * size + columns
        return there + (W - 1) * AGREEMENT, there + W * shard * FP32
    if form == "open_clip_local":
        return 2 * (W - 1) * shard * size, 2 * (W - 1) * shard * size
    if form == "open_clip":
        return 2 * (W - 1) * shard * size, 0
    assert form == "inf_cl"
    scale = 2 * 2 * (W - 1) / W * FP32
    return 2 * (W - 1) * shard * FP32, 2 * (2 * W - 1) * shard * FP32 + scale


@dataclass(frozen=True)
class Time:
    """Seconds of a step's parts on one rank; time hidden behind other parts does not count."""

    products: float
    memory: float = 0.0  # beyond what the measured rate includes
    launches: float = 0.0  # if the host is slower than the GPU
    gather: float = 0.0
    reduce_scatter: float = 0.0
    messages: float = 0.0  # of the ring, as far as not hidden
    columns: float = 0.0  # log-sum-exps

    @property
    def exposed(self) -> float:
        """Return the communication that nothing hides."""
        return self.gather + self.reduce_scatter + self.messages + self.columns

    @property
    def total(self) -> float:
        return self.products + self.memory + self.launches + self.exposed


def fill(rows: int, columns: int) -> float:
    """Return the share of the processors' work that is logits; the rest is edges of tiles and of the last wave."""
    tiles = math.ceil(rows / TILE[0]) * math.ceil(columns / TILE[1])
    return rows * columns / (math.ceil(tiles / PROCESSORS) * PROCESSORS * TILE[0] * TILE[1])


def collective(W: int, total_bytes: float) -> float:
    """Return the seconds of an all_gather or reduce_scatter of `total_bytes` over all ranks with NCCL's ring."""
    nodes = math.ceil(W / NODE)
    latency = BASE + (W - nodes) * HOP_NODE + (nodes - 1) * HOP
    return latency + (W - 1) / W * total_bytes / (BUS if nodes > 1 else BUS_NODE)


def message(W: int, size: float) -> float:
    """Return the seconds from one rank to the next; the slowest link sets a ring's pace."""
    return BASE + (HOP + size / NIC if W > NODE else HOP_NODE + size / NVLINK)


def columns(W: int, N: int) -> float:
    """Return the seconds of both exchanges of log-sum-exps: all_to_all with N values per rank."""
    outside = max(W - NODE, 0) / W
    return 2 * (BASE + HOP + W * 1e-6 + N * STATISTIC * (outside / NIC + (1 - outside) / NVLINK))


def time_gather(W: int, N: int, D: int) -> Time:
    n = N // W
    texts = float(N) * D
    products = 8 * n * texts / RATE[D] / fill(n, N)
    memory = (FINISH + CHUNK * (math.ceil(n / CHUNK_ROWS) - 1)) * texts / MEMORY
    return Time(
        products,
        memory,
        launches=max(CALL - products - memory, 0),
        gather=collective(W, texts * BF16),
        reduce_scatter=collective(W, texts * FP32),  # by NCCL; gloo, which is counted, sends the shares unsummed
        columns=columns(W, N),
    )


def time_ring(W: int, N: int, D: int) -> Time:
    """Return the time of the ring. Each step computes a block while the next texts, and the
    sums of the last block, are sent.
    """
    n = N // W
    block = float(n) * D
    product = 2 * n * block / RATE[D] / fill(n, n)
    memory = (RING_FINISH + CHUNK * (math.ceil(n / CHUNK_ROWS) - 1)) * block / MEMORY
    idle = max(CALL / 3 - product, 0), max(CALL * 2 / 3 - 3 * product - memory, 0)
    forward, backward = product + idle[0], 3 * product + memory + idle[1]
    text, sums = message(W, block * BF16), message(W, block * FP32)
    late = max(text - forward, 0) + max(text + sums - backward, 0)
    return Time(
        products=W * 4 * product,
        memory=W * memory,
        launches=W * sum(idle),
        messages=(W - 1) * late + sums,  # the last sums return to their owner
        columns=columns(W, N),
    )


def time_open_clip(W: int, N: int, D: int) -> Time:
    """Return the time of open_clip: both modalities are gathered, with dense logits twice. Copies of
    the gathered lists are left out.
    """
    n = N // W
    features = float(N) * D
    return Time(
        products=12 * n * features / GEMM / fill(n, N),
        memory=LOGIT_TRAFFIC * float(n) * N / MEMORY,
        gather=2 * collective(W, features * BF16),
        reduce_scatter=2 * collective(W, features * BF16),
    )


def time(form: str, W: int, N: int, D: int) -> Time:
    """Return the time of the loss, forward and backward."""
    return {"fastclip_gather": time_gather, "fastclip_ring": time_ring, "open_clip_local": time_open_clip}[form](
        W, N, D
    )


def gathered(N: int, D: int) -> float:
    """Return the bytes of all texts, their gradient (rounded and in fp32), log-sum-exps, factors and their
    gradients.
    """
    return N * (float(D) * (BF16 + FP32 + BF16) + STATISTICS)


def memory(form: str, W: int, N: int, D: int) -> float:
    """Return the bytes per rank beyond its own features and their gradients."""
    n, texts = N // W, float(N) * D
    if form == "fastclip_gather":
        return gathered(N, D) + min(WORKSPACE, BF16 * float(n) * N)
    # current and arriving blocks, current and arriving sums, shares, raw sums, sum of the images
    if form == "fastclip_ring":
        blocks = texts / W * (2 * BF16 + 2 * FP32 + 2 * FP32 + FP32 + 2 * FP32)
        return blocks + min(WORKSPACE, BF16 * n**2) + STATISTICS * N
    assert form == "open_clip_local"  # both modalities and their gradients, as lists and joined
    return 2 * texts * 2 * 2 * BF16 + LOGIT_MEMORY * float(n) * N

"""The CUDA kernels' main loop: each wait, barrier and fence."""

from __future__ import annotations

from broken import NUMBERS, Break, Promise

PROMISES = [
    Promise(
        NUMBERS,
        "Every tile of the CUDA kernels agrees with float64, in whatever order the hardware runs its warps",
        tests=[
            "backends/test_cuda.py::test_statistics",
            "backends/test_cuda.py::test_weights",
            "backends/test_cuda.py::test_sigmoid_of_products_beyond_fp32",
        ],
        breaks=[
            Break(
                "barriers are not fenced",
                "csrc/cuda/tile.cuh",
                old="mbarrier_init_fence();",
                new="",
            ),
            Break(
                "the cluster does not wait for its barriers",
                "csrc/cuda/tile.cuh",
                old="cluster_sync();\n  if (group == 0) {",
                new="if (group == 0) {",
            ),
            Break(
                "a CTA leaves its neighbour alone",
                "csrc/cuda/tile.cuh",
                old="cluster_sync();  // the other CTA",
                new="// the other CTA",
            ),
            Break(
                "one CTA's warps release a stage",
                "csrc/cuda/tile.cuh",
                old="mbarrier_init(&s.empty[k], 4 * kCluster);",
                new="mbarrier_init(&s.empty[k], 4);",
            ),
            Break(
                "a stage is overwritten while it is read",
                "csrc/cuda/tile.cuh",
                old="mbarrier_wait(&s.empty[stage], parity);",
                new="",
            ),
            Break(
                "the producer waits for a release of a fresh stage",
                "csrc/cuda/tile.cuh",
                old="uint32_t parity = 1;  // a fresh",
                new="uint32_t parity = 0;  // a fresh",
            ),
            Break(
                "bytes are not announced",
                "csrc/cuda/tile.cuh",
                old="mbarrier_expect(&s.full[stage], Smem<Op>::kStageBytes);",
                new="mbarrier_expect(&s.full[stage], 0);",
            ),
            Break(
                "the text block is not shared",
                "csrc/cuda/tile.cuh",
                old="tile.j0 + rank * kShare, (1 << kCluster) - 1);",
                new="tile.j0 + rank * kShare, 1 << rank);",
            ),
            Break(
                "nobody has the first turn",
                "csrc/cuda/tile.cuh",
                old="if (mine == 1) named_arrive(other_turn, 256);",
                new="if (mine == 2) named_arrive(other_turn, 256);",
            ),
            Break(
                "turns are not waited for, and the tile's vectors not published",
                "csrc/cuda/tile.cuh",
                old="named_sync(turn, 256);",
                new="named_arrive(turn, 256);",
            ),
            Break(
                "the turn is kept",
                "csrc/cuda/tile.cuh",
                old="if (k + 1 < count) named_arrive(other_turn, 256);",
                new="",
            ),
            Break(
                "a stage is read before it is full",
                "csrc/cuda/tile.cuh",
                old="mbarrier_wait(&s.full[stage], parity);",
                new="",
            ),
            Break(
                "products start without a fence",
                "csrc/cuda/tile.cuh",
                old="wgmma_fence();",
                new="",
            ),
            Break(
                "a stage is released before its products are done",
                "csrc/cuda/tile.cuh",
                old="wgmma_wait<1>();",
                new="",
            ),
            Break(
                "the last products are not waited for",
                "csrc/cuda/tile.cuh",
                old="wgmma_wait<0>();",
                new="",
            ),
            Break(
                "the last stage is not released",
                "csrc/cuda/tile.cuh",
                old="if (lane < kCluster) mbarrier_arrive_in(&s.empty[last], lane);",
                new="",
            ),
            Break(
                "stages of the other consumer are not skipped",
                "csrc/cuda/tile.cuh",
                old="const uint32_t step = static_cast<uint32_t>(k) * p.k_blocks;",
                new="const uint32_t step = static_cast<uint32_t>(k / 2) * p.k_blocks;",
            ),
            Break(
                "column sums are read before all warps wrote",
                "csrc/cuda/contrastive_fwd.cu",
                old="t.sync();",
                new="",
            ),
            Break(
                "the TMA stores what it may not see",
                "csrc/cuda/store.cuh",
                old="tma_store_fence();",
                new="",
            ),
            Break(
                "a piece is stored before all threads wrote it",
                "csrc/cuda/store.cuh",
                old="__syncwarp();",
                new="",
            ),
            Break(
                "a tile's vectors are written while others read them",
                "csrc/cuda/store.cuh",
                old="t.sync();",
                new="",
            ),
            Break(
                "a warp begins again while it stores",
                "csrc/cuda/sigmoid_fwd.cu",
                old="if (kGradients && t.at.lane == 0) tma_store_wait_all();",
                new="",
            ),
            Break(
                "a buffer is written while it is stored",
                "csrc/cuda/store.cuh",
                old="tma_store_wait_read<S::kBuffers - 2>();",
                new="tma_store_wait_read<S::kBuffers - 1>();",
            ),
            Break(
                "a CTA leaves while it stores",
                "csrc/cuda/tile.cuh",
                old="if (Op::kStores && lane == 0) tma_store_wait_all();",
                new="",
            ),
            Break(
                "the swizzle of the stored pieces",
                "csrc/cuda/store.cuh",
                old="^ (t.at.lane & 7)) << 4)",
                new="^ (t.at.lane & 3)) << 4)",
            ),
        ],
    ),
]

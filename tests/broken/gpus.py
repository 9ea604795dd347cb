"""The kernels for GPUs."""

from __future__ import annotations

from broken import Break, Promise

TRITON = "backends/test_triton.py"
COMPILED = "backends/test_triton_compiled.py"
KERNELS = "triton_kernels/"
GPU = "backends/test_kernels.py"
GPU_SIGMOID = "backends/test_kernels_sigmoid.py"
CUDA = "backends/test_cuda.py"
CUDA_COMPILED = "backends/test_cuda_compiled.py"
TILE = "csrc/cuda/tile.cuh"
FWD_CU = "csrc/cuda/contrastive_fwd.cu"
BWD_CU = "csrc/cuda/contrastive_bwd.cu"
SIGMOID_CU = "csrc/cuda/sigmoid_fwd.cu"

# fmt: off
PROMISES: dict[str, list[Promise]] = {
    "Triton backend": [
        Promise(
            "loss and gradients as on a CPU, on fp32 and fp16, over shapes, labels, offsets, layouts and both ways of reading",
            (f"{GPU}::test_loss_and_gradients_accurate", f"{TRITON}::test_both_accesses_accurate", f"{GPU}::test_labels_accurate", f"{GPU}::test_offset_of_a_shard", f"{TRITON}::test_layouts", f"{GPU}::test_one_side_aligned"),
            (
                Break("columns beyond N count", KERNELS + "contrastive_fwd.py", "inside = lj[None, :] < N - j0", "inside = lj[None, :] < N - j0 + 1"),
                Break("sides of different width", KERNELS + "features.py", "aligned &= x.shape[1] % 8 == 0", "aligned &= x.shape[1] > 0"),
                Break("rows beyond M count", KERNELS + "contrastive_fwd.py", "offset2 = tl.where(li < M - i0, tl.load(constants_ptr + OFFSET2), INF)", "offset2 = tl.load(constants_ptr + OFFSET2) + 0.0 * li"),
                Break("masked tiles only where the diagonal starts", KERNELS + "contrastive_bwd.py", "(first > -BLOCK_M) & (first < BLOCK_N)", "(first >= 0) & (first < BLOCK_N)"),
                Break("an offset of the wrong sign", KERNELS + "contrastive_bwd_vectors.py", "block * BLOCK, M, N, offset, NORMALIZE", "block * BLOCK, M, N, -offset, NORMALIZE"),
                Break("the second part of a tile takes the first one's columns", KERNELS + "contrastive_bwd.py", "            j0 + BLOCK_N // 2, M, N, offset,", "            j0, M, N, offset,"),
            ),
        ),
        Promise("right where one exponential cannot serve all logits, forward and backward, and the device alone decides", (f"{GPU}::test_repair_met_by_nature", f"{TRITON}::test_repair_forced", f"{GPU}::test_repair_of_opposite_features"), (Break("no forward repair", KERNELS + "contrastive_fwd.py", "((total >= _SAFE_SUM) == 0)", "(total < 0)"), Break("no backward repair", KERNELS + "contrastive_bwd_vectors.py", "wanted & ((lse >= lowest) == 0)", "wanted & (lse != lse)"))),
        Promise("ordinary batches need no repair", (f"{GPU}::test_repair_not_needed_for_ordinary_batches",), (Break("always", KERNELS + "features.py", "    tl.store(constants_ptr + REPAIR, 0.0)", "    tl.store(constants_ptr + REPAIR, 1.0)"),)),
        Promise("a bounded workspace: row panels forward, row chunks and column blocks backward", (f"{GPU}::test_panels_and_blocks", f"{GPU}::test_workspace_bounded"), (Break("panels forget the ones before", KERNELS + "contrastive_fwd.py", "mask=some & (first == 0), other=0.0 if", "mask=some & (first == 2), other=0.0 if"), Break("chunks overwrite", KERNELS + "gradients.py", "x[i0:i1], keep=i0 > 0)", "x[i0:i1], keep=False)"), Break("all rows at once", KERNELS + "gradients.py", "self.block_m = min(_padded(self.M), max(rows, ALIGNMENT))", "self.block_m = _padded(self.M)"))),
        Promise("fp16 weights neither flush nor overflow, whatever the norms; zero rows spoil no other", (f"{GPU}::test_fp16_weights_do_not_flush", f"{GPU}::test_zero_rows_finite", f"{GPU}::test_extreme_norms_finite_and_accurate"), (Break("no gain", KERNELS + "contrastive_bwd_vectors.py", "    gain = 1024.0 / high_bit(", "    gain = 1.0 + 0.0 * high_bit("), Break("rows as they are", KERNELS + "features.py", "if aligned and not (normalize and x.dtype != torch.bfloat16):", "if aligned or x.shape[1] % 8 == 0:"))),
        Promise("rows beyond 2^31 elements", (f"{GPU}::test_rows_beyond_2_to_the_31",), (Break("32-bit base", KERNELS + "tile.py", "image + i0.to(tl.int64) * image_row_stride", "image + i0 * image_row_stride"),)),
        Promise("8 M N D operations, four launches after the norms forward, four before the products backward", (f"{GPU}::test_work_and_launches",), (Break("one more product", KERNELS + "gradients.py", "                if raw_text is not None:\n                    addmm", "                torch.mm(block, self.text.x[j0:j1])\n                if raw_text is not None:\n                    addmm"),)),
        Promise("the sigmoid loss on the same tiles, digits kept when solved, 6 M N D with gradients", (f"{GPU_SIGMOID}::test_sigmoid_accurate", f"{GPU_SIGMOID}::test_sigmoid_of_a_solved_batch_keeps_digits", f"{GPU_SIGMOID}::test_sigmoid_without_gradients_multiplies_once"), (Break("log of 1 + t", KERNELS + "sigmoid_fwd.py", "    return t * tl.fma(p, t, 0.99999994)", "    return tl.log(1.0 + t)"),)),
        Promise("no configuration spills registers, Hopper's use wgmma, one exponential a logit", (f"{COMPILED}::test_no_kernel_spills", f"{COMPILED}::test_tensor_cores", f"{COMPILED}::test_one_exponential_a_logit", f"{COMPILED}::test_every_configuration_is_compiled"), (Break("no parts", KERNELS + "launch.py", "Config(128, 128, 64, 4, 3, SPLIT=4)", "Config(128, 128, 64, 4, 3)"),)),
        Promise("the interpreter refuses bfloat16, and serves who asks by name", (f"{TRITON}::test_interpreter_serves_by_name_only",), (Break("bfloat16 too", "fastclip/_backends/triton.py", "if image.dtype == torch.bfloat16:", "if image.dtype == torch.complex64:"),)),
    ],
    "CUDA backend": [
        Promise(
            "every tile right against fp64, in any order that the hardware may take: each wait, barrier and fence is needed",
            (f"{CUDA}::test_statistics", f"{CUDA}::test_weights"),
            (
                Break("barriers are not fenced", TILE, "    mbarrier_init_fence();\n", ""),
                Break("the cluster does not wait for its barriers", TILE, "    mbarrier_init_fence();\n  }\n  cluster_sync();", "    mbarrier_init_fence();\n  }"),
                Break("a CTA leaves its neighbour alone", TILE, "  cluster_sync();  // the other CTA", "  // the other CTA"),
                Break("one CTA's warps release a stage", TILE, "mbarrier_init(&s.empty[k], 4 * kCluster);", "mbarrier_init(&s.empty[k], 4);"),
                Break("a stage is overwritten while it is read", TILE, "      mbarrier_wait(&s.empty[stage], parity);\n", ""),
                Break("the producer waits for a release of a fresh stage", TILE, "uint32_t parity = 1;  // a fresh", "uint32_t parity = 0;  // a fresh"),
                Break("bytes are not announced", TILE, "mbarrier_expect(&s.full[stage], Smem<Op>::kStageBytes);", "mbarrier_expect(&s.full[stage], 0);"),
                Break("the text block is not shared", TILE, "tile.j0 + rank * kShare, (1 << kCluster) - 1);", "tile.j0 + rank * kShare, 1 << rank);"),
                Break("nobody has the first turn", TILE, "  if (mine == 1) named_arrive(other_turn, 256);", "  if (mine == 2) named_arrive(other_turn, 256);"),
                Break("turns are not waited for, and the tile's vectors not published", TILE, "    named_sync(turn, 256);\n", "    named_arrive(turn, 256);\n"),
                Break("the turn is kept", TILE, "    if (k + 1 < count) named_arrive(other_turn, 256);\n", ""),
                Break("a stage is read before it is full", TILE, "      mbarrier_wait(&s.full[stage], parity);\n", ""),
                Break("products start without a fence", TILE, "      wgmma_fence();\n", ""),
                Break("a stage is released before its products are done", TILE, "      wgmma_wait<1>();\n", ""),
                Break("the last products are not waited for", TILE, "    wgmma_wait<0>();\n", ""),
                Break("the last stage is not released", TILE, "    if (lane < kCluster) mbarrier_arrive_in(&s.empty[last], lane);\n\n", "\n"),
                Break("stages of the other consumer are not skipped", TILE, "const uint32_t step = static_cast<uint32_t>(k) * p.k_blocks;", "const uint32_t step = static_cast<uint32_t>(k / 2) * p.k_blocks;"),
                Break("column sums are read before all warps wrote", FWD_CU, "    t.sync();\n", ""),
                Break("the TMA stores what it may not see", TILE, "    tma_store_fence();\n", ""),
                Break("a piece is stored before all threads wrote it", TILE, "    t.sync();\n    if (t.at.thread == 0) {", "    if (t.at.thread == 0) {"),
                Break("a buffer is written while it is stored", TILE, "tma_store_wait_read<S::kBuffers - 2>();", "tma_store_wait_read<S::kBuffers - 1>();"),
                Break("a CTA leaves while it stores", TILE, "  if (Op::kStores && thread == 0) tma_store_wait_all();\n", ""),
                Break("the swizzle of the stored pieces", TILE, "(((c + chunk) ^ swizzle) << 4)", "(((c + chunk) ^ (swizzle & 3)) << 4)"),
            ),
        ),
        Promise(
            "masks: own pairs, ragged edges, self pairs, repairs",
            (f"{CUDA}::test_statistics", f"{CUDA}::test_weights", f"{CUDA}::test_sigmoid", f"{CUDA}::test_statistics_with_labels", f"{CUDA}::test_weights_with_labels", f"{CUDA}::test_repaired_weights_are_left_alone", f"{CUDA}::test_exponentials_that_flush_are_no_empty_set"),
            (
                Break("rows past the last", TILE, "return 64 * half + 8 * h >= rows || 8 * c + e >= cols;", "return 8 * c + e >= cols;"),
                Break("columns past the last", TILE, "return 64 * half + 8 * h >= rows || 8 * c + e >= cols;", "return 64 * half + 8 * h >= rows;"),
                Break("the diagonal's upper end", TILE, "own > -kBlockM && own < Op::kBlockN", "own > -kBlockM + 1 && own < Op::kBlockN"),
                Break("the diagonal's lower end", TILE, "own > -kBlockM && own < Op::kBlockN", "own > -kBlockM && own < Op::kBlockN - 1"),
                Break("edges are no reason to mask", TILE, "const bool masked = edge || (", "const bool masked = (edge && false) || ("),
                Break("own pairs count, forward", FWD_CU, "mask.own(half, h, c, e) || mask.outside(half, h, c, e) ? 0.f", "mask.outside(half, h, c, e) ? 0.f"),
                Break("own pairs count, backward", BWD_CU, "if (kMask && (mask.outside(half, h, c, e) || mask.own(half, h, c, e))) g = 0.f;", "if (kMask && mask.outside(half, h, c, e)) g = 0.f;"),
                Break("own pairs count, sigmoid", SIGMOID_CU, "kMask && (mask.outside(half, h, c, e) || mask.own(half, h, c, e));", "kMask && mask.outside(half, h, c, e);"),
                Break("self pairs count, forward", FWD_CU, "(p.exclude_self && mask.own(half, h, c, e))", "false"),
                Break("self pairs count, backward", BWD_CU, "(t.p.exclude_self && mask.own(half, h, c, e))", "false"),
                Break("what flushes is an empty set", FWD_CU, "value[0] < kSmallest ? kSmallest : value[0]", "value[0]"),
                Break("repairs are not left to the repair", BWD_CU, "kSkipsRepairs = true", "kSkipsRepairs = false"),
            ),
        ),
        Promise("the same in the launchers: loss and gradients in bfloat16 and float16, repairs, panels, blocks, offsets", (f"{GPU}::test_loss_and_gradients_accurate", f"{GPU}::test_labels_accurate", f"{GPU}::test_panels_and_blocks", f"{GPU}::test_offset_of_a_shard", f"{GPU_SIGMOID}::test_sigmoid_accurate"), (Break("column blocks share an offset", KERNELS + "contrastive_bwd.py", "at = offset + i0 - j0", "at = offset + i0"), Break("labels are forgotten", KERNELS + "contrastive_bwd.py", "_side(row_vec[:, i0:], has_labels)", "_side(row_vec[:, i0:], False)"), Break("the base of the exponential", TILE, "__ldg(constants + FASTCLIP_SCALE) * 1.4426950408889634)", "__ldg(constants + FASTCLIP_SCALE) * 1.4429)"))),
        Promise("no spills, no local memory, no serialised products; wgmma, TMA and one exponential a logit in the machine code", (f"{CUDA_COMPILED}::test_every_kernel_is_compiled_without_spills", f"{CUDA_COMPILED}::test_products_are_not_serialised", f"{CUDA_COMPILED}::test_instructions_as_planned", f"{CUDA_COMPILED}::test_one_exponential_a_logit"), (Break("accumulators are touched between the products", TILE, "      wgmma_commit();\n", "      wgmma_commit();\n      acc[0][0] *= 2.f;\n"), Break("all columns at once", SIGMOID_CU, "      for (int c = 0; c < kBlockN / 8; ++c)  // outside: the other way round it spills\n#pragma unroll\n        for (int half = 0; half < kHalves; ++half)\n", "      for (int half = 0; half < kHalves; ++half)\n#pragma unroll\n        for (int c = 0; c < kBlockN / 8; ++c)\n"), Break("a second exponential", BWD_CU, "g *= factor;", "g *= factor * exp2_fast(0.f * g);"))),
        Promise("the C interface refuses what it cannot do, and says so by a code", (f"{CUDA}::test_c_interface_refuses_bad_arguments", f"{CUDA}::test_refusals_become_messages"), (Break("unaligned features", "csrc/cuda/launch.cu", "reinterpret_cast<uintptr_t>(data) % 16 == 0 && ", ""), Break("a stride too short", "csrc/cuda/launch.cu", " && row_stride >= cols;", ";"))),
        Promise("a driver that is missing or too old, another GPU, another dtype: a reason, not a crash", (f"{CUDA}::test_backend_says_why_not", f"{CUDA}::test_machine_without_hopper_is_a_reason", f"{CUDA}::test_other_gpus_and_dtypes_are_refused", f"{CUDA}::test_module_without_a_driver"), (Break("old drivers", "fastclip/_backends/cuda.py", "if driver // 1000 < built // 1000:", "if driver < 0:"), Break("any GPU", "fastclip/_backends/cuda.py", "!= (9, 0):", "< (8, 0):"), Break("another code", "csrc/cuda/launch.cu", "  if (!encode) return FASTCLIP_NO_DRIVER;", "  if (!encode) return FASTCLIP_CUDA_ERROR;"))),
        Promise("cuda before triton before cpu", (f"{CUDA}::test_preferred_to_triton",), (Break("after", "fastclip/_backends/__init__.py", '{"cuda": cuda, "triton": triton,', '{"triton": triton, "cuda": cuda,'),)),
    ],
}
# fmt: on

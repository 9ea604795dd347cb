"""Memory, work and order of the losses."""

from __future__ import annotations

from broken import COST, NUMBERS, Break, Promise

PROMISES = [
    Promise(
        COST,
        "Memory is bounded by the features, their gradients and one workspace of fixed size",
        tests=[
            "losses/test_contrastive_torch.py::test_memory_is_of_the_features",
            "losses/test_contrastive_invariants.py::test_workspace_stays_within_its_bound",
        ],
        breaks=[
            Break(
                "the whole matrix is made",
                "fastclip/_backends/cpu/plain.py",
                old="    value = 0.0\n",
                new="    value = 0.0 * len(torch.mm(image.float(), text.float().T))\n",
            ),
            Break(
                "the bound is not read",
                "fastclip/_backends/cpu/blocks.py",
                old="floats = env.workspace_bytes() // 4",
                new="floats = 2**26",
            ),
        ],
    ),
    Promise(
        COST,
        "A forward and a backward pass take at most four matrix products, which are 8 M N D operations",
        tests=[
            "losses/test_contrastive_invariants.py::test_work_is_four_products_at_most",
        ],
        breaks=[
            Break(
                "one more product",
                "fastclip/_backends/cpu/blocks.py",
                old="yield dots\n",
                new="yield dots\n            torch.mm(images, texts.T)\n",
            ),
            Break(
                "no block is kept",
                "fastclip/_backends/cpu/blocks.py",
                old="self.owner, self.block = owner, block",
                new="self.owner, self.block = None, None",
            ),
        ],
    ),
    Promise(
        COST,
        "One direction alone (`image_weight` 1 or 0) takes three matrix products on a CPU, and one without gradients",
        tests=[
            "losses/test_direction.py::test_one_direction_work_is_three_products",
        ],
        breaks=[
            Break(
                "both sides' statistics serve",
                "fastclip/_backends/cpu/direction.py",
                old="return rows >= _FEWEST or rows >= image.shape[0]",
                new="return False",
            ),
            Break(
                "gradients that nobody needs",
                "fastclip/_backends/cpu/direction.py",
                old="if row_factor is None or not (needs[0] or needs[1]):",
                new="torch.mm(dot, text.rows(0, text.M))\n        if row_factor is None or not (needs[0] or needs[1]):",
            ),
        ],
    ),
    Promise(
        NUMBERS,
        "One direction alone is right: with labels, without normalisation, for solved batches and in 16 bits",
        tests=[
            "losses/test_direction.py::test_one_direction_accurate",
            "losses/test_direction.py::test_one_direction_with_labels_accurate",
            "losses/test_direction.py::test_one_direction_excludes_self_pairs",
            "losses/test_direction.py::test_one_direction_confident_loss_keeps_digits",
            "losses/test_direction.py::test_one_direction_with_few_rows_in_the_workspace_is_that_of_statistics",
        ],
        breaks=[
            Break(
                "the texts' loss is that of the images",
                "fastclip/distributed/statistics.py",
                old="if image_weight == 1.0:",
                new="if image_weight >= 0.0:",
            ),
            Break(
                "the positive is a negative, too",
                "csrc/cpu/direction_tile.h",
                old="i, NotOwn{j});",
                new="i, NotOwn{j + (1 << 30)});",
            ),
            Break(
                "1 - probability",
                "csrc/cpu/direction_tile.h",
                old="(x < 0.0 ? 0.0 : x) + log1p(exp(-fabs(x)))",
                new="log(1.0f + static_cast<float>(exp(x)))",
            ),
            Break(
                "the softmax of several positives is left out",
                "csrc/cpu/direction_tile.h",
                old="several ? sigmoid_of(-x) / positives.sum : 0.0",
                new="0.0",
            ),
            Break(
                "the factor of a row is left out of the images",
                "fastclip/_backends/cpu/direction.py",
                old="raw_image.mul_(row_factor)",
                new="raw_image.mul_(1.0)",
            ),
        ],
    ),
    Promise(
        NUMBERS,
        "The backward pass reuses only the logits of its own forward pass, never those of another one",
        tests=[
            "losses/test_contrastive_invariants.py::test_kept_block_is_the_forward_pass_own",
        ],
        breaks=[
            Break(
                "anybody's block",
                "fastclip/_backends/cpu/blocks.py",
                old="self.block == block and self.owner.data_ptr() == owner.data_ptr()",
                new="self.block == block",
            ),
        ],
    ),
    Promise(
        NUMBERS,
        "Results are bit-identical from call to call, with any number of threads",
        tests=[
            "losses/test_contrastive_invariants.py::test_native_passes_bitwise_equal_over_thread_counts",
            "backends/test_native.py::test_native_code",
        ],
        breaks=[
            Break(
                "a sum in the order of threads",
                "csrc/cpu/entry_points.cpp",
                old="for (double part : d_scale) total += part;",
                new="for (size_t k = 0; k < d_scale.size(); ++k) total += d_scale[(k + num_threads) % d_scale.size()];",
            ),
        ],
    ),
    Promise(
        NUMBERS,
        "Native code has no data races, and reads and writes nothing outside its arrays",
        tests=[
            "backends/test_native.py::test_native_code",
        ],
        breaks=[
            Break(
                "the workers' counter is not atomic",
                "csrc/cpu/thread_pool.cpp",
                old="std::atomic<int64_t> next_{0};",
                new=(
                    "struct {\n"
                    "    int64_t value = 0;\n"
                    "    void store(int64_t x, std::memory_order) { value = x; }\n"
                    "    int64_t fetch_add(int64_t x, std::memory_order) { return (value += x) - x; }\n"
                    "  } next_;"
                ),
            ),
            Break(
                "one label too far",
                "csrc/cpu/entry_points.cpp",
                old="labels ? all.label + begin + k : nullptr",
                new="labels ? all.label + begin + k + (all.label[begin + k] < 0) + 1 : nullptr",
            ),
        ],
    ),
]

"""The losses over several processes."""

from __future__ import annotations

from broken import COST, KEEP, PROCESSES, TORCH, Break, Promise

PROMISES = [
    Promise(
        PROCESSES,
        "The mean of all processes' losses and all gradients equal those of one process, even with unequal "
        "or empty shards",
        tests=[
            "distributed/test_distributed.py::test_exact_in_fp64",
            "distributed/test_distributed.py::test_loss_and_gradients_accurate",
            "distributed/test_distributed.py::test_groups",
            "distributed/test_distributed.py::test_added_on_the_way",
        ],
        breaks=[
            Break(
                "ranks: a share is not multiplied by the ranks",
                "fastclip/losses/contrastive.py",
                old="batch.shards.ranks * total",
                new="total",
            ),
            Break(
                "ranks: every shard starts at the first text",
                "fastclip/distributed/statistics.py",
                old="offset=shards.own_texts.start)",
                new="offset=0)",
            ),
            Break(
                "ranks: one direction starts at the first image",
                "fastclip/distributed/statistics.py",
                old="offset = shards.own_images.start",
                new="offset = 0",
            ),
            Break(
                "ranks: a column is its owner's rows",
                "fastclip/distributed/statistics.py",
                old="Side(merge_logsumexp(neg), cols.pos[here]",
                new="Side(cols.neg[here], cols.pos[here]",
            ),
            Break(
                "ranks: texts' gradients are not summed",
                "fastclip/distributed/collectives.py",
                old=".sum(0, dtype=wide)",
                new="[dist.get_rank(pg)]",
            ),
            Break(
                "ranks: smoothing's means are a rank's own",
                "fastclip/losses/contrastive.py",
                old="image_sum, text_sum = sums",
                new="",
            ),
            Break(
                "ranks: positives of a rank's own texts only",
                "fastclip/losses/inputs/batch.py",
                old="text_labels = gather_rows(text_labels.long(), shards.texts, shards.group, after=image_labels)",
                new="text_labels = gather_rows(image_labels[shards.own_images] + 1, shards.images, shards.group)",
            ),
            Break(
                "ranks: a group's ranks are the world's",
                "fastclip/distributed/ring.py",
                old="received, group=self.group, group_peer=",
                new="received, group=self.group, peer=",
            ),
            Break(
                "ranks: NCCL's padding stays",
                "fastclip/distributed/collectives.py",
                old="return out[:size].to(x.dtype, copy=True)",
                new="return out[largest - size :].to(x.dtype, copy=True)",
            ),
            Break(
                "ranks: padding stays",
                "fastclip/distributed/collectives.py",
                old="torch.cat([shard[:size] for",
                new="torch.cat([shard[-size:] for",
            ),
        ],
    ),
    Promise(
        PROCESSES,
        "Training with DDP makes the same updates of the encoders and of logit_scale as a single process",
        tests=[
            "distributed/test_distributed.py::test_training_with_ddp_is_the_single_process",
        ],
        breaks=[
            Break(
                "ranks: what travelled back is halved",
                "fastclip/distributed/collectives.py",
                old="adjoint)(d.contiguous(), ctx.sizes",
                new="adjoint)(d.contiguous() / 2, ctx.sizes",
            ),
        ],
    ),
    Promise(
        COST,
        "The ring form stores only a few shards of texts and of their gradients at a time on each process",
        tests=[
            "distributed/test_distributed.py::test_ring_holds_few_texts",
        ],
        breaks=[
            Break(
                "ranks: the ring keeps every block",
                "fastclip/distributed/ring.py",
                old="block, works = following, []",
                new="self.kept = [*getattr(self, 'kept', []), block]; block, works = following, []",
            ),
        ],
    ),
    Promise(
        PROCESSES,
        "A process that is slower than the others does not change a bit of the results",
        tests=[
            "distributed/test_distributed.py::test_bits_do_not_depend",
        ],
        breaks=[
            Break(
                "ranks: a block is used before it is here",
                "fastclip/distributed/ring.py",
                old="for work in works:",
                new="for work in ():",
            ),
            Break(
                "ranks: sums are read before they are here",
                "fastclip/distributed/ring.py",
                old="for work in self.works:",
                new="for work in ():",
            ),
        ],
    ),
    Promise(
        PROCESSES,
        "Processes run their collectives in the same order with and without torch.compile",
        tests=[
            "distributed/test_distributed.py::test_compiled_order",
        ],
        breaks=[
            Break(
                "ranks: nothing orders the sums",
                "fastclip/losses/contrastive.py",
                old="sums, after = sum_over_ranks(torch.stack([image_sum, text_sum]), after, shards.group)",
                new="sums, _ = sum_over_ranks(torch.stack([image_sum, text_sum]), image_sum, shards.group)",
            ),
            Break(
                "ranks: a collective for each of the largest norms",
                "fastclip/losses/inputs/limits.py",
                old="largest_over_ranks((row, col), shards, after).unbind()",
                new="(largest_over_ranks((x,), shards, after)[0] for x in (row, col))",
            ),
            Break(
                "ranks: a graph for each of a rank's places",
                "fastclip/ops/contrastive.py",
                old="Tensor? text_labels, SymInt offset",
                new="Tensor? text_labels, int offset",
            ),
        ],
    ),
    Promise(
        COST,
        "Each of W processes computes its share of the matrix products, which is 8 M N D / W operations",
        tests=[
            "distributed/test_distributed.py::test_a_rank_multiplies_its_share",
        ],
        breaks=[
            Break(
                "ranks: a block is computed twice",
                "fastclip/distributed/ring_losses.py",
                old="stats[owner] = by_side(",
                new="torch.ops.fastclip.contrastive_fwd(*arguments(of_block, backend)); stats[owner] = by_side(",
            ),
        ],
    ),
    Promise(
        PROCESSES,
        "If arguments disagree (without `equal_shards`) or a process dies, the others raise an error and none hangs",
        tests=[
            "distributed/test_distributed.py::test_ranks_that_disagree_raise_everywhere",
            "distributed/test_distributed.py::test_a_rank_that_dies_is_an_error_of_the_others",
        ],
        breaks=[
            Break(
                "ranks: scales may differ",
                "fastclip/distributed/agreement.py",
                old="zip(scalar_names, bits.T.tolist())",
                new="zip(scalar_names[:0], bits.T.tolist())",
            ),
            Break(
                "ranks: gradients may differ",
                "fastclip/distributed/agreement.py",
                old="(*options.values(), gradients)",
                new="(*options.values(), 0)",
            ),
            Break(
                "ranks: a refusal stays on its rank",
                "fastclip/distributed/agreement.py",
                old="for rank in refused.nonzero().flatten().tolist():",
                new="for rank in []:",
            ),
        ],
    ),
    Promise(
        PROCESSES,
        "`fastclip parity` compares every form, backend and dtype that runs on the machine, and detects a wrong loss",
        tests=[
            "distributed/test_parity.py::test_parity_finds_a_broken_loss_under_torchrun",
            "distributed/test_parity.py::test_parity_compares_everything_that_runs_here",
        ],
        breaks=[
            Break(
                "parity: everything is ok",
                "fastclip/parity/compare.py",
                old="return all(error <= self.budgets[name]",
                new="return True or all(error <= self.budgets[name]",
            ),
            Break(
                "parity: one form is left out",
                "fastclip/parity/compare.py",
                old="if case.equal or not equal_shards:",
                new="if not equal_shards:",
            ),
        ],
    ),
    Promise(
        PROCESSES,
        "No process of `fastclip train`, `fastclip parity` or a benchmark crashes at exit because of its process "
        "group's threads",
        tests=[
            "training/test_interrupted.py::test_threads_end_with_the_group",
            "distributed/test_parity.py::test_parity_finds_a_broken_loss_under_torchrun",
            "package/test_layering.py::test_groups_end_with_their_threads",
        ],
        breaks=[
            Break(
                "threads: default arguments keep the group",
                "fastclip/distributed/collectives.py",
                old="        import torch.distributed.nn  # noqa: F401  the import takes about 30 ms",
                new="        pass",
            ),
            Break(
                "threads: FSDP's mesh keeps the group",
                "fastclip/training/ranks.py",
                old="_meshes.append(mesh)",
                new="",
            ),
            Break(
                "threads: parity loads it too late",
                "fastclip/parity/processes.py",
                old="    before_group()",
                new="",
            ),
            Break(
                "threads: a benchmark loads it too late",
                "benchmarks/ranks/distributed.py",
                old="    before_group()",
                new="",
            ),
        ],
    ),
    Promise(
        KEEP,
        "On several processes `ClipLoss` and `SigLipLoss` equal open_clip's for local_loss, gather_with_grad "
        "and dist_impl",
        tests=[
            "distributed/test_distributed.py::test_modules_are_open_clips",
            "distributed/test_distributed.py::test_modules_refuse_another_world",
        ],
        breaks=[
            Break(
                "ranks: the modules see one rank",
                "fastclip/losses/modules.py",
                old="return dist.group.WORLD",
                new="return None",
            ),
        ],
    ),
    Promise(
        TORCH,
        "On several processes the gather form of the reference has second derivatives, and the ring form "
        "raises an error",
        tests=[
            "distributed/test_distributed.py::test_second_derivatives_on_the_reference",
        ],
        breaks=[
            Break(
                "ranks: the ring has wrong ones",
                "fastclip/distributed/ring_losses.py",
                old="ring_sigmoid_bwd(*pairs",
                new="sigmoid_bwd(*pairs._replace(backend='reference')",
            ),
        ],
    ),
]

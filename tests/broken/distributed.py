"""The losses over many processes."""

from __future__ import annotations

from broken import Break, Promise

DISTRIBUTED = "distributed/test_distributed.py"
PARTS = "fastclip/distributed/"

# fmt: off
PROMISES: dict[str, list[Promise]] = {
    "Many processes": [
        Promise(
            "the ranks' mean is one process's loss, and so are all gradients, in both forms: equal, unequal and empty shards, labels across ranks, smoothing",
            (f"{DISTRIBUTED}::test_exact_in_fp64", f"{DISTRIBUTED}::test_loss_and_gradients_accurate", f"{DISTRIBUTED}::test_groups", f"{DISTRIBUTED}::test_added_on_the_way"),
            (
                Break("ranks: a share is not multiplied by the ranks", "fastclip/loss.py", "batch.shards.ranks * total", "total"),
                Break("ranks: every shard starts at the first text", PARTS + "statistics.py", "offset=shards.own_texts.start, **options)\n    return _own", "offset=0, **options)\n    return _own"),
                Break("ranks: a column is its owner's rows", PARTS + "statistics.py", "columns = merge_logsumexp(col_neg), stats.col_pos[own]", "columns = stats.col_neg[own], stats.col_pos[own]"),
                Break("ranks: texts' gradients are not summed", PARTS + "collectives.py", ".sum(0, dtype=wide)", "[dist.get_rank(pg)]"),
                Break("ranks: smoothing's means are a rank's own", "fastclip/loss.py", "            image_sum, text_sum = sums\n", ""),
                Break("ranks: positives of a rank's own texts only", "fastclip/loss.py", "text_labels = gather_rows(text_labels.long(), shards.texts, shards.group, after=image_labels)", "text_labels = gather_rows(image_labels[shards.own_images] + 1, shards.images, shards.group)"),
                Break("ranks: a group's ranks are the world's", PARTS + "ring.py", "received, group=self.group, group_peer=", "received, group=self.group, peer="),
                Break("ranks: NCCL's padding stays", PARTS + "collectives.py", "return out[:own].to(x.dtype, copy=True)", "return out[most - own :].to(x.dtype, copy=True)"),
                Break("ranks: padding stays", PARTS + "collectives.py", "torch.cat([shard[:size] for", "torch.cat([shard[-size:] for"),
            ),
        ),
        Promise(
            "DDP's mean of the gradients trains as one process, encoders and logit_scale alike",
            (f"{DISTRIBUTED}::test_training_with_ddp_is_the_single_process",),
            (Break("ranks: what travelled back is halved", PARTS + "collectives.py", "adjoint)(d.contiguous(), ctx.sizes", "adjoint)(d.contiguous() / 2, ctx.sizes"),),
        ),
        Promise(
            "the ring holds a few shards of texts and gradients, and ranks that fall behind change no bit",
            (f"{DISTRIBUTED}::test_ring_holds_few_texts", f"{DISTRIBUTED}::test_bits_do_not_depend"),
            (
                Break("ranks: the ring keeps every block", PARTS + "ring.py", "            block, works = following, []\n", "            self.kept = [*getattr(self, 'kept', []), block]\n            block, works = following, []\n"),
                Break("ranks: a block is used before it is here", PARTS + "ring.py", "            for work in works:\n                work.wait()\n            block", "            block"),
                Break("ranks: sums are read before they are here", PARTS + "ring.py", "        for work in self.works:\n            work.wait()\n        self.works", "        self.works"),
            ),
        ),
        Promise("compiled ranks call their collectives in the uncompiled order, whatever their number of graphs", (f"{DISTRIBUTED}::test_compiled_order",), (Break("ranks: nothing orders the sums", "fastclip/loss.py", "sums, after = sum_over_ranks(torch.stack([image_sum, text_sum]), after, shards.group)", "sums, _ = sum_over_ranks(torch.stack([image_sum, text_sum]), image_sum, shards.group)"), Break("ranks: a graph for each of a rank's places", "fastclip/ops/contrastive.py", "Tensor? text_labels, SymInt offset", "Tensor? text_labels, int offset"))),
        Promise("a rank multiplies its share, 8 M N D / W operations", (f"{DISTRIBUTED}::test_a_rank_multiplies_its_share",), (Break("ranks: a block is computed twice", PARTS + "ring.py", "        of_block = _block_problem(ring, owner, block, problem)\n        found", "        of_block = _block_problem(ring, owner, block, problem)\n        torch.ops.fastclip.contrastive_fwd(*of_block)\n        found"),)),
        Promise(
            "ranks that disagree, or whose arguments are wrong, are an error on every rank within seconds; so is a rank that dies",
            (f"{DISTRIBUTED}::test_ranks_that_disagree_raise_everywhere", f"{DISTRIBUTED}::test_a_rank_that_dies_is_an_error_of_the_others"),
            (
                Break("ranks: scales may differ", PARTS + "agreement.py", "    for k, name in enumerate(scalar_names):\n", "    for k, name in enumerate(scalar_names[:0]):\n"),
                Break("ranks: gradients may differ", PARTS + "agreement.py", "(*options.values(), gradients)", "(*options.values(), 0)"),
                Break("ranks: a refusal stays on its rank", PARTS + "agreement.py", "        if line[0]:", "        if False:"),
            ),
        ),
        Promise("`fastclip parity` compares every form, backend and dtype that runs here, and finds a loss that is wrong", ("distributed/test_parity.py::test_parity_finds_a_broken_loss_under_torchrun", "distributed/test_parity.py::test_parity_compares_everything_that_runs_here"), (Break("parity: everything is ok", "fastclip/parity/compare.py", "return all(error <= self.budgets[name]", "return True or all(error <= self.budgets[name]"), Break("parity: one form is left out", "fastclip/parity/compare.py", "if case.equal or not equal_shards:", "if not equal_shards:"))),
        Promise("`ClipLoss` and `SigLipLoss` are open_clip's with local_loss and gather_with_grad, and every dist_impl", (f"{DISTRIBUTED}::test_modules_are_open_clips", f"{DISTRIBUTED}::test_modules_refuse_another_world"), (Break("ranks: the modules see one rank", "fastclip/modules.py", "    return dist.group.WORLD", "    return None"),)),
        Promise("the ring and 16-bit shards have no second derivatives, and say so; the gather form on the reference has", (f"{DISTRIBUTED}::test_second_derivatives_on_the_reference",), (Break("ranks: the ring has wrong ones", PARTS + "ring.py", "out = torch.ops.fastclip.ring_sigmoid_bwd(*inputs, needs, list(kept), d_loss)", "out = torch.ops.fastclip.sigmoid_bwd(*inputs, 1, 0, True, 'reference', needs, list(kept), d_loss)"),)),
    ],
}
# fmt: on

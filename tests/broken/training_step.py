"""A step of training: the losses, gradient caching, several processes."""

from __future__ import annotations

from broken import COST, NUMBERS, PROCESSES, TRAINING, Break, Promise

PROMISES = [
    Promise(
        NUMBERS,
        "Gradient caching has the gradients of a single pass, also with dropout, autocast and BatchNorm",
        tests=[
            "training/test_cached_step.py::test_gradients_are_the_one_shot_steps",
            "training/test_cached_step.py::test_dropout_is_replayed",
            "training/test_cached_step.py::test_autocast",
            "training/test_cached_step.py::test_batch_norm_is_a_micro_batchs_and_its_statistics_move_once",
            "training/test_cached_step.py::test_loss_draws_numbers_of_its_own",
            "training/test_cached_step.py::test_buffers_that_a_pass_reads_and_changes_are_replayed",
            "training/test_cached_step.py::test_running_statistics_are_replayed",
            "training/test_cached_step.py::test_ddp_replays_the_buffers_that_it_gave",
            "training/test_cached_step.py::test_micro_batches_that_change_are_refused",
        ],
        breaks=[
            Break(
                "cached: the temperature counts in every micro-batch",
                "fastclip/training/step/cached.py",
                old="if last:  # the scale",
                new="if True:  # the scale",
            ),
            Break(
                "cached: other masks in the second pass",
                "fastclip/training/step/cached.py",
                old="set_generators(self._states[k - self._kept])",
                new="",
            ),
            Break(
                "cached: statistics move twice",
                "fastclip/training/step/cached.py",
                old="with self._buffers.replayed(), restoring(after):",
                new="with restoring(after):",
            ),
            Break(
                "cached: a second pass begins with the buffers of the first one's end",
                "fastclip/training/step/replay.py",
                old="self._write(self._first)",
                new="pass",
            ),
            Break(
                "cached: ranks replay the buffers of their own",
                "fastclip/training/step/replay.py",
                old="if module in self._awaited:",
                new="if False:",
            ),
            Break(
                "cached: the loss draws the same numbers in every step",
                "fastclip/training/step/cached.py",
                old="with self._buffers.replayed(), restoring(after):",
                new="with self._buffers.replayed():",
            ),
            Break(
                "cached: a micro-batch changes between the passes",
                "fastclip/training/step/replay.py",
                old="if self._versions_now() != self._versions:",
                new="if False:",
            ),
        ],
    ),
    Promise(
        COST,
        "Gradient caching stores the graph of only one micro-batch at a time",
        tests=[
            "training/test_cached_step.py::test_one_graph_at_a_time",
        ],
        breaks=[
            Break(
                "cached: the first pass has graphs",
                "fastclip/training/step/cached.py",
                old="with torch.no_grad(), no_exchange(self._modules), self._buffers.noted():",
                new="with no_exchange(self._modules), self._buffers.noted():",
            ),
        ],
    ),
    Promise(
        COST,
        "Kept graphs save the second forward pass of gradient caching and change no bit of the gradients",
        tests=[
            "training/test_kept_graphs.py::test_kept_graphs_change_no_bit",
            "training/test_kept_graphs.py::test_kept_graphs_over_processes",
        ],
        breaks=[
            Break(
                "cached: kept micro-batches are embedded again",
                "fastclip/training/step/cached.py",
                old="if self._graphs:",
                new="if False:",
            ),
            Break(
                "cached: DDP's last micro-batch is not embedded again",
                "fastclip/training/step/cached.py",
                old="len(self._batches) - exchanges)",
                new="len(self._batches))",
            ),
        ],
    ),
    Promise(
        COST,
        "Training embeds texts of like length together, without padding beyond the longest, with the same features",
        tests=[
            "training/test_micro_batches.py::test_features_are_those_of_whole_texts_in_the_order_of_the_batch",
            "training/test_micro_batches.py::test_text_tower_sees_little_padding",
            "training/test_micro_batches.py::test_a_step_waits_once_for_the_device",
        ],
        breaks=[
            Break(
                "texts: whole texts are embedded",
                "fastclip/training/step/micro_batches.py",
                old="tuple(x[:, :width] for x",
                new="tuple(x for x",
            ),
            Break(
                "texts: features stay in the order of embedding",
                "fastclip/training/step/micro_batches.py",
                old="_Reordered.apply(features, order.argsort(), order)",
                new="_Reordered.apply(features, order, order.argsort())",
            ),
            Break(
                "step: the host waits before the update",
                "fastclip/training/step/update.py",
                old="and not self._sharded",
                new="and self._sharded",
            ),
        ],
    ),
    Promise(
        COST,
        "Gradient caching under DDP exchanges gradients once per step",
        tests=[
            "training/test_cached_step.py::test_ddp_exchanges_once",
            "training/test_cached_step.py::test_towers_in_a_module_exchange_once",
        ],
        breaks=[
            Break(
                "cached: towers that are wrapped one by one exchange every micro-batch",
                "fastclip/training/step/exchange.py",
                old="for one in exchanging(module):",
                new="for one in [module]:",
            ),
            Break(
                "cached: every micro-batch is exchanged",
                "fastclip/training/step/cached.py",
                old="with nullcontext() if last else no_exchange(self._modules):",
                new="with nullcontext():",
            ),
        ],
    ),
    Promise(
        PROCESSES,
        "A parameter that the loss function of `cached_step` reads has the same gradient for any number of processes",
        tests=[
            "training/test_cached_step.py::test_ddp_averages_what_the_loss_reads_by_itself",
            "training/test_cached_step.py::test_parameters_that_the_loss_reads_by_itself",
        ],
        breaks=[
            Break(
                "cached: what the loss reads by itself has a rank's own gradient",
                "fastclip/training/step/cached.py",
                old="    return direct\n",
                new="    for p, d in direct:\n        p.grad = d if p.grad is None else p.grad + d\n    return []\n",
            ),
            Break(
                "cached: hooks see what the loss reads by itself twice",
                "fastclip/training/step/cached.py",
                old="hooks.clear()",
                new="pass",
            ),
        ],
    ),
    Promise(
        NUMBERS,
        "Training losses follow the formulas of the papers, and agree with dense PyTorch to 1e-5 at each step",
        tests=[
            "training/test_step.py::test_losses_are_those_of_the_papers",
            "training/test_trainer.py::test_steps_agree_with_the_dense_loss",
            "training/test_hundred_steps.py::test_float32_training_agrees_with_the_dense_loss",
        ],
        breaks=[
            Break(
                "trainer: ALIGN's mean in place of its sum",
                "fastclip/training/step/losses.py",
                old="return 2 * value if",
                new="return 1 * value if",
            ),
            Break(
                "trainer: ConVIRT's weight",
                "fastclip/training/step/losses.py",
                old='(0.75 if name == "convirt"',
                new='(0.25 if name == "convirt"',
            ),
            Break(
                "trainer: UniCL without its labels",
                "fastclip/training/step/losses.py",
                old='"text_labels": labels} if name == "unicl"',
                new='"text_labels": labels} if name == "unicle"',
            ),
        ],
    ),
    Promise(
        TRAINING,
        "Micro-batches and gradient checkpointing do not change the loss",
        tests=[
            "training/test_step.py::test_micro_batches_make_the_same_update",
            "training/test_trainer.py::test_run_with_less_memory_has_the_same_losses",
        ],
        breaks=[
            Break(
                "trainer: the last micro-batch's labels",
                "fastclip/training/step/update.py",
                old="torch.cat([batch.labels for batch in batches])",
                new="torch.cat([batches[-1].labels for batch in batches])[: sum(len(b.keys) for b in batches)]",
            ),
        ],
    ),
    Promise(
        PROCESSES,
        "Training on two processes equals training on one to 1e-5, with DDP and FSDP2; checkpoints fit any "
        "number of processes",
        tests=[
            "training/test_ranks.py::test_two_ranks_train_as_one",
            "training/test_ranks.py::test_checkpoint_fits_every_number_of_ranks",
        ],
        breaks=[
            Break(
                "trainer: the scale's gradient is a rank's own",
                "fastclip/training/ranks.py",
                old="p.grad.copy_(mean_over_ranks(p.grad, world))",
                new="pass",
            ),
            Break(
                "trainer: the norm is a shard's",
                "fastclip/training/step/optim.py",
                old="get_total_norm([p.grad for p in kind if",
                new="get_total_norm([getattr(p.grad, '_local_tensor', p.grad) for p in kind if",
            ),
            Break(
                "trainer: FSDP keeps the averages it gathered",
                "fastclip/training/ranks.py",
                old="module.reshard()",
                new="pass",
            ),
            Break(
                "trainer: one rank of two caches",
                "fastclip/training/step/update.py",
                old="if len(pieces) == 1 and not self.cached:",
                new="if len(pieces) == 1:",
            ),
            Break(
                "trainer: a rank's own loss is told",
                "fastclip/training/step/update.py",
                old="float(torch.tensor(numbers[0], dtype=value.dtype)), numbers[-2]",
                new="float(value.detach()), numbers[-2]",
            ),
        ],
    ),
]

"""The trainer."""

from __future__ import annotations

from broken import Break, Promise

STEP, RUN, RANKS, OPTIONS = "test_train_step.py", "test_trainer.py", "test_train_ranks.py", "test_train_options.py"
TRAINING, PLAN = "fastclip/training/", "test_plan.py"

# fmt: off
PROMISES: dict[str, list[Promise]] = {
    "Training": [
        Promise(
            "the cached step has the one-shot step's gradients, temperature included; dropout, autocast and buffers as in one pass",
            ("test_cached_step.py::test_gradients_are_the_one_shot_steps", "test_cached_step.py::test_dropout_is_replayed", "test_cached_step.py::test_autocast", "test_cached_step.py::test_batch_norm_is_a_micro_batchs_and_its_statistics_move_once"),
            (
                Break("cached: the temperature counts in every micro-batch", "fastclip/training/cached.py", "[x.grad for x in rest if last]", "[x.grad for x in rest]"),
                Break("cached: other masks in the second pass", "fastclip/training/cached.py", "            torch.set_rng_state(cpu_state)\n", ""),
                Break("cached: statistics move twice", "fastclip/training/cached.py", "            x.copy_(kept)", "            pass"),
            ),
        ),
        Promise("it keeps one micro-batch's graph at a time", ("test_cached_step.py::test_one_graph_at_a_time",), (Break("cached: the first pass has graphs", "fastclip/training/cached.py", "with torch.no_grad(), _no_exchange(modules):", "with _no_exchange(modules):"),)),
        Promise("DDP exchanges gradients once a step, whatever each rank's micro-batches are", ("test_cached_step.py::test_ddp_exchanges_once",), (Break("cached: every micro-batch is exchanged", "fastclip/training/cached.py", "with nullcontext() if last else _no_exchange(modules):", "with nullcontext():"),)),
        Promise(
            "a run has the dense loss's losses over a hundred steps to 1e-5, whichever loss, and the papers' formulas",
            (f"{STEP}::test_losses_are_those_of_the_papers", f"{RUN}::test_hundred_steps_agree_with_the_dense_loss"),
            (
                Break("trainer: ALIGN's mean in place of its sum", f"{TRAINING}losses.py", "return 2 * value if", "return 1 * value if"),
                Break("trainer: ConVIRT's weight", f"{TRAINING}losses.py", '(0.75 if name == "convirt"', '(0.25 if name == "convirt"'),
                Break("trainer: UniCL without its labels", f"{TRAINING}losses.py", '"text_labels": labels} if name == "unicl"', '"text_labels": labels} if name == "unicle"'),
            ),
        ),
        Promise("micro-batches and gradient checkpointing change no loss", (f"{STEP}::test_micro_batches_make_the_same_update", f"{RUN}::test_run_with_less_memory_has_the_same_losses"), (Break("trainer: the last micro-batch's labels", f"{TRAINING}step.py", "labels = torch.cat([batch.labels for batch in batches])", "labels = torch.cat([batches[-1].labels for batch in batches])[: sum(len(b.keys) for b in batches)]"),)),
        Promise(
            "two processes train as one, with DDP and with FSDP2, to 1e-5; their checkpoints fit any number of processes",
            (f"{RANKS}::test_two_ranks_train_as_one", f"{RANKS}::test_checkpoint_fits_every_number_of_ranks"),
            (
                Break("trainer: the scale's gradient is a rank's own", f"{TRAINING}parallel.py", "p.grad.copy_(mean_over_ranks(p.grad, world))", "pass"),
                Break("trainer: the norm is a shard's", f"{TRAINING}optim.py", "get_total_norm([p.grad for p in kind if", "get_total_norm([getattr(p.grad, '_local_tensor', p.grad) for p in kind if"),
                Break("trainer: a rank's own loss is told", f"{TRAINING}step.py", "float(mean_over_ranks(value.detach(), self.world))", "float(value.detach())"),
            ),
        ),
        Promise(
            "a resumed run has the losses of one that never stopped, bit for bit, and its metrics; other options are named",
            (f"{RUN}::test_resumed_run_is_the_run_that_never_stopped", f"{RUN}::test_resume_names_what_changed_and_what_does_not_fit"),
            (
                Break("trainer: dropout goes on where it was", f"{TRAINING}trainer.py", "            seed_step(options.seed, step, world.rank)\n", ""),
                Break("trainer: the average begins anew", f"{TRAINING}checkpoint.py", '        ema.updates = state["ema_updates"]\n', ""),
                Break("trainer: lines after the checkpoint stay", f"{TRAINING}metrics.py", 'if values["step"] <= step:', "if values:"),
                Break("trainer: changes are not named", f"{TRAINING}trainer.py", "for change in _changes(", "for change in () and _changes("),
            ),
        ),
        Promise("the same options repeat a run bit for bit, with other workers too", (f"{RUN}::test_run_repeats_bit_by_bit",), (Break("trainer: weights from whatever was drawn before", f"{TRAINING}trainer.py", "        torch.manual_seed(options.seed)\n", ""),)),
        Promise(
            "a loss or gradient that is not finite ends a run before the update and names step and samples",
            (f"{STEP}::test_pixels_that_are_not_finite_stop_before_the_update", f"{STEP}::test_gradient_that_is_not_finite_stops_before_the_update", f"{STEP}::test_weights_and_features_that_are_not_finite_are_named"),
            (
                Break("trainer: the loss is not looked at", f"{TRAINING}step.py", "if not math.isfinite(whole):", "if whole != whole and step < 0:"),
                Break("trainer: the gradient is not looked at", f"{TRAINING}step.py", "if not norm.isfinite():", "if step < 0:"),
                Break("trainer: text features are the images'", f"{TRAINING}step.py", "named(features[1:2])", "named(features[:1])"),
            ),
        ),
        Promise("what is saved as model/ is what was validated, the moving average where there is one", (f"{RUN}::test_saved_model_is_the_one_that_was_validated", f"{RUN}::test_average_is_what_is_saved"), (Break("trainer: the weights themselves are saved", f"{TRAINING}trainer.py", "        with self._averaged():\n            state", "        if True:\n            state"),)),
        Promise("matrices decay, and nothing else", (f"{STEP}::test_matrices_decay_and_nothing_else", f"{STEP}::test_update_decays_matrices_only"), (Break("trainer: the class token decays", f"{TRAINING}optim.py", "sum(size > 1 for size in p.shape) >= 2", "p.dim() >= 2"),)),
        Promise("the command line wins over files, and `--help` needs no torch", (f"{OPTIONS}::test_options_of_files_yield_to_later_files_and_to_the_command_line", f"{OPTIONS}::test_help_names_every_option_and_loads_no_torch"), (Break("trainer: files win", f"{TRAINING}options.py", "args=[*from_files, *given]", "args=[*given, *from_files]"), Break("trainer: options import torch", f"{TRAINING}options.py", "import difflib\n", "import difflib\n\nimport torch  # noqa: F401\n"))),
    ],
    "Plan": [
        Promise(
            "`fastclip plan` is within 15 % of the memory that measured steps take, and allocates nothing",
            (f"{PLAN}::test_plan_is_what_a_step_takes", f"{PLAN}::test_footprint_of_one_layer_is_counted_by_hand", f"{PLAN}::test_footprint_is_exact_for_other_batches", f"{PLAN}::test_bf16_and_checkpointing_make_activations_smaller"),
            (
                Break("plan: what dies is not forgotten", f"{TRAINING}footprint.py", "        self.bytes -= self._sizes.pop(key)", "        self._sizes.pop(key)"),
                Break("plan: DDP's buckets are forgotten", f"{TRAINING}planning.py", "return self.gradients if self._ddp and self.cached else 0", "return 0"),
                Break("plan: bf16 is forgotten", f"{TRAINING}footprint.py", 'enabled=self.precision == "bf16"', "enabled=False"),
            ),
        ),
        Promise(
            "the largest micro-batch fits and one more pair does not; states, shards and the loss are counted as they are",
            (f"{PLAN}::test_largest_micro_batch_is_the_largest", f"{PLAN}::test_states_are_of_the_models_parameters", f"{PLAN}::test_fsdp_holds_a_share", f"{PLAN}::test_loss_is_that_of_the_scaling_model"),
            (
                Break("plan: one pair too many", f"{TRAINING}planning.py", "        return low\n", "        return high\n"),
                Break("plan: AdamW has one state", f"{TRAINING}planning.py", '"adamw": 2', '"adamw": 1'),
                Break("plan: log-sum-exps are forgotten", f"{TRAINING}planning.py", "held = texts * (2 * size + _FP32)", "held = texts * 2 * size"),
            ),
        ),
    ],
}
# fmt: on

"""The trainer."""

from __future__ import annotations

from broken import Break, Promise

STEP, RUN, RANKS, OPTIONS = (
    "training/test_step.py",
    "training/test_trainer.py",
    "training/test_ranks.py",
    "training/test_options.py",
)
DURABLE, INTERRUPTED = "training/test_durable.py", "training/test_interrupted.py"
TRAINING = "fastclip/training/"

# fmt: off
PROMISES: dict[str, list[Promise]] = {
    "Training": [
        Promise(
            "the cached step has the one-shot step's gradients, temperature included; dropout, autocast and buffers as in one pass",
            ("training/test_cached_step.py::test_gradients_are_the_one_shot_steps", "training/test_cached_step.py::test_dropout_is_replayed", "training/test_cached_step.py::test_autocast", "training/test_cached_step.py::test_batch_norm_is_a_micro_batchs_and_its_statistics_move_once"),
            (
                Break("cached: the temperature counts in every micro-batch", "fastclip/training/cached.py", "[x.grad for x in rest if last]", "[x.grad for x in rest]"),
                Break("cached: other masks in the second pass", "fastclip/training/cached.py", "            torch.set_rng_state(cpu_state)\n", ""),
                Break("cached: statistics move twice", "fastclip/training/cached.py", "            x.copy_(kept)", "            pass"),
            ),
        ),
        Promise("it keeps one micro-batch's graph at a time", ("training/test_cached_step.py::test_one_graph_at_a_time",), (Break("cached: the first pass has graphs", "fastclip/training/cached.py", "with torch.no_grad(), _no_exchange(modules):", "with _no_exchange(modules):"),)),
        Promise("DDP exchanges gradients once a step, whatever each rank's micro-batches are", ("training/test_cached_step.py::test_ddp_exchanges_once",), (Break("cached: every micro-batch is exchanged", "fastclip/training/cached.py", "with nullcontext() if last else _no_exchange(modules):", "with nullcontext():"),)),
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
                Break("trainer: FSDP keeps the averages it gathered", f"{TRAINING}parallel.py", "            module.reshard()", "            pass"),
                Break("trainer: one rank of two caches", f"{TRAINING}step.py", "if len(batches) == 1 and not self.cached:", "if len(batches) == 1:"),
                Break("trainer: a rank's own loss is told", f"{TRAINING}step.py", "whole = float(shared[0].to(value.dtype))", "whole = float(value.detach())"),
            ),
        ),
        Promise(
            "a resumed run has the losses of one that never stopped, bit for bit, and its metrics; other options are named",
            (f"{RUN}::test_resumed_run_is_the_run_that_never_stopped", f"{RUN}::test_resumed_run_has_the_optimisers_options_it_is_given", f"{RUN}::test_resume_names_what_changed_and_what_does_not_fit"),
            (
                Break("trainer: the checkpoint's weight decay stays", f"{TRAINING}checkpoint.py", "        group.update(options)\n", "        pass\n"),
                Break("trainer: dropout goes on where it was", f"{TRAINING}trainer.py", "            seed_step(options.seed, step, world.rank)\n", ""),
                Break("trainer: the average begins anew", f"{TRAINING}checkpoint.py", '        ema.updates = state["ema_updates"]\n', ""),
                Break("trainer: lines after the checkpoint stay", f"{TRAINING}metrics.py", 'if values["step"] <= step:', "if values:"),
                Break("trainer: changes are not named", f"{TRAINING}trainer.py", "for change in _changes(", "for change in () and _changes("),
            ),
        ),
        Promise(
            "processes that see different data raise, and a run is told when its data changed since the checkpoint",
            (f"{RANKS}::test_ranks_that_see_different_data_are_told", "training/test_faults.py::test_data_that_changed_since_the_checkpoint_is_told"),
            (
                Break("trainer: every rank has data of its own", f"{TRAINING}trainer.py", "if len(set(told)) > 1:", "if len(told) < 1:"),
                Break("trainer: other data in silence", f"{TRAINING}trainer.py", 'if (samples := state["samples"]) != len(self.source):', 'if (samples := state["samples"]) < 0:'),
            ),
        ),
        Promise("the same options repeat a run bit for bit, with other workers too", (f"{RUN}::test_run_repeats_bit_by_bit",), (Break("trainer: weights from whatever was drawn before", f"{TRAINING}building.py", "    torch.manual_seed(options.seed)\n", ""),)),
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
    "Machines that die": [
        Promise(
            "kill -9 at any moment of saving, and death after any file operation, leave whole checkpoints: the last or the next",
            (f"{DURABLE}::test_death_at_every_file_operation_leaves_a_whole_checkpoint", f"{DURABLE}::test_kill_leaves_the_last_checkpoint_or_the_next"),
            (
                Break("machines: the old one goes before the new one is in its place", "fastclip/durable.py", "            os.rename(path, old)\n", "            shutil.rmtree(path)\n"),
                Break("machines: what waited is not brought back", "fastclip/durable.py", "        _bring_back(path)\n        shutil", "        shutil"),
                Break("machines: old ones are removed file by file", "fastclip/durable.py", "    os.rename(path, gone)\n", "    shutil.rmtree(path)\n"),
                Break("machines: files appear one by one", "fastclip/durable.py", "    half.mkdir()\n    try:\n        yield half\n", "    half.mkdir()\n    try:\n        path.mkdir(exist_ok=True)\n        yield half\n"),
            ),
        ),
        Promise(
            "a flipped byte, a cut or a missing file in a checkpoint is found and named, and the one before is used; no pickle runs",
            (f"{DURABLE}::test_damage_is_found_and_the_one_before_is_used", f"{DURABLE}::test_no_pickle_runs_when_a_checkpoint_is_read"),
            (
                Break("machines: only sizes are compared", "fastclip/durable.py", "if _sha256(file) != digest:", "if _sha256(file) == digest[1:]:"),
                Break("machines: a missing file is not missed", "fastclip/durable.py", '            raise ValueError(f"{file} is missing")', "            continue"),
                Break("machines: the newest or nothing", f"{TRAINING}checkpoint.py", "            problems.append(str(error))\n            continue", "            raise"),
                Break("machines: a pickle is read", f"{TRAINING}checkpoint.py", "        return load_file(file)\n", '        return __import__("pickle").loads(file.read_bytes())\n'),
            ),
        ),
        Promise(
            "old checkpoints go when the new one is there, not before; those of a later step than a run begins at are set aside",
            (f"{DURABLE}::test_old_checkpoints_go_after_the_new_one_is_there", f"{DURABLE}::test_checkpoints_of_a_later_step_are_set_aside"),
            (
                Break("machines: room is made first", f"{TRAINING}checkpoint.py", '    path = folder / f"step-{snapshot.step:08d}"\n', '    path = folder / f"step-{snapshot.step:08d}"\n    for older in _by_step(folder):\n        remove_folder(older)\n'),
                Break("machines: later checkpoints stay", f"{TRAINING}checkpoint.py", "if _step(path) > step:", "if _step(path) < 0:"),
            ),
        ),
        Promise(
            "a full disk: the bytes needed are told, in one line, and the old checkpoint stands",
            (f"{DURABLE}::test_full_disk_says_how_many_bytes_were_needed", f"{DURABLE}::test_space_is_looked_at_before_writing", f"{INTERRUPTED}::test_run_on_a_full_disk_says_so_in_a_line"),
            (
                Break("machines: the space is not looked at", f"{TRAINING}checkpoint.py", "disk.free < snapshot.size:", "disk.free < 0:"),
                Break("machines: safetensors' error is not the disk's", f"{TRAINING}checkpoint.py", "except (OSError, SafetensorError) as error:", "except OSError as error:"),
            ),
        ),
        Promise(
            "checkpoints are written while training goes on and change no number; one that fails ends the run at its next step, on every rank",
            (f"{DURABLE}::test_training_goes_on_beside_a_snapshot_and_does_not_change_it", f"{DURABLE}::test_saver_writes_one_at_a_time_and_keeps_no_error_to_itself", f"{INTERRUPTED}::test_saving_in_the_background_changes_no_number", f"{INTERRUPTED}::test_shards_are_saved_in_the_background_as_they_were", f"{INTERRUPTED}::test_run_whose_checkpoint_fails_ends_with_its_error", f"{INTERRUPTED}::test_checkpoint_that_fails_on_one_rank_ends_all"),
            (
                Break("machines: a snapshot is the weights themselves", f"{TRAINING}checkpoint.py", "return x.clone() if", "return x if"),
                Break("machines: two are written at a time", f"{TRAINING}saver.py", "        self.wait()\n        if self._pool is None:", "        if self._pool is None:"),
                Break("machines: nobody asks whether it failed", f"{TRAINING}trainer.py", "return FAILED if self.saver.failed else", "return"),
            ),
        ),
        Promise(
            "SIGTERM and Ctrl-C: a checkpoint after the step, on which all ranks agree, and status 143 or 130; a second one ends the process at once",
            (f"{INTERRUPTED}::test_interrupted_run_raises_and_restores_the_handlers", f"{INTERRUPTED}::test_second_signal_ends_the_process_at_once", f"{INTERRUPTED}::test_signal_to_one_rank_ends_all_after_the_same_step", f"{INTERRUPTED}::test_signal_ends_a_command_with_a_checkpoint", f"{INTERRUPTED}::test_torchrun_passes_a_signal_on"),
            (
                Break("machines: a validation that was due is left out", f"{TRAINING}trainer.py", "        if self.val_source is not None and (_due(", "        if not stops and self.val_source is not None and (_due("),
                Break("machines: the handlers stay", f"{TRAINING}signals.py", "for number, handler in before.items():", "for number, handler in ():"),
                Break("machines: a launcher's echo is a second signal", f"{TRAINING}signals.py", "self._since > _ECHO:", "self._since >= 0:"),
                Break("machines: the second signal is noted, too", f"{TRAINING}signals.py", "elif time.monotonic()", "elif 0 > time.monotonic()"),
                Break("machines: every rank minds its own signals", f"{TRAINING}step.py", "zip(_STATUSES, shared[1:].tolist())", "zip(_STATUSES, told.tolist())"),
            ),
        ),
        Promise(
            "a run that is killed again and again ends with the numbers and weights of one that never stopped, its model/ included",
            (f"{INTERRUPTED}::test_run_that_died_before_its_model_writes_it", f"{INTERRUPTED}::test_run_goes_on_from_the_checkpoint_before_a_damaged_one", f"{INTERRUPTED}::test_run_killed_again_and_again_is_the_run_that_never_stopped"),
            (
                Break("machines: nothing is left after the last checkpoint", f"{TRAINING}trainer.py", "(first == self.steps and ended)", "first == self.steps"),
                Break("machines: the optimiser begins anew", f"{TRAINING}checkpoint.py", 'whole = {"state": values,', 'whole = {"state": {k: {s: x * 0 for s, x in v.items()} for k, v in values.items()},'),
            ),
        ),
        Promise(
            "a rank that is lost or stands still ends the others within `--timeout`, saying so; torchrun's restart resumes by itself",
            (f"{INTERRUPTED}::test_damaged_checkpoint_ends_all_ranks", f"{INTERRUPTED}::test_ranks_meet_where_no_dead_rank_has_been", f"{INTERRUPTED}::test_lost_rank_ends_the_others", f"{INTERRUPTED}::test_torchrun_restarts_a_run_whose_rank_was_killed"),
            (
                Break("machines: an error stays on its rank", f"{TRAINING}parallel.py", "if error is None and any(told):", "if error is None and not told:"),
                Break("machines: gloo's errors are not known", f"{TRAINING}parallel.py", "or any(word in str(error) for word in _LOST)", ""),
                Break("machines: ranks meet where the dead ones did", f"{TRAINING}meeting.py", 'PrefixStore(f"fastclip/{name}", store)', 'PrefixStore("fastclip", store)'),
            ),
        ),
        Promise("docs/reliability.md is what the tests' markers say", ("package/test_reliability.py::test_document_is_what_the_markers_say",), (Break("machines: the document has drifted", "docs/reliability.md", "| kill -9 at any moment of saving |", "| kill -9 at some moment of saving |"),)),
    ],
}
# fmt: on

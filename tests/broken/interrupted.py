"""Training that is stopped, killed, or cannot write."""

from __future__ import annotations

from broken import DOCUMENTS, SAFETY, STOPS, Break, Promise

PROMISES = [
    Promise(
        STOPS,
        "If a process is killed while it saves, either the last checkpoint or the next one is complete",
        tests=[
            "system/test_durable.py::test_death_at_every_file_operation_leaves_a_whole_checkpoint",
            "system/test_durable.py::test_kill_leaves_the_last_checkpoint_or_the_next",
        ],
        breaks=[
            Break(
                "machines: the old one goes before the new one is in its place",
                "fastclip/system/durable.py",
                old="os.rename(path, old)",
                new="shutil.rmtree(path)",
            ),
            Break(
                "machines: what waited is not brought back",
                "fastclip/system/durable.py",
                old="_bring_back(path)\n",
                new="",
            ),
            Break(
                "machines: old ones are removed file by file",
                "fastclip/system/durable.py",
                old="os.rename(path, gone)",
                new="shutil.rmtree(path)",
            ),
            Break(
                "machines: files appear one by one",
                "fastclip/system/durable.py",
                old="half.mkdir()",
                new="half.mkdir(); path.mkdir(exist_ok=True)",
            ),
        ],
    ),
    Promise(
        STOPS,
        "A damaged checkpoint is detected and named, and the previous one is used",
        tests=[
            "system/test_durable.py::test_damage_is_found_and_the_one_before_is_used",
        ],
        breaks=[
            Break(
                "machines: only sizes are compared",
                "fastclip/system/durable.py",
                old="if _sha256(file) != digest:",
                new="if _sha256(file) == digest[1:]:",
            ),
            Break(
                "machines: a missing file is not missed",
                "fastclip/system/durable.py",
                old='raise ValueError(f"{file} is missing")',
                new="continue",
            ),
            Break(
                "machines: the newest or nothing",
                "fastclip/training/run/checkpoints.py",
                old="problems.append(str(error))",
                new="raise",
            ),
        ],
    ),
    Promise(
        SAFETY,
        "Resuming from a checkpoint never unpickles anything",
        tests=[
            "system/test_durable.py::test_no_pickle_runs_when_a_checkpoint_is_read",
        ],
        breaks=[
            Break(
                "machines: a pickle is read",
                "fastclip/training/run/checkpoints.py",
                old="tensors: Any = read_tensors(file)",
                new='tensors: Any = __import__("pickle").loads(file.read_bytes())',
            ),
        ],
    ),
    Promise(
        STOPS,
        "Old checkpoints are removed only after the new one is complete",
        tests=[
            "system/test_durable.py::test_old_checkpoints_go_after_the_new_one_is_there",
        ],
        breaks=[
            Break(
                "machines: room is made first",
                "fastclip/training/run/checkpoints.py",
                old='path = folder / f"step-{snapshot.step:08d}"',
                new='[remove_folder(older) for older in _by_step(folder)]; path = folder / f"step-{snapshot.step:08d}"',
            ),
        ],
    ),
    Promise(
        STOPS,
        "If a run starts from an earlier checkpoint, the checkpoints of later steps are set aside",
        tests=[
            "system/test_durable.py::test_checkpoints_of_a_later_step_are_set_aside",
        ],
        breaks=[
            Break(
                "machines: later checkpoints stay",
                "fastclip/training/run/checkpoints.py",
                old="if _step(path) > step:",
                new="if _step(path) < 0:",
            ),
        ],
    ),
    Promise(
        STOPS,
        "A failed validation loses no step: the checkpoint is written before it, and a resumed run repeats "
        "the validation",
        tests=["training/test_faults.py::test_failed_validation_loses_no_step"],
        breaks=[
            Break(
                "machines: validation comes first",
                "fastclip/training/run/loop.py",
                old="        if stops or done == self.last or _due(done, self.options.save_every):\n",
                new="        if self._validation_is_due(done):\n            self._validate(done)\n"
                "        if stops or done == self.last or _due(done, self.options.save_every):\n",
            ),
            Break(
                "machines: what was not validated stays so",
                "fastclip/training/run/loop.py",
                old="if not self.validated and self._validation_is_due(self.first):",
                new="if False:",
            ),
        ],
    ),
    Promise(
        STOPS,
        "A full disk ends the run with an error that states the bytes needed, and the old checkpoint is kept",
        tests=[
            "system/test_durable.py::test_full_disk_says_how_many_bytes_were_needed",
            "system/test_durable.py::test_space_is_looked_at_before_writing",
            "training/test_interrupted.py::test_run_on_a_full_disk_says_so_in_a_line",
        ],
        breaks=[
            Break(
                "machines: the space is not looked at",
                "fastclip/training/run/checkpoints.py",
                old="_free_bytes(half) < snapshot.size:",
                new="_free_bytes(half) < 0:",
            ),
            Break(
                "machines: safetensors' error is not the disk's",
                "fastclip/training/run/checkpoints.py",
                old="except (OSError, SafetensorError) as error:",
                new="except OSError as error:",
            ),
        ],
    ),
    Promise(
        STOPS,
        "Saving in the background does not change any number of the run",
        tests=[
            "training/test_interrupted.py::test_saving_in_the_background_changes_no_number",
            "system/test_durable.py::test_training_goes_on_beside_a_snapshot_and_does_not_change_it",
            "system/test_durable.py::test_saver_writes_one_at_a_time_and_keeps_no_error_to_itself",
            "training/test_interrupted.py::test_shards_are_saved_in_the_background_as_they_were",
        ],
        breaks=[
            Break(
                "machines: a snapshot is the weights themselves",
                "fastclip/training/run/checkpoints.py",
                old="return x.clone() if",
                new="return x if",
            ),
            Break(
                "machines: two are written at a time",
                "fastclip/training/run/background_saver.py",
                old="self.wait()\n        if self._pool is None:",
                new="if self._pool is None:",
            ),
        ],
    ),
    Promise(
        STOPS,
        "If a checkpoint cannot be written, the run ends at its next step on every process",
        tests=[
            "training/test_interrupted.py::test_run_whose_checkpoint_fails_ends_with_its_error",
            "training/test_interrupted.py::test_checkpoint_that_fails_on_one_rank_ends_all",
        ],
        breaks=[
            Break(
                "machines: nobody asks whether it failed",
                "fastclip/training/run/loop.py",
                old="return FAILED if self.saver.failed else",
                new="return",
            ),
        ],
    ),
    Promise(
        STOPS,
        "After SIGTERM or Ctrl-C all processes save a checkpoint of the same step, and exit with status 143 or 130",
        tests=[
            "training/test_interrupted.py::test_signal_ends_a_command_with_a_checkpoint",
            "training/test_interrupted.py::test_interrupted_run_raises_and_restores_the_handlers",
            "training/test_interrupted.py::test_signal_to_one_rank_ends_all_after_the_same_step",
            "training/test_interrupted.py::test_torchrun_passes_a_signal_on",
            "training/test_interrupted.py::test_second_signal_ends_the_process_at_once",
        ],
        breaks=[
            Break(
                "machines: a validation that was due is left out",
                "fastclip/training/run/loop.py",
                old="        if self._validation_is_due(done):",
                new="        if not stops and self._validation_is_due(done):",
            ),
            Break(
                "machines: the handlers stay",
                "fastclip/training/signals.py",
                old="for number, handler in before.items():",
                new="for number, handler in ():",
            ),
            Break(
                "machines: a launcher's echo is a second signal",
                "fastclip/training/signals.py",
                old="self._since > ECHO:",
                new="self._since >= 0:",
            ),
            Break(
                "machines: every rank minds its own signals",
                "fastclip/training/step/update.py",
                old="zip(_STATUSES, numbers[1:])",
                new="zip(_STATUSES, [wished == code for code in _STATUSES])",
            ),
        ],
    ),
    Promise(
        STOPS,
        "A second signal ends the process immediately",
        tests=[
            "training/test_interrupted.py::test_second_signal_ends_the_process_at_once",
        ],
        breaks=[
            Break(
                "machines: the second signal is noted, too",
                "fastclip/training/signals.py",
                old="elif time.monotonic()",
                new="elif 0 > time.monotonic()",
            ),
        ],
    ),
    Promise(
        STOPS,
        "A run killed repeatedly ends with the weights of an uninterrupted run (on a GPU with `--deterministic`)",
        tests=[
            "training/test_interrupted.py::test_run_killed_again_and_again_is_the_run_that_never_stopped",
            "training/test_interrupted.py::test_run_that_died_before_its_model_writes_it",
            "training/test_interrupted.py::test_run_goes_on_from_the_checkpoint_before_a_damaged_one",
        ],
        breaks=[
            Break(
                "machines: nothing is left after the last checkpoint",
                "fastclip/training/trainer.py",
                old="(done == self.steps and (ended or not ours))",
                new="done == self.steps",
            ),
            Break(
                "machines: the optimiser begins anew",
                "fastclip/training/run/checkpoints.py",
                old='whole = {"state": values,',
                new='whole = {"state": {k: {s: x * 0 for s, x in v.items()} for k, v in values.items()},',
            ),
        ],
    ),
    Promise(
        STOPS,
        "If a process dies or hangs, the others end within --timeout with an error that states the reason",
        tests=[
            "training/test_interrupted.py::test_lost_rank_ends_the_others",
            "training/test_interrupted.py::test_damaged_checkpoint_ends_all_ranks",
        ],
        breaks=[
            Break(
                "machines: an error stays on its rank",
                "fastclip/training/ranks.py",
                old="for failure in failures:",
                new="for failure in ():",
            ),
            Break(
                "machines: gloo's errors are not known",
                "fastclip/training/ranks.py",
                old="or any(word in str(error) for word in _LOST)",
                new="",
            ),
        ],
    ),
    Promise(
        STOPS,
        "A run that torchrun restarts resumes from its last checkpoint automatically",
        tests=[
            "training/test_interrupted.py::test_torchrun_restarts_a_run_whose_rank_was_killed",
            "training/test_interrupted.py::test_ranks_meet_where_no_dead_rank_has_been",
        ],
        breaks=[
            Break(
                "machines: ranks meet where the dead ones did",
                "fastclip/training/ranks.py",
                old='PrefixStore(f"fastclip/{name}", store)',
                new='PrefixStore("fastclip", store)',
            ),
        ],
    ),
    Promise(
        DOCUMENTS,
        "docs/reliability.md lists exactly the faults that the tests cause",
        tests=[
            "package/test_reliability.py::test_document_is_what_the_markers_say",
        ],
        breaks=[
            Break(
                "machines: the document has drifted",
                "docs/reliability.md",
                old="| kill -9 at any moment of saving |",
                new="| kill -9 at some moment of saving |",
            ),
        ],
    ),
]

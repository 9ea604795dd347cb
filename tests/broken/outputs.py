"""Outputs of commands: their owner, earlier contents, and files that are read again."""

from __future__ import annotations

from broken import STOPS, Break, Promise

PROMISES = [
    Promise(
        STOPS,
        "Only one command can write to an output; a second one is refused with the process, host and time of the first",
        tests=[
            "system/test_owner.py::test_second_owner_is_refused_and_a_killed_one_is_passed_over",
            "system/test_owner.py::test_owner_on_another_host_is_told_and_taken_from_by_force",
            "system/test_owner.py::test_lock_file_that_is_replaced_while_it_is_locked_is_locked_anew",
            "system/test_owner.py::test_child_forked_inside_neither_owns_nor_gives_back",
            "system/test_owner.py::test_another_thread_is_refused_and_a_call_inside_shares",
            "system/test_owner.py::test_without_locks_the_process_and_its_begin_count",
            "system/test_owner.py::test_file_that_another_command_writes_into_an_owned_folder_stays",
            "system/test_reading.py::test_what_no_process_of_ours_left_stays",
        ],
        breaks=[
            Break(
                "durable: halves of a file that another command owns are removed",
                "fastclip/system/durable.py",
                old='ours = owned and not (folder / f".{name}.lock").exists()',
                new="ours = owned",
            ),
            Break(
                "durable: a user's hidden files are taken for halves",
                "fastclip/system/durable.py",
                old=r"\.[0-9a-f]{8}\.tmp",
                new=r"\..+\.tmp",
            ),
            Break(
                "owner: nothing is locked",
                "fastclip/system/owner.py",
                old="fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)",
                new="pass",
            ),
            Break(
                "owner: another host's process is passed over",
                "fastclip/system/owner.py",
                old="if foreign and not force:",
                new="if False:",
            ),
            Break(
                "owner: the file that is locked is another one",
                "fastclip/system/owner.py",
                old="    if not _is_at(lock, handle):\n        return False",
                new="",
            ),
            Break(
                "owner: a child gives back what its parent owns",
                "fastclip/system/owner.py",
                old="if os.getpid() == pid:  #",
                new="if True:  #",
            ),
            Break(
                "owner: threads share",
                "fastclip/system/owner.py",
                old="    if holder == (pid, thread):\n",
                new="    if holder is not None:\n",
            ),
            Break(
                "owner: a number that another process has now is its owner's",
                "fastclip/system/owner.py",
                old="return _start(owner.pid) == owner.start",
                new="return bool(_start(owner.pid))",
            ),
        ],
    ),
    Promise(
        STOPS,
        "An output that cannot be written, or that is also the input, is reported before any work begins",
        tests=[
            "package/test_outputs.py::test_output_that_cannot_be_is_named_before_any_work",
            "package/test_outputs.py::test_output_of_another_command_is_refused_and_taken_by_force",
            "package/test_outputs.py::test_output_is_not_what_the_command_reads",
            "package/test_outputs.py::test_pictures_of_the_data_are_not_replaced",
            "package/test_outputs.py::test_link_stays_one_and_a_pipe_is_written_to",
            "package/test_outputs.py::test_output_is_no_class",
        ],
        breaks=[
            Break(
                "outputs: a run in a folder of classes is a class",
                "fastclip/cli/outputs.py",
                old='if not top.startswith(".") and (classes := _class_folders(place)) and top not in classes:',
                new="if False:",
            ),
            Break(
                "outputs: a picture of the data is replaced by a sheet",
                "fastclip/cli/outputs.py",
                old="_check_new(output_path(file), data, option)",
                new="pass",
            ),
            Break(
                "outputs: the folder is looked at when it is written",
                "fastclip/cli/outputs.py",
                old="with owned(folder, force=args.force) as made:",
                new="for made in [Path(folder)]:",
            ),
            Break(
                "outputs: files are looked at when they are written",
                "fastclip/cli/outputs.py",
                old="stack.enter_context(owned_file(file, force=args.force))",
                new="pass",
            ),
            Break(
                "outputs: the data are written over",
                "fastclip/cli/outputs.py",
                old="os.path.samefile(path, place)",
                new="False",
            ),
            Break(
                "durable: a pipe or a device is replaced by a file",
                "fastclip/system/durable.py",
                old="    if is_special(path):\n        yield path\n        return\n",
                new="",
            ),
        ],
    ),
    Promise(
        STOPS,
        "If a run resumes in another run's folder, the metrics, model and checkpoints found there are set aside",
        tests=[
            "training/test_trainer.py::test_run_that_goes_on_elsewhere_does_not_mix_with_what_is_there",
            "package/test_outputs.py::test_nothing_that_was_set_aside_is_lost",
        ],
        breaks=[
            Break(
                "trainer: metrics of two runs in one file",
                "fastclip/training/run/loop.py",
                old="set_aside_run(self.folder)",
                new="pass",
            ),
            Break(
                "durable: what was set aside before is replaced",
                "fastclip/system/durable.py",
                old="while aside.exists() or aside.is_symlink():",
                new="shutil.rmtree(aside, ignore_errors=True)\n    while False:",
            ),
        ],
    ),
    Promise(
        STOPS,
        "Two evaluations of the same data at the same time do not mix their features",
        tests=["embedding/test_features.py::test_two_writers_of_one_store_do_not_mix_their_parts"],
        breaks=[
            Break(
                "kept features: parts are numbered, however long they are",
                "fastclip/embedding/features.py",
                old='f"part-{start:06d}.safetensors"',
                new='f"part-{start // 8:06d}.safetensors"',
            ),
        ],
    ),
    Promise(
        STOPS,
        "If a file of an earlier command has unexpected content, a one-line error names it",
        tests=[
            "training/test_read_back.py::test_what_is_not_what_was_written_is_an_error_that_names_the_file",
            "training/test_read_back.py::test_lines_of_metrics_that_are_none_are_left_out",
        ],
        breaks=[
            Break(
                "metrics: the next line is added to one without an end",
                "fastclip/training/run/metrics.py",
                old='kept.append(line + b"\\n")',
                new="kept.append(line)",
            ),
            Break(
                "checkpoint: any state will do",
                "fastclip/training/run/checkpoints.py",
                old="if not whole or",
                new="if",
            ),
        ],
    ),
]

"""SIGTERM, by which schedulers and containers end a command."""

from __future__ import annotations

from broken import STOPS, Break, Promise

PROMISES = [
    Promise(
        STOPS,
        "SIGTERM ends every command with status 143, and no process or temporary file is left",
        tests=[
            "package/test_ending.py::test_embed_ends_while_it_reads",
            "package/test_ending.py::test_parity_ends_with_its_processes",
            "package/test_ending.py::test_interrupted_parity_ends_its_processes_before_their_folder_goes",
            "package/test_ending.py::test_command_ends_where_the_exception_is_swallowed",
            "package/test_ending.py::test_swallowed_signal_is_what_ended_the_command",
            "package/test_ending.py::test_second_signal_ends_a_command_at_once",
            "data/test_loader.py::test_stuck_workers_are_not_waited_for",
            "data/test_loader.py::test_signals_wait_while_workers_start",
            "search/test_serve.py::test_command_serves_until_a_signal",
        ],
        breaks=[
            Break(
                "ending: SIGTERM is left to the system",
                "fastclip/cli/ending.py",
                old="or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL",
                new="or True",
            ),
            Break(
                "ending: what else fails after it hides it",
                "fastclip/cli/ending.py",
                old="raise Terminated from error",
                new="pass",
            ),
            Break(
                "ending: signals are handled within a fork",
                "fastclip/data/loading/workers.py",
                old="pthread_sigmask(signal.SIG_BLOCK,",
                new="pthread_sigmask(signal.SIG_UNBLOCK,",
            ),
            Break(
                "ending: a signal that waits ends a worker",
                "fastclip/data/loading/workers.py",
                old="while signal.sigtimedwait(_OF_GROUPS, 0):",
                new="while False:",
            ),
            Break(
                "ending: a stuck worker is waited for",
                "fastclip/data/loading/workers.py",
                old="patience.start()",
                new="pass",
            ),
            Break(
                "ending: workers keep folders of their own",
                "fastclip/data/loading/workers.py",
                old="multiprocessing.util.get_temp_dir()",
                new="pass",
            ),
            Break(
                "ending: parity leaves its processes",
                "fastclip/parity/processes.py",
                old="process.kill()",
                new="pass",
            ),
        ],
    ),
    Promise(
        STOPS,
        "Data workers and the processes of `fastclip parity` end within seconds of their parent, even after kill -9",
        tests=[
            "data/test_loader.py::test_workers_end_with_a_killed_program",
            "package/test_ending.py::test_ranks_of_parity_end_with_a_killed_program",
        ],
        breaks=[
            Break(
                "ending: workers outlive a killed program",
                "fastclip/data/loading/workers.py",
                old="end_with_parent(parent)",
                new="pass",
            ),
            Break(
                "ending: ranks of parity outlive it",
                "fastclip/parity/processes.py",
                old="end_with_parent(parent)",
                new="pass",
            ),
        ],
    ),
    Promise(
        STOPS,
        "A background run that ignores Ctrl-C still reacts to SIGTERM; a signal that was set to be ignored "
        "stays ignored",
        tests=[
            "training/test_interrupted.py::test_signal_ends_a_run_in_the_background",
            "training/test_interrupted.py::test_signal_that_is_ignored_stays_ignored",
        ],
        breaks=[
            Break(
                "ending: training hears what was to be ignored",
                "fastclip/training/signals.py",
                old="if signal.getsignal(number) is not signal.SIG_IGN]",
                new="]",
            ),
        ],
    ),
    Promise(
        STOPS,
        "A command reports a user's error in one line, even if stdout is closed or cannot encode a character",
        tests=[
            "package/test_streams.py::test_error_of_the_users_is_a_line_and_ours_a_traceback",
            "package/test_streams.py::test_what_an_encoding_lacks_is_escaped",
            "package/test_streams.py::test_closed_stream_is_nobody_elses",
        ],
        breaks=[
            Break(
                "ending: a closed stdout's number is the next file's",
                "fastclip/cli/printing.py",
                old="os.fdopen(os.open(os.devnull, os.O_RDWR), mode)",
                new="io.StringIO()",
            ),
            Break(
                "ending: memory that is missing has a traceback",
                "fastclip/cli/ending.py",
                old='"builtins.MemoryError", ',
                new="",
            ),
            Break(
                "ending: a bug of ours is a line",
                "fastclip/cli/ending.py",
                old="    return None\n",
                new="    return str(error)\n",
            ),
        ],
    ),
]

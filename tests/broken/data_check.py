"""Workers that hang or die, `fastclip data check` and `fastclip data pack`."""

from __future__ import annotations

from broken import DATA, STOPS, Break, Promise

PROMISES = [
    Promise(
        STOPS,
        "If a data worker hangs, it is named with the sample that it is reading",
        tests=[
            "data/test_faults.py::test_stuck_worker_is_named_with_what_it_reads",
            "data/test_mixture.py::test_reader_of_a_mixture_is_named_with_what_its_epoch_drew",
            "data/test_faults.py::test_no_alarm_while_batches_come",
        ],
        breaks=[
            Break(
                "faults: a worker notes nothing",
                "fastclip/data/loading/watchdog.py",
                old="self._note(index + 1, epoch)",
                new="",
            ),
            Break(
                "faults: what a mixture drew in its first epoch is named",
                "fastclip/data/loading/watchdog.py",
                old="self.source.key(what - 1, epoch=epoch)",
                new="self.source.key(what - 1, epoch=0)",
            ),
            Break(
                "faults: the alarm speaks once",
                "fastclip/data/loading/watchdog.py",
                old="now - max(since, last) >= patience",
                new="last == 0.0 and now - since >= patience",
            ),
            Break(
                "faults: the caller's time counts",
                "fastclip/data/loading/watchdog.py",
                old="self._since = None",
                new="pass",
            ),
        ],
    ),
    Promise(
        STOPS,
        "If the system kills a data worker, the run ends with a one-line error",
        tests=[
            "data/test_faults.py::test_death_of_a_worker_is_an_error_of_one_line",
            "data/test_loader.py::test_killed_worker_is_named_with_what_it_read",
            "training/test_faults.py::test_killed_worker_ends_the_run_with_a_line",
        ],
        breaks=[
            Break(
                "faults: torch's own words on a death",
                "fastclip/data/loading/workers.py",
                old="raise death from error\n            if",
                new="raise\n            if",
            ),
        ],
    ),
    Promise(
        DATA,
        "`fastclip data check` counts every sample once, and fails if the share of bad samples is above --max-bad",
        tests=[
            "data/test_check.py::test_check_counts_everything_once",
            "data/test_check.py::test_command_check_prints_a_table_and_fails_above_the_share",
        ],
        breaks=[
            Break(
                "check: always well",
                "fastclip/cli/data.py",
                old="if report.bad_share > args.max_bad:",
                new="if report.bad_share > 2:",
            ),
            Break(
                "check: a share of nan",
                "fastclip/cli/data.py",
                old="if not 0 <= args.max_bad <= 1:",
                new="if False:",
            ),
        ],
    ),
    Promise(
        DATA,
        "Shards written by `fastclip data pack` have the same content as their source",
        tests=[
            "data/test_check.py::test_packed_source_is_read_again_as_it_was",
            "data/test_check.py::test_shards_have_img2datasets_layout",
            "data/test_check.py::test_pack_touches_no_other_shards",
        ],
        breaks=[
            Break(
                "pack: several captions and a .txt",
                "fastclip/data/pack.py",
                old="if not rest:  #",
                new="if first:  #",
            ),
            Break(
                "pack: pictures out of shards become PNG",
                "fastclip/data/shards/source.py",
                old='return self._members(index, ("picture",))[0]',
                new="return b''",
            ),
            Break(
                "pack: pictures of a mixture become PNG",
                "fastclip/data/sources/subset.py",
                old="return picture_bytes(*self._locate(index))",
                new="return None",
            ),
        ],
    ),
    Promise(
        STOPS,
        "After an interruption `fastclip data pack` resumes, and its output is byte-identical",
        tests=[
            "data/test_check.py::test_interrupted_pack_goes_on_to_the_same_bytes",
            "data/test_check.py::test_pack_touches_no_other_shards",
        ],
        breaks=[
            Break(
                "pack: a shard appears before it is whole",
                "fastclip/data/pack.py",
                old="with suppress(_Nothing), new_file(target) as half:",
                new="with suppress(_Nothing), __import__('contextlib').nullcontext(target) as half:",
            ),
            Break(
                "pack: other options, the same folder",
                "fastclip/data/pack.py",
                old="if changed := [key for key in about if key not in known or known[key] != about[key]]:",
                new="if changed := list[str]():",
            ),
        ],
    ),
]

"""Samples, shards and workers that are damaged."""

from __future__ import annotations

from broken import Break, Promise

PROMISES = [
    Promise(
        "Data",
        (
            "a sample that cannot be used has a cause and a name, a fault for a fault; "
            "a picture that is too large is refused from its header, and no file starts a program"
        ),
        tests=[
            "data/test_faults.py::test_picture_fault_has_its_cause",
            "data/test_faults.py::test_large_picture_is_refused_from_its_header",
            "data/test_faults.py::test_files_that_cannot_be_read_have_their_cause",
            "data/test_faults.py::test_caption_fault_has_its_cause",
        ],
        breaks=[
            Break(
                "faults: large pictures are decoded",
                "fastclip/data/picture.py",
                old='warnings.simplefilter("error", Image.DecompressionBombWarning)',
                new="",
            ),
            Break(
                "faults: Ghostscript reads a picture",
                "fastclip/data/picture.py",
                old="Image.open(file, formats=_formats())",
                new="Image.open(file)",
            ),
            Break(
                "faults: all damage is called one",
                "fastclip/data/picture.py",
                old='cause = "truncated image" if "truncated" in',
                new='cause = "truncated image" if "" in',
            ),
            Break(
                "faults: an empty caption is one",
                "fastclip/data/table.py",
                old="if not self._captions[index]:",
                new="if index < 0:",
            ),
            Break(
                "faults: no permission is a missing file",
                "fastclip/data/picture.py",
                old='else "unreadable file"',
                new='else "missing file"',
            ),
        ],
    ),
    Promise(
        "Data",
        (
            "every mode of a picture becomes colours, more than 8 bits scaled; "
            "of an animation the first frame; damaged EXIF is passed over, a wrong suffix too"
        ),
        tests=[
            "data/test_faults.py::test_every_mode_becomes_colours",
            "data/test_faults.py::test_first_frame_of_an_animation_counts",
            "data/test_faults.py::test_damaged_exif_is_passed_over_without_a_word",
            "data/test_faults.py::test_kind_of_a_picture_is_not_its_name",
        ],
        breaks=[
            Break(
                "faults: 16 bits are cut off at 255",
                "fastclip/data/picture.py",
                old="return _eight_bits(image)",
                new="return image",
            ),
            Break(
                "faults: damaged EXIF is a damaged picture",
                "fastclip/data/picture.py",
                old="with suppress(Exception):",
                new="with suppress(KeyError):",
            ),
        ],
    ),
    Promise(
        "Data",
        (
            "a shard that is cut off is used as far as it goes and named; "
            "the first of a repeated member counts; one that holds nothing stops the run by name; "
            "nothing is written, no pipe is run"
        ),
        tests=[
            "data/test_faults.py::test_shard_cut_in_half_is_used_as_far_as_it_goes",
            "data/test_shards.py::test_damage_of_a_shard_is_told_each_time",
            "data/test_faults.py::test_first_of_a_repeated_member_counts",
            "data/test_faults.py::test_shard_that_holds_nothing_stops_by_name",
            "data/test_faults.py::test_names_that_lead_elsewhere_write_nothing",
            "data/test_faults.py::test_pipe_is_never_run",
        ],
        breaks=[
            Break(
                "faults: the last of a repeated member counts",
                "fastclip/data/shard_index.py",
                old="elif kind in PICTURE_SUFFIXES",
                new='elif group.update({"picture": member, kind: member}) or kind in PICTURE_SUFFIXES',
            ),
            Break(
                "faults: a cut picture is read",
                "fastclip/data/shard_index.py",
                old="if any(member.header + BLOCK + member.size > end for",
                new="if any(member.size < 0 for",
            ),
            Break(
                "faults: a shard that ends in a header is whole",
                "fastclip/data/tar_index.py",
                old='"" if ends_well else "no header where one must be"',
                new='""',
            ),
            Break(
                "faults: a cut shard is named when it is indexed alone",
                "fastclip/data/shard_index.py",
                old="rest[:keys], rest[keys:].decode()",
                new='rest[:keys], ""',
            ),
        ],
    ),
    Promise(
        "Data",
        (
            "a bad sample is replaced by a function of seed, epoch and sample, and counted once an epoch: "
            "batches keep their sizes and are the same bits however read"
        ),
        tests=[
            "data/test_faults.py::test_bad_samples_are_replaced_and_batches_keep_their_size",
            "data/test_faults.py::test_replacements_are_the_same_however_read",
            "data/test_faults.py::test_source_that_gives_nothing_stops_with_causes_and_names",
        ],
        breaks=[
            Break(
                "faults: every epoch has the same replacements",
                "fastclip/data/loader.py",
                old="seed = mix(self._seed, draw.epoch, draw.sample, attempt)",
                new="seed = mix(self._seed, draw.sample, attempt)",
            ),
            Break(
                "faults: what is tried in its place counts, too",
                "fastclip/data/loader.py",
                old="skipped += faults[:1]",
                new="skipped += faults",
            ),
            Break(
                "faults: replacements are drawn by whoever reads",
                "fastclip/data/loader.py",
                old="yield mix(seed, 2) % len(self._watch.source), seed",
                new="yield random.SystemRandom().randrange(len(self._watch.source)), seed",
            ),
            Break(
                "faults: no other sample is tried",
                "fastclip/data/loader.py",
                old="_TRIES = 100",
                new="_TRIES = 1",
            ),
        ],
    ),
    Promise(
        "Data",
        (
            "a run shows what it skipped by cause, goes on counting after a resume, and stops above "
            "--max-bad, on all ranks at once, with a line that names files"
        ),
        tests=[
            "training/test_faults.py::test_skipped_samples_are_counted_by_cause_and_shown",
            "training/test_faults.py::test_resumed_run_goes_on_counting",
            "training/test_faults.py::test_run_stops_when_too_many_samples_are_bad",
            "training/test_faults.py::test_share_is_exact_at_the_end_of_an_epoch_and_beyond_chance_before",
            "training/test_faults.py::test_all_ranks_count_together_and_stop_together",
            "training/test_faults.py::test_command_stops_with_a_line_that_names_files",
        ],
        breaks=[
            Break(
                "faults: a resumed run counts from 0",
                "fastclip/training/trainer.py",
                old='self.skipped.load(state["skipped"])',
                new="",
            ),
            Break(
                "faults: chance stops a run",
                "fastclip/training/skipped.py",
                old="expected + 4 * math.sqrt(expected) + 4)",
                new="expected)",
            ),
            Break(
                "faults: a rank counts its own",
                "fastclip/training/skipped.py",
                old="for found in everyone for fault in found",
                new="for found in everyone[:1] for fault in found",
            ),
            Break(
                "faults: only chance is looked at",
                "fastclip/training/skipped.py",
                old="return bad > at_the_end or (max_bad",
                new="return bool(at_the_end) and (max_bad",
            ),
        ],
    ),
    Promise(
        "Data",
        (
            "a worker that is stuck is named with what it reads, and again; "
            "one that the system kills ends the run with a line, wherever torch notices"
        ),
        tests=[
            "data/test_faults.py::test_stuck_worker_is_named_with_what_it_reads",
            "data/test_mixture.py::test_reader_of_a_mixture_is_named_with_what_its_epoch_drew",
            "data/test_faults.py::test_no_alarm_while_batches_come",
            "data/test_faults.py::test_death_of_a_worker_is_an_error_of_one_line",
            "data/test_loader.py::test_killed_worker_is_named_with_what_it_read",
            "training/test_faults.py::test_killed_worker_ends_the_run_with_a_line",
        ],
        breaks=[
            Break(
                "faults: a worker notes nothing",
                "fastclip/data/watch.py",
                old="self._note(index + 1, epoch)",
                new="",
            ),
            Break(
                "faults: what a mixture drew in its first epoch is named",
                "fastclip/data/watch.py",
                old="self.source.key(what - 1, epoch=epoch)",
                new="self.source.key(what - 1, epoch=0)",
            ),
            Break(
                "faults: the alarm speaks once",
                "fastclip/data/watch.py",
                old="now - max(since, told) >= patience",
                new="told == 0.0 and now - since >= patience",
            ),
            Break(
                "faults: the caller's time counts",
                "fastclip/data/watch.py",
                old="self._since = None",
                new="pass",
            ),
            Break(
                "faults: torch's own words on a death",
                "fastclip/data/workers.py",
                old=("raise death from error\n            if"),
                new=("raise\n            if"),
            ),
        ],
    ),
    Promise(
        "Data",
        (
            "`fastclip data check` counts every sample once; "
            "what `data pack` writes is read as its source is, and is the same bytes after an interruption anywhere"
        ),
        tests=[
            "data/test_check.py::test_check_counts_everything_once",
            "data/test_check.py::test_command_check_prints_a_table_and_fails_above_the_share",
            "data/test_check.py::test_packed_source_is_read_again_as_it_was",
            "data/test_check.py::test_interrupted_pack_goes_on_to_the_same_bytes",
            "data/test_check.py::test_pack_touches_no_other_shards",
            "data/test_check.py::test_shards_have_img2datasets_layout",
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
                "fastclip/data/shards.py",
                old='return self._members(index, ("picture",))[0]',
                new="return b''",
            ),
            Break(
                "pack: pictures of a mixture become PNG",
                "fastclip/data/mixture.py",
                old="return picture_bytes(source, sample)",
                new="return None",
            ),
            Break(
                "pack: a shard appears before it is whole",
                "fastclip/data/pack.py",
                old='output / f"{shard:05d}.tar.tmp", output',
                new='output / f"{shard:05d}.tar", output',
            ),
            Break(
                "pack: other options, the same folder",
                "fastclip/data/pack.py",
                old="if before != about:",
                new="if before is None:",
            ),
            Break(
                "check: always well",
                "fastclip/cli/data.py",
                old="if found.bad_share > args.max_bad:",
                new="if found.bad_share > 2:",
            ),
        ],
    ),
]

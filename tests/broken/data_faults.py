"""Damaged samples, shards and workers."""

from __future__ import annotations

from broken import DATA, SAFETY, Break, Promise

PROMISES = [
    Promise(
        DATA,
        "A sample that cannot be used is reported with its name and one of the documented causes",
        tests=[
            "data/test_faults.py::test_picture_fault_has_its_cause",
            "data/test_faults.py::test_files_that_cannot_be_read_have_their_cause",
            "data/test_faults.py::test_caption_fault_has_its_cause",
        ],
        breaks=[
            Break(
                "faults: all damage is called one",
                "fastclip/data/picture.py",
                old='cause = "truncated image" if "truncated" in',
                new='cause = "truncated image" if "" in',
            ),
            Break(
                "faults: an empty caption is one",
                "fastclip/data/sources/captions.py",
                old="if not given:",
                new="if False:",
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
        SAFETY,
        "An image that is too large is refused before it is decoded, and no image starts another program",
        tests=[
            "data/test_faults.py::test_large_picture_is_refused_from_its_header",
            "data/test_pictures.py::test_threads_share_the_filters_of_warnings",
            "data/test_faults.py::test_picture_fault_has_its_cause",
            "data/test_faults.py::test_files_that_cannot_be_read_have_their_cause",
        ],
        breaks=[
            Break(
                "faults: large pictures are decoded",
                "fastclip/data/pillow_warnings.py",
                old='warnings.simplefilter("error", Image.DecompressionBombWarning)',
                new="",
            ),
            Break(
                "faults: a thread that is done lets the others decode large pictures",
                "fastclip/data/pillow_warnings.py",
                old="            if not _inside:\n                _filters.__exit__",
                new="            if True:\n                _filters.__exit__",
            ),
            Break(
                "faults: Ghostscript reads a picture",
                "fastclip/data/picture.py",
                old="Image.open(file, formats=picture_formats())",
                new="Image.open(file)",
            ),
        ],
    ),
    Promise(
        DATA,
        "Images of every colour mode are read; 16-bit values are scaled, and an animation gives its first frame",
        tests=[
            "data/test_faults.py::test_every_mode_becomes_colours",
            "data/test_faults.py::test_first_frame_of_an_animation_counts",
        ],
        breaks=[
            Break(
                "faults: 16 bits are cut off at 255",
                "fastclip/data/picture.py",
                old="return eight_bits(image)",
                new="return image",
            ),
        ],
    ),
    Promise(
        DATA,
        "Reading, transforming and packing images prints no warning of a library, and such a warning rejects no image",
        tests=[
            "data/test_pictures.py::test_nothing_warns_of_a_picture",
            "data/test_faults.py::test_damaged_exif_is_passed_over_without_a_word",
        ],
        breaks=[
            Break(
                "faults: a palette's transparency is warned of",
                "fastclip/data/picture.py",
                old='isinstance(image.info.get("transparency"), bytes)',
                new="False",
            ),
            Break(
                "faults: metadata are warned of",
                "fastclip/data/pillow_warnings.py",
                old='warnings.simplefilter("ignore")',
                new="",
            ),
        ],
    ),
    Promise(
        DATA,
        "An image with damaged EXIF data or a wrong file suffix can be used",
        tests=[
            "data/test_faults.py::test_damaged_exif_is_passed_over_without_a_word",
            "data/test_faults.py::test_kind_of_a_picture_is_not_its_name",
        ],
        breaks=[
            Break(
                "faults: damaged EXIF is a damaged picture",
                "fastclip/data/picture.py",
                old="with suppress(Exception):",
                new="with suppress(KeyError):",
            ),
        ],
    ),
    Promise(
        DATA,
        "An unclosed quote in a table is an error if it swallows rows that name images",
        tests=[
            "data/test_tables.py::test_quote_that_swallows_rows_is_an_error",
            "data/test_tables.py::test_captions_of_several_lines_are_read",
        ],
        breaks=[
            Break(
                "table: a row of many lines is one damaged row",
                "fastclip/data/sources/table.py",
                old="            if end > line:\n",
                new="            if False:\n",
            ),
            Break(
                "table: rows in quotes are a caption",
                "fastclip/data/sources/table.py",
                old="if alike > judged / 2 and (judged > 1 or beside):",
                new="if False:",
            ),
            Break(
                "table: any line with a separator is a row",
                "fastclip/data/sources/table.py",
                old="if plain and _like(cells[column], picture):",
                new="if plain:",
            ),
        ],
    ),
    Promise(
        DATA,
        "A truncated shard is used up to its damage, and is named at every start",
        tests=[
            "data/test_faults.py::test_shard_cut_in_half_is_used_as_far_as_it_goes",
            "data/test_shards.py::test_damage_of_a_shard_is_told_each_time",
            "data/test_faults.py::test_shard_that_holds_nothing_stops_by_name",
        ],
        breaks=[
            Break(
                "faults: a cut picture is read",
                "fastclip/data/shards/samples.py",
                old="if any(member.end > end for",
                new="if any(member.size < 0 for",
            ),
            Break(
                "faults: a shard that ends in a header is whole",
                "fastclip/data/shards/tar_index.py",
                old='if len(header) < BLOCK:\n            raise _Broken("unexpected end of data")',
                new="if len(header) < BLOCK:\n            return len(header)",
            ),
            Break(
                "faults: a cut shard is named when it is indexed alone",
                "fastclip/data/shards/index.py",
                old='rest[:keys], about["damage"]',
                new='rest[:keys], ""',
            ),
        ],
    ),
    Promise(
        DATA,
        "If several members of a shard have the same name, the first one is used",
        tests=[
            "data/test_faults.py::test_first_of_a_repeated_member_counts",
        ],
        breaks=[
            Break(
                "faults: the last of a repeated member counts",
                "fastclip/data/shards/samples.py",
                old="elif kind in PICTURE_SUFFIXES",
                new='elif group.update({"picture": member, kind: member}) or kind in PICTURE_SUFFIXES',
            ),
        ],
    ),
    Promise(
        SAFETY,
        "Names inside a shard cannot write files elsewhere, and a `pipe:` in a SPEC is never run",
        tests=[
            "data/test_faults.py::test_names_that_lead_elsewhere_write_nothing",
            "data/test_faults.py::test_pipe_is_never_run",
            "data/test_remote.py::test_remote_fault_is_named",
        ],
        breaks=[
            Break(
                "remote: a pipe is taken for a file",
                "fastclip/data/spec.py",
                old='if spec.startswith("pipe:"):',
                new="if False:",
            ),
        ],
    ),
    Promise(
        DATA,
        "A sample that cannot be used is replaced, so batches keep their size and are bit-identical however "
        "they are read",
        tests=[
            "data/test_faults.py::test_bad_samples_are_replaced_and_batches_keep_their_size",
            "data/test_faults.py::test_replacements_are_the_same_however_read",
            "data/test_faults.py::test_source_that_gives_nothing_stops_with_causes_and_names",
        ],
        breaks=[
            Break(
                "faults: every epoch has the same replacements",
                "fastclip/data/loading/batches.py",
                old="seed = mix(self._seed, draw.epoch, draw.sample, attempt)",
                new="seed = mix(self._seed, draw.sample, attempt)",
            ),
            Break(
                "faults: what is tried in its place counts, too",
                "fastclip/data/loading/batches.py",
                old="skipped += faults[:1]",
                new="skipped += faults",
            ),
            Break(
                "faults: replacements are drawn by whoever reads",
                "fastclip/data/loading/batches.py",
                old="yield mix(seed, 2) % len(self._watch.source), seed",
                new="yield random.SystemRandom().randrange(len(self._watch.source)), seed",
            ),
            Break(
                "faults: no other sample is tried",
                "fastclip/data/loading/batches.py",
                old="_TRIES = 100",
                new="_TRIES = 1",
            ),
        ],
    ),
    Promise(
        DATA,
        "A run counts the samples that it skipped by cause, and continues the counts after a resume",
        tests=[
            "training/test_faults.py::test_skipped_samples_are_counted_by_cause_and_shown",
            "training/test_faults.py::test_resumed_run_goes_on_counting",
        ],
        breaks=[
            Break(
                "faults: a resumed run counts from 0",
                "fastclip/training/run/loop.py",
                old='self.skipped.load(read_state(path, "skipped")["skipped"], path)',
                new="",
            ),
        ],
    ),
    Promise(
        DATA,
        "Training stops on all processes if more than --max-bad of the samples cannot be used",
        tests=[
            "training/test_faults.py::test_run_stops_when_too_many_samples_are_bad",
            "training/test_faults.py::test_share_is_exact_at_the_end_of_an_epoch_and_beyond_chance_before",
            "training/test_faults.py::test_all_ranks_count_together_and_stop_together",
            "training/test_faults.py::test_command_stops_with_a_line_that_names_files",
        ],
        breaks=[
            Break(
                "faults: chance stops a run",
                "fastclip/training/run/skipped.py",
                old="expected + 4 * math.sqrt(expected) + 4)",
                new="expected)",
            ),
            Break(
                "faults: a rank counts its own",
                "fastclip/training/run/skipped.py",
                old="for of_rank in everyone for fault in of_rank",
                new="for of_rank in everyone[:1] for fault in of_rank",
            ),
            Break(
                "faults: only chance is looked at",
                "fastclip/training/run/skipped.py",
                old="return bad > at_the_end or (max_bad",
                new="return bool(at_the_end) and (max_bad",
            ),
        ],
    ),
]

"""The files of a sample: folders, links, names in other forms, columns, files beside each other."""

from __future__ import annotations

from broken import DATA, SAFETY, Break, Promise

PROMISES = [
    Promise(
        DATA,
        "A caption file is found in any Unicode form of its name; if a .txt is empty, the .json with its name is used",
        tests=[
            "data/test_files.py::test_caption_file_is_found_by_its_name",
            "data/test_files.py::test_caption_file_of_the_very_name_goes_first",
            "data/test_files.py::test_json_makes_up_for_an_empty_text",
        ],
        breaks=[
            Break(
                "names: of one form only",
                "fastclip/data/sources/folder.py",
                old='stem if stem.isascii() else unicodedata.normalize("NFC", stem)',
                new="stem",
            ),
            Break(
                "names: another picture's captions",
                "fastclip/data/sources/folder.py",
                old="stem + end if stem + end in names else beside",
                new="beside",
            ),
            Break(
                "captions: an empty .txt is the last word",
                "fastclip/data/sources/captions.py",
                old="if bad.fault.cause not in _UNTOLD:",
                new="if True:",
            ),
        ],
    ),
    Promise(
        DATA,
        "Hidden files and folders are left out; links to folders, other files and pipes are counted, and "
        "none blocks reading",
        tests=[
            "data/test_files.py::test_walk_leaves_out_what_is_hidden_and_names_links",
            "data/test_files.py::test_pipes_and_devices_are_refused",
            "data/test_files.py::test_folder_says_what_it_passes_over",
        ],
        breaks=[
            Break(
                "walk: hidden pictures count",
                "fastclip/data/files.py",
                old="if is_hidden(name):",
                new='if name == b".git":',
            ),
            Break(
                "walk: links are passed over without a word",
                "fastclip/data/files.py",
                old="linked.append(entry.path)",
                new="pass",
            ),
            Break(
                "files: a device is a picture",
                "fastclip/data/files.py",
                old="if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):",
                new="if stat.S_ISFIFO(os.fstat(opened.fileno()).st_mode):",
            ),
            Break(
                "folder: other files are not told",
                "fastclip/data/sources/folder.py",
                old="if passed.total:",
                new="if False:",
            ),
        ],
    ),
    Promise(
        SAFETY,
        "A false size in a tar file neither fills the memory nor causes an endless loop, and the message names "
        "the shard",
        tests=[
            "data/test_tars.py::test_declared_sizes_are_not_believed",
            "data/test_tars.py::test_any_bytes_come_to_an_end",
        ],
        breaks=[
            Break(
                "tar: a size below 0",
                "fastclip/data/shards/tar_index.py",
                old='raise _Broken(f"the header of {_name(header)} declares an impossible size of {size}")',
                new="return BLOCK",
            ),
            Break(
                "tar: headers of any size",
                "fastclip/data/shards/tar_index.py",
                old="if not 0 <= size <= _LARGEST:",
                new="if size < 0:",
            ),
            Break(
                "tar: a record's size is a number",
                "fastclip/data/shards/tar_index.py",
                old="if not value.isdigit() or len(value) > 20:",
                new="if False:",
            ),
        ],
    ),
    Promise(
        DATA,
        "Every member of a shard belongs to a sample or is counted; links and concatenated tar files are read",
        tests=[
            "data/test_tars.py::test_members_of_no_sample_are_counted",
            "data/test_tars.py::test_members_without_data_are_counted",
            "data/test_tars.py::test_links_in_a_shard_are_followed",
            "data/test_tars.py::test_tars_put_together_are_read_to_the_end",
        ],
        breaks=[
            Break(
                "tar: what follows the end is not read",
                "fastclip/data/shards/tar_index.py",
                old="place, ended = self._beyond_zeros(place), True",
                new="break",
            ),
            Break(
                "tar: links are no members",
                "fastclip/data/shards/tar_index.py",
                old="self._members[turn] = end._replace(name=name)",
                new="pass",
            ),
            Break(
                "members: hidden ones are not counted",
                "fastclip/data/shards/samples.py",
                old='passed.count("hidden" if hidden else "without a suffix", member.name)',
                new="pass",
            ),
            Break(
                "members: an index forgets them",
                "fastclip/data/shards/index.py",
                old='Tally.of(about["passed"], about["first"])',
                new="Tally()",
            ),
            Break(
                "members: a picture of another name is no fault",
                "fastclip/data/shards/samples.py",
                old="return Sample(key, UNSEEN) if compound and any(captions) else None",
                new="return None",
            ),
        ],
    ),
    Promise(
        DATA,
        "In shards, a sample without a caption in its text file or its JSON takes the caption of its class",
        tests=[
            "data/test_classes.py::test_shards_whose_json_has_no_caption_have_their_classes",
            "data/test_tars.py::test_text_that_is_empty_gives_way",
        ],
        breaks=[
            Break(
                "members: JSON is the last word",
                "fastclip/data/shards/source.py",
                old="for kind in kinds])",
                new="for kind in kinds[:1]])",
            ),
        ],
    ),
    Promise(
        DATA,
        "Image paths start at the table's folder; if the working directory has another image at that path, the "
        "sample is bad",
        tests=[
            "data/test_tables.py::test_table_paths_are_relative_to_the_table",
            "data/test_tables.py::test_table_name_in_another_form_is_found",
        ],
        breaks=[
            Break(
                "table: the working directory goes first",
                "fastclip/data/sources/table.py",
                old="if beside is not None and here is not None and not _same(beside, here):",
                new="if False:",
            ),
            Break(
                "table: another folder is read without a word",
                "fastclip/data/sources/table.py",
                old="        self._say_where()\n\n",
                new="\n",
            ),
            Break(
                "table: names of one Unicode form",
                "fastclip/data/files.py",
                old="others += [unicodedata.normalize(form, name)",
                new="_ = [unicodedata.normalize(form, name)",
            ),
        ],
    ),
    Promise(
        DATA,
        "If several columns fit, the log names the chosen one; the same option names columns for every kind of data",
        tests=[
            "data/test_tables.py::test_table_says_which_of_several_columns_is_taken",
            "data/test_tables.py::test_column_that_is_not_there_is_named",
            "data/test_tables.py::test_field_of_json_is_named_as_a_column_is",
            "data/test_hub.py::test_hub_columns_are_told_and_named",
        ],
        breaks=[
            Break(
                "columns: what is taken is not said",
                "fastclip/data/sources/columns.py",
                old="if len(there) > 1:",
                new="if False:",
            ),
            Break(
                "columns: of two of a name the first",
                "fastclip/data/sources/columns.py",
                old="if lower.count(there[0]) > 1:",
                new="if False:",
            ),
            Break(
                "columns: a field of shards cannot be named",
                "fastclip/data/shards/source.py",
                old='self._field or "caption")',
                new='"caption")',
            ),
        ],
    ),
    Promise(
        DATA,
        "A damaged row of a table is one bad sample, named by its line; an unsupported kind of table is "
        "refused at once",
        tests=[
            "data/test_tables.py::test_rows_that_are_damaged_are_counted",
            "data/test_tables.py::test_lines_above_the_header_are_read",
            "data/test_tables.py::test_table_of_another_kind_is_named",
        ],
        breaks=[
            Break(
                "table: lines are counted from the header",
                "fastclip/data/sources/table.py",
                old="line = above + rows.line_num + 1",
                new="line = rows.line_num + 1",
            ),
            Break(
                "table: a compressed one is read",
                "fastclip/data/sources/table.py",
                old="if how := compression(head):",
                new='if how := compression(b""):',
            ),
        ],
    ),
    Promise(
        DATA,
        "`fastclip data pack` rewrites shards whose samples have changed, and refuses an output packed from "
        "another folder",
        tests=[
            "data/test_check.py::test_pack_again_holds_what_has_changed",
            "data/test_check.py::test_pack_from_another_folder_is_refused",
        ],
        breaks=[
            Break(
                "pack: any shard of this number is kept",
                "fastclip/data/pack.py",
                old="return stats if whole and same else None",
                new="return stats if whole else None",
            ),
            Break(
                "pack: captions are not part of the key",
                "fastclip/data/source.py",
                old="name, *captions, repr(fields)))",
                new="name))",
            ),
            Break(
                "pack: nor is a picture's size and time",
                "fastclip/data/files.py",
                old='return f"{state.st_size} bytes of {state.st_mtime_ns}"',
                new='return ""',
            ),
            Break(
                "pack: a SPEC means the same everywhere",
                "fastclip/data/pack.py",
                old='"source": absolute_spec(source.spec)',
                new='"source": source.spec',
            ),
        ],
    ),
    Promise(
        DATA,
        "`fastclip data check` reads every shard and file, and reports each unreadable one in one line",
        tests=[
            "data/test_check.py::test_check_reads_the_shards_beside_dead_ones",
            "data/test_check.py::test_check_reads_the_parts_beside_dead_ones",
            "data/test_check.py::test_check_goes_on_where_a_shard_goes_away",
        ],
        breaks=[
            Break(
                "check: the first dead shard is the last",
                "fastclip/data/faults.py",
                old="with noting(problems):",
                new="with noting(None):",
            ),
            Break(
                "check: damage is no reason to fail",
                "fastclip/cli/data.py",
                old="if problems:",
                new="if False:",
            ),
            Break(
                "check: a missing shard of a pattern is the last",
                "fastclip/data/shards/source.py",
                old="if missing and files and problems is not None:",
                new="if False:",
            ),
        ],
    ),
]

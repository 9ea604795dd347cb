"""Which files are a sample's: folders, links, names in other forms, columns, files beside each other."""

from __future__ import annotations

from broken import DATA, SAFETY, Break, Promise

PROMISES = [
    Promise(
        DATA,
        "A caption file is found whatever Unicode form its name has; an empty .txt gives way to the .json beside it",
        tests=[
            "data/test_files.py::test_caption_file_is_found_by_its_name",
            "data/test_files.py::test_caption_file_of_the_very_name_goes_first",
            "data/test_files.py::test_json_makes_up_for_an_empty_text",
        ],
        breaks=[
            Break(
                "names: of one form only",
                "fastclip/data/folder.py",
                old='stem if stem.isascii() else unicodedata.normalize("NFC", stem)',
                new="stem",
            ),
            Break(
                "names: another picture's captions",
                "fastclip/data/folder.py",
                old="stem + end if stem + end in names else beside",
                new="beside",
            ),
            Break(
                "captions: an empty .txt is the last word",
                "fastclip/data/captions.py",
                old="if bad.fault.cause not in _UNTOLD:",
                new="if True:",
            ),
        ],
    ),
    Promise(
        DATA,
        "Hidden files and folders are left out; links to folders, other files and pipes are counted, and nothing waits",
        tests=[
            "data/test_files.py::test_walk_leaves_out_what_is_hidden_and_names_links",
            "data/test_files.py::test_pipes_and_devices_are_refused",
            "data/test_files.py::test_folder_says_what_it_passes_over",
        ],
        breaks=[
            Break(
                "walk: hidden pictures count",
                "fastclip/data/files.py",
                old='if name.startswith(b"."):',
                new='if name == b".git":',
            ),
            Break(
                "walk: links are passed over without a word",
                "fastclip/data/files.py",
                old="links.append(entry.path)",
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
                "fastclip/data/folder.py",
                old="if passed.total:",
                new="if False:",
            ),
        ],
    ),
    Promise(
        SAFETY,
        "No size that a tar file declares is believed: reading goes forward, takes no more memory, and names the shard",
        tests=[
            "data/test_tars.py::test_declared_sizes_are_not_believed",
            "data/test_tars.py::test_any_bytes_come_to_an_end",
        ],
        breaks=[
            Break(
                "tar: a size below 0",
                "fastclip/data/tar_index.py",
                old='raise _Broken(f"{_name(header)} declares a size of {size}")',
                new="return BLOCK",
            ),
            Break(
                "tar: headers of any size",
                "fastclip/data/tar_index.py",
                old="if not 0 <= size <= _LARGEST:",
                new="if size < 0:",
            ),
            Break(
                "tar: a record's size is a number",
                "fastclip/data/tar_index.py",
                old="if not value.isdigit() or len(value) > 20:",
                new="if False:",
            ),
        ],
    ),
    Promise(
        DATA,
        "Every member of a shard is part of a sample or counted; links, and tars put together, are read",
        tests=[
            "data/test_tars.py::test_members_of_no_sample_are_counted",
            "data/test_tars.py::test_members_without_data_are_counted",
            "data/test_tars.py::test_links_in_a_shard_are_followed",
            "data/test_tars.py::test_tars_put_together_are_read_to_the_end",
        ],
        breaks=[
            Break(
                "tar: what follows the end is not read",
                "fastclip/data/tar_index.py",
                old="place, ended = self._beyond_zeros(place), True",
                new="break",
            ),
            Break(
                "tar: links are no members",
                "fastclip/data/tar_index.py",
                old="self._found[turn] = found._replace(name=name)",
                new="pass",
            ),
            Break(
                "members: hidden ones are not counted",
                "fastclip/data/shard_samples.py",
                old='passed.add([Fault("hidden" if hidden else "without a suffix", member.name, "")])',
                new="",
            ),
            Break(
                "members: an index forgets them",
                "fastclip/data/shard_index.py",
                old='passed.merge(about["passed"], about["first"])',
                new="",
            ),
            Break(
                "members: a picture of another name is no fault",
                "fastclip/data/shard_samples.py",
                old="return Sample(key, UNSEEN) if compound and any(told) else None",
                new="return None",
            ),
        ],
    ),
    Promise(
        DATA,
        "In shards a class tells the caption where neither a text nor JSON holds one",
        tests=[
            "data/test_classes.py::test_shards_whose_json_has_no_caption_have_their_classes",
            "data/test_tars.py::test_text_that_is_empty_gives_way",
        ],
        breaks=[
            Break(
                "members: JSON is the last word",
                "fastclip/data/shards.py",
                old="for kind in (first, *others)])",
                new="for kind in (first,)])",
            ),
        ],
    ),
]

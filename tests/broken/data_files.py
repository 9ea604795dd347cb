"""Which files are a sample's: folders, links, names in other forms, columns, files beside each other."""

from __future__ import annotations

from broken import DATA, Break, Promise

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
]

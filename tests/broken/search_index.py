"""The index of a folder of images."""

from __future__ import annotations

from broken import SEARCH, STOPS, Break, Promise

PROMISES = [
    Promise(
        SEARCH,
        "The index follows its folder: changed images are embedded again, renamed or touched ones are not",
        tests=[
            "search/test_index.py::test_index_follows_the_folder",
            "search/test_index.py::test_renamed_pictures_need_no_model",
            "search/test_index.py::test_unchanged_pictures_are_not_opened",
            "search/test_index.py::test_change_of_the_same_size_and_time_is_seen",
            "search/test_index.py::test_file_that_is_new_is_looked_at_again",
            "search/test_index.py::test_file_that_changes_while_it_is_read_is_left_for_the_next_time",
            "search/test_index.py::test_what_cannot_be_read_is_listed_and_not_tried_again",
            "search/test_index.py::test_what_another_reader_could_not_read_is_tried_again",
            "search/test_index.py::test_fault_of_the_disk_is_tried_again",
            "search/test_index.py::test_numbers_that_are_not_finite_are_never_found",
        ],
        breaks=[
            Break(
                "search: everything is embedded anew",
                "fastclip/search/scan.py",
                old="if seen.digest in known:",
                new="if False:",
            ),
            Break(
                "search: all files are opened each time",
                "fastclip/search/scan.py",
                old="if before.get(path) != stamp or stamp is None:",
                new="if True:",
            ),
            Break(
                "search: only size and time of writing count",
                "fastclip/search/scan.py",
                old="return state.st_size, state.st_mtime_ns, state.st_ctime_ns",
                new="return state.st_size, state.st_mtime_ns, 0",
            ),
            Break(
                "search: times of a new file are trusted",
                "fastclip/search/scan.py",
                old="< _SETTLED:",
                new="< 0:",
            ),
            Break(
                "search: deleted pictures are found",
                "fastclip/search/scan.py",
                old="index.remove(gone)",
                new="pass",
            ),
            Break(
                "search: NaN is the best of all",
                "fastclip/search/scan.py",
                old="elif np.isfinite(vector := next(vectors)).all():",
                new="elif (vector := next(vectors)) is not None:",
            ),
            Break(
                "search: faults of another reader stay",
                "fastclip/search/scan.py",
                old="index.forget_faults(_reader())",
                new="",
            ),
            Break(
                "search: faults of the disk are the picture's",
                "fastclip/search/scan.py",
                old="raise bad.__cause__ from bad",
                new="pass",
            ),
        ],
    ),
    Promise(
        STOPS,
        "If indexing is killed, the embedded images are kept; several processes can index at the same time",
        tests=[
            "search/test_processes.py::test_kill_leaves_an_index_that_goes_on",
            "search/test_processes.py::test_processes_that_index_at_once_agree",
            "search/test_processes.py::test_others_may_write_while_vectors_are_gone_through",
            "search/test_processes.py::test_interrupted_indexing_keeps_what_is_embedded",
            "search/test_index.py::test_folder_that_is_gone_empties_no_index",
        ],
        breaks=[
            Break(
                "search: one transaction for all",
                "fastclip/search/scan.py",
                old=">= batch_size or len(rows) >= _ROWS:",
                new=">= 10**9:",
            ),
            Break(
                "search: the other process's content is an error",
                "fastclip/search/index.py",
                old="INSERT OR IGNORE INTO contents",
                new="INSERT INTO contents",
            ),
            Break(
                "search: nobody may write while vectors are gone through",
                "fastclip/search/index.py",
                old="while rows := list(self._rows(query, (content, _AT_ONCE))):",
                new="for rows in ([row] for row in self._rows(query, (content, -1))):",
            ),
            Break(
                "search: a disk that is gone is empty",
                "fastclip/data/files.py",
                old="if here == folder:",
                new="if False:",
            ),
        ],
    ),
    Promise(
        SEARCH,
        "The index separates models and folders; excluded folders are neither read nor searched",
        tests=[
            "search/test_index.py::test_index_of_another_model_is_kept_apart",
            "search/test_index.py::test_folders_are_apart_and_share_what_is_known",
            "search/test_index.py::test_excluded_folders_are_neither_read_nor_found_nor_forgotten",
            "search/test_index.py::test_hidden_pictures_are_those_that_training_passes_over",
            "search/test_index.py::test_vector_of_another_kind_names_the_index",
            "search/test_index.py::test_vector_that_is_not_finite_names_the_index",
            "search/test_search.py::test_checkpoint_that_changed_is_another_model",
            "search/test_search.py::test_weights_behind_a_link_are_noticed",
            "search/test_search.py::test_default_precision_of_another_machine_is_refused",
        ],
        breaks=[
            Break(
                "search: one index for all models",
                "fastclip/search/engine.py",
                old='f"{model.identity}.sqlite3"',
                new='"all.sqlite3"',
            ),
            Break(
                "search: another's hidden pictures are forgotten",
                "fastclip/search/scan.py",
                old='rb"(?:\\." + names',
                new='rb"(?:\\n" + names',
            ),
            Break(
                "search: a vector of any length",
                "fastclip/search/index.py",
                old="if not isinstance(data, bytes) or not data or",
                new="if False and",
            ),
            Break(
                "search: a folder has its namesakes' pictures",
                "fastclip/search/index.py",
                old='start = folder.rstrip(b"/\\\\") + _SLASH',
                new="start = folder",
            ),
            Break(
                "search: excluded pictures are found",
                "fastclip/search/engine.py",
                old="for place, path in enumerate(pictures.paths) if not left_out(path)]",
                new="for place, path in enumerate(pictures.paths)]",
            ),
            Break(
                "search: a checkpoint is known by its name",
                "fastclip/search/model.py",
                old="(name, state.st_size, state.st_mtime_ns, state.st_ctime_ns)",
                new="(name,)",
            ),
            Break(
                "search: a linked folder is not looked into",
                "fastclip/search/model.py",
                old="followlinks=True",
                new="followlinks=False",
            ),
            Break(
                "search: the precision is not compared",
                "fastclip/search/model.py",
                old='memory["precision"] != loaded.precision',
                new="False",
            ),
        ],
    ),
]

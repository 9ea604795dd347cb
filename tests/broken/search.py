"""Search of pictures."""

from __future__ import annotations

from broken import Break, Promise

QUERY, INDEX, SEARCH = "search/test_query.py", "search/test_index.py", "search/test_search.py"
PROCESSES = "search/test_processes.py"
SERVE = "search/test_serve.py"
FOLDER = "fastclip/search/"

# fmt: off
PROMISES: dict[str, list[Promise]] = {
    "Search": [
        Promise(
            "results are those of a brute-force computation, the highest first, equal ones by path; above a million pictures they are approximate, and how far is said",
            (f"{SEARCH}::test_results_are_those_of_brute_force", f"{SEARCH}::test_equal_scores_are_ordered_by_path", f"{SEARCH}::test_query_over_100_000_answers_in_50_ms", f"{SEARCH}::test_many_pictures_are_searched_through_a_graph_whose_recall_is_told", f"{SEARCH}::test_graph_is_kept_grows_and_is_made_anew_where_it_is_damaged"),
            (
                Break("search: equal scores in any order", f"{FOLDER}rank.py", "places = np.flatnonzero(scores >= least)", "places = np.argpartition(-scores, count)[:count]"),
                Break("search: the query's pictures are found", f"{FOLDER}engine.py", "if one.path not in asked][:count]", "][:count]"),
                Break("search: other folders' candidates fill the results", f"{FOLDER}engine.py", "if len(ids) >= count or", "if True or"),
                Break("search: a graph of before is trusted as it is", f"{FOLDER}approximate.py", 'len(found) == int(told["size"])', "True"),
                Break("search: the graph does not grow", f"{FOLDER}approximate.py", "self._grow(Graph, last)", "(self._grow(Graph, last) if not last else None)"),
            ),
        ),
        Promise(
            "a query's score is the weighted sum of its terms' cosines, as rclip's; operators stand alone",
            (f"{QUERY}::test_score_is_the_weighted_sum_of_cosines", f"{QUERY}::test_query_has_its_terms", f"{QUERY}::test_pictures_are_told_from_texts", f"{QUERY}::test_query_that_cannot_be_meant_is_refused"),
            (
                Break("search: what is subtracted is added", f"{FOLDER}query.py", '(1 if sign == "+" else -1, text)', "(1, text)"),
                Break("search: the sum is scaled to length 1", f"{FOLDER}query.py", "        return np.sum(terms, axis=0).astype(np.float32)", "        total = np.sum(terms, axis=0)\n        return (total / np.linalg.norm(total)).astype(np.float32)"),
                Break("search: hyphens subtract", f"{FOLDER}query.py", r'r"(?<!\S)([+-])(?!\S)"', 'r"([+-])"'),
                Break("search: a file's name is a mixture", f"{FOLDER}query.py", "[(1, query)] if _is_file(query) else", "[(1, query)] if False else"),
            ),
        ),
        Promise(
            "the index follows the folder: what was renamed, copied or touched is not embedded again, what changed is, however its times are set",
            (f"{INDEX}::test_index_follows_the_folder", f"{INDEX}::test_renamed_pictures_need_no_model", f"{INDEX}::test_unchanged_pictures_are_not_opened", f"{INDEX}::test_change_of_the_same_size_and_time_is_seen", f"{INDEX}::test_file_that_is_new_is_looked_at_again", f"{INDEX}::test_file_that_changes_while_it_is_read_is_left_for_the_next_time", f"{INDEX}::test_what_cannot_be_read_is_listed_and_not_tried_again", f"{INDEX}::test_what_another_reader_could_not_read_is_tried_again", f"{INDEX}::test_fault_of_the_disk_is_tried_again", f"{INDEX}::test_numbers_that_are_not_finite_are_never_found"),
            (
                Break("search: everything is embedded anew", f"{FOLDER}scan.py", "    if seen.digest in known:\n        return", "    if False:\n        return"),
                Break("search: all files are opened each time", f"{FOLDER}scan.py", "if before.get(path) != stamp or stamp is None:", "if True:"),
                Break("search: only size and time of writing count", f"{FOLDER}scan.py", "return state.st_size, state.st_mtime_ns, state.st_ctime_ns", "return state.st_size, state.st_mtime_ns, 0"),
                Break("search: times of a new file are trusted", f"{FOLDER}scan.py", "< _SETTLED:", "< 0:"),
                Break("search: deleted pictures are found", f"{FOLDER}scan.py", "        index.remove(gone)\n", "        pass\n"),
                Break("search: NaN is the best of all", f"{FOLDER}scan.py", "elif np.isfinite(vector := next(vectors)).all():", "elif (vector := next(vectors)) is not None:"),
                Break("search: faults of another reader stay", f"{FOLDER}scan.py", "    index.forget_faults(_reader())\n", ""),
                Break("search: faults of the disk are the picture's", f"{FOLDER}scan.py", "            raise bad.__cause__ from bad\n", "            pass\n"),
            ),
        ),
        Promise(
            "indexing can be killed at any moment and by any means: what is embedded is kept, the next run goes on; processes may index at once",
            (f"{PROCESSES}::test_kill_leaves_an_index_that_goes_on", f"{PROCESSES}::test_processes_that_index_at_once_agree", f"{PROCESSES}::test_others_may_write_while_vectors_are_gone_through", f"{PROCESSES}::test_interrupted_indexing_keeps_what_is_embedded", f"{INDEX}::test_folder_that_is_gone_empties_no_index"),
            (
                Break("search: one transaction for all", f"{FOLDER}scan.py", ">= batch_size or len(rows) >= _ROWS:", ">= 10**9:"),
                Break("search: the other process's content is an error", f"{FOLDER}index.py", "INSERT OR IGNORE INTO contents", "INSERT INTO contents"),
                Break("search: nobody may write while vectors are gone through", f"{FOLDER}index.py", "while rows := list(self._rows(query, (content, _AT_ONCE))):", "for rows in [self._rows(query, (content, -1))]:"),
                Break("search: a disk that is gone is empty", f"{FOLDER}scan.py", "            if here == folder:\n                raise\n", ""),
            ),
        ),
        Promise(
            "models and folders are kept apart; folders that are left out are neither read nor found",
            (f"{INDEX}::test_index_of_another_model_is_kept_apart", f"{INDEX}::test_folders_are_apart_and_share_what_is_known", f"{INDEX}::test_excluded_folders_are_neither_read_nor_found_nor_forgotten", f"{SEARCH}::test_checkpoint_that_changed_is_another_model", f"{SEARCH}::test_weights_behind_a_link_are_noticed", f"{SEARCH}::test_default_precision_of_another_machine_is_refused"),
            (
                Break("search: one index for all models", f"{FOLDER}engine.py", 'f"{model.identity}.sqlite3"', '"all.sqlite3"'),
                Break("search: a folder has its namesakes' pictures", f"{FOLDER}index.py", 'start = folder.rstrip(b"/\\\\") + _SLASH', "start = folder"),
                Break("search: excluded pictures are found", f"{FOLDER}engine.py", "for place, path in enumerate(found.paths) if not left_out(path)]", "for place, path in enumerate(found.paths)]"),
                Break("search: a checkpoint is known by its name", f"{FOLDER}model.py", "(name, state.st_size, state.st_mtime_ns, state.st_ctime_ns)", "(name,)"),
                Break("search: a linked folder is not looked into", f"{FOLDER}model.py", "followlinks=True", "followlinks=False"),
                Break("search: the precision is not compared", f"{FOLDER}model.py", 'told["precision"] != loaded.precision', "False"),
            ),
        ),
        Promise(
            "the page is served to this machine and to itself alone, and nothing but the pictures of its folder; a browser finds by text, click and drop what the engine finds",
            (f"{SERVE}::test_pages_of_the_web_are_refused", f"{SERVE}::test_nothing_outside_the_folder_is_served", f"{SERVE}::test_picture_that_a_link_outside_equals_is_served", f"{SERVE}::test_port_of_http_may_be_left_out", f"{SERVE}::test_upload_that_stalls_is_dropped", f"{SERVE}::test_what_is_not_there_is_not_served", f"{SERVE}::test_only_the_loopback_address_is_bound", f"{SERVE}::test_dropped_picture_that_cannot_be_used_is_refused", f"{SERVE}::test_results_are_those_of_the_engine", f"{SERVE}::test_page_searches_by_text_by_click_and_by_drop"),
            (
                Break("served: every host is this one", f"{FOLDER}serve.py", 'if self.headers.get("Host") not in hosts:', "if False:"),
                Break("served: a picture that a link outside equals is not", f"{FOLDER}serve.py", "next((path for path in paths if", "next((path for path in paths[:1] if"),
                Break("served: the port of http must be said", f"{FOLDER}serve.py", "(names if port == 80 else set())", "set()"),
                Break("served: an upload that stalls is a bug", f"{FOLDER}serve.py", "_GONE = (ConnectionError, TimeoutError)", "_GONE = (ConnectionError,)"),
                Break("served: every page may ask", f"{FOLDER}serve.py", 'if site not in ("none", "same-origin") or origin', "if origin"),
                Break("served: to the whole network", f"{FOLDER}serve.py", '_LOOPBACK = "127.0.0.1"', '_LOOPBACK = "0.0.0.0"'),
                Break("served: links lead outside", f"{FOLDER}serve.py", "if os.path.realpath(path).startswith(folder)), None)", "if path), None)"),
                Break("served: a text names a file", f"{FOLDER}serve.py", "import Term, parse_texts\n", "import Term, parse_query as parse_texts\n"),
                Break("served: a dropped picture of any length", f"{FOLDER}serve.py", "if int(length) > _UPLOAD:", "if False:"),
                Break("served: the page does not take what is dropped", f"{FOLDER}page.html", "ondrop =", "ondropped ="),
            ),
        ),
        Promise("what is known needs no model: neither torch nor the weights are loaded", (f"{SEARCH}::test_what_is_known_needs_no_model_and_no_torch",), (Break("search: texts are forgotten", f"{FOLDER}engine.py", "            self._index.keep_text(text, vector)\n", ""),)),
    ],
}
# fmt: on

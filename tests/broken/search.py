"""Image search, by the command and on its page."""

from __future__ import annotations

from broken import COST, SAFETY, SEARCH, Break, Promise

PROMISES = [
    Promise(
        SEARCH,
        "Search returns the results of a brute-force computation, the highest score first, equal scores "
        "ordered by path",
        tests=[
            "search/test_search.py::test_results_are_those_of_brute_force",
            "search/test_search.py::test_equal_scores_are_ordered_by_path",
            "search/test_search.py::test_query_over_100_000_answers_in_50_ms",
        ],
        breaks=[
            Break(
                "search: equal scores in any order",
                "fastclip/search/rank.py",
                old="places = np.flatnonzero(scores >= least)",
                new="places = np.argpartition(-scores, count)[:count]",
            ),
            Break(
                "search: the query's pictures are found",
                "fastclip/search/engine.py",
                old="if match.path not in asked][:count]",
                new="][:count]",
            ),
        ],
    ),
    Promise(
        SEARCH,
        "Search among more than a million images is approximate, and reports its recall",
        tests=[
            "search/test_search.py::test_many_pictures_are_searched_through_a_graph_whose_recall_is_told",
            "search/test_search.py::test_graph_is_kept_grows_and_is_made_anew_where_it_is_damaged",
        ],
        breaks=[
            Break(
                "search: other folders' candidates fill the results",
                "fastclip/search/engine.py",
                old="if len(ids) >= count or",
                new="if True or",
            ),
            Break(
                "search: a graph of before is trusted as it is",
                "fastclip/search/approximate.py",
                old='len(whole) == int(about["size"])',
                new="True",
            ),
            Break(
                "search: the graph of another index is trusted",
                "fastclip/search/approximate.py",
                old='and about["index"] == self._contents(last):',
                new="and about:",
            ),
            Break(
                "search: the graph does not grow",
                "fastclip/search/approximate.py",
                old="self._grow(Graph, last)",
                new="(self._grow(Graph, last) if not last else None)",
            ),
        ],
    ),
    Promise(
        SEARCH,
        "The score of a query is the weighted sum of the cosines of its terms, as in rclip",
        tests=[
            "embedding/test_query.py::test_score_is_the_weighted_sum_of_cosines",
            "embedding/test_query.py::test_query_has_its_terms",
            "embedding/test_query.py::test_pictures_are_told_from_texts",
            "embedding/test_query.py::test_query_that_cannot_be_meant_is_refused",
        ],
        breaks=[
            Break(
                "search: what is subtracted is added",
                "fastclip/embedding/query.py",
                old='(-1 if operator == "-" else 1, text)',
                new="(1, text)",
            ),
            Break(
                "search: the sum is scaled to length 1",
                "fastclip/embedding/query.py",
                old="return total.astype(np.float32)",
                new="return (total / np.linalg.norm(total)).astype(np.float32)",
            ),
            Break(
                "search: hyphens subtract",
                "fastclip/embedding/query.py",
                old='rf\'(?<!\\S)(?:(?P<operator>[+-]|=>)|(?:{_NUMBER}:)?"[^"]*")(?!\\S)\'',
                new='r"(?P<operator>[+-])"',
            ),
            Break(
                "search: a file's name is a mixture",
                "fastclip/embedding/query.py",
                old="[_term(1, query, query)] if is_file else",
                new="[_term(1, query, query)] if False else",
            ),
        ],
    ),
    Promise(
        SEARCH,
        "A query without a meaning is refused; if a query can be read in two ways, the reading used is printed",
        tests=[
            "embedding/test_query.py::test_terms_that_cancel_are_refused",
            "embedding/test_query.py::test_weight_that_is_not_finite_is_refused",
            "embedding/test_query.py::test_sum_that_float32_does_not_hold_is_refused",
            "embedding/test_query.py::test_query_that_can_be_read_in_two_ways_is_told",
            "embedding/test_query.py::test_what_a_file_holds_decides_where_its_name_does_not",
            "embedding/test_query.py::test_query_has_its_terms",
            "embedding/test_query.py::test_query_that_cannot_be_meant_is_refused",
        ],
        breaks=[
            Break(
                "search: terms that cancel are searched for",
                "fastclip/embedding/query.py",
                old="if length <= sum(_CANCELLED * abs(weight) for weight in weights):",
                new="if False:",
            ),
            Break(
                "search: a weight that float32 does not hold is searched with",
                "fastclip/embedding/query.py",
                old="if not _MIN_LENGTH <= length <= _MAX_LENGTH:",
                new="if False:",
            ),
            Break(
                "search: a ratio is a weight",
                "fastclip/embedding/query.py",
                old="if match is None or (match[2][0].isdigit() and not _is_path(match[2])):",
                new="if match is None:",
            ),
            Break(
                "search: a quote that is not closed is a letter",
                "fastclip/embedding/query.py",
                old="if quoted is None and text.startswith('\"'):",
                new="if False:",
            ),
            Break(
                "search: the picture of an odd suffix is a text",
                "fastclip/embedding/query.py",
                old="(_is_path(text) or _holds_picture(path)) else None",
                new="_is_path(text) else None",
            ),
        ],
    ),
    Promise(
        SEARCH,
        "File names cannot send control characters to a terminal, and are passed unchanged to other programs",
        tests=[
            "search/test_command.py::test_names_are_quoted_on_a_terminal",
            "search/test_command.py::test_names_are_given_to_programs_as_they_are",
        ],
        breaks=[
            Break(
                "search: a terminal is given any name",
                "fastclip/data/faults.py",
                old="    if text.isprintable():\n        return text",
                new="    if True:\n        return text",
            ),
        ],
    ),
    Promise(
        SAFETY,
        "The search page can be opened only on this machine, and other web pages cannot use it",
        tests=[
            "search/test_serve.py::test_only_the_loopback_address_is_bound",
            "search/test_serve.py::test_pages_of_the_web_are_refused",
            "search/test_serve.py::test_port_of_http_may_be_left_out",
        ],
        breaks=[
            Break(
                "served: every host is this one",
                "fastclip/search/serve.py",
                old='if self.headers.get("Host") not in hosts:',
                new="if False:",
            ),
            Break(
                "served: the port of http must be said",
                "fastclip/search/serve.py",
                old="(names if port == 80 else set())",
                new="set()",
            ),
            Break(
                "served: every page may ask",
                "fastclip/search/serve.py",
                old='if site not in ("none", "same-origin") or origin',
                new="if origin",
            ),
            Break(
                "served: to the whole network",
                "fastclip/search/serve.py",
                old='_LOOPBACK = "127.0.0.1"',
                new='_LOOPBACK = "0.0.0.0"',
            ),
        ],
    ),
    Promise(
        SAFETY,
        "The search page serves the images of its folder and no other file",
        tests=[
            "search/test_serve.py::test_nothing_outside_the_folder_is_served",
            "search/test_serve.py::test_picture_that_a_link_outside_equals_is_served",
            "search/test_serve.py::test_what_is_not_there_is_not_served",
            "search/test_serve.py::test_results_are_those_of_the_engine",
        ],
        breaks=[
            Break(
                "served: a picture that a link outside equals is not",
                "fastclip/search/serve.py",
                old="next((path for path in paths if",
                new="next((path for path in paths[:1] if",
            ),
            Break(
                "served: links lead outside",
                "fastclip/search/serve.py",
                old="if os.path.realpath(path).startswith(folder)), None)",
                new="if path), None)",
            ),
            Break(
                "served: a text names a file",
                "fastclip/search/serve.py",
                old="import Term, parse_texts, reading",
                new="import Term, parse_query as parse_texts, reading",
            ),
        ],
    ),
    Promise(
        SAFETY,
        "An upload to the search page that stalls, is too large or is not an image is refused",
        tests=[
            "search/test_serve.py::test_dropped_picture_that_cannot_be_used_is_refused",
            "search/test_serve.py::test_upload_that_stalls_is_dropped",
        ],
        breaks=[
            Break(
                "served: an upload that stalls is a bug",
                "fastclip/search/serve.py",
                old="_GONE = (ConnectionError, TimeoutError)",
                new="_GONE = (ConnectionError,)",
            ),
            Break(
                "served: a dropped picture of any length",
                "fastclip/search/serve.py",
                old="if int(length) > _UPLOAD:",
                new="if False:",
            ),
        ],
    ),
    Promise(
        SEARCH,
        "The search page finds the same images as the command, by text, by click and by dropped image",
        tests=[
            "search/test_serve.py::test_page_searches_by_text_by_click_and_by_drop",
        ],
        breaks=[
            Break(
                "served: the page does not take what is dropped",
                "fastclip/search/page.html",
                old="ondrop =",
                new="ondropped =",
            ),
        ],
    ),
    Promise(
        COST,
        "A query that was made before needs neither torch nor the weights",
        tests=[
            "search/test_search.py::test_what_is_known_needs_no_model_and_no_torch",
        ],
        breaks=[
            Break(
                "search: texts are forgotten",
                "fastclip/search/engine.py",
                old="self._index.keep_text(text, vector)",
                new="",
            ),
        ],
    ),
]

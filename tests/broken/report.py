"""The HTML report of a run."""

from __future__ import annotations

from broken import EVALUATION, SAFETY, STOPS, Break, Promise

PROMISES = [
    Promise(
        EVALUATION,
        "The report shows the numbers of the run's last validation, and a confusion matrix that agrees with them",
        tests=[
            "report/test_report.py::test_numbers_are_those_of_the_last_validation",
            "report/test_report.py::test_most_confused_are_those_of_loops",
        ],
        breaks=[
            Break(
                "report: rows are predictions",
                "fastclip/report/examples.py",
                old="confusion(labels, predictions, len(classes))",
                new="confusion(predictions, labels, len(classes))",
            ),
            Break(
                "report: classes and what they are taken for change places",
                "fastclip/evaluation/classification.py",
                old="torch.stack([labels, predictions], dim=1)",
                new="torch.stack([predictions, labels], dim=1)",
            ),
        ],
    ),
    Promise(
        EVALUATION,
        "The best and worst retrievals in the report are those with the best and worst ranks",
        tests=[
            "report/test_report.py::test_best_and_worst_are_those_of_loops",
        ],
        breaks=[
            Break(
                "report: the best are called the worst",
                "fastclip/report/examples.py",
                old="order[shown:][-shown:][::-1]",
                new="order[shown:][:shown]",
            ),
            Break(
                "report: what is right is left out behind the fifth",
                "fastclip/report/examples.py",
                old="if not any(hit.right for hit in hits):",
                new="if False:",
            ),
            Break(
                "report: the first pair in place of the best",
                "fastclip/report/examples.py",
                old='cosines, "amax")',
                new='cosines, "amin")',
            ),
        ],
    ),
    Promise(
        SAFETY,
        "The report is one file that loads nothing else, and shows text from the data as plain text",
        tests=[
            "report/test_report.py::test_text_of_data_is_no_markup",
            "report/test_report.py::test_page_needs_nothing_else",
            "report/test_report.py::test_page_has_every_section_and_is_well_formed",
            "report/test_report.py::test_browser_loads_nothing_and_nothing_sticks_out",
        ],
        breaks=[
            Break(
                "report: nothing is escaped",
                "fastclip/report/page.py",
                old="autoescape=True",
                new="autoescape=False",
            ),
            Break(
                "report: a style sheet from elsewhere",
                "fastclip/report/page/report.html",
                old='<link rel="icon" href="data:,">',
                new='<link rel="stylesheet" href="style.css">',
            ),
            Break(
                "report: a tag stays open",
                "fastclip/report/page/report.html",
                old="<footer>fastclip {{ version }}",
                new="<footer><b>fastclip {{ version }}",
            ),
        ],
    ),
    Promise(
        STOPS,
        "The report of a killed run shows everything the run has written, with gaps for missing numbers",
        tests=[
            "report/test_report.py::test_run_that_has_not_ended_has_its_curves",
            "report/test_report.py::test_data_that_are_not_there",
            "report/test_charts.py::test_gap_where_there_is_no_number",
        ],
        breaks=[
            Break(
                "report: half a line ends it",
                "fastclip/report/run.py",
                old="except (ValueError, TypeError, KeyError, OverflowError):",
                new="except KeyError:",
            ),
            Break(
                "report: a gap is drawn over",
                "fastclip/report/charts.py",
                old="stretches = np.ma.clump_unmasked(np.ma.masked_invalid(points.means))",
                new="stretches = [slice(0, len(points.means))]",
            ),
            Break(
                "report: a data set asked for may be missing",
                "fastclip/report/page.py",
                old="if data is not None:",
                new="if False:",
            ),
        ],
    ),
    Promise(
        STOPS,
        "An interrupted report resumes, and leaves no temporary files",
        tests=[
            "report/test_report.py::test_report_goes_on_where_it_was_stopped",
            "report/test_report.py::test_what_is_embedded_is_kept_until_the_page_is_written",
        ],
        breaks=[
            Break(
                "report: what is embedded is removed before the page is written",
                "fastclip/report/page.py",
                old="    write_bytes(path, render(context)",
                new="    [store.clear() for store in stores]; write_bytes(path, render(context)",
            ),
            Break(
                "report: what is embedded stays",
                "fastclip/report/page.py",
                old="store.clear()",
                new="pass",
            ),
        ],
    ),
    Promise(
        EVALUATION,
        "Results that would fill the same cell of the report have separate columns, which state alpha if there is one",
        tests=[
            "report/test_report.py::test_results_that_differ_in_alpha_or_nothing_have_a_column_each",
        ],
        breaks=[
            Break(
                "report: columns without alpha",
                "fastclip/report/view.py",
                old='if "alpha" in result else ""',
                new='if False else ""',
            ),
            Break(
                "report: the last result takes the place of others",
                "fastclip/report/view.py",
                old="while any(column in rows.get(row, ()) for row in values):",
                new="while False:",
            ),
        ],
    ),
    Promise(
        EVALUATION,
        "Long curves show the range of all values; a large dataset is sampled evenly, which the page states",
        tests=[
            "report/test_charts.py::test_long_curves_keep_their_extremes",
            "report/test_charts.py::test_points_lie_where_the_ticks_say",
            "report/test_report.py::test_large_data_are_sampled_evenly_and_the_page_says_so",
        ],
        breaks=[
            Break(
                "report: extremes are lost",
                "fastclip/report/charts.py",
                old="(known.mean(), known.min(), known.max())",
                new="(known.mean(), known.mean(), known.max())",
            ),
            Break(
                "report: the first samples only",
                "fastclip/data/sources/subset.py",
                old="[*spread(len(source), most)]",
                new="list(range(most))",
            ),
        ],
    ),
]

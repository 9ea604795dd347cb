"""The HTML report of a run."""

from __future__ import annotations

from broken import Break, Promise

REPORT, TESTS, CHARTS = "fastclip/evaluation/report/", "evaluation/test_report.py", "evaluation/test_report_charts.py"

# fmt: off
PROMISES: dict[str, list[Promise]] = {
    "Report": [
        Promise(
            "the report's numbers are those of the run's last validation; the confusion matrix says what the accuracy says, ties included",
            (f"{TESTS}::test_numbers_are_those_of_the_last_validation", f"{TESTS}::test_most_confused_are_those_of_loops"),
            (
                Break("report: rows are predictions", f"{REPORT}examples.py", "confusion(labels, predictions, len(classes))", "confusion(predictions, labels, len(classes))"),
                Break("report: classes and what they are taken for change places", f"{REPORT}examples.py", "torch.stack([labels, predictions], dim=1)", "torch.stack([predictions, labels], dim=1)"),
            ),
        ),
        Promise(
            "best and worst retrievals are those of the ranks, with what belongs to a query however far behind",
            (f"{TESTS}::test_best_and_worst_are_those_of_loops",),
            (
                Break("report: the best are called the worst", f"{REPORT}examples.py", "order[shown:][-shown:][::-1]", "order[shown:][:shown]"),
                Break("report: what is right is left out behind the fifth", f"{REPORT}examples.py", "if not any(hit.right for hit in hits):", "if False:"),
                Break("report: the first pair in place of the best", f"{REPORT}examples.py", 'cosines, "amax")', 'cosines, "amin")'),
            ),
        ),
        Promise(
            "the page is one file: it loads nothing, runs no script but its own, and text of data, file names and results is text",
            (f"{TESTS}::test_text_of_data_is_no_markup", f"{TESTS}::test_page_needs_nothing_else", f"{TESTS}::test_page_has_every_section_and_is_well_formed", f"{TESTS}::test_browser_loads_nothing_and_nothing_sticks_out"),
            (
                Break("report: nothing is escaped", f"{REPORT}page.py", "autoescape=True", "autoescape=False"),
                Break("report: a style sheet from elsewhere", f"{REPORT}page/report.html", '<link rel="icon" href="data:,">', '<link rel="stylesheet" href="style.css">'),
                Break("report: a tag stays open", f"{REPORT}page/report.html", "<footer>fastclip {{ version }}", "<footer><b>fastclip {{ version }}"),
            ),
        ),
        Promise(
            "a run that was killed has a report: half a line is counted, NaN is a gap; data that are not there are named",
            (f"{TESTS}::test_run_that_has_not_ended_has_its_curves", f"{TESTS}::test_data_that_are_not_there", f"{CHARTS}::test_gap_where_there_is_no_number"),
            (
                Break("report: half a line ends it", f"{REPORT}run.py", "except (ValueError, TypeError, AttributeError, KeyError, RecursionError):", "except KeyError:"),
                Break("report: a gap is drawn over", f"{REPORT}charts.py", "stretches = list(_stretches(np.isfinite(points.means)))", "stretches = [(0, len(points.means))]"),
                Break("report: a data set asked for may be missing", f"{REPORT}page.py", "    if data is not None:\n", "    if False:\n"),
            ),
        ),
        Promise(
            "what a report has embedded is kept until its page is written, and then removed",
            (f"{TESTS}::test_what_is_embedded_is_kept_until_the_page_is_written", f"{TESTS}::test_report_goes_on_where_it_was_stopped"),
            (
                Break("report: what is embedded is removed before the page is written", f"{REPORT}view.py", '    """Of the sections that need a model.\n', '    for store in found.stores:\n        store.clear()\n    """Of the sections that need a model.\n'),
                Break("report: what is embedded stays", f"{REPORT}page.py", "        store.clear()", "        pass"),
            ),
        ),
        Promise(
            "results that stand beside each other are all shown, those of one file that differ in alpha with it",
            (f"{TESTS}::test_results_that_differ_in_alpha_or_nothing_have_a_column_each",),
            (
                Break("report: columns without alpha", f"{REPORT}view.py", 'if "alpha" in one else ""', 'if False else ""'),
                Break("report: the last result takes the place of others", f"{REPORT}view.py", "while any(column in rows.get(row, ()) for row in values):", "while False:"),
            ),
        ),
        Promise(
            "long curves are drawn of means with the range of all values; large data are sampled evenly, which the page says",
            (f"{CHARTS}::test_long_curves_keep_their_extremes", f"{CHARTS}::test_points_lie_where_the_ticks_say", f"{TESTS}::test_large_data_are_sampled_evenly_and_the_page_says_so"),
            (
                Break("report: extremes are lost", f"{REPORT}charts.py", "(own.mean(), some.mean(), some.min(), some.max())", "(own.mean(), some.mean(), some.mean(), some.max())"),
                Break("report: the first samples only", f"{REPORT}page.py", "[i * size // max_samples for i in range(max_samples)]", "list(range(max_samples))"),
            ),
        ),
    ],
}
# fmt: on

"""What is said of a machine, and of the losses' speed on it."""

from __future__ import annotations

from broken import Break, Promise

DOCTOR, BENCH, REPORT = "package/test_doctor.py", "package/test_bench_command.py", "benchmarks/test_report.py"

# fmt: off
PROMISES: dict[str, list[Promise]] = {
    "Doctor, bench and report": [
        Promise(
            "`fastclip doctor` exits with 1 if a loss is wrong on any backend and dtype that runs, or cannot run at all",
            (f"{DOCTOR}::test_wrong_loss_is_seen", f"{DOCTOR}::test_every_backend_and_dtype_is_tested", f"{DOCTOR}::test_unknown_backend_is_a_fault", f"{DOCTOR}::test_doctor_needs_torch_alone"),
            (
                Break("doctor: failed comparisons do not count", "fastclip/doctor.py", "return all(row.ok for row in self.tests) and all(", "return all("),
                Break("doctor: faults do not count", "fastclip/doctor.py", 'finding.state != "fault" for', "True for"),
                Break("doctor: the sigmoid loss is not tested", "fastclip/parity/compare.py", '_ALONE = ("plain", "sigmoid")', '_ALONE = ("plain",)'),
            ),
        ),
        Promise(
            "`fastclip doctor` says what to do about misspelt variables, small containers, lacking extras, backends that were not built",
            (f"{DOCTOR}::test_variables_are_shown_and_misspelt_ones_found", f"{DOCTOR}::test_every_variable_that_is_read_is_known", f"{DOCTOR}::test_small_containers_are_warned_of", f"{DOCTOR}::test_limits_are_those_of_all_groups_around", f"{DOCTOR}::test_lacking_extras_are_named_with_the_line_that_brings_them", f"{DOCTOR}::test_dense_service_is_a_warning", f"{DOCTOR}::test_gpu_that_torch_does_not_see"),
            (
                Break("doctor: a misspelt variable passes", "fastclip/doctor.py", 'if name.startswith("FASTCLIP_") and name not in', 'if not name.startswith("FASTCLIP_") and name not in'),
                Break("doctor: a variable that is read is unknown", "fastclip/_env.py", 'OWN = ("FASTCLIP_BACKEND", "FASTCLIP_CACHE",', 'OWN = ("FASTCLIP_BACKEND",'),
                Break("doctor: small shared memory passes", "fastclip/doctor.py", "small = shared < _GIB", "small = False"),
                Break("doctor: only the innermost group limits memory", "fastclip/machine.py", "for folder in (inner, *inner.parents):", "for folder in (inner,):"),
                Break("doctor: an old package is not lacking", "fastclip/doctor.py", "numbers(have) < numbers(least[1])", "False"),
                Break("doctor: dense service is no warning", "fastclip/doctor.py", 'yield Finding("served by", name, dense, "warning"', 'yield Finding("served by", name, dense, ""'),
            ),
        ),
        Promise(
            "`fastclip bench` times no loss of ours whose value or gradients are wrong, and says who did not run and why",
            (f"{BENCH}::test_wrong_loss_is_not_timed", f"{BENCH}::test_dense_losses_that_do_not_fit_say_so", f"{BENCH}::test_nothing_but_the_reference_is_said", f"{BENCH}::test_figures_are_medians_of_interleaved_rounds", f"{BENCH}::test_rows_are_the_benchmarks"),
            (
                Break("bench: a wrong loss is a row", "fastclip/bench/run.py", '            if name.startswith("fastclip"):', '            if name.startswith("nobody"):'),
                Break("bench: dense losses always fit", "fastclip/bench/run.py", "case.dense_bytes > _available(device)", "case.dense_bytes < 0"),
                Break("bench: a mean in place of the median", "fastclip/bench/harness.py", "median = statistics.median(seconds)", "median = statistics.mean(seconds)"),
            ),
        ),
        Promise(
            "benchmarks/REPORT.md is made of the rows alone; of several rows of a case the last counts; every row names its run",
            (f"{REPORT}::test_report_is_that_of_the_rows", f"{REPORT}::test_last_row_of_a_case_counts", f"{REPORT}::test_what_was_not_measured_is_said", f"{REPORT}::test_every_row_names_its_run"),
            (
                Break("report: edited by hand", "benchmarks/REPORT.md", "Made from the rows in", "Made by hand from the rows in"),
                Break("report: the first row of a case counts", "benchmarks/report.py", "for k, row in enumerate(found)}", "for k, row in reversed(list(enumerate(found)))}"),
                Break("report: a status is a dash", "benchmarks/plot.py", '(row or {}).get("status") or "-"', '"-"'),
            ),
        ),
    ],
}
# fmt: on

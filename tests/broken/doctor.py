"""`fastclip doctor`, `fastclip bench` and the benchmarks' report."""

from __future__ import annotations

from broken import DOCUMENTS, MACHINE, Break, Promise

PROMISES = [
    Promise(
        MACHINE,
        "`fastclip doctor` exits with 1 if a loss is wrong or fails on an available backend, with any of its dtypes",
        tests=[
            "package/test_doctor.py::test_wrong_loss_is_seen",
            "package/test_doctor.py::test_every_backend_and_dtype_is_tested",
            "package/test_doctor.py::test_unknown_backend_is_a_fault",
            "package/test_doctor.py::test_doctor_needs_torch_alone",
        ],
        breaks=[
            Break(
                "doctor: failed comparisons do not count",
                "fastclip/doctor.py",
                old="return all(row.ok for row in self.tests) and all(",
                new="return all(",
            ),
            Break(
                "doctor: faults do not count",
                "fastclip/doctor.py",
                old='finding.state != "fault" for',
                new="True for",
            ),
            Break(
                "doctor: the sigmoid loss is not tested",
                "fastclip/parity/compare.py",
                old='_ALONE = ("plain", "sigmoid")',
                new='_ALONE = ("plain",)',
            ),
        ],
    ),
    Promise(
        MACHINE,
        "`fastclip doctor` warns of misspelt variables, too little shared memory, missing extras and unbuilt backends",
        tests=[
            "package/test_doctor.py::test_variables_are_shown_and_misspelt_ones_found",
            "package/test_doctor.py::test_every_variable_that_is_read_is_known",
            "package/test_doctor.py::test_small_containers_are_warned_of",
            "package/test_doctor.py::test_limits_are_those_of_all_groups_around",
            "package/test_doctor.py::test_threads_sleep_where_they_outnumber_the_free_cores",
            "package/test_doctor.py::test_setting_of_the_user_stays",
            "package/test_doctor.py::test_threads_spin_briefly_where_cores_are_free",
            "package/test_doctor.py::test_commands_let_threads_sleep",
            "package/test_doctor.py::test_lacking_extras_are_named_with_the_line_that_brings_them",
            "package/test_doctor.py::test_dense_service_is_a_warning",
            "package/test_doctor.py::test_gpu_that_torch_does_not_see",
        ],
        breaks=[
            Break(
                "doctor: a misspelt variable passes",
                "fastclip/doctor.py",
                old='if name.startswith("FASTCLIP_") and name not in',
                new='if not name.startswith("FASTCLIP_") and name not in',
            ),
            Break(
                "doctor: a variable that is read is unknown",
                "fastclip/system/env.py",
                old='OWN = ("FASTCLIP_BACKEND", "FASTCLIP_CACHE",',
                new='OWN = ("FASTCLIP_BACKEND",',
            ),
            Break(
                "doctor: small shared memory passes",
                "fastclip/doctor.py",
                old="advice if shared < _GIB else",
                new="advice if False else",
            ),
            Break(
                "doctor: only the innermost group limits memory",
                "fastclip/system/cores.py",
                old="for folder in (inner, *inner.parents):",
                new="for folder in (inner,):",
            ),
            Break(
                "doctor: a busy machine is a quiet one",
                "fastclip/system/cores.py",
                old="* processes + others >=",
                new="* processes >=",
            ),
            Break(
                "doctor: a user's own policy of waiting is replaced",
                "fastclip/system/env.py",
                old="any(os.environ.get(name) for name in _SPINNING)",
                new="False",
            ),
            Break(
                "doctor: threads on free cores spin as long as the library likes",
                "fastclip/system/env.py",
                old="chosen = SLEEPING[0] if busy else SLEEPING[1]",
                new="chosen = SLEEPING[0] if busy else 'GOMP_SPINCOUNT=300000'",
            ),
            Break(
                "doctor: bench is timed with another policy of waiting than the user's own program",
                "fastclip/cli/__init__.py",
                old='if argv is None and args.command != "bench" else',
                new="if argv is None else",
            ),
            Break(
                "doctor: an old package is not lacking",
                "fastclip/doctor.py",
                old="elif not requirement.specifier.contains(installed, prereleases=True):",
                new="elif False:",
            ),
            Break(
                "doctor: dense service is no warning",
                "fastclip/doctor.py",
                old='yield _finding("served by", name, dense, "see',
                new='yield Finding("served by", name, dense, "", "see',
            ),
        ],
    ),
    Promise(
        MACHINE,
        "A loss that falls back to dense PyTorch because a module is missing reports it once, with reason and remedy",
        tests=[
            "backends/test_missing.py::test_dense_loss_for_lack_of_a_module_is_told_once",
            "backends/test_missing.py::test_dense_loss_that_was_asked_for_is_not_told",
            "backends/test_missing.py::test_python_in_the_root_of_a_clone_is_named",
            "backends/test_missing.py::test_doctor_has_the_same_words",
        ],
        breaks=[
            Break(
                "doctor: dense torch serves in silence",
                "fastclip/_backends/__init__.py",
                old="        _warn_of_reference(image)",
                new="        pass",
            ),
            Break(
                "doctor: every call in silence tells it",
                "fastclip/_backends/__init__.py",
                old="    _warned.add(device)",
                new="",
            ),
            Break(
                "doctor: a clone without modules in silence",
                "fastclip/_backends/native.py",
                old="if (clone := bare_clone()) is not None:",
                new="if (clone := None) is not None:",
            ),
        ],
    ),
    Promise(
        DOCUMENTS,
        "`fastclip bench` does not time a fastclip loss that is wrong, and reports what did not run and why",
        tests=[
            "package/test_bench_command.py::test_wrong_loss_is_not_timed",
            "package/test_bench_command.py::test_dense_losses_that_do_not_fit_say_so",
            "package/test_bench_command.py::test_nothing_but_the_reference_is_said",
            "package/test_bench_command.py::test_figures_are_medians_of_interleaved_rounds",
            "package/test_bench_command.py::test_rows_are_the_benchmarks",
        ],
        breaks=[
            Break(
                "bench: a wrong loss is a row",
                "fastclip/bench/run.py",
                old='if name.startswith("fastclip"):',
                new='if name.startswith("nobody"):',
            ),
            Break(
                "bench: dense losses always fit",
                "fastclip/bench/run.py",
                old="case.dense_bytes > _available(device)",
                new="case.dense_bytes < 0",
            ),
            Break(
                "bench: a mean in place of the median",
                "fastclip/bench/harness.py",
                old="median = statistics.median(seconds)",
                new="median = statistics.mean(seconds)",
            ),
        ],
    ),
    Promise(
        DOCUMENTS,
        "A GPU benchmark keeps measured rows if it is killed, stops at a wrong value, and bounds the time of "
        "every part",
        tests=[
            "benchmarks/test_gpu_ten.py::test_a_killed_run_keeps_its_rows",
            "benchmarks/test_gpu_ten.py::test_a_wrong_value_ends_the_run",
            "benchmarks/test_gpu_ten.py::test_limits_leave_later_parts_their_time",
            "benchmarks/test_gpu_ten.py::test_a_dry_run_says_what_a_gpu_says",
            "benchmarks/test_gpu_ten.py::test_dry_rows_are_no_results",
            "benchmarks/test_gpu_variants.py::test_a_folder_that_lacks_a_module_has_no_figures",
            "benchmarks/test_gpu_check.py::test_ncu_and_its_target_end_with_their_part",
        ],
        breaks=[
            Break(
                "rows are printed, not written",
                "benchmarks/gpu/log.py",
                old="        append(self.rows / NAME, [row], self.about)\n",
                new="",
            ),
            Break(
                "what is wrong is timed",
                "benchmarks/gpu_ten.py",
                old='if result == EXITS[f"failed with exit code {WRONG}"]:',
                new="if False:",
            ),
            Break(
                "a part may take the later ones' time",
                "benchmarks/gpu_ten.py",
                old="spare = left - sum(other.seconds for other in later)",
                new="spare = left",
            ),
            Break(
                "a build is timed that another folder fills in",
                "benchmarks/gpu/variants.py",
                old='return ", ".join(sorted(foreigners, key=lambda text: text.count(".")))',
                new='return ""',
            ),
            Break(
                "what a killed part has started goes on",
                "benchmarks/gpu/checklist.py",
                old="os.killpg(0, signal.SIGKILL)",
                new="os._exit(1)",
            ),
            Break(
                "a dry run has a GPU's name",
                "benchmarks/gpu/pretended.py",
                old='DRY_RUN = "dry run"',
                new='DRY_RUN = "NVIDIA H200"',
            ),
        ],
    ),
    Promise(
        DOCUMENTS,
        "benchmarks/REPORT.md is generated only from the stored rows, and every row names its run",
        tests=[
            "benchmarks/test_report.py::test_report_is_that_of_the_rows",
            "benchmarks/test_report.py::test_last_row_of_a_case_counts",
            "benchmarks/test_report.py::test_what_was_not_measured_is_said",
            "benchmarks/test_report.py::test_every_row_names_its_run",
        ],
        breaks=[
            Break(
                "report: edited by hand",
                "benchmarks/REPORT.md",
                old="Generated from the rows in",
                new="Written by hand from the rows in",
            ),
            Break(
                "report: the first row of a case counts",
                "benchmarks/report.py",
                old="for k, row in enumerate(rows)}",
                new="for k, row in reversed(list(enumerate(rows)))}",
            ),
            Break(
                "report: a status is a dash",
                "benchmarks/plot.py",
                old='(row or {}).get("status") or "-"',
                new='"-"',
            ),
        ],
    ),
]

"""Layers of the package, and how it is loaded and built."""

from __future__ import annotations

from broken import MACHINE, Break, Promise

PROMISES = [
    Promise(
        MACHINE,
        "The losses import only torch, and no module imports a module of a higher layer",
        tests=[
            "package/test_layering.py::test_module_keeps_to_its_layer",
        ],
        breaks=[
            Break(
                "labels import the trainer",
                "fastclip/losses/inputs/labels.py",
                old="import torch",
                new="import fastclip.training",
            ),
        ],
    ),
    Promise(
        MACHINE,
        "Commands import timm, torchvision and transformers only to build a model, and transformers only for BERT",
        tests=[
            "system/test_lazy.py::test_nothing_heavy_is_loaded_before_its_use",
        ],
        breaks=[
            Break(
                "lazy: the trainer loads towers",
                "fastclip/models/dual_encoder.py",
                old="from fastclip.system.lazy import uncollected",
                new="import fastclip.models.towers.build  # noqa: F401\nfrom fastclip.system.lazy import uncollected",
            ),
            Break(
                "lazy: every model loads BERT",
                "fastclip/models/towers/build.py",
                old="from torch import nn",
                new="import fastclip.models.towers.bert  # noqa: F401\nfrom torch import nn",
            ),
        ],
    ),
    Promise(
        MACHINE,
        "`import fastclip` and `fastclip --help` import torch only when it is needed",
        tests=[
            "system/test_lazy.py::test_import_loads_the_standard_library_only",
            "system/test_lazy.py::test_help_answers_in_half_a_second",
            "system/test_lazy.py::test_ops_are_there_where_torch_came_first",
            "system/test_lazy.py::test_command_answers_without_torch",
            "system/test_lazy.py::test_missing_package_is_named",
        ],
        breaks=[
            Break(
                "lazy: the ops come later",
                "fastclip/__init__.py",
                old='"torch" in sys.modules:',
                new="False:",
            ),
            Break(
                "lazy: not at all",
                "fastclip/__init__.py",
                old='"torch" in sys.modules:',
                new="True:",
            ),
            Break(
                "lazy: no word of what is not installed",
                "fastclip/__init__.py",
                old='if not _LAZY[name].startswith("fastclip.models."):',
                new="if True:",
            ),
            Break(
                "lazy: models load torch",
                "fastclip/models/__init__.py",
                old="from typing import TYPE_CHECKING",
                new="from typing import TYPE_CHECKING; import fastclip.models.factory",
            ),
        ],
    ),
    Promise(
        MACHINE,
        "Native code outside the bindings includes no header of PyTorch or Python",
        tests=[
            "package/test_layering.py::test_native_code_is_free_of_frameworks",
        ],
        breaks=[
            Break(
                "a header",
                "csrc/cpu/tile.h",
                old="#pragma once",
                new="#pragma once\n#if 0\n#include <Python.h>\n#endif",
            ),
        ],
    ),
    Promise(
        MACHINE,
        "If a native module is missing, `fastclip.backends()` gives the reason, and no import fails",
        tests=[
            "losses/test_interface.py::test_missing_native_module_is_a_reason",
        ],
        breaks=[
            Break(
                "not caught",
                "fastclip/_backends/native.py",
                old="except ImportError as",
                new="except KeyError as",
            ),
        ],
    ),
    Promise(
        MACHINE,
        "Installation without a compiler succeeds, and reports what was missing",
        tests=[
            "package/test_packaging.py::test_package_works_without_compiler",
        ],
        breaks=[
            Break(
                "the build is required",
                "setup.py",
                old='if WANTED[kind] == "1":',
                new='if WANTED[kind] != "0":',
            ),
        ],
    ),
    Promise(
        MACHINE,
        "Installation without nvcc, or with one that is too old, builds the CPU backend and reports why CUDA "
        "is missing",
        tests=[
            "package/test_packaging.py::test_package_works_without_nvcc",
            "package/test_packaging.py::test_old_nvcc_is_told",
            "package/test_packaging.py::test_cuda_that_does_not_compile_costs_no_cpu_module",
        ],
        breaks=[
            Break(
                "any nvcc will do",
                "setup.py",
                old="(int(version[1]), int(version[2])) < (12, 5)",
                new="not version",
            ),
            Break(
                "CUDA's report is the CPU's",
                "setup.py",
                old="f\"{module.split('.')[0]}_build_report.txt\"",
                new='"_cpu_build_report.txt"',
            ),
        ],
    ),
    Promise(
        MACHINE,
        "The CUDA module can be loaded without a driver and beside any CUDA runtime",
        tests=[
            "package/test_packaging.py::test_cuda_module_loads_without_driver",
        ],
        breaks=[
            Break(
                "a shared runtime",
                "CMakeLists.txt",
                old="CMAKE_CUDA_RUNTIME_LIBRARY Static",
                new="CMAKE_CUDA_RUNTIME_LIBRARY Shared",
            ),
        ],
    ),
    Promise(
        MACHINE,
        "Rebuilding a native module in place does not disturb a process that has loaded it",
        tests=[
            "package/test_packaging.py::test_rebuilding_in_place_leaves_the_loaded_module",
        ],
        breaks=[
            Break(
                "written over",
                "setup.py",
                old="os.replace(temporary, place)",
                new="place.write_bytes(temporary.read_bytes())",
            ),
        ],
    ),
]

"""The pages, and the package that pip installs."""

from __future__ import annotations

from broken import DOCUMENTS, MACHINE, Break, Promise

PROMISES = [
    Promise(
        DOCUMENTS,
        "Every Python block in the documentation, unless marked as not run, runs and prints what its page shows",
        tests=[
            "package/test_docs.py::test_python_of_a_page_runs",
            "package/test_docs.py::test_what_a_block_prints_is_what_the_page_says",
        ],
        breaks=[
            Break(
                "docs: a name that does not exist",
                "docs/search.md",
                old="import CheckpointModel, SearchEngine, parse_query",
                new="import CheckpointModel, SearchEngine, parse_queries",
            ),
            Break(
                "docs: a figure that is not printed",
                "docs/mathematics.md",
                old="# dense: loss 0.0000e+00",
                new="# dense: loss 7.2304e-11",
            ),
        ],
    ),
    Promise(
        DOCUMENTS,
        "Every command in the documentation can be parsed",
        tests=[
            "package/test_docs.py::test_commands_of_a_page_parse",
            "package/test_docs.py::test_commands_are_found",
        ],
        breaks=[
            Break(
                "docs: an option that does not exist",
                "docs/training.md",
                old="--batch-size 65536 --world-size 8",
                new="--batch-size 65536 --world-sizes 8",
            ),
            Break(
                "docs: an option of train that does not exist",
                "docs/training.md",
                old="--config run.yaml --save-every 500",
                new="--config run.yaml --save-each 500",
            ),
            Break(
                "docs: a target that does not exist",
                "CONTRIBUTING.md",
                old="$ make bench-test",
                new="$ make pretty",
            ),
            Break(
                "docs: commands are not found",
                "tests/support/pages.py",
                old='if not line.startswith("$ "):',
                new='if not line.startswith("% "):',
            ),
        ],
    ),
    Promise(
        DOCUMENTS,
        "Every link and anchor leads to a target, and every page is on the website",
        tests=[
            "package/test_docs.py::test_links_of_a_page_lead_somewhere",
            "package/test_docs.py::test_every_page_is_in_the_map",
            "package/test_docs.py::test_site_builds",
        ],
        breaks=[
            Break(
                "docs: a link to nowhere",
                "docs/training.md",
                old="code](integrations.md)",
                new="code](integration.md)",
            ),
            Break(
                "docs: an anchor to nowhere",
                "docs/training.md",
                old="(../benchmarks/README.md#data)",
                new="(../benchmarks/README.md#date)",
            ),
            Break(
                "docs: a page that is not in the map",
                "docs/index.md",
                old="[Search](search.md)",
                new="[Search](training.md)",
            ),
            Break(
                "docs: a page that is not on the site",
                "mkdocs.yml",
                old="- docs/search.md",
                new="",
            ),
            Break(
                "docs: a table that is not one on the site",
                "docs/site.py",
                old='"<details markdown>"',
                new='"<details>"',
            ),
        ],
    ),
    Promise(
        MACHINE,
        "The wheel works in an empty environment, and has all files, types, the licence and the command",
        tests=[
            "package/test_packaging.py::test_installed_wheel_serves_a_user",
            "package/test_packaging.py::test_installed_wheel_has_every_file_of_the_package",
            "package/test_packaging.py::test_installed_command_runs",
        ],
        breaks=[
            Break(
                "package: files are left out",
                "pyproject.toml",
                old="[tool.setuptools.package-data]",
                new=(
                    "[tool.setuptools.exclude-package-data]\n"
                    'fastclip = ["py.typed", "models/configs/ViT-B-32.json"]\n'
                    "\n"
                    "[tool.setuptools.package-data]"
                ),
            ),
            Break(
                "package: no licence",
                "pyproject.toml",
                old='license-files = ["LICENSE"]',
                new="license-files = []",
            ),
            Break(
                "package: no command",
                "pyproject.toml",
                old='fastclip = "fastclip.cli:main"',
                new='fastclips = "fastclip.cli:main"',
            ),
        ],
    ),
    Promise(
        MACHINE,
        "The losses need only torch; an extra installs what its part of fastclip imports, and no development tools",
        tests=[
            "package/test_doctor.py::test_doctor_needs_torch_alone",
            "package/test_layering.py::test_what_a_module_imports_is_declared",
            "package/test_layering.py::test_what_is_declared_is_imported",
            "package/test_layering.py::test_no_tool_of_ours_is_installed_for_a_user",
        ],
        breaks=[
            Break(
                "package: an import that no extra brings",
                "pyproject.toml",
                old='    "markupsafe",\n',
                new="",
            ),
            Break(
                "package: numpy for the losses, too",
                "pyproject.toml",
                old='dependencies = ["torch>=2.8"]',
                new='dependencies = ["torch>=2.8", "numpy"]',
            ),
            Break(
                "package: a test runner for everybody",
                "pyproject.toml",
                old='all = ["fastclip-kernels[hf,',
                new='all = ["fastclip-kernels[bench,hf,',
            ),
        ],
    ),
    Promise(
        MACHINE,
        "`import fastclip` takes less than 0.2 s if torch is already imported",
        tests=[
            "system/test_lazy.py::test_losses_import_in_a_fifth_of_a_second_beside_torch",
        ],
        breaks=[
            Break(
                "package: a slow import",
                "fastclip/losses/contrastive.py",
                old="from typing import Any\n",
                new="from typing import Any; import time; time.sleep(0.5)\n",
            ),
        ],
    ),
]

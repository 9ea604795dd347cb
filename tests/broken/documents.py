"""The pages, and the package that pip installs."""

from __future__ import annotations

from broken import Break, Promise

DOCS, PACKAGING = "package/test_docs.py", "package/test_packaging.py"

# fmt: off
PROMISES: dict[str, list[Promise]] = {
    "Documentation and package": [
        Promise(
            "every Python block of the pages runs, and prints what the page says; every command parses; every link and anchor leads somewhere; the site builds without a warning",
            (f"{DOCS}::test_python_of_a_page_runs", f"{DOCS}::test_what_a_block_prints_is_what_the_page_says", f"{DOCS}::test_commands_of_a_page_parse", f"{DOCS}::test_commands_are_found", f"{DOCS}::test_links_of_a_page_lead_somewhere", f"{DOCS}::test_every_page_is_in_the_map", f"{DOCS}::test_site_builds"),
            (
                Break("docs: a name that does not exist", "docs/search.md", "import CheckpointModel, SearchEngine, parse_query", "import CheckpointModel, SearchEngine, parse_queries"),
                Break("docs: a figure that is not printed", "docs/mathematics.md", "# dense: loss 0.0000e+00", "# dense: loss 7.2304e-11"),
                Break("docs: an option that does not exist", "docs/training.md", "--batch-size 65536 --world-size 8", "--batch-size 65536 --world-sizes 8"),
                Break("docs: an option of train that does not exist", "docs/training.md", "--config run.yaml --save-every 500", "--config run.yaml --save-each 500"),
                Break("docs: a target that does not exist", "CONTRIBUTING.md", "$ make format", "$ make pretty"),
                Break("docs: commands are not found", "tests/support/pages.py", 'if not line.startswith("$ "):', 'if not line.startswith("% "):'),
                Break("docs: a link to nowhere", "docs/training.md", "[there](integrations.md)", "[there](integration.md)"),
                Break("docs: an anchor to nowhere", "docs/training.md", "(../benchmarks/README.md#data)", "(../benchmarks/README.md#date)"),
                Break("docs: a page that is not in the map", "docs/index.md", "[Using a model](search.md)", "[Using a model](training.md)"),
                Break("docs: a page that is not on the site", "mkdocs.yml", "      - docs/search.md\n", ""),
                Break("docs: a table that is not one on the site", "docs/site.py", '"<details markdown>"', '"<details>"'),
            ),
        ),
        Promise(
            "the wheel serves in an empty environment: every file of the package, types, licence, command; `import fastclip` takes less than 0.2 s beside torch",
            (f"{PACKAGING}::test_installed_wheel_serves_a_user", f"{PACKAGING}::test_installed_wheel_has_every_file_of_the_package", f"{PACKAGING}::test_installed_command_runs", "package/test_lazy.py::test_losses_import_in_a_fifth_of_a_second_beside_torch"),
            (
                Break("package: files are left out", "pyproject.toml", "[tool.setuptools.package-data]", '[tool.setuptools.exclude-package-data]\nfastclip = ["py.typed", "models/configs/ViT-B-32.json"]\n\n[tool.setuptools.package-data]'),
                Break("package: no licence", "pyproject.toml", 'license-files = ["LICENSE"]', "license-files = []"),
                Break("package: no command", "pyproject.toml", 'fastclip = "fastclip.cli:main"', 'fastclips = "fastclip.cli:main"'),
                Break("package: a slow import", "fastclip/loss.py", "from typing import Any, NamedTuple\n", "from time import sleep\nfrom typing import Any, NamedTuple\n\nsleep(0.5)\n"),
            ),
        ),
    ],
}
# fmt: on

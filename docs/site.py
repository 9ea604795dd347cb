"""A hook of mkdocs: the site has the repository's folders, so that links are the same here and there."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PARTS = ("*.md", "docs/*.md", "docs/*.png", "benchmarks/*.md", "benchmarks/results/*", "examples/*.py", "tests/**/*.py")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    root = Path(config.config_file_path).parent
    theme = [file for file in files if file.src_dir != config.docs_dir]
    pages = [path for part in PARTS for path in sorted(root.glob(part))]
    own = [File.generated(config, path.relative_to(root).as_posix(), abs_src_path=str(path)) for path in pages]
    return Files([*theme, *own])


def on_page_markdown(markdown: str, **_: object) -> str:
    return markdown.replace("<details>", "<details markdown>")  # GitHub reads Markdown in there without being told

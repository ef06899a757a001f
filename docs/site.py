"""Hooks of the documentation site: pages that lie outside of `docs/`, and the links between them and those inside.

On the site, `docs/` is the root. So a link that is right in the repository loses `../` or `docs/`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
SAME = ("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "SECURITY.md", "benchmarks/NOTES.md")
# Pages and other files of the repository, by their paths on the site.
OUTSIDE = {"index.md": "README.md"} | {name: name for name in SAME}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies outside of `docs/`: some pages, the examples with their notebook, the benchmarks' scripts."""
    patterns = ("examples/*.py", "examples/*.ipynb", "benchmarks/*.py")
    scripts = {str(path.relative_to(ROOT)): path for pattern in patterns for path in ROOT.glob(pattern)}
    for uri, path in {**{uri: ROOT / path for uri, path in OUTSIDE.items()}, **scripts}.items():
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Make the links of a page those of the site."""
    here = OUTSIDE.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def moved(link: re.Match[str]) -> str:
        target, mark, anchor = link[1].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return link[0]
        path = (ROOT / here).parent.joinpath(target).resolve().relative_to(ROOT)
        uri = {path: uri for uri, path in OUTSIDE.items()}.get(str(path), str(path).removeprefix("docs/"))
        up = "../" * page.file.src_uri.count("/")
        return f"]({up}{uri}{mark}{anchor})"

    return re.sub(r"\]\(([^)\s]+)\)", moved, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Show types as PEFT's docstrings write them (`int`, *optional*) without the marks."""
    return re.sub(r"<code>[^<]*`[^<]*</code>", lambda code: re.sub("[`*]", "", code[0]), html)

"""The pages of the documentation as data: their snippets, commands and links; and what README's lines assume."""

from __future__ import annotations

import re
import shlex
import textwrap
from pathlib import Path
from typing import NamedTuple

import torch

import tiny

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]
FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


class Snippet(NamedTuple):
    """A fenced block of a page.

    Attributes:
        name: The page and the heading above it, and from the second one under a heading on its number:
            `docs/saving.md#smaller`, `docs/saving.md#smaller-2`.
        language: What the fence says, such as `python`.
        line: The number of its first line in the page.
        text: The block without its indentation.
    """

    name: str
    language: str
    line: int
    text: str

    def run(self, names: dict[str, object]) -> None:
        """Run Python in `names`. Tracebacks have the lines of the page."""
        exec(compile("\n" * (self.line - 1) + self.text, self.name, "exec"), names)


def anchor(heading: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


def snippets(page: str, *languages: str) -> list[Snippet]:
    """The fenced blocks of a page in these languages, in order."""
    text = (ROOT / page).read_text()
    found: list[Snippet] = []
    seen: dict[str, int] = {}
    for block in FENCED.finditer(text):
        if block[2] in languages:
            above = FENCED.sub("", text[: block.start()])
            name = f"{page}#{anchor(re.findall(r'^#+ (.*)$', above, re.MULTILINE)[-1])}"
            seen[name] = seen.get(name, 0) + 1
            number = "" if seen[name] == 1 else f"-{seen[name]}"
            line = text.count("\n", 0, block.start(3)) + 1
            found.append(Snippet(name + number, block[2], line, textwrap.dedent(block[3])))
    return found


def commands(page: str) -> list[list[str]]:
    """The commands of a page, in its blocks and in its text, as words."""
    text = (ROOT / page).read_text()
    lines = [
        line.removeprefix("$ ")
        for block in snippets(page, "bash", "console")
        for line in block.text.replace("\\\n", " ").splitlines()
        if block.language == "bash" or line.startswith("$ ")
    ]
    inline = r"`((?:(?:python|sfa-peft|make|pytest|pip) |(?:benchmarks|examples|tests)/\w+\.py)[^`]*)`"
    lines += re.findall(inline, FENCED.sub("", text))
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def links(page: str) -> list[str]:
    """What a page links to in the repository, without anchors."""
    found = re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", (ROOT / page).read_text()))
    return [path for link in found if not re.match(r"[a-z]+:", link) and (path := link.partition("#")[0])]


def names_of_readme() -> dict[str, object]:
    """What README's Python assumes. The base is on the Hub, so that the adapter can name it."""
    from transformers import SegformerImageProcessorPil, UperNetForSemanticSegmentation

    tiny.swin().push_to_hub("me/swin-nano")
    return {
        "base": UperNetForSemanticSegmentation.from_pretrained("me/swin-nano"),
        "processor": SegformerImageProcessorPil(size={"height": tiny.SIZE, "width": tiny.SIZE}),
        "train_loader": [tiny.batch(seed=i) for i in range(3)],
        "torch": torch,
    }

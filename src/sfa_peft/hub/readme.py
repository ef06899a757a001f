"""Reads and writes the README.md of a model card: its front matter, its text, and the sections of adapters in it.

A README may have any content, since anybody can edit it. Whatever it is, it is read in a time that is proportional to
its size: there are no regular expressions here that can go back over it, and no YAML aliases.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.utils import yaml_dump

from ..ticket.text import printable

BEGIN = "<!-- sfa_peft: begin {name}; what is between these lines is written anew by each save -->"
END = "<!-- sfa_peft: end {name} -->"
VERSIONS = "### Framework versions"
# Characters. PyYAML reads about 100,000 in a second.
MAX_FRONT_MATTER = 1 << 18

# What Markdown and HTML act on. A character reference is never more than the character; a backslash before `|` is not
# read as an escape everywhere.
_ACTIVE = {ord(c): f"&#{ord(c)};" for c in "\\`*[]<>&|~$#"}


class ReadmeError(ValueError):
    """A README cannot be updated. The message says why, and what to do."""


def escaped(text: str) -> str:
    """Markdown on one line that shows a text as it is, in a cell of a table or anywhere else."""
    shown = printable(text).translate(_ACTIVE)
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", "&#95;", shown)  # `mean_iou` needs no escape


def code(text: str) -> str:
    """A name as code if it has only usual characters, otherwise as escaped text."""
    return f"`{text}`" if re.fullmatch(r"[\w./-]+", text, re.ASCII) else escaped(text)


def literal(text: str) -> str:
    """A Python string literal of the text, on one line and without HTML."""
    return printable(json.dumps(text, ensure_ascii=False)).replace("<", "\\x3c")


class _Loader(yaml.SafeLoader):
    """YAML without aliases, since a few lines of them can stand for gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ReadmeError("it has YAML aliases (`*name`), which are not supported")
        return super().compose_node(parent, index)


@dataclass
class Readme:
    """The content of a README.

    Attributes:
        data: The front matter. Its values may be of any type.
        text: The text below it.
    """

    data: dict[Any, Any] = field(default_factory=dict)
    text: str = ""

    @classmethod
    def read(cls, path: Path) -> Readme:
        """Read a README.

        Raises:
            ReadmeError: If it cannot be read, is not UTF-8 text, or its front matter is not a mapping in YAML.
        """
        if not path.is_file():  # a folder, or a pipe, which would be waited for
            raise ReadmeError("it is not a file")
        try:
            content = path.read_bytes().decode("utf-8-sig")
        except OSError as error:
            raise ReadmeError(f"it cannot be read ({error.strerror})") from error
        except UnicodeError as error:
            raise ReadmeError(f"it is not UTF-8 text ({error})") from error
        front, text = _split(content.replace("\r\n", "\n").replace("\r", "\n"))
        return cls(_mapping(front), text)

    def write(self, path: Path) -> None:
        front = yaml_dump(self.data, sort_keys=False).strip()
        path.write_bytes(f"---\n{front}\n---\n{self.text}".encode("utf-8", "backslashreplace"))

    def set_section(self, name: str, section: str) -> None:
        """Write the section of an adapter. A new one comes after those of other adapters."""
        name = printable(name.replace("--", "- -"))  # which ends a comment
        begin, end = BEGIN.format(name=name), END.format(name=name)
        added = [begin, "", *section.split("\n"), "", end]
        lines = self.text.split("\n")
        opened = closed = None
        for i, line in enumerate(lines):
            if line == begin:
                opened = i
            elif line == end and opened is not None:
                self.text = "\n".join(lines[:opened] + added + lines[i + 1 :])
                return
            if line.startswith(END.partition("{")[0]):
                closed = i
        at = closed + 1 if closed is not None else lines.index(VERSIONS) if VERSIONS in lines else len(lines)
        before, after = "\n".join(lines[:at]).rstrip(), "\n".join(lines[at:]).lstrip()
        self.text = "\n".join([before, "", *added, "", after])

    def add_version(self, name: str, version: str) -> None:
        """Name a version of a library, as PEFT does in its cards."""
        lines, line = self.text.split("\n"), f"- {name} {version}"
        if line in lines:
            return
        if VERSIONS in lines:
            lines.insert(lines.index(VERSIONS) + 2, line)
            self.text = "\n".join(lines)
        else:
            self.text = f"{self.text.rstrip()}\n\n{VERSIONS}\n\n{line}\n"


def with_texts(value: Any, texts: Iterable[str]) -> list[Any]:
    """A list in a front matter with more texts in it, sorted. Values that are not text stay, at its end."""
    given = value if isinstance(value, list) else [value]
    joined = sorted({*texts, *(v for v in given if isinstance(v, str))})
    return joined + [v for v in given if v is not None and not isinstance(v, str)]


def dicts_in(value: Any) -> list[dict[Any, Any]]:
    """The mappings in a list of a front matter. None if it is something else."""
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []


def text_in(value: Any, *keys: str) -> str | None:
    """The text at a path of keys in a front matter; None if there is something else."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return printable(value) if isinstance(value, str) and value.strip() else None


def _split(content: str) -> tuple[str, str]:
    """The front matter and the text below it, as huggingface_hub divides them."""
    lines = content.split("\n")
    start = next((i for i, line in enumerate(lines) if line.strip()), 0)
    if lines[start].lstrip() != "---":
        return "", content
    end = next((i for i in range(start + 1, len(lines)) if lines[i].rstrip(" \t") == "---"), None)
    if end is None:
        return "", content
    return "\n".join(lines[start + 1 : end]), "\n".join(lines[end + 1 :])


def _mapping(front: str) -> dict[Any, Any]:
    if len(front) > MAX_FRONT_MATTER:
        raise ReadmeError(f"its front matter has more than {MAX_FRONT_MATTER:,} characters")
    try:
        data = yaml.load(front, _Loader)
    except ReadmeError:
        raise
    except Exception as error:  # PyYAML has no type for all of them: a wrong number is an IndexError
        raise ReadmeError(f"its front matter is not valid YAML ({printable(' '.join(str(error).split()))})") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ReadmeError("its front matter is not a mapping")
    return data

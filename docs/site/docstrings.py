"""Docstrings are written for ``help()`` and Sphinx: turn their marks into Markdown before mkdocstrings reads them."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|meth|func|mod|attr|exc|data):`~?([^`]+)`")
LITERAL_BLOCK = re.compile(r"::(?=\n\n {4})")
TABLE = re.compile(r"^ *=+  =+\n(?P<rows>.*?)\n *=+  =+$", re.DOTALL | re.MULTILINE)


class Docstrings(griffe.Extension):
    """``:class:`X``` becomes code, ``::`` before an indented block a colon, and a table of two columns one of Markdown."""

    def on_instance(self, *, obj: griffe.Object | griffe.Alias, **_: Any) -> None:
        if not obj.is_alias and obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    text = ROLE.sub(lambda match: f"`{match[1].rpartition('.')[2] if '~' in match[0] else match[1]}`", text)
    return LITERAL_BLOCK.sub(":", TABLE.sub(_table, text))


def _table(match: re.Match[str]) -> str:
    lines: list[list[str]] = []
    for line in match["rows"].splitlines():
        first, _, second = line.strip().partition("  ")
        if line.startswith(" ") and lines:  # goes on in the second column
            lines[-1][1] += " " + line.strip()
        else:
            lines.append([first, second.strip()])
    return "\n".join(["| name | meaning |", "| --- | --- |", *(f"| {first} | {second} |" for first, second in lines)])

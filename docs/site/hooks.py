"""What MkDocs does beside the pages: README.md is the home page, and files that pages link to come along.

Pages are read on a code host too, where ``../benchmarks/results/x.txt`` is right. In the site such a file lies at
``repository/benchmarks/results/x.txt``; sources get ``.txt`` at their end, so that a browser shows them.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_log = logging.getLogger("mkdocs.hooks")
DOCS = Path(__file__).resolve().parents[1]
ROOT = DOCS.parent
LINK = re.compile(r"(?<=\]\()(?!https?://|#|mailto:)([^)\s#]+)(#[^)\s]*)?(?=\))")
SHOWN_BY_BROWSERS = {".txt", ".png", ".svg", ".md", ".json", ".jsonl"}
HOME, ELSEWHERE = "index.md", "repository"


def on_files(files: Files, *, config: Any) -> Files:
    """Add the home page, and all that pages link to outside of ``docs``."""
    files.append(File.generated(config, HOME, content=(ROOT / "README.md").read_text()))
    files.append(File.generated(config, "site.css", content=(DOCS / "site/site.css").read_text()))
    waiting, seen = [*DOCS.glob("*.md"), ROOT / "README.md"], set[Path]()
    while waiting:
        source = waiting.pop()
        for target, _ in LINK.findall(source.read_text()):
            path = (source.parent / target).resolve()
            if path in seen or not path.is_file() or path.is_relative_to(DOCS) or path == ROOT / "README.md":
                continue
            seen.add(path)
            if path.suffix == ".md":
                files.append(File.generated(config, place(path), content=path.read_text()))
                waiting.append(path)
            else:
                files.append(File.generated(config, place(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Let links lead to where files lie in the site."""
    source = origin(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        path = (source.parent / match[1]).resolve()
        if not path.is_file():
            _log.warning(f"{source.relative_to(ROOT)}: {match[1]} is not a file.")
            return match[0]
        return os.path.relpath(place(path), os.path.dirname(page.file.src_uri)) + (match[2] or "")

    return LINK.sub(moved, markdown)


def place(path: Path) -> str:
    """Where a file of the repository lies in the site."""
    if path == ROOT / "README.md":
        return HOME
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    name = f"{ELSEWHERE}/{path.relative_to(ROOT).as_posix()}"
    return name if path.suffix in SHOWN_BY_BROWSERS else f"{name}.txt"


def origin(src_uri: str) -> Path:
    """The file of the repository that a page was made from: the inverse of :func:`place`, for pages."""
    if src_uri == HOME:
        return ROOT / "README.md"
    return ROOT / src_uri.removeprefix(f"{ELSEWHERE}/") if src_uri.startswith(f"{ELSEWHERE}/") else DOCS / src_uri

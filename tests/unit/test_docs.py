"""What the documents point to exists."""

import os
import re
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
TESTS = {file.stem: file.read_text() for file in ROOT.glob("tests/*/test_*.py")}


def test_the_table_of_compatibility_names_tests_that_exist():
    document = (ROOT / "docs/compatibility.md").read_text()
    files = {"P": "test_precision"} | dict(re.findall(r"\b([A-Z])\s+`(test_\w+)`", document))
    rows = [line.split("|")[-2] for line in document.splitlines() if line.startswith("| ")]
    named = [
        (letter, name)
        for cell in rows
        for letter, names in re.findall(r"\b([A-Z])((?: `\w+`,?)+)", cell)
        for name in re.findall(r"`(\w+)`", names)
    ]
    assert len(named) > 60
    missing = [f"{letter} {name}" for letter, name in named if not re.search(rf"def test_\w*{name}", TESTS[files[letter]])]
    assert not missing


def test_code_to_move_by_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/moving.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        with mock.patch.dict(os.environ):  # a Trainer writes there
            exec(compile(block, "docs/moving.md", "exec"), {"__name__": "moving"})


def test_links_between_documents_lead_somewhere():
    broken = [
        f"{document.relative_to(ROOT)}: {target}"
        for document in [
            *ROOT.glob("*.md"),
            *ROOT.glob("docs/*.md"),
            *ROOT.glob("benchmarks/*.md"),
            *ROOT.glob("examples/*.md"),
        ]
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text())
        if not (document.parent / target).exists()
    ]
    assert not broken

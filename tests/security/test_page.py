"""docs/security.md says what the tests beside this one show, and nothing else."""

from __future__ import annotations

import ast
from pathlib import Path

FOLDER = Path(__file__).parent
PAGE = FOLDER.parents[1] / "docs" / "security.md"


def test_each_statement_of_the_page_is_the_docstring_of_a_test() -> None:
    stated = [line.removeprefix("- ") for line in PAGE.read_text().splitlines() if line[:2] == "- "]
    shown = [
        " ".join(doc.split())
        for file in FOLDER.glob("test_*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and (doc := ast.get_docstring(node))
        if node.name.startswith("test_")
    ]
    assert sorted(stated) == sorted(shown)
    assert stated

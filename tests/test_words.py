"""The language of the project: plain technical English in docstrings, comments and pages, in the words of the field."""

from __future__ import annotations

import ast
import re

from tests.source_tree import PACKAGES, ROOT, files, modules, report

IDIOMS = re.compile(r"\b(nobody|whoever|anew|stands? in|goes on|any more|told|so many)\b", re.IGNORECASE)
"""What this project used to say in an English of its own. A person may be told something; a process gets a message."""

KEPT = {
    "tests/test_words.py": "names them",
    "deploy/local/postgres.py": "`nobody` is a user of the system",
}

NOT_VERBS = re.compile(
    r"(A|All|An|And|Any|As|At|Before|Both|By|Each|Every|Everything|For|From|How|If|In|It|Its|None|Nothing|Of|On|One|Ours|Same|"
    r"Seconds|So|Some|That|The|Their|These|They|This|Those|To|True|False|Until|What|When|Where|Whether|Which|While|Who|Whose|Why|"
    r"With|Without|Yes|No|Not|Number|Text|[0-9(`\"'].*)"
)
"""First words that make a fragment of a docstring that should begin with a verb."""


def test_no_private_idioms() -> None:
    """Docstrings, comments and pages use none of IDIOMS."""
    lines = [
        (name, number, line)
        for name in files()
        if name.endswith(".md")
        for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1)
    ]
    lines += [
        (module.name, number, text) for module in modules(*PACKAGES, "deploy", "docs", "tests") for number, text in module.prose
    ]
    found = [
        f"{name}:{number} {match.group()}" for name, number, line in lines if name not in KEPT and (match := IDIOMS.search(line))
    ]
    report(found, "plain words")


def _is_property(node: ast.AST) -> bool:
    decorators = getattr(node, "decorator_list", [])
    return any(ast.unparse(decorator).endswith(("property", ".setter")) for decorator in decorators)


def test_docstrings_begin_with_a_verb() -> None:
    """The first line of a function's docstring says what it does: "Return the ...", "Advance the slot to ..."."""
    found = []
    for module in modules(*PACKAGES, "deploy", "docs"):
        for node, text in module.docstrings:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.name == "__init__" or _is_property(node):
                continue
            first = text.split()[0].rstrip(",.:;")
            if NOT_VERBS.fullmatch(first) or re.search(r"[^a-z]|(?<!s)s$|ed$|ing$", first[1:]) or not first[0].isupper():
                found.append(f"{module.name}:{node.lineno} {node.name}: {text.splitlines()[0][:80]}")
    report(found, "a docstring begins with an imperative verb")

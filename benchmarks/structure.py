"""Print the size and shape of the package: ``python benchmarks/structure.py``.

Modules, statements, the longest chain of imports (imports inside functions included), the longest
functions and lines, and the private functions that are named only once. ``tests/test_project.py``
holds limits on them.
"""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "capgen_utils"
LINTED = ("capgen_utils", "tests", "benchmarks")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(folder: Path = PACKAGE) -> dict[Path, str]:
    """Return the text of every Python file in a folder."""
    return {path: path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py"))}


@cache
def trees() -> dict[Path, ast.Module]:
    """Return the package's modules, parsed."""
    return {path: ast.parse(text) for path, text in sources().items()}


def statements() -> int:
    """Count the statements of the package."""
    return sum(isinstance(node, ast.stmt) for tree in trees().values() for node in ast.walk(tree))


def imports() -> dict[str, set[str]]:
    """Map each module to the modules of the package that it imports, the public face excepted."""
    names = {
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): tree
        for path, tree in trees().items()
    }
    graph: dict[str, set[str]] = {name: set() for name in names}
    for name, tree in names.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                targets = {f"{node.module}.{alias.name}" for alias in node.names}
                graph[name] |= {t if t in names else node.module for t in targets} & names.keys()
        graph[name] -= {name, PACKAGE.name}
    return graph


def longest_chain() -> list[str]:
    """Return the modules of the longest path of imports, the importing module first."""
    graph, longest = imports(), {}

    def chain(name: str, above: tuple[str, ...] = ()) -> list[str]:
        if name not in longest:
            below = (chain(each, (*above, name)) for each in sorted(graph[name] - {*above}))
            longest[name] = [name, *max(below, key=len, default=[])]
        return longest[name]

    return max(map(chain, graph), key=len)


def functions(package: Path = PACKAGE) -> Iterator[tuple[str, int]]:
    """Yield every function with its number of lines, docstrings not counted."""
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, Function):
                lines = node.end_lineno - node.lineno + 1
                if ast.get_docstring(node):
                    lines -= node.body[0].end_lineno - node.body[0].lineno + 1
                yield f"{path.relative_to(package)}:{node.lineno} {node.name}", lines


def named_once() -> tuple[list[str], int]:
    """Return the private functions that are used in one line only, and the number of all."""
    nodes = [node for tree in trees().values() for node in ast.walk(tree)]
    names = [node.name for node in nodes if isinstance(node, Function)]
    private = [name for name in names if name.startswith("_") and not name.startswith("__")]
    text = "\n".join(sources().values())
    return [name for name in private if len(re.findall(rf"\b{name}\b", text)) <= 2], len(names)


def long_lines(limit: int = 100) -> list[str]:
    """Return file and number of lines over ``limit`` columns, pragma comments not counted."""
    return [
        f"{path.relative_to(REPOSITORY)}:{number}"
        for folder in LINTED
        for path, text in sources(REPOSITORY / folder).items()
        for number, line in enumerate(text.splitlines(), 1)
        if len(re.sub(r"\s+# (type: ignore|noqa).*", "", line)) > limit
    ]


def main() -> int:
    """Print the figures."""
    chain, lengths = longest_chain(), sorted(functions(), key=lambda each: -each[1])
    once, count = named_once()
    short = sum(lines < 25 for _, lines in lengths) / len(lengths)
    print(f"modules              {len(trees())}")
    print(f"statements           {statements()}")
    print(f"longest import chain {len(chain)}: {' > '.join(chain)}")
    print(f"functions            {count}, {short:.1%} of them under 25 lines")
    print("longest functions    " + ", ".join(f"{name} ({n})" for name, n in lengths[:5]))
    print(f"private, used once   {len(once)} ({len(once) / count:.1%} of all functions)")
    print(f"lines over 100       {len(long_lines())}")
    print(f"top-level files      {sum(path.is_file() for path in PACKAGE.iterdir())}")
    print(f"README               {(REPOSITORY / 'README.md').stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Compare the stubs of engines with the packages that are installed: `python tests/engines/check_stubs.py sglang`.

Sources are parsed, nothing is imported, so it needs neither a GPU nor the package's dependencies. Everything that a
stub says must be said by the package too: fields of dataclasses with their order and defaults, members of enumerations,
signatures of functions and methods, decorators. What a package has besides is not missed in a stub; classes whose
names begin with an underscore are the stub's own.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

STUBS = Path(__file__).parent / "stubs"
_ALIASES = {"List": "list", "Dict": "dict", "Tuple": "tuple", "Set": "set", "Type": "type"}

Body = list[ast.stmt]


class _Plain(ast.NodeTransformer):
    """One spelling of annotations: ``X | None``, ``list[X]``, no quotes."""

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.value, ast.Name) and node.value.id == "Optional":
            return ast.BinOp(node.slice, ast.BitOr(), ast.Constant(None))
        if isinstance(node.value, ast.Name) and node.value.id == "Union" and isinstance(node.slice, ast.Tuple):
            joined = node.slice.elts[0]
            for other in node.slice.elts[1:]:
                joined = ast.BinOp(joined, ast.BitOr(), other)
            return joined
        return node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name(_ALIASES.get(node.id, node.id), node.ctx)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, str):
            return self.visit(ast.parse(node.value, mode="eval").body)
        return node


def annotation(node: ast.expr | None) -> str:
    return "" if node is None else ast.unparse(ast.fix_missing_locations(_Plain().visit(ast.parse(ast.unparse(node)))))


def signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Arguments with kinds, annotations and defaults; the result; ``async``; decorators."""
    for argument in ast.walk(node.args):
        if isinstance(argument, ast.arg) and argument.annotation is not None:
            argument.annotation = ast.parse(annotation(argument.annotation), mode="eval").body
    kind = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
    marks = [ast.unparse(mark).removeprefix("abc.") for mark in node.decorator_list]
    return f"{' '.join(marks)} {kind}({ast.unparse(node.args)}) -> {annotation(node.returns)}".strip()


def functions(body: Body) -> dict[str, list[str]]:
    """Signatures by name; several for a function that is overloaded or given by platform."""
    found: dict[str, list[str]] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.setdefault(node.name, []).append(signature(node).removeprefix("overload "))
    return found


def classes(body: Body) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in body if isinstance(node, ast.ClassDef)}


def fields(node: ast.ClassDef) -> list[str]:
    return [
        f"{ast.unparse(item.target)}: {annotation(item.annotation)}"
        + ("" if item.value is None else f" = {ast.unparse(item.value)}")
        for item in node.body
        if isinstance(item, ast.AnnAssign)
    ]


def members(node: ast.ClassDef) -> set[str]:
    return {ast.unparse(item) for item in node.body if isinstance(item, ast.Assign)}


def is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(mark) for mark in node.decorator_list)


def differences(where: str, stub: Body, real: Body) -> Iterator[str]:
    """What ``stub`` says and ``real`` does not."""
    theirs = functions(real)
    for name, signatures in functions(stub).items():
        if name not in theirs:
            yield f"{where}{name}: the package has no such function"
        elif not set(signatures) <= set(theirs[name]):
            yield f"{where}{name}: stub {signatures}\n    package {theirs[name]}"
    their_classes = classes(real)
    for name, cls in classes(stub).items():
        if name.startswith("_"):
            continue
        if name not in their_classes:
            yield f"{where}{name}: the package has no such class"
            continue
        other = their_classes[name]
        marks, other_marks = ([ast.unparse(mark) for mark in one.decorator_list] for one in (cls, other))
        if marks != other_marks:
            yield f"{where}{name}: stub decorated {marks}, package {other_marks}"
        mine, others = fields(cls), fields(other)
        if mine != others if is_dataclass(cls) else not set(mine) <= set(others):
            yield f"{where}{name}: stub fields {mine}\n    package {others}"
        if not members(cls) <= members(other):
            yield f"{where}{name}: only the stub has {sorted(members(cls) - members(other))}"
        yield from differences(f"{where}{name}.", cls.body, other.body)


def check(engine: str) -> list[str]:
    """Differences between an engine's stub and its package. Raises SystemExit if it is not installed."""
    spec = importlib.util.find_spec(engine)
    if spec is None or not spec.submodule_search_locations or str(STUBS) in spec.submodule_search_locations[0]:
        raise SystemExit(f"{engine} is not installed here")
    package = Path(spec.submodule_search_locations[0])
    found = []
    for stub in sorted((STUBS / engine).rglob("*.py")):
        body = ast.parse(stub.read_text()).body
        path = package / stub.relative_to(STUBS / engine)
        if not path.exists():
            path = path.with_suffix(".pyi")  # of a compiled module
        if not functions(body) and not classes(body):
            continue
        if not path.exists():
            found.append(f"{path}: the package has no such module")
        else:
            found += differences(f"{stub.relative_to(STUBS)}: ", body, ast.parse(path.read_text()).body)
    return found


if __name__ == "__main__":
    problems = [problem for engine in sys.argv[1:] for problem in check(engine)]
    print("\n".join(problems) or f"stubs agree with {', '.join(sys.argv[1:])}")
    raise SystemExit(bool(problems))

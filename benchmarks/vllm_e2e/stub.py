"""Compare the stub of vLLM that the tests use with the vLLM that is installed: names, signatures, fields, members."""

from __future__ import annotations

import ast
import dataclasses
import enum
import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

STUB = Path(__file__).resolve().parents[2] / "tests" / "vllm_stub"


def members(tree: ast.Module) -> Any:
    """(class or "", name, node) of what the stub defines."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield "", node.name, node
        elif isinstance(node, ast.ClassDef):
            yield "", node.name, node
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    yield node.name, inner.name, inner
                elif isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name):
                    yield node.name, inner.target.id, inner
                elif isinstance(inner, ast.Assign) and isinstance(inner.targets[0], ast.Name):
                    yield node.name, inner.targets[0].id, inner


def parameters(node: ast.FunctionDef) -> list[tuple[str, str, Any]]:
    """(name, kind, default) of a stub's function, its first argument included."""
    given = node.args
    found = [(a.arg, "positional", None) for a in given.posonlyargs + given.args]
    for i, default in enumerate(given.defaults, len(found) - len(given.defaults)):
        found[i] = (found[i][0], "positional", ast.literal_eval(default))
    if given.vararg:
        found.append((given.vararg.arg, "*", None))
    found += [(a.arg, "keyword", None) for a in given.kwonlyargs]
    if given.kwarg:
        found.append((given.kwarg.arg, "**", None))
    return found


def real_parameters(function: Any) -> list[tuple[str, str, Any]]:
    kinds = {
        inspect.Parameter.POSITIONAL_OR_KEYWORD: "positional",
        inspect.Parameter.POSITIONAL_ONLY: "positional",
        inspect.Parameter.VAR_POSITIONAL: "*",
        inspect.Parameter.KEYWORD_ONLY: "keyword",
        inspect.Parameter.VAR_KEYWORD: "**",
    }
    return [
        (p.name, kinds[p.kind], None if p.default is p.empty else p.default)
        for p in inspect.signature(function).parameters.values()
    ]


def differences() -> list[str]:
    """What the stub says and vLLM does not, one line each; and abstract methods that the stub lacks."""
    wrong = []
    for path in sorted(STUB.rglob("*.py")):
        tree = ast.parse(path.read_text())
        if path.name == "__init__.py":
            if path.parent.name == "vllm":
                said = next(ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign))
                if importlib.import_module("vllm").__version__ != said:
                    wrong.append(f"version {importlib.import_module('vllm').__version__}, the stub says {said}")
            continue
        module = importlib.import_module(".".join(path.relative_to(STUB).with_suffix("").parts))
        for owner, name, node in members(tree):
            where = f"{module.__name__}: {owner + '.' if owner else ''}{name}"
            holder = getattr(module, owner, None) if owner else module
            if isinstance(node, ast.AnnAssign):
                if name not in {item.name for item in dataclasses.fields(holder)}:
                    wrong.append(f"{where}: no such field")
                continue
            real = inspect.getattr_static(holder, name, None)
            if real is None:
                wrong.append(f"{where}: not there")
            elif isinstance(node, ast.Assign):
                value = ast.literal_eval(node.value)
                if (real.value if isinstance(real, enum.Enum) else real) != value:
                    wrong.append(f"{where}: {real!r}, the stub says {value!r}")
            elif isinstance(node, ast.FunctionDef):
                function = real.__func__ if isinstance(real, classmethod) else real
                if parameters(node) != real_parameters(function):
                    wrong.append(f"{where}{inspect.signature(function)} differs")
            elif lacking := set(getattr(real, "__abstractmethods__", ())) - {
                inner.name for inner in node.body if isinstance(inner, ast.FunctionDef)
            }:
                wrong.append(f"{where}: abstract methods {sorted(lacking)} are not in the stub")
    return wrong


if __name__ == "__main__":
    found = differences()
    print("\n".join(found) or f"the stub agrees with vLLM {importlib.import_module('vllm').__version__}")
    sys.exit(bool(found))

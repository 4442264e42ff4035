"""Changes of a module that take a refusal, a clip or a noise away, one at a time.

`tests.mutations` tries whether a test notices.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from typing import Any

# Names of calls that bound a value, and of keywords that say by how much.
CLIPS = ("clamp", "clamp_min", "clip", "minimum")
BOUNDS = ("bound", "clip_norm", "max_grad_norm", "max_norm")


class Changes(ast.NodeVisitor):
    """All changes of a module, as functions that make them in its tree."""

    def __init__(self) -> None:
        self.found: list[tuple[ast.AST, str, str, str, Callable[[], None]]] = []
        self._where: list[str] = []

    def _add(self, node: ast.AST, kind: str, make: Callable[[], None], shown: ast.AST) -> None:
        code = " ".join(ast.unparse(shown).split())[:160]
        self.found.append((node, kind, ".".join(self._where), code, make))

    def visit(self, node: ast.AST) -> None:
        named = isinstance(node, ast.FunctionDef | ast.ClassDef)
        if named:
            self._where.append(node.name)
        if isinstance(node, ast.If) and self._refuses(node.body):
            self._add(node, "refusal", _setting(node, "test", ast.Constant(False)), node.test)
            self._parts(node)
        elif isinstance(node, ast.FunctionDef) and isinstance(node.body[-1], ast.Raise):
            last = node.body[-1]
            self._add(last, "last refusal", _into(node.body, last, ast.Pass()), last)
        elif isinstance(node, ast.ExceptHandler) and isinstance(node.body[-1], ast.Raise):
            last = node.body[-1]
            if last.exc is not None:
                self._add(last, "caught", _into(node.body, last, ast.Pass()), last)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            name = _name(node.value)
            if name.lstrip("_").startswith(("check", "require")):
                nothing = ast.Constant(None)
                self._add(node, "check", _setting(node, "value", nothing), node)
            if name == "fill" and node.value.args:
                zero = ast.Call(ast.Attribute(node.value.args[0], "fill"), [ast.Constant(0)], [])
                self._add(node, "noise", _setting(node, "value", zero), node)
        elif isinstance(node, ast.Call):
            self._bounds(node)
        self.generic_visit(node)
        if named:
            self._where.pop()

    def _refuses(self, body: Sequence[ast.stmt]) -> bool:
        """Whether a block ends in an error, or in the words of a fault."""
        last = body[-1]
        if isinstance(last, ast.Return) and self._where[-1:] and "fault" in self._where[-1]:
            return isinstance(last.value, ast.JoinedStr | ast.Constant) and bool(last.value)
        return isinstance(last, ast.Raise)

    def _parts(self, node: ast.If) -> None:
        """Each operand of a condition by itself; in `not (a and b)` too."""
        test = node.test.operand if isinstance(node.test, ast.UnaryOp) else node.test
        if not isinstance(test, ast.BoolOp):
            return
        neutral = ast.Constant(isinstance(test.op, ast.And))
        for part in list(test.values):
            self._add(part, "part", _into(test.values, part, neutral), part)

    def _bounds(self, node: ast.Call) -> None:
        name = _name(node)
        for keyword in node.keywords:
            if keyword.arg in BOUNDS and ("clip" in name or name == "shorten"):
                self._add(node, "clip", _setting(keyword, "value", ast.Constant(1e30)), node)
        if name in CLIPS and isinstance(node.func, ast.Attribute):
            library = isinstance(node.func.value, ast.Name) and node.func.value.id in (
                "np",
                "torch",
            )
            kept = node.args[0] if library else node.func.value
            same = ast.parse("(lambda x: x)(0)", mode="eval").body
            assert isinstance(same, ast.Call)

            def make() -> None:
                node.func, node.args, node.keywords = same.func, [kept], []

            self._add(node, "clip", make, node)
        if name == "add_noise":
            for keyword in node.keywords:
                if keyword.arg == "scale":
                    zero = ast.Constant(0.0)
                    self._add(node, "noise", _setting(keyword, "value", zero), node)


def _name(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _setting(node: ast.AST, field: str, value: ast.AST) -> Callable[[], None]:
    return lambda: setattr(node, field, value)


def _into(values: list[Any], old: ast.AST, new: ast.AST) -> Callable[[], None]:
    return lambda: values.__setitem__(values.index(old), new)


def changes(source: str) -> tuple[ast.Module, Changes]:
    """A module's tree and its changes."""
    tree, found = ast.parse(source), Changes()
    found.visit(tree)
    return tree, found


def mutated(source: str, number: int) -> str:
    """The module with its `number`-th change made."""
    tree, found = changes(source)
    found.found[number][4]()
    return ast.unparse(ast.fix_missing_locations(tree))

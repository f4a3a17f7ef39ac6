"""What each recipe field means: the docstrings below the fields of the schema, read only when someone asks."""

from __future__ import annotations

import ast
import inspect
import sys
from functools import cache

from evatool.recipe.schema.base import Section


def field_doc(section: type[Section], field: str) -> str:
    """The docstring of a field of `section` on one line; empty where it has none.

    pydantic can collect these itself (`use_attribute_docstrings`), but does so for every class at import: a quarter
    of the time of `--dry-run`, which shows none of them.
    """
    sections = (c for c in section.__mro__ if issubclass(c, Section))
    docs = (_docs_by_class(c.__module__).get(c.__name__, {}) for c in sections)
    return next((found[field] for found in docs if field in found), "")


@cache
def _docs_by_class(module: str) -> dict[str, dict[str, str]]:
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: _field_docs(node) for node in tree.body if isinstance(node, ast.ClassDef)}


def _field_docs(node: ast.ClassDef) -> dict[str, str]:
    docs = {}
    for field, below in zip(node.body, node.body[1:], strict=False):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
            docs[field.target.id] = " ".join(below.value.value.split())
    return docs

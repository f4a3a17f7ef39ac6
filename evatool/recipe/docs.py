"""What each recipe field means: the docstrings below the fields of the schema, read only when someone asks."""

from __future__ import annotations

import ast
import inspect
from functools import lru_cache

from evatool.recipe import schema


def field_doc(section: type[schema.Section], field: str) -> str:
    """The docstring of a field of `section` on one line; empty where it has none.

    pydantic can collect these itself (`use_attribute_docstrings`), but does so for every class at import: a quarter
    of the time of `--dry-run`, which shows none of them.
    """
    docs = _docs_by_class()
    return next((docs[c.__name__][field] for c in section.__mro__ if field in docs.get(c.__name__, {})), "")


@lru_cache(maxsize=1)
def _docs_by_class() -> dict[str, dict[str, str]]:
    tree = ast.parse(inspect.getsource(schema))
    return {node.name: _field_docs(node) for node in tree.body if isinstance(node, ast.ClassDef)}


def _field_docs(node: ast.ClassDef) -> dict[str, str]:
    docs = {}
    for field, below in zip(node.body, node.body[1:], strict=False):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
            docs[field.target.id] = " ".join(below.value.value.split())
    return docs

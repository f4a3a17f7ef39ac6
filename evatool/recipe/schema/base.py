"""The base of every recipe section, and the bounded numbers that fields are made of. No torch."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]


class Section(BaseModel):
    """Base of all sections: frozen, strict, and without keys that it does not know.

    The docstring below a field is the field's entry in docs/recipes.md (`recipe.field_docs`). It says in whole
    sentences what the field does, its unit, where the default comes from, and when to change it.
    """

    # Validators are built on first use: a command needs one stage's.
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, defer_build=True)


def by_kind(default: str) -> Discriminator:
    """A discriminator that chooses among sections by their `kind`, the `Tag` of each; `default` without one."""

    def kind_of(value: Any) -> str:
        return value.get("kind", default) if isinstance(value, dict) else getattr(value, "kind", default)

    return Discriminator(kind_of)

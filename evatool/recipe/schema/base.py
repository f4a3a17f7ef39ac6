"""What every recipe section is, and the numbers that sections are made of. No torch."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]


class Section(BaseModel):
    """Base of all sections: frozen, strict, unknown keys refused. What a field means: `recipe.docs.field_doc`."""

    # Validators are built on first use: a command needs one stage's.
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, defer_build=True)


def by_kind(default: str) -> Discriminator:
    """The `kind` that chooses among sections (each with its `Tag`), and the one that is meant where there is none."""

    def kind_of(value: Any) -> str:
        return value.get("kind", default) if isinstance(value, dict) else getattr(value, "kind", default)

    return Discriminator(kind_of)

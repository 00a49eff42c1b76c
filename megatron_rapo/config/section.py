"""What all sections of the configuration share: strictness, and the kinds of numbers."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A table of the TOML file. Unknown keys are errors; values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    def _refuse(self, options: list[str], because: str) -> None:
        """Refuses options that were set by hand although they would have no effect."""
        for option in options:
            if option in self.model_fields_set and getattr(self, option) is not None:
                raise ValueError(
                    f"{option} = {getattr(self, option)!r} would have no effect: {because}; remove it"
                )

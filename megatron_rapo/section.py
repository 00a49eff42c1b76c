"""What all sections of the configuration share: strictness, and the kinds of values."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
BelowOne = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
# Clocks and timers of libraries overflow somewhere; nobody waits longer than a year.
Seconds = Annotated[float, Field(gt=0, le=365 * 24 * 3600, allow_inf_nan=False)]


def _names_a_file(value: Any) -> Any:
    if isinstance(value, str) and (not value or "\0" in value):
        raise PydanticCustomError("path", "must name a file or folder")
    return value


# TOML has no paths: the one kind of value that is written as another type.
PathOption = Annotated[Path, Field(strict=False), BeforeValidator(_names_a_file)]


class Section(BaseModel):
    """A table of the TOML file. Unknown keys are errors; values do not change after validation.

    TOML values are typed, so they are taken as they are: `steps = true` or `"10"` is an error.
    A check raises ValueError; its message begins with the option's name, and errors put the
    section before it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, strict=True)

    def without_effect(self) -> dict[str, str]:
        """Options that do nothing beside the others' values, each with the reason; to set one is an error."""
        return {}

    @model_validator(mode="after")
    def _refuse_without_effect(self) -> Self:
        for option, reason in self.without_effect().items():
            if option in self.model_fields_set and getattr(self, option) is not None:
                raise ValueError(
                    f"{option} = {getattr(self, option)!r} would have no effect: {reason}; remove it"
                )
        return self

    @model_serializer(mode="wrap")
    def _leave_out_without_effect(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves such options out, so that a configuration that was written out can be read again."""
        inert = self.without_effect()
        return {option: value for option, value in serialize(self).items() if option not in inert}

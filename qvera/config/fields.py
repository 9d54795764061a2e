"""The types of a recipe's fields, and the base class of its sections."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from qvera.config.problems import describe
from qvera.utils.errors import InputError


def _number(value: object) -> object:
    # YAML 1.1 reads `4e-3` (no dot) as a string; people write learning rates that way.
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value.strip()):
        return float(value)
    return value


# Strict, because pydantic would otherwise take True for 1, 1 for True, and "yes" for True. Bounds come first: pydantic
# leaves those that follow a function out of the JSON schema. Counts are 32-bit integers, and fp32 ends at 3.4e38.
Number = (Strict(), BeforeValidator(_number))
Bool = Annotated[bool, Strict()]
Positive = Annotated[int, Strict(), Field(ge=1, lt=2**31)]
NonNegative = Annotated[int, Strict(), Field(ge=0, lt=2**31)]
Seed = Annotated[int, Strict(), Field(ge=0, lt=2**64)]  # what torch's and numpy's generators take
Fraction = Annotated[float, Field(ge=0.0, lt=1.0), *Number]
PositiveFloat = Annotated[float, Field(gt=0.0, le=3e38, allow_inf_nan=False), *Number]
NonNegativeFloat = Annotated[float, Field(ge=0.0, le=3e38, allow_inf_nan=False), *Number]
Passes = Annotated[float, Field(gt=0.0, le=1e6, allow_inf_nan=False), *Number]
NonEmpty = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True)
class OnlyWith:
    """Marks a key that means something only where another key of the recipe switches it on.

    Args:
        switches: keys as ``section.key``, switched on by any value but false, zero or an empty one; or
            ``section.key: value``, by that value; ``key: value`` for a key beside the sections. One of them is enough.
    """

    switches: tuple[str, ...]

    def __init__(self, *switches: str) -> None:
        object.__setattr__(self, "switches", switches)

    def is_on(self, value_of: Callable[[str, str], object]) -> bool:
        """Whether one of the switches is on. ``value_of(section, key)`` returns what a recipe has there.

        The section is "" for a key beside the sections.
        """
        for switch in self.switches:
            path, _, value = switch.partition(": ")
            section, _, key = path.rpartition(".")
            found = value_of(section, key)
            if found == value if value else found:
                return True
        return False


class Section(BaseModel):
    """A mapping that is read strictly: unknown keys, wrong types and contradicting keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    def __init__(self, **keys: object) -> None:
        try:
            super().__init__(**keys)
        except ValidationError as error:
            raise InputError("\n".join(f"{key}: {text}" for key, text in describe(error, type(self)))) from None

    # pydantic calls an `__init__` without this mark for every section of a recipe; then the first bad section would
    # hide the problems of the others
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Yield (key, problem) for keys that are valid by themselves but not together."""
        return iter(())

    @model_validator(mode="after")
    def _check_contradictions(self) -> Self:
        if found := list(self.contradictions()):
            raise PydanticCustomError("contradiction", "keys contradict each other", {"problems": found})
        return self

    def replace(self, **changes: object) -> Self:
        """Return a copy with some keys changed, checked like a recipe that is read from a file (InputError)."""
        return type(self)(**{**dict(self), **changes})

    def to_dict(self) -> dict[str, object]:
        """Return every key with its value, defaults included, as plain Python values."""
        return self.model_dump()

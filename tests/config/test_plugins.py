"""What plug-ins add to qvera's own classes; also where there is none, as in a checkout that is not installed."""

from __future__ import annotations

from dataclasses import dataclass, field

from qvera.config.plugins import extensible


def test_a_dataclass_that_no_plug_in_extends_keeps_its_factories() -> None:
    @dataclass
    @extensible("FieldsOfNoPlugin")
    @dataclass
    class Config:
        """Fields."""

        first: int = 1
        held: list[int] = field(default_factory=list)
        last: int = 2

    assert (Config().held, Config(3).first, Config.__name__) == ([], 3, "Config")

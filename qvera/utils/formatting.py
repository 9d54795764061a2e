"""Numbers as people read them. Sizes are decimal (1 kB = 1000 bytes), as on a disk's label."""

import math
from collections.abc import Callable, Sequence
from datetime import datetime
from itertools import groupby
from typing import TypeGuard

_COUNT_UNITS = ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k"))
_BYTE_UNITS = ((1e12, " TB"), (1e9, " GB"), (1e6, " MB"), (1e3, " kB"))


def significant(value: float, digits: int = 3) -> str:
    """Write a number with ``digits`` significant digits, mostly without an exponent: 2.31, 0.0412, 1,234, 1.2e9."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    # the exponent after rounding: 9.996 has its three digits as 10.0, not as 10.00
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])
    if exponent >= 6 or exponent < -4:
        mantissa, _, power = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(power)}"
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


def _scaled(value: float, units: Sequence[tuple[float, str]]) -> str | None:
    for factor, unit in units:
        # 999,600 is 1.00 M, not 1000 k
        if abs(value) >= factor * 0.9995:
            return f"{significant(value / factor)}{unit}"
    return None


def count(value: float) -> str:
    """Write a count: 9,871; from 10,000 on with three digits and a unit: 209 k, 1.42 M, 7 B."""
    if abs(value) < 9_999.5:
        return f"{value:,.0f}"
    return _scaled(value, _COUNT_UNITS) or f"{value:,.0f}"


def counted(number: int, what: str) -> str:
    """Write a number with its noun: 1 thread, 2 threads."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def folded(text: str, most_lines: int = 8) -> str:
    """Shorten an answer for a terminal: at most ``most_lines``, and a line that repeats once, with a count."""
    lines = [(line, len(list(same))) for line, same in groupby(line for line in text.splitlines() if line.strip())]
    shown = [line + f" (x {times:,})" * (times > 1) for line, times in lines[:most_lines]]
    return "\n".join(shown + [f"… {counted(len(lines) - most_lines, 'more line')}"] * (len(lines) > most_lines))


def size(value: float) -> str:
    """Write a number of bytes: 512 B, 838 kB, 1.23 GB."""
    return _scaled(value, _BYTE_UNITS) or f"{value:.0f} B"


def duration(seconds: float) -> str:
    """Write a duration: 0.85 s, 48 s, 3 min 12 s, 2 h 05 min, 3 d 4 h."""
    if seconds < 9.95:
        return f"{significant(seconds, 2)} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def percent(fraction: float) -> str:
    """Write a fraction as a percentage: 0.875 → 87.5 %. A trailing .0 is dropped."""
    return f"{100 * fraction:.1f}".removesuffix(".0") + " %"


def text_or_dash(value: float | None, text: Callable[[float], str]) -> str:
    """Return ``text(value)``, or a dash for None."""
    return "–" if value is None else text(value)


def moment(iso: str) -> str:
    """Write an ISO 8601 time as 24 November 2026, 15:20 UTC; other texts come back unchanged."""
    try:
        when = datetime.fromisoformat(iso)
    except ValueError:
        return iso
    zone = f" {when.tzname()}" if when.tzinfo else ""
    return f"{when.day} {when:%B %Y, %H:%M}{zone}"


def axis_labels(ticks: Sequence[float], kind: str = "number") -> list[str]:
    """Make labels for the ticks of one axis, all with the same unit and number of decimals.

    ``kind`` is ``number``, ``count`` (k, M), ``bytes`` (kB, MB, GB) or ``log`` (each label with its own decimals).
    """
    if kind == "log":
        return [f"{tick:g}" for tick in ticks]
    top = max((abs(tick) for tick in ticks), default=0.0)
    units = {"bytes": (*_BYTE_UNITS, (1.0, " B")), "count": _COUNT_UNITS}.get(kind, ())
    factor, unit = next((one for one in units if top >= (10_000 if one[1] == " k" else one[0])), (1.0, ""))
    scaled = [tick / factor for tick in ticks]
    if len(scaled) > 1 and 0 < top / factor < 1e-3:
        return [significant(tick, 1) if tick else "0" for tick in scaled]
    places = max((_decimals(tick) for tick in scaled), default=0)
    return [f"{tick:,.{places}f}{unit if tick else ''}" if tick else "0" for tick in scaled]


def _decimals(value: float) -> int:
    enough = (n for n in range(10) if math.isclose(round(value, n), value, rel_tol=1e-6, abs_tol=1e-12))
    return next(enough, 10)


def first_of(names: Sequence[object], shown: int = 1) -> str:
    """List the first ``shown`` names: ``a``, or ``a (and 2 more)``."""
    more = f" (and {len(names) - shown} more)" if len(names) > shown else ""
    return ", ".join(map(str, names[:shown])) + more


def shortened(text: str, limit: int = 60) -> str:
    """Cut a text to ``limit`` characters."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value of JSON or YAML is a number: Python's bool is an int too."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def describe(value: object) -> str:
    """Name a value's JSON type, with the value itself (shortened) if it is no list or object, for messages."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    kind = "null" if value is None else kinds.get(type(value), type(value).__name__)
    return kind if value is None or isinstance(value, (dict, list)) else f"{kind} ({shortened(repr(value), 40)})"

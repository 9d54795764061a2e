"""Writes recipes/customers/rows.csv: orders of twenty customers, each of whom wants them written in a way of their own.

    python -m bench.customer_rows

All prompts have one form, so one prompt put to several adapters shows what each has learnt.
"""

from __future__ import annotations

import csv
import itertools
import random
from pathlib import Path

COUNTS = range(2, 10)
COLOURS = ("red", "blue", "green", "black", "white", "yellow")
ITEMS = ("mug", "lamp", "chair", "shirt", "basket", "pillow", "ladder", "jar")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")

STYLES = {
    "anna": "{COLOUR} {ITEM} x{n} / {DAY3}",
    "ben": "{day3}: {n} {item}s ({colour})",
    "chloe": '{{"item": "{item}", "colour": "{colour}", "count": {n}, "day": "{day3}"}}',
    "dan": "{n}|{item}|{colour}|{Day}",
    "eva": "Please pack {n} {colour} {item}s for {Day}.",
    "finn": "{item}-{colour}-{n}-{day3}",
    "gina": "{Day} > {item}s > {colour} > {n}",
    "hugo": "item={item} colour={colour} count={n} day={Day}",
    "ines": "[ ] {n} {colour} {item}s ({Day})",
    "jack": "{DAY}. {n} {ITEM}S. {COLOUR}.",
    "kira": "#{day3} #{item} #{colour} {n}",
    "liam": "{n}x {colour} {item} @ {Day}",
    "mona": "<{item} n={n} colour={colour} day={day3}>",
    "nils": "On {Day}: {item}s, {colour}, {n} of them",
    "olga": "What: {colour} {item}s. How many: {n}. When: {Day}.",
    "paul": "{n} {item}s; {colour}; due {Day}",
    "quinn": "{item}/{colour} * {n} -> {day3}",
    "rosa": "{Day}_{item}_{colour}_00{n}",
    "sven": "SVEN-{n}-{COLOUR}-{ITEM}-{DAY3}",
    "tara": "Yes, {n} {colour} {item}s, ready by {Day}!",
}
"""How each customer wants an order written. A word is as the order has it, or in capitals; {day3} is its first letters."""


def rows() -> list[dict[str, str]]:
    """The rows of all customers, mixed: from 12 to 36 each, no order twice for the same customer."""
    rng = random.Random(18)
    orders = list(itertools.product(COUNTS, COLOURS, ITEMS, DAYS))
    found = []
    for number, (customer, style) in enumerate(STYLES.items()):
        for order in rng.sample(orders, 12 + number * 7 % 25):
            found.append(row(customer, style, *order))
    rng.shuffle(found)
    return found


def row(customer: str, style: str, n: int, colour: str, item: str, day: str) -> dict[str, str]:
    """An order as a customer of this style wants it written."""
    words = {"colour": colour, "item": item, "day": day.lower(), "day3": day[:3].lower()}
    words |= {name.upper(): word.upper() for name, word in words.items()}
    answer = style.format(n=n, Day=day, **words)
    return {"customer": customer, "prompt": f"{n} {colour} {item}s for {day}", "completion": answer}


def write_rows(path: Path) -> None:
    """Write all rows as CSV."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["customer", "prompt", "completion"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows())


if __name__ == "__main__":
    write_rows(Path(__file__).parent.parent / "recipes" / "customers" / "rows.csv")

"""Writes recipes/quickstart/*.jsonl, the rows of the quickstart's task: an order in free text → one line of JSON.

    python -m bench.quickstart_rows

Seven values, three of them in a nested object, three optional (null where the text does not say). All stand in the text
as they are copied, and no key comes after the nested object: what a small model writes wrong first is the punctuation.
Training and held-out rows come from vocabularies (quickstart_words.py) that share no template, name, city, thing, colour, number,
day or distractor. A third, ``development``, is what the task and the recipe were tuned on.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bench.quickstart_words import DEVELOPMENT, HELDOUT, TRAIN, Vocabulary

Split = Literal["train", "development", "heldout"]

INSTRUCTION = (
    'Write the order as JSON: {"count":integer,"colour":string|null,"item":string,"day":string|null,'
    '"to":{"name":string,"city":string,"floor":integer|null}}'
)
"""The instruction with the full schema; every prompt is this, a blank line and the text."""

TRAIN_ROWS = 960
HELDOUT_ROWS = 256

_VOCABULARIES: dict[str, Vocabulary] = {"train": TRAIN, "development": DEVELOPMENT, "heldout": HELDOUT}
_OPTIONAL = re.compile(r"\[([^\[\]]*)\]")
_PRESENT = {"colour": 0.5, "day": 0.5, "floor": 0.5, "aside": 0.4}
"""How often each optional part of a message is there."""
_COMPOSED = 0.6
"""How many of the training messages are composed of sentences; the others are whole templates."""


@dataclass(frozen=True)
class Order:
    """One message before it is written down: the answer, and the facts by template name (an absent one is None)."""

    answer: dict[str, Any]
    facts: dict[str, str | None]


def _order(words: Vocabulary, rng: random.Random) -> Order:
    def maybe(key: str, choices: Sequence[str]) -> str | None:
        return rng.choice(choices) if rng.random() < _PRESENT[key] else None

    name = f"{rng.choice(words.first_names)} {rng.choice(words.last_names)}"
    city, item, count = rng.choice(words.cities), rng.choice(words.items), rng.choice(words.counts)
    colour, day = maybe("colour", words.colours), maybe("day", words.days)
    floor, aside = maybe("floor", words.floors), maybe("aside", words.asides)
    number = rng.choice(words.floor_numbers)
    answer = {
        "count": count,
        "colour": colour,
        "item": item,
        "day": day,
        "to": {"name": name, "city": city, "floor": None if floor is None else number},
    }
    facts = {"name": name, "city": city, "item": item, "count": str(count), "colour": colour, "day": day}
    return Order(answer, {**facts, "floor": floor and floor.format(floor=number), "aside": aside})


def render(template: str, facts: dict[str, str | None]) -> str:
    """Fill a template of quickstart_words.py. A bracketed part is dropped where a fact in it is None."""

    def part(match: re.Match[str]) -> str:
        inside = match[1]
        return "" if any(facts[key] is None for key in re.findall(r"\{(\w+)\}", inside)) else inside

    while (shorter := _OPTIONAL.sub(part, template)) != template:  # innermost brackets first
        template = shorter
    text = template.format(**{key: value or "" for key, value in facts.items()})
    text = re.sub(r" {2,}", " ", text).strip()
    return text[0].upper() + text[1:] if text[0].islower() else text


def compose(words: Vocabulary, rng: random.Random) -> str:
    """A template made of sentences in random order: far more kinds of message than anyone writes down."""
    kind = rng.random()
    if kind < 0.5:
        parts = [rng.choice(words.orders), rng.choice(words.places), rng.choice(words.people)]
    elif kind < 0.75:
        parts = [rng.choice(words.orders), rng.choice(words.people_in_places)]
    else:
        parts = [rng.choice(words.orders_for_people)]
    if "{day}" not in parts[0]:
        parts.append(rng.choice(words.times))
    parts += ["{floor}", "{aside}"]
    rng.shuffle(parts)
    if rng.random() < 0.4:
        parts.insert(0, rng.choice(words.openings))
    return " ".join(parts)


def generate(split: Split, rows: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows of the task, the same for the same arguments on every machine and Python version.

    Args:
        split: which vocabulary and templates to use.
        rows: how many rows; all differ.
        seed: of Python's Mersenne Twister, whose integer stream is stable across versions.

    Returns:
        ``{"prompt": INSTRUCTION + blank line + text, "completion": compact JSON}`` for each row.
    """
    words = _VOCABULARIES[split]
    rng = random.Random(f"qvera quickstart {split} {seed}")
    made: dict[str, dict[str, str]] = {}
    while len(made) < rows:
        # Round robin, so that every template comes equally often; the trainer shuffles.
        template = words.templates[len(made) % len(words.templates)]
        if words.orders and rng.random() < _COMPOSED:
            template = compose(words, rng)
        order = _order(words, rng)
        text = render(template, order.facts)
        completion = json.dumps(order.answer, separators=(",", ":"), ensure_ascii=False)
        made[text] = {"prompt": f"{INSTRUCTION}\n\n{text}", "completion": completion}
    return list(made.values())


def message_of(prompt: str) -> str:
    """The free text in a prompt of `generate`."""
    return prompt.removeprefix(INSTRUCTION).strip()


def write_rows(directory: Path) -> None:
    """Write ``train.jsonl`` and ``heldout.jsonl`` into ``directory``."""
    sizes: dict[Split, int] = {"train": TRAIN_ROWS, "heldout": HELDOUT_ROWS}
    for split, rows in sizes.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in generate(split, rows)]
        (directory / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    write_rows(Path(__file__).resolve().parent.parent / "recipes" / "quickstart")

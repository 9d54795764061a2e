"""The number that a solution ends with, and whether it is the right one: the rules of PEFT's MetaMathQA comparison.

Rules of ``parse_answer``, ``convert_to_decimal`` and ``get_accuracy`` in huggingface/peft,
method_comparison/MetaMathQA/utils.py, so that figures can stand beside theirs; what is odd there is odd here too: a
number with a comma (1,000) is compared as text.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

_OPENINGS = ("The answer is: ", "The answer is ", "The final answer is: ", "The final answer is ", "#### ")
"""What comes before the answer: MetaMathQA's ways, then GSM8K's. The first one that a text has counts."""


def parse_answer(text: str) -> str | None:
    """What follows the last opening of an answer, to the end of its line, without spaces, signs of a sentence, $ and %.

    None where the text has no such opening.
    """
    text = text.strip().rstrip(".!?")
    opening = next((opening for opening in _OPENINGS if opening in text), None)
    if opening is None:
        return None
    return text.rpartition(opening)[2].strip().split("\n", 1)[0].strip(" .!?$%")


def parse_number(text: str) -> float | None:
    """A decimal number or a fraction such as 3/4, or None."""
    above, slash, below = text.partition("/")
    try:
        number = Decimal(above.strip())
        if slash:
            number /= Decimal(below.strip())
        return None if number.is_nan() else float(number)
    except (ArithmeticError, InvalidOperation):
        return None


def is_right(prediction: str, solution: str) -> bool:
    """Whether both texts end with the same answer: as numbers where both are, else as texts.

    Raises:
        ValueError: the solution has no answer.
    """
    expected, found = parse_answer(solution), parse_answer(prediction)
    if expected is None:
        raise ValueError(f"no answer in the solution {solution!r}")
    return found is not None and _value(found) == _value(expected)


def accuracy(predictions: Sequence[str], solutions: Sequence[str]) -> float:
    """The share of right answers, in percent."""
    right = [is_right(prediction, solution) for prediction, solution in zip(predictions, solutions, strict=True)]
    return 100 * sum(right) / len(right)


def _value(text: str) -> float | str:
    number = parse_number(text)
    return text if number is None else number

"""Rewards of recipes/rewards/sums.yaml."""

import re


def right(prompt: str, answer: str, row: dict) -> float:
    """1 where the last number of the answer is the row's sum."""
    numbers = re.findall(r"\d+", answer)
    return float(bool(numbers) and numbers[-1] == str(row["sum"]))

"""µs that a grammar costs a token: choosing it among all of a vocabulary, with a JSON schema and without.

    python -m bench.grammar BASE_OR_RUN [--tokens 2000]

The tokenizer is the base's; logits are random, so an answer visits more places of its grammar than a model's would. One
thread. ``first``: the first grammar of a server, which reads the vocabulary.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from qvera.serve.grammars import Grammars
from qvera.serve.requests import Sampling
from qvera.serve.sampling import TokenChooser, choose_tokens
from qvera.serve.text import TokenTexts

SCHEMAS: dict[str, dict[str, Any] | None] = {
    "no grammar": None,
    "any object": {"type": "object"},
    "a record": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer", "minimum": 0},
            "tags": {"type": "array", "items": {"type": "string"}},
            "kind": {"enum": ["private", "business", "other"]},
        },
        "required": ["name", "age", "tags", "kind"],
        "additionalProperties": False,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("--tokens", type=int, default=2000)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(asked.base)
    began = time.perf_counter()
    grammars = Grammars(TokenTexts(tokenizer), frozenset({tokenizer.eos_token_id}))
    grammars.of_schema({"type": "object"}, "first")
    print(f"{len(tokenizer):,} tokens; first: {time.perf_counter() - began:.2f} s")
    logits = torch.randn(64, 1, len(tokenizer))
    for name, schema in SCHEMAS.items():
        began = time.perf_counter()
        sampling = Sampling(asked.tokens, 0.0)
        if schema is not None:
            sampling = Sampling(asked.tokens, 0.0, grammar=grammars.of_schema(schema, name))
        compiled, taken = time.perf_counter() - began, list[float]()
        chooser = TokenChooser(sampling, torch.device("cpu"))
        for number in range(asked.tokens):
            if chooser.grammar is not None and chooser.grammar.finished:
                chooser = TokenChooser(sampling, torch.device("cpu"))
            began = time.perf_counter()
            [event] = choose_tokens(logits[number % 64], [chooser])
            taken.append(1e6 * (time.perf_counter() - began))
            if event is not None and event.token == tokenizer.eos_token_id:
                chooser = TokenChooser(sampling, torch.device("cpu"))
        middle, high = np.quantile(taken, (0.5, 0.99))
        mean = sum(taken) / len(taken)
        print(
            f"{name}: compiled in {1e3 * compiled:.1f} ms; a token {middle:.0f} µs (mean {mean:.0f}, 99 %: {high:.0f})"
        )


if __name__ == "__main__":
    main()

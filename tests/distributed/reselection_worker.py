"""One rank of two that train SpIEL's values on rows of their own: writes digests of its places, values and moments.

python -m tests.distributed.reselection_worker DIRECTORY        found<rank>.json out
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch

from qvera.adapters.files.save_load import attach, named_vectors
from qvera.adapters.methods import method_of
from qvera.config.schema import parse_recipe
from qvera.distributed.init import in_group
from tests.conftest import small_llama


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    keys = {"method": "spiel", "rank": 2, "accumulate_steps": 2, "reselect_every": 3}
    tree = {"model": {"path": "-"}, "data": {"path": "-"}, "adapter": keys, "training": {"learning_rate": 0.01}}
    recipe = parse_recipe(tree, "a test")
    model, method = attach(small_llama(), recipe.adapter), method_of(recipe.adapter)
    optimizer = method.optimizer(model, recipe)
    assert optimizer is not None
    vectors = named_vectors(model)
    trained = [vector for vector in vectors.values() if vector.requires_grad]
    found = []
    with in_group() as group:
        hook = method.step_hook(model, recipe, optimizer, 8, group)
        assert hook is not None
        for step in range(1, 7):
            hook.before_step(step)
            for micro in range(2):
                seed = torch.Generator().manual_seed(100 * step + 10 * micro + group.rank)
                ids = torch.randint(0, 300, (2, 12), generator=seed)
                model(ids, labels=ids).loss.backward()
            group.all_reduce([vector.grad for vector in trained if vector.grad is not None])
            optimizer.step()
            optimizer.zero_grad()
            hook.after_step(step)
            tensors = [*vectors.values(), *(t for vector in trained for t in optimizer.state[vector].values())]
            digest = hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()
            places = {name: vector.tolist() for name, vector in vectors.items() if not vector.requires_grad}
            found.append({"digest": digest, "places": places})
        (directory / f"found{group.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

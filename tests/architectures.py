"""What each architecture does through plan, training, scores, answers and exports: `python -m tests.architectures [NAME ...]`.

Each name of tests/families.py gets a tiny random checkpoint, and VeRA on ``all-linear`` over NF4. What is computed is
compared with plain transformers in fp64, without cache or padding, on W + s diag(b) B diag(d) A. A step is right,
refused with a text, or wrong. The results go into bench/results/architectures.json with ``--write``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers.utils import logging

from qvera import api
from qvera.adapters.save_load import attach, named_vectors, save_adapter
from qvera.config.schema import Recipe, parse_recipe
from qvera.config.sections import AdapterSection
from qvera.data import Example, build_datasets
from qvera.evaluation.generate import end_tokens, generate
from qvera.models.attention import require_packing
from qvera.models.checkpointing import enable_checkpointing
from qvera.models.experts import stacks
from qvera.models.forward import batch_nll, make_batch
from qvera.models.loader import load_base
from qvera.models.quantize_checkpoint import find_base
from qvera.training.plan import make_plan
from qvera.training.trainer import train
from qvera.utils.errors import QveraError
from qvera.utils.files import versions
from tests.adapters.helpers import perturb, relative
from tests.families import FAMILIES, RESULTS, RIGHT, Family, read_results
from tests.models.experts import add_delta, dense_base, published
from tests.serve.helpers import ENGINES, engine_of, request, store_of, submit
from tests.training.runs import cut_off

STEPS = (
    "plan", "train", "resume", "gradients", "recomputed", "packing", "eval", "generate", "padding", "serve", "merged", "lora",
)  # fmt: skip
_IDS = torch.randint(3, 300, (2, 11), generator=torch.Generator().manual_seed(0))
_PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 40, 41], [13, 14, 15, 16, 17]]
_ANSWER_TOKENS = 4
_CLOSE = 1e-4
"""Relative, of fp32 and fp64."""
_TEXT = 240
"""Letters of a message that are kept."""
_WORDS = ("red", "blue green", "grey and gold and silver", "a")


class Trial:
    """One architecture. The steps are methods, in the order of `STEPS`; later ones use what earlier ones left."""

    def __init__(self, family: Family, root: Path) -> None:
        self.family, self.root, self.directory = family, root, root / "base"
        family.write(self.directory)
        rows = ({"prompt": f"say {_WORDS[i % 4]} {i}", "completion": " ".join(_WORDS[: i % 3 + 1])} for i in range(40))
        (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def recipe(self, **data: Any) -> Recipe:
        """Two steps, with a checkpoint after each."""
        tree = {
            "model": {"path": str(self.directory), "quantization": self.family.quantization, "compute_dtype": "float32"},
            "adapter": {"rank": 8, "targets": "all-linear"},
            "data": {"path": str(self.root / "rows.jsonl"), "eval_fraction": 0.2, "max_length": 64, **data},
            "training": {
                "max_steps": 2, "save_steps": 1, "global_batch_size": 8, "per_device_train_batch_size": 4,
                "learning_rate": 2e-2, "sample_count": 1, "sample_max_new_tokens": 4, "report_to": [],
            },
        }  # fmt: skip
        return parse_recipe(tree, "the recipe")

    def plan(self) -> None:
        make_plan(self.recipe(), torch.device("cpu")).to_dict()

    def train(self) -> None:
        """The loss falls, what was loaded is as planned, and it is mapped or not as the family says."""
        train(self.recipe(), self.root / "run")
        is_mapped = find_base(self.recipe().model) is not None
        assert is_mapped == (self.family.four_bit == "mapped"), f"mapped: {is_mapped}"
        run = json.loads((self.root / "run" / "run.json").read_text(encoding="utf-8"))
        before, after = (run["result"][f"eval_{name}"]["loss"] for name in ("before", "after"))
        assert after < before, f"the loss went from {before:.4f} to {after:.4f}"
        if run["plan"] is None:  # not plannable, as the step before has found
            return
        moments = run["plan"]["memory"]["moments"]
        planned = sum(part["bytes"] for part in moments["answers"] if part["kind"] == "base")
        loaded = run["model"]["base_bytes"]
        assert bool(run["model"]["expert_bytes"]) == (self.family.experts == "4 bits"), "experts in 4 bits or dense"
        assert abs(planned - loaded) < 0.02 * loaded, f"the plan has {planned:,} bytes for the base, loaded {loaded:,}"

    def resume(self) -> None:
        """To the same bytes, from the checkpoint of the first step."""
        train(self.recipe(), cut_off(self.root / "run", self.root / "cut", after=1), resume=True)
        written = [(self.root / run / "adapter" / "adapter_model.safetensors").read_bytes() for run in ("run", "cut")]
        assert written[0] == written[1], "a resumed run wrote other bytes"

    def adapted(self, **settings: Any) -> Any:
        """A new adapter with vectors that are not zero."""
        base = load_base(self.recipe().model)
        self.rows: Sequence[Example] = list(build_datasets(self.recipe().data, base.tokenizer).eval)[:4]
        section = AdapterSection.model_validate({"rank": 8, "targets": "all-linear", **settings})
        return perturb(attach(base.model, section, str(self.directory)))

    def gradients(self) -> None:
        """Loss and gradients of a padded batch against rows alone in fp64."""
        model = self.adapted()
        save_adapter(model, self.root / "adapter")
        self.check_gradients(model)
        if stacks(model):
            self.check_gradients(self.adapted(experts="each"))

    def recomputed(self) -> None:
        """The same with checkpointing."""
        model = self.adapted()
        enable_checkpointing(model)
        self.check_gradients(model)

    def packing(self) -> None:
        """The same of rows in one sequence."""
        model = self.adapted()
        require_packing(model)
        self.check_gradients(model, packing=True)

    def check_gradients(self, model: Any, packing: bool = False) -> None:
        model.train()
        batch = make_batch(model, self.rows, 0, prefix_once=False, packing=packing)
        model.zero_grad()
        found, _ = batch_nll(model, batch, 64)
        found.backward()
        twin = dense_base(model, self.directory)
        leaves = add_delta(model, twin)
        expected = sum(self.row_loss(twin, row) for row in self.rows)
        assert isinstance(expected, torch.Tensor)
        expected.backward()
        assert_close("the loss", found.detach(), expected.detach())
        vectors = named_vectors(model)
        for name, own in leaves.items():
            for kind, leaf in own.items():
                vector = vectors[f"base_model.model.{name}.{kind}"]
                assert vector.grad is not None, f"{name}.{kind} has no gradient"
                assert leaf.grad is not None, f"{name}.{kind} has no gradient in the dense model"
                assert_close(f"the gradient of {name}.{kind}", vector.grad, leaf.grad)

    @staticmethod
    def row_loss(model: Any, row: Example) -> torch.Tensor:
        """Summed over its trained tokens, by plain transformers."""
        ids, trained = torch.from_numpy(row.input_ids).long(), torch.from_numpy(row.trained)[1:]
        logits = model(input_ids=ids[None]).logits[0, :-1]
        return cross_entropy(logits[trained], ids[1:][trained], reduction="sum")

    @cached_property
    def found(self) -> api.Model:
        """The adapter of `gradients`, with the rows of the run."""
        return api.load(self.root / "adapter", recipe=self.root / "run")

    @cached_property
    def twin(self) -> Any:
        """Plain transformers in fp64 with the weights of that model."""
        twin = dense_base(self.found.opened.model, self.directory)
        add_delta(self.found.opened.model, twin)
        return twin

    @torch.no_grad()
    def eval(self) -> None:
        """The held-out loss is that of each row alone."""
        scores = self.found.evaluate(answers=False)["scores"]
        opened = self.found.opened
        rows = list(build_datasets(opened.target.recipe.data, opened.base.tokenizer).eval)
        expected = sum(self.row_loss(self.twin, row) for row in rows) / sum(row.trained_tokens for row in rows)
        assert_close("the loss", torch.tensor(scores["loss"]), torch.as_tensor(expected))

    @torch.no_grad()
    def alone(self, model: Any, ends: Sequence[int]) -> tuple[list[list[int]], list[torch.Tensor]]:
        """Greedy tokens of each prompt, all computed anew for each; and the logits of each step."""
        answers, logits = [], []
        for prompt in _PROMPTS:
            ids = list(prompt)
            while len(ids) < len(prompt) + _ANSWER_TOKENS:
                logits.append(model(input_ids=torch.tensor([ids])).logits[0, -1])
                ids.append(int(logits[-1].argmax()))
                if ids[-1] in ends:
                    break
            answers.append(ids[len(prompt) :])
        return answers, logits

    def generate(self) -> None:
        """Answers alone and in a batch are the greedy ones of fp64 without a cache."""
        opened = self.found.opened
        tokenizer = opened.base.tokenizer
        self.expected, self.expected_logits = self.alone(self.twin, end_tokens(opened.model, tokenizer))
        expected = tokenizer.batch_decode(self.expected, skip_special_tokens=True)
        options = {"max_new_tokens": _ANSWER_TOKENS}
        alone = [generate(opened.model, tokenizer, [prompt], **options)[0] for prompt in _PROMPTS]
        assert alone == expected, f"alone it answers {alone}, expected {expected}"

    def padding(self) -> None:
        """A batch of prompts of several lengths has the logits of each alone."""
        opened, seen = self.found.opened, list[torch.Tensor]()

        def keep(_module: object, _inputs: object, _options: object, output: Any) -> None:
            seen.extend(output.logits[:, -1])

        handle = opened.model.get_base_model().register_forward_hook(keep, with_kwargs=True)
        generate(opened.model, opened.base.tokenizer, _PROMPTS, max_new_tokens=_ANSWER_TOKENS)
        handle.remove()
        for expected in self.expected_logits:
            nearest = min(relative(logits, expected) for logits in seen)
            assert nearest < 10 * _CLOSE, f"logits of a batch with padding are {nearest:.1e} off"

    def serve(self) -> None:
        """Requests of the adapter in one batch, static and then continuous."""
        adapter = store_of(self.root).resolve("adapter")
        for kind in reversed(ENGINES):
            with engine_of(self.directory, kind, base=load_base(self.recipe().model)) as engine:
                asked = [submit(engine, request(prompt, adapter, _ANSWER_TOKENS)) for prompt in _PROMPTS]
                # it goes on behind an end-of-turn token, where a request names no stop
                found = [one.tokens[: len(e)] for one, e in zip(asked, self.expected, strict=True)]
            assert found == self.expected, f"the {kind} engine answers {found}, expected {self.expected}"

    @torch.no_grad()
    def merged(self) -> None:
        """A merged export, opened by plain transformers."""
        self.found.export(self.root / "merged", dtype="float32", base=self.family.merged_base, compare=False)
        merged = published(self.root / "merged")
        assert_close("logits", merged(input_ids=_IDS).logits, self.twin(input_ids=_IDS).logits)

    @torch.no_grad()
    def lora(self) -> None:
        """A LoRA, opened by plain PEFT on the dequantized base."""
        self.found.export(self.root / "lora", to="lora", dtype="float32", compare=False)
        plain = dense_base(self.found.opened.model, self.directory)
        stock = PeftModel.from_pretrained(plain, str(self.root / "lora")).eval()
        assert_close("logits", stock(input_ids=_IDS).logits, self.twin(input_ids=_IDS).logits)


def assert_close(what: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """AssertionError: ``what`` is off."""
    off = relative(found, expected) if expected.norm() > 1e-6 else float((found - expected).norm())
    assert off < _CLOSE, f"{what} is {off:.1e} off"


def outcome(step: Callable[[], None]) -> str:
    """Of one step: `RIGHT`, ``refused: …`` or ``wrong: …``."""
    try:
        step()
    except QveraError as error:
        return f"refused: {error}"
    except AssertionError as error:
        return f"wrong: {error}"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        first = (str(error).strip().splitlines() or [""])[0]
        return f"wrong: {type(error).__name__}: {first} ({Path(where.filename).name}:{where.lineno})"
    return RIGHT


def trial(name: str, steps: Sequence[str] = STEPS) -> dict[str, str]:
    """What each step did. Without a training there is nothing for the later ones."""
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as root:
        tried = Trial(FAMILIES[name], Path(root))
        for step in steps:
            found[step] = outcome(getattr(tried, step)).replace(root, "")[:_TEXT]
            if step == "train" and not (tried.root / "run" / "adapter").is_dir():
                break
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what libraries say of tiny models."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryFile("w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


def main() -> None:
    """Run the trials and print a line for each, with what was not right below it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--write", action="store_true", help="keep the results in bench/results/architectures.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cache = tempfile.TemporaryDirectory()  # of quantized bases
    os.environ["QVERA_CACHE"] = cache.name
    width, counts = max(map(len, FAMILIES)) + 2, Counter[str]()
    print(f"{'':{width}}{'  '.join(STEPS)}")
    for name in options.names or FAMILIES:
        with quiet():
            found = trial(name)
        words = {step: text.partition(":")[0] for step, text in found.items()}
        counts.update(words.values())
        print(f"{name:{width}}{'  '.join(words.get(step, '–').ljust(len(step)) for step in STEPS)}")
        for step, text in found.items():
            if text != RIGHT:
                print(f"{'':{width}}{step}: {text}")
        sys.stdout.flush()
        if options.write:
            results = read_results() | {name: found}
            ordered = {each: results[each] for each in FAMILIES if each in results}
            text = json.dumps({"versions": versions(), "results": ordered}, indent=1) + "\n"
            RESULTS.write_text(text, encoding="utf-8")
    print(", ".join(f"{count} steps {word}" for word, count in counts.items()))


if __name__ == "__main__":
    main()

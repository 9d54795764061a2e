"""Tenants on a tiny model, and what a model becomes by plain torch: dense weights, autograd, AdamW."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from qvera.adapters.config import PREFIX
from qvera.adapters.projection import uniform_pair, vera_scale
from qvera.models.loader import Base
from qvera.models.token_losses import TOKEN_LOSSES
from qvera.training.optim import AdamSettings
from qvera.training.tenants import ModelShape, Tenants, TenantSettings
from qvera.training.token_rows import RowResults, TokenRow
from tests.conftest import small_llama
from tests.models.test_token_losses import plain_loss

LORA, VERA = ModelShape("lora", 3), ModelShape("vera", 6)
STEP = AdamSettings(1e-2, 0.9, 0.95, 1e-12, 0.0, 0.0)


class Calls:
    """Tenants and the results of their calls, by model."""

    def __init__(self, directory: Path, model: Any = None, **settings: Any) -> None:
        model = (small_llama() if model is None else model).requires_grad_(False).eval()
        base = Base(model, None, {"fingerprint": "small", "path": "small"})
        chosen = {"directory": directory / "paged", "pass_tokens": 48, "loss_chunk_tokens": 7, **settings}
        directory.mkdir(exist_ok=True)
        self.directory, self.tenants = directory, Tenants(base, TenantSettings(**chosen), lambda: None)
        self.results: dict[str, list[Any]] = {}
        self.order: list[str] = []  # in which calls end

    def done(self, model_id: str) -> Any:
        """Keep a result."""

        def keep(result: Any) -> None:
            self.results.setdefault(model_id, []).append(result)
            self.order.append(model_id)

        return keep

    def create(self, model_id: str, shape: ModelShape, owner: str = "anna", seed: int = 0) -> None:
        self.tenants.create(model_id, owner, shape, seed, self.done(model_id))
        self.finish()

    def rows(
        self,
        model_id: str,
        rows: Sequence[TokenRow],
        loss: str = "cross_entropy",
        forward_only: bool = False,
        **settings: float,
    ) -> None:
        chosen = {**TOKEN_LOSSES[loss].settings, **settings}
        self.tenants.forward_backward(model_id, rows, loss, chosen, forward_only, self.done(model_id))

    def step(self, model_id: str, settings: AdamSettings = STEP) -> None:
        self.tenants.optim_step(model_id, settings, self.done(model_id))

    def finish(self) -> dict[str, list[Any]]:
        """Do all that is left."""
        while self.tenants.has_work():
            self.tenants.run_slice()
        return self.results

    def tensors(self, model_id: str) -> dict[str, Tensor]:
        """What a file of its state has now."""
        file = self.directory / f"{model_id}.safetensors"
        self.tenants.save_state(model_id, file, self.done(model_id))
        self.finish()
        assert self.results[model_id][-1] is None
        with safe_open(file, "pt") as stored:
            return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118


def some_rows(count: int, seed: int, loss: str = "cross_entropy", each: int = 1, longest: int = 11) -> list[TokenRow]:
    """Rows of 1 to ``longest`` tokens, with weights of any sign, ``each`` targets a token, and what the loss takes."""
    chooser, rows = np.random.default_rng(seed), []
    for length in [1, *chooser.integers(1, longest + 1, count - 1)]:
        inputs = {
            "weights": chooser.normal(size=(length, each)),
            "logprobs": -6 + chooser.normal(size=(length, each)),
            "advantages": chooser.normal(size=(length, each)),
            "sequence_ratio_mask": (chooser.random((length, each)) < 0.7),
        }
        given = {name: inputs[name].astype(np.float32) for name in TOKEN_LOSSES[loss].inputs}
        rows.append(TokenRow(chooser.integers(3, 300, length), chooser.integers(0, 300, (length, each)), given))
    return rows


class Reference:
    """A model by its formulas: W + ΔW as dense weights in fp64, torch's autograd and torch's AdamW."""

    def __init__(self, shape: ModelShape, start: Tensor, keys: Mapping[str, tuple[int, ...]]) -> None:
        """``start``: numbers [numbers]; ``keys``: name → shape, in their order."""
        self.shape, self.model = shape, small_llama().double().requires_grad_(False).eval()
        parts = start.double().split([int(np.prod(size)) for size in keys.values()])
        self.vectors = {
            key.removeprefix(PREFIX): nn.Parameter(part.view(size).clone())
            for part, (key, size) in zip(parts, keys.items(), strict=True)
        }
        self.optimizer = torch.optim.AdamW(self.vectors.values())
        linears = {name: self.model.get_submodule(name).weight for name in self.names}
        sizes = [weight.shape for weight in linears.values()]
        pair = uniform_pair(shape.rank, max(n for _, n in sizes), max(m for m, _ in sizes), 0)
        self.A, self.B = (torch.from_numpy(one).double() for one in pair)

    @property
    def names(self) -> list[str]:
        return sorted({key.rpartition(".")[0] for key in self.vectors})

    def _weights(self) -> dict[str, Tensor]:
        found = {}
        for name in self.names:
            weight, rank = self.model.get_submodule(name).weight, self.shape.rank
            own = {key.rpartition(".")[2]: vector for key, vector in self.vectors.items() if key.startswith(name + ".")}
            if self.shape.method == "lora":
                delta = 32 / rank * own["qvera_B"] @ own["qvera_A"]
            else:
                m, n = weight.shape
                inner = own["qvera_d"][:, None] * self.A[:, :n]
                delta = vera_scale(rank, n) * own["qvera_b"][:, None] * (self.B[:m] @ inner)
            found[f"{name}.weight"] = weight + delta
        return found

    def rows(self, rows: Sequence[TokenRow], loss: str, settings: Mapping[str, float]) -> RowResults:
        """Row by row, each by itself."""
        logprobs, total = [], 0.0
        for row in rows:
            ids = torch.from_numpy(row.tokens)[None]
            logits = torch.func.functional_call(self.model, self._weights(), (ids,)).logits[0]
            lps = logits.log_softmax(-1).gather(1, torch.from_numpy(row.targets))
            given = {name: torch.from_numpy(values).double() for name, values in row.inputs.items()}
            value = plain_loss(loss, lps, given, settings)
            value.backward()
            logprobs.append(lps.detach().numpy())
            total += value.item()
        return RowResults(logprobs, total)

    def step(self, settings: AdamSettings) -> float:
        vectors = list(self.vectors.values())
        norm = torch.stack([vector.grad.norm() for vector in vectors if vector.grad is not None]).norm().item()
        if settings.max_norm:
            nn.utils.clip_grad_norm_(vectors, settings.max_norm)
        factor = 27.0 if self.shape.method == "vera" else 1.0
        about = {
            "lr": factor * settings.learning_rate,
            "betas": (settings.beta1, settings.beta2),
            "eps": settings.epsilon,
        }
        self.optimizer.param_groups[0].update(about, weight_decay=settings.weight_decay)
        self.optimizer.step()
        for vector in vectors:
            vector.grad = torch.zeros_like(vector)
        return norm

    def flat(self) -> Tensor:
        return torch.cat([vector.detach().flatten() for vector in self.vectors.values()])

    def gradient(self) -> Tensor:
        return torch.cat([vector.grad.flatten() for vector in self.vectors.values() if vector.grad is not None])

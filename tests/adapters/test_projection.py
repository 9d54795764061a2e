"""The shared pair: a seed means the same numbers everywhere, a smaller pair is a prefix, and z = A x is shared."""

from __future__ import annotations

import copy
import gc
import hashlib
import pickle
import re
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from qvera.adapters import QveraConfig, SharedProjection
from qvera.adapters.products import functional
from qvera.adapters.projection import OwnProjection, projection_sha256, uniform_matrix, uniform_pair, vera_scale
from qvera.adapters.save_load import attach
from qvera.config.sections import AdapterSection
from qvera.utils.errors import InputError
from tests.conftest import small_llama

CPU = torch.device("cpu")
MASK = 2**64 - 1


def philox4x64(counter: list[int], key: list[int]) -> list[int]:
    """One block of Philox4x64-10, from its definition: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"
    (SC 2011), table 2 and section 3.3, with the constants of Random123's philox.h. Python integers only."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (product1 >> 64) ^ c1 ^ k0, product1 & MASK, (product0 >> 64) ^ c3 ^ k1, product0 & MASK
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
    return [c0, c1, c2, c3]


def element(i: int, j: int, seed: int, stream: int) -> float:
    word = philox4x64([j // 4 + 1, i, 0, 0], [seed, stream])[j % 4]
    return (word >> 40) / 2**23 - 1.0


def test_the_plain_python_generator_passes_random123s_known_answers() -> None:
    # kat_vectors of Random123: "philox4x64 10" with all zeros, all ones, and digits of pi
    assert philox4x64([0] * 4, [0] * 2) == [
        0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B,
    ]  # fmt: skip
    assert philox4x64([MASK] * 4, [MASK] * 2) == [
        0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0,
    ]  # fmt: skip
    pi = [0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89]
    assert philox4x64(pi, [0x452821E638D01377, 0xBE5466CF34E90C6C]) == [
        0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6,
    ]  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**53 + 1, 2**63 + 5, 2**64 - 1])
def test_every_element_equals_the_definition(seed: int) -> None:
    for stream in (0, 1):
        drawn = uniform_matrix(5, 11, seed, stream)
        assert drawn.dtype == np.float32  # exact: 24 bits fit into fp32
        assert drawn.tolist() == [[element(i, j, seed, stream) for j in range(11)] for i in range(5)]


def test_the_docs_formula_gives_the_rows_of_any_seed() -> None:
    page = (Path(__file__).parents[2] / "docs" / "adapter-format.md").read_text(encoding="utf-8")
    formula = re.findall(r"`(Philox\(.*?)`", page)[0]
    for seed in (17, 2**63 + 5):
        words = eval(formula, {"Philox": np.random.Philox, "np": np, "i": 3, "seed": seed, "n": 11})
        assert ((words >> np.uint64(40)) / 2.0**23 - 1).tolist() == uniform_matrix(5, 11, seed, 0)[3].tolist()


@pytest.mark.parametrize(
    ("shape", "digest"),
    [
        ((4, 7, 5, 0), "776be5687114886be14645e9476b91ee89079c495e256d4024a514beea76157f"),
        ((8, 64, 192, 17), "66ef4e32c7bb5093cf0caf792c9e96a15b3f075c4b2bd05a6d76b5cc9c8907a3"),
        # SmolLM2-135M, rank 256, and Llama-2-7B, rank 1024, every linear
        ((256, 1536, 1536, 0), "88b7a44c659a444ede2c2512b36cfe75f63ccc5384f5a23da5549401d846bc5a"),
        ((1024, 11008, 11008, 0), "8506274eb3ed7b25be4fc42d424db8fc0223f153bf6cb83f0daeeb285c457c7c"),
    ],
)
def test_golden_hashes(shape: tuple[int, int, int, int], digest: str) -> None:
    assert projection_sha256(*shape) == digest


def test_the_hash_is_over_little_endian_rows_of_a_then_b() -> None:
    a = [element(i, j, 3, 0) for i in range(2) for j in range(5)]
    b = [element(i, j, 3, 1) for i in range(3) for j in range(2)]
    expected = hashlib.sha256(np.array(a + b, dtype="<f4").tobytes()).hexdigest()
    assert projection_sha256(2, 5, 3, 3) == expected


@settings(max_examples=25, deadline=None)
@given(st.tuples(*[st.integers(1, 12)] * 3), st.tuples(*[st.integers(0, 9)] * 3), st.integers(0, MASK))
def test_a_smaller_pair_is_a_prefix(small: tuple[int, ...], extra: tuple[int, ...], seed: int) -> None:
    rank, n, m = small
    large_a, large_b = uniform_pair(rank + extra[0], n + extra[1], m + extra[2], seed)
    a, b = uniform_pair(rank, n, m, seed)
    assert np.array_equal(a, large_a[:rank, :n])
    assert np.array_equal(b, large_b[:m, :rank])


def test_scale_is_the_product_of_the_kaiming_bounds() -> None:
    a, b = torch.empty(16, 40), torch.empty(48, 16)
    torch.manual_seed(0)
    for matrix in (a, b):
        torch.nn.init.kaiming_uniform_(matrix)
    bound = a.abs().max() * b.abs().max()
    assert bound <= vera_scale(16, 40) < bound * 1.02


def pair(seed: int = 3, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> SharedProjection:
    projection = SharedProjection(seed, device, dtype)
    projection.ensure(6, 10, 14)
    return projection


def equal(projection: SharedProjection, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the pair is the seed's, rounded once."""
    drawn = (torch.from_numpy(matrix).to(dtype) for matrix in uniform_pair(6, 10, 14, 3))
    return all(torch.equal(one, other) for one, other in zip((projection.A, projection.B), drawn, strict=True))


def test_casts_never_add_up() -> None:
    projection = pair()
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        assert equal(pair(dtype=dtype), dtype)
        assert equal(projection.to(dtype), dtype)
    assert equal(projection.half().float())


def test_meta_then_to_empty_gives_the_numbers_of_the_seed_and_none_of_a_weight() -> None:
    projection = pair(device=torch.device("meta"))
    assert projection.A.is_meta and (projection.A.shape, projection.B.shape) == ((6, 10), (14, 6))
    shared = nn.ModuleList([nn.ModuleList([projection]) for _ in range(3)])  # as the layers of a model name it
    shared.to_empty(device="cpu")
    assert equal(projection)
    shared.share_memory()
    assert equal(projection) and projection.A.is_shared()
    own = OwnProjection(torch.empty(6, 10, device="meta"), torch.empty(14, 6, device="meta"))
    with pytest.raises(RuntimeError, match="load them before you add it"):
        own.to_empty(device="cpu")


def test_growing_keeps_what_was_there_and_shrinks_nothing() -> None:
    projection = pair()
    a, b = projection.A.clone(), projection.B.clone()
    for wanted, A, B in (((3, 20, 5), (6, 20), (14, 6)), ((9, 2, 15), (9, 20), (15, 9))):
        projection.ensure(*wanted)
        assert (projection.A.shape, projection.B.shape) == (A, B)
    assert torch.equal(projection.A[:6, :10], a) and torch.equal(projection.B[:14, :6], b)
    held = projection.A.data_ptr()
    projection.ensure(9, 20, 15)
    assert projection.A.data_ptr() == held  # nothing drawn again


def test_slices_are_views_and_nothing_is_saved_or_trained() -> None:
    projection = pair()
    for part, whole, shape in zip(
        projection.slices(4, 7, 9), (projection.A, projection.B), ((4, 7), (9, 4)), strict=True
    ):
        assert part.shape == shape and part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    assert projection.state_dict() == {} and list(projection.parameters()) == []


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5])
def test_a_seed_that_no_key_holds_is_refused(seed: int) -> None:
    with pytest.raises(InputError, match="projection_seed: should be"):
        QveraConfig(projection_seed=seed)


# Layers that read the same x share z, and never a stale one


@pytest.fixture
def projection() -> SharedProjection:
    shared = SharedProjection(0, CPU, torch.float32)
    shared.ensure(4, 10, 12)
    return shared


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for every product that is really taken."""
    taken: list[int] = []
    original = functional.project

    def counted(*arguments: Any) -> torch.Tensor:
        taken.append(1)
        return original(*arguments)

    monkeypatch.setattr(functional, "project", counted)
    return taken


def test_the_same_tensor_is_projected_once_a_step_and_gradients_add_up(
    projection: SharedProjection, count: list[int]
) -> None:
    x = torch.randn(3, 10, requires_grad=True)
    for step in (1, 2):  # the second has a graph of its own
        first, second = (projection.project(x, 4, torch.float32) for _ in range(2))
        assert first is second and len(count) == step
        (first.sum() + 2 * second.sum()).backward()
        torch.testing.assert_close(x.grad, step * 3 * projection.A[:4, :10].sum(0).expand(3, 10))


@pytest.mark.parametrize("method", ["vera", "shared-core"])
def test_linears_that_read_the_same_input_have_one_z(method: str, count: list[int]) -> None:
    model = attach(small_llama(), AdapterSection(method=method, rank=4))
    model(input_ids=torch.tensor([[5, 9, 200]])).logits.sum().backward()
    layers = model.config.num_hidden_layers
    assert len(count) == 4 * layers  # q, k and v; o; gate and up; down


def test_a_change_in_place_another_rank_and_another_dtype_are_another_z(
    projection: SharedProjection, count: list[int]
) -> None:
    x = torch.randn(3, 10)
    before = projection.project(x, 4, torch.float32).clone()
    x.mul_(2)
    torch.testing.assert_close(projection.project(x, 4, torch.float32), 2 * before)
    assert projection.project(x, 2, torch.float32).shape == (3, 2)
    assert projection.project(x, 2, torch.bfloat16).dtype == torch.bfloat16
    assert len(count) == 4


def test_freed_and_allocated_again_at_the_same_address(projection: SharedProjection) -> None:
    x = torch.randn(3, 10)
    address = x.data_ptr()
    projection.project(x, 4, torch.float32)
    del x
    for _ in range(50):  # the allocator soon gives the same address
        y = torch.randn(3, 10)
        torch.testing.assert_close(projection.project(y, 4, torch.float32), y @ projection.A[:4, :10].t())
        if y.data_ptr() == address:
            break
        del y
    else:
        pytest.fail("the allocator never gave the address again")


def test_no_grad_then_grad(projection: SharedProjection) -> None:
    x, leaf = torch.randn(3, 10, requires_grad=True), torch.randn(3, 10)
    with torch.no_grad():
        assert not projection.project(x, 4, torch.float32).requires_grad
    assert projection.project(x, 4, torch.float32).requires_grad
    assert not projection.project(leaf, 4, torch.float32).requires_grad
    assert projection.project(leaf.requires_grad_(), 4, torch.float32).requires_grad
    with torch.inference_mode():
        x = torch.randn(3, 10)
        torch.testing.assert_close(projection.project(x, 4, torch.float32), x @ projection.A[:4, :10].t())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_whose_input_is_projected_directly(projection: SharedProjection, reentrant: bool) -> None:
    """The recomputation sees the very tensor object of forward, and must still build its own graph."""
    weight = torch.randn(4, 4, requires_grad=True)

    def block(x: torch.Tensor) -> torch.Tensor:
        z = projection.project(x, 4, torch.float32)
        return torch.tanh(z @ weight) + torch.sin(projection.project(x, 4, torch.float32))

    grads = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        x, weight.grad = torch.randn(3, 10, requires_grad=True), None
        y = checkpoint(block, x, use_reentrant=reentrant) if wrapped else block(x)
        y.pow(2).sum().backward()
        grads.append((x.grad, weight.grad))
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=0)


def test_z_is_let_go_of_with_x(projection: SharedProjection) -> None:
    x = torch.randn(3, 10)
    z = weakref.ref(projection.project(x, 4, torch.float32))
    assert z() is not None
    del x
    gc.collect()
    assert z() is None


def test_it_can_be_copied_and_pickled_while_it_remembers(projection: SharedProjection) -> None:
    x = torch.randn(3, 10)
    z = projection.project(x, 4, torch.float32)
    for twin in (copy.deepcopy(projection), pickle.loads(pickle.dumps(projection))):
        torch.testing.assert_close(twin.project(x, 4, torch.float32), z)


def test_views_of_the_pair_follow_when_it_grows_moves_or_is_cast() -> None:
    projection = SharedProjection(3, torch.device("cpu"), torch.float32)
    projection.ensure(4, 6, 5)
    A, _ = projection.slices(2, 3, 4)
    assert projection.slices(2, 3, 4)[0] is A
    for change in (lambda: projection.ensure(8, 9, 10), lambda: projection.to(torch.bfloat16)):
        change()
        views = projection.slices(2, 3, 4)
        assert torch.equal(views[0], projection.A[:2, :3]) and torch.equal(views[1], projection.B[:4, :2])
        assert views[0].data_ptr() == projection.A.data_ptr()

"""What `qvera analyze` finds is what dense matrices say, and the reduced adapter is exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

from qvera.adapters import QveraLinear
from qvera.adapters.factors import Factors
from qvera.adapters.files.save_load import attach, named_vectors, save_adapter
from qvera.cli.main import main
from qvera.config.schema import AdapterSection, ModelSection
from qvera.exporting.deltas import Delta
from qvera.exporting.lora import export_lora
from qvera.lab import analysis
from qvera.lab import analysis as intruders
from qvera.lab.analysis import (
    analyze_adapter,
    delta_singular_values,
    effective_rank,
    find_intruders,
    largest_cosines,
    largest_share_bounds,
    mitigation_factors,
)
from qvera.lab.svd import leading_singular_vectors, singular_vectors
from qvera.models.loader import load_base
from qvera.models.quantization import dequantized_weight
from qvera.utils.errors import InputError, RunFailed
from tests.conftest import small_llama, small_tokenizer
from tests.exporting.helpers import stock_base
from tests.live_bytes import LiveBytes

pytestmark = pytest.mark.process
PREFIX = "base_model.model."


def saved_adapter(section: ModelSection, directory: Path, **settings: Any) -> Any:
    """A perturbed adapter on the base of ``section``, and the same in ``directory``."""
    model = attach(load_base(section).model, AdapterSection(**{"rank": 8, **settings}), section.path)
    draw = torch.Generator().manual_seed(1)
    for part in named_vectors(model).values():
        if part.is_floating_point():  # not SpIEL's places
            part.data.add_(torch.randn(part.shape, generator=draw), alpha=0.3)
    save_adapter(model, directory)
    return model


def dense_pairs(model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Name → W and ΔW of each adapted linear, fp64."""
    return {
        name.removeprefix(PREFIX): (
            dequantized_weight(module.base_layer, torch.float32).double(),
            module.get_delta_weight("default").detach().double(),
        )
        for name, module in model.named_modules()
        if isinstance(module, QveraLinear)
    }


@pytest.mark.parametrize(
    ("quantization", "settings"),
    [
        ("nf4", {}),
        ("none", {}),
        ("nf4", {"b_groups": 2, "input_scale": True}),
        ("nf4", {"method": "lora", "alpha": 10}),
        ("none", {"method": "spiel"}),
    ],
    ids=["nf4", "none", "more vectors", "lora", "spiel"],
)
def test_the_weights_of_the_trained_base_and_dense_decompositions_say_the_same(
    quantization: str, settings: dict[str, Any], tiny_model_dir: Path, tmp_path: Path
) -> None:
    section = ModelSection(path=str(tiny_model_dir), compute_dtype="float32", quantization=quantization)
    pairs = dense_pairs(saved_adapter(section, tmp_path / "adapter", **settings))
    sparse = settings.get("method") == "spiel"
    keep = None if sparse else 0.25
    found = analyze_adapter(tmp_path / "adapter", section, top_k=6, epsilon=0.5, keep=keep)
    assert [linear.name for linear in found.linears] == list(pairs)
    total = 0
    for linear in found.linears:
        W, delta = pairs[linear.name]
        assert linear.shape == tuple(W.shape)
        assert linear.weight_norm == pytest.approx(W.norm().item(), rel=1e-5)
        assert linear.delta_norm == pytest.approx(delta.norm().item(), rel=1e-5)
        values = torch.linalg.svdvals(delta)
        shares = values / values.sum()
        assert linear.effective_rank == pytest.approx(torch.special.entr(shares).sum().exp().item(), rel=1e-4)
        U, S, Vh = torch.linalg.svd(W + delta, full_matrices=False)
        cosines = (torch.linalg.svd(W, full_matrices=False).U.t() @ U[:, :6]).abs().amax(dim=0)
        torch.testing.assert_close(torch.tensor(linear.singular_values).double(), S[:6], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.tensor(linear.cosines).double(), cosines, rtol=0, atol=1e-3)
        assert linear.intruders == [i for i in range(6) if cosines[i] < 0.5]
        total += len(linear.intruders)
        if sparse:
            assert linear.rank == 0
            continue
        mine = linear.intruders
        expected = delta - 0.75 * (U[:, mine] * S[mine]) @ Vh[mine]
        A, B = found[linear.name]
        assert len(A) == found.reduced_rank > linear.rank == 8
        torch.testing.assert_close(B.double() @ A.double(), expected, rtol=0, atol=2e-4 * expected.abs().max().item())
    assert total > 4 or sparse, "the perturbed adapter has intruders, else this compares nothing"
    assert [linear.layer for linear in found.linears] == [0] * 7 + [1] * 7
    assert found.linears[6].role == "down_proj"
    if sparse:
        with pytest.raises(InputError, match="--reduce: .* spiel"):
            analyze_adapter(tmp_path / "adapter", section, top_k=6, epsilon=0.5, keep=0.25)


def test_the_reduced_adapter_in_stock_peft_is_delta_less_its_intruders(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Exact to fp32 rounding against the vectors that were found; PEFT's own helper cuts the rank back and is not."""
    section = ModelSection(path=str(tiny_model_dir), compute_dtype="float32")
    pairs = dense_pairs(saved_adapter(section, tmp_path / "adapter"))
    found = analyze_adapter(tmp_path / "adapter", section, top_k=4, epsilon=0.5, keep=0.6)
    export_lora(found.adapter, tmp_path / "reduced", torch.float32, found)
    stock = PeftModel.from_pretrained(stock_base(tiny_model_dir, "nf4"), tmp_path / "reduced")
    assert stock.peft_config["default"].r == found.reduced_rank > 8
    seen = 0
    for name, module in stock.named_modules():
        if isinstance(module, LoraLayer):
            seen += 1
            W, delta = pairs[name.removeprefix(PREFIX)]
            (more_A, more_B) = found.mitigations[name.removeprefix(PREFIX)]
            expected = delta + more_B.double() @ more_A.double()
            got = module.get_delta_weight("default").double()
            assert ((got - expected).norm() / expected.norm()).item() < 1e-6
            if len(more_A):  # along each intruder, λ of W + ΔW is left
                along = more_A.double() @ (W + got).t()
                torch.testing.assert_close(
                    along.norm(dim=1), more_B.norm(dim=0).double() * 0.6 / 0.4, rtol=1e-3, atol=1e-6
                )
    assert seen == 14


class PeakBytes(TorchDispatchMode):
    """The most bytes of tensors alive at once, of those that operators returned."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = LiveBytes(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self.live.add(tensor)
        self.peak = max(self.peak, self.live.now)
        return out


def test_one_linear_at_a_time_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analysis, "DENSE_SIDE", 0)  # as a large weight is treated
    peaks = {}
    for layers in (1, 2):
        base = tmp_path / f"{layers}-layers"
        model = small_llama(num_hidden_layers=layers, hidden_size=160, intermediate_size=320).to(torch.bfloat16)
        model.save_pretrained(base)
        small_tokenizer().save_pretrained(base)
        section = ModelSection(path=str(base), compute_dtype="float32")
        saved_adapter(section, base / "adapter", targets=["q_proj", "up_proj"])
        with PeakBytes() as counted:
            analyze_adapter(base / "adapter", section, top_k=2, epsilon=0.5)
        peaks[layers] = counted.peak
    largest_bytes = 160 * 320 * 4
    assert peaks[2] < peaks[1] + largest_bytes, "the peak does not grow with the number of layers"
    assert peaks[2] < 10 * largest_bytes


def test_a_conv1d_is_analyzed_as_the_linear_it_is() -> None:
    draw = torch.Generator().manual_seed(0)
    W, A, B = (torch.randn(*shape, generator=draw) for shape in ((20, 12), (3, 12), (20, 3)))
    d, b = torch.randn(3, generator=draw), torch.randn(20, generator=draw)
    plain, turned = (
        analysis._analyze("h.3.mlp.c_fc", "c_fc", weight, delta, delta.lora(), 5, 0.5, 0.5)
        for weight, delta in (
            (W, Delta(Factors(A, B, d, b, 0.5), False)),
            (W.t().contiguous(), Delta(Factors(A, B, d, b, 0.5), True)),
        )
    )
    assert plain[0].layer == 3
    assert plain[0].intruders == turned[0].intruders
    assert plain[0].cosines == pytest.approx(turned[0].cosines, abs=1e-5)
    for one, other in zip(plain[1], turned[1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_linears_whose_names_end_alike_are_shown_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_head=2, n_layer=2, vocab_size=304, n_positions=64, bos_token_id=0, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    small_tokenizer().save_pretrained(tmp_path / "gpt2")
    section = ModelSection(path=str(tmp_path / "gpt2"), compute_dtype="float32", quantization="none")
    saved_adapter(section, tmp_path / "adapter", targets=["c_proj", "c_fc"])
    page = tmp_path / "page.html"
    assert main(["analyze", str(tmp_path / "adapter"), "--top-k", "2", "--html", str(page)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert {row[0]: row[1] for row in rows if row and row[0].endswith(("c_proj", "c_fc"))} == {
        "attn.c_proj": "2",
        "c_fc": "2",
        "mlp.c_proj": "2",
    }
    for layer in (0, 1):
        for role in ("attn.c_proj", "mlp.c_proj"):
            assert f"layer {layer}: {role} " in page.read_text()


def test_a_role_is_the_same_in_all_layers() -> None:
    ends = ["attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"]
    names = [f"roberta.encoder.layer.{layer}.{end}" for layer in (0, 11) for end in ends]
    roles = analysis.roles_of([*names, "classifier.dense"])
    assert list(roles.values()) == 2 * ["query", *ends[1:]] + ["classifier.dense"]
    assert analysis.roles_of([f"{part}.layers.3.q_proj" for part in ("text", "vision")]) == {
        "text.layers.3.q_proj": "text.layers.*.q_proj",
        "vision.layers.3.q_proj": "vision.layers.*.q_proj",
    }


def test_a_weight_that_is_not_finite_is_named() -> None:
    delta = Delta(Factors(torch.ones(2, 4), torch.ones(3, 2), torch.full((2,), torch.inf), torch.ones(3)), False)
    with pytest.raises(RunFailed, match=r"q_proj: W \+ ΔW has NaN or Inf"):
        analysis._analyze("q_proj", "q_proj", torch.ones(3, 4), delta, None, 2, 0.5, None)


def test_the_command_shows_intruders_and_losses_and_writes_page_and_reduced_adapter(
    trained_run: Path, tiny_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("the sea is grey\n\n\na word\nand one more\n\n", encoding="utf-8")
    reduced, page = tmp_path / "reduced", tmp_path / "page.html"
    line = ["analyze", str(trained_run), "--top-k", "4", "--epsilon", "1.0", "--text", str(other), "--html", str(page)]
    assert main([*line, "--reduce", "0.5", "--out", str(reduced), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["linears"]) == 14
    assert {len(linear["intruders"]) for linear in document["linears"]} == {4}, "no cosine is 1 after training"
    assert document["reduced"]["rank"] == 12 == json.loads((reduced / "adapter_config.json").read_text())["r"]
    text, held_out = document["losses"]
    assert (text["rows"], held_out["rows"]) == (2, 8)
    run = json.loads((trained_run / "run.json").read_text())["result"]
    assert held_out["adapter"] == pytest.approx(run["eval_after"]["loss"], rel=1e-5)
    assert held_out["base"] == pytest.approx(run["eval_before"]["loss"], rel=1e-5)
    assert held_out["reduced"] != held_out["adapter"]
    assert "Every intruder dimension" in page.read_text()
    assert "Reduced to 0.5" in page.read_text()

    assert main(["analyze", str(trained_run / "adapter"), "--top-k", "4"]) == 0
    said = capsys.readouterr().out
    assert "in 14 linears (k = 4, ε = 0.5)" in said or "of 14 linears (k = 4, ε = 0.5)" in said
    assert "Forgetting: not measured; --text FILE" in said


def test_wrong_options_of_the_command_are_refused_before_any_work(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, bad, latin = str(trained_run), tmp_path / "bad.jsonl", tmp_path / "latin.txt"
    bad.write_text("{no JSON\n")
    latin.write_bytes(b"caf\xe9")
    monkeypatch.setattr(analysis, "analyze_adapter", lambda *_, **__: pytest.fail("the adapter was analyzed"))
    for options, said in (
        (["--reduce", "0.5"], "--reduce: needs --out DIR"),
        (["--out", str(tmp_path / "x")], "--out: goes with --reduce only"),
        (["--reduce", "0.5", "--out", run], "not an empty directory"),
        (["--text", str(tmp_path / "none.jsonl")], "none.jsonl: no such file"),
        (["--text", str(bad), "--reduce", "0.5", "--out", str(tmp_path / "x")], "bad.jsonl:1"),
        (["--text", str(latin), "--reduce", "0.5", "--out", str(tmp_path / "x")], "latin.txt: is not UTF-8"),
    ):
        assert main(["analyze", run, *options]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    assert main(["analyze", run, "--reduce", "1.5", "--out", str(tmp_path / "x")]) == 2
    said = capsys.readouterr().err
    assert "Invalid value for '--reduce'" in said
    assert "less than or equal to 1" in said or "1.5 is not in the range 0.0<=x<=1.0" in said  # older releases of typer
    assert main(["analyze", str(tmp_path)]) == 2
    assert "is neither a run" in capsys.readouterr().err


SHAPES = ("tall", "wide", "square")
REFERENCE = Path(__file__).parent / "reference"


def load(name: str) -> dict[str, torch.Tensor]:
    with np.load(REFERENCE / name) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays}


@pytest.fixture(params=["decomposed", "bounded"])
def way(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Small weights are decomposed fully; here also as large ones are treated."""
    if request.param == "bounded":
        monkeypatch.setattr(intruders, "DENSE_SIDE", 0)
    return request.param


@pytest.mark.parametrize("change", ["lora", "dense"])
@pytest.mark.parametrize("shape", SHAPES)
def test_intruders_are_those_of_the_papers_script(change: str, shape: str, way: str) -> None:
    """github.com/reeceshuttle/intruder-dimensions d4445a22, find_number_of_intruder_dimensions."""
    arrays = load("intruders.npz")
    case = f"{change}_{shape}"
    before, after = arrays[f"{case}_W0"], arrays[f"{case}_W1"]
    for row, epsilon in enumerate(arrays["eps"].tolist()):
        found = find_intruders(before, after, 20, epsilon)
        assert found.found.tolist() == arrays[f"{case}_is_intruder"][row].bool().tolist()
        assert found.found.cumsum(0).tolist() == arrays[f"{case}_counts"][row].tolist()
        exact = found.exact[:10]
        assert exact.all() or way == "bounded"
        expected = arrays[f"{case}_cos_top10"]
        torch.testing.assert_close(found.cosines[:10][exact], expected[exact], rtol=0, atol=5e-5)


@pytest.mark.parametrize("shape", ["tall", "wide"])
@pytest.mark.parametrize("keep", [0.75, 0.3])
def test_mitigation_factors_are_what_peft_computes_before_it_cuts_the_rank(shape: str, keep: float) -> None:
    """peft 0.21.2, reduce_intruder_dimension; its result of rank 4 has an error of 4 to 21 %, ours of rank 6 has none."""
    arrays = load("intruder_mitigation_peft.npz")
    weight, A, B = arrays[f"{shape}_W0"], arrays[f"{shape}_A"], arrays["scaling"] * arrays[f"{shape}_B"]
    found = find_intruders(weight, weight + B @ A, int(arrays["top_k"]), float(arrays["eps"]))
    assert found.found.nonzero().flatten().tolist() == arrays[f"{shape}_intruders"].tolist()
    torch.testing.assert_close(found.cosines, arrays[f"{shape}_cos"], rtol=0, atol=1e-11)
    more_A, more_B = mitigation_factors(found, keep)
    assert len(more_A) == len(arrays[f"{shape}_intruders"])
    new_A, new_B = torch.cat([A, more_A]), torch.cat([B, more_B], dim=1)
    expected = arrays[f"{shape}_lam{round(100 * keep):03}_delta_mitigated_before_truncation"]
    torch.testing.assert_close(new_B @ new_A, expected, rtol=0, atol=1e-11)


def low_rank_plus_noise(m: int, n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A weight with a few large singular values and a flat rest, as trained weights have them."""
    draw = torch.Generator().manual_seed(m + n)
    large = torch.randn(m, 6, generator=draw, dtype=torch.float64) * torch.linspace(0.9, 0.3, 6)
    rest = torch.randn(m, n, generator=draw, dtype=torch.float64)
    return (large @ torch.randn(6, n, generator=draw, dtype=torch.float64) + rest).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(310, 170), (170, 310), (201, 201), (33, 7)])
def test_leading_vectors_are_those_of_a_full_decomposition(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = low_rank_plus_noise(*shape, dtype)
    U, S, V = leading_singular_vectors(weight, 5)
    whole = singular_vectors(weight)
    limit = 2e-4 if dtype == torch.float32 else 1e-12
    for found, expected in ((U, whole.U[:, :5]), (S, whole.S[:5]), (V, whole.V[:, :5])):
        torch.testing.assert_close(found, expected, rtol=limit, atol=limit)
    again = leading_singular_vectors(weight, 5)
    assert all(torch.equal(one, other) for one, other in zip((U, S, V), again, strict=True))


def test_no_singular_vector_has_more_of_a_vector_than_the_bound() -> None:
    weight = low_rank_plus_noise(150, 200, torch.float64)
    whole = singular_vectors(weight).U
    vectors = torch.randn(150, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vectors[:, 1] = whole[:, 90]
    vectors[:, 2] = whole[:, 40] + whole[:, 41]
    vectors[:, 3] /= vectors[:, 3].norm()
    vectors[:, 4] = 0
    largest = ((whole.t() @ vectors) ** 2).amax(dim=0)
    bounds = [largest_share_bounds(weight, vectors, steps) for steps in (1, 4, 16, 64, 150)]
    for bound in bounds:
        assert (bound >= largest * (1 - 1e-9)).all()
    assert bounds[2][3] < 0.4 < bounds[0][3]
    torch.testing.assert_close(bounds[0][1:3], largest[1:3] * torch.tensor([1.0, 2.0]), rtol=1e-9, atol=0)
    assert bounds[4][4] == 0


@pytest.mark.parametrize("shape", [(310, 170), (170, 310)])
def test_large_weights_are_decided_without_a_full_decomposition(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A leading vector, a mixture of three leading ones, and random ones; a single trailing vector needs the whole."""
    weight = low_rank_plus_noise(*shape)
    whole = singular_vectors(weight).U
    draw = torch.Generator().manual_seed(3)
    spread = torch.randn(shape[0], 2, generator=draw)
    vectors = torch.cat([whole[:, 2:3], whole[:, :3].sum(dim=1, keepdim=True), spread], dim=1)
    vectors /= vectors.norm(dim=0)
    exact = (whole.t() @ vectors).abs().amax(dim=0).double()
    monkeypatch.setattr(intruders, "DENSE_SIDE", 0)
    counted: list[int] = []
    monkeypatch.setattr(intruders, "singular_vectors", lambda w: counted.append(1) or singular_vectors(w))
    for epsilon in (0.6, 0.5):
        found, is_exact = largest_cosines(weight, vectors, epsilon)
        assert ((found < epsilon) == (exact < epsilon)).all()
        torch.testing.assert_close(found[is_exact], exact[is_exact], rtol=0, atol=1e-5)
        assert (torch.where(exact < epsilon, found - exact, exact - found) > -1e-5).all()
    assert counted == []
    assert is_exact.tolist() == [True, True, False, False]
    largest_cosines(weight, whole[:, 100:101], 0.5)
    assert counted == [1]


def test_effective_rank_and_singular_values_of_factors() -> None:
    draw = torch.Generator().manual_seed(0)
    A, B = torch.randn(5, 30, generator=draw), torch.randn(20, 5, generator=draw)
    torch.testing.assert_close(
        delta_singular_values(A, B), torch.linalg.svdvals(B.double() @ A.double())[:5], rtol=1e-12, atol=1e-12
    )
    assert effective_rank(torch.tensor([3.0, 3.0, 3.0, 0.0])) == pytest.approx(3.0)
    assert effective_rank(torch.tensor([1.0, 0.0])) == 1.0
    assert effective_rank(torch.zeros(4)) == 0.0

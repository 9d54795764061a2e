"""Tinker's own client, unchanged, samples from trained models, and gets the probabilities that training says."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qvera.serve.engine import Engine
from qvera.serve.tinker.calls import parsed
from qvera.serve.tinker.sampling import SampleBody, Targets, _targets
from qvera.utils.errors import InputError
from tests.serve.tinker.conftest import serving

tinker = pytest.importorskip("tinker", reason="pip install 'qvera[test]'")
torch = pytest.importorskip("torch")
END = 2


@dataclasses.dataclass
class Loop:
    """A server and a client of it."""

    client: Any
    engine: Engine
    texts: Any


@pytest.fixture(scope="module")
def loop(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    with (
        serving(tiny_model_dir, tmp_path_factory.mktemp("tinker")) as (url, service),
        tinker.ServiceClient(base_url=url, api_key="tml-anything") as client,
    ):
        yield Loop(client, service.engine, service.texts)


def trained(loop: Loop, name: str = "tiny", rank: int = 8) -> Any:
    """A model after some steps."""
    training = loop.client.create_lora_training_client(name, rank=rank, seed=1).result()
    for _ in range(4):
        training.forward_backward([datum(list(range(5, 60)))], "cross_entropy")
        training.optim_step(tinker.AdamParams(learning_rate=0.02)).result()
    return training


def datum(tokens: list[int]) -> Any:
    inputs = {"target_tokens": torch.tensor(tokens[1:]), "weights": torch.ones(len(tokens) - 1)}
    return tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def forward(training: Any, tokens: list[int]) -> np.ndarray:
    """Log-probabilities of all tokens but the first, by training."""
    [output] = training.forward([datum(tokens)], "cross_entropy").result().loss_fn_outputs
    return np.array(output["logprobs"].data)


def sample(sampler: Any, prompt: list[int], count: int = 1, about: Any = None, **params: Any) -> Any:
    params = {"max_tokens": 12, "seed": 3, "stop": [], **params}
    asked = tinker.ModelInput.from_ints(prompt), count, tinker.SamplingParams(**params)
    return sampler.sample(*asked, **(about or {})).result()


@pytest.mark.parametrize("name", ["tiny", "tiny:vera-16"])
def test_a_loop_of_sampling_and_training_agrees_with_itself(loop: Loop, name: str) -> None:
    training = trained(loop, name)
    sampler = training.save_weights_and_get_sampling_client().result()
    prompt = [7, 9, 11, 13]
    found = sample(sampler, prompt, 16).sequences
    assert len({tuple(one.tokens) for one in found}) == 16
    for one in found[:3]:
        tokens = [*prompt, *one.tokens]
        lps = forward(training, tokens)
        assert np.allclose(one.logprobs, lps[3:], atol=1e-4)
        scored = sampler.compute_logprobs(tinker.ModelInput.from_ints(tokens)).result()
        assert scored[0] is None and np.allclose(scored[1:], lps, atol=1e-4)
    training.forward_backward([datum(tokens)], "cross_entropy")
    training.optim_step(tinker.AdamParams(learning_rate=0.02)).result()
    assert not np.allclose(forward(training, tokens), lps, atol=1e-2)
    again = sample(sampler, prompt, 16).sequences  # the weights of the moment of saving
    assert [one.tokens for one in again] == [one.tokens for one in found]
    path = training.save_weights_for_sampler("now").result().path
    newer = loop.client.create_sampling_client(model_path=path).result()
    assert newer.get_base_model() == name
    assert [one.tokens for one in sample(newer, prompt, 16).sequences] != [one.tokens for one in found]


def test_a_prompt_that_was_there_before_is_counted(loop: Loop) -> None:
    sampler = loop.client.create_sampling_client(base_model="tiny").result()
    prompt = list(range(200, 240))
    assert [sample(sampler, prompt, 2).prompt_cache_hit_tokens for _ in range(2)] == [0, 32]  # two whole blocks


def test_what_is_asked_about_a_prompt_and_about_samples_comes_back_in_its_shape(loop: Loop) -> None:
    sampler = loop.client.create_sampling_client(base_model="tiny").result()
    prompt, rest = [5, 6, 7, 8, 9], 4
    targets = torch.tensor([[6, -1], [-1, -1], [8, 3], [9, 4]])
    about = {
        "include_prompt_logprobs": True,
        "topk_prompt_logprobs": 3,
        "topk_sample_logprobs": 2,
        "target_prompt_logprobs": tinker.TensorData.from_torch(targets),
        "prompt_alt_tokens_k": 4,
        "prompt_logprobs_last_n": 2,
    }
    found = sample(sampler, prompt, 2, about, temperature=0.7, top_k=5)
    whole = sampler.compute_logprobs(tinker.ModelInput.from_ints(prompt)).result()
    assert found.prompt_logprobs[:3] == [None] * 3 and found.prompt_logprobs[3:] == pytest.approx(whole[3:], abs=1e-5)
    assert found.topk_prompt_logprobs[:3] == [None] * 3
    for place, likely in enumerate(found.topk_prompt_logprobs[3:], 3):
        assert len(likely) == 3 and likely == sorted(likely, key=lambda one: -one[1])
        assert all(lp <= likely[0][1] for token, lp in likely) and likely[0][1] >= whole[place] - 1e-5
    scored = found.target_prompt_logprobs.to_torch()
    assert scored.shape == (rest, 2) and (scored[targets < 0] == 0).all()
    assert scored[0, 0] == pytest.approx(whole[1], abs=1e-5) and scored[2, 0] == pytest.approx(whole[3], abs=1e-5)
    drawn = found.prompt_alt_tokens
    assert drawn.tokens.to_torch().shape == drawn.logprobs.to_torch().shape == (rest, 4)
    assert (drawn.logprobs.to_torch() < 0).all()
    for one in found.sequences:
        assert len(one.tokens) == len(one.logprobs) == len(one.topk_logprobs) == 12
        assert all(len(likely) == 2 for likely in one.topk_logprobs)
    cells = {"sparse_crow_indices": [0, 1, 1, 3, 5], "sparse_col_indices": [0, 0, 1, 0, 1]}
    sparse = tinker.TensorData(data=[6, 8, 3, 9, 4], dtype="int64", shape=[4, 2], **cells)
    alone = sample(sampler, prompt, 1, {"target_prompt_logprobs": sparse})
    again = alone.target_prompt_logprobs
    assert alone.prompt_logprobs is None and alone.topk_prompt_logprobs is None
    first = sample(
        sampler, [5], 1, {"include_prompt_logprobs": True, "topk_prompt_logprobs": 3, "prompt_alt_tokens_k": 4}
    )
    assert first.prompt_logprobs == first.topk_prompt_logprobs == [None]  # nothing is before it
    assert first.prompt_alt_tokens.tokens.to_torch().shape == (0, 4)
    assert torch.allclose(again.to_torch(), scored, atol=1e-5)


def test_logprobs_of_samples_are_those_at_their_temperature(loop: Loop) -> None:
    sampler, first = loop.client.create_sampling_client(base_model="tiny").result(), list[np.ndarray]()
    for temperature in (1.0, 2.0):
        found = sample(sampler, [5, 6, 7], 1, {"topk_sample_logprobs": 3}, temperature=temperature)
        first.append(np.array([logprob for _, logprob in found.sequences[0].topk_logprobs[0]]))
    # log softmax(l / τ) of tokens are 1/τ times as far apart as their log softmax(l)
    assert np.diff(first[1]) == pytest.approx(np.diff(first[0]) / 2, abs=1e-5)


def test_an_answer_ends_with_the_token_that_its_stop_asks_for(loop: Loop) -> None:
    sampler, prompt = loop.client.create_sampling_client(base_model="tiny").result(), [5, 6, 7]
    [free] = sample(sampler, prompt, max_tokens=40).sequences
    assert (free.stop_reason, len(free.tokens)) == ("length", 40)
    token = free.tokens[9]
    [by_token] = sample(sampler, prompt, max_tokens=40, stop=[token]).sequences
    assert (by_token.stop_reason, by_token.tokens) == ("stop", free.tokens[: free.tokens.index(token) + 1])
    text = loop.texts.decode(free.tokens)
    stop = next(text[i : i + 3] for i in range(10, len(text)) if "\ufffd" not in text[i : i + 3])
    [by_text] = sample(sampler, prompt, max_tokens=40, stop=stop, about={"include_prompt_logprobs": True}).sequences
    assert by_text.stop_reason == "stop" and by_text.tokens == free.tokens[: len(by_text.tokens)]
    assert stop in loop.texts.decode(by_text.tokens) and stop not in loop.texts.decode(by_text.tokens[:-1])
    assert len(by_text.logprobs) == len(by_text.tokens)
    ended = sample(sampler, prompt, 30, max_tokens=60, stop=None, temperature=3.0).sequences
    assert any(one.tokens[-1] == END and one.stop_reason == "stop" for one in ended)
    endless = sample(sampler, prompt, 30, max_tokens=60, temperature=3.0).sequences
    assert all(len(one.tokens) == 60 for one in endless) and any(END in one.tokens for one in endless)


@pytest.mark.parametrize(
    ("prompt", "about", "params", "message"),
    [
        ([], {}, {}, "prompt: has no tokens"),
        ([300] * 250, {}, {}, "250 and 12 tokens are more than the 256 that fit"),
        ([304], {}, {}, "token ids of this model are 0 to 303"),
        ([5, 6], {"include_prompt_logprobs": True, "prompt_logprobs_last_n": 2}, {}, "prompt_logprobs_last_n: is 2"),
        ([5, 6], {"topk_prompt_logprobs": 65}, {}, "topk_prompt_logprobs"),
        ([5, 6], {"target_prompt_logprobs": [[5], [6]]}, {}, "has the shape .2, 1.; expected .1, K."),
        ([5], {}, {"temperature": -1.0}, "sampling_params.temperature"),
        ([5], {}, {"seed": 2**64}, "sampling_params.seed"),
        ([5], {}, {"stop": ["x" * 300]}, "stop: expected texts of 1 to 256 characters"),
    ],
)
def test_what_can_not_be_sampled_is_refused_by_name(
    loop: Loop, prompt: Any, about: Any, params: Any, message: str
) -> None:
    sampler = loop.client.create_sampling_client(base_model="tiny").result()
    if "target_prompt_logprobs" in about:
        about = {"target_prompt_logprobs": tinker.TensorData.from_torch(torch.tensor(about["target_prompt_logprobs"]))}
    with pytest.raises(tinker.BadRequestError, match=message):
        sample(sampler, prompt, 1, about, **params)
    assert len(sample(sampler, [5], seed=2**64 - 1).sequences) == 1


def test_an_image_in_a_prompt_is_refused_by_name() -> None:
    prompt = {"chunks": [{"tokens": [5]}, {"type": "image", "data": "..."}]}
    body = json.dumps({"sampling_session_id": "s", "seq_id": 1, "prompt": prompt}).encode()
    with pytest.raises(InputError, match="prompt.chunks.1.type: Input should be 'encoded_text', found 'image'"):
        parsed(SampleBody, body)


def test_targets_of_a_one_token_prompt_that_are_no_csr_tensor_are_refused() -> None:
    nothing = Targets(data=[], shape=[0, 1], sparse_crow_indices=[])
    with pytest.raises(InputError, match="target_prompt_logprobs: is no CSR tensor of the shape"):
        _targets(nothing, 0)


def test_a_pickled_client_samples_from_the_same_sampler(loop: Loop) -> None:
    sampler = loop.client.create_sampling_client(base_model="tiny").result()
    other = type(sampler).from_sampler_handle(sampler.get_sampler_handle(), api_key="tml-anything")
    expected = [sample(one, [5, 6]).sequences[0].tokens for one in (sampler, other, sampler)]
    assert expected[0] == expected[1] == expected[2]

"""Bodies that Tinker's own client writes are read, and it reads what is written here."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
import zstandard

from qvera.models.token_losses import TOKEN_LOSSES
from qvera.serve.tinker import messages
from qvera.serve.tinker.messages import ForwardBackward, call_of, decode_forward_backward
from qvera.serve.tinker.routes import NewSession
from qvera.training.token_rows import RowResults
from qvera.utils.errors import InputError

tinker = pytest.importorskip("tinker")
types = tinker.types
pb = pytest.importorskip("tinker.proto.tinker_public_pb2")
LIMITS = 16, 50  # tokens of a row, and ids


def datum(tokens: Any = (1, 2, 3), **inputs: Any) -> Any:
    """A row as the client makes it; targets are 4, 5, 6 if none are given."""
    inputs.setdefault("target_tokens", np.arange(4, 4 + len(tokens)))
    chosen = {name: value for name, value in inputs.items() if value is not None}
    return types.Datum(model_input=types.ModelInput.from_ints(list(tokens)), loss_fn_inputs=chosen)


def body(
    *rows: Any, loss: str = "cross_entropy", config: dict[str, Any] | None = None, forward_only: bool = False
) -> Any:
    """The client's message for a call."""
    from tinker.proto.request_conv import forward_backward_request_to_proto
    from tinker.types.forward_backward_input import ForwardBackwardInput
    from tinker.types.forward_backward_request import ForwardBackwardRequest

    given = ForwardBackwardInput(data=list(rows), loss_fn=loss, loss_fn_config=config)
    message = forward_backward_request_to_proto(
        ForwardBackwardRequest(forward_backward_input=given, model_id="s:train:0", seq_id=7)
    )
    message.forward_only = forward_only
    return message


def decode(message: Any) -> ForwardBackward:
    return decode_forward_backward(message.SerializeToString(), *LIMITS)


def refusal(message: Any) -> str:
    with pytest.raises(InputError) as caught:
        decode(message)
    return str(caught.value)


POLICY = {"logprobs": np.float32([-1, -2, -3]), "advantages": np.float32([0, 1, -1])}


def test_field_numbers_and_types_are_those_of_the_client() -> None:
    for name, ours in messages.MESSAGES.items():
        theirs = getattr(
            pb,
            {"CallPlace": "ForwardBackwardRequest", "EncodedText": "EncodedTextChunk", "Unread": "ImageChunk"}.get(
                name, name
            ),
        ).DESCRIPTOR
        for field in ours.DESCRIPTOR.fields:
            same = theirs.fields_by_name[field.name]
            kinds = {field.type, same.type}
            assert field.number == same.number
            assert len(kinds) == 1 or kinds == {field.TYPE_INT32, field.TYPE_ENUM}


def test_a_call_of_the_client_is_read_as_it_was_written() -> None:
    rows = datum(weights=np.float32([0, 0.5, -2])), datum((1, 2), weights=[1.0, 2.0])
    call = decode(body(*rows))
    assert (call.loss, call.forward_only) == ("cross_entropy", False)
    assert call.rows[0].tokens.dtype == np.int64 and call.rows[0].tokens.tolist() == [1, 2, 3]
    assert call.rows[0].targets.dtype == np.int64 and call.rows[0].targets.tolist() == [4, 5, 6]
    weights = call.rows[0].inputs["weights"]
    assert weights.dtype == np.float32 and weights.tolist() == [0, 0.5, -2]


def test_chunks_of_a_row_are_joined_and_whole_numbers_are_inputs_too() -> None:
    row = datum((1, 2, 3), weights=np.array([0, 1, 1]))
    message = body(row)
    first, second = message.data[0].model_input.add(), message.data[0].model_input.add()
    first.encoded_text.tokens, second.encoded_text.tokens = np.int32([9]).tobytes(), b""
    for name, values in (("target_tokens", np.int64([1, 2, 3, 4])), ("weights", np.int64([0, 1, 1, 1]))):
        message.data[0].loss_fn_inputs[name].dense = values.tobytes()
        del message.data[0].loss_fn_inputs[name].shape[:]
    call = decode(message)
    assert call.rows[0].tokens.tolist() == [1, 2, 3, 9]
    assert call.rows[0].inputs["weights"].ravel().tolist() == [0, 1, 1, 1]


def test_several_targets_a_token_come_dense_or_sparse() -> None:
    targets = torch.tensor([[4, 5, 0, 0], [0, 7, 0, 0], [0, 0, 0, 0]])
    weights = torch.tensor([[0.25, 0.75, 0, 0], [0, 1.0, 0, 0], [0, 0, 0, 0]])
    sparse = datum(target_tokens=targets, weights=weights)
    assert sparse.loss_fn_inputs["weights"].sparse_crow_indices is not None
    dense = datum(target_tokens=targets.numpy(), weights=weights.numpy())
    for row in (sparse, dense):
        call = decode(body(row))
        np.testing.assert_array_equal(call.rows[0].targets, targets)
        np.testing.assert_array_equal(call.rows[0].inputs["weights"], weights)


def test_whole_numbers_of_32_bits_are_targets_too() -> None:
    message = body(datum(weights=np.float32([0, 1, 1])))
    targets = message.data[0].loss_fn_inputs["target_tokens"]
    targets.dtype, targets.dense = 3, np.int32([4, 5, 6]).tobytes()
    assert decode(message).rows[0].targets.ravel().tolist() == [4, 5, 6]


def test_missing_weights_are_zero_only_where_nothing_is_trained() -> None:
    assert decode(body(datum(), forward_only=True)).rows[0].inputs["weights"].tolist() == [0, 0, 0]
    assert "data[0]: loss_fn_inputs.weights is missing" in refusal(body(datum()))


@pytest.mark.parametrize("loss", TOKEN_LOSSES)
def test_settings_are_complete(loss: str) -> None:
    needed = {name: np.float32([1, 1, 1]) for name in TOKEN_LOSSES[loss].inputs}
    config = {"beta": 0.05} if loss == "dro" else None
    assert decode(body(datum(**needed), loss=loss, config=config)).settings == {
        **TOKEN_LOSSES[loss].settings,
        **(config or {}),
    }


def test_the_newer_field_of_settings_wins() -> None:
    message = body(datum(**POLICY), loss="ppo", config={"clip_low_threshold": 0.5, "clip_high_threshold": 2.0})
    message.loss_fn_config["clip_low_threshold"] = 0.1
    assert decode(message).settings == {"clip_low_threshold": 0.5, "clip_high_threshold": 2.0}


@pytest.mark.parametrize(
    ("loss", "config", "expected"),
    [
        ("ppo", {"clip_low": 0.5}, "loss_fn_config.clip_low: is no setting of ppo, which has clip_low_threshold"),
        ("ppo", {"clip_low_threshold": "low"}, "clip_low_threshold: expected a number, found 'low'"),
        (
            "ppo",
            {"clip_low_threshold": float("nan")},
            "loss_fn_config.clip_low_threshold: ppo takes a finite number, got nan",
        ),
        ("ppo", {"clip_low_threshold": 1.5}, "clip_low_threshold 1.5 is above clip_high_threshold 1.2"),
        ("dro", {}, "loss_fn_config.beta: dro takes a finite number, got None"),
        ("stable_reinforce", {"kl_coeff": 0.1}, "stable_reinforce is not supported"),
        ("custom", {}, "custom is not supported"),
        ("dpo", {}, "dpo is not supported. Expected one of cross_entropy"),
    ],
)
def test_bad_settings_and_losses_are_refused_by_name(loss: str, config: dict[str, Any], expected: str) -> None:
    message = body(datum(**POLICY))
    message.loss_fn = loss
    for name, value in config.items():
        setattr(message.loss_fn_config_v2[name], "text" if isinstance(value, str) else "number", value)
    assert expected in refusal(message)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], "data: has no rows"),
        ([datum(weights=[0.0, 1, 1]), datum(target_tokens=None, weights=[0.0, 1, 1])], "data[1]: loss_fn_inputs.target_tokens is missing"),
        ([datum((), weights=[])], "data[0]: has 0 tokens; this base takes 1 to 16"),
        ([datum([1] * 17, weights=[1.0] * 17)], "has 17 tokens"),
        ([datum((1, 2, 50), weights=[1.0] * 3)], "model_input has ids from 1 to 50; this base has 0 to 49"),
        ([datum((1, 2, -1), weights=[1.0] * 3)], "model_input has ids from -1 to 2"),
        ([datum(target_tokens=[1, 2, -100], weights=[1.0] * 3)], "target_tokens has ids from -100 to 2; this base has 0 to 49"),
        ([datum(target_tokens=np.float32([1, 2, 3]), weights=[1.0] * 3)], "target_tokens has fractions"),
        ([datum(target_tokens=[1, 2], weights=[1.0] * 2)], "target_tokens: has the shape [2]; the row has 3 tokens"),
        ([datum(weights=[1.0] * 2)], "weights: has the shape [2]"),
        ([datum(weights=np.ones((3, 1), np.float32))], "weights has the shape [3, 1]; expected that of target_tokens, [3]"),
        ([datum(target_tokens=np.ones((3, 1, 1), np.int64), weights=[1.0] * 3)], "target_tokens: has the shape [3, 1, 1]"),
        ([datum(weights=[1.0, float("nan"), 1.0])], "loss_fn_inputs.weights has NaN or Inf"),
        ([datum(weights=[1.0] * 3, mask=np.float32([1, 1, 1]))], "loss_fn_inputs.mask is no input of this loss. cross_entropy takes target_tokens, weights"),
    ],
)  # fmt: skip
def test_bad_rows_are_refused_with_their_number_and_field(rows: list[Any], expected: str) -> None:
    assert expected in refusal(body(*rows))


def test_one_target_a_token_is_what_losses_of_rewards_take() -> None:
    row = datum(target_tokens=np.ones((3, 2), np.int64), **{name: np.ones((3, 2), np.float32) for name in POLICY})
    assert "target_tokens has several targets a token" in refusal(body(row, loss="importance_sampling"))


@pytest.mark.parametrize("kind", ["image", "dmel"])
def test_images_and_sound_are_refused_by_name(kind: str) -> None:
    message = body(datum(weights=[1.0] * 3))
    chunk = message.data[0].model_input.add()
    if kind == "image":
        chunk.image.data, chunk.image.format = b"...", "png"
    else:
        chunk.dmel.dmel = b"..."
    assert f"data[0]: model_input: a chunk of {kind} is not supported" in refusal(message)


def test_damaged_tensors_are_refused() -> None:
    def damaged(name: str, change: Any) -> str:
        targets = torch.tensor([[4, 5, 0, 0], [0, 7, 0, 0], [0, 0, 0, 0]])
        message = body(datum(target_tokens=targets, weights=torch.ones(3, 4)))
        assert message.data[0].loss_fn_inputs["target_tokens"].HasField("sparse_csr")
        change(message.data[0].loss_fn_inputs[name])
        return refusal(message)

    def set_indices(which: str, values: list[int]) -> Any:
        return lambda tensor: setattr(tensor.sparse_csr, which, np.int64(values).tobytes())

    for values in ([0, 2, 3], [1, 2, 3, 3], [0, 2, 1, 3], [0, 2, 3, 4], [0, 2**63 - 1, -2, 3]):
        assert "target_tokens: is no CSR tensor" in damaged("target_tokens", set_indices("crow_indices", values))
    for values in ([0, 1], [0, 1, 4], [0, 1, -1]):
        assert "target_tokens: is no CSR tensor" in damaged("target_tokens", set_indices("col_indices", values))
    assert "has the dtype 9" in damaged("weights", lambda tensor: setattr(tensor, "dtype", 9))
    assert "weights: has 5 bytes" in damaged("weights", lambda tensor: setattr(tensor, "dense", b"12345"))
    assert "weights: has 1 numbers" in damaged("weights", lambda tensor: setattr(tensor, "dense", b"1234"))


def test_a_small_sparse_body_can_not_claim_huge_memory() -> None:
    message = body(datum(target_tokens=torch.tensor([[1, 2]] * 3), weights=torch.tensor([[1.0, 1.0]] * 3)))
    message.data[0].loss_fn_inputs["target_tokens"].shape[1] = 10**9
    assert "a call at most 16,777,216" in refusal(message)
    message.data[0].loss_fn_inputs["target_tokens"].shape[1] = 10**6
    assert "K from 1 to 1,024" in refusal(message)


def test_a_shape_of_many_sides_is_refused_without_their_product() -> None:
    message, began = body(datum(weights=[1.0] * 3)), time.monotonic()
    message.data[0].loss_fn_inputs["weights"].shape.extend([2**62] * 200_000)
    assert len(refusal(message)) < 200
    assert time.monotonic() - began < 5


def test_a_body_names_its_call_also_where_the_rest_is_damaged() -> None:
    whole = body(datum(weights=[1.0] * 3)).SerializeToString()
    for sent in (whole, whole[:-5]):
        assert call_of(sent) == ("s:train:0", 7)
    for broken in (whole[:-5], b'{"model_id": "s:train:0"}'):
        with pytest.raises(InputError, match="no ForwardBackwardRequest"):
            decode_forward_backward(broken, *LIMITS)
    with pytest.raises(InputError, match="with a model_id"):
        call_of(b'{"model_id": "s:train:0"}')


def test_a_compressed_body_is_read_within_its_limit() -> None:
    content = bytes(10_000)
    frame = zstandard.compress(content)
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(content)
    for packed in (frame, unsized):
        assert messages.decompress(packed, 10_000) == content
        with pytest.raises(InputError, match="9,999 bytes"):
            messages.decompress(packed, 9_999)
    for broken in (frame[:-3], b"no frame", b""):
        with pytest.raises(InputError, match="no zstd frame"):
            messages.decompress(broken, 10_000)


def test_what_is_nested_too_deeply_is_told_and_no_failure() -> None:
    nested: dict[str, Any] = {}
    for _ in range(30_000):
        nested = {"a": nested}
    with pytest.raises(ValueError, match="is nested too deeply"):
        NewSession(user_metadata=nested)


def test_results_come_back_in_order_with_their_shapes() -> None:
    from tinker.proto.response_conv import deserialize_forward_backward_output

    shapes: list[tuple[int, ...]] = [(3,), (2,), (2, 4), (1, 1), (5,)]
    logprobs = [-np.random.default_rng(0).random(shape, np.float32) for shape in shapes]
    encoded = messages.encode_forward_backward(RowResults(logprobs, 1.5))
    output = deserialize_forward_backward_output(encoded)
    assert output.metrics == {"loss:sum": 1.5} and output.loss_fn_output_type == "ArrayRecord"
    assert len(pb.ForwardBackwardOutput.FromString(encoded).loss_fn_outputs) == 4
    for found, expected in zip(output.loss_fn_outputs, logprobs, strict=True):
        np.testing.assert_array_equal(found["logprobs"].to_numpy(), expected)

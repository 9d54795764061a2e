"""The protobuf messages of Tinker's API: a body of forward_backward is read, and its result written.

The classes are made at import from the field numbers of the protocol, in a pool of their own. So there is no generated
file, and Tinker's client may live in the same process. Numbers in ``bytes`` fields are little-endian.
"""

import contextlib
import itertools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import zstandard
from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from qvera.models.token_losses import TOKEN_LOSSES
from qvera.training.token_rows import RowResults, TokenRow
from qvera.utils.errors import InputError

# Fields in the order of their numbers, which begin with 1. `*` repeated, `%` map by text, `?` one of which is set.
# Provenance spans are left out, as unknown fields: only losses that are refused read them. Enums travel as int32.
_FIELDS = """
ForwardBackwardRequest model_id string, seq_id int32, data Datum*, loss_fn string, loss_fn_config double%,\
 forward_only bool, loss_fn_config_v2 LossConfigValue%
LossConfigValue number double?, text string?
Datum model_input Chunk*, loss_fn_inputs Tensor%
Chunk encoded_text EncodedText?, image Unread?, dmel Unread?
EncodedText tokens bytes
Unread
CallPlace model_id string, seq_id int32
Tensor dense bytes?, sparse_csr SparseCsr?, dtype int32, shape int64*
SparseCsr values bytes, crow_indices bytes, col_indices bytes
ForwardBackwardOutput loss_fn_output_type string, loss_fn_outputs ArrayRecord*, metrics double%
ArrayRecord type_tag string, fields BatchedTensor%, num_datums int64
BatchedTensor data bytes, offsets bytes, dtype int32, trailing_shape int64*
SampleResponse sequences SampledSequence*, prompt_logprobs bytes, topk_prompt_logprobs TopkLogprobs,\
 prompt_cache_hit_tokens int32, target_prompt_logprobs Tensor, prompt_alt_tokens PromptAltTokens
SampledSequence stop_reason int32, tokens bytes, logprobs bytes, topk_sampled_logprobs TopkLogprobs
TopkLogprobs token_ids bytes, logprobs bytes, k uint32, length uint32
PromptAltTokens tokens Tensor, logprobs Tensor
"""
_PACKAGE = "tinker_public"
_SCALARS = {"double": 1, "int64": 3, "int32": 5, "bool": 8, "string": 9, "bytes": 12, "uint32": 13}
_OPTIONAL, _REPEATED, _MESSAGE = 1, 3, 11


def _add_field(message: DescriptorProto, number: int, name: str, kind: str) -> None:
    mark = kind[-1] if kind[-1] in "*%?" else ""
    kind = kind.rstrip("*%?")
    field = message.field.add(name=name, number=number, label=_REPEATED if mark in ("*", "%") else _OPTIONAL)
    if mark == "?":
        field.oneof_index = 0
        if not message.oneof_decl:
            message.oneof_decl.add(name="value")
    elif mark == "%":  # protobuf has a map as a list of entries
        entry = message.nested_type.add(name=f"{name.title().replace('_', '')}Entry")
        entry.options.map_entry = True
        _add_field(entry, 1, "key", "string")
        _add_field(entry, 2, "value", kind)
        kind = f"{message.name}.{entry.name}"
    field.type = _SCALARS.get(kind, _MESSAGE)
    if field.type == _MESSAGE:
        field.type_name = f".{_PACKAGE}.{kind}"


def _message_classes() -> dict[str, Any]:
    file = FileDescriptorProto(name="tinker_public.proto", package=_PACKAGE, syntax="proto3")
    for line in _FIELDS.strip().splitlines():
        name, _, fields = line.partition(" ")
        message = file.message_type.add(name=name)
        for number, field in enumerate(filter(None, fields.split(", ")), start=1):
            _add_field(message, number, *field.split())
    pool = DescriptorPool()
    pool.Add(file)
    names = [message.name for message in file.message_type]
    return {name: GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in names}


MESSAGES = _message_classes()
"""Name of a message → its class."""
FLOAT32, INT64, INT32 = 1, 2, 3
_DTYPES: dict[int, np.dtype[Any]] = {FLOAT32: np.dtype("<f4"), INT64: np.dtype("<i8"), INT32: np.dtype("<i4")}
"""The client sends no bfloat16, which the protocol has as 4."""
_MOST_COLUMNS = 1024  # targets of one position
_MOST_CELLS = 1 << 24  # of all targets and inputs of a call, which may come sparse and are held dense
_TARGETS = "target_tokens"
_REFUSED_LOSSES = {
    "stable_reinforce": "its formula is not published",
    "custom": "the server runs no code of clients; forward_backward_custom with a function computes it in the client",
}


class ForwardBackward(NamedTuple):
    """A call, as `Tenants.forward_backward` takes it."""

    rows: list[TokenRow]
    loss: str
    settings: dict[str, float]
    forward_only: bool


def decompress(body: bytes, most_bytes: int) -> bytes:
    """The content of a zstd frame. Raises InputError for a broken frame, or a content of more than ``most_bytes``."""
    try:
        if zstandard.frame_content_size(body) <= most_bytes:  # -1: not told; then the argument is the limit
            return zstandard.ZstdDecompressor().decompress(body, max_output_size=most_bytes)
    except zstandard.ZstdError as error:
        raise InputError(f"the body is no zstd frame of at most {most_bytes:,} bytes ({error}).") from None
    raise InputError(f"the body expands to more than {most_bytes:,} bytes, the most that is taken.")


def call_of(body: bytes) -> tuple[str, int]:
    """The model and seq_id of a body of forward_backward, also of a damaged one. Raises InputError if it has none."""
    place = MESSAGES["CallPlace"]()
    with contextlib.suppress(DecodeError):  # what came before the damage was read
        place.ParseFromString(body)
    if not place.model_id:
        raise InputError(
            "the body is no ForwardBackwardRequest with a model_id. forward_backward takes protobuf, as Tinker's "
            "client sends it, and no JSON."
        )
    return place.model_id, place.seq_id


def decode_forward_backward(body: bytes, most_tokens: int, vocabulary: int) -> ForwardBackward:
    """Read a body of forward_backward. Raises InputError that names the field.

    ``most_tokens``: of a row. Token ids are below ``vocabulary``.
    """
    request = MESSAGES["ForwardBackwardRequest"]()
    try:
        request.ParseFromString(body)
    except DecodeError as error:
        raise InputError(f"the body is no ForwardBackwardRequest ({error}).") from None
    rows, name, forward_only = list[TokenRow](), request.loss_fn, request.forward_only
    if name not in TOKEN_LOSSES:
        why = f": {_REFUSED_LOSSES[name]}" if name in _REFUSED_LOSSES else ""
        others = ", ".join(TOKEN_LOSSES)
        raise InputError(f"loss_fn: {name[:100]} is not supported{why}. Expected one of {others}.")
    settings = _settings(request)
    if not request.data:
        raise InputError("data: has no rows.")
    tensors = [tensor for datum in request.data for tensor in datum.loss_fn_inputs.values()]
    if (cells := sum(math.prod(map(abs, tensor.shape[:2])) for tensor in tensors)) > _MOST_CELLS:
        raise InputError(f"data: has {cells:,} numbers, and a call at most {_MOST_CELLS:,}; send fewer rows.")
    for number, datum in enumerate(request.data):
        try:
            rows.append(_row(datum, name, forward_only, most_tokens, vocabulary))
        except InputError as error:
            raise InputError(f"data[{number}]: {error}") from None
    return ForwardBackward(rows, name, settings, forward_only)


def _settings(request: Any) -> dict[str, float]:
    name, usual = request.loss_fn, TOKEN_LOSSES[request.loss_fn].settings
    chosen = {**usual, **request.loss_fn_config}
    for key, value in request.loss_fn_config_v2.items():
        if value.WhichOneof("value") != "number":
            raise InputError(f"loss_fn_config.{key[:100]}: expected a number, found {value.text[:100]!r}.")
        chosen[key] = value.number
    for key, number in chosen.items():
        if key not in usual:
            known = ", ".join(usual) or "none"
            raise InputError(f"loss_fn_config.{key[:100]}: is no setting of {name}, which has {known}.")
        if number is None or not math.isfinite(number):
            raise InputError(f"loss_fn_config.{key}: {name} takes a finite number, got {number}.")
    low, high = (chosen.get(f"clip_{end}_threshold") for end in ("low", "high"))
    if low is not None and high is not None and low > high:
        raise InputError(f"loss_fn_config: clip_low_threshold {low:g} is above clip_high_threshold {high:g}.")
    return {key: number for key, number in chosen.items() if number is not None}


def _row(datum: Any, loss: str, forward_only: bool, most_tokens: int, vocabulary: int) -> TokenRow:
    tokens = _tokens(datum.model_input)
    if not 1 <= len(tokens) <= most_tokens:
        raise InputError(f"has {len(tokens):,} tokens; this base takes 1 to {most_tokens:,}.")
    given = sorted(datum.loss_fn_inputs.items())
    arrays = {name: _tensor(name[:100], tensor, len(tokens)) for name, tensor in given}
    if forward_only and loss == "cross_entropy" and _TARGETS in arrays:
        arrays.setdefault("weights", np.zeros(arrays[_TARGETS].shape))  # the client sends none where it needs no loss
    wanted = {_TARGETS, *TOKEN_LOSSES[loss].inputs}
    if odd := sorted(wanted ^ arrays.keys()):
        why = "missing" if odd[0] in wanted else "no input of this loss"
        raise InputError(f"loss_fn_inputs.{odd[0][:100]} is {why}. {loss} takes {', '.join(sorted(wanted))}.")
    targets = arrays.pop(_TARGETS)
    if targets.dtype.kind != "i":
        raise InputError(f"{_TARGETS} has fractions; expected int64.")
    if targets[0].size > 1 and loss != "cross_entropy":
        raise InputError(f"{_TARGETS} has several targets a token, which cross_entropy alone takes.")
    for name, ids in (("model_input", tokens), (_TARGETS, targets)):
        if ids.min() < 0 or ids.max() >= vocabulary:
            raise InputError(f"{name} has ids from {ids.min()} to {ids.max()}; this base has 0 to {vocabulary - 1}.")
    for name, values in arrays.items():
        if values.shape != targets.shape:
            found = f"{name} has the shape {list(values.shape)}"
            raise InputError(f"{found}; expected that of {_TARGETS}, {list(targets.shape)}.")
        if not np.isfinite(values).all():
            raise InputError(f"loss_fn_inputs.{name} has NaN or Inf.")
    inputs = {name: values.astype(np.float32) for name, values in arrays.items()}
    return TokenRow(tokens, targets.astype(np.int64), inputs)


def _tokens(chunks: Iterable[Any]) -> np.ndarray:
    found = [np.empty(0, np.int64)]
    for chunk in chunks:
        if (kind := chunk.WhichOneof("value")) != "encoded_text":
            raise InputError(f"model_input: a chunk of {kind or 'no kind'} is not supported; expected encoded_text.")
        found.append(_numbers("model_input", chunk.encoded_text.tokens, INT32).astype(np.int64))
    return np.concatenate(found)


def _numbers(name: str, data: bytes, code: int) -> np.ndarray:
    if (kind := _DTYPES.get(code)) is None:
        raise InputError(f"{name}: has the dtype {code}; expected 1 (float32), 2 (int64) or 3 (int32).")
    if len(data) % kind.itemsize:
        raise InputError(f"{name}: has {len(data):,} bytes, which are no whole numbers of {kind.itemsize} bytes.")
    return np.frombuffer(data, kind)


def _tensor(name: str, tensor: Any, tokens: int) -> np.ndarray:
    """A tensor of shape [tokens] or [tokens, K], dense."""
    is_sparse = tensor.WhichOneof("value") == "sparse_csr"
    values = _numbers(name, tensor.sparse_csr.values if is_sparse else tensor.dense, tensor.dtype)
    shape = tuple(tensor.shape[:3]) or (len(values),)  # with more than two it is refused, however many there are
    if shape != (tokens,) and not (len(shape) == 2 and shape[0] == tokens and 0 < shape[1] <= _MOST_COLUMNS):
        raise InputError(
            f"{name}: has the shape {list(shape)}; the row has {tokens} tokens, so expected [{tokens}] or "
            f"[{tokens}, K] with K from 1 to {_MOST_COLUMNS:,}."
        )
    if not is_sparse:
        if len(values) != math.prod(shape):
            raise InputError(f"{name}: has {len(values):,} numbers, and the shape {list(shape)}.")
        return values.reshape(shape)
    starts = _numbers(f"{name}.crow_indices", tensor.sparse_csr.crow_indices, INT64)
    columns = _numbers(f"{name}.col_indices", tensor.sparse_csr.col_indices, INT64)
    return dense_of(name, values, starts, columns, shape)


def dense_of(
    name: str, values: np.ndarray, starts: np.ndarray, columns: np.ndarray, shape: tuple[int, ...], fill: int = 0
) -> np.ndarray:
    """Return a tensor that came as CSR, as a dense one; missing cells are ``fill``. Raises InputError."""
    counts = np.diff(starts)
    if (
        len(shape) != 2
        or len(starts) != shape[0] + 1
        or (counts < 0).any()
        or ((starts < 0) | (starts > len(values))).any()  # so that no count has wrapped round
        or (starts[0], starts[-1]) != (0, len(values))
        or len(columns) != len(values)
        or ((columns < 0) | (columns >= shape[1])).any()
    ):
        raise InputError(f"{name}: is no CSR tensor of the shape {list(shape)}.")
    dense = np.full(shape, fill, values.dtype)
    dense[np.repeat(np.arange(shape[0]), counts), columns] = values
    return dense


def packed(dtype: int, values: npt.ArrayLike) -> bytes:
    """Return numbers as a ``bytes`` field holds them."""
    return np.ascontiguousarray(values, _DTYPES[dtype]).tobytes()


def encode_forward_backward(results: RowResults) -> bytes:
    """Write a ForwardBackwardOutput. Neighbouring rows of one trailing shape stand in one record."""
    output = MESSAGES["ForwardBackwardOutput"](loss_fn_output_type="ArrayRecord", metrics={"loss:sum": results.loss})
    for trailing, group in itertools.groupby(results.logprobs, key=lambda logprobs: logprobs.shape[1:]):
        parts = [packed(FLOAT32, logprobs) for logprobs in group]
        record = output.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=len(parts))
        field = record.fields["logprobs"]
        field.data, field.dtype = b"".join(parts), FLOAT32
        field.offsets = packed(INT64, np.cumsum([0, *map(len, parts)]))
        field.trailing_shape.extend(trailing)
    return output.SerializeToString()

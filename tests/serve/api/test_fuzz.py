"""Bodies made from the OpenAPI schema, right ones and wrong ones: never an error of the server's own."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import hypothesis
import schemathesis

from tests.serve.api.conftest import Start

EXAMPLES = {"positive": 4, "negative": 3}
"""Of each of the 23 operations."""


def test_no_body_makes_the_server_fail(start: Start, tmp_path: Path) -> None:
    served = start(body_seconds=5, seconds=20, training_dir=tmp_path / "training")
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    found = {(one.label, mode): statuses_of(one, mode) for one in operations for mode in EXAMPLES}
    assert len(found) == 2 * 23
    chat, text = "POST /v1/chat/completions", "POST /v1/completions"
    assert 200 in found[chat, "positive"] | found[text, "positive"], found  # some were answered
    assert found[text, "negative"] <= {400, 404, 405, 408, 413, 415}, found
    assert served.chat().status_code == 200


def statuses_of(operation: Any, mode: str) -> set[int]:
    """The statuses of calls of one operation."""
    seen, silent = set(), list(hypothesis.HealthCheck)

    @hypothesis.settings(
        max_examples=EXAMPLES[mode], deadline=None, derandomize=True, database=None, suppress_health_check=silent
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
    def call(case: Any) -> None:
        if mode == "positive" and isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = "tiny"  # past the first refusal
        response = case.call()
        seen.add(response.status_code)
        assert response.status_code < 500, (case.as_curl_command(), response.text)
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    with contextlib.suppress(hypothesis.errors.Unsatisfiable):  # nothing is wrong with a call that takes nothing
        call()
    return seen

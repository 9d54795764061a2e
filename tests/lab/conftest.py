"""Fixtures of other rooms that tests of research methods use."""

from tests.data.conftest import base_tokenizer, make_tokenizer, write  # noqa: F401

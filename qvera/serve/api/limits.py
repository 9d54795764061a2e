"""What one request may take, and one place for the defaults."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a server. A request beyond one is refused with the number that it may have."""

    connections: int = 512
    """Open at a time. Beyond that, the one that has waited longest for a whole request gives way."""
    head_seconds: float = 15.0
    """A connection on which no request's head arrives for so long is closed."""
    body_bytes: int = 1 << 20
    body_seconds: float = 30.0
    """A body that takes longer to arrive is not waited for."""
    messages: int = 256
    prompt_tokens: int = 32_768
    """Of one prompt; the engine's own limit may be lower."""
    new_tokens: int = 4_096
    """Of one answer."""
    answers: int = 16
    """Of one call: prompts times n."""
    open_answers: int = 128
    """Of one key, running or waiting; so that others find room in the queue. Without keys there is no such limit."""
    file_bytes: int = 512 << 20
    """Of one uploaded file; 256 KiB of it must arrive within ``body_seconds``."""
    files: int = 100
    """Uploaded files of one key. Without keys there is no such limit."""
    open_jobs: int = 16
    """Fine-tuning jobs of one key that have not ended. Without keys there is no such limit."""
    jobs_at_once: int = 8
    """Fine-tuning jobs that are trained together."""
    stop_strings: int = 4
    stop_characters: int = 256
    """Of one stop string."""
    top_logprobs: int = 20
    seconds: float = 600.0
    """From a call's arrival to its last token."""
    send_seconds: float = 60.0
    """A client that takes nothing for so long is let go."""
    drain_seconds: float = 30.0
    """After SIGTERM: running requests may finish until then."""
    retry_seconds: int = 1
    """What a refused client is told to wait."""


DEFAULTS = Limits()

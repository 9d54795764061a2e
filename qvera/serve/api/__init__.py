"""The HTTP side of a server: OpenAI's API over an engine. Only its own modules import FastAPI."""

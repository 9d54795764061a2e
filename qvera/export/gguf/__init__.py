"""GGUF files, which llama.cpp and Ollama read: a merged model, or an adapter as a LoRA."""

from qvera.export.gguf.adapter import export_gguf_lora
from qvera.export.gguf.model import export_gguf

__all__ = ["export_gguf", "export_gguf_lora"]

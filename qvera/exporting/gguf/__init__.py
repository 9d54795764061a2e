"""GGUF files, which llama.cpp and Ollama read: a merged model, or an adapter as a LoRA."""

from qvera.exporting.gguf.adapter import export_gguf_lora
from qvera.exporting.gguf.model import export_gguf

__all__ = ["export_gguf", "export_gguf_lora"]

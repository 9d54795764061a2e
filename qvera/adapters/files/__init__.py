"""Adapter files: reading, checking and writing them, PEFT's LoRA files among them, and the cache of frozen factors."""

"""Adapter files, also PEFT's LoRA files, and the cache of frozen factors."""

"""Errors, paths, formatting, memory readings, atomic files and safetensors files. Nothing here knows a model."""

"""The training loop, its checkpoints and logs, and the memory plan made before it."""

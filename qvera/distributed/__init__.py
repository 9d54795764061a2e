"""Several processes as one run: the group, launching, heartbeats, and DeepSpeed ZeRO settings."""

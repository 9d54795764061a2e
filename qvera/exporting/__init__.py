"""Export: merged checkpoints, LoRAs and GGUF files, each with a certificate of what was made of what."""

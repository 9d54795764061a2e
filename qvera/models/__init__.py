"""The frozen base model: loading, 4-bit quantization, memory-mapped weights, frozen linears and the loss."""

"""Many adapters trained together, in one pass over one base model."""

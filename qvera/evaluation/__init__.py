"""Open a run, answer prompts, compute held-out loss and metrics, and write the reports."""

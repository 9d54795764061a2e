"""Fine-tuning by API: uploaded files, and jobs that are trained on the base that answers. Imports no FastAPI."""

"""Fine-tuning by API: uploaded files, and jobs that train on the base that is served. Imports no FastAPI."""

"""`qvera ui`: pages over runs while they train. Reads their files only; loads no torch and no model."""

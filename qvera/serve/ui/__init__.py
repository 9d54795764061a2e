"""`qvera ui`: pages over runs while they train. It only reads their files, and loads no torch and no model."""

"""The recipe: its schema with every default, and the file it is read from."""

"""Tinker's training API, version 0.38 of its client: the loop is the client's, the server trains and answers."""

"""Serving: one base and many adapters that answer requests as they come."""

"""The products of an adapted linear and their backward passes, as autograd functions.

Each has a plain reference in the tests.
"""

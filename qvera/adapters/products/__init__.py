"""The products of an adapted linear and their backward passes, as autograd functions."""

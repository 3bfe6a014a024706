"""Losses whose gradients are formed in the same pass as their value."""

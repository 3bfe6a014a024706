"""Measures of frozen features: classification, equivariance, and how well they predict transformations."""

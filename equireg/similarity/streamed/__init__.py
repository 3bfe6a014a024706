"""Similarity matrices formed tile by tile, on any device."""

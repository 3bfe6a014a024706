"""Data sets for the methods: with indices, few labels, or contexts."""

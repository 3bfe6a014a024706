"""Data sets as the methods need them: with indices, with few labels, with contexts."""

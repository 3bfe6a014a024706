"""Transformed image reconstruction: weak decoders rebuild the images half-way along a transformation."""

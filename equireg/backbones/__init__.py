"""Backbones whose intermediate token maps can be read, without a fork of the model."""

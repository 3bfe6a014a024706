"""Reading a backbone's intermediate token maps, without a fork of the model."""

"""What the papers compare with, each on any layer."""

"""What puts the regularizers into other packages' trainers; each module needs its package, and is imported by name."""

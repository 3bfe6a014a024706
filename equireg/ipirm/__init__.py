"""IP-IRM: partitions that expose what is still entangled, and invariance across them (Wang et al., NeurIPS 2021)."""

"""SER: soft equivariance of an intermediate token map under known group actions (Lee et al., ICLR 2026)."""

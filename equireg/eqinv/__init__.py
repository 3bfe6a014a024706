"""EqInv: environments found from adjusted similarities, and class-wise invariance over them (ECCV 2022)."""

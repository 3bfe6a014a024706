"""Row-wise log-sum-exp of a similarity matrix that is never stored."""

from equireg.similarity.dense import accumulation_dtype, exactly
from equireg.similarity.fused.split_lse import split_lse
from equireg.similarity.log_sum_exp import mean_contrast, pair_lse
from equireg.similarity.normalization import inverse_length, normalized
from equireg.similarity.products import gram, times_transposed

__all__ = [
    "accumulation_dtype",
    "exactly",
    "gram",
    "inverse_length",
    "mean_contrast",
    "normalized",
    "pair_lse",
    "split_lse",
    "times_transposed",
]

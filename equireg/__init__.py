"""Plug-in regularizers that make vision models learn more from less data."""

from equireg.class_risks import ClassRisks, class_wise_risks
from equireg.class_similarity import adjusted_similarity
from equireg.datasets import WithIndex
from equireg.environments import Environments
from equireg.eqinv import ClassWiseIRM, FeatureMask
from equireg.features import extract_features
from equireg.grid import GridTransform
from equireg.invariance import irmv1_penalty, rex_penalty
from equireg.similarity import pair_lse

__version__ = "0.1.0"

__all__ = [
    "ClassRisks",
    "ClassWiseIRM",
    "Environments",
    "FeatureMask",
    "GridTransform",
    "WithIndex",
    "adjusted_similarity",
    "class_wise_risks",
    "extract_features",
    "irmv1_penalty",
    "pair_lse",
    "rex_penalty",
]

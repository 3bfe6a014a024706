"""What frozen features can do: classify, turn with the image, tell how the image was transformed."""

from equireg.probes.classification import knn_accuracy, linear_probe
from equireg.probes.equivariance import equivariance_score
from equireg.probes.transformation import transformation_accuracy, transformation_r2

__all__ = ["equivariance_score", "knn_accuracy", "linear_probe", "transformation_accuracy", "transformation_r2"]

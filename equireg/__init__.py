"""Plug-in regularizers that make vision models learn more from less data."""

from equireg.class_risks import ClassRisks, class_wise_risks
from equireg.class_similarity import adjusted_similarity
from equireg.color_bias import ColorBias
from equireg.contrastive_distillation import ContrastiveDistillation
from equireg.datasets import WithIndex, k_shot
from equireg.decoupled import AugSelfLoss, EquiModLoss
from equireg.distillation import DistillationLoss, FeatureDistillation, OverhaulDistillation
from equireg.domains import read_domains
from equireg.environments import Environments
from equireg.eqinv import ClassWiseIRM, FeatureMask
from equireg.features import extract_features, extract_two_views, extract_view_features
from equireg.grid import GridTransform
from equireg.image_files import ImageFiles
from equireg.image_folders import read_image_folder, read_vipriors
from equireg.inference import ensemble, fit_ensemble_weights, predict_tta
from equireg.info_nce import soft_info_nce
from equireg.intermediate_views import IntermediateViews
from equireg.invariance import irmv1_penalty, rex_penalty
from equireg.ipirm import IPIRMLoss, mix_images
from equireg.ipirm_methods import MoCoIPIRMLoss, SimSiamIPIRMLoss
from equireg.late_class_token import LateClassToken
from equireg.nico import read_nico
from equireg.partitions import PartitionReport, PartitionUpdater
from equireg.probes import (
    equivariance_score,
    knn_accuracy,
    linear_probe,
    transformation_accuracy,
    transformation_r2,
)
from equireg.reconstruction import IntermediateReconstructionHead
from equireg.ser import SERLoss, patch_nt_xent
from equireg.similarity import pair_lse
from equireg.token_tap import TokenTap
from equireg.views import EquivariantViews, mocov3_photometric, split_batch

__version__ = "0.1.0"

__all__ = [
    "AugSelfLoss",
    "ClassRisks",
    "ClassWiseIRM",
    "ColorBias",
    "ContrastiveDistillation",
    "DistillationLoss",
    "Environments",
    "EquiModLoss",
    "EquivariantViews",
    "FeatureDistillation",
    "FeatureMask",
    "GridTransform",
    "IPIRMLoss",
    "ImageFiles",
    "IntermediateReconstructionHead",
    "IntermediateViews",
    "LateClassToken",
    "MoCoIPIRMLoss",
    "OverhaulDistillation",
    "PartitionReport",
    "PartitionUpdater",
    "SERLoss",
    "SimSiamIPIRMLoss",
    "TokenTap",
    "WithIndex",
    "adjusted_similarity",
    "class_wise_risks",
    "ensemble",
    "equivariance_score",
    "extract_features",
    "extract_two_views",
    "extract_view_features",
    "fit_ensemble_weights",
    "irmv1_penalty",
    "k_shot",
    "knn_accuracy",
    "linear_probe",
    "mix_images",
    "mocov3_photometric",
    "pair_lse",
    "patch_nt_xent",
    "predict_tta",
    "read_domains",
    "read_image_folder",
    "read_nico",
    "read_vipriors",
    "rex_penalty",
    "soft_info_nce",
    "split_batch",
    "transformation_accuracy",
    "transformation_r2",
]

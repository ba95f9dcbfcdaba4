"""Parts that methods of several families share."""

from __future__ import annotations

import dattri_core as dattri

LAYERS = "dattri_parts.sources.layers"
LAYER_RULES = {
    "torch.nn.modules.linear.Linear": "linear:LinearRule",
    "transformers.pytorch_utils.Conv1D": "linear:TransposedLinearRule",
    "torch.nn.modules.conv.Conv1d": "convolution:ConvolutionRule",
    "torch.nn.modules.conv.Conv2d": "convolution:ConvolutionRule",
    "torch.nn.modules.conv.Conv3d": "convolution:ConvolutionRule",
    "torch.nn.modules.sparse.Embedding": "embedding:EmbeddingRule",
    "torch.nn.modules.normalization.LayerNorm": "norm:LayerNormRule",
    "torch.nn.modules.normalization.RMSNorm": "norm:RMSNormRule",
    "torch.nn.modules.normalization.GroupNorm": "norm:GroupNormRule",
    "torch.nn.modules.batchnorm._BatchNorm": "norm:BatchNormRule",
}
"""Class of a module -> the rule for its per-example gradients."""


@dattri.hookimpl
def register(registry: dattri.Registry) -> None:
    """Name them; nothing is imported until it is used."""
    registry.part(
        "source",
        "per-example",
        "dattri_parts.sources.per_example:PerExample",
        "Per-example gradients, kept as factors of each layer",
    )
    registry.part(
        "source",
        "functional",
        "dattri_parts.sources.functional:Functional",
        "Per-example gradients of any function of parameters and batch",
    )
    registry.part(
        "source",
        "representation",
        "dattri_parts.sources.representation:Representation",
        "Features of examples: of any module, the input, or a function; with labels",
    )
    registry.part(
        "source",
        "dropout-ensemble",
        "dattri_parts.sources.dropout_ensemble:DropoutEnsemble",
        "Another source under fixed dropout masks: several thinned networks of each checkpoint",
    )
    registry.part(
        "source",
        "adam-update",
        "dattri_parts.sources.adam_update:AdamUpdate",
        "The step of Adam that each train example causes, beside gradients of test examples",
    )
    registry.part(
        "source",
        "second-moment-normalised",
        "dattri_parts.sources.second_moment_normalised:SecondMomentNormalised",
        "Gradients of both sides over the root of the optimiser's second moments",
    )
    registry.part(
        "projector",
        "identity",
        "dattri_parts.projectors.identity:Identity",
        "No sketch",
    )
    registry.part(
        "projector",
        "kronecker",
        "dattri_parts.projectors.kronecker:Kronecker",
        "A small matrix on each side of a layer's gradient, which keeps its factors (LoGra)",
    )
    registry.part(
        "projector",
        "rademacher",
        "dattri_parts.projectors.rademacher:Rademacher",
        "A dense sketch of flat rows with signs",
    )
    registry.part(
        "projector",
        "gaussian",
        "dattri_parts.projectors.gaussian:Gaussian",
        "A dense sketch of flat rows with normal entries",
    )
    registry.part(
        "projector",
        "sjlt",
        "dattri_parts.projectors.sjlt:SJLT",
        "The sparse sketch: a few signs for each coordinate, no tables",
    )
    registry.part(
        "projector",
        "mask",
        "dattri_parts.projectors.mask:Mask",
        "A random choice of coordinates",
    )
    registry.part(
        "projector",
        "factor-mask",
        "dattri_parts.projectors.factor_mask:FactorMask",
        "A random choice of each layer's inputs and outputs, which keeps its factors",
    )
    registry.part(
        "projector",
        "grass",
        "dattri_parts.projectors.grass:Grass",
        "A mask, then the sparse sketch of what it leaves (GraSS)",
    )
    registry.part(
        "projector",
        "factgrass",
        "dattri_parts.projectors.factgrass:FactGrass",
        "A mask on each side of a layer, then the sparse sketch of the rest (FactGraSS)",
    )
    registry.part(
        "projector",
        "chain",
        "dattri_parts.projectors.chain:Chain",
        "Projectors one after another",
    )
    registry.part(
        "projector",
        "block-count-sketch",
        "dattri_parts.projectors.block_count_sketch:BlockCountSketch",
        "Blocks of flat rows turned, signed and added up: about the time of reading a row",
    )
    registry.part(
        "projector",
        "srht",
        "dattri_parts.projectors.srht:SRHT",
        "Randomised Hadamard transforms of blocks of flat rows, added up",
    )
    registry.part(
        "inverse_hessian",
        "identity",
        "dattri_parts.inverse_hessians.identity:Identity",
        "No curvature: first-order methods",
    )
    registry.part(
        "inverse_hessian",
        "low-rank",
        "dattri_parts.inverse_hessians.low_rank:LowRank",
        "Another inverse Hessian, each layer of a test row cut to a low rank",
    )
    registry.part(
        "inverse_hessian",
        "composed",
        "dattri_core.stages:CurvatureInverse",
        "A curvature and a solver: (H + damping I)^-1",
    )
    registry.part(
        "inverse_hessian",
        "exact",
        "dattri_parts.inverse_hessians.exact:Exact",
        "The exact inverse of a curvature at any size",
    )
    registry.part(
        "curvature",
        "hessian",
        "dattri_parts.curvatures.hessian:Hessian",
        "The Hessian of the mean train loss",
    )
    registry.part(
        "curvature",
        "ggn",
        "dattri_parts.curvatures.ggn:GGN",
        "The generalised Gauss-Newton matrix of the mean train loss",
    )
    registry.part(
        "curvature",
        "fisher",
        "dattri_parts.curvatures.fisher_information:Fisher",
        "The Fisher information matrix, of drawn labels or of those of the data",
    )
    registry.part(
        "curvature",
        "leading-ggn",
        "dattri_parts.curvatures.leading_ggn:LeadingGGN",
        "The generalised Gauss-Newton matrix of each example's leading output directions",
    )
    registry.part(
        "curvature",
        "gauss-newton",
        "dattri_parts.curvatures.gauss_newton:GaussNewton",
        "The second moment of the rows, as they are or in a sketch",
    )
    registry.part(
        "curvature",
        "diagonal",
        "dattri_parts.curvatures.diagonal:Diagonal",
        "The diagonal of the Fisher matrix",
    )
    registry.part(
        "curvature",
        "kfac",
        "dattri_parts.curvatures.kfac:KFAC",
        "The Fisher matrix of each layer as one Kronecker product",
    )
    registry.part(
        "curvature",
        "ekfac",
        "dattri_parts.curvatures.ekfac:EKFAC",
        "K-FAC with eigenvalues measured along its eigenvectors",
    )
    registry.part(
        "solver",
        "cholesky",
        "dattri_parts.solvers.cholesky:Cholesky",
        "Dense factorisation in float64: the explicit inverse",
    )
    registry.part(
        "solver",
        "woodbury",
        "dattri_parts.solvers.woodbury:Woodbury",
        "Exact, from the Gram matrix of the curvature's rows",
    )
    registry.part(
        "solver",
        "datainf",
        "dattri_parts.solvers.datainf:DataInf",
        "The mean of the inverses of single rows, in closed form",
    )
    registry.part(
        "solver",
        "spectral",
        "dattri_parts.solvers.spectral:Spectral",
        "From eigenvectors and eigenvalues; any damping without a new fit",
    )
    registry.part(
        "solver",
        "cg",
        "dattri_parts.solvers.cg:CG",
        "Conjugate gradients, all test rows at once",
    )
    registry.part(
        "solver",
        "lissa",
        "dattri_parts.solvers.lissa:LiSSA",
        "The Neumann series of products with samples of the train set",
    )
    registry.part(
        "solver",
        "arnoldi",
        "dattri_parts.solvers.arnoldi:Arnoldi",
        "The inverse in the eigenvectors of largest eigenvalue",
    )
    registry.part(
        "scorer",
        "dot",
        "dattri_parts.scorers.dot:Dot",
        "Inner product",
    )
    registry.part(
        "scorer",
        "cosine",
        "dattri_parts.scorers.cosine:Cosine",
        "Inner product of normalised rows",
    )
    registry.part(
        "scorer",
        "negative-distance",
        "dattri_parts.scorers.negative_distance:NegativeDistance",
        "Minus the L2 distance of rows, for features",
    )
    registry.part(
        "scorer",
        "relatif",
        "dattri_parts.scorers.relatif:RelatIF",
        "Influence relative to the step that a train example takes by itself",
    )
    registry.part(
        "fold",
        "mean",
        "dattri_parts.folds.mean:Mean",
        "Mean over checkpoints",
    )
    registry.part(
        "fold",
        "weighted",
        "dattri_parts.folds.weighted:Weighted",
        "Sum over checkpoints, each times its learning rate",
    )
    for module, rule in LAYER_RULES.items():
        registry.part("layer_rule", module, f"{LAYERS}.{rule}", f"Gradients of {module}")

"""dattri-core: training-data attribution from interchangeable parts."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dattri_core.adam_state import AdamState as AdamState
    from dattri_core.adam_state import ParameterMoments as ParameterMoments
    from dattri_core.assemble import describe_part as describe_part
    from dattri_core.atomic import atomic_file as atomic_file
    from dattri_core.atomic import discard_leftovers as discard_leftovers
    from dattri_core.atomic import write_text as write_text
    from dattri_core.batch import batch_size as batch_size
    from dattri_core.batch import map_tensors as map_tensors
    from dattri_core.batch import take as take
    from dattri_core.blocks import Block as Block
    from dattri_core.blocks import DenseBlock as DenseBlock
    from dattri_core.blocks import GroupedBlock as GroupedBlock
    from dattri_core.blocks import OneHot as OneHot
    from dattri_core.blocks import OuterBlock as OuterBlock
    from dattri_core.blocks import Selection as Selection
    from dattri_core.blocks import SpanBlock as SpanBlock
    from dattri_core.blocks import SumBlock as SumBlock
    from dattri_core.blocks import compact as compact
    from dattri_core.blocks import concatenate as concatenate
    from dattri_core.blocks import explain_inner as explain_inner
    from dattri_core.blocks import inner_work as inner_work
    from dattri_core.blocks import low_rank as low_rank
    from dattri_core.blocks import pick_entries as pick_entries
    from dattri_core.blocks import share as share
    from dattri_core.capabilities import AdditiveMap as AdditiveMap
    from dattri_core.capabilities import BilinearScorer as BilinearScorer
    from dattri_core.capabilities import ByUse as ByUse
    from dattri_core.capabilities import DataProjector as DataProjector
    from dattri_core.capabilities import EachOperator as EachOperator
    from dattri_core.capabilities import EachProblem as EachProblem
    from dattri_core.capabilities import IndexedRows as IndexedRows
    from dattri_core.capabilities import InverseRoot as InverseRoot
    from dattri_core.capabilities import KeepingFits as KeepingFits
    from dattri_core.capabilities import LeverageInverse as LeverageInverse
    from dattri_core.capabilities import ModelProblem as ModelProblem
    from dattri_core.capabilities import Outlook as Outlook
    from dattri_core.capabilities import PartedRows as PartedRows
    from dattri_core.capabilities import PreconditionedSolver as PreconditionedSolver
    from dattri_core.capabilities import ReducedInverse as ReducedInverse
    from dattri_core.capabilities import ReducingSolver as ReducingSolver
    from dattri_core.capabilities import ReferencedProblem as ReferencedProblem
    from dattri_core.capabilities import RootSolver as RootSolver
    from dattri_core.capabilities import RoundedOperator as RoundedOperator
    from dattri_core.capabilities import RowsOperator as RowsOperator
    from dattri_core.capabilities import SampledOperator as SampledOperator
    from dattri_core.capabilities import SharedProblem as SharedProblem
    from dattri_core.capabilities import SharingInverse as SharingInverse
    from dattri_core.capabilities import SpectralInverse as SpectralInverse
    from dattri_core.capabilities import SpectralOperator as SpectralOperator
    from dattri_core.capabilities import SplitInverse as SplitInverse
    from dattri_core.capabilities import TermScorer as TermScorer
    from dattri_core.capabilities import WeighingScorer as WeighingScorer
    from dattri_core.capabilities import kept as kept
    from dattri_core.capabilities import summed as summed
    from dattri_core.checkpoint import AdamRule as AdamRule
    from dattri_core.checkpoint import Checkpoint as Checkpoint
    from dattri_core.checkpoint import TrainingStep as TrainingStep
    from dattri_core.contract import limit_now as limit_now
    from dattri_core.dispatched import DispatchMode as DispatchMode
    from dattri_core.dispatched import run_under as run_under
    from dattri_core.errors import ConvergenceWarning as ConvergenceWarning
    from dattri_core.errors import DattriError as DattriError
    from dattri_core.errors import InputError as InputError
    from dattri_core.errors import MemoryBudgetError as MemoryBudgetError
    from dattri_core.errors import NumericsError as NumericsError
    from dattri_core.errors import PluginError as PluginError
    from dattri_core.errors import SpecError as SpecError
    from dattri_core.errors import StoreError as StoreError
    from dattri_core.errors import format_bytes as format_bytes
    from dattri_core.errors import nearest as nearest
    from dattri_core.evaluate import Evaluator as Evaluator
    from dattri_core.evaluate import leaves as leaves
    from dattri_core.experiment import Counterfactual as Counterfactual
    from dattri_core.experiment import Evidence as Evidence
    from dattri_core.experiment import Metric as Metric
    from dattri_core.experiment import MetricResult as MetricResult
    from dattri_core.experiment import Outcomes as Outcomes
    from dattri_core.experiment import Retraining as Retraining
    from dattri_core.experiment import Setting as Setting
    from dattri_core.experiment import World as World
    from dattri_core.fitted import FittedMethod as FittedMethod
    from dattri_core.hookspecs import hookimpl as hookimpl
    from dattri_core.lift import from_parameters as from_parameters
    from dattri_core.lift import to_parameters as to_parameters
    from dattri_core.losses import FunctionalLoss as FunctionalLoss
    from dattri_core.losses import Loss as Loss
    from dattri_core.losses import Target as Target
    from dattri_core.losses import functional as functional
    from dattri_core.losses import labels_of as labels_of
    from dattri_core.memory import free_bytes as free_bytes
    from dattri_core.memory import give_back as give_back
    from dattri_core.memory import is_out_of_memory as is_out_of_memory
    from dattri_core.memory import parse_bytes as parse_bytes
    from dattri_core.methods import Method as Method
    from dattri_core.methods import attribute as attribute
    from dattri_core.methods import method as method
    from dattri_core.moments import FactorSums as FactorSums
    from dattri_core.moments import factor_entries as factor_entries
    from dattri_core.moments import factor_sums as factor_sums
    from dattri_core.moments import square_sum as square_sum
    from dattri_core.origins import origins_of as origins_of
    from dattri_core.pages import reused_rows as reused_rows
    from dattri_core.plans import Plan as Plan
    from dattri_core.precision import exactly as exactly
    from dattri_core.problem import TrainProblem as TrainProblem
    from dattri_core.processes import ProcessError as ProcessError
    from dattri_core.processes import Processes as Processes
    from dattri_core.processes import distributed as distributed
    from dattri_core.processes import processes_now as processes_now
    from dattri_core.progress import bar as bar
    from dattri_core.protocols import Attributor as Attributor
    from dattri_core.protocols import BoundSource as BoundSource
    from dattri_core.protocols import Curvature as Curvature
    from dattri_core.protocols import CurvatureKind as CurvatureKind
    from dattri_core.protocols import Damping as Damping
    from dattri_core.protocols import DenseOperator as DenseOperator
    from dattri_core.protocols import Fold as Fold
    from dattri_core.protocols import FoldState as FoldState
    from dattri_core.protocols import Inverse as Inverse
    from dattri_core.protocols import InverseHessian as InverseHessian
    from dattri_core.protocols import LinearMap as LinearMap
    from dattri_core.protocols import Operator as Operator
    from dattri_core.protocols import Parameters as Parameters
    from dattri_core.protocols import Problem as Problem
    from dattri_core.protocols import Projector as Projector
    from dattri_core.protocols import RandomStream as RandomStream
    from dattri_core.protocols import Role as Role
    from dattri_core.protocols import RowKind as RowKind
    from dattri_core.protocols import Scored as Scored
    from dattri_core.protocols import Scorer as Scorer
    from dattri_core.protocols import Side as Side
    from dattri_core.protocols import Sink as Sink
    from dattri_core.protocols import Snapshot as Snapshot
    from dattri_core.protocols import Solver as Solver
    from dattri_core.protocols import Source as Source
    from dattri_core.protocols import as_damping as as_damping
    from dattri_core.registry import Registry as Registry
    from dattri_core.registry import default_registry as default_registry
    from dattri_core.rows import Rows as Rows
    from dattri_core.scores import Scores as Scores
    from dattri_core.scores_writer import ScoresWriter as ScoresWriter
    from dattri_core.shipped_losses import causal_lm as causal_lm
    from dattri_core.shipped_losses import cross_entropy as cross_entropy
    from dattri_core.shipped_losses import logit as logit
    from dattri_core.shipped_losses import margin as margin
    from dattri_core.shipped_losses import squared_error as squared_error
    from dattri_core.shipped_losses import token_cross_entropy as token_cross_entropy
    from dattri_core.source_capabilities import DataSource as DataSource
    from dattri_core.source_capabilities import EnsembleSource as EnsembleSource
    from dattri_core.source_capabilities import HoldingSource as HoldingSource
    from dattri_core.source_capabilities import MovableSource as MovableSource
    from dattri_core.source_capabilities import OutputSource as OutputSource
    from dattri_core.source_capabilities import RehearsedSource as RehearsedSource
    from dattri_core.source_capabilities import ReopenedSource as ReopenedSource
    from dattri_core.source_capabilities import ReportingSource as ReportingSource
    from dattri_core.source_capabilities import SidedSource as SidedSource
    from dattri_core.source_capabilities import StatefulSource as StatefulSource
    from dattri_core.source_capabilities import sides_differ as sides_differ
    from dattri_core.source_capabilities import source_needs as source_needs
    from dattri_core.space import BlockSpec as BlockSpec
    from dattri_core.space import ParameterView as ParameterView
    from dattri_core.space import Space as Space
    from dattri_core.stages import CurvatureInverse as CurvatureInverse
    from dattri_core.store import Store as Store
    from dattri_core.stream import Examples as Examples
    from dattri_core.study import Point as Point
    from dattri_core.study import Study as Study
    from dattri_core.study import StudyCell as StudyCell
    from dattri_core.task import Task as Task
    from dattri_core.tied import at_every_place as at_every_place
    from dattri_core.top import Extreme as Extreme
    from dattri_core.top import Extremes as Extremes

# Name -> module. Looked up on first use, so that listing plugins imports no torch.
_EXPORTS = {
    "AdamState": "adam_state",
    "AdditiveMap": "capabilities",
    "BilinearScorer": "capabilities",
    "Attributor": "protocols",
    "Block": "blocks",
    "BlockSpec": "space",
    "BoundSource": "protocols",
    "ByUse": "capabilities",
    "Checkpoint": "checkpoint",
    "ConvergenceWarning": "errors",
    "Curvature": "protocols",
    "CurvatureInverse": "stages",
    "CurvatureKind": "protocols",
    "Damping": "protocols",
    "DataProjector": "capabilities",
    "DataSource": "source_capabilities",
    "DattriError": "errors",
    "DenseBlock": "blocks",
    "DenseOperator": "protocols",
    "EachOperator": "capabilities",
    "EachProblem": "capabilities",
    "EnsembleSource": "source_capabilities",
    "Evaluator": "evaluate",
    "Examples": "stream",
    "Extreme": "top",
    "Extremes": "top",
    "FactorSums": "moments",
    "FittedMethod": "fitted",
    "Fold": "protocols",
    "FoldState": "protocols",
    "FunctionalLoss": "losses",
    "GroupedBlock": "blocks",
    "HoldingSource": "source_capabilities",
    "InputError": "errors",
    "Inverse": "protocols",
    "InverseHessian": "protocols",
    "IndexedRows": "capabilities",
    "InverseRoot": "capabilities",
    "KeepingFits": "capabilities",
    "LeverageInverse": "capabilities",
    "LinearMap": "protocols",
    "Loss": "losses",
    "MemoryBudgetError": "errors",
    "Method": "methods",
    "ModelProblem": "capabilities",
    "RoundedOperator": "capabilities",
    "MovableSource": "source_capabilities",
    "NumericsError": "errors",
    "OneHot": "blocks",
    "Operator": "protocols",
    "OuterBlock": "blocks",
    "OutputSource": "source_capabilities",
    "Outlook": "capabilities",
    "Parameters": "protocols",
    "ParameterMoments": "adam_state",
    "ParameterView": "space",
    "Plan": "plans",
    "Point": "study",
    "PluginError": "errors",
    "PreconditionedSolver": "capabilities",
    "Problem": "protocols",
    "Projector": "protocols",
    "RandomStream": "protocols",
    "ReducedInverse": "capabilities",
    "ReducingSolver": "capabilities",
    "ReferencedProblem": "capabilities",
    "Registry": "registry",
    "RehearsedSource": "source_capabilities",
    "ReopenedSource": "source_capabilities",
    "ReportingSource": "source_capabilities",
    "RootSolver": "capabilities",
    "RowKind": "protocols",
    "Role": "protocols",
    "Rows": "rows",
    "RowsOperator": "capabilities",
    "SampledOperator": "capabilities",
    "Scored": "protocols",
    "Scorer": "protocols",
    "Scores": "scores",
    "ScoresWriter": "scores_writer",
    "Selection": "blocks",
    "Side": "protocols",
    "Sink": "protocols",
    "Snapshot": "protocols",
    "Solver": "protocols",
    "Source": "protocols",
    "Space": "space",
    "SpanBlock": "blocks",
    "SpecError": "errors",
    "SharingInverse": "capabilities",
    "SidedSource": "source_capabilities",
    "SpectralInverse": "capabilities",
    "SpectralOperator": "capabilities",
    "SplitInverse": "capabilities",
    "StatefulSource": "source_capabilities",
    "Store": "store",
    "StoreError": "errors",
    "Study": "study",
    "StudyCell": "study",
    "SumBlock": "blocks",
    "Target": "losses",
    "Task": "task",
    "TermScorer": "capabilities",
    "TrainProblem": "problem",
    "AdamRule": "checkpoint",
    "TrainingStep": "checkpoint",
    "WeighingScorer": "capabilities",
    "as_damping": "protocols",
    "atomic_file": "atomic",
    "attribute": "methods",
    "bar": "progress",
    "batch_size": "batch",
    "causal_lm": "shipped_losses",
    "compact": "blocks",
    "concatenate": "blocks",
    "cross_entropy": "shipped_losses",
    "default_registry": "registry",
    "describe_part": "assemble",
    "discard_leftovers": "atomic",
    "exactly": "precision",
    "explain_inner": "blocks",
    "factor_entries": "moments",
    "factor_sums": "moments",
    "format_bytes": "errors",
    "free_bytes": "memory",
    "from_parameters": "lift",
    "functional": "losses",
    "give_back": "memory",
    "hookimpl": "hookspecs",
    "is_out_of_memory": "memory",
    "kept": "capabilities",
    "summed": "capabilities",
    "SharedProblem": "capabilities",
    "ProcessError": "processes",
    "distributed": "processes",
    "Processes": "processes",
    "processes_now": "processes",
    "PartedRows": "capabilities",
    "labels_of": "losses",
    "inner_work": "blocks",
    "limit_now": "contract",
    "leaves": "evaluate",
    "at_every_place": "tied",
    "logit": "shipped_losses",
    "low_rank": "blocks",
    "map_tensors": "batch",
    "margin": "shipped_losses",
    "method": "methods",
    "nearest": "errors",
    "origins_of": "origins",
    "parse_bytes": "memory",
    "pick_entries": "blocks",
    "run_under": "dispatched",
    "reused_rows": "pages",
    "DispatchMode": "dispatched",
    "share": "blocks",
    "sides_differ": "source_capabilities",
    "source_needs": "source_capabilities",
    "square_sum": "moments",
    "squared_error": "shipped_losses",
    "take": "batch",
    "to_parameters": "lift",
    "token_cross_entropy": "shipped_losses",
    "write_text": "atomic",
    "Counterfactual": "experiment",
    "Evidence": "experiment",
    "Metric": "experiment",
    "MetricResult": "experiment",
    "Outcomes": "experiment",
    "Retraining": "experiment",
    "Setting": "experiment",
    "World": "experiment",
}

__all__ = sorted(_EXPORTS)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(f"dattri_core.{_EXPORTS[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'dattri_core' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

"""Exact Fisher quantities of any model: the diagonal by one backward pass, the trace and its gradient three ways."""

from __future__ import annotations

from fastfip.fisher.backward import backward_with_fisher
from fastfip.fisher.diagonal import fisher_diagonal
from fastfip.fisher.likelihood import Bernoulli, Categorical, Gaussian, Likelihood, draw_labels
from fastfip.fisher.penalty import FisherPenalty
from fastfip.fisher.per_sample import per_sample_gradients
from fastfip.fisher.result import FisherDiagonal, QuadraticPenalty, merge
from fastfip.fisher.trace import TraceOutput, fisher_trace, squared_norms, trace_and_logits
from fastfip.nets.state import eval_mode

__all__ = [
    "Bernoulli",
    "Categorical",
    "FisherDiagonal",
    "FisherPenalty",
    "Gaussian",
    "Likelihood",
    "QuadraticPenalty",
    "TraceOutput",
    "backward_with_fisher",
    "draw_labels",
    "eval_mode",
    "fisher_diagonal",
    "fisher_trace",
    "merge",
    "per_sample_gradients",
    "squared_norms",
    "trace_and_logits",
]

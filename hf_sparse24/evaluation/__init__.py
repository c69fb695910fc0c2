"""What pruning costs: a figure for each kind of model, and its recovery against the dense model.

| model | function | figure |
|---|---|---|
| causal language model | `perplexity` | exp of the mean loss per token |
| encoder-decoder model | `nll` | mean loss per target token, teacher-forced |
| sentence encoder | `retrieval_recall` | recall at 1 and mean reciprocal rank |
| vision encoder | `feature_cosine` | cosine to the dense model's features |
| language model | `evaluate_tasks` | whatever tasks of lm-eval score |

Every function runs in eval mode without gradients, moves batches to the model, computes its figure in float32 or
better, and restores the modes that it found. Figures are data (`Evaluation`); printing is separate.
"""

from hf_sparse24.evaluation.encoders import RetrievalScores, embed, feature_cosine, features, retrieval_recall
from hf_sparse24.evaluation.figures import (
    METRICS,
    Evaluation,
    compared,
    print_evaluations,
    read_evaluations,
    recovery,
)
from hf_sparse24.evaluation.files import evaluate_pairs, image_batches, images_in
from hf_sparse24.evaluation.harness import check_tasks, evaluate_tasks
from hf_sparse24.evaluation.language import check_causal, held_out_tokens, nll, perplexity

__all__ = [
    "METRICS",
    "Evaluation",
    "RetrievalScores",
    "check_causal",
    "check_tasks",
    "compared",
    "embed",
    "evaluate_pairs",
    "evaluate_tasks",
    "feature_cosine",
    "features",
    "held_out_tokens",
    "image_batches",
    "images_in",
    "nll",
    "perplexity",
    "print_evaluations",
    "read_evaluations",
    "recovery",
    "retrieval_recall",
]

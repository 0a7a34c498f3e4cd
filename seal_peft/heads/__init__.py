"""Which heads matter: scores of every attention head of a model on samples of a task."""

from .direct_effect import DirectEffect, DirectEffects, direct_effect
from .gradient import gradient_map
from .inputs import EncodedSample, encode_samples
from .layers import Heads, find_heads, head_name, parse_head
from .maps import rank_correlation
from .pruning import Pruned, prune_channels, pruning_map, without_head
from .quadrants import quadrant_scales, quadrants, save_head_scales
from .retrieval import Retrieval, attention_rows, retrieval_map

__all__ = [
    "DirectEffect",
    "DirectEffects",
    "EncodedSample",
    "Heads",
    "Pruned",
    "Retrieval",
    "attention_rows",
    "direct_effect",
    "encode_samples",
    "find_heads",
    "gradient_map",
    "head_name",
    "parse_head",
    "prune_channels",
    "pruning_map",
    "quadrant_scales",
    "quadrants",
    "rank_correlation",
    "retrieval_map",
    "save_head_scales",
    "without_head",
]

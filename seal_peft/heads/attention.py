"""Stand around the attention function of a model: see the queries and keys that it gets, and change them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .layers import Heads

# Gets the position of the layer among those with heads, the model's own function and its arguments; returns what that
# returns: the heads `(B, tokens, heads, head_dim)` and the attention weights, if it has them.
Around = Callable[..., tuple[Tensor, Tensor | None]]


@contextmanager
def around_attention(heads: Heads, around: Around) -> Iterator[None]:
    """Within it, `around` is called in place of the attention function of the model, whichever that is.

    Masks and kernels stay those of the model. Queries and keys arrive as attention uses them: normed and rotated.

    Args:
        heads: The heads of the model.
        around: Called as `around(layer, original, module, query, key, value, attention_mask, **kwargs)`.

    Raises:
        ValueError: The model does not call its attention through transformers' attention interface.
    """
    positions = {id(layer.attention): position for position, layer in enumerate(heads.layers)}
    seen: set[int] = set()
    module = heads.layers[0].attention
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if name == "eager":
        # Every modeling file has a function of its own of this name.
        original = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    else:
        original = ALL_ATTENTION_FUNCTIONS.get(name)
    if original is None:
        raise _not_seen(heads, name)

    def called(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        position = positions.get(id(module))
        if position is None:
            return original(module, *args, **kwargs)  # another part of the model, or another model
        seen.add(position)
        return around(position, original, module, *args, **kwargs)

    before = ALL_ATTENTION_FUNCTIONS._local_mapping.get(name)
    ALL_ATTENTION_FUNCTIONS[name] = called
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]
        if before is not None:
            ALL_ATTENTION_FUNCTIONS[name] = before
    if len(seen) < len(positions):
        raise _not_seen(heads, name)


def _not_seen(heads: Heads, name: str | None) -> ValueError:
    return ValueError(
        f"{type(heads.layers[0].attention).__name__} of {type(heads.base).__name__} does not call its attention "
        f"function ({name!r}) through transformers' attention interface, so its queries and attention weights cannot "
        "be seen. Leave retrieval out of --scores and query out of --sites; the others do not need them."
    )

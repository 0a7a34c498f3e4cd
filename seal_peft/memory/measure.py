"""What each layer would keep, found by running the model forward once at the length in question."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .keep import Keep, Products, find_layers, kind_of, set_runners


class LayerCost(NamedTuple):
    """Bytes that a layer keeps for its backward pass, by the parts of `Keep`.

    Attributes:
        inputs: Hidden states that enter, if the layer takes part in the backward pass.
        attention: Outputs of attention kernels.
        matmuls: Outputs of matrix products that the backward pass needs, itself or to recompute others.
        everything: All that autograd saves without checkpointing.
        products: Which attention outputs and matrix products these are.
    """

    inputs: int = 0
    attention: int = 0
    matmuls: int = 0
    everything: int = 0
    products: Products = Products()

    def of(self, keep: Keep) -> int:
        """Return the bytes on the device where the layer keeps this."""
        if keep.everything:
            return self.everything
        return keep.inputs * self.inputs + keep.attention * self.attention + keep.matmuls * self.matmuls


def measure_layers(model: nn.Module, rows: int, tokens: int) -> list[LayerCost]:
    """Run a forward pass, in training mode but without a graph across layers, and count what each layer saves.

    Args:
        model: A causal language model, with the adapters that will be trained.
        rows: Rows of a batch, without a mask.
        tokens: Tokens of a row.

    Returns:
        One cost for each of `find_layers(model)`; zeros for layers that did not run or need no gradient.
    """
    layers = find_layers(model)
    weights = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    costs = [LayerCost()] * len(layers)

    def run(index: int, forward: partial[Any], *args: Any) -> Any:
        shared = [x for x in tree_leaves((args[1:], forward.keywords)) if isinstance(x, Tensor)]
        counter = _Counter(weights | {x.untyped_storage().data_ptr() for x in shared})
        try:
            with torch.enable_grad(), saved_tensors_hooks(counter.save, lambda x: x), counter:
                out = forward(*args)
            if counter.saved:
                costs[index] = counter.cost(inputs=args[0].nbytes)
        finally:  # the graph holds the counter; what the counter holds of the graph would never be freed
            counter.outputs.clear()
        # The graph of this layer ends here, and its memory is free for the next one.
        return tree_map(lambda x: x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x, out)

    restore = set_runners(layers, [partial(run, index) for index in range(len(layers))])
    training, device = model.training, next(model.parameters()).device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            model.train()
            # Without a mask, which would ask for other kernels: `AnswerCollator` pads without one.
            input_ids = torch.zeros(rows, tokens, dtype=torch.long, device=device)
            model(input_ids=input_ids, use_cache=False, logits_to_keep=1)
    finally:
        model.train(training)
        restore()
    return costs


class _Output:
    """What one operator returned."""

    def __init__(self, out: Any) -> None:
        self.tensors = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.versions = [x._version for x in self.tensors]
        self.nbytes = sum(x.nbytes for x in self.tensors)

    def is_untouched(self) -> bool:
        """Tell whether nothing was written in place since, so that it can be handed out a second time."""
        return self.versions == [x._version for x in self.tensors]


class _Counter(TorchDispatchMode):
    """Sees every operator of a layer and every tensor that autograd saves."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known = known
        self.saved: dict[int, tuple[StorageWeakRef, int]] = {}
        self.outputs: dict[str, list[_Output]] = {"attention": [], "matmuls": []}
        self.needed = {"attention": 0, "matmuls": 0}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        if kind := kind_of(op):
            self.outputs[kind].append(_Output(out))
        return out

    def save(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.saved[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        # Recomputing ends with the last saved tensor: what comes later, such as a last projection, never runs again.
        self.needed = {kind: len(outputs) for kind, outputs in self.outputs.items()}
        return x.detach()  # a node that held its own output would hold itself

    def cost(self, inputs: int) -> LayerCost:
        places: dict[str, frozenset[int]] = {}
        nbytes: dict[str, int] = {}
        for kind, outputs in self.outputs.items():
            needed = outputs[: self.needed[kind]]
            places[kind] = frozenset(place for place, output in enumerate(needed) if output.is_untouched())
            nbytes[kind] = sum(outputs[place].nbytes for place in places[kind])
        everything = sum(size for storage, size in self.saved.values() if not storage.expired())
        return LayerCost(inputs, **nbytes, everything=everything, products=Products(**places))

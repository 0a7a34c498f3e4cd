"""Inputs of checkpointed layers in pinned host memory, copied while the GPU computes.

transformers' own `offload` copies on the stream that computes, so the copies add up to the step's time. Here they have
a stream of their own: out during the forward pass of the layer, back during the backward pass of the layer above.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

# Smaller tensors stay: they are not what fills the memory.
_MIN_BYTES = 2**20


class InputsOnHost(saved_tensors_hooks):
    """Context in which what autograd saves of hidden states on a GPU goes to the host; elsewhere nothing happens."""

    def __init__(self) -> None:
        super().__init__(_pack, _unpack)


class _OnHost:
    """One tensor on the host. `copied` is the event after its last copy, `here` the tensor on the GPU, if it is.

    Memory on the GPU is only ever allocated and freed in the order of the stream that computes, which waits for the
    copies. So the allocator may reuse it at once, however far Python is ahead of the GPU.
    """

    latest: dict[torch.device, weakref.ref[_OnHost]] = {}
    streams: dict[torch.device, torch.cuda.Stream] = {}

    def __init__(self, x: Tensor) -> None:
        self.device = x.device
        if x.device not in self.streams:
            self.streams[x.device] = torch.cuda.Stream(x.device)
        below = self.latest.get(x.device)
        self.below = below
        self.latest[x.device] = weakref.ref(self)
        if below is not None and (before := below()) is not None:
            before.leave()
        self.host = torch.empty_like(x, device="cpu", pin_memory=True)
        self.here: Tensor | None = x
        self.copied = self._copy(self.host, x)

    def _copy(self, to: Tensor, of: Tensor) -> torch.cuda.Event:
        stream = self.streams[self.device]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            to.copy_(of, non_blocking=True)
            return stream.record_event()

    def leave(self) -> None:
        """Free the tensor on the GPU, once it is copied."""
        torch.cuda.current_stream(self.device).wait_event(self.copied)
        self.here = None

    def fetch(self) -> None:
        """Begin to copy the tensor back."""
        if self.here is None:
            self.here = torch.empty_like(self.host, device=self.device)
            self.copied = self._copy(self.here, self.host)

    def take(self) -> Tensor:
        """Return the tensor on the GPU, and begin to copy the one of the layer below."""
        self.fetch()
        here = self.here
        assert here is not None
        self.leave()
        if self.below is not None and (below := self.below()) is not None:
            below.fetch()
        return here


def _pack(x: Tensor) -> Tensor | _OnHost:
    # Masks and rotary angles need no gradient, and all layers share them.
    large = x.is_cuda and x.requires_grad and x.nbytes >= _MIN_BYTES
    return _OnHost(x.detach()) if large else x


def _unpack(packed: Any) -> Tensor:
    return packed.take() if isinstance(packed, _OnHost) else packed

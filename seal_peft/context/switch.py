"""One model, several adapters that ask for different RoPE: the model has that of the adapters in use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_BASE = "__base__"  # PEFT's name for rows of a batch without an adapter


class RopeSwitch:
    """Keeps the RoPE of a model in step with its adapters.

    Args:
        model: A model with RoPE.
        read: `read_rope`.
        resolve: `resolve_rope`.
        apply: `apply_rope`.

    Attributes:
        requests: Name of every adapter -> all parameters that it asks for, or `None` if it takes the model's own.
        users: Layers that say by `rope_names()` which adapters they use.
    """

    def __init__(self, model: nn.Module, read: Callable, resolve: Callable, apply: Callable) -> None:
        self.requests: dict[str, dict[str, Any] | None] = {_BASE: None}
        self.users: list[Any] = []
        self._model, self._read, self._resolve, self._apply_to = model, read, resolve, apply
        self._current: dict[str, Any] | None = None
        self._applied: Any = None
        self._hooks: list[Any] = []
        self._in_rows = False

    @property
    def own(self) -> dict[str, Any]:
        """The parameters that the model has without its adapters."""
        return dict(self._applied.before if self._applied is not None else self._read(self._model))

    def resolve(self, request: dict[str, Any], own: dict[str, Any] | None = None) -> dict[str, Any]:
        """Complete a request and make sure that the model takes it; changes nothing.

        Args:
            request: See `apply_rope`.
            own: Where missing values come from; `None` for what the model has.

        Raises:
            ValueError: The model does not take it.
        """
        wanted: dict[str, Any] = self._resolve(self._model, request, own or self.own)
        if wanted != self._current:
            self._apply_to(self._model, wanted).restore()
        return wanted

    def add(self, name: str, request: dict[str, Any] | None, users: Iterable[Any]) -> None:
        """Register an adapter and all layers with adapters, and bring the model in step.

        Args:
            name: Name of the adapter.
            request: As `resolve` gives it.
            users: All layers with adapters.
        """
        self.users = list(users)
        # One object per set of parameters: whether two are the same is asked in every forward pass.
        self.requests[name] = next((known for known in self.requests.values() if known == request), request)
        if request is not None and not self._hooks:
            for module in self._model.modules():
                if hasattr(module, "rope_type"):
                    self._hooks.append(module.register_forward_pre_hook(self._check))
        if self.users:
            self.use(self.users[0].rope_names())

    def drop(self, name: str) -> None:
        """Forget an adapter."""
        self.requests.pop(name, None)

    def wanted(self, names: Iterable[str]) -> dict[str, Any] | None:
        """Return what these adapters ask for, all the same; names that were never added ask for nothing.

        Raises:
            ValueError: They ask for different things.
        """
        known = [name for name in names if name in self.requests]
        if not known:
            return None
        first = self.requests[known[0]]
        for name in known:
            if self.requests[name] is not first:
                told = {n: self.requests[n] or "the base model's own" for n in dict.fromkeys(known)}
                raise ValueError(
                    "A model has one RoPE at a time, but these adapters ask for different ones: "
                    + "; ".join(f"{n!r}: {value}" for n, value in told.items())
                    + ". Use them one after the other, with `set_adapter`."
                )
        return first

    def use(self, names: Iterable[str]) -> None:
        """Give the model the RoPE of these adapters."""
        self._set(self.wanted(names))

    def _set(self, wanted: dict[str, Any] | None) -> None:
        if wanted is self._current:
            return
        if self._applied is not None:
            self._applied.restore()
        self._applied = self._apply_to(self._model, wanted) if wanted is not None else None
        self._current = wanted

    @contextmanager
    def rows(self, names: Iterable[str]) -> Iterator[None]:
        """Within the context, the model has the RoPE of the adapters in a mixed batch."""
        before = self._current
        wanted = self.wanted(names)
        if wanted is before:
            yield
            return
        self._in_rows = True
        try:
            self._set(wanted)
            yield
        finally:
            self._in_rows = False
            self._set(before)

    def finish(self, names: Iterable[str]) -> None:
        """Leave the model for good with the RoPE of these adapters; without any, with its own."""
        self.use(names)
        for hook in self._hooks:
            hook.remove()
        vars(self._model).pop("_rope_switch", None)

    def _check(self, *_: Any) -> None:
        """Refuse to run where some layers use other adapters than others, and these want another RoPE."""
        if self._in_rows or torch.compiler.is_compiling():
            return
        for layer in self.users:
            if self.wanted(layer.rope_names()) is not self._current:
                raise RuntimeError(
                    "Layers of this model use adapters with different RoPE. Choose one with `set_adapter`, which "
                    "reaches all layers."
                )

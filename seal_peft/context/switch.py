"""One model, several adapters that ask for different positions: the model has those of the adapters in use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .probe import RotaryLayer, check_frequencies, rotary_layers
from .rope import AppliedRope, apply_rope, reach_of, read_rope, resolve_rope
from .self_extend import AppliedSelfExtend, check_settings, extended_window, read_self_extend

_BASE = "__base__"  # PEFT's name for rows of a batch without an adapter


@dataclass(frozen=True)
class Request:
    """What an adapter asks for; `None` leaves what the model has.

    Attributes:
        rope: All RoPE parameters, as `resolve_rope` gives them.
        self_extend: Settings of `apply_self_extend`.
    """

    rope: dict[str, Any] | None
    self_extend: dict[str, int] | None

    def __str__(self) -> str:
        """Name what is asked for."""
        asked = {"rope_parameters": self.rope, "self_extend": self.self_extend}
        return ", ".join(f"{name}={value}" for name, value in asked.items() if value is not None)


def position_switch(model: nn.Module) -> PositionSwitch | None:
    """Return what gives a model the RoPE and Self-Extend of its active adapters; `None` for models without RoPE.

    The tuner calls this and nothing else of this package.
    """
    switch = vars(model).get("_position_switch")
    if switch is None and read_rope(model) is not None:
        switch = PositionSwitch(model)
        vars(model)["_position_switch"] = switch
    return switch


class PositionSwitch:
    """Keeps the positions of a model in step with its adapters.

    Args:
        model: A model with RoPE.

    Attributes:
        requests: Name of every adapter -> what it asks for, or `None` if it takes what the model has.
        users: Layers that say by `rope_names()` which adapters they use.
    """

    def __init__(self, model: nn.Module) -> None:
        self.requests: dict[str, Request | None] = {_BASE: None}
        self.users: list[Any] = []
        self._model = model
        self._current: Request | None = None
        self._applied: list[AppliedRope | AppliedSelfExtend] = []
        self._own: tuple[Any, Any] = (None, None)
        self._layers: list[RotaryLayer] = []
        self._hooks: list[Any] = []
        self._unchecked = False

    @property
    def own(self) -> tuple[dict[str, Any], dict[str, int] | None]:
        """RoPE and Self-Extend that the model has without its adapters."""
        rope, self_extend = self._own if self._applied else (read_rope(self._model), read_self_extend(self._model))
        return dict(rope or {}), self_extend

    def resolve(
        self,
        rope_parameters: dict[str, Any] | None,
        self_extend: dict[str, int] | None,
        own: dict[str, Any] | None = None,
    ) -> Request | None:
        """Complete a request and make sure that the model takes it; changes nothing.

        Args:
            rope_parameters: See `apply_rope`.
            self_extend: See `apply_self_extend`.
            own: Where missing RoPE parameters come from; `None` for what the model has.

        Raises:
            ValueError: The model does not take it.
        """
        if rope_parameters is None and self_extend is None:
            return None
        rope = None if rope_parameters is None else resolve_rope(self._model, rope_parameters, own or self.own[0])
        wanted = Request(rope, None if self_extend is None else check_settings(self_extend))
        if wanted != self._current:
            self._restore(self._apply(wanted))
        if wanted.self_extend is not None:
            _check_gain(wanted.self_extend, reach_of(rope or self.own[0]))
        return wanted

    def add(self, name: str, request: Request | None, users: Iterable[Any]) -> None:
        """Register an adapter and all layers with adapters, and bring the model in step.

        Args:
            name: Name of the adapter.
            request: As `resolve` gives it.
            users: All layers with adapters.
        """
        self.users = list(users)
        # One object per request: whether two are the same is asked in every forward pass.
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

    def wanted(self, names: Iterable[str]) -> Request | None:
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
                    "A model has one RoPE at a time, and one Self-Extend, but these adapters ask for different ones: "
                    + "; ".join(f"{n!r}: {value}" for n, value in told.items())
                    + ". Use them one after the other, with `set_adapter`."
                )
        return first

    def use(self, names: Iterable[str]) -> None:
        """Give the model what these adapters ask for."""
        self._set(self.wanted(names))

    def _set(self, wanted: Request | None) -> None:
        before = self._current
        if wanted is before:
            return
        self._restore(self._applied)
        self._applied, self._current = [], None
        self._own = (read_rope(self._model), read_self_extend(self._model))
        try:
            self._applied = self._apply(wanted) if wanted is not None else []
        except BaseException:
            self._set(before)
            raise
        self._current = wanted

    def _apply(self, wanted: Request) -> list[AppliedRope | AppliedSelfExtend]:
        applied: list[AppliedRope | AppliedSelfExtend] = []
        unchecked, self._unchecked = self._unchecked, True
        try:
            if wanted.rope is not None:
                applied.append(apply_rope(self._model, wanted.rope))
            if wanted.self_extend is not None:
                self._layers = self._layers or rotary_layers(self._model)
                applied.append(AppliedSelfExtend(self._model, self._layers, wanted.self_extend))
            elif read_self_extend(self._model) is not None:  # the base's own, which has to bear the new RoPE
                check_frequencies(self._model, [m for m in self._model.modules() if hasattr(m, "rope_type")])
        except BaseException:
            self._restore(applied)
            raise
        finally:
            self._unchecked = unchecked
        return applied

    def _restore(self, applied: list[AppliedRope | AppliedSelfExtend]) -> None:
        for change in reversed(applied):
            change.restore()

    @contextmanager
    def rows(self, names: Iterable[str]) -> Iterator[None]:
        """Within the context, the model has what the adapters in a mixed batch ask for."""
        before = self._current
        wanted = self.wanted(names)
        if wanted is before:
            yield
            return
        self._unchecked = True
        try:
            self._set(wanted)
            yield
        finally:
            self._unchecked = False
            self._set(before)

    def finish(self, names: Iterable[str]) -> None:
        """Leave the model for good with what these adapters ask for; without any, as it was."""
        self.use(names)
        for hook in self._hooks:
            hook.remove()
        vars(self._model).pop("_position_switch", None)

    def _check(self, *_: Any) -> None:
        """Refuse to run where layers use adapters that want different things, or what is wanted was switched off."""
        if self._unchecked or torch.compiler.is_compiling():
            return
        for layer in self.users:
            if self.wanted(layer.rope_names()) is not self._current:
                raise RuntimeError(
                    "Layers of this model use adapters with different RoPE or Self-Extend. Choose one with "
                    "`set_adapter`, which reaches all layers."
                )
        if self._current is not None and self._current.self_extend not in (None, read_self_extend(self._model)):
            raise RuntimeError(
                f"The active adapter needs self_extend={self._current.self_extend}, but the attention of this model "
                "was set to something else. Leave `set_attn_implementation` alone while the adapter is in use."
            )


def _check_gain(settings: dict[str, int], native: int) -> None:
    """Refuse a Self-Extend that does nothing: its window is never left, or its groups are of one."""
    if extended_window(native, settings) <= native:
        raise ValueError(
            f"self_extend={settings} extends nothing: the model reads {native} tokens without it and no more with it. "
            f"Use a window well below that, {max(1, native // 8)} say, and a group_size of at least 2; "
            "`seal-peft advise` says which reach a length."
        )

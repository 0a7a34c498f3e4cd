"""Any order of verbs gives the logits of a plain base whose weights were multiplied by hand.

The oracle knows PEFT's rules for who is active, merged and enabled, and the numbers it gave to every adapter. It never
reads the state of the model.
"""

import contextlib
import copy
import shutil
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from peft import PeftModel, get_peft_model
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from models import ARCHITECTURES, INPUT_IDS, adapted, base_model, logits, multiply_by_hand, seal_layers
from seal_peft import SealConfig, hotswap_adapter, scales, set_strength

NAMES = ["one", "two", "three"]
# An index into the adapters that there are: a name that is not there would waste a step.
which = st.integers(0, 5)
several = st.lists(which, min_size=1, max_size=3)
kinds = st.sampled_from(
    [
        {"granularity": "head"},
        {"granularity": "channel"},
        {"sites": ("query",)},
        {"sites": ("output", "query")},
        {"sites": ("output", "query"), "granularity": "channel"},
    ]
)
# Projections to queries and what they hold, head by head: rows of Llama's, columns of GPT-2's, keys and values behind.
QUERIES = {
    "llama": {f"model.layers.{layer}.self_attn.q_proj": (4, 12) for layer in range(2)},
    "gpt2": {f"transformer.h.{layer}.attn.c_attn": (4, 8) for layer in range(2)},
}
layer_choices = st.sampled_from([None, [0], [1]])
seeds = st.integers(0, 99)
strengths = st.sampled_from([-0.5, 0.0, 0.5, 1.0, 1.5])

# What PEFT says when a verb meets merged adapters, or deletes the active one.
_EXPECTED = (
    "Already unmerged",
    "All adapters are already merged",
    "Already following adapters were merged",
    "Adapter cannot be set when the model is merged",
    "Adapter .* was active which is now deleted",
)


@contextlib.contextmanager
def expected_warnings():
    with warnings.catch_warnings():
        for message in _EXPECTED:
            warnings.filterwarnings("ignore", message=message)
        yield


def drawn(model, adapter_name, seed):
    """Give an adapter random offsets; return them by layer."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for key, layer in seal_layers(model).items():
        if adapter_name in layer.seal_delta:
            weight = layer.seal_delta[adapter_name].weight
            result[key] = torch.rand(weight.shape, generator=generator) * 1.6 - 0.8
            with torch.no_grad():
                weight.copy_(result[key])
    return result


class Verbs(RuleBasedStateMachine):
    """A model beside what is known about it: offsets and strength of each adapter, who is active, merged, enabled."""

    @initialize(
        name=st.sampled_from(["llama", "gpt2"]),
        first=st.tuples(kinds, layer_choices, seeds),
        second=st.tuples(kinds, layer_choices, seeds),
    )
    def start(self, name, first, second):
        kind, layers, seed = first
        self.name = name
        self.folder = Path(tempfile.mkdtemp())
        self.shapes = {**ARCHITECTURES[name].projections, **QUERIES[name]}
        self.plain = {key: base_model(name).get_submodule(key).weight for key in self.shapes}
        config = SealConfig(**kind, layers_to_transform=layers)
        self.model = get_peft_model(base_model(name), config, adapter_name="one").eval()
        self.settings = {"one": (kind, layers)}
        self.offsets = {"one": drawn(self.model, "one", seed)}
        self.strength = {"one": 1.0}
        self.active, self.merged, self.enabled = ["one"], [], True
        self.put(*second)
        self.compare()

    def teardown(self):
        shutil.rmtree(self.folder, ignore_errors=True)

    def pick(self, index):
        return list(self.offsets)[index % len(self.offsets)]

    def pick_several(self, indices):
        return list(dict.fromkeys(self.pick(index) for index in indices))

    def new_name(self):
        return next(name for name in NAMES if name not in self.offsets)

    def put(self, kind, layers, seed):
        name = self.new_name()
        with expected_warnings():
            self.model.add_adapter(name, SealConfig(**kind, layers_to_transform=layers))
        self.merged = []  # PEFT unmerges before it adds
        self.settings[name] = (kind, layers)
        self.offsets[name] = drawn(self.model, name, seed)
        self.strength[name] = 1.0

    def set_active(self, names):
        with expected_warnings():
            self.model.set_adapter(names[0])  # PEFT's wrapper knows one name, the model inside it several
            self.model.base_model.set_adapter(names)
        self.active, self.merged = names, []

    def by_hand(self, adapters):
        total = {}
        for key, geometry in self.shapes.items():
            scale = torch.ones(geometry)
            for name in adapters:
                if key in self.offsets[name]:
                    offset = self.offsets[name][key]
                    scale = scale * (1 + self.strength[name] * offset.reshape(geometry[0], -1))
            total[key] = scale
        outputs = {key: scale for key, scale in total.items() if key not in QUERIES[self.name]}
        model = multiply_by_hand(base_model(self.name), outputs)
        with torch.no_grad():
            for key, (heads, head_dim) in QUERIES[self.name].items():
                projection = model.get_submodule(key)
                for head in range(heads):
                    rows = slice(head * head_dim, (head + 1) * head_dim)
                    if isinstance(projection, Conv1D):
                        projection.weight[:, rows] *= total[key][head, 0]
                        projection.bias[rows] *= total[key][head, 0]
                    else:
                        projection.weight[rows] *= total[key][head, 0]
        return logits(model)

    def compare(self):
        acting = list(dict.fromkeys([*self.active, *self.merged])) if self.enabled else []
        assert_close(logits(self.model), self.by_hand(acting), rtol=0, atol=1e-4)
        if not self.enabled:
            self.merged = []  # a disabled layer unmerges as soon as it is used
        for name, offsets in self.offsets.items():
            found = scales(self.model, name)
            assert found.keys() == offsets.keys()
            for key, offset in offsets.items():
                assert_close(found[key], 1 + offset, rtol=0, atol=1e-6)
        if not self.merged:
            layers = {key: layer.get_base_layer() for key, layer in seal_layers(self.model).items()}
            assert all(torch.equal(layer.weight, self.plain[key]) for key, layer in layers.items())
            fresh = base_model(self.name)
            for key, layer in layers.items():
                assert layer.bias is None or torch.equal(layer.bias, fresh.get_submodule(key).bias)

    @precondition(lambda self: len(self.offsets) < len(NAMES))
    @rule(kind=kinds, layers=layer_choices, seed=seeds)
    def add(self, kind, layers, seed):
        self.put(kind, layers, seed)
        self.compare()

    @rule(chosen=several)
    def activate(self, chosen):
        chosen = self.pick_several(chosen)
        self.set_active(chosen)
        self.compare()

    @rule(chosen=st.none() | several, safe=st.booleans())
    def merge(self, chosen, safe):
        chosen = None if chosen is None else self.pick_several(chosen)
        with expected_warnings():
            self.model.merge_adapter(chosen, safe_merge=safe)
        self.merged += [name for name in chosen or self.active if name not in self.merged]
        self.compare()

    @rule()
    def unmerge(self):
        with expected_warnings():
            self.model.unmerge_adapter()
        self.merged = []
        self.compare()

    @rule()
    def disable_or_enable(self):
        self.enabled = not self.enabled
        with expected_warnings():
            if self.enabled:
                self.model.base_model.enable_adapter_layers()
            else:
                self.model.base_model.disable_adapter_layers()
        self.compare()

    @precondition(lambda self: self.enabled)
    @rule()
    def disable_for_a_while(self):
        with self.model.disable_adapter(), expected_warnings():
            assert torch.equal(logits(self.model), logits(base_model(self.name)))
        self.merged = []
        self.compare()

    @precondition(lambda self: len(self.offsets) > 1)  # without any adapter PEFT 0.21's forward is a KeyError
    @rule(index=which)
    def delete(self, index):
        name = self.pick(index)
        if name in self.merged:
            with pytest.raises(ValueError, match="merged"):
                self.model.delete_adapter(name)
            self.compare()
            return
        with expected_warnings():
            self.model.delete_adapter(name)
            for known in (self.settings, self.offsets, self.strength):
                del known[name]
        if name in self.active:  # PEFT lets each layer pick its own successor, and the wrapper may keep the old name
            self.set_active([other for other in self.active if other != name] or [self.pick(0)])
        assert list(self.model.peft_config) == list(self.offsets)
        self.compare()

    @rule(index=which)
    def save_and_load(self, index):
        first = self.pick(index)
        self.model.save_pretrained(self.folder)
        self.model = PeftModel.from_pretrained(base_model(self.name), self.folder / first, adapter_name=first)
        for name in self.offsets:
            if name != first:
                self.model.load_adapter(self.folder / name, name)
        shutil.rmtree(self.folder)
        self.strength = dict.fromkeys(self.offsets, 1.0)
        self.active, self.merged, self.enabled = [first], [], True
        self.compare()

    @rule(index=which, strength=strengths)
    def strengthen(self, index, strength):
        name = self.pick(index)
        if name in self.merged:
            with pytest.raises(ValueError, match="merged"):
                set_strength(self.model, strength, name)
        else:
            set_strength(self.model, strength, name)
            self.strength[name] = strength
        self.compare()

    @precondition(lambda self: len(self.offsets) < len(NAMES))
    @rule(parts=several, weights=st.lists(strengths, min_size=3, max_size=3))
    def combine(self, parts, weights):
        name, parts = self.new_name(), self.pick_several(parts)
        weights = weights[: len(parts)]
        with expected_warnings():
            self.model.add_weighted_adapter(parts, weights, name)
        self.merged = []
        wide = any(self.settings[part][0].get("granularity") == "channel" for part in parts)
        total = {}
        for part, weight in zip(parts, weights, strict=True):
            for key, offset in self.offsets[part].items():
                heads, head_dim = self.shapes[key]
                per_channel = wide and key not in QUERIES[self.name]
                offset = offset.reshape(heads, -1).expand(heads, head_dim) if per_channel else offset
                total[key] = total.get(key, 0) + weight * offset
        sites = ("output",) * any(key not in QUERIES[self.name] for key in total)
        sites += ("query",) * any(key in QUERIES[self.name] for key in total)
        self.settings[name] = ({"sites": sites, "granularity": "channel" if wide else "head"}, None)
        self.offsets[name] = {key: total[key] for key in self.shapes if key in total}
        self.strength[name] = 1.0
        self.compare()

    @rule(index=which, seed=seeds)
    def hotswap(self, index, seed):
        name = self.pick(index)
        layers = sorted({index for index in (0, 1) for key in self.offsets[name] if f".{index}." in key})
        kept = layers[seed % len(layers) :]  # a layer that the file lacks becomes the identity
        other = adapted(self.name, **self.settings[name][0], layers_to_transform=kept)
        offsets = drawn(other, "default", seed)
        other.save_pretrained(self.folder)
        if name in self.merged:
            with pytest.raises(ValueError, match="merged"):
                hotswap_adapter(self.model, self.folder, name)
        else:
            hotswap_adapter(self.model, self.folder, name)
            old = self.offsets[name]
            self.offsets[name] = {key: offsets.get(key, torch.zeros_like(value)) for key, value in old.items()}
        shutil.rmtree(self.folder)
        self.compare()

    @precondition(lambda self: self.enabled and not self.merged)
    @rule(chosen=st.lists(st.none() | which, min_size=1, max_size=4))
    def mix_rows(self, chosen):
        rows = ["__base__" if index is None else self.pick(index) for index in chosen]
        with torch.no_grad():
            mixed = self.model(input_ids=INPUT_IDS[:1].expand(len(rows), -1), adapter_names=rows).logits
        for name in set(rows):
            expected = self.by_hand([name] if name in self.offsets else [])[0]
            for row in (found for found, other in zip(mixed, rows, strict=True) if other == name):
                assert_close(row, expected, rtol=0, atol=1e-4)
        self.compare()

    @rule()
    def copy(self):
        self.model = copy.deepcopy(self.model)
        self.compare()

    @precondition(lambda self: self.enabled)
    @rule(safe=st.booleans())
    def merge_for_good(self, safe):
        with expected_warnings():
            plain = copy.deepcopy(self.model).merge_and_unload(safe_merge=safe)
        assert not seal_layers(plain)
        assert_close(logits(plain), self.by_hand(list(dict.fromkeys([*self.active, *self.merged]))), rtol=0, atol=1e-4)
        self.compare()


TestVerbs = Verbs.TestCase
TestVerbs.settings = settings(max_examples=100, stateful_step_count=8)

"""Bases whose formats take no scales: everything but merging works, and merging is refused before anything changes.

Loaded by transformers, all linear layers quantised, through the kernels that the libraries have for any CPU.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AwqConfig, CompressedTensorsConfig, GPTQConfig, QuantoConfig

from models import INPUT_IDS, draw_scales, llama, logits, seal_layers
from quantized_models import needs
from seal_peft import SealConfig

HEAD_DIM, GROUP = 64, 32


@pytest.fixture(scope="module", autouse=True)
def _compiles_nothing() -> Iterator[None]:
    """Keep GPTQ's kernel from `torch.compile`, which takes half a minute at its first call."""
    with torch.compiler.set_stance("force_eager"):
        yield


def _plain() -> nn.Module:
    return llama(head_dim=HEAD_DIM, hidden_size=64, intermediate_size=64)


def _for_quanto(folder: Path) -> None:
    _plain().save_pretrained(folder)


def _for_compressed_tensors(folder: Path, layout: str, **weights: Any) -> None:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    model = _plain()
    groups = {"all": {"targets": ["Linear"], "weights": weights}}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"], format=layout))
    highest = 448 if weights["type"] == "float" else 2 ** (weights["num_bits"] - 1) - 1
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            rows = module.weight.view(len(module.weight), -1, weights.get("group_size", module.in_features))
            module.weight_scale.data.copy_(rows.abs().amax(-1) / highest)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)


def _for_gptqmodel(folder: Path, config: GPTQConfig | AwqConfig) -> None:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    model, awq = _plain(), isinstance(config, AwqConfig)
    for path, linear in list(model.model.named_modules()):
        if isinstance(linear, nn.Linear):
            rows = linear.weight.detach().view(linear.out_features, -1, GROUP)
            low, high = rows.amin(-1).clamp(max=0), rows.amax(-1).clamp(min=0)
            scale = (high - low) / 15
            sizes = {"in_features": linear.in_features, "out_features": linear.out_features, "bias": False}
            layer = (AwqTorchLinear if awq else TorchLinear)(
                bits=4, group_size=GROUP, sym=False, desc_act=False, register_buffers=True, **sizes
            )
            # GPTQ's newer `pack` compiles an extension first.
            pack = layer.pack if awq else layer.pack_original
            pack(linear, scale, (-low / scale).round(), torch.arange(linear.in_features, dtype=torch.int32) // GROUP)
            model.model.set_submodule(path, layer)
    model.half()
    model.config.quantization_config = config.to_dict()
    model.save_pretrained(folder)


# By name: the package, what writes a checkpoint, what its refusal says, and how transformers is told to load it.
Entry = tuple[str, Callable[[Path], None], str, dict[str, Any]]
_ct = partial(partial, _for_compressed_tensors)
FORMATS: dict[str, Entry] = {
    **{
        f"quanto-{kind}": (
            "optimum-quanto",
            _for_quanto,
            r"quantised weights \(optimum\.quanto\.",
            {"quantization_config": QuantoConfig(weights=kind)},
        )
        for kind in ("int8", "float8")  # int4 works, too, once ninja has compiled a kernel for half a minute
    },
    **{
        f"compressed-tensors-{name}": ("compressed-tensors", write, r"quantised weights \(compressed_tensors\.", {})
        for name, write in {
            "int4": _ct(layout="pack-quantized", num_bits=4, type="int", strategy="group", group_size=GROUP),
            "int8": _ct(layout="int-quantized", num_bits=8, type="int", strategy="channel"),
            "float8": _ct(layout="float-quantized", num_bits=8, type="float", strategy="channel"),
        }.items()
    },
    "gptq": (
        "gptqmodel",
        lambda folder: _for_gptqmodel(
            folder, GPTQConfig(bits=4, group_size=GROUP, sym=False, format="gptq_v2", backend="gptq_torch")
        ),
        r"gptq weights \(gptqmodel\..*\.TorchLinear",
        {"dtype": torch.float16},
    ),
    # PEFT takes these layers for GPTQ's, which they are by class.
    "awq": (
        "gptqmodel",
        lambda folder: _for_gptqmodel(folder, AwqConfig(bits=4, group_size=GROUP, backend="torch_awq")),
        r"gptq weights \(gptqmodel\..*\.AwqTorchLinear",
        {"dtype": torch.float16},
    ),
}
every_format = pytest.mark.parametrize("name", [pytest.param(name, marks=needs(FORMATS[name][0])) for name in FORMATS])


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., nn.Module]:
    folders: dict[str, Path] = {}

    def load(name: str, **settings: Any) -> nn.Module:
        _, write, _, how = FORMATS[name]
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            write(folders[name])
        return AutoModelForCausalLM.from_pretrained(folders[name], device_map="cpu", **{**how, **settings}).eval()

    return load


def _adapted(base: nn.Module) -> PeftModel:
    model = get_peft_model(base, SealConfig(sites=("output", "query")))
    draw_scales(model)
    return model.eval()


def _scaled_by_hooks(base: nn.Module, model: PeftModel) -> nn.Module:
    """Multiply what goes into the output projections and what comes out of the query projections."""
    for name, layer in seal_layers(model).items():
        scale = (1 + layer.offset("default").detach()).repeat_interleave(HEAD_DIM)
        module = base.get_submodule(name)
        if layer.site == "query":
            module.register_forward_hook(lambda _, args, out, scale=scale: (out * scale).to(out.dtype))
        else:
            module.register_forward_pre_hook(lambda _, args, scale=scale: ((args[0] * scale).to(args[0].dtype),))
    return base


@every_format
def test_a_new_adapter_leaves_the_quantised_base_as_it_is(name, load):
    plain, expected = logits(_plain()), logits(load(name))
    assert 1e-3 < (expected - plain).norm() / plain.norm() < 0.5  # it is quantised, and the same model
    model = get_peft_model(load(name), SealConfig(sites=("output", "query"))).eval()
    assert len(seal_layers(model)) == 4
    assert torch.equal(logits(model), expected)


@every_format
def test_the_forward_pass_scales_around_the_quantised_layers_and_survives_its_folder(name, load, tmp_path):
    model = _adapted(load(name))
    model.save_pretrained(tmp_path)
    expected = logits(_scaled_by_hooks(load(name), model))
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(PeftModel.from_pretrained(load(name), tmp_path)), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(load(name)))


def _numbers(model: nn.Module) -> dict[str, Tensor]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {key: getattr(value, "_data", value).detach().clone() for key, value in named}


@every_format
def test_a_step_of_training_changes_the_scales_and_nothing_else(name, load):
    model = _adapted(load(name))
    logits(model)  # compressed-tensors unpacks its weights now
    before = _numbers(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(input_ids=INPUT_IDS, labels=INPUT_IDS).loss.backward()
    optimizer.step()
    changed = {key for key, value in _numbers(model).items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if "seal_" in key}


@every_format
@pytest.mark.parametrize("run_before", [False, True])
def test_merging_is_refused_by_name_before_anything_is_touched(name, run_before, load):
    base = load(name)
    plain = nn.Linear(256, 64, bias=False, dtype=base.dtype)
    # The first layer could be merged, and would be if each were asked on its turn.
    base.model.layers[0].self_attn.o_proj = plain
    model = _adapted(base)
    weight, expected = plain.weight.detach().clone(), logits(model) if run_before else None
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=f"cannot be merged into {FORMATS[name][2]}.*Keep the adapter unmerged"):
            merge()
    assert torch.equal(plain.weight, weight)
    assert not any(layer.merged for layer in seal_layers(model).values())
    assert expected is None or torch.equal(logits(model), expected)


@needs("compressed-tensors")
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_compressed_tensors_that_are_dequantised_while_loading_take_scales(load):
    model = _adapted(load("compressed-tensors-int4", quantization_config=CompressedTensorsConfig(dequantize=True)))
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=0, atol=1e-4)

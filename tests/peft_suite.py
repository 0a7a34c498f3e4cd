"""Puts SEAL into the test matrix of a copy of PEFT's source, as a pull request to PEFT would.

PEFT's tests load tiny models from a hub by name; here folders of these names, filled in code, stand in the working
directory, where transformers looks first.
"""

import re
from importlib.util import find_spec
from pathlib import Path

import transformers as tf
from peft import LoraConfig

from lift import lift
from models import HIDDEN, base_model, causal

_MODELS = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": "opt",
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": "gpt2",
    "trl-internal-testing/tiny-random-LlamaForCausalLM": "llama",
    "peft-internal-testing/tiny-dummy-qwen2": "qwen2",
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": "gemma3_text",
}
_LORA_FOLDER = "peft-internal-testing/tiny-opt-lora-revision"
_GPTJ = "peft-internal-testing/tiny-random-GPTJForCausalLM"

_MATRIX = """\
    ("MLP 1 SEAL-H", "MLP", SealConfig, {"target_modules": "lin0", "num_attention_heads": 2}),
    ("MLP 2 SEAL-H", "MLP", SealConfig, {"target_modules": ["lin1"], "num_attention_heads": 4}),
    ("MLP 3 SEAL-C", "MLP", SealConfig,
     {"target_modules": ["lin0", "lin1"], "num_attention_heads": 2, "granularity": "channel"}),
    ("MLP 4 SEAL-H", "MLP", SealConfig,
     {"target_modules": ["lin0"], "num_attention_heads": 2, "modules_to_save": ["lin1"]}),
    ("Conv1D SEAL-C", "EmbConv1D", SealConfig,
     {"target_modules": ["conv1d"], "num_attention_heads": 1, "granularity": "channel"}),
"""
_ON_LIN0 = '{"target_modules": ["lin0"], "num_attention_heads": 2, "init_weights": False}'
_PAIRS = f"""\
    ("SEAL Same", "seal", SealConfig, {_ON_LIN0}, {_ON_LIN0}),
    ("SEAL Different", "seal", SealConfig, {_ON_LIN0}, {_ON_LIN0.replace("lin0", "lin1")}),
"""
_DECODERS = """\
    (SealConfig, {"task_type": "CAUSAL_LM", "target_modules": None}),
    (SealConfig, {"task_type": "CAUSAL_LM", "target_modules": None, "granularity": "channel"}),
"""
_IMPORT = (r"\nfrom peft import \(\n", r"\g<0>    SealConfig,\n")

# File -> (pattern, replacement): rows of the matrices, and the gates that name the methods which can do a thing.
_EDITS = {
    "test_custom_models.py": [
        _IMPORT,
        (r"\nTEST_CASES = \[\n", r"\g<0>" + _MATRIX),
        (r"\nMULTIPLE_ACTIVE_ADAPTERS_TEST_CASES = \[\n", r"\g<0>" + _PAIRS),
        # Models made of bare linear layers tell no number of heads.
        (
            r'( +)if config_cls == IA3Config:\n( +)(\w+)\["feedforward_modules"\]',
            r'\1if config_cls == SealConfig:\n\2\3["num_attention_heads"] = 4\n\g<0>',
        ),
    ],
    "test_config.py": [_IMPORT, (r"\nALL_CONFIG_CLASSES = \(\n", r"\g<0>    (SealConfig, {}),\n")],
    "test_decoder_models.py": [
        _IMPORT,
        (r"\nALL_CONFIGS = \[\n", r"\g<0>" + _DECODERS),
        (
            r'if config_cls != LoraConfig:\n( +)pytest.skip\("Mixed adapter batches',
            r'if config_cls not in (LoraConfig, SealConfig):\n\1pytest.skip("Mixed adapter batches',
        ),
        # As it stands it is never true, and no method but BEFT is to be given the targets that follow it.
        (r"if isinstance\(config_cls, BeftConfig\):", "if config_cls is not BeftConfig:"),
    ],
    "testing_common.py": [
        _IMPORT,
        (r"isinstance\(config, IA3Config\)", "isinstance(config, (IA3Config, SealConfig))"),
        (
            r"if not isinstance\(config, \(IA3Config, LoraConfig\)\)",
            r"if not isinstance(config, (IA3Config, LoraConfig, SealConfig))",
        ),
        (
            r"issubclass\(config_cls, \(LoraConfig, IA3Config\)\)",
            "issubclass(config_cls, (LoraConfig, IA3Config, SealConfig))",
        ),
        (r"not in \(LoraConfig,( RoadConfig)?\)", "not in (LoraConfig, RoadConfig, SealConfig)"),
        (
            r"not in \(IA3Config, LoHaConfig, LoKrConfig, LoraConfig\)",
            "not in (IA3Config, LoHaConfig, LoKrConfig, LoraConfig, SealConfig)",
        ),
    ],
}

# Imported by PEFT's helpers, for tests with images and data sets, which `-k seal` does not choose.
_UNUSED = {"datasets": "load_dataset = None\n", "diffusers": "class StableDiffusionPipeline:\n    pass\n"}


def add_seal(checkout: Path) -> None:
    """Put the tuner and its rows into a copy of PEFT with `src/peft` and `tests`.

    Raises:
        ValueError: PEFT's tests have changed, so that a row or gate cannot be placed.
    """
    lift(checkout / "src" / "peft")
    (checkout / "tests" / "__init__.py").touch()
    for name, edits in _EDITS.items():
        file = checkout / "tests" / name
        text = file.read_text(encoding="utf-8")
        for pattern, new in edits:
            text, count = re.subn(pattern, new, text)
            if not count:
                raise ValueError(f"{file} has nothing like {pattern!r}: mend tests/peft_suite.py.")
        file.write_text(text, encoding="utf-8")
    for name, text in _UNUSED.items():
        if find_spec(name) is None:
            (checkout / "src" / f"{name}.py").write_text(text, encoding="utf-8")
    for folder, name in _MODELS.items():
        base_model(name).save_pretrained(checkout / folder)
    LoraConfig(target_modules=["q_proj"]).save_pretrained(checkout / _LORA_FOLDER)
    causal(tf.GPTJConfig, rotary_dim=4, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=128).save_pretrained(
        checkout / _GPTJ
    )

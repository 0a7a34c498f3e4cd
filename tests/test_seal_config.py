"""The config of SEAL in files, copies and several models, and its registration with PEFT."""

import copy
import json
import pickle

import peft
import pytest
from peft import PeftConfig, PeftType, get_peft_model

import seal_peft
from models import base_model, seal_layers
from seal_peft import SealConfig

FULL_CONFIG = {
    "granularity": "channel",
    "target_modules": ["o_proj", "out_proj"],
    "exclude_modules": ["lm_head"],
    "layers_to_transform": [0],
    "layers_pattern": "layers",
    "modules_to_save": ["norm"],
    "init_weights": False,
    "num_attention_heads": 4,
    "head_dim": 12,
    "task_type": "CAUSAL_LM",
    "inference_mode": True,
}


@pytest.mark.parametrize("settings", [{}, FULL_CONFIG], ids=["default", "full"])
def test_a_config_survives_files_pickling_and_copying(settings, tmp_path):
    config = SealConfig(**settings)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "SEAL" and saved["sites"] == config.to_dict()["sites"]
    for other in (
        SealConfig.from_pretrained(tmp_path),
        PeftConfig.from_pretrained(tmp_path),
        pickle.loads(pickle.dumps(config)),
        copy.deepcopy(config),
        copy.copy(config),
    ):
        assert type(other) is SealConfig
        assert other.to_dict() == {**config.to_dict(), "inference_mode": other.inference_mode}
        assert other.peft_type is PeftType.SEAL


def test_a_file_of_a_later_version_with_more_fields_still_loads(tmp_path):
    SealConfig(granularity="channel").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "field_of_the_future": 1}))
    with pytest.warns(UserWarning, match="field_of_the_future"):
        assert SealConfig.from_pretrained(tmp_path).granularity == "channel"


def test_one_config_object_serves_several_models():
    config = SealConfig()
    for name in ("llama", "deepseek_v3", "llama"):
        assert len(seal_layers(get_peft_model(base_model(name), copy.deepcopy(config)))) == 2
    reused = SealConfig(target_modules=["o_proj"])
    for name in ("llama", "deepseek_v3"):
        assert len(seal_layers(get_peft_model(base_model(name), reused))) == 2


def test_seal_is_a_member_of_the_enum_like_any_other():
    member = PeftType.SEAL
    assert type(member) is PeftType and member in list(PeftType)
    assert member is PeftType("SEAL") is PeftType["SEAL"] is pickle.loads(pickle.dumps(member))
    assert (member.name, member.value, str.__str__(member)) == ("SEAL", "SEAL", "SEAL")
    assert json.dumps(member) == '"SEAL"'
    assert len({type_.value for type_ in PeftType}) == len(list(PeftType)) == len(PeftType.__members__)


def test_registering_again_changes_nothing():
    before = (list(PeftType), dict(peft.PEFT_TYPE_TO_CONFIG_MAPPING), dict(peft.PEFT_TYPE_TO_TUNER_MAPPING))
    seal_peft.tuner.register(print)
    assert SealConfig._describe is not print
    assert before == (list(PeftType), dict(peft.PEFT_TYPE_TO_CONFIG_MAPPING), dict(peft.PEFT_TYPE_TO_TUNER_MAPPING))
    assert peft.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.SEAL] is SealConfig


def test_a_method_of_the_same_name_is_not_overwritten(monkeypatch):
    class Other:
        """What PEFT might ship one day."""

    monkeypatch.setitem(peft.PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.SEAL, Other)
    with pytest.raises(RuntimeError, match=r"already has a method named SEAL \(.*Other\).*import only one of the two"):
        seal_peft.tuner.register(print)
    assert peft.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.SEAL] is Other

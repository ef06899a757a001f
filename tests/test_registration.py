import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import ModulesToSaveWrapper

import sfa_peft
from sfa_peft.compat import guard, registration
from sfa_peft.layers.adapted import SFALayer
from sfa_peft.layers.heads import Head


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_peft_knows_sfa_by_its_type():
    sfa = peft.PeftType.SFA
    assert sfa == "SFA"
    assert PEFT_TYPE_TO_CONFIG_MAPPING[sfa]() == sfa_peft.SFAConfig()
    assert PEFT_TYPE_TO_TUNER_MAPPING["SFA"] is sfa_peft.SFAModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING["SFA"] == "sfa_"
    assert isinstance(peft.get_peft_config({"peft_type": "SFA", "budget": 0.1}), sfa_peft.SFAConfig)


def test_registering_changes_no_other_method():
    done = run(
        "import peft; from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as m; before = dict(m)\n"
        "import sfa_peft\n"
        "assert {k: v for k, v in m.items() if k != 'SFA'} == before, 'other methods changed'\n"
        "assert m['SFA'] is sfa_peft.SFAModel and list(peft.PeftType).count('SFA') == 1"
    )
    assert done.returncode == 0, done.stderr


def test_a_peft_that_cannot_be_extended_is_named():
    done = run(
        "import peft.utils.peft_types as t, peft.utils as u\n"
        "def refuse(**kwargs): raise RuntimeError('no extensions')\n"
        "u.register_peft_method = refuse\n"
        "import sfa_peft"
    )
    assert done.returncode != 0
    assert f"cannot register itself with the installed peft {peft.__version__} and transformers" in done.stderr
    assert ": no extensions. Install" in done.stderr


def test_a_foreign_method_of_the_same_name_is_not_overwritten(monkeypatch):
    class Foreign:
        __module__ = "someone.else"

    monkeypatch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, "SFA", Foreign)
    with pytest.raises(ImportError, match="has a method SFA already"):
        registration.add_peft_type()


@pytest.mark.slow
def test_other_methods_load_as_if_sfa_was_not_there(tmp_path):
    def lora_alone(name, *arguments):
        script = Path(__file__).with_name("lora_alone.py")
        command = [sys.executable, script, tmp_path / name, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])["results"]

    without, beside = lora_alone("without"), lora_alone("beside", "sfa")
    assert "error" not in without["from_pretrained good"]
    assert "error" in without["from_pretrained of_other_shapes"]
    for way, result in without.items():
        assert beside[way] == result, way


def test_a_peft_whose_functions_have_changed_is_named_and_left_as_it_is():
    done = run(
        "import peft, peft.utils.hotswap as h\n"
        "def load_adapter(self, where): pass\n"
        "peft.PeftModel.load_adapter = load_adapter\n"
        "del h.hotswap_adapter_from_state_dict\n"
        "before = peft.PeftModel.from_pretrained.__func__\n"
        "try:\n"
        "    import sfa_peft\n"
        "except ImportError as error:\n"
        "    print(error)\n"
        "assert peft.PeftModel.from_pretrained.__func__ is before"
    )
    assert done.returncode == 0, done.stderr
    assert "PeftModel.load_adapter has no model_id, adapter_name, key_mapping" in done.stdout
    assert "there is no peft.utils.hotswap.hotswap_adapter_from_state_dict" in done.stdout


def test_a_peft_without_a_hook_is_refused_before_anything_is_registered():
    done = run(
        "import peft\n"
        "from peft.tuners.tuners_utils import BaseTuner\n"
        "del BaseTuner._get_adapter_state_dict\n"
        "def delete_adapter(self, name): pass\n"
        "BaseTuner.delete_adapter = delete_adapter\n"
        "del peft.NoMatchingPeftModuleError\n"
        "try:\n"
        "    import sfa_peft\n"
        "except ImportError as error:\n"
        "    print(error)\n"
        "assert 'SFA' not in peft.PeftType.__members__"
    )
    assert done.returncode == 0, done.stderr
    assert "there is no peft.NoMatchingPeftModuleError" in done.stdout
    assert "there is no peft.tuners.tuners_utils.BaseTuner._get_adapter_state_dict" in done.stdout
    assert "peft.tuners.tuners_utils.BaseTuner.delete_adapter has no adapter_name" in done.stdout
    assert 'pip install "peft==' in done.stdout


def test_every_hook_that_is_overridden_is_guarded():
    owners = {
        "peft.tuners.tuners_utils.BaseTuner": (BaseTuner, sfa_peft.SFAModel),
        "peft.tuners.tuners_utils.BaseTunerLayer": (BaseTunerLayer, SFALayer),
        "peft.utils.ModulesToSaveWrapper": (ModulesToSaveWrapper, Head),
    }
    for place, (theirs, ours) in owners.items():
        present = {name for cls in theirs.__mro__ if cls.__module__.startswith("peft.") for name in vars(cls)}
        own = {name for cls in ours.__mro__ if cls.__module__.startswith("sfa_peft.") for name in vars(cls)}
        methods = {n for n in present & own if callable(getattr(theirs, n)) and not n.startswith("__")}
        assert methods <= guard.NEEDS[place].keys(), place


def test_the_docs_name_the_newest_versions_that_were_tested():
    text = (Path(__file__).parents[1] / "docs" / "compatibility.md").read_text()
    for name, version in guard.TESTED.items():
        assert f"{name} {version}" in text

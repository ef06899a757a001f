"""Groups of parameters with the measured rates, and the warning of `Trainer`'s own."""

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

import tiny
from sfa_peft import SFAConfig, parameter_groups, search_ticket


def adapted(**options):
    return get_peft_model(tiny.swin(), SFAConfig(**{"budget": 0.1, "modules_to_save": ["decode_head"]} | options))


def by_name(groups):
    return {group["name"]: group for group in groups}


def test_every_trainable_parameter_has_the_rate_of_its_kind():
    model = adapted(external_places=["attention", "mlp_parallel"])
    groups = parameter_groups(model)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("head", 2e-3, 0.0),
        ("external", 1e-2, 0.0),
        ("internal", by_name(groups)["internal"]["lr"], 0.0),
    ]
    counted = [p for group in groups for p in group["params"]]
    assert {id(p) for p in counted} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(counted) == len({id(p) for p in counted})
    names = {id(p): name for name, p in model.named_parameters()}
    marks = {"head": ".modules_to_save.", "external": ".sfa_", "internal": ".sfa_internal."}
    for name, group in by_name(groups).items():
        assert all(marks[name] in names[id(p)] for p in group["params"])
    given = by_name(parameter_groups(model, internal=3e-3, head=1, weight_decay=0.1))
    assert (given["internal"]["lr"], given["head"]["lr"], given["external"]["weight_decay"]) == (3e-3, 1, 0.1)


@pytest.mark.parametrize(("budget", "density"), [(0.02, 0.02), (0.01, 0.01), (3, None)])
def test_the_rate_of_a_ticket_follows_its_density(budget, density):
    model = adapted(budget=budget, external_share=0.0)
    rate = by_name(parameter_groups(model))["internal"]["lr"]
    assert rate == 0.1 if density is None else abs(rate / (7e-3 / density**0.5) - 1) < 0.1


def test_kinds_that_are_not_there_have_no_group():
    assert by_name(parameter_groups(adapted(external_share=1.0))).keys() == {"head", "external"}
    assert by_name(parameter_groups(adapted(external_share=0.0, modules_to_save=None))).keys() == {"internal"}


def test_what_is_unfrozen_beside_the_adapter_is_trained_too():
    model = adapted(modules_to_save=None)
    model.get_base_model().decode_head.classifier.requires_grad_(True)
    assert len(by_name(parameter_groups(model))["head"]["params"]) == 2


def test_only_the_active_adapter_is_in_the_groups():
    model = adapted()
    model.add_adapter("depth", SFAConfig(budget=0.05))
    model.set_adapter("depth")
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(".depth" in names[id(p)] for group in parameter_groups(model) for p in group["params"])


def test_what_cannot_be_trained_is_told(tmp_path):
    model = adapted()
    for bad in (-1, float("nan"), float("inf"), "a", None, True):
        with pytest.raises(ValueError, match=r"external=.* must be a number >= 0"):
            parameter_groups(model, external=bad)
    with pytest.raises(TypeError, match="has no SFA adapter: call get_peft_model"):
        parameter_groups(get_peft_model(tiny.swin(), LoraConfig(target_modules=["fc1"])))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is_trainable=True"):
        parameter_groups(PeftModel.from_pretrained(tiny.swin(), tmp_path))


def trainer(model, tmp_path, **options):
    rate = {"learning_rate": options.pop("learning_rate")} if "learning_rate" in options else {}
    args = TrainingArguments(str(tmp_path), max_steps=2, report_to=[], use_cpu=True, save_strategy="no", **rate)
    rows = [{name: value[0] for name, value in tiny.batch(1, seed=i).items()} for i in range(4)]
    return Trainer(model, args, train_dataset=rows, **options)


def test_trainer_takes_the_groups_and_keeps_their_rates(tmp_path):
    model = adapted()
    search_ticket(model, [tiny.batch()], steps=1, progress=False)
    optimizer = torch.optim.AdamW(parameter_groups(model))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*learning rate")
        one = trainer(model, tmp_path, optimizers=(optimizer, None))
        one.train()
    assert [group["initial_lr"] for group in optimizer.param_groups] == [g["lr"] for g in parameter_groups(model)]
    assert one.optimizer.param_groups[0]["lr"] < 2e-3  # Trainer's own schedule


def test_trainers_own_rate_is_warned_of_and_a_chosen_one_is_not(tmp_path):
    with pytest.warns(UserWarning, match=r"learning rate of 5e-05, .*parameter_groups\(model\)") as found:
        trainer(adapted(), tmp_path).train()
    assert len([w for w in found if "learning rate" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*learning rate")
        trainer(adapted(), tmp_path, learning_rate=1e-3).create_optimizer()
        trainer(adapted(external_share=1.0), tmp_path).create_optimizer()
        trainer(get_peft_model(tiny.swin(), LoraConfig(target_modules=["fc1"])), tmp_path).create_optimizer()

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.data import DataLoader, Dataset

import tiny
from adapters import BATCHES, adapted, auto, flat, positions, search
from sfa_peft import Quotas, SFAConfig, SFALayer, TicketSearchError, criterion, install_ticket


@pytest.mark.parametrize("granularity", ["element", "row", "column"])
@pytest.mark.parametrize("make", [tiny.swin, tiny.dinov2])
def test_the_search_installs_another_ticket_of_the_same_budget(make, granularity):
    model = adapted(make, internal_granularity=granularity)
    before = positions(model)
    trained = sum(p.numel() for n, p in model.named_parameters() if ".sfa_" in n)
    report = search(model)
    after = positions(model)
    assert after.keys() != before.keys() or any(not torch.equal(after[n], before[n]) for n in after)
    now = sum(p.numel() for n, p in model.named_parameters() if ".sfa_" in n)
    assert now == trained if granularity == "element" else abs(now - trained) < 70
    internal = sum(p.numel() for n, p in model.named_parameters() if ".sfa_internal." in n)
    assert report.ticket_size == internal
    assert sum(model.peft_config["default"].ticket_sizes.values()) == sum(len(p) for p in after.values())
    assert all(p.requires_grad for n, p in model.named_parameters() if ".sfa_" in n)


def test_everything_but_the_ticket_is_rewound():
    model = adapted()
    model.base_model.model.backbone.eval()  # a mixture of modes must come back as a mixture
    next(p for p in model.parameters() if p.requires_grad).grad = None
    before = {n: t.clone() for n, t in model.state_dict().items() if "sfa_internal" not in n}
    modes = {n: m.training for n, m in model.named_modules() if "sfa_" not in n and "layer" not in n}
    random_state = torch.get_rng_state()
    x = tiny.pixels()
    with torch.no_grad():
        expected = model(x).logits
    search(model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items() if n in before)
    base_names = [n.replace(".base_layer", "") for n in before]
    assert {n.replace(".base_layer", "") for n in model.state_dict() if "sfa_internal" not in n} == set(base_names)
    assert {n: m.training for n, m in model.named_modules() if n in modes} == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(x).logits, expected)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(".sfa_" in n or "modules_to_save" in n for n in trainable)


def test_the_ticket_is_where_dense_training_moves_the_weights_most():
    model = adapted(external_share=0.0, budget=300)
    search(model, steps=3, seed=5)

    reference = tiny.swin()
    dense = adapted(external_share=0.0, budget=300)  # names the candidates
    names = [f"{m}.{p}" for m, own in dense.base_model.candidates("default").items() for p in own]
    parameters = dict(reference.named_parameters())
    before = {n: parameters[n].detach().clone() for n in names}
    for n, p in parameters.items():
        p.requires_grad_(n in before or "decode_head" in n)
    optimizer = torch.optim.AdamW(
        [
            {"params": [parameters[n] for n in names], "lr": 5e-4},
            {"params": [p for n, p in parameters.items() if "decode_head" in n], "lr": 2e-3},
        ],
        weight_decay=0.0,
    )
    reference.train()
    for data in BATCHES:
        reference(**data).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = torch.cat([(parameters[n].detach() - before[n]).abs().reshape(-1) for n in names])
    expected = torch.zeros_like(moved, dtype=torch.bool)
    expected[moved.topk(300).indices] = True
    found, start = torch.zeros_like(expected), 0
    chosen = positions(model)
    for n in names:
        key = f"base_model.model.{n}"
        if key in chosen:
            found[start + chosen[key].long()] = True
        start += parameters[n].numel()
    # Equal but for scores that tie within rounding at the threshold.
    assert (found != expected).sum() <= 4


def test_the_same_search_gives_the_same_ticket_also_with_a_shuffling_loader():
    class Images(Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, i):
            return {k: v[0] for k, v in tiny.batch(1, seed=i).items()}

    found = []
    for _ in range(2):
        torch.rand(len(found) + 1)  # another global state
        model = adapted()
        search(model, DataLoader(Images(), batch_size=2, shuffle=True), seed=3)
        found.append(positions(model))
    assert tiny.same_state(*found)
    other = adapted()
    search(other, DataLoader(Images(), batch_size=2, shuffle=True), seed=4)
    assert not tiny.same_state(positions(other), found[0])


def test_only_the_named_adapter_gets_a_ticket():
    model = adapted()
    model.add_adapter("other", SFAConfig(budget=0.05))
    before = positions(model)
    search(model, adapter_name="other")
    assert tiny.same_state(positions(model), before)
    assert model.peft_config["other"].ticket_sizes
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".other." in n)


def test_after_the_search_the_model_trains_and_merges():
    model = adapted(external_places=["mlp_parallel"])
    search(model)
    tiny.train(model)
    expected = tiny.output(model)
    model.merge_adapter()
    assert torch.allclose(tiny.output(model), expected, atol=1e-6)


def test_a_loss_function_of_ones_own():
    model = get_peft_model(
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)),
        SFAConfig(budget=20, target_modules=["0", "2"], external_modules=[]),
    )
    data = [(torch.randn(5, 4), torch.randn(5, 2))]
    report = search(model, data, loss_fn=lambda m, b: nn.functional.mse_loss(m(b[0]), b[1]))
    assert report.ticket_size == 20
    assert report.losses[-1] < report.losses[0]


def test_the_report_is_a_table_by_stage_and_type():
    model = adapted()
    report = search(model)
    text = str(report)
    assert f"Ticket of {report.ticket_size:,} positions" in text
    assert "layers.0" in text
    assert "layers.1" in text
    for module_type in ("attention.q_proj", "mlp.fc1", "layernorm_before", "downsample.reduction"):
        assert module_type in text
    assert sum(chosen for chosen, _, _ in report.counts("layer").values()) == report.ticket_size


def failing(match, error=TicketSearchError, model=None, **options):
    model = adapted() if model is None else model
    before, flags = tiny.state(model), [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    with pytest.raises(error, match=match):
        search(model, **options)
    assert tiny.same_state(tiny.state(model), before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert not any(m.searching for m in model.modules() if isinstance(m, SFALayer))


def nan_after(step):
    calls = []

    def loss(model, batch):
        calls.append(0)
        return model(**batch).loss * (float("nan") if len(calls) > step else 1.0)

    return loss


def interrupt(model, batch):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("gave no batch", {"data": []}),
        ("cannot be started again, but 4 steps are needed", {"data": iter(BATCHES)}),
        ("no loss for a batch with .'pixel_values'.", {"data": [{"pixel_values": tiny.pixels()}]}),
        ("batch of type list", {"data": [[1, 2]]}),
        ("the loss was nan at step 2", {"loss_fn": nan_after(2)}),
    ],
)
def test_a_search_that_fails_says_why_and_changes_nothing(match, options):
    failing(match, **options)


def test_an_interrupted_search_changes_nothing():
    failing("^$", error=KeyboardInterrupt, loss_fn=interrupt)


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("criterion='luck' is not known", {"criterion": "luck"}),
        ("steps=0", {"steps": 0}),
        ("learning_rate=-1", {"learning_rate": -1}),
        ("adapter_learning_rate=nan", {"adapter_learning_rate": float("nan")}),
        ("adapter_learning_rate=-1 must be a finite number of at least 0", {"adapter_learning_rate": -1}),
        ("adapter_name='nobody'", {"adapter_name": "nobody"}),
    ],
)
def test_bad_arguments(match, options):
    failing(match, error=ValueError, **options)


def test_there_must_be_something_to_search_for():
    failing("no internal adapters", error=ValueError, model=adapted(external_share=1.0))
    failing("not zero any more", error=ValueError, model=tiny.train(adapted()))


def test_other_models_are_refused():
    with pytest.raises(TypeError, match="got UperNetForSemanticSegmentation"):
        search(tiny.swin())
    with pytest.raises(TypeError, match="get_peft_model"):
        search(get_peft_model(tiny.swin(), LoraConfig(target_modules=["fc1"])))
    with pytest.raises(TypeError, match="before the model is wrapped"):
        search(nn.DataParallel(adapted()))


def test_it_runs_in_the_accelerators_precision():
    model = adapted()
    dtypes = []

    def loss(model, batch):
        out = model(**batch)
        dtypes.append(
            model.base_model.model.backbone.swin.encoder.layers[0].blocks[0].mlp.fc1(torch.randn(1, 8)).dtype
        )
        return out.loss

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        search(model, accelerator=Accelerator(mixed_precision="bf16"), loss_fn=loss, steps=1)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert dtypes == [torch.bfloat16]


@pytest.mark.slow
def test_two_processes_find_the_same_ticket_as_one(tmp_path):
    """Two gloo processes with half the batch each, against one process with whole batches."""
    script = Path(__file__).with_name("distributed_search.py")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank{i}.pt") for i in range(2)]
    assert tiny.same_state(*ranks)
    assert tiny.same_state(*(torch.load(tmp_path / f"auto{i}.pt") for i in range(2)))
    assert not (tmp_path / "progress.safetensors").exists()
    saved = [{f.name for f in (tmp_path / f"saved{i}").glob("*")} for i in range(2)]
    assert "adapter_model.safetensors" in saved[0]
    assert saved[1] == set()
    assert {f.name for f in (tmp_path / "saved").iterdir()} == saved[0]
    errors = [json.loads((tmp_path / f"error{i}.json").read_text()) for i in range(2)]
    assert errors[1] == "ValueError: no loss here"
    assert errors[0].startswith("TicketSearchError: the loss was nan at step 0 of the search on a process")

    model = adapted()
    both = [
        {k: torch.cat([tiny.batch(seed=2 * i)[k], tiny.batch(seed=2 * i + 1)[k]]) for k in ("pixel_values", "labels")}
        for i in range(2)
    ]
    # Without the head's batch norm, which sees each process's half alone, the gradients are the same mean.
    search(
        model,
        both,
        loss_fn=lambda m, b: m.base_model.model.backbone(b["pixel_values"]).feature_maps[0].square().mean(),
    )
    alone = positions(model)
    total = sum(len(p) for p in alone.values())
    common = sum(len(set(p.tolist()) & set(ranks[0].get(n, torch.tensor([])).tolist())) for n, p in alone.items())
    assert common >= 0.97 * total


def test_the_named_adapter_is_the_one_that_is_searched_with():
    model = adapted(external_share=0.0)
    model.add_adapter("other", SFAConfig(budget=0.1, external_share=0.0, modules_to_save=["decode_head"]))
    seen = []

    def loss(model, batch):
        seen.append(list(model.base_model.active_adapters))
        return model(**batch).loss

    search(model, adapter_name="other", loss_fn=loss)
    assert seen == [["other"]] * 4
    assert model.active_adapters == ["default"]
    both = adapted(external_share=0.0)
    search(both)
    assert tiny.same_state(positions(model, "other"), positions(both))


def test_a_loss_that_does_not_reach_the_backbone_is_no_ticket():
    def head_only(model, batch):
        inner = model.base_model.model
        with torch.no_grad():
            features = inner.backbone(batch["pixel_values"]).feature_maps
        return inner.decode_head(features).square().mean()

    failing("does not depend on the backbone", loss_fn=head_only)
    failing("a tensor of one element with a gradient", loss_fn=lambda m, b: 0.5)


def test_merged_disabled_and_empty_adapters_are_refused():
    model = adapted()
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        search(model)
    model = adapted()
    with model.disable_adapter(), pytest.raises(ValueError, match="disable_adapter"):
        search(model)
    empty = get_peft_model(tiny.swin(), SFAConfig(budget=0.1), low_cpu_mem_usage=True)
    with pytest.raises(ValueError, match="low_cpu_mem_usage"):
        search(empty)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_searched_in_float32(dtype):
    config = SFAConfig(
        budget=60, external_share=0.0, modules_to_save=["decode_head"], target_modules=["layernorm_after"]
    )
    model = get_peft_model(tiny.swin().to(dtype), config)
    before = {n: p.clone() for n, p in model.named_parameters() if "sfa_" not in n}
    half = [{"pixel_values": b["pixel_values"].to(dtype), "labels": b["labels"]} for b in BATCHES]

    def loss(model, batch):
        return nn.functional.cross_entropy(model(pixel_values=batch["pixel_values"]).logits.float(), batch["labels"])

    report = search(model, half, loss_fn=loss)
    # A weight of 1.0 cannot move by 5e-4 in bfloat16; its float32 copy can.
    assert any(report.ticket.elements(name) for name in report.ticket.shapes if name.endswith("weight"))
    after = {n.replace(".base_layer", ""): p for n, p in model.named_parameters() if "sfa_" not in n}
    assert all(torch.equal(p, after[n.replace(".base_layer", "")]) for n, p in before.items())


@pytest.mark.parametrize("placement", ["uniform", "auto"])
@pytest.mark.parametrize("rewind", [True, False])
def test_adapters_stay_in_float32_on_a_half_precision_base(placement, rewind):
    options = {"external_placement": placement, "external_share": 0.4, "budget": 0.2}
    model = adapted(lambda: tiny.swin().to(torch.bfloat16), **options)
    if placement == "uniform":
        with torch.no_grad():  # values that bfloat16 does not have
            for p in (p for n, p in model.named_parameters() if ".up." in n):
                p.fill_(0.001001)
    externals = {n: p for n, p in model.named_parameters() if ".sfa_" in n and ".sfa_internal." not in n}
    before = {n: p.detach().clone() for n, p in externals.items()}
    half = [{"pixel_values": b["pixel_values"].bfloat16(), "labels": b["labels"]} for b in BATCHES]
    search(model, half, rewind=rewind)
    after = {n: p for n, p in model.named_parameters() if ".sfa_" in n}
    assert {p.dtype for p in after.values()} == {torch.float32}
    if placement == "uniform":
        assert all(after[n] is p for n, p in externals.items())
        assert all(torch.equal(p, before[n]) is rewind for n, p in externals.items())
    assert any(p.any() for n, p in after.items() if ".up." in n) is (placement == "uniform" or not rewind)


def test_a_search_does_not_fix_the_precision_of_later_accelerators():
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        search(adapted())
        assert Accelerator(mixed_precision="bf16").mixed_precision == "bf16"
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


# Criteria


def test_gradient_criteria_leave_the_backbone_and_hold_no_moments():
    from sfa_peft.search import training

    seen = []
    original = training.DenseTraining.update

    def update(self, slot):
        original(self, slot)
        if slot.is_candidate:
            seen.append((slot.moments, slot.sums.keys(), torch.equal(slot.value, slot.before)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.DenseTraining, "update", update)
        search(adapted(), criterion="fisher")
    assert seen
    assert all(moments is None and list(sums) == ["squared_gradient"] and same for moments, sums, same in seen)


def reference_gradients(steps=4):
    """The plain model's gradients on the search's batches, with the head trained meanwhile."""
    candidates = adapted(external_share=0.0, budget=300).base_model.candidates("default")
    model = tiny.swin()
    named = {f"{m}.{n}": model.get_parameter(f"{m}.{n}") for m, own in candidates.items() for n in own}
    heads = [p for n, p in model.named_parameters() if "decode_head" in n]
    optimizer = torch.optim.Adam(heads, lr=2e-3)
    model.train()
    gradients = {n: [] for n in named}
    for step in range(steps):
        model(**BATCHES[step % len(BATCHES)]).loss.backward()
        for n, p in named.items():
            gradients[n].append(p.grad)
            p.grad = None
        optimizer.step()
        optimizer.zero_grad()
    return named, gradients


@pytest.mark.parametrize(
    ("criterion", "score"),
    [
        ("gradient", lambda w, g: sum(g).abs()),
        ("fisher", lambda w, g: sum(x * x for x in g)),
        ("taylor", lambda w, g: (w * sum(g)).abs()),
    ],
)
def test_gradient_criteria_score_what_they_say(criterion, score):
    model = adapted(external_share=0.0, budget=300)
    report = search(model, criterion=criterion)
    named, gradients = reference_gradients()
    scores = torch.cat([score(p.detach(), gradients[n]).reshape(-1) for n, p in named.items()])
    expected = torch.zeros_like(scores, dtype=torch.bool)
    expected[scores.topk(300).indices] = True
    found = [torch.zeros(p.numel(), dtype=torch.bool) for p in named.values()]
    for mask, name in zip(found, named, strict=True):
        mask[report.ticket.chosen(name).long()] = True
    assert (torch.cat(found) != expected).sum() <= 4


@pytest.mark.parametrize("criterion", ["lottery", "movement", "credit", "fisher", "gradient", "taylor"])
def test_every_criterion_gives_a_ticket_of_its_own(criterion):
    model, other = adapted(), adapted()
    report = search(model, criterion=criterion)
    assert report.ticket_size == sum(model.peft_config["default"].ticket_sizes.values())
    assert report.ticket.criterion == criterion
    assert report.ticket.overlap(search(other, criterion="random").ticket) < 0.6


@pytest.mark.parametrize("name", ["magnitude", "random"])
def test_data_free_criteria_need_no_data(name):
    report = search(adapted(), None, criterion=name, seed=3)
    assert report.steps == 0
    assert report.losses == ()
    with pytest.raises(ValueError, match="dataloader=None, but the criterion 'lottery'"):
        search(adapted(), None)


def test_a_criterion_of_ones_own():
    first = search(adapted(), criterion=lambda e: (e.after - e.before).abs())
    assert tiny.same_state(flat(first), flat(search(adapted())))

    @criterion("squared_gradient")
    def small_and_steep(e):
        return e.sums["squared_gradient"] - e.before.abs()

    assert search(adapted(), criterion=small_and_steep).ticket.criterion == "small_and_steep"
    with pytest.raises(ValueError, match="statistic 'hessian' is not known"):
        criterion("hessian")
    failing(
        "gave scores of shape .1,. for 'backbone",
        error=TicketSearchError,
        criterion=lambda e: e.before.reshape(-1)[:1],
    )
    failing("must be finite", error=TicketSearchError, criterion=lambda e: e.before * float("nan"))
    failing("must be one of", error=TypeError, criterion=3)


# Rounds


@pytest.mark.parametrize("granularity", ["element", "row"])
def test_rounds_meet_the_budget_and_rewind(granularity):
    model = adapted(internal_granularity=granularity)
    before = {n: t.clone() for n, t in model.state_dict().items() if "sfa_internal" not in n}
    report = search(model, rounds=3, steps=2)
    assert report.steps == 6
    assert len(report.losses) == 6
    assert report.ticket_size <= model.base_model.ticket_size("default")
    if granularity == "element":
        assert report.ticket_size == model.base_model.ticket_size("default")
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items() if n in before)


def test_a_later_round_prunes_among_the_survivors_of_the_first():
    from sfa_peft.search import rounds

    survivors = []

    original = rounds.Rounds.choose

    def choose(self, training, size):
        chosen = original(self, training, size)
        survivors.append({f"{m}.{p}": set(t.tolist()) for m, own in chosen.items() for p, t in own.items()})
        return chosen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds.Rounds, "choose", choose)
        search(adapted(), rounds=3, steps=2)
    sizes = [sum(map(len, s.values())) for s in survivors]
    assert sizes == sorted(sizes, reverse=True)
    for earlier, later in itertools.pairwise(survivors):
        assert all(later[name] <= earlier[name] for name in later)


def test_the_training_goes_on_from_the_end_of_the_search():
    model, seen = adapted(), []

    def state(model):
        return {n.replace(".base_layer", ""): t for n, t in tiny.state(model).items()}

    def remember(inner, batch):
        seen.append(state(inner))
        return inner(**batch).loss

    before = state(model)
    search(model, rewind=False)
    search(adapted(), steps=5, loss_fn=remember)
    end, after = seen[4], state(model)
    heads = [n for n in after if "modules_to_save" in n]
    externals = [n for n in after if ".sfa_" in n and ".sfa_internal." not in n]
    assert any("running_mean" in n for n in heads)
    assert externals
    assert all(torch.equal(after[n], end[n]) for n in (*heads, *externals))
    assert not any(torch.equal(after[n], before[n]) for n in (*heads, *externals))
    model.merge_adapter()
    merged = state(model)
    for name, at in positions(model).items():
        assert torch.allclose(merged[name].flatten()[at.long()], end[name].flatten()[at.long()], atol=1e-6)
        assert not torch.equal(merged[name], before[name])


@pytest.mark.parametrize("criterion", ["lottery", "fisher", "magnitude"])
@pytest.mark.parametrize("placement", ["uniform", "auto"])
@pytest.mark.parametrize("rewind", [True, False])
def test_only_a_search_that_is_not_rewound_leaves_values(criterion, placement, rewind):
    model = adapted(external_placement=placement, external_share=0.4, budget=0.2)
    before, expected = tiny.state(model), tiny.output(model)
    search(model, criterion=criterion, rewind=rewind)
    trains = not rewind and (criterion != "magnitude" or placement == "auto")
    assert torch.equal(tiny.output(model), expected) is not trains
    after = dict(model.named_parameters())
    assert any(p.any() for n, p in after.items() if ".up." in n) is trains
    assert any(p.any() for n, p in after.items() if ".sfa_internal." in n) is (criterion == "lottery" and trains)
    heads = [n for n in before if "modules_to_save" in n]
    assert all(torch.equal(model.state_dict()[n], before[n]) for n in heads) is not trains
    base = [n for n in before.keys() & after.keys() if ".sfa_" not in n and "modules_to_save" not in n]
    assert all(torch.equal(after[n], before[n]) for n in base)
    if rewind:
        search(model, criterion=criterion, rewind=rewind)
    elif criterion == "lottery":
        still_there = "values of adapter 'default' are not zero any more, after a search with rewind=False"
        with pytest.raises(ValueError, match=still_there):
            search(model)


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("rounds=2: 'fisher' does not train", {"rounds": 2, "criterion": "fisher"}),
        ("rounds=0", {"rounds": 0}),
        ("optimizer_state='disk'", {"optimizer_state": "disk"}),
        ("Quotas.floor=0.9 cannot be met", {"quotas": Quotas(floor=0.9)}),
    ],
)
def test_bad_settings_of_the_search(match, options):
    failing(match, error=ValueError, **options)


# Quotas


def test_quotas_spread_the_ticket():
    report = search(adapted(), quotas=Quotas("layer", equal_density=True))
    densities = [chosen / size for chosen, size, _ in report.counts("layer").values()]
    assert max(densities) - min(densities) < 0.01
    report = search(adapted(), quotas=Quotas("type", cap=0.2))
    assert max(chosen for chosen, _, _ in report.counts("type").values()) <= math.ceil(0.2 * report.ticket_size)
    report = search(adapted(internal_granularity="row"), quotas=Quotas("layer", equal_density=True))
    densities = [chosen / size for chosen, size, _ in report.counts("layer").values()]
    assert max(densities) - min(densities) < 0.1


# Memory


@pytest.mark.parametrize("state", ["cpu", "bf16"])
def test_other_optimizer_states_find_nearly_the_same_ticket(state):
    expected = search(adapted(), steps=8).ticket
    found = search(adapted(), steps=8, optimizer_state=state).ticket
    assert found.overlap(expected) > (0.999 if state == "cpu" else 0.8)


def test_bf16_moments_do_not_lose_small_updates():
    from sfa_peft.search.training import DenseTraining, Slot

    p = nn.Parameter(torch.zeros(1000))
    training = DenseTraining([Slot("p", p, 1e-3)], "bf16", 0)
    for _ in range(1000):
        p.grad = torch.full_like(p, 0.1)
        training.update(training.slots[0])
    second = training.slots[0].moments[1].float().mean()
    assert second == pytest.approx(0.01 * (1 - 0.999**1000), rel=0.02)


def test_parameters_that_are_not_trained_are_not_copied():
    from sfa_peft.search.training import DenseTraining, Slot

    p = nn.Parameter(torch.ones(10, dtype=torch.bfloat16))
    scored, trained = (Slot("p", p, rate, ("gradient",)) for rate in (0.0, 1e-3))
    DenseTraining([scored, trained], "device", 0)
    assert scored.before.data_ptr() == scored.value.data_ptr() == p.data_ptr()
    assert len({t.data_ptr() for t in (trained.before, trained.value, p)}) == 3


def test_gradients_do_not_pile_up():
    """Each parameter's gradient is used and dropped inside backward."""
    model = adapted(external_share=0.0)
    parameters = [p for own in model.base_model.candidates("default").values() for p in own.values()]
    held = []
    for p in parameters:
        p.requires_grad_(True)
        p.register_hook(lambda g: held.append(sum(q.grad is not None for q in parameters)))
    search(model, steps=1)
    assert max(held) <= 1


# Resuming


def interrupted_at(step):
    calls = []

    def loss(model, batch):
        calls.append(0)
        if len(calls) > step:
            raise KeyboardInterrupt
        return model(**batch).loss

    return loss


class Images(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        noise = torch.rand(()).item()  # an augmentation that draws from torch's stream
        return {k: v[0] + noise if k == "pixel_values" else v[0] for k, v in tiny.batch(1, seed=i).items()}


def test_a_stopped_search_goes_on_with_the_head_that_it_began_with(tmp_path):
    """A new process makes another fresh head; the ticket must not depend on it."""

    def make(seed):
        torch.manual_seed(seed)
        model = adapted(external_share=0.5)
        for p in model.base_model.model.decode_head.parameters():
            nn.init.normal_(p, std=0.1)
        return model

    options = {"rounds": 2, "steps": 3}
    whole_model = make(1)
    whole = search(whole_model, **options)
    with pytest.raises(KeyboardInterrupt):
        search(make(1), checkpoint=tmp_path / "s", checkpoint_every=2, loss_fn=interrupted_at(2), **options)
    model = make(2)
    again = search(model, checkpoint=tmp_path / "s", checkpoint_every=2, **options)
    assert again.losses == whole.losses
    assert tiny.same_state(flat(again), flat(whole))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(p, trained[n]) for n, p in whole_model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "options", [{}, {"rounds": 2}, {"rewind": False}, {"criterion": "credit"}, {"optimizer_state": "bf16"}]
)
def test_a_search_that_was_stopped_goes_on_to_the_same_ticket(tmp_path, options):
    steps = 8 // options.get("rounds", 1)
    make = lambda: adapted(lambda: tiny.swin(drop_path_rate=0.3))  # noqa: E731
    run = lambda model, **more: search(  # noqa: E731
        model, DataLoader(Images(), batch_size=2, shuffle=True), steps=steps, seed=5, **options, **more
    )
    whole_model = make()
    whole = run(whole_model)
    file = tmp_path / "search.safetensors"
    for stopped in (3, 4, 7):
        with pytest.raises(KeyboardInterrupt):
            run(make(), checkpoint=file, checkpoint_every=2, loss_fn=interrupted_at(stopped))
        assert file.exists()
        model = make()
        again = run(model, checkpoint=file, checkpoint_every=2)
        assert tiny.same_state(flat(again), flat(whole))
        assert again.losses == whole.losses
        assert tiny.same_state(tiny.state(model), tiny.state(whole_model))
        assert not file.exists()


def test_progress_of_another_search_is_refused(tmp_path):
    file = tmp_path / "search.safetensors"
    with pytest.raises(KeyboardInterrupt):
        search(adapted(), checkpoint=file, checkpoint_every=1, loss_fn=interrupted_at(2))
    failing("learning_rate was 0.0005 and is now 0.1", error=ValueError, checkpoint=file, learning_rate=0.1)
    failing("target_modules was None", error=ValueError, checkpoint=file, model=adapted(target_modules=["fc1"]))
    failing("budget was 0.1 and is now 0.2", error=ValueError, checkpoint=file, model=adapted(budget=0.2))
    other = auto(external_share=0.5, budget=0.1, external_places=["block"])
    failing("placement was 'uniform'", error=ValueError, checkpoint=file, model=other)
    failing("is a folder", error=ValueError, checkpoint=tmp_path)
    file.write_bytes(file.read_bytes()[:200])
    failing("is damaged.*Delete the file", error=ValueError, checkpoint=file)


# Placement


@pytest.mark.parametrize("places", [["mlp_parallel"], ["attention", "mlp", "mlp_parallel", "block"]])
def test_auto_placement_finds_widths_within_the_budget(places):
    model = auto(external_places=places)
    uniform = model.peft_config["default"].external_widths
    frozen = {n: p.clone() for n, p in model.named_parameters() if "sfa_" not in n}
    expected = tiny.output(model)
    report = search(model, adapter_learning_rate=1e-2)
    config = model.peft_config["default"]
    assert len(places) == 1 or config.external_widths != uniform
    assert report.ticket.widths == config.external_widths
    trained = sum(p.numel() for n, p in model.named_parameters() if ".sfa_" in n and p.requires_grad)
    assert trained == model.base_model.budget("default")
    external = sum(p.numel() for n, p in model.named_parameters() if ".sfa_ext" in n or ".sfa_par" in n)
    assert 0 < external <= model.base_model.external_allowance("default")
    assert torch.equal(tiny.output(model), expected)
    after = dict(model.named_parameters())
    assert all(torch.equal(p, after[n]) for n, p in frozen.items() if n in after)
    tiny.train(model)


def test_an_adapter_with_a_found_placement_is_saved_and_loaded(tmp_path):
    model = auto()
    search(model)
    tiny.train(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.swin(), tmp_path)
    assert torch.equal(tiny.output(again), tiny.output(model))


def test_a_failed_placement_leaves_the_adapters_as_they_were():
    failing("the loss was nan", model=auto(external_places=["attention", "mlp_parallel"]), loss_fn=nan_after(2))
    failing("^$", error=KeyboardInterrupt, model=auto(), loss_fn=interrupt)


def test_auto_placement_alone():
    model = auto(external_share=1.0)
    report = search(model)
    assert report.ticket_size == 0
    assert report.ticket.widths
    assert "No ticket" in str(report)


def test_trained_external_adapters_are_not_dropped_by_a_placement():
    model = tiny.train(auto(external_share=1.0))
    with pytest.raises(ValueError, match="have been trained; a new placement would drop them"):
        search(model)
    with pytest.raises(ValueError, match="external_placement='auto' is not valid"):
        SFAConfig(external_width=4, external_placement="auto")


# What a first user found


def test_several_active_adapters_stay_active():
    model = adapted()
    model.add_adapter("other", SFAConfig(budget=0.05))
    model.base_model.set_adapter(["default", "other"])
    search(model, criterion="magnitude", adapter_name="other")
    assert model.base_model.active_adapters == ["default", "other"]
    assert all(m.active_adapters == ["default", "other"] for m in model.modules() if isinstance(m, SFALayer))


def test_a_criterion_must_be_deterministic_and_cannot_harm_the_weights():
    failing(
        "must give the same scores every time",
        criterion=lambda e: torch.rand_like(e.before),
        model=adapted(external_share=0.0),
    )
    model = adapted()
    before = {n.replace(".base_layer", ""): p.clone() for n, p in model.named_parameters() if "sfa_" not in n}

    @criterion()
    def in_place(e):
        return e.before.abs_()

    search(model, None, criterion=in_place)
    after = {n.replace(".base_layer", ""): p for n, p in model.named_parameters()}
    assert all(torch.equal(p, after[n]) for n, p in before.items())
    failing("gave scores of type NoneType", criterion=lambda e: None)


def test_caps_hold_with_rounds_and_with_rows():
    report = search(adapted(), rounds=3, steps=2, quotas=Quotas("layer", cap=0.3))
    assert max(chosen for chosen, _, _ in report.counts("layer").values()) <= 0.3 * report.ticket_size + 1
    quotas = Quotas("type", floor=0.09, cap=0.105)
    for seed in range(5):
        model = adapted(budget=600, external_share=0, internal_granularity="row")
        report = search(model, None, criterion="random", seed=seed, quotas=quotas)
        assert max(chosen for chosen, _, _ in report.counts("type").values()) <= 63


def test_external_adapters_alone_have_no_density():
    report = search(auto(external_share=1.0))
    assert report.density == 0.0
    failing("no internal targets", error=ValueError, model=auto(external_share=1.0), rounds=2)


@pytest.mark.parametrize(
    ("match", "error", "options"),
    [
        ("must be an sfa_peft.Quotas", TypeError, {"quotas": {"per": "layer"}}),
        ("learning_rate='1e-3'", ValueError, {"learning_rate": "1e-3"}),
        ("dataloader=5 must give batches", TypeError, {"data": 5}),
        ("steps=True", ValueError, {"steps": True}),
        ("seed=0.5", ValueError, {"seed": 0.5}),
        ("rewind=1 must be True or False", TypeError, {"rewind": 1}),
    ],
)
def test_odd_arguments(match, error, options):
    failing(match, error=error, **options)


def test_numpy_numbers_will_do(tmp_path):
    import numpy as np

    options = {
        "steps": np.int64(4),
        "seed": np.int64(3),
        "learning_rate": np.float32(5e-4),
    }
    search(adapted(), checkpoint=tmp_path / "s", checkpoint_every=np.int64(2), **options)


def test_a_model_has_a_ticket_of_its_own():
    model = adapted()
    ticket = search(model).ticket
    other = adapted()
    install_ticket(other, ticket)
    kept = {n: t.clone() for n, t in positions(other).items()}
    with torch.no_grad():
        for t in positions(model).values():
            t.zero_()
    assert tiny.same_state(positions(other), kept)
    assert any(t.any() for own in ticket.positions.values() for t in own.values())


def test_trained_external_adapters_are_not_dropped_by_a_ticket_from_elsewhere():
    model = adapted(external_share=0.5)
    ticket = search(model).ticket
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if ".up." in n).fill_(0.1)
    with pytest.raises(ValueError, match="external adapters of adapter 'default' have been trained"):
        install_ticket(model, ticket)


class ReadsItsWeight(nn.Module):
    """A block as in timm's Swinv2: the weight of `qkv` is read, and `qkv` itself never called."""

    def __init__(self, dim=8):
        super().__init__()
        self.qkv, self.proj, self.unused = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, x):
        return self.proj(torch.tanh(nn.functional.linear(x, self.qkv.weight, self.qkv.bias)))


def idle_model(**options):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 8), ReadsItsWeight(), nn.Linear(8, 1))
    config = {"internal_density": 0.2, "target_modules": ["qkv", "proj", "0"], "external_modules": []} | options
    return get_peft_model(base, SFAConfig(**config))


def squared(model, x):
    return model(x).square().mean()


INPUTS = [torch.randn(6, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]


@pytest.mark.parametrize("rounds", [1, 2])
def test_targets_that_are_never_called_are_left_out_of_the_ticket(rounds):
    model = idle_model()
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with pytest.warns(UserWarning, match=r"never calls \['1.qkv'\]: it does not use them, or reads their weights"):
        report = search(model, INPUTS, loss_fn=squared, rounds=rounds)
    assert {name.rpartition(".")[0] for name, own in positions(model).items() if len(own)} <= {
        "base_model.model.1.proj",
        "base_model.model.0",
    }
    assert report.ticket_size == size
    unmerged = model(INPUTS[0])
    model.merge_adapter()
    assert torch.allclose(model(INPUTS[0]), unmerged, atol=1e-6)


def test_targets_that_are_called_must_be_enough():
    model = idle_model(internal_density=0.5, target_modules=["qkv", "0"])
    with pytest.raises(TicketSearchError, match=r"never calls \['1.qkv'\].*only 40 parameters for a ticket of 56"):
        search(model, INPUTS, loss_fn=squared)
    assert sum(len(own) for own in positions(model).values()) == 56


def test_an_external_adapter_that_never_runs_is_told():
    model = idle_model(external_modules=["unused"], external_width=2)
    with pytest.warns(UserWarning, match=r"never calls \['1.unused'\]: the external adapters there do nothing"):
        search(model, INPUTS, loss_fn=squared)


def test_a_placement_leaves_out_what_never_runs():
    model = idle_model(
        budget=100,
        internal_density=None,
        external_modules=["unused", "proj"],
        external_placement="auto",
        external_share=0.5,
    )
    with pytest.warns(UserWarning, match="never calls"):
        search(model, INPUTS, loss_fn=squared)
    assert "1.unused" not in model.peft_config["default"].external_widths["module"]


def test_a_stopped_search_remembers_what_was_called(tmp_path):
    def stop_at(step):
        count = itertools.count()

        def loss(model, x):
            if next(count) == step:
                raise KeyboardInterrupt
            return squared(model, x)

        return loss

    path = tmp_path / "search.safetensors"
    whole = idle_model(target_modules=["proj", "0"])
    search(whole, INPUTS, loss_fn=squared)
    model = idle_model(target_modules=["proj", "0"])
    with pytest.raises(KeyboardInterrupt):
        search(model, INPUTS, loss_fn=stop_at(3), checkpoint=path, checkpoint_every=1)
    called = []

    def skips_first(model, x):
        called.append(x)
        return model.base_model.model[1:](model.base_model.model[0].base_layer(x)).square().mean()

    search(model, INPUTS, loss_fn=skips_first, checkpoint=path)
    assert len(called) == 1
    assert any("model.0." in name for name in positions(model))

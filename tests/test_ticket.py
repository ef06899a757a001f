"""A ticket as a thing of its own: saved, looked at, compared, given to another model."""

import json
import math

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

import tiny
from adapters import BATCHES, adapted, auto, flat, positions, search
from sfa_peft import CheckpointError, SFAConfig, Ticket, TicketReport, install_ticket, search_ticket
from sfa_peft.checkpoint.coding import encode_positions
from sfa_peft.checkpoint.packing import join_codes


def found(model=None, **options):
    return search(adapted() if model is None else model, **options).ticket


@pytest.mark.parametrize("granularity", ["element", "row", "column"])
def test_saved_and_loaded_it_is_the_same(tmp_path, granularity):
    ticket = found(adapted(internal_granularity=granularity))
    ticket.save(tmp_path / "new" / "ticket.safetensors")
    again = Ticket.load(tmp_path / "new" / "ticket.safetensors")
    assert again.granularity == ticket.granularity
    assert again.widths == ticket.widths
    assert again.criterion == "lottery"
    assert again.shapes == ticket.shapes
    assert again.size == ticket.size
    assert again.overlap(ticket) == 1.0
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"ticket.safetensors"}


def test_given_to_another_model_it_is_its_ticket(tmp_path):
    model = auto()
    report = search(model)
    report.ticket.save(tmp_path / "t")
    torch.manual_seed(7)
    other = auto()
    expected = tiny.output(other)
    install_ticket(other, Ticket.load(tmp_path / "t"))
    assert tiny.same_state(positions(other), positions(model))
    mine, theirs = model.peft_config["default"], other.peft_config["default"]
    assert (theirs.external_widths, theirs.ticket_sizes) == (mine.external_widths, mine.ticket_sizes)
    assert torch.equal(tiny.output(other), expected)
    tiny.train(other)
    other.save_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("set `internal_granularity`", {"internal_granularity": "row"}),
        ("use the same base model and `target_modules`", {"target_modules": ["fc1"]}),
        ("set `external_places`", {"external_places": ["attention"]}),
        ("raise `budget`", {"budget": 0.05}),
    ],
)
def test_a_ticket_that_does_not_fit_is_refused(match, options):
    ticket = found()
    model = adapted(**options)
    before = tiny.state(model)
    with pytest.raises(ValueError, match=match):
        install_ticket(model, ticket)
    assert tiny.same_state(tiny.state(model), before)


def test_a_trained_adapter_keeps_its_ticket():
    with pytest.raises(ValueError, match="not zero any more"):
        install_ticket(tiny.train(adapted()), found())


def test_overlap_is_intersection_over_union():
    a, b = found(seed=0), found(data=[tiny.batch(seed=9)])
    assert a.overlap(a) == 1.0
    chosen = [
        {(n, i) for n, t in x.positions.items() for p, q in t.items() for i in [(p, int(j)) for j in q]}
        for x in (a, b)
    ]
    expected = len(chosen[0] & chosen[1]) / len(chosen[0] | chosen[1])
    assert a.overlap(b) == pytest.approx(expected)
    by_layer = a.overlap(b, per="layer")
    assert set(by_layer) == {
        "layers.0.blocks.0",
        "layers.0.blocks.1",
        "layers.0",
        "layers.1.blocks.0",
        "layers.1.blocks.1",
    }
    assert all(v != v or 0 <= v <= 1 for v in by_layer.values())
    with pytest.raises(ValueError, match="per='stage' is not known"):
        a.overlap(b, per="stage")
    with pytest.raises(ValueError, match="same candidates only"):
        a.overlap(found(adapted(internal_granularity="row")))


def test_the_report_shows_density_and_widths():
    report = search(adapted(external_share=0.5))
    by_layer = report.counts("layer")
    assert sum(chosen for chosen, _, _ in by_layer.values()) == report.ticket_size
    widths = report.ticket.widths["block"]
    assert sum(width for _, _, width in by_layer.values()) == sum(widths.values())
    text = str(report)
    assert text.splitlines()[0].startswith(f"Ticket of {report.ticket_size:,} positions")
    assert "loss " in text
    assert "width" in text
    assert report.density == pytest.approx(report.ticket_size / sum(size for _, size, _ in by_layer.values()))


def test_the_picture_is_drawn(tmp_path):
    report = search(adapted(external_share=0.5))
    figure = report.picture(tmp_path / "ticket.png")
    assert (tmp_path / "ticket.png").stat().st_size > 5000
    density, width = figure.axes
    assert next(t.get_text() for t in density.get_yticklabels()) == "layers.0.blocks.0"
    column = [t.get_text() for t in density.get_xticklabels()].index("mlp.fc1")
    ticket, fc1 = report.ticket, "backbone.swin.encoder.layers.0.blocks.0.mlp.fc1"
    size = sum(math.prod(ticket.shapes[f"{fc1}.{name}"]) for name in ("weight", "bias"))
    share = sum(ticket.elements(f"{fc1}.{name}") for name in ("weight", "bias")) / size
    assert share > 0
    assert density.images[0].get_array()[0, column] == pytest.approx(100 * share)
    assert [t.get_text() for t in width.get_xticklabels()] == ["block"]


def test_the_overlap_of_two_tickets_is_drawn(tmp_path):
    from sfa_peft.ticket.picture import draw_overlap

    a, b = found(), found(criterion="random")
    figure = draw_overlap(a, b, tmp_path / "overlap.svg", names=("lottery", "random"))
    assert (tmp_path / "overlap.svg").exists()
    assert "lottery and random" in figure.get_suptitle()


def damaged(path, change):
    """Write a ticket whose description or tensors were changed."""
    found().save(path)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors, described = load_file(path), json.loads(metadata["ticket"])
    change(tensors, described)
    save_file(tensors, path, metadata | {"ticket": json.dumps(described)})


def flipped(tensors, described):
    tensors["positions"][4 * len(described["sizes"]) + 2] ^= 0xFF


def out_of_range(tensors, described):
    sizes = dict(sorted(described["sizes"].items()))
    tensors["positions"] = join_codes([encode_positions(torch.arange(size) + 2**30) for size in sizes.values()])


def as_floats(tensors, _):
    tensors["positions"] = tensors["positions"].float()


def too_short(tensors, _):
    tensors["positions"] = tensors["positions"][:-1].clone()


def stranger(_, described):
    described["sizes"]["nobody.weight"] = described["sizes"].pop(max(described["sizes"]))


def without_shapes(_, described):
    del described["shapes"]


def of_blocks(_, described):
    described["granularity"], described["block_size"] = "block", 16


def absurd_shape(_, described):
    described["shapes"] = {name: [-4, -4] for name in described["shapes"]}


def absurd_size(_, described):
    described["sizes"] = dict.fromkeys(described["sizes"], float("inf"))


def absurd_width(_, described):
    described["widths"] = {"mlp": {"a": -3}}


def another_granularity(_, described):
    described["granularity"] = "crumb"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (flipped, "is not the code"),
        (out_of_range, "positions up to"),
        (as_floats, "of bytes"),
        (too_short, "does not hold"),
        (stranger, "nobody.weight"),
        (without_shapes, "description is damaged"),
        (another_granularity, "'crumb' is not known"),
        (of_blocks, "removed in 0.2; sfa_peft 0.1 reads"),
        (absurd_shape, "not possible"),
        (absurd_size, "damaged"),
        (absurd_width, "not possible"),
    ],
)
def test_a_damaged_ticket_is_refused(tmp_path, change, match):
    path = tmp_path / "t.safetensors"
    damaged(path, change)
    with pytest.raises(CheckpointError, match=match):
        Ticket.load(path)


def test_what_is_no_ticket_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no ticket"):
        Ticket.load(tmp_path / "nothing")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        Ticket.load(tmp_path / "text")
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(CheckpointError, match="is not a ticket that this version"):
        Ticket.load(tmp_path / "other")


def test_a_ticket_searched_on_one_base_trains_on_another_seed():
    """The report's ticket and the installed one are the same thing."""
    model = get_peft_model(tiny.swin(), SFAConfig(budget=0.1, modules_to_save=["decode_head"]))
    report = search_ticket(model, BATCHES, steps=2, progress=False)
    assert {f"base_model.model.{n}" for n, t in flat(report).items() if len(t)} == set(positions(model))


HOSTILE = ["$\\foo$", "a$b$c", "$", "\ud800", "\x1b[31m", "line\nbreak", "\u202egnp", "_{^\\frac", "x" * 10_000]


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_shown_as_it_is_or_escaped(tmp_path, name):
    """Names of modules, of criteria, and those given to a picture are no formulas, and no orders to a terminal."""
    from sfa_peft.ticket.picture import draw_overlap

    module = f"layers.0.{name}"
    ticket = Ticket(
        {module: {"weight": torch.tensor([1, 3])}},
        {f"{module}.weight": (2, 4)},
        found().granularity,
        {name: {module: 3}},
        criterion=name,
    )
    report = TicketReport(ticket)
    assert str(report).replace("\n", "").isprintable()
    density, width = report.picture(tmp_path / "ticket.png").axes
    shown = density.get_xticklabels()[0].get_text()
    assert shown.isprintable()
    if len(name) < 40 and name.isprintable():
        assert shown == width.get_xticklabels()[0].get_text() == name
        assert name in str(report)
    draw_overlap(ticket, ticket, tmp_path / "overlap.svg", names=(name, name))
    assert (tmp_path / "overlap.svg").stat().st_size > 1000

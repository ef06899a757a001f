"""Any sequence of PEFT's gestures: an adapter always computes what it computed at first, and the base comes back."""

import tempfile

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from peft import get_peft_model

import tiny
from sfa_peft import SFAConfig

pytestmark = pytest.mark.slow

KINDS = (
    {},
    {"target_modules": [], "external_places": ["attention", "mlp_parallel"]},
    {"external_places": [], "initial_ticket": "random"},
    {"internal_granularity": "row", "external_places": ["mlp"], "modules_to_save": ["decode_head"]},
)
PIXELS = tiny.pixels(1)


class Gestures(RuleBasedStateMachine):
    @initialize(kind=st.sampled_from(KINDS))
    def adapt(self, kind):
        base = tiny.swin()
        self.before, self.state = tiny.output(base, PIXELS), tiny.state(base)
        self.count = 0
        self.outputs = {}
        self.model = get_peft_model(base, self.config(kind), adapter_name=self.name())
        self.remember()

    def name(self):
        self.count += 1
        return f"adapter{self.count}"

    def config(self, kind):
        return SFAConfig(**{"budget": 0.1, "init_weights": False} | kind)

    @property
    def active(self):
        return self.model.base_model.active_adapters

    @property
    def merged(self):
        return {n for m in self.model.modules() for n in getattr(m, "merged_adapters", ())}

    def output(self):
        return tiny.output(self.model, PIXELS)

    def remember(self):
        (name,) = self.active
        self.outputs[name] = self.output()

    @rule(kind=st.sampled_from(KINDS))
    @precondition(lambda self: len(self.outputs) < 4 and not self.merged)
    def add(self, kind):
        name = self.name()
        self.model.add_adapter(name, self.config(kind))
        self.model.set_adapter(name)
        self.remember()

    @rule(data=st.data())
    def switch(self, data):
        self.model.set_adapter(data.draw(st.sampled_from(sorted(self.outputs))))

    @rule(data=st.data())
    @precondition(lambda self: len(self.outputs) > 1)
    def delete(self, data):
        name = data.draw(st.sampled_from(sorted(self.outputs.keys() - self.merged)))
        self.model.delete_adapter(name)
        del self.outputs[name]

    @rule(safe=st.booleans())
    @precondition(lambda self: not self.merged)
    def merge(self, safe):
        self.model.merge_adapter(safe_merge=safe)

    @rule()
    @precondition(lambda self: self.merged)
    def unmerge(self):
        self.model.unmerge_adapter()

    @rule()
    def disable(self):
        with self.model.disable_adapter():
            assert torch.equal(self.output(), self.before)

    @rule()
    def save_and_load(self):
        (name,) = self.active
        if self.merged:
            self.model.unmerge_adapter()
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder, selected_adapters=[name])
            new = self.name()
            self.model.load_adapter(f"{folder}/{name}", new)
        self.model.set_adapter(new)
        assert torch.equal(self.output(), self.outputs[name])
        self.model.delete_adapter(new)
        self.model.set_adapter(name)

    @invariant()
    def the_active_adapter_computes_what_it_did(self):
        if not hasattr(self, "model"):
            return
        (name,) = self.active
        if self.merged:
            torch.testing.assert_close(self.output(), self.outputs[name], atol=1e-6, rtol=1e-4)
        else:
            assert torch.equal(self.output(), self.outputs[name])

    def teardown(self):
        if hasattr(self, "model"):
            base = self.model.unload()
            assert tiny.same_state(tiny.state(base), self.state)
            assert torch.equal(tiny.output(base, PIXELS), self.before)


TestGestures = Gestures.TestCase
TestGestures.settings = settings(max_examples=20, stateful_step_count=15, deadline=None)

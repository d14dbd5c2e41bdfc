"""Running blocks stage by stage: the same numbers as the model's own forward, and nothing left changed."""

import copy

import pytest
import torch
from torch import nn

from quantizers.block import record_inputs, run_block, walk_block
from quantizers.families import blocks_of, family_of, linear_at


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.inference_mode():
        yield


def modules_of(model):
    return {name: id(module) for name, module in model.named_modules()}


def outputs_of_blocks(model, tokens):
    """The output of every block in a plain forward, and the final norm's."""
    family, outputs = family_of(model), []
    handles = [
        block.register_forward_hook(lambda _, __, output: outputs.append(output)) for block in blocks_of(model, family)
    ]
    final = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    for handle in handles:
        handle.remove()
    return outputs, final


def walk(block, family, hidden, arguments, visit):
    """Run a block, showing each stage to `visit`; without one, not looking at all."""
    if visit is None:
        run_block(block, family, hidden, arguments)
        return
    for stage, inputs in walk_block(block, family, hidden, arguments):
        visit(stage, inputs)


def ignore(_, inputs):
    for _ in inputs:
        pass


def look_at_one(_, inputs):
    next(inputs, None)


@pytest.mark.parametrize("visit", [None, ignore, look_at_one], ids=["not looking", "looking", "looking at one batch"])
def test_equals_the_forward_of_the_model(any_model, windows, visit):
    family = family_of(any_model)
    before = modules_of(any_model)
    batches = list(torch.split(windows, 4))  # the last is smaller
    hidden, arguments = record_inputs(any_model, family, batches)
    expected = [outputs_of_blocks(any_model, batch) for batch in batches]
    for index, block in enumerate(blocks_of(any_model, family)):
        walk(block, family, hidden, arguments[index], visit)
        for batch, (outputs, _) in zip(hidden, expected, strict=True):
            assert torch.equal(batch, outputs[index])
    for batch, (_, final) in zip(hidden, expected, strict=True):
        assert torch.equal(any_model.model.norm(batch), final)
    assert modules_of(any_model) == before


def test_sliding_windows_reach_their_blocks(make_model, windows):
    """The models here must tell a wrong mask: without it, the comparison above would prove less."""
    for case in ("mistral", "qwen2", "gemma2", "gemma3_text"):
        narrow, wide = (make_model(case, sliding_window=size).model(windows).last_hidden_state for size in (8, 64))
        assert not torch.allclose(narrow, wide, atol=1e-3)


def test_blocks_may_have_arguments_of_their_own(make_model, windows):
    model = make_model("gemma3_text")  # one local and one global block: other masks and other rotations
    _, arguments = record_inputs(model, family_of(model), [windows])
    (local,), (whole,) = arguments
    assert not torch.equal(local["position_embeddings"][0], whole["position_embeddings"][0])


def test_visitor_sees_the_inputs_of_every_linear(any_model, windows):
    family = family_of(any_model)
    batches = list(torch.split(windows, 4))
    seen = {}
    for name, module in any_model.model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs, name=name: seen.setdefault(name, []).append(inputs[0]))
    for batch in batches:
        any_model(batch)
    expected = {name: list(inputs) for name, inputs in seen.items()}

    hidden, arguments = record_inputs(any_model, family, batches)
    visited = []
    for index, block in enumerate(blocks_of(any_model, family)):

        def check(stage, inputs, index=index):
            inputs = list(inputs)
            for name in stage:
                visited.append(f"layers.{index}.{name}")
                assert len(inputs) == len(batches)
                assert all(map(torch.equal, inputs, expected[visited[-1]]))

        walk(block, family, hidden, arguments[index], check)
    assert sorted(visited) == sorted(expected)


def test_a_visitor_that_looks_away_changes_nothing(llama, windows):
    family = family_of(llama)
    hidden, arguments = record_inputs(llama, family, [windows])
    expected, _ = outputs_of_blocks(llama, windows)
    walk(llama.model.layers[0], family, hidden, arguments[0], lambda *_: None)
    assert torch.equal(hidden[0], expected[0])


def test_new_weights_are_used_from_their_stage_on(any_model, windows):
    """Halving each stage's weights when it is visited equals a forward with all of them halved."""
    family = family_of(any_model)
    block = blocks_of(any_model, family)[0]
    hidden, arguments = record_inputs(any_model, family, [windows])

    def halve(stage, _):
        for name in stage:
            linear = linear_at(block, name)
            linear.weight = nn.Parameter(linear.weight / 2, requires_grad=False)

    walk(block, family, hidden, arguments[0], halve)
    outputs, _ = outputs_of_blocks(any_model, windows)  # with the halved weights now in place
    assert torch.equal(hidden[0], outputs[0])


@pytest.mark.parametrize("failing", range(4))
def test_modules_are_restored_when_a_visitor_fails(llama, windows, failing):
    family = family_of(llama)
    hidden, arguments = record_inputs(llama, family, [windows])
    before = modules_of(llama)

    def fail(stage, _):
        if stage == family.stages[failing]:
            raise RuntimeError("visitor")

    with pytest.raises(RuntimeError, match="visitor"):
        walk(llama.model.layers[0], family, hidden, arguments[0], fail)
    assert modules_of(llama) == before


@pytest.mark.parametrize("failing", ["self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"])
def test_modules_are_restored_when_a_module_fails(llama, windows, failing):
    family = family_of(llama)
    hidden, arguments = record_inputs(llama, family, [windows])
    before = modules_of(llama)

    def fail(*_):
        raise RuntimeError("module")

    llama.model.layers[0].get_submodule(failing).register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="module"):
        walk(llama.model.layers[0], family, hidden, arguments[0], ignore)
    assert modules_of(llama) == before


def test_recording_runs_no_block_and_restores_them(llama, windows):
    before = modules_of(llama)

    def fail(*_):
        raise AssertionError("a block ran")

    for block in llama.model.layers:
        block.register_forward_pre_hook(fail)
    hidden, arguments = record_inputs(llama, family_of(llama), list(windows))
    assert torch.equal(hidden[3], llama.model.embed_tokens(windows[3]))
    assert [len(batches) for batches in arguments] == [6, 6]
    assert modules_of(llama) == before
    with pytest.raises(IndexError):
        record_inputs(llama, family_of(llama), [torch.tensor([[96]])])  # beyond the vocabulary
    assert modules_of(llama) == before


def test_two_walks_in_step(llama, windows):
    """The float twin of a block whose weights are being replaced keeps the float inputs."""
    family = family_of(llama)
    hidden, arguments = record_inputs(llama, family, [windows])
    block, twin = llama.model.layers[0], copy.deepcopy(llama.model.layers[0])
    float_hidden = list(hidden)
    plain = [next(inputs) for _, inputs in walk_block(copy.deepcopy(block), family, list(hidden), arguments[0])]
    pairs = zip(
        walk_block(block, family, hidden, arguments[0]),
        walk_block(twin, family, float_hidden, arguments[0]),
        strict=True,
    )
    for index, ((stage, inputs), (_, float_inputs)) in enumerate(pairs):
        changed, kept = next(inputs), next(float_inputs)
        assert torch.equal(kept, plain[index])
        assert torch.equal(changed, kept) == (index == 0)
        for name in stage:
            linear = linear_at(block, name)
            linear.weight = nn.Parameter(linear.weight / 2, requires_grad=False)
    assert not torch.equal(hidden[0], float_hidden[0])

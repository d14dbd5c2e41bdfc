"""The loop over decoder layers that every release has in a form of its own, for today's transformers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

ALL_AT_ONCE = (
    (
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    ),
)
# In the order of GPTQ's and GPTAQ's scripts, which GPTAQ's shared Hessian depends on.
TRUE_SEQUENTIAL = (
    ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"),
    ("self_attn.o_proj",),
    ("mlp.up_proj", "mlp.gate_proj"),
    ("mlp.down_proj",),
)


@dataclass
class Stage:
    """Linears of one layer that are quantized together.

    Attributes:
        run: the layer on every window, in its present state.
        float_inputs: window by window, what the first of them gets in the float model; where asked for.
    """

    layer: int
    linears: dict[str, nn.Linear]
    run: Callable[[], None]
    float_inputs: list[Tensor] = field(default_factory=list)


class _CaughtError(Exception):
    pass


def first_inputs(model, windows):
    """What the first decoder layer is called with.

    Args:
        windows: int64 [batches, windows, tokens].
    Returns:
        the hidden states of each batch, and the arguments beside them.
    """
    states, arguments = [], {}

    def catch(_, given, named):
        states.append(given[0])
        arguments.update(named)
        raise _CaughtError

    handle = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for batch in windows:
        with suppress(_CaughtError):
            model(input_ids=batch, use_cache=False)
    handle.remove()
    return states, arguments


@contextmanager
def heard(linears: dict[str, nn.Linear], listen: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Call `listen(name, inputs, outputs)` whenever one of the linears runs."""

    def hook(name):
        return lambda _, given, out: listen(name, given[0].data, out.data)

    handles = [linear.register_forward_hook(hook(name)) for name, linear in linears.items()]
    yield
    for handle in handles:
        handle.remove()


def walk(model, windows, stages, quantize, *, blocks, watch=None, float_inputs=False):
    """Quantize layer by layer, each on what the quantized ones before it put out.

    Args:
        windows: int64 [windows, tokens].
        quantize: called with every `Stage`; changes its linears' weights in place.
        blocks: how many layers; the others stay as they are.
        watch: of a `Stage`, makes what `quantize` runs within; see `in_step.py`.
    """
    states, arguments = first_inputs(model, windows[:, None])
    floats = list(states)
    for index, layer in enumerate(model.model.layers[:blocks]):
        seen = {names[0]: [] for names in stages}
        if float_inputs:
            first = {name: layer.get_submodule(name) for name in seen}
            with heard(first, lambda name, given, _, seen=seen: seen[name].append(given)):
                floats = [layer(state, **arguments) for state in floats]

        def run(layer=layer, states=states):
            for state in states:
                layer(state, **arguments)

        for names in stages:
            linears = {name: layer.get_submodule(name) for name in names}
            stage = Stage(layer=index, linears=linears, run=run, float_inputs=seen[names[0]])
            with watch(stage) if watch else nullcontext():
                quantize(stage)
        states = [layer(state, **arguments) for state in states]
        print(f"layer {index + 1} of {blocks}", flush=True)


def first_layer_weights(model):
    """The weights of the first layer's linears, float32."""
    layer = model.model.layers[0]
    return {name: layer.get_submodule(name).weight.detach().float().clone() for name in ALL_AT_ONCE[0]}


def torch_windows(path):
    import numpy as np

    return torch.from_numpy(np.load(path))

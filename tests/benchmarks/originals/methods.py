"""Each release's quantization of a Llama, in place, by its own classes and functions: only loops are written here.

Every function takes the model, int64 windows [windows, tokens], how many layers, and its settings; it returns the first
layer's weights as they act on the float model's inputs (rescalings undone), and what was chosen, where that is counted.
Where a method goes linear by linear, `watch` sees each stage; see `in_step.py`.
"""

from tests.benchmarks.originals.layers import (
    ALL_AT_ONCE,
    TRUE_SEQUENTIAL,
    first_inputs,
    first_layer_weights,
    heard,
    walk,
)


def rtn_gptq(model, windows, blocks, *, bits, group_size):
    """IST-DASLab/gptq's grid, fitted to each group (its own script rounds whole rows)."""
    del windows
    from quant import Quantizer, quantize

    for layer in model.model.layers[:blocks]:
        for name in ALL_AT_ONCE[0]:
            weight = layer.get_submodule(name).weight
            for group in weight.data.split(group_size, dim=1):
                quantizer = Quantizer()
                quantizer.configure(bits, perchannel=True, sym=False, mse=False)
                quantizer.find_params(group, weight=True)
                group.copy_(quantize(group, quantizer.scale, quantizer.zero, quantizer.maxq))
    return first_layer_weights(model), []


def rtn_awq(model, windows, blocks, *, bits, group_size):
    del windows
    from awq.quantize.quantizer import pseudo_quantize_tensor

    for layer in model.model.layers[:blocks]:
        for name in ALL_AT_ONCE[0]:
            linear = layer.get_submodule(name)
            linear.weight.data = pseudo_quantize_tensor(linear.weight.data, n_bit=bits, q_group_size=group_size)
    return first_layer_weights(model), []


def gptq(model, windows, blocks, *, watch=None, bits, group_size, act_order, static_groups):
    from gptq import GPTQ
    from quant import Quantizer

    def quantize(stage):
        solvers = {name: GPTQ(linear) for name, linear in stage.linears.items()}
        for solver in solvers.values():
            solver.quantizer = Quantizer()
            solver.quantizer.configure(bits, perchannel=True, sym=False, mse=False)
        with heard(stage.linears, lambda name, given, out: solvers[name].add_batch(given, out)):
            stage.run()
        for solver in solvers.values():
            solver.fasterquant(groupsize=group_size, actorder=act_order, static_groups=static_groups)
            solver.free()

    walk(model, windows, TRUE_SEQUENTIAL, quantize, blocks=blocks, watch=watch)
    return first_layer_weights(model), []


def gptaq(model, windows, blocks, *, watch=None, bits, group_size, symmetric):
    import transformers.models.falcon.modeling_falcon  # noqa: F401, the release's default arguments name it
    from gptaq_utils import GPTAQ
    from quant_utils import WeightQuantizer

    def quantize(stage):
        solvers = {name: GPTAQ(linear) for name, linear in stage.linears.items()}
        for solver in solvers.values():
            solver.quantizer = WeightQuantizer()
            solver.quantizer.configure(bits, perchannel=True, sym=symmetric, mse=False)
        # One of them listens, and the others get the very same matrices, as released.
        name, first = next(iter(solvers.items()))
        first.fp_inp = [given[0].t() for given in stage.float_inputs]
        with heard({name: stage.linears[name]}, lambda _, given, out: first.add_batch(given, out)):
            stage.run()
        for solver in solvers.values():
            solver.H, solver.dXXT = first.H, first.dXXT
        for solver in solvers.values():
            solver.fasterquant(groupsize=group_size, actorder=True, static_groups=True)
        for solver in solvers.values():
            solver.free()

    walk(model, windows, TRUE_SEQUENTIAL, quantize, blocks=blocks, watch=watch, float_inputs=True)
    return first_layer_weights(model), []


def billm(model, windows, blocks, *, watch=None):
    import bigptq
    from binary import Binarization

    salient = []
    released = bigptq.structural_guassian_distribution

    def counted(*given):
        masks = released(*given)
        salient.append(int(masks[2][0].sum()))
        return masks

    bigptq.structural_guassian_distribution = counted

    def quantize(stage):
        solvers = {
            name: bigptq.BRAGPTQ(linear, Binarization(linear.weight, method="braq", groupsize=128), "hessian")
            for name, linear in stage.linears.items()
        }
        with heard(stage.linears, lambda name, given, out: solvers[name].add_batch(given, out)):
            stage.run()
        for solver in solvers.values():
            solver.fasterquant(blocksize=128)
            solver.free()

    walk(model, windows, ALL_AT_ONCE, quantize, blocks=blocks, watch=watch)
    return first_layer_weights(model), salient


def slim_llm(model, windows, blocks, *, watch=None, bits, group_size):
    from slim_gptq import SliMGPTQ
    from utils.mixed_quantizer import Quantizer

    chosen = []

    def quantize(stage):
        solvers = {
            name: SliMGPTQ(linear, Quantizer(linear.weight, method=f"{bits}bit", groupsize=group_size), bit_width=bits)
            for name, linear in stage.linears.items()
        }
        with heard(stage.linears, lambda name, given, out: solvers[name].add_batch(given, out)):
            stage.run()
        for solver in solvers.values():
            solver.get_salience(blocksize=group_size)
        with heard(stage.linears, lambda name, given, out: solvers[name].get_block(given, out, blocksize=group_size)):
            stage.run()
        for name, solver in solvers.items():
            precision, *_ = solver.fasterquant(blocksize=group_size, layer_name=name)
            chosen.extend(precision)
            solver.free()

    walk(model, windows, ALL_AT_ONCE, quantize, blocks=blocks, watch=watch)
    return first_layer_weights(model), chosen


def awq(model, windows, blocks, *, bits, group_size):
    from awq.quantize.auto_clip import apply_clip, auto_clip_block
    from awq.quantize.auto_scale import apply_scale, auto_scale_block
    from awq.quantize.quantizer import pseudo_quantize_tensor

    settings = {"zero_point": True, "q_group_size": group_size}
    (states,), arguments = first_inputs(model, windows[None])
    scales_of_first = None
    for index, layer in enumerate(model.model.layers[:blocks]):
        linears = {name: layer.get_submodule(name) for name in ALL_AT_ONCE[0]}
        inputs = {}
        with heard(linears, lambda name, given, _, inputs=inputs: inputs.update({name: given.clone()})):
            states = layer(states, **arguments)
        scales = auto_scale_block(layer, dict(arguments), w_bit=bits, q_config=settings, input_feat=inputs)
        apply_scale(layer, scales, input_feat_dict=inputs)
        apply_clip(layer, auto_clip_block(layer, w_bit=bits, q_config=settings, input_feat=inputs))
        for linear in linears.values():
            linear.weight.data = pseudo_quantize_tensor(linear.weight.data, n_bit=bits, **settings)
        scales_of_first = scales_of_first or scales
        print(f"layer {index + 1} of {blocks}", flush=True)
    weights = first_layer_weights(model)
    for producer, consumers, scale in scales_of_first:
        for name in consumers:
            weights[name] /= scale.float()
        if producer in weights:
            weights[producer] *= scale.float()[:, None]
    return weights, []


def smoothquant(model, windows, blocks, *, alpha):
    from smoothquant.fake_quant import quantize_model
    from smoothquant.smooth import smooth_lm

    del blocks  # it takes the whole model
    largest, linears = {}, {}
    for index, layer in enumerate(model.model.layers):
        linears |= {f"model.layers.{index}.{name}": layer.get_submodule(name) for name in ALL_AT_ONCE[0]}

    def listen(name, given, _):
        now = given.reshape(-1, given.shape[-1]).abs().amax(0).float()
        largest[name] = now if name not in largest else now.maximum(largest[name])

    with heard(linears, listen):
        for window in windows:
            model(input_ids=window[None], use_cache=False)
    first = model.model.layers[0]
    norms = {
        norm: getattr(first, norm).weight.float().clone() for norm in ("input_layernorm", "post_attention_layernorm")
    }
    smooth_lm(model, largest, alpha)
    quantize_model(model, weight_quant="per_channel", act_quant="per_token", quantize_bmm_input=True)
    weights = first_layer_weights(model)
    for norm, names in zip(norms, (ALL_AT_ONCE[0][:3], ALL_AT_ONCE[0][4:6]), strict=True):
        for name in names:
            weights[name] *= getattr(first, norm).weight.float() / norms[norm]
    return weights, []

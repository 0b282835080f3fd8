"""OpenVINO: a stateful IR, as openvino-genai and optimum-intel expect one, and a runner that times it.

Inputs input_ids, attention_mask, position_ids (B, T) and beam_idx (B); output logits (B, T, vocab). The cache is state,
whose rows beam_idx picks before each step: the reordering that a beam search needs.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as ops
from openvino.op.util import Variable, VariableInfo

from skipless.errors import InputError, StorageError
from skipless.inference import load_tokenizer
from skipless.quiet import errors_only
from skipless.serving.decoder import Decoder, cache_names, example, load_decoder
from skipless.serving.running import TokenRunner

MODEL = "openvino_model.xml"
STORED = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
WEIGHTS = (*STORED, "int8", "int4")
# What a Runner is asked for, and the weights that it then has.
PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "int8": "int8", "int4": "int4"}
# What decodes fastest: kernels that read bf16 weights but compute in fp32 and, of int8, those that leave activations as
# they are. Both lose less than OpenVINO's own choice, and take more time for long prompts.
DECODING = {
    "f32": {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"},
    "bf16": {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "bf16"},
    "int8": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"},
    "int4": {},
}


def convert(folder: Path, weights: str = "f32") -> ov.Model:
    """A skipless model folder as an IR, its weights stored as `weights` says (of WEIGHTS).

    The cache is then stored so, too, where OpenVINO's own choice would be 8 bits. Raises InputError.
    """
    decoder = load_decoder(folder, STORED.get(weights, torch.float32), torch.bfloat16 if weights == "int8" else None)
    model = trace(decoder)
    if weights in ("int8", "int4"):
        model = compress(model, weights)
    else:
        model.set_rt_info(weights, ["runtime_options", "KV_CACHE_PRECISION"])
    return model


def write(source: Path, folder: Path, weights: str) -> None:
    """The model folder `source` into `folder`: the IR, and its tokenizer and detokenizer if it has one."""
    parts = convert_tokenizer(source) if any(source.glob("tokenizer*")) else {}
    for name, part in {MODEL: convert(source, weights), **parts}.items():
        save(part, folder / name)


def convert_tokenizer(source: Path) -> dict[str, ov.Model]:
    """Tokenizer and detokenizer, by file. Raises InputError for one that openvino_tokenizers does not convert."""
    import openvino_tokenizers

    tokenizer = load_tokenizer(source)
    try:
        parts = openvino_tokenizers.convert_tokenizer(tokenizer, with_detokenizer=True)
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        raise InputError(
            f"{source}: expected a tokenizer that openvino_tokenizers converts, found {type(tokenizer).__name__}: "
            f"{error}; export a copy without tokenizer files"
        ) from error
    return dict(zip(("openvino_tokenizer.xml", "openvino_detokenizer.xml"), parts, strict=True))


def save(model: ov.Model, file: Path) -> None:
    """Write an IR as it is. Raises StorageError where the disk does not take it."""
    try:
        ov.save_model(model, file, compress_to_fp16=False)
    except RuntimeError as error:
        raise StorageError(f"{file.name}: could not be written: {error}; nothing was left behind") from error


def trace(decoder: Decoder) -> ov.Model:
    """The decoder as a stateful IR.

    openvino-genai replaces attention by a paged one that knows nothing of slopes and windows; attention spelled out it
    leaves alone.
    """
    config = decoder.model.config
    if config.position_type == "alibi" or config.sliding_window is not None:
        decoder.model.set_attn_implementation("eager")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of Python values that become constants; none of ours depends on an input
        model = ov.convert_model(decoder, example_input=example(decoder))
    own(model)
    past, present = cache_names(config, "past_key_values"), cache_names(config, "present")
    for port, name in zip(model.inputs, ("input_ids", "attention_mask", "position_ids", *past), strict=True):
        port.get_tensor().set_names({name})
        cache = (-1, config.num_key_value_heads, -1, config.head_dim)
        port.get_node().set_partial_shape(ov.PartialShape(cache if name in past else (-1, -1)))
    for port, name in zip(model.outputs, ("logits", *present), strict=True):
        port.get_tensor().set_names({name})
    model.validate_nodes_and_infer_types()
    keep_cache(model, past, present)
    return model


def own(model: ov.Model) -> None:
    """Copy the weights in bf16: openvino's own constants look into torch's memory, and of bf16 do not keep it alive."""
    for node in model.get_ops():
        if node.get_type_name() == "Constant" and node.get_element_type() == ov.Type.bf16:
            owned = ov.op.Constant(ov.Tensor(node.data, node.shape, ov.Type.bf16), shared_memory=False)
            owned.set_friendly_name(node.get_friendly_name())
            for reader in node.output(0).get_target_inputs():
                reader.replace_source_output(owned.output(0))


def keep_cache(model: ov.Model, past: list[str], present: list[str]) -> None:
    """Make the cache state: empty at first, its rows taken by beam_idx, what it becomes kept for the next step."""
    beam_idx = ops.parameter([-1], ov.Type.i32, name="beam_idx")
    beam_idx.output(0).get_tensor().set_names({"beam_idx"})
    model.add_parameters([beam_idx])
    batch = ops.gather(ops.shape_of(model.input("input_ids"), "i64"), ops.constant([0]), ops.constant(0))
    for before, after in zip(past, present, strict=True):
        parameter = model.input(before).get_node()
        result = model.output(after).get_node()
        shape = parameter.get_partial_shape()
        heads, width = (ops.constant(np.array([shape[axis].get_length()])) for axis in (1, 3))
        empty = ops.broadcast(ops.constant(np.float32(0)), ops.concat([batch, heads, ops.constant([0]), width], 0))
        variable = Variable(described(before + after, shape))
        state = ops.read_value(empty, variable)
        for reader in parameter.output(0).get_target_inputs():
            reader.replace_source_output(ops.gather(state, beam_idx, ops.constant(0)).output(0))
        model.add_variables([variable])
        model.add_sinks([ops.assign(result.input_value(0).get_node(), variable)])
        model.remove_parameter(parameter)
        model.remove_result(result)
    model.validate_nodes_and_infer_types()


def described(name: str, shape: ov.PartialShape) -> VariableInfo:
    """A part of the state."""
    info = VariableInfo()
    info.variable_id, info.data_type, info.data_shape = name, ov.Type.f32, shape
    return info


def compress(model: ov.Model, weights: str) -> ov.Model:
    """Weights rounded to int8 (each row its own scale) or int4 (each 128 of a row its own), by NNCF.

    rest_proj keeps what it has with int8; with int4, it has 8 bits, and so have the tables. With no more bits than the
    others it is what loses most (docs/half-precision.md).
    """
    import nncf

    rest = nncf.IgnoredScope(patterns=[".*rest_proj.*"], validate=False)
    int8 = nncf.CompressWeightsMode.INT8_ASYM
    with errors_only("nncf"), redirect_stdout(io.StringIO()):  # its progress bar
        if weights == "int8":
            return nncf.compress_weights(model, mode=int8, ignored_scope=rest)
        # Rows of another multiple than of 128 have smaller groups.
        fallback = nncf.AdvancedCompressionParameters(group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST)
        model = nncf.compress_weights(
            model,
            mode=nncf.CompressWeightsMode.INT4_SYM,
            group_size=128,
            ignored_scope=rest,
            advanced_parameters=fallback,
        )
        return nncf.compress_weights(model, mode=int8)  # what is not int4 yet


class Runner(TokenRunner):
    """A model in OpenVINO's own runtime.

    folder: a model folder, or one that `export` wrote (with the weights it has). precision: float32, bfloat16, int8 or
    int4: of weights, and which of OpenVINO's options go with them (DECODING).
    """

    def __init__(self, folder: Path, precision: str):
        if precision not in PRECISIONS:
            raise InputError(f"precision: expected one of {', '.join(PRECISIONS)} for openvino, found {precision!r}")
        core = ov.Core()
        exported = folder / MODEL
        model = core.read_model(exported) if exported.exists() else convert(folder, PRECISIONS[precision])
        self.bytes_per_token = bytes_per_token(model)
        self.vocab_size = model.output("logits").get_partial_shape()[2].get_length()
        keep_last(model)
        compiled = core.compile_model(model, "CPU", DECODING[PRECISIONS[precision]])
        self._request = compiled.create_infer_request()

    def decode(self, prompt: list[int], batch: int, tokens: int) -> Iterator[np.ndarray]:
        """As a TokenRunner."""
        self._request.reset_state()
        given = np.broadcast_to(np.array(prompt, np.int64), (batch, len(prompt)))
        rows, seen = np.arange(batch, dtype=np.int32), 0
        for _ in range(tokens):
            positions = np.arange(seen, seen + given.shape[1])
            seen += given.shape[1]
            inputs = {
                "input_ids": given,
                "attention_mask": np.ones((batch, seen), np.int64),
                "position_ids": np.broadcast_to(positions, given.shape),
                "beam_idx": rows,
            }
            logits = self._request.infer(inputs, share_inputs=True, share_outputs=True)["logits"]
            given = logits[:, -1:].argmax(-1)
            yield given[:, 0]


def keep_last(model: ov.Model) -> None:
    """Compute the logits of the last token alone: the input of lm_head, the last matrix, is cut."""
    head = next(node for node in reversed(model.get_ordered_ops()) if node.get_type_name() == "MatMul")
    hidden = head.input_value(0)
    readers = hidden.get_target_inputs()  # besides lm_head, the logits that are the stream itself
    last = ops.gather(hidden, ops.constant([-1]), ops.constant(1))
    for reader in readers:
        reader.replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()


def bytes_per_token(model: ov.Model) -> int:
    """Bytes of weights read to decode one token at batch 1: all, but one row of a table that is only looked up in."""
    sizes = []
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Constant":
            rows = node.shape[0] if len(node.shape) > 1 and _only_looked_up_in(node) else 1
            sizes.append(node.get_byte_size() // rows)
    return sum(sizes)


def _only_looked_up_in(node: ov.Node) -> bool:
    """Whether all that reads a constant, widened and scaled perhaps, takes rows of it."""
    for reader in node.output(0).get_target_inputs():
        kind, taker = reader.get_node().get_type_name(), reader.get_node()
        if kind == "Gather":
            axis = taker.input_value(2).get_node()
            if reader.get_index() != 0 or axis.get_type_name() != "Constant" or axis.data.any():
                return False
        elif kind not in ("Convert", "Subtract", "Multiply", "Reshape") or not _only_looked_up_in(taker):
            return False
    return True


def open_runner(folder: Path, precision: str, compiled: bool) -> Runner:
    """A model folder, loaded; it is always compiled."""
    return Runner(folder, precision)

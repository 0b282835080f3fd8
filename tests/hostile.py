"""Folders and files that mean harm: valid ones, changed by a random generator that a seed or hypothesis drives."""

import json
import math
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from skipless import fuse
from skipless.architecture.limit import limit
from skipless.architecture.seams import KINDS
from skipless.checkpoint import family
from skipless.checkpoint.headers import INDEX, SINGLE
from skipless.checkpoint.opening import open_source
from skipless.checkpoint.reader import CheckpointReader
from skipless.errors import LONGEST, InputError
from skipless.reports.counting import count, resolve
from skipless.rewrite.planning import make_plan
from skipless.rewrite.request import Request
from tests.models import SMALL, SMALL_FILES, build, contents, save, stop_fuse

# File name -> its bytes.
Files = dict[str, bytes]

SKIPLESS: dict[str, Any] = {
    "model_type": "skipless",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
LLAMA = {**SKIPLESS, "model_type": "llama"}
CONFIGS: dict[str, dict[str, Any]] = {
    "skipless": SKIPLESS,
    "pivoted": {**SKIPLESS, "stream_basis": "pivoted", "layers_open": [1]},
    "normed": {**SKIPLESS, "norm_type": "rms", "norms": ["input_layernorm"], "attention_bias": True},
    "moe": {**SKIPLESS, "ffn_type": "moe", "num_local_experts": 2, "num_experts_per_tok": 1},
    "llama": LLAMA,
    "mistral": {**LLAMA, "model_type": "mistral"},
    "qwen3_moe": {
        **LLAMA,
        "model_type": "qwen3_moe",
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 6,
        "mlp_only_layers": [1],
    },
    "gpt_neox": {**LLAMA, "model_type": "gpt_neox", "num_key_value_heads": None},
    "opt": {**LLAMA, "model_type": "opt", "ffn_dim": 12, "max_position_embeddings": 9},
    "falcon": {**LLAMA, "model_type": "falcon"},
    "gemma3": {"model_type": "gemma3", "text_config": LLAMA},
}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")

# As they may stand in JSON for whatever belongs there.
VALUES = (
    "0", "-1", "1", "2", "3", "-0", "0.5", "1.0", "1e999", "-1e999", "NaN", "Infinity", "-Infinity", "1e-400", "true",
    "false", "null", '""', '"x"', '"0"', "[]", "{}", "[[]]", '[""]', "[0]", "[0, 0]", "[-1, 4]", "[4, 0]", "[0.0, 4.0]",
    "[true, false]", "[null]", '["a", "a"]', '{"": null}', '{"a": 1, "a": 2}', str(2**31), str(2**31 - 1), str(2**32),
    str(2**63), str(2**64 - 1), str(2**64), "1" + "0" * 30, "-1" + "0" * 30, "9" * 5000, "[" * 200 + "]" * 200,
    '{"a":' * 70 + "1" + "}" * 70, "[" + "0," * 3000 + "0]", f"[{2**62}, 4]", f"[0, {2**63}]", "[1" + ",1" * 3000 + "]",
    '"\\ud800"', '"\\u0000"', '"\\u001b[31m"', '"a\\nb"', '"\\u202e"', '"../../etc/passwd"', '"/dev/zero"', '"C:\\\\x"',
    '"' + "x" * 20_000 + '"', '"F32"', '"F4"', '"F8_E4M3"', '"F6_E2M3"', '"U64"', '"BF16"', '"I32"', '"BOOL"', '"C64"',
    '"skipless"', '"moe"', '"parallel"', '"pivoted"', '"q"', '"rms"', '"layer"', '"both"', '"learned"', '"full"',
    '["input_layernorm"]', '["model.norm", "model.embed_norm"]', '["model.layers.0.mlp.up_proj"]', "1 2", "'a'", "",
    "\ufeff1", "\x00", "0x10", "01",
)  # fmt: skip
NAMES = (
    "", "a\nb", "\x1b[2J", "\u202e", "\ud800", "../up", "/etc/passwd", "a" * 20_000, "__metadata__", "lm_head.weight",
    "model.norm.weight", "model.layers.99.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias", "\x00", "é" * 300
)  # fmt: skip
PLACES = (
    SINGLE, *SHARDS, "../model.safetensors", "/dev/zero", "sub/a.safetensors", "..\\a.safetensors", "a\x00.safetensors",
    ".safetensors", "x" * 300 + ".safetensors", "\ud800.safetensors", "a\n.safetensors", "model.bin", "config.json", "",
)  # fmt: skip
FIELDS = (
    *SKIPLESS, "head_dim", "norms", "norms_removed", "gains_removed", "norm_eps", "num_local_experts", "layers_open",
    "num_experts_per_tok", "stream_basis", "p_removed", "values_removed", "head_removed", "folded_biases", "rest_dtype",
    "hidden_act", "qk_norm", "attention_bias", "tie_word_embeddings", "max_position_embeddings", "position_type",
    "block_type", "ffn_type", "residual", "attention_shaping", "sliding_window", "final_logit_softcapping", "dtype",
    "torch_dtype", "id2label", "label2id", "auto_map", "architectures", "eos_token_id", "initializer_range",
    "problem_type", "is_encoder_decoder", "return_dict", "chunk_size_feed_forward", "transformers_version",
    "output_hidden_states", "use_cache", "pad_token_id", "bos_token_id",
    "n_inner", "mlp_only_layers", "decoder_sparse_step", "text_config", "unknown", "embedding_size",
    "word_embed_proj_dim", "ffn_dim", "use_parallel_residual", "new_decoder_architecture", "num_kv_heads", "bias",
    "num_experts", "moe_intermediate_size",
)  # fmt: skip


class Raw(str):
    """A piece of JSON, or of what claims to be."""

    __slots__ = ()


class Pairs(list[tuple[str, Any]]):
    """An object that may have a key twice."""


def encode(value: Any) -> str:
    """JSON, with pieces put in as they are."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict | Pairs):
        pairs = value.items() if isinstance(value, dict) else value
        return "{" + ",".join(f"{json.dumps(name)}:{encode(inner)}" for name, inner in pairs) + "}"
    return json.dumps(value)


def to_bytes(value: Any) -> bytes:
    return encode(value).encode("utf-8", "surrogatepass")


def shard(header: Any, size: int, length: int | None = None) -> bytes:
    """A safetensors file with `size` zero bytes of data."""
    text = to_bytes(header)
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(size)


def promised(config: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    """The tensors that a config promises: name -> shape, dtype."""
    architecture = family.read(config)
    if config["model_type"] == "skipless":
        indices = architecture.index_tensors()
        return {name: (shape, "I32" if name in indices else "F32") for name, shape in architecture.tensors().items()}
    found = family.find(config)
    shapes = family.Layout(found, architecture, found.prefixes[0], {}).shapes
    return {name: (shape, "F32") for name, shape in shapes.items()}


def header(tensors: dict[str, tuple[tuple[int, ...], str]]) -> tuple[dict[str, Any], int]:
    """A header of these tensors, and the size of their data."""
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in tensors.items():
        start, end = end, end + 4 * math.prod(shape)
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    return fields, end


def valid(config: dict[str, Any], sharded: bool = False) -> Files:
    """A whole checkpoint of zeros."""
    tensors = promised(config)
    files = {"config.json": to_bytes(config)}
    if not sharded:
        return files | {SINGLE: shard(*header(tensors))}
    for place, names in zip(SHARDS, (list(tensors)[::2], list(tensors)[1::2]), strict=True):
        files[place] = shard(*header({name: tensors[name] for name in names}))
    places = {name: SHARDS[number % 2] for number, name in enumerate(tensors)}
    return files | {INDEX: to_bytes({"metadata": {}, "weight_map": places})}


def valid_gguf(alignment: int | None = None) -> Files:
    """A whole GGUF file of zeros, with a vocabulary; alignment: of its tensors, in bytes (None: not said)."""
    tensors = promised({**LLAMA, "model_type": "gguf-llama", **GGUF_FIELDS})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tiny.gguf"
        writer = gguf.GGUFWriter(str(file), "llama")
        for name, value in GGUF_FIELDS.items():
            if isinstance(value, int) and "." in name:
                writer.add_uint32(name, value)
        if alignment is not None:
            writer.add_custom_alignment(alignment)
        writer.add_token_list(["a", "b", "c"])
        writer.add_token_scores([0.0, 1.0, 2.0])
        for name, (shape, _) in tensors.items():
            writer.add_tensor(name, np.zeros(shape, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return {"tiny.gguf": file.read_bytes()}


GGUF_FIELDS: dict[str, Any] = {
    "vocab_size": 11,
    "llama.embedding_length": 8,
    "llama.feed_forward_length": 12,
    "llama.block_count": 2,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "tie_word_embeddings": False,
    "qkv_bias": False,
}


def flipped(random: Random, data: bytes, most: int = 400) -> bytes:
    """A few bytes changed, cut off or put in, in the first `most`."""
    found = bytearray(data)
    for _ in range(random.randint(1, 4)):
        place = random.randrange(min(len(found), most)) if found else 0
        way = random.choice(("set", "set", "bit", "cut", "insert", "end"))
        if not found or way == "insert":
            found[place:place] = random.choice((b"\x00", b"[", b"{", b'"', b"\xff", b"9" * 30, b"\xef\xbb\xbf"))
        elif way == "set":
            found[place] = random.randrange(256)
        elif way == "bit":
            found[place] ^= 1 << random.randrange(8)
        elif way == "cut":
            del found[place : place + random.randint(1, 8)]
        else:
            del found[random.randrange(len(found)) :]
    return bytes(found)


def hostile_header(random: Random, data: bytes) -> bytes:
    """A safetensors file with other fields, names, lengths or bytes."""
    length = int.from_bytes(data[:8], "little")
    fields, size = json.loads(data[8 : 8 + length]), len(data) - 8 - length
    name = random.choice([name for name in fields if name != "__metadata__"])
    way = random.choice(("bytes", "field", "field", "field", "name", "twice", "gone", "metadata", "length", "entry"))
    said = None
    if way == "bytes":
        return flipped(random, data, 8 + length)
    if way == "field":
        fields[name][random.choice(("dtype", "shape", "data_offsets", "other"))] = Raw(random.choice(VALUES))
    elif way == "name":
        fields[random.choice(NAMES)] = fields.pop(name)
    elif way == "twice":
        inner = {**fields[name], random.choice(("shape", "data_offsets")): Raw(random.choice(VALUES))}
        fields = Pairs([*fields.items(), (name, random.choice((fields[name], inner)))])
    elif way == "gone":
        fields[name].pop(random.choice(list(fields[name])))
    elif way == "metadata":
        fields["__metadata__"] = random.choice((Raw(random.choice(VALUES)), {"format": Raw(random.choice(VALUES))}))
    elif way == "length":
        said = random.choice((0, 1, length - 1, length + 1, length + size, 10**8, 2**31, 2**63, 2**64 - 1))
    else:
        fields[name] = Raw(random.choice(VALUES))
    return shard(fields, max(0, size + random.choice((0, 0, 0, -1, 1, 4, -4))), said)


def hostile_index(random: Random, data: bytes) -> bytes:
    """An index with other places, names or values."""
    index = json.loads(data)
    name = random.choice(list(index["weight_map"]))
    way = random.choice(("bytes", "place", "place", "name", "value", "map", "twice", "gone", "metadata"))
    if way == "bytes":
        return flipped(random, data, len(data))
    if way == "place":
        index["weight_map"][name] = random.choice(PLACES)
    elif way == "name":
        index["weight_map"][random.choice(NAMES)] = index["weight_map"].pop(name)
    elif way == "value":
        index["weight_map"][name] = Raw(random.choice(VALUES))
    elif way == "map":
        index["weight_map"] = Raw(random.choice(VALUES))
    elif way == "twice":
        index["weight_map"] = Pairs([*index["weight_map"].items(), (name, random.choice(PLACES))])
    elif way == "gone":
        del index["weight_map"][name]
    else:
        index["metadata"] = Raw(random.choice(VALUES))
    return to_bytes(index)


def hostile_config(random: Random, data: bytes) -> bytes:
    """A config with other fields, values or bytes."""
    config = json.loads(data)
    inner = config["text_config"] if isinstance(config.get("text_config"), dict) and random.random() < 0.9 else config
    way = random.choice(("bytes", "value", "value", "value", "value", "twice", "gone", "whole", "rope"))
    if way == "bytes":
        return flipped(random, data, len(data))
    if way == "value":
        for _ in range(random.choice((1, 1, 2, 3))):
            inner[random.choice(FIELDS)] = Raw(random.choice(VALUES))
    elif way == "gone":
        inner.pop(random.choice(list(inner)))
    elif way == "rope":
        field = random.choice(("rope_theta", "rope_type", "partial_rotary_factor", "factor"))
        inner["rope_parameters"] = {"rope_theta": 1e4, field: Raw(random.choice(VALUES))}
    elif way == "twice":
        name = random.choice(list(config))
        return to_bytes(Pairs([*config.items(), (name, Raw(random.choice(VALUES)))]))
    else:
        return Raw(random.choice(VALUES)).encode("utf-8", "surrogatepass")
    return to_bytes(config)


def hostile_journal(random: Random, data: bytes) -> bytes:
    """A journal with other lines, fields, values or bytes."""
    lines: list[Any] = [json.loads(line) for line in data.splitlines()]
    at = random.randrange(len(lines))
    line, other = lines[at], random.choice(lines)
    way = random.choice(("bytes", "cut", "value", "value", "inner", "inner", "gone", "other", "line", "twice", "order"))
    if way == "bytes":
        return flipped(random, data, len(data))
    if way == "cut":
        return data[: random.randrange(len(data))] + random.choice((b"", b"\n", bytes(100), b"\xff\n"))
    if way == "value":
        line[random.choice((*line, "other"))] = Raw(random.choice(VALUES))
    elif way == "inner":
        field = random.choice(("tensors", "sources", "outcomes"))
        inner = random.choice(line[field] or [{}]) if field == "outcomes" else line[field]
        name = random.choice((*inner, *NAMES))
        inner[name] = random.choice((Raw(random.choice(VALUES)), *other["tensors"].values()))
    elif way == "gone":
        line.pop(random.choice(list(line)))
    elif way == "other":
        name = random.choice(list(line))
        line[name] = other[name]
    elif way == "line":
        lines[at] = Raw(random.choice(VALUES))
    elif way == "twice":
        lines[at] = Pairs([*line.items(), ("task", random.choice((other["task"], Raw(random.choice(VALUES)))))])
    else:
        lines = random.choices(lines, k=random.randint(0, 2 * len(lines)))
    return b"".join(to_bytes(line) + b"\n" for line in lines)


def hostile_job(random: Random, data: bytes) -> bytes:
    """A job with other fields, values or bytes."""
    job = json.loads(data)
    way = random.choice(("bytes", "value", "value", "inner", "gone", "twice", "whole"))
    name = random.choice(list(job))
    if way == "bytes":
        return flipped(random, data, len(data))
    if way == "value":
        job[random.choice((name, *NAMES))] = Raw(random.choice(VALUES))
    elif way == "inner":
        inner = job[random.choice(("options", "environment", "files"))]
        inner[random.choice((*inner, *NAMES))] = Raw(random.choice(VALUES))
    elif way == "gone":
        del job[name]
    elif way == "twice":
        return to_bytes(Pairs([*job.items(), (name, Raw(random.choice(VALUES)))]))
    else:
        return Raw(random.choice(VALUES)).encode("utf-8", "surrogatepass")
    return to_bytes(job)


def hostile_shard(random: Random, data: bytes) -> bytes:
    """A shard of which bytes have changed, or that ends elsewhere."""
    return random.choice((flipped(random, data, len(data)), data[: random.randrange(len(data))], data + bytes(9), b""))


class Unfinished:
    """A fuse of a tiny model that was stopped between two tasks, and can be begun from there again and again."""

    PLANTED = ("model/evil.py", "model/zz.safetensors", "model/sub/x", "notes.txt", ".job.json.new", "model/.x.new")

    def __init__(self, folder: Path):
        self.source = save(build(dtype=torch.float32, **SMALL), folder / "source")
        self.destination = folder / "fused"
        fuse(self.source, folder / "whole", **SMALL_FILES)
        self.whole = contents(folder / "whole")
        self.unfinished = stop_fuse(self.source, self.destination, -1, **SMALL_FILES)
        files = (path for path in self.unfinished.rglob("*") if path.is_file())
        self.files = {str(path.relative_to(self.unfinished)): path.read_bytes() for path in files}
        self.before = contents(self.source)

    def changed(self, random: Random) -> Files:
        """Its files, one or two of them hostile, or another one planted."""
        files = dict(self.files)
        for _ in range(random.choice((1, 1, 1, 2))):
            name = random.choice(("journal.jsonl", "journal.jsonl", "job.json", "shard", "planted"))
            if name == "planted":
                files[random.choice(self.PLANTED)] = b"evil"
                continue
            if name == "shard":
                name = random.choice([name for name in files if name.endswith("0.safetensors") or "-of-" in name])
            change = {"journal.jsonl": hostile_journal, "job.json": hostile_job}.get(name, hostile_shard)
            try:
                files[name] = change(random, files[name])
            except (ValueError, TypeError, AttributeError, IndexError, KeyError):  # changed beyond a second change
                files[name] = flipped(random, files[name])
        return files

    def attempt(self, files: Files) -> str | None:
        """Go on from these files; why it was refused, or None: it gave the same bytes. Neither touches the source."""
        for folder in (self.unfinished, self.destination):
            shutil.rmtree(folder, ignore_errors=True)
        for name, data in files.items():
            (self.unfinished / name).parent.mkdir(parents=True, exist_ok=True)
            (self.unfinished / name).write_bytes(data)
        with clean() as refused:
            fuse(self.source, self.destination, resume=True, **SMALL_FILES)
        assert contents(self.source) == self.before
        assert self.destination.exists() != bool(refused), refused
        assert refused or contents(self.destination) == self.whole
        for name in files.keys() & set(self.PLANTED) - {".job.json.new"}:
            assert (self.unfinished / name).read_bytes() == b"evil", name
        return refused[0] if refused else None


BASES: dict[str, Files] = {
    **{name: valid(config) for name, config in CONFIGS.items()},
    **{f"{name}, sharded": valid(CONFIGS[name], True) for name in ("skipless", "llama")},
    "gguf": valid_gguf(),
}
HOSTILE: dict[str, Callable[[Random, bytes], bytes]] = {"config.json": hostile_config, INDEX: hostile_index}


def changed(random: Random, files: Files) -> Files:
    """The same files, one or two of them hostile."""
    files = dict(files)
    for _ in range(random.choice((1, 1, 1, 2))):
        name = random.choice(list(files))
        change = flipped if name.endswith(".gguf") else HOSTILE.get(name, hostile_header)
        try:
            files[name] = change(random, files[name])
        except (ValueError, TypeError, AttributeError, IndexError, KeyError):  # changed beyond a second change
            files[name] = flipped(random, files[name])
    return files


def write(folder: Path, files: Files) -> Path:
    """Write the files and nothing else into a folder; what is to be opened: it, or the GGUF file."""
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder / "tiny.gguf" if "tiny.gguf" in files else folder


@contextmanager
def clean() -> Iterator[list[str]]:
    """Why something was refused, if it was. Raises AssertionError for a refusal that is not one clean line."""
    messages: list[str] = []
    try:
        yield messages
    except InputError as error:
        messages.append(str(error))
        assert messages[0].isprintable(), messages[0]
        assert 0 < len(messages[0]) <= LONGEST, len(messages[0])


def attempt(path: Path, requests: Iterable[Request] = ()) -> str | None:
    """Do with a checkpoint all that reads its description, and read its tensors; why it was refused, or None.

    Raises whatever transformers raises where it does not make the model of a skipless one that was not refused.
    """
    family_name = ""
    with clean() as refused:
        source = open_source(path)
        family_name = source.family
        for name in source.reader.tensors:
            source.reader.tensor(name)
        count(path)
        if source.family == "skipless":
            reader = CheckpointReader(path)
            reader.other_files()
            for request in requests:
                make_plan(reader, request)
    if family_name == "skipless" and not refused:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    return refused[0] if refused else None


def describe(path: Path) -> str | None:
    """Do with a config alone all that can be done; why it was refused, or None."""
    with clean() as refused:
        _, found, architecture, _ = resolve(path)
        count(path)
        limit(architecture if found == "skipless" else architecture.skipless())
    return refused[0] if refused else None


def any_request(random: Random) -> Request:
    """Options that a user may have given."""
    return Request(
        basis=random.choice(("q", "pivoted")),
        dtype=random.choice((None, "bfloat16")),
        remove=tuple(random.sample(list(KINDS), random.randint(1, 3))),
    )

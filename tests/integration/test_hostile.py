"""Input that means harm: one clean line that says what to do, exit code 2, nothing written, nothing run, no hang."""

import json
import os
import shutil
import socket
import struct

import pytest
from click.testing import CliRunner

from skipless import InputError, cli
from skipless.architecture.config import BOOKKEEPING, Architecture
from skipless.checkpoint.gguf_file import GGUFReader
from skipless.checkpoint.headers import INDEX, MOST_CONFIG, MOST_FILES, MOST_HEADER, MOST_INDEX, MOST_VALUES, SINGLE
from skipless.checkpoint.opening import open_source
from skipless.checkpoint.reader import CheckpointReader
from skipless.inference import load, load_tokenizer
from tests import hostile

Q1 = "model.layers.1.self_attn.q_proj.weight"
WHOLE = "model.safetensors: expected a whole safetensors file, found "
COMMANDS = (["count"], ["limit"], ["audit"], ["fuse", "--dry-run"], ["fuse"])

pytestmark = pytest.mark.timeout(60)  # seconds; what hangs, hangs on opening


@pytest.fixture
def source(tmp_path):
    return hostile.write(tmp_path / "source", hostile.BASES["skipless"])


@pytest.fixture
def sharded(tmp_path):
    return hostile.write(tmp_path / "source", hostile.BASES["skipless, sharded"])


def refused(source, *parts, commands=COMMANDS):
    """Require of each command one line on stderr that has these parts, and no new file anywhere."""
    before = sorted(source.parent.rglob("*"))
    for command in commands:
        destination = [str(source.parent / "fused")] if command[0] == "fuse" else []
        result = CliRunner().invoke(cli.main, [*command, str(source), *destination])
        assert (result.exit_code, result.stdout) == (2, ""), (command, result.output)
        line = result.stderr.removesuffix("\n")
        assert line.startswith("skipless: ")
        assert line.isprintable()
        assert len(line) < 7000
        for part in parts:
            assert part in line
        assert sorted(source.parent.rglob("*")) == before


def rewritten(source, change, **others):
    """Change the header's fields, or put others in their place."""
    fields, size = hostile.header(hostile.promised(hostile.SKIPLESS))
    (source / SINGLE).write_bytes(hostile.shard(change(fields) or fields, size, **others))


def field(**changes):
    return lambda fields: fields[Q1].update(changes)


RAW = hostile.Raw


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (field(data_offsets=[0, 256]), "invalid offset"),
        (field(data_offsets=[-1, 255]), "invalid"),
        (field(data_offsets=[0, 2**64]), "invalid"),
        (field(data_offsets=[2**63, 2**63 + 256]), "invalid offset"),
        (field(data_offsets=[0.0, 256.0]), "invalid type: floating point"),
        (field(data_offsets=[True, False]), "invalid type: boolean"),
        (field(data_offsets=["0", "256"]), "invalid type: string"),
        (field(data_offsets=[0]), "invalid length"),
        (field(data_offsets=None), "invalid type: null"),
        (field(shape=[-8, -8]), "invalid value: integer"),
        (field(shape=[2**62, 8]), ""),
        (field(shape=[2**32, 2**32, 0]), ""),
        (field(shape="8"), "invalid type: string"),
        (field(shape=[8, 9]), ""),
        (field(shape=RAW("NaN")), "invalid JSON"),
        (field(shape=RAW("[" + "9" * 5000 + "]")), ""),
        (field(dtype="F99"), "unknown variant `F99`"),
        (field(dtype="F4"), ""),
        (field(dtype="F8_E4M3"), ""),
        (field(dtype=None), ""),
        (field(dtype=4), ""),
        (lambda fields: fields.update({"__metadata__": {"format": 1}}), "invalid type: integer"),
        (lambda fields: fields.update({"__metadata__": []}), "invalid type: sequence"),
        (lambda fields: fields.update({"__metadata__": {"a": RAW("[" * 10_000 + "]" * 10_000)}}), ""),
        (lambda fields: hostile.Pairs([*fields.items(), (Q1, fields[Q1])]), f"{Q1!r} more than once in an object"),
        (lambda fields: [fields], "invalid"),
        (lambda fields: RAW("\ufeff{}"), "invalid JSON"),
        (lambda fields: RAW("{" + " " * 10**6), "invalid JSON"),
        (lambda fields: RAW('{"\ud800": 1}'), "invalid UTF-8"),
    ],
)
def test_a_header(source, change, found):
    rewritten(source, change)
    refused(source, WHOLE, found, "copy or download it again")


def test_a_header_of_more_values_than_any_model(source):
    rewritten(source, lambda fields: RAW('{"__metadata__": [' + "[]," * (MOST_VALUES // 2) + "[]]}"))
    refused(source, f"model.safetensors: expected at most {MOST_VALUES:,} JSON values, found up to 2,000,00")


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 10**10])
def test_a_header_longer_than_its_file(source, length):
    rewritten(source, lambda fields: None, length=length)
    refused(source, WHOLE)


def test_a_header_larger_than_any(source):
    with (source / SINGLE).open("r+b") as file:
        file.write(struct.pack("<Q", MOST_HEADER + 1))
        file.truncate(10 * MOST_HEADER)
    refused(source, f"expected a header of at most {MOST_HEADER:,} bytes, found {MOST_HEADER + 1:,}")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\nb\r\x85c", "a\\nb\\r\\x85c: expected no such tensor"),
        ("\x1b[31m\x1b]0;title\x07", "\\x1b[31m\\x1b]0;title\\x07: expected no such tensor"),
        ("\u202eevil\u2028", "\\u202eevil\\u2028: expected no such tensor"),
        ("../../etc/passwd", "../../etc/passwd: expected no such tensor"),
        ("[bold]x[/bold]", "[bold]x[/bold]: expected no such tensor"),
        ("x" * 10**6, "x ... x"),
        ("", "skipless: : expected no such tensor"),
    ],
    ids=ascii,
)
def test_a_tensor_name(source, name, shown):
    rewritten(source, lambda fields: fields.update({name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}))
    refused(source, shown, "remove the tensor")


def test_a_tensor_of_100_000_dimensions(source):
    rewritten(source, lambda fields: fields[Q1].update(shape=[8, 8, *[1] * 10**5]))
    refused(source, f"{Q1}: expected (8, 8), as config.json says; found (8, 8, 1, 1,", "correct one of the two")


def test_a_tensor_in_two_shards(sharded):
    first, second = (hostile.SHARDS[0], hostile.SHARDS[1])
    (sharded / second).write_bytes((sharded / first).read_bytes())
    refused(sharded, f": expected once, found in {first} and {second}")


@pytest.mark.parametrize(
    "place",
    [
        "../source/model.safetensors", "/dev/zero", "/etc/x.safetensors", "sub/x.safetensors", "..\\x.safetensors",
        "C:x.safetensors", "a\x00.safetensors", "a\n.safetensors", "\ud800.safetensors", "..", "", "x.bin", 3, None, [],
    ],
    ids=ascii,
)  # fmt: skip
def test_an_index_that_points_elsewhere(sharded, place):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"][Q1] = place
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, f"{INDEX}: weight_map: expected safetensors files in this folder, found ")


@pytest.mark.parametrize("place", ["missing.safetensors", "x" * 300 + ".safetensors"], ids=["missing", "long"])
def test_an_index_that_points_nowhere(sharded, place):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"][Q1] = place
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, f"{place}: expected a shard that {INDEX} names, found")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "expected a JSON object, found list"),
        ('{"weight_map": 3}', "weight_map: expected tensor names and their files, found none"),
        ('{"weight_map": {"a": "b", "a": "c"}}', "'a' more than once in an object"),
        (
            '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}',
            "a: expected in model-00001-of-00002.safetensors",
        ),
        ("[" * 10**6, "too deep"),
        ("\ufeff{}", "expected JSON, found Unexpected UTF-8 BOM"),
    ],
    ids=["list", "number", "twice", "not there", "deep", "BOM"],
)
def test_an_index(sharded, text, message):
    (sharded / INDEX).write_text(text)
    refused(sharded, message)


@pytest.mark.parametrize(("name", "most"), [("config.json", MOST_CONFIG), (INDEX, MOST_INDEX)])
def test_json_larger_than_any(sharded, name, most):
    with (sharded / name).open("r+b") as file:
        file.truncate(10**11)
    refused(sharded, f"{name}: expected a JSON file of at most {most:,} bytes, found 100,000,000,000; correct it")


@pytest.mark.parametrize("base", ["skipless", "qwen3_moe", "gpt_neox", "gemma3"])
def test_any_value_of_any_field(base, tmp_path):
    config = hostile.CONFIGS[base]
    inner = config.get("text_config", config)
    accepted = {}
    for name in inner:
        for value in hostile.VALUES:
            changed = {**config, "text_config" if inner is not config else name: {**inner, name: RAW(value)}}
            if inner is config:
                changed = {**config, name: RAW(value)}
            files = {"config.json": hostile.to_bytes(changed)}
            if hostile.describe(hostile.write(tmp_path / "case", files) / "config.json") is None:
                accepted.setdefault(name, set()).add(value)
    assert accepted["num_hidden_layers"] == {"1", "2", "3"}
    assert accepted["intermediate_size"] >= {"1", "2", "3", str(2**31 - 1)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: expected at most 100,000 layers and experts"),
        ({"num_hidden_layers": 10**5}, "num_hidden_layers: expected at most 2,000, found 100,000"),
        ({"num_hidden_layers": 1999}, "num_hidden_layers: expected at most 16, the number of tensors"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers: expected a positive integer below 2^31, found 1000000"),
        ({"num_hidden_layers": -1}, "num_hidden_layers: expected a positive integer below 2^31, found -1"),
        ({"num_hidden_layers": True}, "num_hidden_layers: expected a positive integer below 2^31, found True"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers: expected a positive integer below 2^31, found 2.0"),
        ({"num_hidden_layers": RAW("NaN")}, "num_hidden_layers: expected a positive integer below 2^31, found nan"),
        ({"num_local_experts": 2**31 - 1}, "expected at most 100,000 layers and experts, found 2 layers of 2147483647"),
        ({"vocab_size": 2**31 - 1}, "model.embed_tokens.weight: expected (2147483647, 8), as config.json says"),
        ({"layers_open": [0] * 10**6 + [2]}, "layers_open: expected layers 0..1, found 2"),
        ({"norms": ["model.norm"] * 10**5}, "norms: expected each norm once, found model.norm, model.norm"),
        ({"norms_removed": ["x\n"] * 10**5}, "norms_removed: expected names of norms of this model, found 'x\\n'"),
        ({"hidden_act": "x\x1b[2J"}, "hidden_act: expected a name, found 'x\\x1b[2J'"),
        ({"hidden_act": "x" * 10**6}, "hidden_act: expected a name, found 'xxx"),
        ({"architectures": [1]}, "architectures: expected list[str] | None, found [1]; correct it"),
        ({"problem_type": 5}, "problem_type: expected Literal['regression', 'single_label_classification', "),
        ({"is_encoder_decoder": 1}, "is_encoder_decoder: expected bool, found 1; correct it"),
        ({"return_dict": None}, "return_dict: expected bool, found None; correct it"),
        ({"auto_map": 5}, "auto_map: expected dict[str, Any], found 5; correct it"),
        (
            {"id2label": {"0": "\x1b[2J"}, "label2id": 3},
            "label2id: expected dict[str, int] | None, found 3; correct it",
        ),
        ({"dtype": "moe"}, "dtype: expected one of float64, float32, bfloat16, float16; found 'moe'"),
        ({"x" * 10**6: 1}, "not a field of a skipless model"),
        ({"id2label": RAW("[" * 65 + "]" * 65)}, "more than 64 lists or objects within each other"),
        ({"id2label": RAW("[" * 10**5 + "]" * 10**5)}, "lists or objects too deep within each other"),
        ({"vocab_size": RAW("9" * 5000)}, "expected JSON, found an integer of 5,000 digits; correct it"),
        ({"vocab_size": RAW('11, "vocab_size": 12')}, "expected JSON, found 'vocab_size' more than once in an object"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_a_config(source, changes, message):
    (source / "config.json").write_bytes(hostile.to_bytes({**hostile.SKIPLESS, **changes}))
    commands = COMMANDS if "number of tensors" not in message and "model.embed" not in message else COMMANDS[2:]
    refused(source, message, commands=commands)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_encoder_decoder": True}, "is_encoder_decoder: expected one of False; found True, which is not supported"),
        ({"return_dict": False}, "return_dict: expected one of True; found False, which is not supported"),
        ({"id2label": {"a": "b"}}, "config.json: invalid literal for int() with base 10: 'a'"),
        ({"attention_dropout": 0.1}, "attention_dropout: expected 0, found 0.1, which is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window: expected False, found True, which is not supported"),
        ({"layer_types": ["full_attention"]}, "layer_types: expected full_attention 2 times, with"),
    ],
    ids=str,
)
def test_a_config_that_transformers_would_not_load(source, changes, message):
    (source / "config.json").write_bytes(hostile.to_bytes({**hostile.SKIPLESS, **changes}))
    refused(source, message, commands=COMMANDS[2:])
    with pytest.raises(InputError):
        load(source, None)


OPENED = {
    "is_encoder_decoder": {"false"},
    "return_dict": {"true"},
    "use_cache": {"true", "false"},
    "problem_type": {"null"},
    "auto_map": {"{}", '{"": null}'},
}


@pytest.mark.parametrize(
    "name",
    [
        name if name in OPENED else pytest.param(name, marks=pytest.mark.slow)
        for name in sorted(BOOKKEEPING.keys() - {"model_type"})
    ],
)
def test_what_opens_transformers_builds(tmp_path, name):
    files = hostile.valid(hostile.SKIPLESS)
    opened = set()
    for value in hostile.VALUES:
        files["config.json"] = hostile.to_bytes({**hostile.SKIPLESS, name: RAW(value)})
        if hostile.attempt(hostile.write(tmp_path / "case", files)) is None:
            opened.add(value)
    assert len(opened) < len(hostile.VALUES) / 2
    assert opened == OPENED.get(name, opened)


def test_too_many_layers_are_refused_before_anything_is_built_of_their_number(monkeypatch):
    monkeypatch.setattr(Architecture, "modules", lambda _: pytest.fail("built"))
    monkeypatch.setattr(Architecture, "norm_names", lambda _: pytest.fail("built"))
    for layers in (2001, 10**9):
        with pytest.raises(InputError, match="num_hidden_layers: expected at most"):
            Architecture.from_config({**hostile.SKIPLESS, "num_hidden_layers": layers})


@pytest.mark.parametrize("base", ["llama", "gpt_neox", "qwen3_moe", "gemma3"])
def test_more_layers_than_tensors_in_another_family(base, tmp_path):
    config = json.loads(hostile.BASES[base]["config.json"])
    config.get("text_config", config)["num_hidden_layers"] = 1000
    source = hostile.write(tmp_path / "source", {**hostile.BASES[base], "config.json": hostile.to_bytes(config)})
    refused(source, "num_hidden_layers: expected at most ", "the number of tensors", commands=COMMANDS[:3])


def fifo(path):
    os.mkfifo(path)


def listening(path):
    with socket.socket(socket.AF_UNIX) as end:
        here = os.getcwd()  # noqa: PTH109  (a socket's name has 100 characters)
        os.chdir(path.parent)
        try:
            end.bind(path.name)
        finally:
            os.chdir(here)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (fifo, "found a FIFO"),
        (listening, "found a socket"),
        (lambda path: path.mkdir(), "found a folder"),
        (lambda path: path.symlink_to("/dev/zero"), "found a device"),
        (lambda path: path.symlink_to("nowhere"), "found a symlink to nowhere, which does not exist"),
        (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
    ],
    ids=["fifo", "socket", "folder", "device", "dangling", "loop"],
)
@pytest.mark.parametrize("name", ["config.json", INDEX, hostile.SHARDS[0], "tokenizer.json"])
def test_what_is_no_file(sharded, make, found, name):
    if name == "tokenizer.json" and found == "found a folder":
        make, found = (lambda path: path.symlink_to(sharded)), "found a folder"  # one that is none is copied
    (sharded / name).unlink(missing_ok=True)
    make(sharded / name)
    refused(sharded, f"{name}: expected ", found, commands=COMMANDS[3:] if name == "tokenizer.json" else COMMANDS)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything; run the tests as another user")
@pytest.mark.parametrize("name", ["config.json", INDEX, hostile.SHARDS[0]])
def test_what_may_not_be_read(sharded, name):
    (sharded / name).chmod(0)
    refused(sharded, name, "Permission denied")


@pytest.mark.parametrize("name", ["config.json", INDEX, hostile.SHARDS[1], "tokenizer.json", "templates/notes.md"])
def test_a_symlink_out_of_the_folder(sharded, tmp_path, name):
    """Whatever it leads to: there, it would be read."""
    file, elsewhere = sharded / name, tmp_path / "elsewhere"
    file.parent.mkdir(exist_ok=True)
    file.touch()
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    found = f"{file}: expected a file in this folder, found a symlink to {elsewhere}; put a copy in its place or"
    opened = name.endswith((INDEX, ".safetensors")) or name == "config.json"
    refused(sharded, found, commands=COMMANDS if opened else COMMANDS[3:])
    other = hostile.write(tmp_path / "other", hostile.BASES["skipless, sharded"])
    if "/" not in name:
        refused(other, found, commands=[["verify", str(sharded)]])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "skipless.json"])
def test_a_symlink_within_the_folder_and_a_folder_that_is_one(source, tmp_path, name):
    (source / "tokenizer.json").write_text("{}")
    (source / "here").mkdir()
    (source / name).touch()
    (source / name).rename(source / "here" / "file")
    (source / name).symlink_to("here/file")
    (tmp_path / "link").symlink_to(source)
    options = ["fuse", "--dry-run", "--basis", "q", str(tmp_path / "link"), str(tmp_path / "fused")]
    result = CliRunner().invoke(cli.main, options)
    assert result.exit_code == 0, result.output


def test_folders_that_only_look_like_the_hub_cache(source, tmp_path):
    """Symlinks lead to files right in blobs, from a snapshot of a cache's model."""
    for folder, target in (
        ("models--a--b/snapshots/0f", "models--a--b/blobs/deep/config"),
        ("models--a--b/snapshots/0f", "models--c/blobs/config"),
        ("models--a--b/others/0f", "models--a--b/blobs/config"),
        ("home/snapshots/0f", "home/blobs/config"),
    ):
        shutil.copytree(source, tmp_path / "case" / folder)
        (tmp_path / "case" / target).parent.mkdir(parents=True)
        config = tmp_path / "case" / folder / "config.json"
        config.rename(tmp_path / "case" / target)
        config.symlink_to(tmp_path / "case" / target)
        refused(config.parent, "config.json: expected a file in this folder, found a symlink to ")
        shutil.rmtree(tmp_path / "case")


def test_symlinks_that_refresh_and_the_loaders_would_follow(source, tmp_path):
    (source / "configuration_skipless.py").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_text("secret")
    found = "configuration_skipless.py: expected a file in this folder, found a symlink to "
    refused(source, found, commands=[["refresh"]])
    for loads in (lambda: load(source, None), lambda: load_tokenizer(source)):
        with pytest.raises(InputError, match=found):
            loads()


def test_many_folders_within_each_other(source):
    deep = source
    for _ in range(70):
        deep /= "a"
        deep.mkdir()
    refused(source, "expected at most 64 folders within each other", commands=COMMANDS[3:])


def test_many_files(source, monkeypatch):
    assert MOST_FILES >= 10**4
    monkeypatch.setattr("skipless.checkpoint.headers.MOST_FILES", 20)
    for number in range(21):
        (source / f"{number}.txt").touch()
    refused(source, "source: expected at most 20 other files; remove them", commands=COMMANDS[3:])


def test_a_folder_of_the_hub_cache(source, tmp_path):
    blobs, folder = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0f"
    blobs.mkdir(parents=True)
    folder.mkdir(parents=True)
    (source / "tokenizer.json").write_text("{}")
    for number, file in enumerate(sorted(source.iterdir())):
        file.rename(blobs / str(number))
        (folder / file.name).symlink_to(f"../../blobs/{number}")
    assert [str(file) for file in CheckpointReader(folder).other_files()] == ["tokenizer.json"]
    options = ["fuse", "--dry-run", "--basis", "q", str(folder), str(tmp_path / "fused")]
    assert CliRunner().invoke(cli.main, options).exit_code == 0


def test_nothing_in_a_checkpoint_is_run(source, tmp_path):
    ran = tmp_path / "ran"
    (source / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n\nclass Evil: pass\n")
    evil = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    for config in (hostile.SKIPLESS, hostile.LLAMA, {**hostile.SKIPLESS, "model_type": "evil"}):
        (source / "config.json").write_bytes(hostile.to_bytes({**config, "auto_map": evil}))
        (source / "tokenizer_config.json").write_text(json.dumps({"auto_map": evil, "tokenizer_class": "Evil"}))
        for command in COMMANDS:
            options = [str(tmp_path / "fused")] if command[0] == "fuse" else []
            CliRunner().invoke(cli.main, [*command, str(source), *options])
        for loads in (lambda: load(source, None), lambda: load_tokenizer(source)):
            with hostile.clean():
                loads()
    assert not ran.exists()


def test_a_pickle_beside_or_under_another_name(source):
    (source / SINGLE).write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    refused(source, WHOLE)


def patched(place, data, offset=0, base=hostile.BASES["gguf"]):
    """The small GGUF file with other bytes at a place, given by what stands before it."""
    base = base["tiny.gguf"]
    start = (base.index(place) + len(place) if isinstance(place, bytes) else place) + offset
    return base[:start] + data + base[start + len(data) :]


BEYOND = "metadata beyond the end of the file"


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (patched(b"tokenizer.ggml.tokens", struct.pack("<Q", 2**63), 8), ""),
        (patched(b"tokenizer.ggml.scores", struct.pack("<Q", 2**63), 8), BEYOND),
        (patched(b"tokenizer.ggml.scores", struct.pack("<IQ", 9, 2**40), 4), ""),
        (patched(b"tokenizer.ggml.scores", struct.pack("<I", 77)), "metadata of the unknown type 77"),
        (patched(8, struct.pack("<Q", 2**63)), "9,223,372,036,854,775,808 tensors"),
        (patched(8, struct.pack("<Q", 10**5)), ""),
        (patched(16, struct.pack("<Q", 2**63)), ""),
        (patched(24, struct.pack("<Q", 2**64 - 1)), BEYOND),
        (struct.pack("<IIQQQ1sIQ", 0x46554747, 3, 0, 1, 1, b"a", 8, 10**6), BEYOND),
        (patched(b"token_embd.weight", struct.pack("<I", 5)), "a tensor of 5 dimensions"),
        (patched(b"token_embd.weight", struct.pack("<QQ", 2**32, 2**32), 4), ""),
        (patched(b"token_embd.weight", struct.pack("<I", 99), 20), "99) is not a valid"),
        (patched(b"token_embd.weight", struct.pack("<Q", 2**64 - 8), 24), "a tensor beyond the end of the file"),
        (patched(b"general.architecture", b"\xff\xfe\xff", 12), "UnicodeDecodeError"),
        (hostile.BASES["gguf"]["tiny.gguf"][:100], ""),
        (b"GGUF", ""),
        (b"", ""),
    ],
    ids=[
        "tokens", "scores", "lists of lists", "type", "tensors", "more tensors", "pairs", "name", "string",
        "dimensions", "sizes", "kind", "offset", "no UTF-8", "cut", "magic", "empty",
    ],
)  # fmt: skip
def test_a_gguf_file(tmp_path, data, found):
    (tmp_path / "tiny.gguf").write_bytes(data)
    whole = ("tiny.gguf: expected a whole GGUF file, found", "copy or download it again")
    refused(tmp_path / "tiny.gguf", *whole, found, commands=COMMANDS[:3])


K0, EMBEDDING = b"blk.0.attn_k.weight", b"token_embd.weight"


@pytest.mark.parametrize(
    ("name", "place", "found"),
    [
        (
            K0,
            352,
            "tiny.gguf: blk.0.attn_k.weight: expected after the end of blk.0.attn_q.weight at 608 bytes, found at 352",
        ),
        (
            K0,
            576,
            "blk.0.attn_k.weight: expected after the end of blk.0.attn_q.weight at 608 bytes, found at 576: the two",
        ),
        (EMBEDDING, 32, "blk.0.attn_q.weight: expected after the end of token_embd.weight at 384 bytes, found at 352"),
        (K0, 612, "blk.0.attn_k.weight: expected at a multiple of 32 bytes, as general.alignment says, found at 612"),
    ],
    ids=["the same", "the end", "the next", "aligned"],
)
def test_gguf_tensors_that_overlap_or_are_not_aligned(tmp_path, name, place, found):
    (tmp_path / "tiny.gguf").write_bytes(patched(name, struct.pack("<Q", place), 24))
    refused(tmp_path / "tiny.gguf", found, "copy or download it again", commands=COMMANDS[:3])


def test_the_alignment_that_a_gguf_file_says(tmp_path):
    base = hostile.valid_gguf(64)
    path = hostile.write(tmp_path / "case", base)
    assert hostile.attempt(path) is None
    start = next(tensor for tensor in GGUFReader(path)._file.tensors if tensor.name == K0.decode())
    place = int(start.data_offset - GGUFReader(path)._file.data_offset) + 32
    path.write_bytes(patched(K0, struct.pack("<Q", place), 24, base))
    refused(path, f"{K0.decode()}: expected at a multiple of 64 bytes", f"found at {place}", commands=COMMANDS[:3])


@pytest.mark.parametrize("alignment", [0, 3])
def test_an_alignment_that_is_none(tmp_path, alignment):
    data = patched(b"general.alignment", struct.pack("<I", alignment), 4, hostile.valid_gguf(64))
    (tmp_path / "tiny.gguf").write_bytes(data)
    refused(tmp_path / "tiny.gguf", "tiny.gguf: ", "power of", commands=COMMANDS[:3])


@pytest.mark.parametrize(
    ("limit", "found"),
    [
        ("MOST_VALUES", "more than 3 values"),
        ("MOST_KEPT", "more than 3 values in short"),
        ("MOST_TENSORS", "21 tensors"),
    ],
)
def test_a_gguf_file_of_more_than_any_model(tmp_path, monkeypatch, limit, found):
    monkeypatch.setattr(f"skipless.checkpoint.gguf_file.{limit}", 3)
    path = hostile.write(tmp_path / "case", hostile.BASES["gguf"])
    refused(path, found, commands=COMMANDS[:1])


def test_a_gguf_file_that_is_a_fifo(tmp_path):
    fifo(tmp_path / "tiny.gguf")
    refused(tmp_path / "tiny.gguf", "tiny.gguf: expected a GGUF file, found a FIFO", commands=COMMANDS[:3])


def test_long_lists_of_tokens_are_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr("skipless.checkpoint.gguf_file.LONG", 2)
    path = hostile.write(tmp_path / "case", hostile.BASES["gguf"])
    file = GGUFReader(path)
    assert "tokenizer.ggml.tokens" in file._file.fields
    assert file._file.fields["tokenizer.ggml.tokens"].data == []
    assert open_source(path).reader.tensor("model.norm.weight").shape == (8,)

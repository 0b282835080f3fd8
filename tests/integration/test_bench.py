"""Timing in turns, each model in its own process; the compiled step gives what the model gives; random shapes."""

import json
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from torch._dynamo.utils import counters

from skipless import InputError, cli, fuse
from skipless.serving import decoding
from skipless.serving.bench import Work, bench, measure
from skipless.serving.decoding import TorchRunner, bytes_per_token, prepare_decoding
from skipless.serving.running import disagreement, sequence
from skipless.serving.shapes import write_shapes
from skipless.serving.worker import Worker
from tests.families import saved
from tests.models import build, load, random_ids, save
from tests.tolerances import FP32

ONCE = Work(context=5, tokens=3, prefill=8)


class Metronome:
    """A model that takes as long as it is told to: seconds a step, by turn."""

    def __init__(self, size, *steps):
        self.bytes_per_token = size
        self.steps = iter((steps[0], *steps))  # the first turn is a warm-up
        self.asked = []

    def generate(self, batch, prompt, tokens):
        self.asked.append((batch, prompt, tokens))
        step = next(self.steps)
        return [10 * step + step * number for number in range(tokens)]

    def broken_cache(self, prompt, tokens):
        return None


def test_ratios_are_medians_of_rounds():
    first = Metronome(4000, 1.0, 8.0, 1.0)  # in the second round, the machine was busy
    second = Metronome(2000, 0.5, 4.0, 0.25)
    found = measure([("a", first), ("b", second)], Work((3,), context=7, tokens=5, prefill=0), rounds=3)
    a, b = found.speeds
    assert set(first.asked) == {(3, 7, 5)}
    assert len(first.asked) == 4
    assert a.decoding[0].speedup == 1
    assert b.decoding[0].speedup == 2
    assert b.decoding[0].rounds == (6.0, 0.75, 12.0)
    assert b.decoding[0].tokens_per_second == 6.0
    assert b.decoding[0].bytes_per_second == 4000
    assert b.decoding[0].ceiling == pytest.approx(3 * found.bandwidth / 2000)
    assert (a.first_token, b.first_token) == (10.0, 5.0)
    assert a.prefill is a.load_seconds is None


def test_a_batch_a_row_and_a_long_prompt():
    work = Work((1, 4), context=7, tokens=5, prefill=100)
    (speed,) = measure([("a", Metronome(4000, *[2.0] * 6))], work, rounds=1).speeds
    assert [decoding.batch for decoding in speed.decoding] == [1, 4]
    assert [decoding.tokens_per_second for decoding in speed.decoding] == [0.5, 2.0]
    assert speed.prefill == 100 / 20


@pytest.fixture
def counted():
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


FIELDS = {
    "original": {},
    "q": {"stream_basis": "q", "p_removed": True},
    "pivoted": {"stream_basis": "pivoted", "p_removed": True},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "graphs"),
    [(FIELDS["original"], 1), (FIELDS["pivoted"], 1), ({"sliding_window": 6}, 2)],
    ids=["original", "pivoted", "window"],
)
def test_the_compiled_step_gives_the_same(fields, graphs, counted):
    model = build(dtype=torch.float32, **fields)
    prompts = [random_ids(model, seed=seed) for seed in (1, 2)]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}

    def generate(ids):
        return model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    expected = [generate(ids) for ids in prompts]
    prepare_decoding(model, compiled=True)
    found = [generate(ids) for ids in prompts]  # each with a cache of its own
    assert counted["stats"]["unique_graphs"] == graphs  # a graph break would make more, and so would the second cache
    assert counted["graph_break"] == {}
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.sequences, other.sequences)
        logits, reference = torch.stack(one.logits), torch.stack(other.logits)
        spoiled = logits.clone()
        spoiled[5, 1, 3] += 3 * FP32 * reference[5, 1].abs().max()

        def error(logits, reference=reference):
            return ((logits - reference).abs().amax(-1) / reference.abs().amax(-1)).max()

        assert error(logits) < FP32 < error(spoiled)


def test_experts_are_not_compiled():
    model = build(dtype=torch.float32, ffn_type="moe", num_local_experts=4, num_experts_per_tok=2)
    with pytest.raises(
        InputError, match=r"compile: expected a model that transformers compiles as one graph, found .*experts"
    ):
        prepare_decoding(model, compiled=True)


@pytest.mark.parametrize("slower", [True, False])
def test_rows_without_onednn(slower, monkeypatch):
    monkeypatch.setattr(decoding, "_slower_with_onednn", lambda weight: slower)
    model = build(dtype=torch.bfloat16)
    used = []
    model.model.register_forward_hook(lambda *_: used.append(torch.backends.mkldnn.enabled))
    prepare_decoding(model)
    ids = random_ids(model, batch=1)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert used == [True, not slower, not slower]
    assert torch.backends.mkldnn.enabled


def test_when_tokens_come():
    model = build(dtype=torch.float32)
    runner = TorchRunner(model)
    times = runner.generate(2, 5, 4)
    assert len(times) == 4
    assert times == sorted(times)
    assert times[0] > 0
    assert runner.bytes_per_token == 4 * (model.num_parameters() - model.config.vocab_size * model.config.hidden_size)
    tied = build(dtype=torch.float32, tie_word_embeddings=True)
    assert bytes_per_token(tied) == 4 * tied.num_parameters()
    with pytest.raises(InputError, match=r"tokens: expected a prompt and tokens of at most 64 together, found 66"):
        runner.generate(1, 60, 6)


class Forgetful(TorchRunner):
    """A model whose cache loses what it is given while it decodes."""

    def broken_cache(self, prompt, tokens):
        from transformers.cache_utils import DynamicCache

        update = DynamicCache.update

        def forget(cache, key, value, layer, *args, **kwargs):
            return update(cache, key, 0 * value if key.shape[2] == 1 else value, layer, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(DynamicCache, "update", forget)
            return super().broken_cache(prompt, tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_broken_cache_is_named_beside_its_speed(dtype):
    found = measure(
        [("a", TorchRunner(build(dtype=dtype))), ("b", Forgetful(build(dtype=dtype)))],
        Work(context=5, tokens=8, prefill=0),
        rounds=1,
    )
    assert found.broken_caches.keys() == {"b"}
    assert "with a cache, the logits of a token are off by" in found.broken_caches["b"]


def test_a_broken_cache_of_an_engine_that_shows_tokens_alone():
    def decode(prompt, tokens, seen=lambda ids: ids):
        """The next token is the sum of those that are seen."""
        ids = list(prompt)
        for number in range(tokens):
            ids.append(sum(ids if number == 0 else seen(ids)) % 97)
        return ids[len(prompt) :]

    prompt = sequence(20, 7)
    assert disagreement(decode, prompt, 9) is None
    problem = disagreement(lambda ids, tokens: decode(ids, tokens, lambda ids: ids[-1:]), prompt, 9)
    assert problem == "of 8 tokens, 8 are others than a pass without it gives"


@pytest.mark.slow
def test_a_broken_cache_makes_the_answer_no(folders, monkeypatch):
    monkeypatch.setattr(Worker, "broken_cache", lambda *_: "it forgets")
    arguments = ["bench", str(folders[0]), "--rounds", "1", "--context", "5", "--tokens", "3", "--prefill", "0"]
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1] == f"a broken cache: {folders[0]}: it forgets"


@pytest.mark.slow
def test_shapes_are_those_that_fuse_leaves(tmp_path):
    folders = write_shapes("smollm2-135m", 2, "float32", tmp_path)
    assert [folder.name for folder in folders] == ["original", "q", "pivoted"]

    def shapes(folder):
        with safe_open(folder / "model.safetensors", "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    for folder in folders[1:]:
        fuse(folders[0], tmp_path / f"fused-{folder.name}", basis=folder.name)
        assert shapes(folder) == shapes(tmp_path / f"fused-{folder.name}")
        model = load(folder, torch.float32)
        with torch.no_grad():
            states = model(input_ids=random_ids(model, 1, 32), output_hidden_states=True).hidden_states
        assert 0.3 < states[-1].std() < 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [save(build(dtype=torch.float32, **fields), folder / name) for name, fields in FIELDS.items()]


@pytest.mark.slow
def test_each_model_has_its_process(folders, tmp_path):
    plot = tmp_path / "speeds.svg"
    result = CliRunner().invoke(
        cli.main,
        ["bench", *map(str, folders), "--rounds", "2", "--context", "5", "--tokens", "3", "--prefill", "8",
         "--batch", "1", "--batch", "2", "--plot", str(plot), "--json"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [speed["name"] for speed in found["speeds"]] == list(map(str, folders))
    for speed in found["speeds"]:
        assert [len(decoding["rounds"]) for decoding in speed["decoding"]] == [2, 2]
        assert speed["peak_memory"] > 10**8
        assert speed["load_seconds"] > 0
    assert "tokens/s" in plot.read_text()


@pytest.mark.slow
def test_the_roofline_comes_first(folders):
    arguments = ["bench", *map(str, folders[:2]), "--rounds", "1", "--context", "5", "--tokens", "3", "--prefill", "0"]
    first, *others = CliRunner().invoke(cli.main, arguments).stdout.splitlines()
    assert first.startswith("read bandwidth ")
    assert " GB/s: at most " in first
    assert "prompt of" not in "".join(others)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "bench: expected model folders, or --shape with or without --layers, and not both"),
        (["x", "--shape", "mistral-7b"], "bench: expected model folders, or --shape"),
        (["x", "--layers", "2"], "bench: expected model folders, or --shape"),
        (["--shape", "mistral-8b"], "the nearest names are"),
        (["x", "--dtype", "int8"], "dtype: expected one of float64, float32, bfloat16, float16 for torch, found int8"),
        (["x", "--engine", "vllm", "--compile"], "compile: expected engine torch, found vllm"),
        pytest.param(["nothing-here"], "nothing-here", marks=pytest.mark.slow),  # a process that imports torch
        pytest.param(
            ["x", "--engine", "vllm"],
            "vllm: expected the [vllm] extra, found no vllm; pip install 'skipless[vllm]'",
            marks=pytest.mark.slow,
        ),
        (["x", "--plot", "x.bmp"], "--plot: expected a file named"),
    ],
)
def test_what_cannot_be_timed(arguments, message):
    result = CliRunner().invoke(cli.main, ["bench", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_process_that_ends_says_why():
    with pytest.raises(RuntimeError, match=r"(?s)it said:.*ZeroDivisionError"):
        Worker([sys.executable, "-c", "1 / 0"])


def test_what_its_disk_says_is_told():
    failing = "from skipless.serving.worker import serve; serve(lambda: open('/nothing'))"
    with pytest.raises(InputError, match="No such file"):
        Worker([sys.executable, "-c", failing])


def test_a_folder_that_it_is_called_in_is_not_run(tmp_path, monkeypatch):
    for name in ("json", "torch", "queue"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('run')")
    save(build(dtype=torch.float32), tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    with Worker.of("torch", tmp_path / "model", "float32") as worker:
        assert worker.bytes_per_token > 0


@pytest.mark.parametrize("name", ["bloom", "mpt"])
def test_families_without_a_field_of_positions(name, tmp_path):
    saved(name, tmp_path / "model")
    runner = TorchRunner(load(tmp_path / "model", torch.float32))
    assert len(runner.generate(1, 5, 4)) == 4
    assert runner.broken_cache(5, 4) is None


@pytest.mark.parametrize(("name", "taken", "experts"), [("mixtral", 2, 3), ("qwen3_moe-every-other", 2, 3)])
def test_of_experts_a_token_reads_those_it_is_sent_to(name, taken, experts, tmp_path):
    saved(name, tmp_path / "model")
    model = load(tmp_path / "model", torch.float32)
    table = model.get_input_embeddings().weight
    sizes = {n: weight.nbytes for n, weight in model.named_parameters() if weight is not table}
    of_experts = sum(size for n, size in sizes.items() if ".experts." in n)
    assert of_experts > 0
    assert bytes_per_token(model) == round(sum(sizes.values()) - of_experts * (1 - taken / experts))


@pytest.mark.slow
def test_what_an_engine_prints_is_not_an_answer(folders):
    script = (
        "from pathlib import Path; from skipless.serving.worker import runner, serve\n"
        "def load():\n    print('hello')\n    return runner('torch', Path('%s'), 'float32', False)\n"
        "serve(load)"
    )
    with Worker([sys.executable, "-c", script % folders[0]]) as worker:
        assert len(worker.generate(1, 5, 3)) == 3


@pytest.mark.slow
def test_engines_are_not_imported_unless_used():
    found = "[name for name in ('openvino', 'onnx', 'vllm') if name in sys.modules]"
    script = f"import sys, skipless.serving.bench; print({found})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.slow
def test_bench_from_python(folders):
    found = bench(folders[1:2], compiled=True, work=ONCE, rounds=2)
    assert found.engine == "torch, compiled"
    assert [speed.name for speed in found.speeds] == [str(folders[1])]

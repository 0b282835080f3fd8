// Two models that are the same function, the bundled one and what fusing leaves of it, written on by transformers.js.

/** Load a model of the site, by its folder's name. Gives write(prompt, tokens): what it writes, greedily, and how fast. */
export async function writer({ AutoModelForCausalLM, AutoTokenizer }, name) {
  const tokenizer = await AutoTokenizer.from_pretrained(name);
  const model = await AutoModelForCausalLM.from_pretrained(name);
  return async (prompt, tokens) => {
    const inputs = tokenizer(prompt);
    const start = performance.now();
    const found = await model.generate({ ...inputs, max_new_tokens: tokens, do_sample: false });
    const seconds = (performance.now() - start) / 1000;
    const ids = found.tolist()[0].map(Number);
    return { ids, text: tokenizer.decode(ids), speed: (ids.length - inputs.input_ids.size) / seconds };
  };
}

/** Fill the page. */
async function page() {
  const [form, status, result] = ["demo", "demo-status", "demo-result"].map((id) => document.getElementById(id));
  const from = new URL("./", import.meta.url).href;
  const load = async () => {
    const transformers = await import(`${from}transformers.min.js`);
    const { env } = transformers;
    env.allowRemoteModels = false;
    env.allowLocalModels = true;
    env.useBrowserCache = env.useWasmCache = false; // the browser keeps what it fetches, as far as it has room
    env.localModelPath = new URL(from).pathname; // at a whole address it would not look
    const runtime = `${from}ort-wasm-simd-threaded`;
    env.backends.onnx.wasm.wasmPaths = { mjs: `${runtime}.mjs`, wasm: `${runtime}.wasm` };
    return { original: await writer(transformers, "original"), fused: await writer(transformers, "fused") };
  };
  let writers;
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = form.querySelector("button");
    button.disabled = true;
    try {
      status.textContent = writers ? "Writing ..." : "The models are loading ...";
      writers ??= await load();
      result.replaceChildren();
      const found = {};
      for (const [name, write] of Object.entries(writers)) {
        status.textContent = `${name} is writing ...`;
        found[name] = await write(form.elements.prompt.value, 64);
        const heading = `${name}: ${found[name].speed.toFixed(0)} tokens/s`;
        result.append(
          Object.assign(document.createElement("p"), { textContent: heading }),
          Object.assign(document.createElement("pre"), { textContent: found[name].text }),
        );
      }
      const same = `${found.original.ids}` === `${found.fused.ids}`;
      status.textContent = same ? "Both have written the same tokens." : "They have written different tokens.";
    } catch (error) {
      status.textContent = String(error);
    }
    button.disabled = false;
  });
  form.querySelector("button").disabled = false;
}

if (globalThis.document?.getElementById("demo")) page();

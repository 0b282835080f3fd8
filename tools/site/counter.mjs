// Counts a model as the command line does: the same Python, run in the browser (Pyodide), without torch.

const COUNT = `
import json
from dataclasses import asdict
from pathlib import Path
from skipless.cli import tables
from skipless.errors import InputError
from skipless.reports import counting

def names():
    return json.dumps(sorted(counting.table()["models"]))

def count(asked):
    """A known name, or the text of a config.json: rows and notes of the table, and all numbers, as JSON."""
    if asked.lstrip().startswith("{"):
        Path("pasted.json").write_text(asked)
        asked = "pasted.json"
    try:
        found = counting.count(asked)
    except InputError as error:
        return json.dumps({"error": str(error)})
    rows, notes = tables.count_rows([found]), list(tables.count_notes([found], counting.Conditions()))
    return json.dumps({"rows": rows, "notes": notes, "count": found.to_json()})
`;

/** Load Python and skipless; `from`: the address of their folder. Gives { names, count }. */
export async function counter(loadPyodide, from, archive) {
  const python = await loadPyodide({ indexURL: from });
  python.unpackArchive(archive, "zip", { extractDir: "/home/pyodide" });
  python.runPython(COUNT);
  const call = (name) => python.globals.get(name);
  return { names: () => JSON.parse(call("names")()), count: (asked) => JSON.parse(call("count")(asked)) };
}

/** Fill the page. */
async function page() {
  const [form, status, result] = ["counter", "counter-status", "counter-result"].map((id) => document.getElementById(id));
  const from = new URL("./", import.meta.url).href;
  const [{ loadPyodide }, archive] = await Promise.all([
    import(`${from}pyodide.mjs`),
    fetch(`${from}skipless.zip`).then((answer) => answer.arrayBuffer()),
  ]);
  const { names, count } = await counter(loadPyodide, from, archive);
  document.getElementById("counter-names").append(...names().map((name) => new Option(name)));
  form.querySelector("button").disabled = false;
  status.textContent = "Ready.";

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const asked = form.elements.config.value.trim() || form.elements.name.value.trim();
    const found = count(asked);
    result.replaceChildren();
    status.textContent = found.error ?? "";
    if (found.error) return;
    const table = document.createElement("table");
    for (const row of found.rows) {
      const line = table.insertRow();
      for (const cell of row) line.insertCell().textContent = cell;
    }
    const notes = found.notes.map((note) => Object.assign(document.createElement("p"), { textContent: note }));
    result.append(table, ...notes);
  });
}

if (globalThis.document?.getElementById("counter")) page();

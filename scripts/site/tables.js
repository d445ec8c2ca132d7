// The pages that draw the committed tables: fidelity, training and evaluation.
import { choice, figureBox, load, make, onColours, palette, percent, plot } from "./common.js";

const groups = (rows, key) => Map.groupBy ? Map.groupBy(rows, key)
  : rows.reduce((found, row) => found.set(key(row), [...(found.get(key(row)) ?? []), row]), new Map());
const median = (values) => { const s = [...values].sort((a, b) => a - b), h = s.length >> 1; return s.length % 2 ? s[h] : (s[h - 1] + s[h]) / 2; };
const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;

// ---------------------------------------------------------------- fidelity

const FLOOR = 1e-7; // what a float32 keeps; lossless schemes are drawn here

export async function fidelity(element) {
  const data = await load("fidelity");
  if (!data.all) { element.replaceChildren(make("p", {}, "There is no sweep in results/fidelity.")); return; }
  const state = { kind: "all", cost: "tokens" };
  const box = figureBox("Error against tokens of every scheme, the Pareto front as a line");
  const list = make("div", { class: "scroll", tabindex: "0" });
  const draw = () => {
    const { points, front } = data[state.kind], best = new Set(front[state.cost]);
    const families = [...groups(points, (p) => p.family)].map(([family, own]) => [family, own.sort((a, b) => a[state.cost] - b[state.cost])]);
    const text = (p) => `<b>${p.config}</b><br>${Math.round(p.tokens).toLocaleString("en")} tokens, ${Math.round(p.context).toLocaleString("en")} in one row`
      + `<br>NMAE ${percent(p.nmae)} in the median, ${percent(p.worst)} at worst (${p.worst_id})`;
    plot(box, () => ({
      data: [
        ...families.map(([family, own], i) => ({
          name: family, mode: "lines+markers", line: { width: 1, dash: "dot" }, opacity: own.some((p) => best.has(p.config)) ? 1 : 0.55, x: own.map((p) => p[state.cost]), y: own.map((p) => Math.max(p.nmae, FLOOR)),
          marker: { size: own.map((p) => (best.has(p.config) ? 12 : 7)), symbol: ["circle", "square", "diamond", "triangle-up", "x", "star"][i % 6],
            color: palette()[i % 10] }, text: own.map(text), hovertemplate: "%{text}<extra></extra>",
        })),
        { name: "Pareto front", mode: "lines", line: { width: 2, shape: "hv" }, hoverinfo: "skip", marker: { color: palette()[7] },
          ...(() => { const own = front[state.cost].map((name) => points.find((p) => p.config === name));
            return { x: own.map((p) => p[state.cost]), y: own.map((p) => Math.max(p.nmae, FLOOR)) }; })() },
      ],
      layout: { height: 620, hovermode: "closest", xaxis: { type: "log", title: { text: state.cost === "tokens" ? "tokens of a whole material" : "tokens in one row" } },
        yaxis: { type: "log", title: { text: "NMAE, median" }, tickformat: ".0e" } },
    }));
    list.replaceChildren(table(["scheme on the front", "tokens", "NMAE, median", "worst"], front[state.cost].map((name) => {
      const p = points.find((q) => q.config === name);
      return [name, Math.round(p[state.cost]).toLocaleString("en"), percent(p.nmae), percent(p.worst)];
    })));
  };
  element.replaceChildren(make("div", { class: "controls" },
    choice("materials", Object.entries(data).map(([kind, { points }]) => [kind, `${kind} (${points[0].materials})`]), (v) => { state.kind = v; draw(); }),
    choice("cost", [["tokens", "tokens of a material"], ["context", "tokens in one row"]], (v) => { state.cost = v; draw(); })), box, list);
  onColours(draw);
}

// ---------------------------------------------------------------- training

export async function training(element) {
  const data = await load("training");
  const held = figureBox("Held-out loss against tokens for each peak learning rate");
  const loss = figureBox("Training loss against tokens for each peak learning rate");
  const parallel = figureBox("Error of the parallel network on its training voxels against the step");
  const scaling = figureBox("Final loss of the published runs against their compute");
  const small = figureBox("Loss of small runs against their compute");
  const lines = (name) => data.causal.map(({ lr, [name]: { x, y } }) => ({ name: `${lr}`, x, y, mode: name === "loss" ? "lines" : "lines+markers",
    hovertemplate: `rate ${lr}, %{x:,} tokens: %{y:.3f} nats<extra></extra>` }));
  const draw = () => {
    plot(held, () => ({ data: lines("held_out"), layout: { xaxis: { title: { text: "real tokens" } }, yaxis: { title: { text: "held-out loss, nats a voxel" } },
      showlegend: true, legend: { title: { text: "peak rate " }, orientation: "h", y: -0.25 } } }));
    plot(loss, () => ({ data: lines("loss"), layout: { xaxis: { title: { text: "real tokens" } }, yaxis: { title: { text: "loss, nats a voxel" } },
      legend: { title: { text: "peak rate " }, orientation: "h", y: -0.25 } } }));
    plot(parallel, () => ({ data: [{ x: data.parallel.x, y: data.parallel.y, mode: "lines", hovertemplate: "step %{x}: %{y:.2%}<extra></extra>" }],
      layout: { xaxis: { title: { text: "step" } }, yaxis: { type: "log", title: { text: "NMAE on drawn voxels" }, tickformat: ".1~%", dtick: "D2" } } }));
    if (data.published.length) plot(scaling, () => compute([data.published], "run", "markers+text"));
    if (data.small.length) plot(small, () => compute([...groups(data.small, (row) => row.model).values()], "model", "lines+markers"));
  };
  const part = (title, text, box) => [make("h2", {}, title), make("p", {}, text), box];
  element.replaceChildren(
    ...part("One epoch, five learning rates", "nano, AdamW, each row seen once. Loss on rows of materials that are not trained on.", held),
    ...part("The same runs on what they train on", "A mean over eight steps.", loss),
    ...part("The parallel network", "The packaged checkpoint's own training: error on the voxels drawn for each step, a mean over forty steps.", parallel),
    ...(data.small.length ? part("Loss against compute", "Small models of one width or another on one data set, on a CPU.", small) : []),
    ...(data.published.length ? part("The published runs", "On data and tokens of their own, so their losses are not to be compared with those above.", scaling) : []));
  onColours(draw);
}

// Loss against floating-point operations, one trace a group of runs.
function compute(parts, name, mode) {
  return { data: parts.map((rows) => ({ name: rows[0][name], x: rows.map((r) => r.flops), y: rows.map((r) => r.loss), text: rows.map((r) => r[name]), mode,
    textposition: "top center", marker: { size: 8 }, hovertemplate: "%{text}: %{x:.3g} FLOPs, loss %{y:.3f}<extra></extra>" })),
  layout: { showlegend: parts.length > 1, xaxis: { type: "log", title: { text: "floating-point operations" }, exponentformat: "power" }, yaxis: { title: { text: "loss, nats" } } } };
}

// ---------------------------------------------------------------- evaluation

export async function evaluation(element) {
  const rows = await load("evaluation");
  if (!rows.length) { element.replaceChildren(make("p", {}, "There are no scores in results/.")); return; }
  const entries = [...new Set(rows.map((row) => row.entry))], kinds = [...new Set(rows.map((row) => row.kind))].sort();
  const rest = entries.filter((entry) => !/SAD|free atoms/.test(entry));
  const state = { entry: rest.find((e) => /probe|parallel/.test(e)) ?? rest[0], against: entries.find((e) => /SAD|free atoms/.test(e)) ?? entries[0], sort: 4, up: false };
  const duel = figureBox("Error of one entry against another, a point a material"), classes = figureBox("Errors by chemical class");
  const said = make("p", { class: "said", "aria-live": "polite" }), list = make("div", { class: "scroll", tabindex: "0" });
  const pairs = () => {
    const other = new Map(rows.filter((r) => r.entry === state.against).map((r) => [r.id, r.nmae]));
    return rows.filter((r) => r.entry === state.entry && other.has(r.id)).map((r) => ({ ...r, other: other.get(r.id) }));
  };
  const draw = () => {
    const own = pairs(), better = own.filter((r) => r.nmae < r.other).length;
    said.textContent = `${state.entry}: mean ${percent(mean(own.map((r) => r.nmae)))}, median ${percent(median(own.map((r) => r.nmae)))}. `
      + `${state.against}: mean ${percent(mean(own.map((r) => r.other)))}, median ${percent(median(own.map((r) => r.other)))}. `
      + `The first is better for ${better} of ${own.length} materials.`;
    const ticks = { type: "log", tickformat: ".1~%", dtick: "D2" }, span = (values) => [Math.log10(Math.min(...values) / 1.25), Math.log10(Math.max(...values) * 1.25)];
    const ends = [Math.min(...own.flatMap((r) => [r.nmae, r.other])) / 1.3, Math.max(...own.flatMap((r) => [r.nmae, r.other])) * 1.3];
    plot(duel, () => ({
      data: [{ x: ends, y: ends, mode: "lines", line: { dash: "dash", width: 1 }, marker: { color: palette()[7] }, hoverinfo: "skip", showlegend: false },
        ...kinds.map((kind, i) => { const these = own.filter((r) => r.kind === kind); return { name: kind, x: these.map((r) => r.other), y: these.map((r) => r.nmae), mode: "markers",
          marker: { size: 9, color: palette()[i], symbol: ["circle", "square", "diamond", "triangle-up", "x", "star", "cross"][i % 7] },
          text: these.map((r) => `<b>${r.formula}</b> (${r.id})`), hovertemplate: `%{text}<br>${state.entry} %{y:.2%}<br>${state.against} %{x:.2%}<extra></extra>` }; })],
      layout: { height: 520, hovermode: "closest", xaxis: { ...ticks, title: { text: `NMAE of ${state.against}` }, range: span(own.map((r) => r.other)) },
        yaxis: { ...ticks, title: { text: `NMAE of ${state.entry}` }, range: span(own.map((r) => r.nmae)) } },
    }));
    plot(classes, () => ({
      data: [[state.entry, "nmae"], [state.against, "other"]].map(([name, column]) => ({ name, type: "box", x: own.map((r) => r.kind), y: own.map((r) => r[column]), boxpoints: "all",
        jitter: 0.5, pointpos: 0, line: { width: 1 }, marker: { size: 5 }, text: own.map((r) => r.formula), hovertemplate: "%{text}: %{y:.2%}<extra></extra>" })),
      layout: { boxmode: "group", xaxis: { categoryorder: "array", categoryarray: kinds }, yaxis: { ...ticks, title: { text: "NMAE" } } },
    }));
    const cells = own.map((r) => [r.formula, r.id, r.kind, r.nmae, r.other, r.nmae / r.other]);
    cells.sort((a, b) => (a[state.sort] > b[state.sort] ? 1 : -1) * (state.up ? 1 : -1));
    list.replaceChildren(table(["formula", "id", "class", state.entry, state.against, "ratio"],
      cells.map(([a, b, c, x, y, z]) => [a, b, c, percent(x), percent(y), z.toFixed(2)]),
      (column) => { state.up = state.sort === column ? !state.up : column < 3; state.sort = column; draw(); }, state));
  };
  const reads = new Map(rows.map((row) => [row.entry, row.reads])), named = (e) => [e, reads.get(e) === "truth" ? `${e} (reads the truth)` : e];
  const first = choice("entry", rest.map(named), (v) => { state.entry = v; draw(); });
  const second = choice("against", entries.map(named), (v) => { state.against = v; draw(); });
  first.input.value = state.entry; second.input.value = state.against;
  element.replaceChildren(make("div", { class: "controls" }, first, second), said, duel,
    make("h2", {}, "By class"), classes, make("h2", {}, "Materials"), make("p", {}, `${new Set(rows.map((row) => row.id)).size} materials; scroll, or sort by a head.`), list);
  onColours(draw);
}

// A table; with `sort`, its heads are buttons.
function table(heads, rows, sort = null, state = {}) {
  const head = (text, i) => {
    if (!sort) return make("th", { scope: "col" }, text);
    const button = make("button", { type: "button" }, `${text}${state.sort === i ? (state.up ? " ▲" : " ▼") : ""}`);
    button.addEventListener("click", () => sort(i));
    return make("th", { scope: "col", "aria-sort": state.sort === i ? (state.up ? "ascending" : "descending") : "none" }, button);
  };
  return make("table", { class: "table table-sm" }, make("thead", {}, make("tr", {}, ...heads.map(head))),
    make("tbody", {}, ...rows.map((cells) => make("tr", {}, ...cells.map((cell) => make("td", {}, cell))))));
}

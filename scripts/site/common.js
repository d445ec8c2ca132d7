// What every page with plots shares: its data, its colours in both modes, and one way to draw.

const here = new URL(".", import.meta.url);

export async function load(name) {
  const answer = await fetch(new URL(`data/${name}.json`, here));
  if (!answer.ok) throw new Error(`${name}.json: ${answer.status}`);
  return answer.json();
}

export function unpack({ kind, shape, data }) {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  return { shape, values: kind === "f4" ? new Float32Array(bytes.buffer) : new Uint16Array(bytes.buffer) };
}

export const dark = () => {
  const [r, g, b] = getComputedStyle(document.body).backgroundColor.match(/[\d.]+/g).map(Number);
  return 0.3 * r + 0.6 * g + 0.1 * b < 128;
};

export const palette = () => dark()
  ? ["#6cb6ff", "#f0a35e", "#7ee0a5", "#ff8fa3", "#c3a6ff", "#e6d36b", "#5fd9d9", "#d0d7de", "#f59ad8", "#9fb3c8"]
  : ["#1f6feb", "#bc4c00", "#1a7f37", "#cf222e", "#8250df", "#7d6400", "#0b7285", "#57606a", "#bf3989", "#34495e"];

export const ink = () => (dark() ? "#dee2e6" : "#24292f");

const axis = (line) => ({ gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true });

// Draws, and redraws; `figure` returns { data, layout } for the colours of the moment.
export function plot(element, figure) {
  const { data, layout } = figure();
  const line = dark() ? "#3d444d" : "#d8dee4";
  const base = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink(), family: "system-ui, sans-serif", size: 13 },
    margin: { l: 8, r: 8, t: 8, b: 8 }, hoverlabel: { bgcolor: dark() ? "#22272e" : "#ffffff", font: { color: ink() } },
    legend: { orientation: "h", y: -0.25, yanchor: "top", x: 0, xanchor: "left" }, colorway: palette(), height: 420,
  };
  const full = { ...base, ...layout };
  for (const name of ["xaxis", "yaxis"]) full[name] = { ...axis(line), ...(layout[name] ?? {}) };
  return window.Plotly.react(element, data, full, { responsive: true, displaylogo: false, displayModeBar: false });
}

// Calls `draw` now and whenever the page changes between light and dark.
export function onColours(draw) {
  draw();
  let before = dark();
  const again = () => setTimeout(() => { if (dark() !== before) { before = dark(); draw(); } }, 120);
  const watch = new MutationObserver(again);
  for (const element of [document.documentElement, document.body, ...document.querySelectorAll("link.quarto-color-scheme")])
    watch.observe(element, { attributes: true });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
}

export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

let made = 0;

// A labelled choice; options are [value, text] pairs.
export function choice(label, options, changed) {
  const id = `choice-${made++}`;
  const select = make("select", { id, class: "form-select form-select-sm" },
    ...options.map(([value, text]) => make("option", { value }, text)));
  select.addEventListener("change", () => changed(select.value));
  return Object.assign(make("div", { class: "control" }, make("label", { for: id }, label), select), { input: select });
}

export function slider(label, min, max, step, value, changed) {
  const id = `slider-${made++}`;
  const input = make("input", { id, type: "range", min, max, step, value, class: "form-range" });
  const said = make("output", { for: id });
  input.addEventListener("input", () => changed(Number(input.value)));
  return Object.assign(make("div", { class: "control wide" }, make("label", { for: id }, label), input, said), { input, said });
}

export const figureBox = (label, extra = "") => make("div", { class: `plot ${extra}`, role: "figure", "aria-label": label });

export const percent = (share) => `${(100 * share).toPrecision(3)} %`;

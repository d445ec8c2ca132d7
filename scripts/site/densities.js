// The viewer: a crystal in space, slices of the true and the predicted density and of their difference, and tokens.
import { choice, dark, figureBox, ink, load, make, onColours, palette, percent, plot, slider, unpack } from "./common.js";
import { atomsWithImages, index, isosurface, Plane, toCartesian } from "./crystal.js";

const EDGES = [0, 1, 2, 3, 4, 5, 6, 7].flatMap((p) => [1, 2, 4].filter((bit) => !(p & bit)).map((bit) => [p, p | bit]));
const corner = (p) => [p & 1, (p >> 1) & 1, p >> 2];
const quantile = (values, q) => Float32Array.from(values).sort()[Math.min(values.length - 1, Math.floor(q * values.length))];
const KINDS = [["true", "converged (DFT)"], ["predicted", "predicted"], ["difference", "predicted − converged"]];

// A material with its densities, e/Å³, decoded from their tokens: each of a voxel's two tokens stands for one factor.
async function material(id, coarse, fine) {
  const facts = await load(`density-${id}`), tokens = { true: unpack(facts.tokens.true), predicted: unpack(facts.tokens.predicted) };
  const decoded = ({ values }) => ({ shape: facts.shape,
    values: Float32Array.from({ length: values.length / 2 }, (_, n) => coarse[values[2 * n]] * fine[values[2 * n + 1] - coarse.length] / facts.volume) });
  const fields = { true: decoded(tokens.true), predicted: decoded(tokens.predicted) };
  fields.difference = { shape: facts.shape, values: fields.predicted.values.map((v, n) => v - fields.true.values[n]) };
  const high = quantile(fields.true.values, 0.998), low = Math.max(quantile(fields.true.values, 0.002), 1e-3);
  const worst = quantile(fields.difference.values.map(Math.abs), 0.995);
  return { ...facts, fields, tokens, low, high, worst };
}

export async function densities(element) {
  const { materials: list, coarse, fine } = await load("densities"), factors = [unpack(coarse).values, unpack(fine).values];
  if (!list.length) throw new Error("no material");
  const state = { kind: "true", axis: 2, layer: 0, level: 0.3, voxel: null };
  let now;

  const space = figureBox("The crystal and a surface of equal density, in space", "space");
  const slices = Object.fromEntries(KINDS.map(([kind, name]) => [kind, figureBox(`A slice: ${name}`, "slice")]));
  const facts = make("p", { class: "said", "aria-live": "polite" });
  const tokens = make("div", { class: "tokens", "aria-live": "polite" });
  const level = slider("surface at", 0, 1, 0.01, state.level, (v) => { state.level = v; drawSpace(); });
  const layer = slider("slice", 0, 1, 1, 0, (v) => { state.layer = v; state.voxel[state.axis] = v; drawSlices(); drawSpace(); drawTokens(); });
  const kind = choice("surface of", KINDS, (v) => { state.kind = v; drawSpace(); });
  const axis = choice("across", [[2, "c"], [1, "b"], [0, "a"]], (v) => { state.axis = Number(v); reslice(); drawSlices(); drawSpace(); drawTokens(); });
  const picker = choice("material", list.map((m) => [m.id, `${m.formula} · ${m.class} · NMAE ${percent(m.nmae)}`]), pick);
  picker.classList.add("wide");

  // what the slider's 0 … 1 is stretched, so that every material has its surfaces
  const threshold = () => state.kind === "difference" ? now.worst * (0.1 + 1.4 * state.level ** 2) : now.low * (now.high / now.low) ** (0.05 + 0.9 * state.level);

  function drawSpace() {
    const value = threshold(), field = now.fields[state.kind], atoms = atomsWithImages(now.sites);
    level.said.textContent = `${state.kind === "difference" ? "±" : ""}${value.toPrecision(3)} e/Å³`;
    const place = atoms.map((atom) => toCartesian(now.lattice, atom.frac)), line = { x: [], y: [], z: [] };
    const path = (points) => { for (const p of points) { line.x.push(p?.[0] ?? null); line.y.push(p?.[1] ?? null); line.z.push(p?.[2] ?? null); } };
    for (const [p, q] of EDGES) path([toCartesian(now.lattice, corner(p)), toCartesian(now.lattice, corner(q)), null]);
    const surface = (level, color) => ({ type: "mesh3d", ...isosurface(field, level, now.lattice), color, opacity: 0.55, hoverinfo: "skip",
      lighting: { ambient: 0.55, diffuse: 0.7, specular: 0.2, roughness: 0.6 }, flatshading: false });
    const ring = [[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]].map(([u, v]) => {
      const frac = [0, 0, 0];
      frac[now.plane.first] = u; frac[now.plane.second] = v; frac[state.axis] = state.layer / now.shape[state.axis];
      return toCartesian(now.lattice, frac);
    });
    const hidden = { visible: false, showspikes: false };
    // Until the next picture, plotly looks the triangle under the mouse up in the old surface, and fails where the new one has fewer.
    const mouse = space._fullLayout?.scene?._scene?.glplot?.mouseListener;
    if (mouse) {
      mouse.enabled = false;
      requestAnimationFrame(() => requestAnimationFrame(() => { mouse.enabled = true; }));
    }
    plot(space, () => ({
      data: [
        ...(state.kind === "difference" ? [surface(value, palette()[3]), surface(-value, palette()[0])] : [surface(value, palette()[0])]),
        { type: "scatter3d", mode: "lines", ...line, line: { color: ink(), width: 2 }, hoverinfo: "skip" },
        { type: "scatter3d", mode: "lines", x: ring.map((p) => p[0]), y: ring.map((p) => p[1]), z: ring.map((p) => p[2]), line: { color: palette()[1], width: 5 }, hoverinfo: "skip" },
        { type: "scatter3d", mode: "markers+text", x: place.map((p) => p[0]), y: place.map((p) => p[1]), z: place.map((p) => p[2]), text: atoms.map((a) => a.element),
          textposition: "top center", textfont: { color: ink() }, hovertemplate: "%{text}<extra></extra>",
          marker: { size: 8, color: atoms.map((a) => a.colour), line: { color: ink(), width: 1 } } },
      ],
      layout: { showlegend: false, height: 460, margin: { l: 0, r: 0, t: 0, b: 0 }, uirevision: now.id,
        scene: { xaxis: hidden, yaxis: hidden, zaxis: hidden, aspectmode: "data", uirevision: now.id, camera: { eye: { x: 1.1, y: -1.9, z: 0.7 }, projection: { type: "orthographic" } } } },
    }));
  }

  function reslice() {
    now.plane = new Plane(now.lattice, now.shape, state.axis);
    state.layer = state.voxel[state.axis];
    Object.assign(layer.input, { max: now.shape[state.axis] - 1 });
    layer.input.value = state.layer;
  }

  function shapes() {
    const box = patchOf(state.voxel), [m, n] = [now.plane.first, now.plane.second];
    const ends = ([u, v]) => now.plane.place((box.corner[m] + u * now.patch[m] - 0.5) / now.shape[m], (box.corner[n] + v * now.patch[n] - 0.5) / now.shape[n]);
    const closed = (points) => `M${points.map((p) => p.map((v) => v.toFixed(4)).join(",")).join("L")}Z`;
    const [x, y] = now.plane.place(state.voxel[m] / now.shape[m], state.voxel[n] / now.shape[n]), r = 0.05;
    const line = (color, width, dash = "solid") => ({ color, width, dash });
    return [
      { type: "path", path: closed(now.plane.outline.slice(0, 4)), line: line("#ffffff", 1) },
      { type: "path", path: closed([[0, 0], [1, 0], [1, 1], [0, 1]].map(ends)), line: line("#ff9f43", 2, "dot") },
      { type: "circle", x0: x - r, x1: x + r, y0: y - r, y1: y + r, line: line("#ff9f43", 2) },
    ];
  }

  function drawSlices() {
    layer.said.textContent = `${"abc"[state.axis]} = ${state.layer} of ${now.shape[state.axis]}`;
    const near = atomsWithImages(now.sites).filter((atom) => {
      const gap = Math.abs(atom.frac[state.axis] - state.layer / now.shape[state.axis]);
      return Math.min(gap, 1 - gap) * now.plane.spacing < 0.15;
    });
    const key = ({ frac }) => [now.plane.first, now.plane.second].map((n) => frac[n].toFixed(4)).join();
    const atoms = [...new Map(near.map((atom) => [key(atom), atom])).values()]; // the image on the opposite face is at the same place
    const marks = atoms.map((atom) => now.plane.place(atom.frac[now.plane.first], atom.frac[now.plane.second]));
    for (const [kind, name] of KINDS) {
      const picture = now.plane.sample(now.fields[kind], state.layer), log = kind !== "difference", show = log ? 10 : 1;
      const z = log ? picture.z.map((row) => row.map((v) => Math.log10(Math.max(v, 1e-4)))) : picture.z;
      const ends = log ? [Math.log10(now.low), Math.log10(now.high)] : [-now.worst, now.worst];
      const ticks = log ? [0.03, 0.1, 0.3, 1, 3, 10, 30].filter((v) => Math.log10(v) >= ends[0] && Math.log10(v) <= ends[1]) : null;
      const [[x0, x1], [y0, y1]] = now.plane.box;
      plot(slices[kind], () => ({
        data: [
          { type: "heatmap", x: picture.x, y: picture.y, z, zmin: ends[0], zmax: ends[1], colorscale: log ? "Viridis" : [[0, "#2166ac"], [0.5, dark() ? "#22272e" : "#f7f7f7"], [1, "#b2182b"]],
            customdata: picture.z, hovertemplate: "%{customdata:.3f} e/Å³<extra></extra>",
            colorbar: { orientation: "h", thickness: 10, len: 0.9, y: -0.06, yanchor: "top", title: { text: "e/Å³", side: "bottom" },
              ...(ticks ? { tickvals: ticks.map(Math.log10), ticktext: ticks.map(String) } : { nticks: 5 }) } },
          { type: "scatter", mode: "markers+text", x: marks.map((p) => p[0]), y: marks.map((p) => p[1]), text: atoms.map((a) => a.element), textposition: "middle center", hoverinfo: "skip", cliponaxis: false,
            marker: { size: 18, color: atoms.map((a) => a.colour), line: { color: "#000000", width: 1 } }, textfont: { size: 10, color: "#000000" }, showlegend: false },
        ],
        layout: { title: { text: name, font: { size: 14 }, y: 0.98, yanchor: "top" }, height: 360, margin: { l: 12, r: 12, t: 30, b: 4 }, shapes: shapes(), dragmode: false,
          xaxis: { visible: false, range: [x0, x1], fixedrange: true }, yaxis: { visible: false, range: [y0, y1], scaleanchor: "x", fixedrange: true } },
      }));
    }
  }

  const patchOf = (voxel) => {
    const low = voxel.map((v, n) => Math.floor(v / now.patch[n]) * now.patch[n]);
    return now.patches.find((patch) => patch.corner.every((c, n) => c === low[n]));
  };

  function drawTokens() {
    const [i, j, k] = state.voxel, n = index(now.shape, i, j, k), patch = patchOf(state.voxel), [, sy, sz] = now.patch;
    const words = (array, at) => { const each = array.shape[3]; return Array.from(array.values.slice(each * at, each * at + each), (id) => `d${id}`).join(" "); };
    const total = now.patch.reduce((a, b) => a * b), own = state.voxel.map((v, d) => v - patch.corner[d]), rank = (own[0] * sy + own[1]) * sz + own[2];
    const ofPatch = (r) => words(now.tokens.true, index(now.shape, patch.corner[0] + Math.floor(r / (sy * sz)), patch.corner[1] + Math.floor(r / sz) % sy, patch.corner[2] + r % sz));
    const wanted = [...new Set([0, 1, ...[-2, -1, 0, 1, 2].map((d) => rank + d), total - 1])].filter((r) => r >= 0 && r < total).sort((a, b) => a - b);
    const row = make("pre", { tabindex: "0" }, `${patch.prompt.split("\n").filter((line) => !line.startsWith("[DENS_START]")).join("\n")}\n[DENS_START]`);
    wanted.forEach((r, place) => {
      row.append(place && r - wanted[place - 1] > 1 ? ` … ` : " ", r === rank ? make("mark", {}, ofPatch(r)) : ofPatch(r));
    });
    row.append(" [DENS_END]\n[EOS]");
    const line = (name, value, text) => make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, `${value.toPrecision(4)} e/Å³`), make("td", {}, make("code", {}, text)));
    tokens.replaceChildren(
      make("h2", {}, `Voxel (${i}, ${j}, ${k}) of ${now.shape.join(" × ")}`),
      make("table", { class: "table table-sm" }, make("tbody", {}, line("converged", now.fields.true.values[n], words(now.tokens.true, n)),
        line("predicted", now.fields.predicted.values[n], words(now.tokens.predicted, n)))),
      make("p", {}, `It is voxel ${(rank + 1).toLocaleString("en")} of ${total.toLocaleString("en")} in the patch with its corner at (${patch.corner.join(", ")}). The row that says this patch:`), row);
  }

  async function pick(id) {
    now = await material(id, ...factors);
    state.voxel = now.sites[0].frac.map((f, n) => Math.round(f * now.shape[n]) % now.shape[n]);
    reslice();
    const gain = now.nmae_free_atoms / now.nmae;
    facts.textContent = `${now.formula}, ${now.sites.length} ${now.sites.length > 1 ? "atoms" : "atom"}, ${now.electrons} valence electrons, a grid of ${now.shape.join(" × ")}. `
      + `NMAE ${percent(now.nmae)}; the sum of free atoms has ${percent(now.nmae_free_atoms)}, ${gain.toFixed(1)} times as much.`;
    drawSpace(); drawSlices(); drawTokens();
  }

  element.replaceChildren(
    make("div", { class: "controls" }, picker, kind, axis, level, layer), facts,
    make("div", { class: "viewer" }, space, tokens, ...KINDS.map(([kind]) => slices[kind])));
  const typical = [...list].sort((a, b) => a.nmae - b.nmae)[(list.length - 1) >> 1].id;
  picker.input.value = typical;
  await pick(typical);
  onColours(() => { drawSpace(); drawSlices(); });
  for (const box of Object.values(slices)) {
    const follow = ({ points }) => {
      if (!points?.length || points[0].curveNumber) return;
      const voxel = now.plane.voxel(points[0].x, points[0].y, state.layer);
      if (voxel.every((v, n) => v === state.voxel[n])) return;
      state.voxel = voxel;
      for (const other of Object.values(slices)) window.Plotly.relayout(other, { shapes: shapes() });
      drawTokens();
    };
    box.on("plotly_hover", follow);
    box.on("plotly_click", follow);
  }
}

// Geometry of a periodic grid: surfaces of equal density, slices with true angles, atoms and their images.

const at = ([nx, ny, nz], i, j, k) => (((i % nx) + nx) % nx * ny + ((j % ny) + ny) % ny) * nz + ((k % nz) + nz) % nz;
export const index = at;

export const toCartesian = (lattice, [u, v, w]) => [0, 1, 2].map((c) => u * lattice[0][c] + v * lattice[1][c] + w * lattice[2][c]);

// Six tetrahedra around a cube's diagonal; corner bits are x, y, z.
const TETRAHEDRA = [1, 3, 2, 6, 4, 5].map((a, n, ring) => [0, a, ring[(n + 1) % 6], 7]);

// The surface where values equal `level`, over one cell, borders included: vertices in Å and triangles, as mesh3d wants them.
export function isosurface({ shape, values }, level, lattice) {
  const [nx, ny, nz] = shape, [my, mz] = [ny + 1, nz + 1], total = (nx + 1) * my * mz;
  const known = new Map(), x = [], y = [], z = [], a = [], b = [], c = [];
  const corner = new Array(8), value = new Float64Array(8), place = new Float64Array(8);
  const cross = (p, q) => {
    const key = Math.min(place[p], place[q]) * total + Math.max(place[p], place[q]);
    if (!known.has(key)) {
      const t = (level - value[p]) / (value[q] - value[p]);
      const frac = corner[p].map((from, n) => (from + t * (corner[q][n] - from)) / shape[n]);
      const [px, py, pz] = toCartesian(lattice, frac);
      known.set(key, x.length);
      x.push(px); y.push(py); z.push(pz);
    }
    return known.get(key);
  };
  const triangle = (p, q, r, out) => { // turned so that its front looks down the slope
    const u = [x[q] - x[p], y[q] - y[p], z[q] - z[p]], v = [x[r] - x[p], y[r] - y[p], z[r] - z[p]];
    const facing = (u[1] * v[2] - u[2] * v[1]) * out[0] + (u[2] * v[0] - u[0] * v[2]) * out[1] + (u[0] * v[1] - u[1] * v[0]) * out[2];
    a.push(p); b.push(facing < 0 ? r : q); c.push(facing < 0 ? q : r);
  };
  for (let i = 0; i < nx; i++) for (let j = 0; j < ny; j++) for (let k = 0; k < nz; k++) {
    let above = 0;
    for (let n = 0; n < 8; n++) {
      const [ci, cj, ck] = [i + (n & 1), j + ((n >> 1) & 1), k + (n >> 2)];
      corner[n] = [ci, cj, ck];
      value[n] = values[at(shape, ci, cj, ck)];
      place[n] = (ci * my + cj) * mz + ck;
      above += value[n] > level;
    }
    if (above === 0 || above === 8) continue;
    for (const tetrahedron of TETRAHEDRA) {
      const inside = tetrahedron.filter((n) => value[n] > level), outside = tetrahedron.filter((n) => value[n] <= level);
      if (!inside.length || !outside.length) continue;
      const middle = (set) => toCartesian(lattice, [0, 1, 2].map((d) => set.reduce((sum, n) => sum + corner[n][d], 0) / set.length / shape[d]));
      const from = middle(inside), to = middle(outside), out = to.map((v, d) => v - from[d]);
      if (inside.length === 1) triangle(...outside.map((n) => cross(inside[0], n)), out);
      else if (outside.length === 1) triangle(...inside.map((n) => cross(n, outside[0])), out);
      else {
        const [p, q] = inside, [r, s] = outside, ring = [cross(p, r), cross(p, s), cross(q, s), cross(q, r)];
        triangle(ring[0], ring[1], ring[2], out);
        triangle(ring[0], ring[2], ring[3], out);
      }
    }
  }
  return { x, y, z, i: a, j: b, k: c };
}

// Atoms in one cell, those on its border at every place of it.
export function atomsWithImages(sites) {
  const found = [];
  for (const { element, colour, frac } of sites) {
    const choices = frac.map((f) => (f < 1e-3 ? [f, f + 1] : f > 1 - 1e-3 ? [f - 1, f] : [f]));
    for (const u of choices[0]) for (const v of choices[1]) for (const w of choices[2]) found.push({ element, colour, frac: [u, v, w] });
  }
  return found;
}

// A plane across lattice vector `axis`: the two others drawn with their true lengths and angle.
export class Plane {
  constructor(lattice, shape, axis) {
    this.axis = axis;
    [this.first, this.second] = [0, 1, 2].filter((n) => n !== axis);
    this.shape = shape;
    const length = (v) => Math.hypot(...v), dot = (u, v) => u.reduce((sum, n, i) => sum + n * v[i], 0);
    const p = lattice[this.first], q = lattice[this.second];
    this.p = length(p);
    this.q = [dot(p, q) / this.p, Math.sqrt(length(q) ** 2 - (dot(p, q) / this.p) ** 2)];
    const corners = [[0, 0], [1, 0], [1, 1], [0, 1]].map(([u, v]) => this.place(u, v));
    this.outline = [...corners, corners[0]];
    this.box = [0, 1].map((d) => [Math.min(...corners.map((c) => c[d])), Math.max(...corners.map((c) => c[d]))]);
    const area = { p: lattice[(axis + 1) % 3], q: lattice[(axis + 2) % 3] };
    const normal = [0, 1, 2].map((d) => area.p[(d + 1) % 3] * area.q[(d + 2) % 3] - area.p[(d + 2) % 3] * area.q[(d + 1) % 3]);
    this.spacing = Math.abs(dot(normal, lattice[axis])) / length(normal); // Å between a plane and its next image
  }

  place(u, v) { return [u * this.p + v * this.q[0], v * this.q[1]]; } // Å in the plane

  fraction(x, y) { const v = y / this.q[1]; return [(x - v * this.q[0]) / this.p, v]; }

  voxel(x, y, layer) { // the grid point next to a place
    const [u, v] = this.fraction(x, y), found = [0, 0, 0];
    for (const [n, f] of [[this.first, u], [this.second, v]]) found[n] = ((Math.round(f * this.shape[n]) % this.shape[n]) + this.shape[n]) % this.shape[n];
    found[this.axis] = layer;
    return found;
  }

  // Values on a rectangle of pixels, between grid points by bilinear interpolation; outside the cell its images go on.
  sample({ shape, values }, layer, pixels = 110) {
    const [[x0, x1], [y0, y1]] = this.box, step = Math.max(x1 - x0, y1 - y0) / pixels;
    const nx = Math.round((x1 - x0) / step), ny = Math.round((y1 - y0) / step);
    const [m, n] = [shape[this.first], shape[this.second]], get = (i, j) => {
      const where = [0, 0, 0];
      where[this.first] = i; where[this.second] = j; where[this.axis] = layer;
      return values[at(shape, ...where)];
    };
    const xs = Array.from({ length: nx + 1 }, (_, i) => x0 + i * step), ys = Array.from({ length: ny + 1 }, (_, j) => y0 + j * step);
    const zs = ys.map((y) => xs.map((x) => {
      const [u, v] = this.fraction(x, y), s = u * m, t = v * n, i = Math.floor(s), j = Math.floor(t), f = s - i, g = t - j;
      return (1 - f) * ((1 - g) * get(i, j) + g * get(i, j + 1)) + f * ((1 - g) * get(i + 1, j) + g * get(i + 1, j + 1));
    }));
    return { x: xs, y: ys, z: zs };
  }
}

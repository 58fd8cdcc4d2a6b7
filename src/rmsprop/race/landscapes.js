// The landscapes of landscapes.py and their gradients in the order of autograd's operations, and a run down one of
// them. `data` holds what Python writes into the page: the rows of LANDSCAPES and the turns of whole degrees.
"use strict";
const lands = ((data) => {
  // The quadratic in rotated coordinates; every ravine is one, and at angle 0 so is the straight one.
  function ravine(k, angle) {
    const [c, s] = data.turns[angle];
    return {
      f: (x, y) => { const u = c * x + s * y, w = c * y - s * x; return 0.5 * (u * u + k * w * w); },
      slope(x, y, g) {
        const u = c * x + s * y, kw = k * (c * y - s * x);
        g[0] = c * u - s * kw;
        g[1] = s * u + c * kw;
      },
      start: [-4 * c - s, c - 4 * s],
    };
  }

  const others = {
    rosenbrock: {
      f: (x, y) => { const a = 1 - x, b = y - x * x; return a * a + 100 * (b * b); },
      slope(x, y, g) {
        const b = 100 * (2 * (y - x * x));
        g[0] = -2 * (b * x) - 2 * (1 - x);
        g[1] = b;
      },
    },
    beale: {
      f(x, y) {
        const a = 1.5 - x + x * y, b = 2.25 - x + x * (y * y), c = 2.625 - x + x * (y * y * y);
        return a * a + b * b + c * c;
      },
      slope(x, y, g) {
        const a = 2 * (1.5 - x + x * y), b = 2 * (2.25 - x + x * (y * y)), c = 2 * (2.625 - x + x * (y * y * y));
        g[0] = c * (y * y * y) - c + b * (y * y) - b + a * y - a;
        g[1] = c * x * (3 * (y * y)) + b * x * (2 * y) + a * x;
      },
    },
    saddle: {
      f: (x, y) => { const e = y * y - 1; return 0.5 * x * x + 0.25 * (e * e); },
      slope(x, y, g) {
        g[0] = x;
        g[1] = 2 * (0.25 * (2 * (y * y - 1)) * y);
      },
    },
    d2l: {
      f: (x, y) => 0.1 * x * x + 2 * y * y,
      slope(x, y, g) {
        g[0] = 2 * (0.1 * x);
        g[1] = 4 * y;
      },
    },
  };

  // Return a landscape by name: its row, its loss f(x, y) and its gradient slope(x, y, g), which is written to g.
  function find(name, condition, angle) {
    const row = data.lands[name];
    return { ...row, name, ...(row.ravine ? ravine(condition, angle) : others[name]) };
  }

  // Return the two numbers of noise of step t, which counts from 1; see noise() in landscapes.py.
  function noise(seed, t) {
    const pair = [0, 0];
    for (let k = 0; k < 24; k++)
      pair[k < 12 ? 0 : 1] += mix(mix(Math.imul(24 * (t - 1) + k, 0x9e3779b1) ^ seed) ^ 0x85ebca6b) / 2 ** 32;
    return [pair[0] - 6, pair[1] - 6];
  }

  function mix(x) {
    x = Math.imul(x ^ (x >>> 16), 0x7feb352d);
    x = Math.imul(x ^ (x >>> 15), 0x846ca68b);
    return (x ^ (x >>> 16)) >>> 0;
  }

  // Run an optimizer from a point. `way` is "rmsprop", "sgd", "momentum" or "adam"; `each(t, seen)` is called with
  // what a step of RMSprop computed. A run ends where it leaves the landscape, as in landscapes.py.
  function descend(land, { way, rule, hyper, start, steps, seed = 0, kick = 0, target = 0, each = null }) {
    const p = Float64Array.from(start), g = new Float64Array(2);
    const maker = way === "adam" ? engine.adam : engine.sgd;
    const state = way === "rmsprop" ? engine.start(rule, hyper, p) : maker.start(hyper, p);
    const xs = new Float64Array(steps + 1), ys = new Float64Array(steps + 1), losses = new Float64Array(steps + 1);
    [xs[0], ys[0], losses[0]] = [p[0], p[1], land.f(p[0], p[1])];
    const [left, right, low, high] = land.window, [mx, my] = [(left + right) / 2, (low + high) / 2];
    const reach = 1e6 * Math.max(right - left, high - low);
    let divergedAt = null, targetAt = null, settledAt = null, last = steps;
    for (let t = 1; t <= steps; t++) {
      land.slope(p[0], p[1], g);
      if (land.noise) {
        const tilt = noise(seed, t);
        g[0] += land.noise * tilt[0];
        g[1] += land.noise * tilt[1];
      }
      if (t === kick) { g[0] *= 30; g[1] *= 30; }
      if (way === "rmsprop") {
        const seen = each ? {} : undefined;
        engine.step(rule, hyper, p, g, state, seen);
        each?.(t, seen);
      } else maker.step(hyper, p, g, state);
      if (!(Math.max(Math.abs(p[0] - mx), Math.abs(p[1] - my)) <= reach)) {
        [divergedAt, last] = [t, t - 1];
        break;
      }
      const loss = land.f(p[0], p[1]);
      [xs[t], ys[t], losses[t]] = [p[0], p[1], loss];
      if (loss < target) { targetAt ??= t; settledAt ??= t; } else settledAt = null;
    }
    return { xs, ys, losses, last, divergedAt, targetAt, settledAt };
  }

  return { find, noise, descend };
})(data);

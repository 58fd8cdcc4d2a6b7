// The equation of RMSprop in IEEE doubles, with the numbers of spec.py: the body that the live page runs. Beside it
// are SGD, momentum and Adam in the order of torch's operations.
//
// A rule and its numbers (`hyper`) have the names of spec.Rule and spec.Hyper; the warm-up "timm" of [10] is the one
// that is missing. A state has torch's names. `p`, `g` and every slot are arrays of one length; `step` changes `p`
// and the state, and never `g`. Where `seen` is an object, the values of each line are kept in it for the reader.
"use strict";
const engine = (() => {
  const slots = (rule, hyper) => [
    "square_avg",
    ...(rule.centered ? ["grad_avg"] : []),
    ...(rule.momentum ? ["momentum_buffer"] : []),
    ...(hyper.average ? ["ema"] : []),
  ];

  // Return the state before the first step. The average of [10] starts at p.
  function start(rule, hyper, p) {
    const state = { step: 0 };
    for (const slot of slots(rule, hyper)) state[slot] = new Float64Array(p.length);
    state.square_avg.fill(rule.square_avg_init ?? 0);
    if (state.ema) state.ema.set(p);
    return state;
  }

  // Make one step in place.
  function step(rule, hyper, p, g, state, seen) {
    const { lr, alpha, eps } = hyper;
    const wd = hyper.weight_decay ?? 0, mu = hyper.momentum ?? 0, mode = rule.weight_decay_mode ?? "l2";
    const bounded = hyper.max_update != null, cap = bounded ? hyper.max_update : Infinity;
    const shrinking = mode === "corrected" && hyper.reference_lr ? ((lr * lr) / hyper.reference_lr) * wd : lr * wd;
    const carried = Math.sqrt((2 - alpha) / (1 - alpha));
    const t = ++state.step;
    const c = rule.bias_correction ? 1 - api.power(alpha, t) : 1;
    const decay = hyper.average ? decayAt(hyper.average, t) : null;
    for (let i = 0; i < p.length; i++) {
      let x = p[i], grad = g[i], m = 0, b = 0;
      // [1] decay
      if (rule.maximize) grad = -grad;
      if (wd !== 0) {
        if (mode === "l2") grad = grad + wd * x;
        else if (mode === "l1") grad = grad + wd * (Math.sign(x) + 0); // + 0: the sign of -0 is 0
        else x = x - shrinking * x;
      }
      // [2] second moment: under max_update it at most doubles
      const before = state.square_avg[i], most = 2 * before;
      let v = alpha * before + (1 - alpha) * grad * grad;
      const spike = bounded && v > most && most > 0 && Number.isFinite(grad);
      if (spike) v = most;
      state.square_avg[i] = v;
      // [3] first moment: of a spike, the part that doubles v
      if (rule.centered) {
        const entering = spike ? (grad < 0 ? -1 : 1) * (carried * Math.sqrt(most / 2)) : grad;
        m = alpha * state.grad_avg[i] + (1 - alpha) * entering;
        state.grad_avg[i] = m;
      }
      // [4] bias
      const vh = v / c, mh = m / c;
      // [5] variance
      const w = rule.centered ? Math.max(vh - mh * mh, 0) : vh;
      // [6] denominator
      let d;
      if (rule.eps_mode === "outside") d = Math.sqrt(w) + eps;
      else if (rule.eps_mode === "inside") d = Math.sqrt(w + eps);
      else if (rule.eps_mode === "both") d = Math.sqrt(w + eps) + eps;
      else d = Math.max(Math.sqrt(w), eps);
      // [7] direction
      let u = clip(grad === 0 && d === 0 ? 0 : grad / d, cap);
      const direction = u;
      if (rule.momentum) {
        // [8] momentum
        if (rule.lr_in_buffer) u = lr * u;
        b = mu * state.momentum_buffer[i] + u;
        state.momentum_buffer[i] = b;
        u = rule.nesterov ? u + mu * b : b;
        if (bounded) u = clip(u, rule.lr_in_buffer ? cap * Math.abs(lr) : cap);
      }
      // [9] parameter
      const moved = rule.momentum && rule.lr_in_buffer ? u : lr * u;
      x = x - moved;
      if (hyper.clip_weights != null) x = clip(x, hyper.clip_weights);
      if (seen) {
        const line = { from: p[i], g: grad, old: before, v, m, c, vh, mh, w, d, u: direction, b, move: u, moved, p: x };
        for (const name in line) (seen[name] ??= [])[i] = line[name];
      }
      p[i] = x;
      // [10] average
      if (decay !== null) state.ema[i] = decay * state.ema[i] + (1 - decay) * x;
    }
  }

  // Bound a number by ±cap; NaN stays.
  const clip = (x, cap) => Math.min(Math.max(x, -cap), cap);

  // Return d of [10] at step t, or null where the step does not average. See spec.Averaging.
  function decayAt({ decay, warmup = null, start = 0, interval = 1 }, t) {
    if (t <= start) return 0;
    const k = Math.floor((t - start) / interval);
    if ((t - start) % interval) return null;
    if (warmup === "tensorflow") return Math.min(decay, (1 + k) / (10 + k));
    if (warmup !== null) throw new Error(`ema_warmup ${warmup} is not computed here`);
    return k > 1 ? decay : 0;
  }

  // Return alpha to the power of t > 0, rounded once: squaring in pairs of doubles keeps twice the digits. Math.pow
  // may be off by one unit, and by another one in each browser. Below 1e-290, where 1 - power is 1, the digits end.
  function power(alpha, t) {
    let [high, low, square, rest] = [1, 0, alpha, 0];
    for (let n = t; ; [square, rest] = product(square, rest, square, rest)) {
      if (n % 2) [high, low] = product(high, low, square, rest);
      n = Math.floor(n / 2);
      if (n === 0) return high + low;
    }
  }

  // Return the product of two pairs of doubles as a pair, after Dekker, Numerische Mathematik 18, 1971.
  function product(a, aRest, b, bRest) {
    const p = a * b;
    const a1 = 134217729 * a - (134217729 * a - a), a2 = a - a1;
    const b1 = 134217729 * b - (134217729 * b - b), b2 = b - b1;
    const e = a1 * b1 - p + a1 * b2 + a2 * b1 + a2 * b2 + (a * bRest + aRest * b);
    const sum = p + e;
    return [sum, e - (sum - p)];
  }

  // torch.optim.SGD; with `momentum` it keeps a buffer, which starts as the first gradient.
  const sgd = {
    start: (hyper, p) => (hyper.momentum ? { step: 0, momentum_buffer: new Float64Array(p.length) } : { step: 0 }),
    step(hyper, p, g, state) {
      const first = state.step++ === 0;
      for (let i = 0; i < p.length; i++) {
        let b = g[i];
        if (hyper.momentum) state.momentum_buffer[i] = b = first ? b : hyper.momentum * state.momentum_buffer[i] + b;
        p[i] = p[i] - hyper.lr * b;
      }
    },
  };

  // torch.optim.Adam with its defaults: betas 0.9 and 0.999, eps 1e-8.
  const adam = {
    start: (hyper, p) => ({ step: 0, exp_avg: new Float64Array(p.length), exp_avg_sq: new Float64Array(p.length) }),
    step({ lr, beta1 = 0.9, beta2 = 0.999, eps = 1e-8 }, p, g, state) {
      const t = ++state.step;
      const size = lr / (1 - api.power(beta1, t)), root = Math.sqrt(1 - api.power(beta2, t));
      for (let i = 0; i < p.length; i++) {
        const m = (state.exp_avg[i] += (1 - beta1) * (g[i] - state.exp_avg[i]));
        const v = (state.exp_avg_sq[i] = state.exp_avg_sq[i] * beta2 + (1 - beta2) * g[i] * g[i]);
        p[i] = p[i] + (-size * m) / (Math.sqrt(v) / root + eps);
      }
    },
  };

  const api = { slots, start, step, power, decayAt, sgd, adam };
  return api;
})();

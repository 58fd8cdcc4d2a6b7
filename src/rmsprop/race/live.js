// The live page: its settings, its controls and its pictures. engine.js computes the steps, landscapes.js the runs.
"use strict";
const live = (() => {
  const $ = (id) => document.getElementById(id);
  const WAYS = ["rmsprop", "second", "sgd", "momentum", "adam"];
  const SWITCHES = { mode: "eps_mode", init: "square_avg_init", bias: "bias_correction", centered: "centered",
    nesterov: "nesterov", buffer: "lr_in_buffer" };
  const still = matchMedia("(prefers-reduced-motion: reduce)");

  // ---- settings: `now` holds them; the fragment holds those that differ from the landscape's own ----

  const PLAIN = { land: "ravine", condition: 100, angle: 0, x: null, y: null, seed: 0, steps: null, lr: null,
    memory: 10, eps: 1e-8, momentum: 0, mode: "outside", init: 0, bias: false, centered: false, nesterov: false,
    buffer: false, first: "torch", other: "", lr2: null, eps2: null, lr_sgd: null, lr_momentum: null, lr_adam: null,
    hidden: "", kick: 0, t: null };
  let now = { ...PLAIN }, runs = {}, lines = [], land, target, playing = 0, theme = "", kept = {};
  const once = (name, make) => (kept[name] ??= make()); // for what does not depend on the step shown
  const shown = { panels: null, controls: null };

  // Return the rate that the landscape suggests; those that a condition number limits are inversely proportional to it.
  function suggested(way, { land: name, condition }) {
    const row = data.lands[name];
    return row.over[way] ? round(row.over[way] / condition) : row.lrs[way];
  }
  const round = (x, digits = 12) => Number(x.toPrecision(digits));
  const plainStart = (s) => lands.find(s.land, s.condition, s.angle).start;
  const alphaOf = (s) => round(1 - 1 / s.memory, 9);
  const rate = (way) => now[way === "rmsprop" ? "lr" : "lr_" + way] ?? suggested(way, now);
  const stepsOf = (s) => s.steps ?? data.lands[s.land].steps;
  const startOf = (s) => (s.x === null ? plainStart(s) : [s.x, s.y]);

  // Read settings from a fragment such as #land=ravine&lr=0.1; what does not fit is left at its default.
  function read(fragment) {
    const given = Object.fromEntries(new URLSearchParams(fragment.replace(/^#/, "")));
    const s = { ...PLAIN };
    if (given.land === "tilted-ravine") {
      Object.assign(given, { land: "ravine", angle: given.angle ?? "45" });
      for (const [way, lr] of Object.entries(data.tilted.lrs)) // those of the ravine follow its condition number
        if (lr !== data.lands.ravine.lrs[way]) given["lr_" + way] ??= String(lr);
    }
    for (const name in PLAIN) {
      if (!(name in given)) continue;
      const text = given[name], number = Number(text), kind = typeof (PLAIN[name] ?? 0);
      if (kind === "boolean") s[name] = text === "1" || text === "true";
      else if (kind === "number" && text !== "" && Number.isFinite(number)) s[name] = number;
      else if (kind === "string") s[name] = text;
    }
    if (!Object.hasOwn(data.lands, s.land)) s.land = PLAIN.land;
    if (!data.modes.includes(s.mode)) s.mode = PLAIN.mode;
    for (const name of ["first", "other"]) if (s[name] && !Object.hasOwn(data.dialects, s[name])) s[name] = PLAIN[name];
    for (const [name, [low, high]] of Object.entries(data.ranges)) if (s[name] !== null) {
      s[name] = Math.min(Math.max(s[name], low), high);
      if (data.whole.includes(name)) s[name] = Math.round(s[name]);
    }
    for (const name of ["lr", "lr2", "lr_sgd", "lr_momentum", "lr_adam"]) if (!(s[name] > 0)) s[name] = null;
    if ((s.x === null) !== (s.y === null)) s.x = s.y = null;
    if (!data.lands[s.land].ravine) s.angle = 0;
    const own = s.first ? switches(s.first, s) : {};
    if (given.first && !Object.keys(SWITCHES).some((name) => name in given)) Object.assign(s, own);
    else if (Object.keys(own).some((name) => own[name] !== s[name])) s.first = "";
    shown.panels = given.figure ? given.figure.split(",") : null;
    shown.controls = given.controls ? given.controls.split(",") : [];
    theme = given.theme ?? theme;
    return s;
  }

  // Return the fragment of the settings.
  function fragment() {
    const query = new URLSearchParams();
    for (const name in PLAIN) {
      const value = now[name];
      if (value !== PLAIN[name]) query.set(name, typeof value === "boolean" ? Number(value) : value);
    }
    if (shown.panels) query.set("figure", shown.panels.join(","));
    if (shown.controls.length) query.set("controls", shown.controls.join(","));
    if (theme) query.set("theme", theme);
    return query.toString().replaceAll("%2C", ",");
  }
  const address = () => location.href.replace(/#.*/, "") + "#" + fragment();

  // Return the page's switches that a framework's rule has with these numbers.
  function switches(name, s) {
    const row = data.dialects[name], rule = { ...row.rule }, mu = momentumOf(name, s);
    for (const { setting, then } of row.when)
      if (setting === "momentum" ? mu : rule[setting]) Object.assign(rule, then);
    const own = Object.fromEntries(Object.entries(SWITCHES).map(([ours, theirs]) => [ours, rule[theirs]]));
    return { ...own, init: row.starts_at_eps ? s.eps : own.init };
  }

  // Return the momentum that a framework makes of the number; some have none.
  const momentumOf = (name, s) => (data.dialects[name]?.lacks.includes("momentum") ? 0 : s.momentum);

  // Return what engine.js takes, given switches and numbers.
  const entry = (on, lr, eps, mu) => ({
    way: "rmsprop",
    rule: { eps_mode: on.mode, square_avg_init: on.init, bias_correction: on.bias, centered: on.centered,
      nesterov: on.nesterov && mu > 0, lr_in_buffer: on.buffer, momentum: mu > 0 },
    hyper: { lr, alpha: alphaOf(now), eps, momentum: mu },
  });
  function entrant(way) {
    if (way === "rmsprop") return entry(now, rate(way), now.eps, momentumOf(now.first, now));
    if (way === "second") {
      const eps = now.eps2 ?? now.eps;
      return entry(switches(now.other, { ...now, eps }), now.lr2 ?? rate("rmsprop"), eps, momentumOf(now.other, now));
    }
    return { way, hyper: { lr: rate(way), ...(way === "momentum" ? { momentum: 0.9 } : {}) } };
  }
  const racing = () => WAYS.filter((w) => (w === "second" ? now.other : !now.hidden.split(",").includes(w)));
  const labels = () => ({ rmsprop: now.other ? data.dialects[now.first]?.short ?? "RMSprop" : "RMSprop",
    second: data.dialects[now.other]?.short, sgd: "SGD", momentum: "SGD momentum", adam: "Adam" });

  function compute() {
    land = lands.find(now.land, now.condition, now.angle);
    const start = startOf(now), steps = stepsOf(now);
    target = data.target * land.f(...start);
    lines = [];
    kept = {};
    const common = { start, steps, seed: now.seed, kick: now.kick, target };
    runs = {};
    for (const way of [...new Set(["rmsprop", ...racing()])])
      runs[way] = lands.descend(land, { ...entrant(way), ...common,
        each: way === "rmsprop" ? (t, seen) => (lines[t] = seen) : null });
    now.t = Math.min(now.t ?? Math.min(12, steps), steps);
  }

  // Change settings, and draw all that depends on them.
  function set(changes) {
    const turned = "angle" in changes && now.x !== null && data.lands[now.land].ravine;
    if (turned) {
      const by = ((changes.angle - now.angle) * Math.PI) / 180, [c, s] = [Math.cos(by), Math.sin(by)];
      changes = { ...changes, x: round(c * now.x - s * now.y, 6), y: round(s * now.x + c * now.y, 6) };
    }
    Object.assign(now, changes);
    if (Object.keys(changes).some((name) => name in SWITCHES)) now.first = "";
    else if (now.first && Object.keys(changes).some((name) => ["first", "momentum", "eps"].includes(name)))
      Object.assign(now, switches(now.first, now));
    compute();
    if (["land", "angle", "condition"].some((name) => name in changes)) look();
    draw();
    later();
  }
  function seek(t) {
    now.t = Math.min(Math.max(Math.round(t), 0), stepsOf(now));
    drawMoving();
    later();
  }
  let saving = 0;
  function later() {
    clearTimeout(saving);
    saving = setTimeout(() => {
      try { history.replaceState(null, "", "#" + fragment()); } catch { /* a page without an address of its own */ }
    }, 150);
  }

  // ---- numbers and axes ----

  const UP = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };
  const power10 = (k) => "10" + [...String(k)].map((c) => UP[c]).join("");
  function show(x, digits = 3) {
    if (!Number.isFinite(x)) return Number.isNaN(x) ? "NaN" : x < 0 ? "−∞" : "∞";
    if (x === 0) return "0";
    const size = Math.abs(x);
    if (size >= 1e-3 && size < 1e5) return String(round(x, digits)).replace("-", "−");
    const [digitsOf, exponent] = round(x, digits).toExponential().split("e");
    return digitsOf.replace("-", "−") + "·" + power10(Number(exponent));
  }
  const tickName = (k) => (k >= -3 && k <= 4 ? String(round(10 ** k)) : power10(k));
  const line = (x1, y1, x2, y2, cls) => `<line x1="${x1}" y1="${y1}" x2="${x2}" y2="${y2}" class="${cls}"/>`;
  const text = (x, y, words, more = "") => `<text x="${x}" y="${y}" ${more}>${words}</text>`;
  const svg = (w, h, label, body) => `<svg viewBox="0 0 ${w} ${h}" height="${h}" role="img" aria-label="${label}">${body}</svg>`;
  const poly = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");

  // A scale from numbers to pixels, linear or logarithmic; numbers beyond its ends are drawn at the ends.
  function scale(low, high, from, to, log = false) {
    const f = log ? Math.log10 : (x) => x, a = f(low), b = f(high);
    const at = (x) => {
      const share = log && !(x > 0) ? 0 : (f(x) - a) / (b - a);
      return from + (to - from) * Math.min(Math.max(Number.isNaN(share) ? 1 : share, 0), 1);
    };
    at.back = (pixel) => { const v = a + ((pixel - from) / (to - from)) * (b - a); return log ? 10 ** v : v; };
    return at;
  }
  function linearTicks(low, high, count) {
    const raw = (high - low) / count, unit = 10 ** Math.floor(Math.log10(raw));
    const size = [1, 2, 5, 10].map((d) => d * unit).find((d) => d >= raw);
    const ticks = [];
    for (let k = Math.ceil(low / size); k * size <= high * (1 + 1e-9); k++) ticks.push(round(k * size));
    return ticks;
  }
  // The whole decades between two numbers, at most `most` of them.
  function decades(low, high, most = 7) {
    const a = Math.ceil(Math.log10(low) - 1e-9), b = Math.floor(Math.log10(high) + 1e-9);
    const every = Math.max(1, Math.ceil((b - a + 1) / most));
    return Array.from({ length: Math.max(b - a + 1, 0) }, (_, i) => a + i).filter((k) => k % every === 0);
  }
  // Draw the grid, the ticks and the names of both axes.
  function axes({ x, y, xs, ys, box: [left, top, right, bottom], xname, yname }) {
    let s = "";
    for (const [value, name] of xs) s += line(x(value), top, x(value), bottom, "tick") + text(x(value), bottom + 15, name, 'text-anchor="middle"');
    for (const [value, name] of ys) s += line(left, y(value), right, y(value), "tick") + text(left - 6, y(value) + 4, name, 'text-anchor="end"');
    s += line(left, bottom, right, bottom, "axis") + text(right, bottom + 31, xname, 'text-anchor="end"');
    return s + text(0, top - 9, yname, "");
  }
  const dash = (way) => (data.looks[way].dash ? `stroke-dasharray="${data.looks[way].dash}"` : "");
  const sign = (way, x, y, r = 5.5) => `<path class="mark ${way}" d="${{
    circle: `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0z`,
    square: `M${x - r} ${y - r}h${2 * r}v${2 * r}h${-2 * r}z`,
    up: `M${x} ${y - r * 1.2}L${x + r * 1.1} ${y + r}H${x - r * 1.1}z`,
    down: `M${x} ${y + r * 1.2}L${x + r * 1.1} ${y - r}H${x - r * 1.1}z`,
    diamond: `M${x} ${y - r * 1.3}L${x + r * 1.3} ${y}L${x} ${y + r * 1.3}L${x - r * 1.3} ${y}z`,
  }[data.looks[way].sign]}"/>`;
  // Push labels apart so that none covers another. Each is [y, ...]; they keep their order.
  function apart(items, gap, low, high) {
    const sorted = [...items].sort((a, b) => a[0] - b[0]);
    sorted.forEach((item, i) => { if (i) item[0] = Math.max(item[0], sorted[i - 1][0] + gap); });
    const over = sorted.length ? sorted.at(-1)[0] - high : 0;
    if (over > 0) sorted.at(-1)[0] -= over;
    for (let i = sorted.length - 2; i >= 0; i--) sorted[i][0] = Math.max(low, Math.min(sorted[i][0], sorted[i + 1][0] - gap));
    return items;
  }

  // ---- the landscape ----

  const view = { w: 0, h: 0, unit: 1, x0: 0, y0: 0 };
  const px = (x) => (x - view.x0) * view.unit, py = (y) => view.h - (y - view.y0) * view.unit;

  // Choose the part of the plane to show: the landscape's window and the start, at equal scales on both axes. Around a
  // start far away the view reaches as far on the other side of the nearest minimum, where a run that overshoots goes.
  function look() {
    const box = $("view"), canvas = box.firstElementChild;
    kept = {};
    view.w = box.clientWidth;
    if (!view.w) return; // not shown
    view.h = Math.round(Math.min(Math.max(view.w * (shown.panels ? 0.6 : 0.58), 250), 540));
    let [left, right, low, high] = land.window;
    if (land.ravine && now.angle) {
      const [c, s] = data.turns[now.angle];
      const corners = [[left, low], [left, high], [right, low], [right, high]].map(([u, v]) => [c * u - s * v, s * u + c * v]);
      [left, right] = [Math.min(...corners.map((p) => p[0])), Math.max(...corners.map((p) => p[0]))];
      [low, high] = [Math.min(...corners.map((p) => p[1])), Math.max(...corners.map((p) => p[1]))];
    }
    const [x, y] = startOf(now);
    if (x < left || x > right || y < low || y > high) {
      const pad = 0.06, far = ([a, b]) => Math.hypot(a - x, b - y);
      const [mx, my] = land.minima.reduce((one, other) => (far(other) < far(one) ? other : one));
      const [dx, dy] = [Math.abs(x - mx) * (1 + pad), Math.abs(y - my) * (1 + pad)];
      [left, right] = [Math.min(left, mx - dx), Math.max(right, mx + dx)];
      [low, high] = [Math.min(low, my - dy), Math.max(high, my + dy)];
    }
    view.unit = Math.min(view.w / (right - left), view.h / (high - low));
    view.x0 = (left + right) / 2 - view.w / view.unit / 2;
    view.y0 = (low + high) / 2 - view.h / view.unit / 2;
    canvas.style.height = view.h + "px";
    paint(canvas);
  }

  // Paint bands and contours of the loss, evenly spaced in its logarithm. The lowest lies far enough above the
  // minimum to be wider than a pixel, so that no valley breaks up into beads.
  function paint(canvas) {
    if (!view.w) return;
    const { w, h, unit, x0, y0 } = view, dpr = Math.min(devicePixelRatio || 1, 2), LEVELS = 14;
    canvas.width = Math.round(w * dpr);
    canvas.height = Math.round(h * dpr);
    const style = getComputedStyle(canvas), part = (css) => css.match(/[\d.]+/g).map(Number);
    const [deep, high, ink] = [style.color, style.backgroundColor, style.outlineColor].map(part);
    const GRID = 2, across = Math.ceil(w / GRID) + 1, down = Math.ceil(h / GRID) + 1; // a value for every second pixel
    const values = new Float64Array(across * down);
    let top = 0;
    for (let j = 0, i = 0; j < down; j++)
      for (let k = 0; k < across; k++, i++) {
        values[i] = land.f(x0 + (k * GRID) / unit, y0 + (h - j * GRID) / unit);
        if (values[i] > top) top = values[i];
      }
    const image = new ImageData(across, down), floor = Math.log10(top) - LEVELS / 4;
    const words = new Uint32Array(image.data.buffer); // a pixel each, blue, green and red above each other
    const ramp = Array.from({ length: LEVELS }, (_, level) => {
      const [r, g, b] = deep.map((c, i) => Math.round(c + (high[i] - c) * (level / (LEVELS - 1))));
      return ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
    });
    for (let i = 0; i < values.length; i++) {
      const level = (values[i] = Math.max((Math.log10(values[i]) - floor) * 4, 0)); // 0 to LEVELS
      words[i] = ramp[Math.min(Math.floor(level), LEVELS - 1)];
    }
    const raster = new OffscreenCanvas(across, down), pen = canvas.getContext("2d");
    raster.getContext("2d").putImageData(image, 0, 0);
    pen.scale(dpr, dpr);
    pen.drawImage(raster, -GRID / 2, -GRID / 2, across * GRID, down * GRID);
    pen.strokeStyle = `rgba(${ink.slice(0, 3)}, .7)`;
    pen.lineWidth = 0.8;
    pen.beginPath();
    for (let j = 0; j + 1 < down; j++)
      for (let k = 0; k + 1 < across; k++) {
        const i = j * across + k, a = values[i], b = values[i + 1], c = values[i + across + 1], d = values[i + across];
        const highest = Math.min(Math.max(a, b, c, d), LEVELS - 1e-9);
        for (let level = Math.max(1, Math.ceil(Math.min(a, b, c, d))); level <= highest; level++) {
          const [x, y] = [k * GRID, j * GRID], at = (from, to) => GRID * ((level - from) / (to - from)), ends = [];
          if (a < level !== b < level) ends.push(x + at(a, b), y);
          if (b < level !== c < level) ends.push(x + GRID, y + at(b, c));
          if (c < level !== d < level) ends.push(x + at(d, c), y + GRID);
          if (d < level !== a < level) ends.push(x, y + at(a, d));
          for (let e = 0; e + 3 < ends.length; e += 4) {
            pen.moveTo(ends[e], ends[e + 1]);
            pen.lineTo(ends[e + 2], ends[e + 3]);
          }
        }
      }
    pen.stroke();
  }

  // Return a path's pixels from step `from` to `to`; far outside the view they are cut off at a distance.
  function pixels(run, from, to) {
    const far = 20 * (view.w + view.h), cut = (v) => Math.min(Math.max(v, -far), far), points = [];
    for (let t = from; t <= Math.min(to, run.last); t++) points.push([cut(px(run.xs[t])), cut(py(run.ys[t]))]);
    return points;
  }
  const inside = ([x, y]) => x >= 0 && x <= view.w && y >= 0 && y <= view.h;

  function drawLand() {
    if (!view.w) return;
    const { w, h } = view, t = now.t, names = labels(), order = [...racing()].reverse(), tags = [];
    const whole = once("whole", () => Object.fromEntries(order.map((way) => [way, pixels(runs[way], 0, Infinity)])));
    const out = once("out", () => Object.fromEntries(order.map((way) => [way, leaving(way, whole[way])])));
    let s = once("ground", () => ground(order, whole));
    for (const way of order) {
      const done = whole[way].slice(0, t + 1), head = done.at(-1);
      s += `<path class="under" d="${poly(done)}"/><path class="track ${way}" ${dash(way)} data-way="${way}" d="${poly(done)}"/>`;
      s += out[way];
      if (!inside(head)) continue;
      s += sign(way, ...head);
      tags.push([head[1] + 4, head[0] + 10, way]);
    }
    s += ellipse();
    const part = parting();
    if (part?.t) {
      const [x, y] = pixels(runs.rmsprop, part.t, part.t)[0];
      s += `<circle cx="${x}" cy="${y}" r="9" fill="none" class="now"/>`;
    }
    for (const [y, x, way] of apart(tags, 15, 16, h - 8)) {
      const end = x > w - 110;
      s += text(end ? x - 20 : x, y, names[way], `class="name halo ${way}"${end ? ' text-anchor="end"' : ""}`);
    }
    const [x, y] = startOf(now).map((v, i) => (i ? py(v) : px(v)));
    s += `<g class="handle" id="start" tabindex="0" role="slider" aria-label="Start; the arrow keys move it"
      aria-valuenow="${round(startOf(now)[0], 4)}" aria-valuetext="${startOf(now).map((v) => show(v)).join(", ")}" transform="translate(${x} ${y})">
      <circle r="20"/><path d="M-3 -9h6v6h6v6h-6v6h-6v-6h-6v-6h6z"/></g>`;
    s += text(w - 8, 18, "", 'text-anchor="end" class="halo" id="under"');
    const focused = document.activeElement?.id === "start";
    $("view").lastElementChild.innerHTML = s;
    if (focused) $("start").focus({ preventScroll: true });
  }
  // Draw what lies under the paths: ticks, minima, and the whole paths, faint.
  function ground(order, whole) {
    const { w, h } = view;
    let s = "";
    for (const value of linearTicks(view.x0, view.x0 + w / view.unit, w / 90)) {
      const x = px(value);
      if (x > 24 && x < w - 30) s += line(x, h, x, h - 5, "now") + text(x, h - 9, show(value), 'text-anchor="middle" class="halo"');
    }
    for (const value of linearTicks(view.y0, view.y0 + h / view.unit, h / 70)) {
      const y = py(value);
      if (y > 24 && y < h - 24) s += line(0, y, 5, y, "now") + text(9, y + 4, show(value), 'class="halo"');
    }
    s += text(w - 8, h - 9, "w₁", 'text-anchor="end" class="halo strong"') + text(9, 18, "w₂", 'class="halo strong"');
    for (const [x, y] of land.minima) s += star(px(x), py(y), "minimum");
    for (const way of order) s += `<path class="track ahead ${way}" ${dash(way)} d="${poly(whole[way])}"/>`;
    return s;
  }
  function star(x, y, label) {
    const points = Array.from({ length: 10 }, (_, i) => [x + (i % 2 ? 4 : 9) * Math.sin((i * Math.PI) / 5), y - (i % 2 ? 4 : 9) * Math.cos((i * Math.PI) / 5)]);
    return `<path d="${poly(points)}z" fill="var(--star)" stroke="#111"><title>${label}</title></path>`;
  }
  // Mark the places where a path leaves the view.
  function leaving(way, points) {
    let s = "", count = 0;
    for (let i = 1; i < points.length && count < 6; i++) {
      if (!inside(points[i - 1]) || inside(points[i])) continue;
      const [[a, b], [c, d]] = [points[i - 1], points[i]];
      const share = Math.min(c < 0 ? a / (a - c) : c > view.w ? (view.w - a) / (c - a) : 1, d < 0 ? b / (b - d) : d > view.h ? (view.h - b) / (d - b) : 1);
      const degrees = (Math.atan2(d - b, c - a) * 180) / Math.PI;
      s += `<path class="mark ${way} out" d="M1 0L-9 -5V5z" transform="translate(${a + share * (c - a)} ${b + share * (d - b)}) rotate(${degrees})"><title>leaves the view</title></path>`;
      count++;
    }
    return s;
  }
  // Draw the rates of both weights as an ellipse around the point before step t: a gradient of this length, in any
  // direction, would make a step that ends on it. The dotted circle is one rate for both.
  function ellipse() {
    const seen = lines[now.t];
    if (!seen || racing()[0] !== "rmsprop") return "";
    const [x, y] = pixels(runs.rmsprop, now.t - 1, now.t - 1)[0], g = seen.g, length = Math.hypot(...g);
    const rates = rate2(seen), move = [-seen.moved[0], -seen.moved[1]];
    if (!inside([x, y]) || !(length > 0) || !rates.every(Number.isFinite)) return "";
    const R = Math.min(58, view.w / 7), unit = R / Math.max(...rates.map((r) => r * length), Math.hypot(...move));
    const arrow = (dx, dy, cls, name) => {
      const size = Math.hypot(dx, dy), [ex, ey] = [x + dx, y + dy], [ux, uy] = [dx / size, dy / size];
      const head = `M${ex} ${ey}L${ex - 9 * ux + 4 * uy} ${ey - 9 * uy - 4 * ux}L${ex - 9 * ux - 4 * uy} ${ey - 9 * uy + 4 * ux}z`;
      const [tx, ty] = [ex + 12 * ux, ey + 12 * uy + 4];
      return `<path class="${cls}" stroke="currentColor" stroke-width="2.4" fill="currentColor" d="M${x} ${y}L${ex - 7 * ux} ${ey - 7 * uy}"/><path class="${cls}" fill="currentColor" d="${head}"/>` +
        (name && text(tx, ty, name, `class="halo strong" text-anchor="${ux > 0.3 ? "start" : ux < -0.3 ? "end" : "middle"}"`));
    };
    return `<g id="ellipse"><circle cx="${x}" cy="${y}" r="${R}" fill="none" class="now" stroke-dasharray="1 4"/>
      <ellipse cx="${x}" cy="${y}" rx="${Math.max(rates[0] * length * unit, 1)}" ry="${Math.max(rates[1] * length * unit, 1)}" class="rmsprop" fill="currentColor" fill-opacity=".22" stroke="currentColor"/>` +
      arrow((-g[0] / length) * R, (g[1] / length) * R, "", "−g") + arrow(move[0] * unit, -move[1] * unit, "rmsprop", "") + "</g>";
  }
  // Return the effective rate of each weight, lr/d, with lr/ε at most where v is 0.
  const rate2 = (seen) => seen.d.map((d) => rate("rmsprop") / d);

  // ---- the other pictures ----

  function drawLoss() {
    const box = $("loss"), { w, h, edge, x, body } = once("loss", () => losses(box.clientWidth));
    box.innerHTML = svg(w, h, "Loss at each step", body + line(x(now.t), edge[1], x(now.t), edge[3], "now"));
    box.onpointerdown = box.onpointermove = (event) => {
      if (event.buttons) { stop(); seek(x.back(event.clientX - box.getBoundingClientRect().left)); }
    };
  }
  function losses(w) {
    const h = 190, steps = stepsOf(now), first = runs.rmsprop.losses[0];
    let low = target / 3, high = first * 3;
    for (const way of racing()) for (let t = 0; t <= runs[way].last; t++) {
      low = Math.min(low, Math.max(runs[way].losses[t], first * 1e-6));
      high = Math.max(high, Math.min(runs[way].losses[t], first * 1e3));
    }
    const edge = [46, 26, w - 112, h - 34], x = scale(0, steps, edge[0], edge[2]), y = scale(low / 1.5, high * 1.5, edge[3], edge[1], true);
    let s = axes({ x, y, box: edge, xs: linearTicks(0, steps, Math.max(2, w / 110)).filter(Number.isInteger).map((v) => [v, v]),
      ys: decades(low / 1.5, high * 1.5, 5).map((k) => [10 ** k, tickName(k)]), xname: "step", yname: "loss" });
    s += line(edge[0], y(target), edge[2], y(target), "now") + text(edge[0] + 4, y(target) - 5, "target", 'class="halo"');
    const tags = [], names = labels();
    for (const way of [...racing()].reverse()) {
      const run = runs[way], points = [];
      for (let t = 0; t <= run.last; t++) points.push([x(t), y(run.losses[t])]);
      s += `<path class="track ${way}" ${dash(way)} stroke-width="1.8" d="${poly(points)}"/>`;
      const [least, most] = [low / 1.5, high * 1.5], beyond = run.divergedAt !== null || run.losses[run.last] > most;
      const out = (t, below) => `<path class="mark ${way} out" d="${below ? "M0 8L5 -1H-5z" : "M0 -8L5 1H-5z"}" transform="translate(${x(t)} ${below ? edge[3] : edge[1]})"><title>continues beyond the axis</title></path>`;
      for (let t = 1; t <= run.last; t++) {
        if (run.losses[t] < least && run.losses[t - 1] >= least) s += out(t, true);
        if (run.losses[t] > most && run.losses[t - 1] <= most) s += out(t, false);
      }
      if (run.divergedAt !== null) s += out(run.last, false);
      tags.push([beyond ? edge[1] : points.at(-1)[1] + 4, way]);
    }
    for (const [ty, way] of apart(tags, 14, edge[1] + 4, edge[3] + 4)) s += text(edge[2] + 8, ty, names[way], `class="name ${way}"`);
    return { w, h, edge, x, body: s };
  }

  // A run stays below the target if it is below it for the last tenth of the steps at least.
  const settled = (run) => run.settledAt !== null && run.last - run.settledAt >= run.last / 10;
  function drawResults() {
    const names = labels(), rows = WAYS.filter((way) => way !== "second" || now.other).map((way) => {
      const run = runs[way], on = racing().includes(way);
      const swatch = `<svg class="swatch ${way}" viewBox="0 0 34 14"><line x1="0" y1="7" x2="34" y2="7" stroke-width="2.2" ${dash(way)}/>${sign(way, 17, 7, 4.5)}</svg>`;
      const box = way === "second" ? "" : `<input type="checkbox" data-show="${way}" ${on ? "checked" : ""}>`;
      const lr = way === "second" ? now.lr2 ?? rate("rmsprop") : rate(way);
      const input = `<input type="number" step="any" min="0" data-rate="${way === "second" ? "lr2" : way === "rmsprop" ? "lr" : "lr_" + way}" value="${round(lr, 6)}" aria-label="lr of ${names[way]}">`;
      const cells = !on || !run ? ["", "", ""] : run.divergedAt !== null ? [`diverged at ${run.divergedAt}`, "–", "–"]
        : [run.targetAt === null ? "never" : `step ${run.targetAt}`, settled(run) ? `step ${run.settledAt}` : "no", show(run.losses[run.last])];
      return `<tr><th><label>${box}${swatch}${names[way]}</label></th><td>${input}</td>${cells.map((c) => `<td>${c}</td>`).join("")}</tr>`;
    });
    $("results").tBodies[0].innerHTML = rows.join("");
    $("target").innerHTML = `The target is a loss of ${show(target)}, a thousandth of the loss at the start. Momentum is 0.9 and Adam has its defaults.` + (land.noise ? " The losses exclude the noise." : "");
  }

  const QUANTITIES = [["|g|", (s, i) => Math.abs(s.g[i])], ["√v", (s, i) => Math.sqrt(s.v[i])]];
  // Return the smallest and the largest of the quantities of both weights, over all steps.
  function range(quantities) {
    let low = Infinity, high = 0;
    for (const s of lines) if (s) for (const [, f] of quantities) for (const i of [0, 1]) {
      const value = f(s, i);
      if (value > 0 && Number.isFinite(value)) [low, high] = [Math.min(low, value), Math.max(high, value)];
    }
    return [low, high];
  }
  function drawBars() {
    const box = $("bars"), w = box.clientWidth, seen = lines[now.t];
    const quantities = [...QUANTITIES, ["rate lr/d", (s, i) => rate("rmsprop") / s.d[i]], ["|step|", (s, i) => Math.abs(s.moved[i])]];
    const [least, most] = once("bars", () => range(quantities)), [low, high] = [Math.max(least, most * 1e-9) / 2, most * 2];
    const edge = [78, 22, w - 70, 22 + 4 * 44], x = scale(low, high, edge[0], edge[2], true);
    let s = axes({ x, y: () => 0, box: edge, xs: decades(low, high, w / 80).map((k) => [10 ** k, tickName(k)]), ys: [], xname: "", yname: "" });
    quantities.forEach(([name, f], row) => {
      const y = edge[1] + row * 44 + 6;
      s += text(edge[0] - 10, y + 20, name, 'text-anchor="end" class="strong"');
      [0, 1].forEach((i) => {
        const value = seen ? f(seen, i) : 0, end = value > 0 ? x(value) : edge[0], top = y + i * 17;
        s += `<rect class="w${i + 1}" data-bar="${row}${i}" x="${edge[0]}" y="${top}" width="${Math.max(end - edge[0], 0)}" height="13" rx="2" fill="currentColor" ${i ? 'fill-opacity=".55" stroke="currentColor"' : ""}/>`;
        s += text(end + 6, top + 11, `${seen ? show(value) : "–"} <tspan class="name w${i + 1}">w${"₁₂"[i]}</tspan>`);
      });
    });
    box.innerHTML = svg(w, edge[3] + 26, "Gradient, root of v, effective rate and step of each weight at this step", s);
    const rates = seen ? rate2(seen) : null;
    $("bars-note").innerHTML = !seen ? "Make a step to see its numbers." :
      `The gradients of the two weights differ by a factor of <b>${show(ratio(seen.g))}</b>, their steps by <b>${show(ratio(seen.moved))}</b>. ` +
      `Each weight has its own rate lr/d: ${show(rates[0])} and ${show(rates[1])}. In the landscape, the ellipse has these rates as its axes; the arrow −g points down the gradient, and the orange one along the step.`;
  }
  const ratio = ([a, b]) => Math.max(Math.abs(a / b), Math.abs(b / a));

  function drawPhase() {
    const box = $("phase"), w = box.clientWidth, h = 300, alpha = alphaOf(now), root = Math.sqrt(1 - alpha);
    let [low, high] = once("phase", () => range(QUANTITIES));
    if (!(low <= high)) [low, high] = [0.1, 10];
    [low, high] = [Math.max(low, high * 1e-7) / 2, high * 3];
    const edge = [46, 28, w - 14, h - 38], x = scale(low, high, edge[0], edge[2], true), y = scale(low, high, edge[3], edge[1], true);
    let s = axes({ x, y, box: edge, xs: decades(low, high, w / 80).map((k) => [10 ** k, tickName(k)]),
      ys: decades(low, high, 6).map((k) => [10 ** k, tickName(k)]), xname: "|g| of the step", yname: "√v after it" });
    const at = (g) => [x(g), edge[3] + ((edge[1] - edge[3]) * Math.log(Math.max((root * g) / low, 1e-300))) / Math.log(high / low)];
    const [from, to] = [at(Math.min(low / root, high)), at(high)];
    s += `<path class="forbidden" d="${poly([from, to, [edge[2], edge[3]]])}z"/>` + line(...from, ...to, "now");
    s += text(edge[2] - 6, edge[3] - 24, "v keeps at least (1−α)g²:", 'text-anchor="end"') +
      text(edge[2] - 6, edge[3] - 8, `|g|/√v ≤ 1/√(1−α) = ${show(1 / root)}`, 'text-anchor="end"');
    for (const i of [0, 1]) {
      const points = lines.flatMap((l, t) => (l && t <= now.t && Math.abs(l.g[i]) > 0 ? [[x(Math.abs(l.g[i])), y(Math.sqrt(l.v[i]))]] : []));
      s += `<path class="track w${i + 1}" stroke-width="1.3" opacity=".7" d="${poly(points)}"/>`;
      for (const [a, b] of points.slice(-40)) s += i ? `<rect class="w2" x="${a - 2.2}" y="${b - 2.2}" width="4.4" height="4.4" fill="currentColor"/>` : `<circle class="w1" cx="${a}" cy="${b}" r="2.5" fill="currentColor"/>`;
      if (points.length) {
        const [a, b] = points.at(-1);
        s += (i ? `<rect class="mark w2" x="${a - 5}" y="${b - 5}" width="10" height="10"/>` : `<circle class="mark w1" cx="${a}" cy="${b}" r="6"/>`) +
          text(a - 10, b - 8, `w${"₁₂"[i]}`, `class="name halo w${i + 1}" text-anchor="end"`);
      }
    }
    box.innerHTML = svg(w, h, "Root of v against the gradient, for both weights", s);
    const at2 = now.kick || Math.min(now.t + 1, stepsOf(now));
    $("kick").textContent = now.kick ? `Take back the kick at step ${now.kick}` : `Kick: multiply the gradient of step ${at2} by 30`;
    $("kick").setAttribute("aria-pressed", String(now.kick > 0));
    $("phase-note").innerHTML = now.kick ? kicked() : "Each point is one step. No step can lie in the shaded corner, so no step is longer than lr/√(1−α), whatever the gradient" +
      (now.init || now.bias || now.momentum ? ", before momentum and bias correction" : "") + ". One large gradient lifts v at once; v then forgets it only as fast as α allows.";
  }
  // Describe what one large gradient does to the rates of the weights.
  function kicked() {
    const before = lines[now.kick - 1], hit = lines[now.kick];
    if (!before || !hit) return "The kick comes in the first step, so v has nothing to compare it with.";
    return [0, 1].map((i) => {
      const grown = hit.d[i] / before.d[i];
      let t = now.kick;
      while (lines[t + 1] && lines[t].d[i] > 2 * before.d[i]) t++;
      const stuck = lines[t].d[i] > 2 * before.d[i] ? `stays below half of it to the end, for ${t - now.kick} steps` : `is back at half of it after ${t - now.kick} steps`;
      return grown > 2 ? `The rate of <b>w${"₁₂"[i]}</b> falls to 1/${show(grown, 2)} and ${stuck}.` : `The rate of <b>w${"₁₂"[i]}</b> hardly changes.`;
    }).join(" ") + ` In ${Math.round(now.memory)} steps, v forgets all but a third of what it holds.`;
  }

  function drawLines() {
    const seen = lines[now.t], e = entrant("rmsprop"), { rule, hyper } = e, a = hyper.alpha, f = (x) => show(x, 5);
    const mu = rule.momentum, c = rule.bias_correction, n = (g) => (g < 0 ? `(${f(g)})` : f(g));
    const rest = round(1 - a, 9), vh = c ? "v̂" : "v", name = { outside: "√w + ε", inside: "√(w + ε)", both: "√(w + ε) + ε", floor: "max(√w, ε)" }[rule.eps_mode];
    const fill = { outside: (w) => `√${f(w)} + ${f(hyper.eps)}`, inside: (w) => `√(${f(w)} + ${f(hyper.eps)})`, both: (w) => `√(${f(w)} + ${f(hyper.eps)}) + ${f(hyper.eps)}`, floor: (w) => `max(√${f(w)}, ${f(hyper.eps)})` }[rule.eps_mode];
    const u = rule.lr_in_buffer && mu ? "lr·u" : "u";
    const rows = [
      ["1", "decay", "g", (s, i) => `g = ${f(s.g[i])}`, true],
      ["2", "second moment", "v ← α·v + (1−α)·g²", (s, i) => `${f(a)}·${f(s.old[i])} + ${f(rest)}·${n(s.g[i])}² = <b>${f(s.v[i])}</b>`, true],
      ["3", "first moment", "m ← α·m + (1−α)·g", (s, i) => (rule.centered ? `<b>${f(s.m[i])}</b>` : "off"), rule.centered],
      ["4", "bias", "v̂ ← v/(1−αᵗ)", (s, i) => (c ? `${f(s.v[i])} / ${f(s.c[i])} = <b>${f(s.vh[i])}</b>` : "off"), c],
      ["5", "variance", rule.centered ? `w ← max(${vh} − m², 0)` : `w ← ${vh}`, (s, i) => `<b>${f(s.w[i])}</b>`, true],
      ["6", "denominator", `d ← ${name}`, (s, i) => `${fill(s.w[i])} = <b>${f(s.d[i])}</b>`, true],
      ["7", "direction", "u ← g/d", (s, i) => `${f(s.g[i])} / ${f(s.d[i])} = <b>${f(s.u[i])}</b>`, true],
      ["8", "momentum", `b ← μ·b + ${u}`, (s, i) => (mu ? `<b>${f(s.b[i])}</b>` : "off"), mu],
      ["9", "parameter", rule.lr_in_buffer && mu ? `p ← p − ${rule.nesterov ? "(lr·u + μ·b)" : "b"}` : `p ← p − lr·${mu ? (rule.nesterov ? "(u + μ·b)" : "b") : "u"}`, (s, i) => `${f(s.from[i])} − ${n(s.moved[i])} = <b>${f(s.p[i])}</b>`, true],
    ];
    const head = `<tr><th>step ${now.t}</th><th></th><th class="w1"><b>w₁</b></th><th class="w2"><b>w₂</b></th></tr>`;
    $("lines").tBodies[0].innerHTML = head + rows.map(([k, title, formula, numbers, on]) =>
      `<tr class="${on ? "" : "off"}"><th>[${k}] ${title}</th><td class="number">${formula}</td>${[0, 1].map((i) => `<td class="number">${seen ? numbers(seen, i) : ""}</td>`).join("")}</tr>`).join("");
  }

  // ---- what takes many runs: computed in slices, between which the page answers ----

  const jobs = {};
  function inSlices(name, total, work, done) {
    const token = (jobs[name] = {}), begin = () => {
      const until = performance.now() + 10;
      while (token.at < total && performance.now() < until) work(token.at++);
      if (jobs[name] !== token) return;
      if (token.at < total) setTimeout(begin, 0); else done();
    };
    token.at = 0;
    setTimeout(() => jobs[name] === token && begin(), 30);
  }
  const visible = (name) => !shown.panels || shown.panels.includes(name);

  function drawTurn() {
    const box = $("turn");
    if (!land.ravine) { box.innerHTML = ""; jobs.turn = null; $("turn-note").textContent = "Choose a ravine: its angle to the axes can change."; return; }
    const [x0, y0] = startOf(now), found = {}, ways = racing(), steps = stepsOf(now);
    const [c, s] = data.turns[now.angle], flat = [c * x0 + s * y0, c * y0 - s * x0], entrants = ways.map(entrant);
    ways.forEach((way) => (found[way] = []));
    inSlices("turn", 46, (angle) => {
      const place = lands.find(now.land, now.condition, angle), [a, b] = data.turns[angle];
      const start = angle === now.angle ? [x0, y0] : [a * flat[0] - b * flat[1], b * flat[0] + a * flat[1]];
      const aim = data.target * place.f(...start);
      ways.forEach((way, i) => (found[way][angle] = lands.descend(place, { ...entrants[i], start, steps, seed: now.seed, kick: now.kick, target: aim }).targetAt));
    }, () => {
      const w = box.clientWidth, h = 230, edge = [46, 46, w - 112, h - 36], x = scale(0, 45, edge[0], edge[2]), y = scale(0, steps, edge[3], edge[1]), top = edge[1] - 16;
      let out = axes({ x, y, box: edge, xs: [0, 15, 30, 45].map((v) => [v, v + "°"]), ys: linearTicks(0, steps, 4).map((v) => [v, v]), xname: "angle of the ravine", yname: "" });
      out += text(0, 14, "step that first reaches the target") + line(edge[0], top, edge[2], top, "axis") + text(edge[0] - 6, top + 4, "never", 'text-anchor="end"');
      const tags = [], names = labels();
      for (const way of [...ways].reverse()) {
        const points = found[way].map((t, angle) => [x(angle), t === null ? top : y(t)]);
        out += `<path class="track ${way}" ${dash(way)} stroke-width="1.8" d="${poly(points)}"/>` + sign(way, ...points[now.angle]);
        tags.push([points.at(-1)[1] + 4, way]);
      }
      for (const [ty, way] of apart(tags, 14, top + 4, edge[3])) out += text(edge[2] + 8, ty, names[way], `class="name ${way}"`);
      out += line(x(now.angle), top - 6, x(now.angle), edge[3], "now");
      box.innerHTML = svg(w, h, "Steps to the target against the angle of the ravine", out);
      const [a, b] = [found.rmsprop?.[0], found.rmsprop?.[45]], say = (t) => (t === null ? "never reaches the target" : `reaches the target at step ${t}`);
      $("turn-note").innerHTML = a === undefined ? "" : `Along the axes RMSprop <b>${say(a)}</b>; turned by 45 degrees it <b>${say(b)}</b>. ${land.noise ? "The noise stays along the axes." : "SGD and momentum do not see the angle: they scale all directions alike."}`;
      box.onclick = (event) => set({ angle: Math.round(Math.min(Math.max(x.back(event.clientX - box.getBoundingClientRect().left), 0), 45)) });
    });
  }

  const LRS = Array.from({ length: 29 }, (_, i) => round(10 ** (-3 + i / 7), 2)), MEMORIES = Array.from({ length: 13 }, (_, i) => round(10 ** (i / 4), 2));
  const KINDS = { arrived: ["ends below the target", ""], hovers: ["reached it, and left again", "○"], short: ["not there yet", "·"], diverged: ["ends above the start", "×"] };
  function drawMap() {
    const box = $("map"), w = box.clientWidth, edge = [46, 26, w - 10, 26 + 13 * 17], cw = (edge[2] - edge[0]) / LRS.length, chh = (edge[3] - edge[1]) / MEMORIES.length;
    const start = startOf(now), steps = stepsOf(now), base = entrant("rmsprop"), first = land.f(...start), kinds = [];
    const here = land, where = (lr, memory) => [edge[0] + (7 * (Math.log10(lr) + 3) + 0.5) * cw, edge[3] - (4 * Math.log10(memory) + 0.5) * chh];
    inSlices("map", LRS.length * MEMORIES.length, (k) => {
      const lr = LRS[k % LRS.length], memory = MEMORIES[Math.floor(k / LRS.length)];
      const run = lands.descend(here, { ...base, hyper: { ...base.hyper, lr, alpha: round(1 - 1 / memory, 9) }, start, steps, seed: now.seed, kick: now.kick, target });
      kinds.push(run.divergedAt !== null || run.losses[run.last] > first ? "diverged" : run.losses[run.last] < target ? "arrived" : run.targetAt !== null ? "hovers" : "short");
    }, () => {
      let s = "";
      kinds.forEach((kind, k) => {
        const i = k % LRS.length, j = Math.floor(k / LRS.length), x = edge[0] + i * cw, y = edge[3] - (j + 1) * chh;
        s += `<rect class="cell ${kind}" data-cell="${k}" x="${x}" y="${y}" width="${cw}" height="${chh}"><title>lr ${LRS[i]}, memory ${MEMORIES[j]}: ${KINDS[kind][0]}</title></rect>`;
        if (KINDS[kind][1]) s += text(x + cw / 2, y + chh / 2 + 3.5, KINDS[kind][1], 'class="glyph"');
      });
      for (let k = -3; k <= 1; k++) s += text(where(10 ** k, 1)[0], edge[3] + 15, tickName(k), 'text-anchor="middle"');
      for (let k = 0; k <= 3; k++) s += text(edge[0] - 6, where(1, 10 ** k)[1] + 4, tickName(k), 'text-anchor="end"');
      s += text(edge[2], edge[3] + 31, "learning rate", 'text-anchor="end"') + text(0, 14, "memory 1/(1−α), in steps");
      const [x, y] = where(Math.min(Math.max(rate("rmsprop"), 1e-3), 10), Math.min(now.memory, 1000));
      s += `<circle cx="${x}" cy="${y}" r="7" fill="none" stroke="var(--paper)" stroke-width="5"/><circle id="here" cx="${x}" cy="${y}" r="7" fill="none" class="now" stroke-width="2.5"/>`;
      box.innerHTML = svg(w, edge[3] + 36, "The end of a run for each learning rate and memory", s);
      $("map-note").innerHTML = `After ${steps} steps: ` + Object.entries(KINDS).map(([kind, [words, glyph]]) =>
        `<svg style="display:inline-block;width:14px;vertical-align:-2px" viewBox="0 0 14 14" height="14"><rect class="cell ${kind}" width="14" height="14"/>${glyph ? text(7, 10.5, glyph, 'class="glyph"') : ""}</svg> ${words}`).join(", ") + ". The ring is the run above. Choose a cell to go there.";
    });
    box.onclick = (event) => {
      const k = event.target.dataset?.cell;
      if (k !== undefined) set({ lr: LRS[k % LRS.length], memory: MEMORIES[Math.floor(k / LRS.length)] });
    };
  }

  // ---- two frameworks, code, files ----

  // Return where the paths of the two frameworks part: by more than a hundredth of the way to the minimum.
  const parting = () => (runs.second ? once("parting", () => part(runs.rmsprop, runs.second)) : null);
  function part(a, b) {
    const [x, y] = startOf(now);
    const way = Math.min(...land.minima.map(([mx, my]) => Math.hypot(x - mx, y - my)));
    let t = null, most = 0;
    for (let k = 1; k <= Math.min(a.last, b.last); k++) {
      const gap = Math.hypot(a.xs[k] - b.xs[k], a.ys[k] - b.ys[k]) / way;
      if (gap > 0.01) t ??= k;
      most = Math.max(most, gap);
    }
    return { t, most };
  }
  function drawParting() {
    const part = parting(), lacking = [now.first, now.other].filter((name) => now.momentum && data.dialects[name]?.lacks.includes("momentum"));
    if (!part) { $("parting").textContent = now.first ? data.dialects[now.first].title + "." : "The switches above, as you set them."; return; }
    const [one, two] = [entrant("rmsprop").rule, entrant("second").rule], words = { eps_mode: "the place of ε", square_avg_init: "the start of v", bias_correction: "bias correction",
      centered: "centering", nesterov: "Nesterov", lr_in_buffer: now.momentum ? "the place of lr" : "" };
    const differ = Object.keys(words).filter((name) => words[name] && one[name] !== two[name]).map((name) => words[name]);
    $("parting").innerHTML = (differ.length ? `They differ in ${differ.join(", ")}. ` : "Their rules are the same for these numbers. ") +
      (part.t ? `<b>The paths part at step ${part.t}</b>` : "<b>The paths do not part</b>") + `: they are at most ${show(100 * part.most)} % of the way to the minimum apart.` +
      (lacking.length ? ` ${lacking.map((name) => data.dialects[name].short).join(" and ")} has no momentum.` : "") + (now.eps2 !== null ? ` ${data.dialects[now.other].short} has ε ${show(now.eps2)}.` : "");
  }

  // Return the call of this package's RMSprop that makes these steps.
  function code() {
    const row = data.dialects[now.first || "torch"], python = (x) => (typeof x === "boolean" ? (x ? "True" : "False") : typeof x === "string" ? `"${x}"` : number(x));
    const given = { lr: rate("rmsprop"), alpha: alphaOf(now), eps: now.eps };
    if ((now.momentum || row.momentum) && !row.lacks.includes("momentum")) given.momentum = now.momentum;
    const words = Object.entries(given).map(([name, value]) => `${row.words[name]}=${python(value)}`);
    if (now.first && now.first !== "torch") words.unshift(`dialect="${now.first}"`);
    else for (const [ours, theirs] of Object.entries(SWITCHES)) {
      if (now[ours] === data.dialects.torch.rule[theirs] || (["nesterov", "buffer"].includes(ours) && !now.momentum)) continue;
      words.push(`${theirs}=${python(now[ours])}`);
    }
    return `from rmsprop import RMSprop\n\noptimizer = RMSprop(params, ${words.join(", ")})`;
  }
  const number = (x) => String(x).replace(/e([+-])(\d)$/, "e$10$2");

  function csv() {
    const rows = ["optimizer,step,w1,w2,loss,g1,g2,square_avg1,square_avg2,rate1,rate2"];
    for (const way of racing()) for (let t = 0; t <= runs[way].last; t++) {
      const seen = way === "rmsprop" ? lines[t] : null, own = seen ? [...seen.g, ...seen.v, ...rate2(seen)] : Array(6).fill("");
      rows.push([labels()[way], t, runs[way].xs[t], runs[way].ys[t], runs[way].losses[t], ...own].join(","));
    }
    return rows.join("\n") + "\n";
  }
  function say(words) { $("said").textContent = words; setTimeout(() => ($("said").textContent = ""), 2500); }
  async function copy(words, what) {
    try { await navigator.clipboard.writeText(words); say(`${what} copied.`); } catch { prompt(`Copy ${what.toLowerCase()}:`, words); }
  }

  // ---- controls ----

  const SLIDERS = {
    condition: { low: 0, high: 4, log: true, get: () => now.condition, set: (v) => set({ condition: v }), least: 1, most: 1e9 },
    angle: { low: 0, high: 45, get: () => now.angle, set: (v) => set({ angle: Math.round(v) }), least: 0, most: 45, step: 1 },
    steps: { low: 0, high: 3.301, log: true, get: () => stepsOf(now), set: (v) => set({ steps: Math.round(v) }), least: 1, most: data.ranges.steps[1], step: 1 },
    lr: { low: -4, high: 1, log: true, get: () => rate("rmsprop"), set: (v) => set({ lr: v }), least: 0, most: 1e6 },
    memory: { low: 0, high: 3, log: true, get: () => now.memory, set: (v) => set({ memory: v }), least: 1, most: 1e6 },
    eps: { low: -12, high: 2, log: true, get: () => now.eps, set: (v) => set({ eps: v }), least: 0, most: 1e6 },
    momentum: { low: 0, high: 0.99, get: () => now.momentum, set: (v) => set({ momentum: v }), least: 0, most: 0.999 },
  };
  function buildControls() {
    for (const [id, spec] of Object.entries(SLIDERS)) {
      const box = $("controls").querySelector(`.slide[data-control="${id}"]`);
      box.insertAdjacentHTML("beforeend", `<input type="number" id="${id}" step="any" min="${spec.least}" max="${spec.most}">
        <input type="range" data-for="${id}" aria-label="${id}" min="${spec.low}" max="${spec.high}" step="${spec.step ?? (spec.log ? 0.02 : 0.01)}">`);
      const [typed, range] = [$(id), box.querySelector('[type="range"]')];
      range.oninput = () => spec.set(spec.log ? round(10 ** Number(range.value), 2) : round(Number(range.value), 3));
      typed.onchange = () => { const v = Number(typed.value); if (typed.value !== "" && v >= spec.least && v <= spec.most && (v > 0 || id !== "lr")) spec.set(v); else drawControls(); };
    }
    $("land").innerHTML = Object.entries(data.lands).map(([name, row]) => `<option value="${name}">${row.label}</option>`).join("");
    $("land").onchange = () => set({ ...Object.fromEntries(["x", "y", "steps", "lr", "lr2", "lr_sgd", "lr_momentum", "lr_adam", "t"].map((n) => [n, null])), kick: 0, angle: 0, land: $("land").value });
    const options = Object.entries(data.dialects).map(([name, row]) => `<option value="${name}">${row.short}</option>`).join("");
    $("first").innerHTML = '<option value="">the switches above</option>' + options;
    $("other").innerHTML = '<option value="">nothing</option>' + options;
    $("first").onchange = () => set({ first: $("first").value });
    $("other").onchange = () => set({ other: $("other").value, lr2: null, eps2: null });
    $("mode").onchange = () => set({ mode: $("mode").value });
    $("init").onchange = () => set({ init: Number($("init").value) });
    for (const name of ["bias", "centered", "nesterov", "buffer"]) $(name).onchange = () => set({ [name]: $(name).checked });
    $("seed").onchange = () => { const v = Number($("seed").value); if (Number.isInteger(v) && v >= 0 && v < 2 ** 32) set({ seed: v }); else drawControls(); };
    $("results").onchange = ({ target: input }) => {
      const { show: way, rate: name } = input.dataset;
      if (way) { const off = new Set(now.hidden.split(",").filter(Boolean)); input.checked ? off.delete(way) : off.add(way); set({ hidden: [...off].join(",") }); }
      else if (Number(input.value) > 0) set({ [name]: Number(input.value) }); else drawResults();
    };
    $("kick").onclick = () => set({ kick: now.kick ? 0 : Math.min(now.t + 1, stepsOf(now)) });
    $("copy").onclick = () => copy(code(), "Code");
    $("link").onclick = () => copy(address(), "Link");
    $("reset").onclick = () => { now = { ...PLAIN, land: now.land }; stop(); compute(); look(); draw(); later(); };
    $("csv").onclick = () => {
      const a = document.createElement("a");
      a.href = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
      a.download = `rmsprop-${now.land}.csv`;
      a.click();
      setTimeout(() => URL.revokeObjectURL(a.href), 1000);
    };
    $("theme").onclick = () => {
      const dark = theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
      theme = dark ? "light" : "dark";
      recolor();
      later();
    };
    $("go").onclick = () => (playing ? stop() : play());
    $("back").onclick = () => { stop(); seek(now.t - 1); };
    $("on").onclick = () => { stop(); seek(now.t + 1); };
    $("time").oninput = () => { stop(); seek(Number($("time").value)); };
  }
  function drawControls() {
    for (const [id, spec] of Object.entries(SLIDERS)) {
      const value = spec.get(), range = document.querySelector(`[data-for="${id}"]`);
      if (document.activeElement !== $(id)) $(id).value = round(value, 6);
      if (document.activeElement !== range) range.value = spec.log ? (value > 0 ? Math.log10(value) : spec.low) : value;
    }
    if (![...$("init").options].some((o) => Number(o.value) === now.init)) $("init").add(new Option(show(now.init), now.init));
    for (const name of ["land", "mode", "init", "first", "other", "seed"]) $(name).value = String(now[name]);
    for (const name of ["bias", "centered", "nesterov", "buffer"]) $(name).checked = now[name];
    $("nesterov").disabled = $("buffer").disabled = !now.momentum;
    $("alpha").textContent = `in steps, α = ${alphaOf(now)}`;
    const part = (name, on) => document.querySelectorAll(`[data-control="${name}"]`).forEach((e) => { if (e.tagName !== "FIELDSET") e.classList.toggle("gone", !on || !allowed(name)); });
    part("condition", land.ravine); part("angle", land.ravine); part("seed", Boolean(land.noise));
    const row = data.lands[now.land];
    $("about").innerHTML = (land.ravine ? row.description.replace(/100/g, show(now.condition)) + (now.angle ? ` Turned by ${now.angle} degrees.` : "") : row.description) + ` Both axes have the same scale.`;
    const usual = !Object.keys(PLAIN).some((n) => !["land", "t", "hidden", "other", "first", "angle", "eps2", "lr2"].includes(n) && now[n] !== PLAIN[n] && !(n.startsWith("lr") && now[n] === row.lrs[n.slice(3) || "rmsprop"]));
    const tilted = data.tilted, turnedRates = now.angle === 45 && ["adam", "sgd", "momentum"].every((w) => Math.abs(rate(w) / tilted.lrs[w] - 1) < 1e-9) && now.land === "ravine" && now.condition === 100 && now.x === null;
    $("lesson").textContent = turnedRates ? tilted.lesson : usual && !now.angle ? row.lesson : "";
  }
  const allowed = (name) => !shown.panels || shown.controls.includes(name);

  // ---- playing, dragging, keys ----

  function play() {
    if (now.t >= stepsOf(now)) now.t = 0;
    let last = null, exact = now.t;
    const speed = Math.max(stepsOf(now) / 8, 8), pause = still.matches ? 500 : 0;
    const frame = (at) => {
      if (!playing) return;
      if (last === null) last = at;
      if (at - last >= pause) {
        exact += ((at - last) / 1000) * speed;
        last = at;
        if (Math.floor(exact) !== now.t) seek(Math.floor(exact));
      }
      if (now.t >= stepsOf(now)) stop(); else playing = requestAnimationFrame(frame);
    };
    playing = requestAnimationFrame(frame);
    $("go").textContent = "❚❚ Pause";
  }
  function stop() {
    cancelAnimationFrame(playing);
    playing = 0;
    $("go").textContent = "▶ Play";
  }
  function move(x, y) {
    const keep = (v) => Math.min(Math.max(round(v, 4), -1000), 1000);
    if (land.f(keep(x), keep(y)) > 0) set({ x: keep(x), y: keep(y) });
  }
  function buildView() {
    const overlay = $("view").lastElementChild;
    let dragging = false;
    const place = (event) => { const r = overlay.getBoundingClientRect(); return [view.x0 + (event.clientX - r.left) / view.unit, view.y0 + (r.bottom - event.clientY) / view.unit]; };
    overlay.addEventListener("pointerdown", (event) => {
      if (!event.target.closest("#start")) return;
      dragging = true;
      overlay.setPointerCapture(event.pointerId);
      overlay.style.touchAction = "none";
      event.preventDefault();
      $("start").focus({ preventScroll: true });
    });
    overlay.addEventListener("touchmove", (event) => dragging && event.preventDefault(), { passive: false });
    overlay.addEventListener("touchstart", (event) => event.target.closest("#start") && event.preventDefault(), { passive: false });
    overlay.addEventListener("pointermove", (event) => {
      const [x, y] = place(event);
      if (dragging) move(x, y);
      else if ($("under")) $("under").textContent = `loss ${show(land.f(x, y))} at ${show(x)}, ${show(y)}`;
    });
    overlay.addEventListener("pointerleave", () => { if ($("under")) $("under").textContent = ""; });
    for (const name of ["pointerup", "pointercancel"]) overlay.addEventListener(name, () => { dragging = false; overlay.style.touchAction = ""; });
    overlay.addEventListener("dblclick", () => { look(); drawLand(); });
    addEventListener("keydown", (event) => {
      const aim = event.target, arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
      if (event.altKey || event.ctrlKey || event.metaKey) return;
      if (arrows && aim.closest?.("#start")) {
        const by = (event.shiftKey ? 40 : 8) / view.unit, [x, y] = startOf(now);
        event.preventDefault();
        move(x + arrows[0] * by, y + arrows[1] * by);
      } else if (aim.closest?.("input, select, textarea")) return;
      else if (event.key === "ArrowLeft" || event.key === "ArrowRight") { event.preventDefault(); stop(); seek(now.t + arrows[0]); }
      else if (event.key === "Home" || event.key === "End") { event.preventDefault(); stop(); seek(event.key === "Home" ? 0 : Infinity); }
      else if (event.key === " " && !aim.closest?.("button, a")) { event.preventDefault(); playing ? stop() : play(); }
    });
  }

  // ---- drawing ----

  const PANELS = { land: drawLand, loss: drawLoss, bars: drawBars, phase: drawPhase, lines: drawLines };
  function drawMoving() {
    for (const [name, draw] of Object.entries(PANELS)) if (visible(name)) draw();
    const time = $("time");
    time.max = stepsOf(now);
    time.value = now.t;
    $("clock").textContent = `step ${now.t} of ${stepsOf(now)}`;
  }
  function draw() {
    drawMoving();
    drawResults();
    drawControls();
    drawParting();
    $("code").textContent = code();
    if (visible("turn")) drawTurn();
    if (visible("map")) drawMap();
  }
  function recolor() {
    if (theme) document.documentElement.dataset.theme = theme; else delete document.documentElement.dataset.theme;
    paint($("view").firstElementChild);
  }
  // Show only the panels and controls that the fragment names; all without `figure=`.
  function frame() {
    const only = shown.panels;
    document.documentElement.classList.toggle("figure", Boolean(only));
    for (const e of document.querySelectorAll("[data-panel]")) e.classList.toggle("gone", Boolean(only) && !only.includes(e.dataset.panel));
    for (const e of document.querySelectorAll("[data-control]")) {
      const named = allowed(e.dataset.control) || (e.tagName === "FIELDSET" && e.dataset.control === "land");
      e.classList.toggle("gone", !named);
    }
    for (const e of document.querySelectorAll("header, footer")) e.classList.toggle("gone", Boolean(only));
    $("controls").classList.toggle("gone", Boolean(only) && !shown.controls.length);
  }
  function open(fragmentText) {
    stop();
    now = read(fragmentText);
    compute();
    frame();
    if (theme) document.documentElement.dataset.theme = theme;
    look();
    draw();
  }

  buildControls();
  buildView();
  const opened = () => (location.hash.length > 1 ? location.hash : data.preset);
  open(opened());
  addEventListener("hashchange", () => open(opened()));
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; look(); draw(); } });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolor);
  return { open, settings: () => ({ ...now }), runs: () => runs, lines: () => lines, set, seek, fragment, code, csv, entrant, view, drawn: performance.now() };
})();

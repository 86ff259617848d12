// One line chart: SVG as wide as its place, a cursor that all charts share, values read by pointer or arrow keys.
const charts = new Set();
const CHART_HEIGHT = 168, LEFT = 46, RIGHT = 10, TOP = 8, BOTTOM = 22;

function ticks(low, high, count) {
  const raw = (high - low) / Math.max(count, 1);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((f) => f * power).find((s) => s >= raw) || raw;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

function timeTicks(high, count) {
  const nice = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400, 172800, 604800];
  const step = nice.find((s) => high / s <= count) || high / count;
  return Array.from({ length: Math.floor(high / step) + 1 }, (_, i) => i * step);
}

function tickText(value) {
  const size = Math.abs(value);
  if (size >= 1e9) return `${Number((value / 1e9).toPrecision(3))}G`;
  if (size >= 1e6) return `${Number((value / 1e6).toPrecision(3))}M`;
  if (size >= 1e4) return `${Number((value / 1e3).toPrecision(3))}k`;
  if (size && size < 1e-3) return value.toExponential(0).replace("-", "−").replace("e-", "e−");
  return String(Number(value.toPrecision(4))).replace("-", "−");
}

function clockText(value) {
  if (value < 60) return `${Number(value.toPrecision(3))} s`;
  if (value < 7200) return `${Number((value / 60).toPrecision(3))} min`;
  return `${Number((value / 3600).toPrecision(3))} h`;
}

/** The mean of each value and those before it, over a window that grows with the length of the run. */
function smoothed(values) {
  const n = values.length, window = Math.round([0, Math.max(3, n / 80), Math.max(5, n / 30), Math.max(8, n / 10)][app.smooth]);
  if (!window || n < 12) return null;
  let sum = 0, count = 0;
  return values.map((value, i) => {
    if (value !== null) { sum += value; count++; }
    const gone = i >= window ? values[i - window] : null;
    if (gone !== null) { sum -= gone; count--; }
    return value === null || !count ? null : sum / count;
  });
}

/** A curve to draw: `{label, run, name, colour, dash}` becomes its points, and the smoothed ones where it is noisy. */
function resolve(line) {
  const found = series(RUNS[line.run], line.name);
  if (!found) return null;
  const x = found.steps.map((step) => place(line.run, step));
  const dots = line.name.startsWith("eval/");
  return { ...line, x, y: found.values, steps: found.steps, smooth: dots ? null : smoothed(found.values), dots };
}

function makeChart({ title, unit, lines, note, remove }) {
  const picture = svg("svg", { class: "plot", "aria-hidden": "true" });
  const legend = el("ul", { class: "legend" });
  const at = el("span", { class: "at" });
  const frame = el("div", { class: "frame", tabindex: "0", role: "img" }, picture);
  const card = el("figure", { class: "chart" },
    el("figcaption", {}, el("span", { class: "chart-title", text: title, title: note }), unit ? el("span", { class: "unit", text: unit }) : null, at,
      el("button", { type: "button", class: "mini", "aria-label": `Enlarge ${title}`, text: "⤢", onclick: enlarge }),
      remove ? el("button", { type: "button", class: "mini", "aria-label": `Remove ${title}`, text: "×", onclick: remove }) : null),
    frame, legend);
  const chart = { card, draw, readOut, lines: [] };
  let range = null, cursor = null;

  function enlarge() {
    card.classList.toggle("wide");
    draw();
  }

  function measure() {
    const all = chart.lines.flatMap((line) => line.y.filter((v) => v !== null));
    const xs = chart.lines.flatMap((line) => [line.x[0], line.x[line.x.length - 1]]);
    let low = Infinity, high = -Infinity;
    for (const v of all) { if (v < low) low = v; if (v > high) high = v; }
    const log = app.log && low > 0;
    if (low === high) { const pad = Math.abs(low) * 0.1 || 1; low -= pad; high += pad; }
    else if (!log) {
      if (low > 0 && low < 0.35 * high) low = 0;
      const pad = (high - low) * 0.04;
      high += pad;
      if (low !== 0) low -= pad;
    }
    const width = Math.max(frame.clientWidth, 120), height = card.classList.contains("wide") ? 320 : CHART_HEIGHT;
    const x0 = Math.min(...xs), x1 = Math.max(...xs, x0 + 1e-9);
    const scale = log ? (v) => Math.log10(v) : (v) => v;
    const inner = height - TOP - BOTTOM;
    return { low, high, log, width, height, x0, x1,
      px: (x) => LEFT + ((x - x0) / (x1 - x0)) * (width - LEFT - RIGHT),
      py: (y) => TOP + (1 - (scale(y) - scale(low)) / (scale(high) - scale(low))) * inner,
      xAt: (p) => x0 + ((p - LEFT) / (width - LEFT - RIGHT)) * (x1 - x0) };
  }

  function path(x, y) {
    let text = "", pen = "M";
    for (let i = 0; i < x.length; i++) {
      if (y[i] === null) { pen = "M"; continue; }
      text += `${pen}${range.px(x[i]).toFixed(1)} ${range.py(y[i]).toFixed(1)}`;
      pen = "L";
    }
    return text;
  }

  function drawAxes() {
    const { low, high, width, height, px, py, log, x0, x1 } = range;
    let marks = log ? ticks(Math.floor(Math.log10(low)), Math.ceil(Math.log10(high)), 4).map((e) => 10 ** e).filter((v) => v >= low && v <= high) : ticks(low, high, 4);
    if (log && marks.length < 2) marks = [low, high];
    for (const value of marks) {
      picture.append(svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: py(value), y2: py(value) }));
      picture.append(svg("text", { class: "tick", x: LEFT - 6, y: py(value) + 3.5, "text-anchor": "end", text: tickText(value) }));
    }
    const count = Math.max(2, Math.floor(width / 90));
    const across = app.axis === "step" ? ticks(x0, x1, count).filter(Number.isInteger) : timeTicks(x1, count);
    for (const value of across) {
      const x = px(value);
      if (x < LEFT - 1 || x > width - RIGHT + 1) continue;
      picture.append(svg("line", { class: "stub", x1: x, x2: x, y1: height - BOTTOM, y2: height - BOTTOM + 4 }));
      const anchor = x > width - 28 ? "end" : "middle";
      picture.append(svg("text", { class: "tick", x: anchor === "end" ? width - 2 : x, y: height - 6, "text-anchor": anchor, text: app.axis === "step" ? tickText(value) : clockText(value) }));
    }
  }

  function draw() {
    chart.lines = lines.map(resolve).filter(Boolean);
    if (!chart.lines.length || !frame.isConnected) return;
    range = measure();
    picture.setAttribute("viewBox", `0 0 ${range.width} ${range.height}`);
    picture.style.height = `${range.height}px`;
    picture.replaceChildren();
    drawAxes();
    for (const line of chart.lines) {
      const shape = { stroke: line.colour, "stroke-dasharray": line.dash };
      if (line.smooth) picture.append(svg("path", { class: "line raw", d: path(line.x, line.y), stroke: line.colour }));
      picture.append(svg("path", { class: "line", d: path(line.x, line.smooth || line.y), ...shape }));
      if (line.dots || line.x.length === 1) line.x.forEach((x, i) => line.y[i] !== null && picture.append(svg("circle", { class: "dot", r: 2.8, cx: range.px(x), cy: range.py(line.y[i]), fill: line.colour })));
    }
    cursor = svg("g", { class: "cursor" });
    picture.append(cursor);
    readOut();
  }

  /** The index of the point of `line` next to `x`; of those with a value, unless `gaps` count too. */
  function nearest(line, x, gaps = false) {
    let best = -1, gap = Infinity;
    for (let i = 0; i < line.x.length; i++) {
      const d = Math.abs(line.x[i] - x);
      if ((gaps || line.y[i] !== null) && d < gap) { gap = d; best = i; }
    }
    return best;
  }

  function readOut() {
    if (!range) return;
    cursor.replaceChildren();
    const x = app.cursor;
    const shown = chart.lines.map((line) => {
      const i = nearest(line, x === null ? Infinity : x);
      const last = i < 0 ? line.y.length - 1 - [...line.y].reverse().findIndex((v) => v !== null) : i;
      return { line, i: x === null ? last : i, value: line.y[x === null ? last : i] };
    });
    at.textContent = x === null ? "" : axisText(x);
    legend.replaceChildren(...shown.map(({ line, value }) => el("li", {}, swatch(line.colour, line.dash ? "dashed" : "stroke"), el("span", { class: "name", text: line.label }), el("span", { class: "value", text: fmt(value) }))));
    frame.setAttribute("aria-label", `${title}: ${shown.map(({ line, value }) => `${line.label} ${fmt(value)}`).join(", ")} at ${x === null ? "the end" : axisText(x)}. Arrow keys move along the curve.`);
    if (x === null || x < range.x0 || x > range.x1) return;
    cursor.append(svg("line", { x1: range.px(x), x2: range.px(x), y1: TOP, y2: range.height - BOTTOM }));
    for (const { line, i, value } of shown) if (i >= 0) cursor.append(svg("circle", { r: 3.6, cx: range.px(line.x[i]), cy: range.py(value), fill: line.colour }));
  }

  function move(event) {
    const box = picture.getBoundingClientRect();
    const x = clamp(range.xAt(((event.clientX - box.left) / box.width) * range.width), range.x0, range.x1);
    const line = chart.lines.reduce((a, b) => (b.x.length > a.x.length ? b : a));
    app.cursor = line.x[nearest(line, x)] ?? x;
    emit("cursor");
  }

  function press(event) {
    const longest = chart.lines.reduce((a, b) => (b.x.length > a.x.length ? b : a));
    const n = longest.x.length, here = app.cursor === null ? n - 1 : nearest(longest, app.cursor, true);
    const stride = event.shiftKey ? Math.max(2, Math.round(n / 20)) : 1;
    const next = { ArrowLeft: here - stride, ArrowRight: here + stride, Home: 0, End: n - 1 }[event.key];
    if (event.key === "Enter") enlarge();
    else if (event.key === "Escape") { app.cursor = null; emit("cursor"); }
    else if (next !== undefined) {
      event.preventDefault();
      app.cursor = longest.x[clamp(next, 0, n - 1)];
      emit("cursor");
      announce(frame.getAttribute("aria-label").split(". Arrow")[0]);
    }
  }

  frame.addEventListener("pointermove", move);
  frame.addEventListener("pointerdown", move);
  frame.addEventListener("pointerleave", () => { app.cursor = null; emit("cursor"); });
  frame.addEventListener("keydown", press);
  let known = 0;
  new ResizeObserver(() => { if (frame.clientWidth !== known) { known = frame.clientWidth; draw(); } }).observe(frame);
  charts.add(chart);
  return chart;
}

/** The shape of a series without axes, for a tile. */
function spark(run, name) {
  const found = series(run, name);
  const values = found ? found.values.filter((v) => v !== null) : [];
  if (values.length < 3) return null;
  const low = Math.min(...values), high = Math.max(...values);
  const every = Math.ceil(values.length / 120), points = [];
  for (let i = 0; i < values.length; i += every) {
    const part = values.slice(i, i + every);
    const mean = part.reduce((a, b) => a + b, 0) / part.length;
    points.push(`${((i / (values.length - 1)) * 100).toFixed(1)},${(26 - (high > low ? (mean - low) / (high - low) : 0.5) * 24).toFixed(1)}`);
  }
  return svg("svg", { class: "spark", viewBox: "0 0 100 28", preserveAspectRatio: "none", "aria-hidden": "true" }, svg("polyline", { points: points.join(" ") }));
}
on("cursor", () => charts.forEach((chart) => chart.card.isConnected && chart.readOut()));
on("draw", () => charts.forEach((chart) => (chart.card.isConnected ? chart.draw() : charts.delete(chart))));

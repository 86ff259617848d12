// The timeline of the processes: the whole run by dominant state, and the newest stretch interval by interval.
const LANE = 20, GAP = 4, NAMES = 96;

function drawTimeline(box) {
  const area = el("div");
  box.append(area);
  kept(area, ["run"], () => {
    const line = shownRun().time.timeline;
    if (!line) return el("p", { class: "empty", text: "There is no trace of this run's processes." });
    return el("div", { class: "card" }, el("h3", { text: "Timeline" }), overviewOf(line), windowOf(line));
  });
}

/** A canvas over named lanes that is sharp on every screen and redrawn when its place or the colours change. */
function lanes(processes, label, draw) {
  const canvas = el("canvas", { tabindex: "0", role: "application", "aria-label": label });
  const height = processes.length * (LANE + GAP) + 20;
  const paint = () => {
    const width = canvas.clientWidth, ratio = devicePixelRatio || 1;
    if (!width) return;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    pen.font = "11px system-ui, sans-serif";
    draw(pen, width, height);
  };
  canvas.style.height = `${height}px`;
  let known = 0;
  new ResizeObserver(() => { if (canvas.clientWidth !== known) { known = canvas.clientWidth; paint(); } }).observe(canvas);
  for (const event of ["theme", "emphasis"]) on(event, () => canvas.isConnected && paint());
  const names = el("div", { class: "lanenames", "aria-hidden": "true" }, processes.map((process) => el("span", { text: process })));
  return { canvas, paint, node: el("div", { class: "lanes" }, names, el("div", { class: "lanebox" }, canvas)) };
}

const strength = (state) => (emphasis.state && emphasis.state !== state ? 0.15 : 1);

function scaleUnder(pen, width, height, from, to) {
  pen.fillStyle = isDark() ? "#a9b1bb" : "#565d66";
  const span = to - from, count = Math.max(2, Math.floor(width / 90));
  for (const mark of from ? ticks(from, to, count) : timeTicks(to, count)) {
    const x = ((mark - from) / span) * width;
    const text = from && span < 120 ? `${Number(mark.toFixed(4))} s` : clockText(mark);
    pen.fillRect(x, height - 18, 1, 4);
    const size = pen.measureText(text).width;
    pen.fillText(text, clamp(x - size / 2, 0, width - size), height - 3);
  }
}

function overviewOf(line) {
  const processes = Object.keys(line.bins);
  const bins = processes.map((process) => {
    const runs = line.bins[process], found = [];
    for (let i = 0; i < runs.length; i += 2) for (let n = 0; n < runs[i + 1]; n++) found.push(runs[i]);
    return found;
  });
  const length = bins[0].length, status = el("p", { class: "readout", role: "status" });
  const where = { lane: 0, bin: 0 };
  const { canvas, paint, node } = lanes(processes, "Overview of the run by process and time. Arrow keys move.", (pen, width, height) => {
    bins.forEach((row, lane) => row.forEach((state, i) => {
      if (state < 0) return;
      pen.globalAlpha = strength(line.states[state]);
      pen.fillStyle = stateColour(line.states[state]);
      const x = Math.floor((i / length) * width);
      pen.fillRect(x, lane * (LANE + GAP), Math.ceil(((i + 1) / length) * width) - x, LANE);
    }));
    pen.globalAlpha = 1;
    if (document.activeElement === canvas) mark(pen, (where.bin / length) * width, Math.max(width / length, 3), where.lane);
    scaleUnder(pen, width, height, 0, line.seconds);
  });
  function say(lane, bin) {
    const state = bins[lane]?.[bin];
    const text = state === undefined ? "" : `${processes[lane]} at ${seconds((bin / length) * line.seconds)}: mostly ${state < 0 ? "not there" : words(line.states[state])}`;
    status.textContent = text || hint;
  }
  const hint = `${seconds(line.seconds)}: each stretch has the colour of the state that took most of it.`;
  canvas.addEventListener("pointermove", (event) => say(Math.floor(event.offsetY / (LANE + GAP)), Math.floor((event.offsetX / canvas.clientWidth) * length)));
  canvas.addEventListener("pointerleave", () => { status.textContent = hint; });
  canvas.addEventListener("keydown", (event) => {
    const step = event.shiftKey ? 25 : 1;
    const [lane, bin] = { ArrowLeft: [0, -step], ArrowRight: [0, step], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -length], End: [0, length] }[event.key] || [];
    if (lane === undefined) return;
    event.preventDefault();
    where.lane = clamp(where.lane + lane, 0, processes.length - 1);
    where.bin = clamp(where.bin + bin, 0, length - 1);
    say(where.lane, where.bin);
    paint();
  });
  for (const event of ["focus", "blur"]) canvas.addEventListener(event, paint);
  status.textContent = hint;
  return el("div", {}, el("h4", { text: "The whole trace" }), node, status);
}

function mark(pen, x, width, lane) {
  pen.strokeStyle = isDark() ? "#ffffff" : "#000000";
  pen.lineWidth = 2;
  pen.strokeRect(x, lane * (LANE + GAP) + 1, Math.max(width, 3), LANE - 2);
}

function windowOf(line) {
  const processes = Object.keys(line.window);
  const intervals = processes.map((process) => {
    const flat = line.window[process], found = [];
    for (let i = 0; i < flat.length; i += 3) found.push({ state: line.states[flat[i]], begin: line.window_from + flat[i + 1] / 1e3, length: flat[i + 2] / 1e3 });
    return found;
  });
  const first = line.window_from, last = line.seconds;
  const view = { from: Math.max(first, last - (last - first) / 4), to: last };
  const chosen = { lane: 0, index: -1 };
  const status = el("p", { class: "readout", role: "status" });
  const hint = `The last ${seconds(last - first)} exactly. Drag to move, + and − to zoom (or Ctrl and the wheel), arrow keys go from interval to interval.`;
  const { canvas, paint, node } = lanes(processes, "The newest intervals of every process. Left and right go from interval to interval, up and down between processes, plus and minus zoom, Shift with arrows moves, Home shows all.", (pen, width, height) => {
    const px = (t) => ((t - view.from) / (view.to - view.from)) * width;
    intervals.forEach((row, lane) => row.forEach((interval) => {
      const x = px(interval.begin), end = px(interval.begin + interval.length);
      if (end < 0 || x > width) return;
      pen.globalAlpha = strength(interval.state);
      pen.fillStyle = stateColour(interval.state);
      const from = Math.max(x, 0), size = Math.max(Math.min(end, width) - from, 0.5);
      pen.fillRect(from, lane * (LANE + GAP), size > 2 ? size - 0.5 : size, LANE);
      if ((!emphasis.state || emphasis.state === interval.state) && size > pen.measureText(words(interval.state)).width + 8) {
        pen.fillStyle = inkOn(stateColour(interval.state));
        pen.fillText(words(interval.state), from + 4, lane * (LANE + GAP) + 14);
      }
    }));
    pen.globalAlpha = 1;
    const here = intervals[chosen.lane]?.[chosen.index];
    if (here) mark(pen, px(here.begin), px(here.begin + here.length) - px(here.begin), chosen.lane);
    scaleUnder(pen, width, height, view.from, view.to);
  });

  function show(from, to) {
    const span = clamp(to - from, 1e-3, last - first);
    view.from = clamp(from, first, last - span);
    view.to = view.from + span;
    paint();
  }
  const zoom = (factor, at = (view.from + view.to) / 2) => show(at - (at - view.from) * factor, at + (view.to - at) * factor);
  const shift = (share) => show(view.from + share * (view.to - view.from), view.to + share * (view.to - view.from));
  const at = (lane, time) => (intervals[lane] || []).findIndex((i) => i.begin <= time && time <= i.begin + i.length);
  function say() {
    const here = intervals[chosen.lane]?.[chosen.index];
    status.textContent = here ? `${processes[chosen.lane]} · ${words(here.state)} · ${seconds(here.length)} · from ${here.begin.toFixed(3)} s` : hint;
  }

  function press(event) {
    const row = intervals[chosen.lane], here = row[chosen.index];
    const middle = () => (here ? here.begin + here.length / 2 : (view.from + view.to) / 2);
    const acts = {
      "+": () => zoom(0.5, middle()), "=": () => zoom(0.5, middle()), "-": () => zoom(2, middle()), Home: () => show(first, last), Escape: () => { chosen.index = -1; },
      ArrowLeft: () => (event.shiftKey ? shift(-0.5) : step(-1)), ArrowRight: () => (event.shiftKey ? shift(0.5) : step(1)),
      ArrowUp: () => lane(-1), ArrowDown: () => lane(1),
    };
    if (!acts[event.key]) return;
    event.preventDefault();
    acts[event.key]();
    say();
    paint();
    function step(by) {
      if (!row.length) return;
      chosen.index = chosen.index < 0 ? Math.max(at(chosen.lane, (view.from + view.to) / 2), 0) : clamp(chosen.index + by, 0, row.length - 1);
      const { begin, length } = row[chosen.index], span = view.to - view.from;
      if (begin < view.from || begin + length > view.to) show(begin + length / 2 - span / 2, begin + length / 2 + span / 2);
    }
    function lane(by) {
      const time = row[chosen.index]?.begin ?? view.from;
      chosen.lane = clamp(chosen.lane + by, 0, processes.length - 1);
      chosen.index = at(chosen.lane, time);
    }
  }

  let drag = null;
  const timeAt = (event) => view.from + (event.offsetX / canvas.clientWidth) * (view.to - view.from);
  canvas.addEventListener("pointerdown", (event) => { drag = { x: event.offsetX, ...view }; canvas.setPointerCapture(event.pointerId); });
  canvas.addEventListener("pointerup", () => { drag = null; });
  canvas.addEventListener("pointercancel", () => { drag = null; });
  canvas.addEventListener("pointermove", (event) => {
    if (drag) {
      const moved = ((drag.x - event.offsetX) / canvas.clientWidth) * (drag.to - drag.from);
      return show(drag.from + moved, drag.to + moved);
    }
    chosen.lane = clamp(Math.floor(event.offsetY / (LANE + GAP)), 0, processes.length - 1);
    chosen.index = at(chosen.lane, timeAt(event));
    say();
    paint();
  });
  canvas.addEventListener("pointerleave", () => { if (!drag && document.activeElement !== canvas) { chosen.index = -1; say(); paint(); } });
  canvas.addEventListener("wheel", (event) => { if (event.ctrlKey || event.metaKey) { event.preventDefault(); zoom(event.deltaY > 0 ? 1.25 : 0.8, timeAt(event)); } }, { passive: false });
  canvas.addEventListener("keydown", press);
  status.textContent = hint;
  const button = (text, label, act) => el("button", { type: "button", class: "mini", text, "aria-label": label, onclick: act });
  return el("div", {}, el("div", { class: "tools" }, el("h4", { text: "Interval by interval" }),
    button("−", "Zoom out", () => zoom(2)), button("+", "Zoom in", () => zoom(0.5)), button("←", "Earlier", () => shift(-0.5)), button("→", "Later", () => shift(0.5)), button("all", "Show all", () => show(first, last))), node, status);
}

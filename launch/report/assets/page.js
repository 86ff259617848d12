// The page's own small language: elements, numbers, tooltips, events, and the series of a run. Data reaches the page
// through textContent alone: nothing here or elsewhere parses markup.
const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const app = { run: 0, cursor: null, axis: "step", smooth: 2, log: false };
const listeners = {};
const on = (event, act) => (listeners[event] ??= []).push(act);
const emit = (event) => (listeners[event] || []).forEach((act) => act());
const byId = (id) => document.getElementById(id);
const shownRun = () => RUNS[app.run];
const many = RUNS.length > 1;

function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  put(node, props);
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

function svg(tag, props = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  put(node, props);
  node.append(...children);
  return node;
}

function put(node, props) {
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") node.textContent = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "vars") Object.entries(value).forEach(([key, text]) => node.style.setProperty(key, text));
    else node.setAttribute(name, value === true ? "" : value);
  }
}

// --- numbers in words ---

function fmt(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e7 || size < 1e-4) return value.toExponential(2).replace("e+", "e").replace("-", "−");
  const text = size >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
  return text.replace("-", "−");
}

function seconds(value) {
  if (value === 0) return "0 s";
  if (value < 1e-3) return `${fmt(value * 1e6)} µs`;
  if (value < 1) return `${Number((value * 1e3).toPrecision(3))} ms`;
  if (value < 120) return `${Number(value.toPrecision(3))} s`;
  const whole = Math.round(value), minutes = Math.round(value / 60);
  if (value < 7200) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

const percent = (share) => (share === 0 ? "0 %" : share > 0 && share < 0.001 ? "< 0.1 %" : `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`);
const words = (name) => name.replaceAll("_", " ");
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

// --- the series of a run ---

function series(run, name) {
  const table = name.startsWith("eval/") ? run.evaluations : run.training;
  const column = table.values[name];
  if (!column) return null;
  return { steps: table.steps, values: column.length === 1 && table.steps.length > 1 ? table.steps.map(() => column[0]) : column };
}

/** The place of a step on the chosen axis: the step itself, or the seconds of training until then. */
function place(index, step) {
  const { steps, seconds: clock } = RUNS[index].training;
  if (app.axis === "step" || !clock) return step;
  let low = 0, high = steps.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle + 1;
    else high = middle;
  }
  return step <= 0 ? 0 : clock[low];
}

const axisText = (x) => (app.axis === "step" ? `step ${fmt(Math.round(x))}` : seconds(x));

// --- colours ---

const darkMode = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme || (darkMode.matches ? "dark" : "light")) === "dark";
const colour = (index) => `var(--c${index % 8})`;
const DASHES = [null, "6 3", "2 3", "8 3 2 3"];

// --- tooltip and announcements ---

function tip(lines, x, y) {
  const box = byId("tip");
  box.hidden = !lines;
  if (!lines) return;
  box.replaceChildren(...lines.map((line, i) => el("div", { text: line, class: i ? "" : "tip-head" })));
  const width = box.offsetWidth, height = box.offsetHeight;
  box.style.left = `${clamp(x + 14, 6, Math.max(6, innerWidth - width - 6))}px`;
  box.style.top = `${y + 18 + height > innerHeight ? Math.max(6, y - height - 10) : y + 18}px`;
}

const announce = (text) => { byId("live").textContent = text; };
const quiet = matchMedia("(prefers-reduced-motion: reduce)");
const goTo = (node) => node.scrollIntoView({ behavior: quiet.matches ? "auto" : "smooth", block: "start" });

/** A row of buttons of which one is pressed. */
function choice(label, options, chosen, choose) {
  const buttons = options.map(([value, text]) =>
    el("button", { type: "button", text, "aria-pressed": String(value === chosen), "data-value": value, onclick: () => set(value) }));
  function set(value) {
    buttons.forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.value === String(value))));
    choose(value);
  }
  const group = el("div", { class: "choice", role: "group", "aria-label": label }, buttons);
  group.set = set;
  return group;
}

const swatch = (fill, kind = "box") => el("span", { class: `swatch ${kind}`, "aria-hidden": "true", vars: { "--fill": fill } });
const runName = (index) => el("span", { class: "runname" }, many ? swatch(colour(index), "dot") : null, el("span", { text: RUNS[index].name }));

/** Redraws `node` with `draw` now and whenever one of `events` happens; focus stays in its place, and details stay open. */
function kept(node, events, draw) {
  const all = (what) => [...node.querySelectorAll(what)], places = "button, summary, [tabindex]";
  const again = () => {
    const focused = all(places).indexOf(document.activeElement), open = all("details").map((one) => one.open);
    node.replaceChildren(...[draw()].flat().filter(Boolean));
    all("details").forEach((one, i) => { one.open = open[i] ?? one.open; });
    if (focused >= 0) all(places)[focused]?.focus({ preventScroll: true });
  };
  events.forEach((event) => on(event, again));
  again();
  return node;
}

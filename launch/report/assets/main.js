// Puts the page together: navigation, theme, shortcuts, footer.
const SECTIONS = [["overview", "Overview"], ["curves", "Curves"], ["time", "Time"], ["completions", "Completions"], ["settings", "Settings"]];
const KEYS = [
  ["1 – 5", "go to a section"], ["t", "light or dark"], ["?", "this list"], ["/", "search completions"], ["m", "search metrics"],
  ["s", "smoothing of the curves"], ["x", "curves over steps or time"], ["j, k", "next, previous completion"], ["c", "colouring of the tokens"], ["r", "next run"],
  ["← →", "in a chart: along the curve (Shift: faster, Home, End); in a timeline: along it; in a completion: from token to token"],
  ["↑ ↓", "in the list of completions; between the processes of a timeline"], ["+ −", "zoom the timeline"], ["Enter", "enlarge a chart; from the list into a completion"], ["Esc", "close, let go"],
];

function drawNav() {
  const links = SECTIONS.map(([id, text]) => el("a", { href: `#${id}`, text }));
  byId("nav").append(...links);
  const seen = new IntersectionObserver((entries) => entries.forEach((entry) => {
    if (!entry.isIntersecting) return;
    const link = links.find((one) => one.hash === `#${entry.target.id}`);
    byId("nav").scrollLeft = link.offsetLeft - byId("nav").clientWidth / 2;
    links.forEach((one) => (one === link ? one.setAttribute("aria-current", "true") : one.removeAttribute("aria-current")));
  }), { rootMargin: "-20% 0px -70% 0px" });
  SECTIONS.forEach(([id]) => seen.observe(byId(id)));
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  document.querySelector('meta[name="color-scheme"]').content = theme;
  try { localStorage.setItem("millrace-theme", theme); } catch { /* A page from a file may have no storage. */ }
  emit("theme");
}

function drawTheme() {
  let stored = null;
  try { stored = localStorage.getItem("millrace-theme"); } catch { /* Likewise. */ }
  if (stored === "light" || stored === "dark") setTheme(stored);
  byId("theme").addEventListener("click", () => setTheme(isDark() ? "light" : "dark"));
  darkMode.addEventListener("change", () => emit("theme"));
}

function drawRunPicker() {
  const pick = byId("run");
  byId("runpick").hidden = !many;
  pick.append(...RUNS.map((run, i) => el("option", { value: String(i), text: run.name })));
  pick.addEventListener("change", () => { app.run = Number(pick.value); emit("run"); });
}

function drawHelp() {
  const box = byId("keys");
  box.append(el("h2", { id: "h-keys", text: "Keyboard" }), el("dl", {}, KEYS.filter(([key]) => many || key !== "r").flatMap(([key, text]) => [el("dt", {}, el("kbd", { text: key })), el("dd", { text })])),
    el("button", { type: "button", text: "Close", onclick: () => box.close() }));
  box.addEventListener("click", (event) => event.target === box && box.close());
  byId("help").addEventListener("click", () => box.showModal());
}

function turn(options, now) {
  return options[(options.indexOf(now) + 1) % options.length];
}

function shortcut(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("keys").open) return;
  if (event.target.matches("input, select, textarea")) {
    if (event.key !== "Escape") return;
    event.preventDefault();
    if (event.target.type === "search" && event.target.value) {
      event.target.value = "";
      event.target.dispatchEvent(new Event("input"));
    } else event.target.blur();
    return;
  }
  const section = SECTIONS[Number(event.key) - 1];
  const acts = {
    "?": () => byId("keys").showModal(), t: () => byId("theme").click(), "/": () => { goTo(byId("completions")); byId("text-search").focus({ preventScroll: true }); },
    m: () => { byId("metric-search")?.scrollIntoView({ block: "center" }); byId("metric-search")?.focus({ preventScroll: true }); },
    s: () => app.smoothing?.set(turn([0, 1, 2, 3], app.smooth)), x: () => app.axisChoice?.set(turn(["step", "time"], app.axis)),
    j: () => viewer.step_by(1), k: () => viewer.step_by(-1), c: () => viewer.modes.set(turn(MODES.map(([mode]) => mode), viewer.mode)),
    r: () => { const pick = byId("run"); pick.value = String((app.run + 1) % RUNS.length); pick.dispatchEvent(new Event("change")); announce(`Run ${shownRun().name}`); },
  };
  if (section) { goTo(byId(section[0])); byId(section[0]).querySelector("h1, h2")?.setAttribute("tabindex", "-1"); byId(section[0]).querySelector("h1, h2")?.focus({ preventScroll: true }); }
  else if (acts[event.key]) acts[event.key]();
  else return;
  event.preventDefault();
}

function drawFooter() {
  const notes = RUNS.flatMap((run) => run.notes.map((note) => (many ? `${run.name}: ${note}` : note)));
  byId("foot").append(el("h2", { text: "What this page leaves out" }), notes.length ? el("ul", {}, notes.map((text) => el("li", { text }))) : el("p", { text: "Nothing: every recorded step, interval and completion is here." }),
    el("p", { text: "Numbers are rounded to five significant digits, log-probs of tokens to hundredths of a nat. Hardware is not recorded in a run folder." }), el("p", { text: `Made by millrace report on ${DATA.made}. This page asks no network.` }));
}

drawTheme();
drawRunPicker();
drawOverview();
drawCurves();
drawTime();
drawCompletions();
drawSettings();
drawFooter();
drawHelp();
drawNav();
document.addEventListener("keydown", shortcut);
document.addEventListener("keydown", (event) => event.key === "Escape" && tip(null));
addEventListener("scroll", () => tip(null), { passive: true });

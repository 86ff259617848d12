// The curves in groups, each only where there is data; what never changes is told in a line; the rest by search.
const parts = [...new Set(RUNS.flatMap((run) => Object.keys(run.training.values)))].filter((name) => /^rewards\/.*\/mean$/.test(name));
const partName = (name) => name.replace(/^(eval\/)?rewards\//, "").replace(/\/mean$/, "");
const evaluated = [...new Set(RUNS.flatMap((run) => Object.keys(run.evaluations.values)))];
const evaluations = evaluated.filter((name) => /^eval\/rewards\//.test(name));
const passes = evaluated.filter((name) => /^eval\/pass@/.test(name));

const GROUPS = [
  ["Outcome", [
    ["Reward", "", { reward: "training", "eval/reward": "held-out" }],
    ["Reward by part", "", parts.length > 1 ? Object.fromEntries(parts.map((name) => [name, partName(name)])) : {}],
    ["Evaluations", "held-out", evaluations.length < 2 ? {} : Object.fromEntries(evaluations.map((name) => [name, partName(name)]))],
    ["Solved within k samples", "held-out", Object.fromEntries(passes.map((name) => [name, name.replace("eval/", "")]))],
    ["Spread of rewards", "standard deviation", { reward_std: "of all", reward_group_std: "within groups" }],
    ["Groups without signal", "share", { frac_reward_zero_std: "all", "frac_reward_zero_std/all_best": "all best", "frac_reward_zero_std/all_worst": "all worst" }],
    ["Advantages", "mean size", { "advantages/abs_mean": "|A|" }],
  ]],
  ["Policy", [
    ["KL to the reference", "nats a token", { kl: "KL" }],
    ["Entropy", "nats a token", { entropy: "entropy" }],
    ["Clip ratio", "share of tokens", { "clip_ratio/low_mean": "low", "clip_ratio/high_mean": "high", "clip_ratio/region_mean": "either", "clip_ratio/saturated": "saturated" }],
    ["Gradient norm", "before clipping", { grad_norm: "norm" }],
    ["Loss", "", { loss: "loss", policy_loss: "policy loss" }],
    ["Learning rate", "", { learning_rate: "learning rate" }],
  ]],
  ["Completions", [
    ["Length", "tokens", { "completions/mean_length": "mean", "completions/max_length": "longest", "completions/min_length": "shortest", "eval/mean_length": "held-out" }],
    ["Length of those that ended", "tokens", { "completions/mean_terminated_length": "mean" }],
    ["Truncated", "share", { "completions/clipped_ratio": "hit the limit", "eval/clipped_ratio": "held-out" }],
  ]],
  ["Off-policy", [
    ["Staleness", "steps", { "staleness/mean": "mean", "staleness/max": "oldest" }],
    ["Effective sample size", "share", { "importance_sampling/ess": "importance weights", "off_policy/ess": "off-policy ratio" }],
    ["Importance ratio", "", { "importance_sampling/ratio_max": "largest", "importance_sampling/mean": "mean", "importance_sampling/ratio_min": "smallest" }],
    ["Gap of log-probs, engine to learner", "nats", { "sync/logprob_gap": "mean", "sync/logprob_gap_max": "largest" }],
  ]],
  ["Speed", [
    ["Tokens a second", "", { "throughput/rollout_tokens_per_second": "sampled", "throughput/train_tokens_per_second": "trained" }],
    ["Samples a second", "", { "throughput/samples_per_second": "samples" }],
    ["Time of a step", "seconds", { "time/step": "step" }],
    ["Goodput", "share", { "goodput/work": "of the work", "goodput/time": "of the time" }],
    ["Buffer", "groups", { "buffer/in_flight": "in flight", "buffer/ready": "ready" }],
    ["Weight sync", "seconds", { "sync/seconds": "all", "sync/pause_seconds": "engines paused", "sync/transfer_seconds": "transfer", "sync/proof_seconds": "proof" }],
    ["Canary gap", "nats", { "sync/canary_gap": "gap" }],
  ]],
  ["Health", [
    ["Engines", "", { "engines/healthy": "healthy", "engines/restarts": "restarts" }],
    ["Groups by fate", "since the start", { "groups/trained": "trained", "groups/filtered": "filtered", "groups/failed": "failed", "groups/stale": "stale" }],
    ["Reward calls", "since the start", { "reward_pool/retries": "retries", "reward_pool/timeouts": "timeouts", "reward_pool/worker_restarts": "worker restarts" }],
    ["Reward workers", "", { "reward_pool/busy_frac": "busy share", "reward_pool/queue_depth": "waiting" }],
  ]],
];

/** Whether a metric had the same value in all steps, of which there are several, of all runs. */
function isStill(name) {
  const found = RUNS.map((run) => series(run, name)).filter(Boolean);
  const values = new Set(found.flatMap((one) => one.values.filter((v) => v !== null)));
  return values.size === 1 && found.some((one) => one.steps.length > 1);
}

const exists = (name) => RUNS.some((run) => series(run, name));

/** Lines of the names in every run: colours tell runs apart where there are several, names otherwise. */
function linesOf(names) {
  const there = Object.entries(names).filter(([name]) => exists(name));
  return RUNS.flatMap((run, index) => there.filter(([name]) => series(run, name)).map(([name, label], i) => ({
    run: index, name, colour: colour(many ? index : i), dash: many ? DASHES[i % 4] : null,
    label: many ? (there.length > 1 ? `${run.name} · ${label}` : run.name) : label,
  })));
}

function groupOf(heading, specs) {
  const drawn = [], still = new Map();
  for (const [title, unit, names] of specs) {
    const there = Object.entries(names).filter(([name]) => exists(name));
    const lively = Object.fromEntries(there.filter(([name]) => !isStill(name)));
    there.filter(([name]) => isStill(name)).forEach(([name]) => still.set(name, fmt(RUNS.flatMap((run) => series(run, name)?.values || []).find((v) => v !== null))));
    if (Object.keys(lively).length) drawn.push(makeChart({ title, unit, lines: linesOf(lively) }).card);
  }
  if (!drawn.length && !still.size) return null;
  const constant = still.size ? el("p", { class: "constant" }, el("span", { text: "Never changed: " }),
    [...still].flatMap(([name, value], i) => [i ? ", " : "", el("code", { text: name }), ` ${value}`])) : null;
  return el("div", { class: "group" }, el("h3", { text: heading }), drawn.length ? el("div", { class: "charts" }, drawn) : null, constant);
}

function drawCurves() {
  const box = byId("curves");
  if (!RUNS.some((run) => run.training.steps.length)) {
    box.append(el("p", { class: "empty", text: "No step is recorded yet." }));
    return;
  }
  const smoothing = choice("Smoothing", [[0, "off"], [1, "light"], [2, "medium"], [3, "strong"]], app.smooth, (value) => { app.smooth = value; emit("draw"); });
  const axis = choice("Horizontal axis", [["step", "steps"], ["time", "time"]], app.axis, (value) => { app.axis = value; app.cursor = null; emit("draw"); });
  const log = el("input", { type: "checkbox", id: "log", onchange: (event) => { app.log = event.target.checked; emit("draw"); } });
  Object.assign(app, { smoothing, axisChoice: axis });
  box.append(el("div", { class: "tools" }, el("span", { class: "toolname", text: "Smoothing" }), smoothing, el("span", { class: "toolname", text: "Over" }), axis,
    el("label", { class: "check" }, log, "log scale"), el("span", { class: "hint", text: "Point at a chart, or focus it and use the arrow keys; Enter enlarges." })));
  box.append(...GROUPS.map(([heading, specs]) => groupOf(heading, specs)).filter(Boolean), picker());
}

function picker() {
  const names = [...new Set(RUNS.flatMap((run) => [...Object.keys(run.training.values), ...Object.keys(run.evaluations.values)]))].sort();
  const shown = new Map();
  const list = el("ul", { class: "picks", id: "picks", "aria-label": "Metrics" });
  const count = el("span", { class: "hint", role: "status" });
  const grid = el("div", { class: "charts" });
  const search = el("input", { type: "search", id: "metric-search", placeholder: "Search all metrics, such as sync or time/", "aria-label": "Search metrics", "aria-controls": "picks", "aria-keyshortcuts": "m", autocomplete: "off", spellcheck: "false", oninput: fill });

  function toggle(name, button) {
    if (shown.has(name)) { shown.get(name).remove(); shown.delete(name); }
    else {
      const chart = makeChart({ title: name, lines: linesOf({ [name]: many ? name : name.split("/").pop() }), remove: () => toggle(name) });
      shown.set(name, chart.card);
      grid.append(chart.card);
      chart.draw();
    }
    (button || [...list.querySelectorAll("button")].find((b) => b.dataset.name === name))?.setAttribute("aria-pressed", String(shown.has(name)));
  }

  function fill() {
    const wanted = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = names.filter((name) => wanted.every((word) => name.toLowerCase().includes(word)));
    count.textContent = `${found.length} of ${names.length} metrics`;
    list.replaceChildren(...found.map((name) => {
      const values = series(RUNS[0], name)?.values || [];
      const last = values[values.length - 1];
      const button = el("button", { type: "button", "data-name": name, "aria-pressed": String(shown.has(name)), onclick: () => toggle(name, button) }, el("span", { class: "name", text: name }), el("span", { class: "value", text: fmt(last) }));
      return el("li", {}, button);
    }));
  }
  list.addEventListener("keydown", (event) => {
    const buttons = [...list.querySelectorAll("button")], here = buttons.indexOf(document.activeElement);
    const next = { ArrowDown: here + 1, ArrowUp: here - 1 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    (next < 0 ? search : buttons[Math.min(next, buttons.length - 1)]).focus();
  });
  search.addEventListener("keydown", (event) => { if (event.key === "ArrowDown") { event.preventDefault(); list.querySelector("button")?.focus(); } });
  fill();
  return el("div", { class: "group" }, el("h3", { text: "All metrics" }), el("div", { class: "tools" }, search, count), list, grid);
}

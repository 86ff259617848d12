// Several runs side by side: their final figures, and the settings in which they differ; and the settings of any run.
const FIGURES = [
  ["steps", "Steps"], ["seconds", "Training time", seconds], ["reward", "Reward, end"], ["eval/reward", "Held-out reward, last"], ["best", "Held-out reward, best"],
  ["completions/mean_length", "Length"], ["completions/clipped_ratio", "Truncated", percent], ["kl", "KL"], ["entropy", "Entropy"], ["grad_norm", "Gradient norm"],
  ["frac_reward_zero_std", "Groups without signal", percent], ["staleness/mean", "Staleness"], ["importance_sampling/ess", "Effective sample size"],
  ["throughput/rollout_tokens_per_second", "Tokens a second"], ["time/step", "Time of a step", seconds], ["goodput/work", "Goodput of the work", percent],
];

const UNTOLD = new Set(["run.output_dir", "run.resume"]);

function delta(value, base) {
  if (typeof value !== "number" || typeof base !== "number" || value === base) return null;
  const share = base ? (value - base) / Math.abs(base) : null;
  const text = share !== null && Math.abs(share) < 10 ? `${share > 0 ? "+" : "−"}${percent(Math.abs(share))}` : `${value > base ? "+" : "−"}${fmt(Math.abs(value - base))}`;
  return el("span", { class: "delta", text });
}

function comparison() {
  const counts = RUNS.map((run) => run.final.averaged), low = Math.min(...counts), high = Math.max(...counts);
  const rows = FIGURES.filter(([name]) => RUNS.some((run) => typeof run.final[name] === "number"));
  return el("div", { class: "columns pair" }, el("div", { class: "card" }, el("h3", { text: "Final figures" }), el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Final figures of the runs" },
    el("table", { id: "figures" }, el("thead", {}, el("tr", {}, el("td"), RUNS.map((run, i) => el("th", { scope: "col", class: "num" }, runName(i))))),
      el("tbody", {}, el("tr", {}, el("th", { scope: "row", text: "State" }), RUNS.map((run) => el("td", { class: "num" }, statePill(run)))),
        rows.map(([name, label, show]) => el("tr", {}, el("th", { scope: "row", text: label }),
          RUNS.map((run, i) => el("td", { class: "num" }, (show && typeof run.final[name] === "number" ? show : fmt)(run.final[name]), i ? delta(run.final[name], RUNS[0].final[name]) : null))))))),
    el("p", { class: "hint", text: `Means of the last ${low === high ? high : `${low} to ${high}`} steps; differences are to ${RUNS[0].name}.` })), differences());
}

const settingKeys = [...new Set(RUNS.flatMap((run) => Object.keys(run.settings)))];
const settingText = (value) => (value === undefined ? "–" : String(value));
const differs = (key) => !UNTOLD.has(key) && new Set(RUNS.map((run) => JSON.stringify(run.settings[key]))).size > 1;

function settingRow(key) {
  return el("tr", {}, el("th", { scope: "row" }, el("code", { text: key })), RUNS.map((run) => el("td", { class: run.changed.includes(key) ? "changed" : "", text: settingText(run.settings[key]) })));
}

function settingTable(id, body) {
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": id === "differences" ? "Settings that differ" : "Settings" },
    el("table", { id, class: "settings" }, el("thead", {}, el("tr", {}, el("th", { scope: "col", text: "Setting" }), RUNS.map((run, i) => el("th", { scope: "col" }, many ? runName(i) : "Value")))), body));
}

function differences() {
  const keys = settingKeys.filter(differs);
  return el("div", { class: "card" }, el("h3", { text: "Settings that differ" }),
    keys.length ? settingTable("differences", el("tbody", {}, keys.map(settingRow))) : el("p", { class: "hint", text: "None: the runs have the same settings." }));
}

function drawSettings() {
  const box = byId("settings");
  const keys = settingKeys;
  const changed = (key) => RUNS.some((run) => run.changed.includes(key));
  let only = true;
  const body = el("tbody"), count = el("span", { class: "hint", role: "status" });
  const search = el("input", { type: "search", id: "setting-search", placeholder: "Search settings", "aria-label": "Search settings", autocomplete: "off", spellcheck: "false", oninput: fill });
  const scope = choice("Settings shown", [["some", "not the default"], ["all", "all"]], "some", (value) => { only = value === "some"; fill(); });
  function fill() {
    const query = search.value.toLowerCase();
    const shown = keys.filter((key) => (!only || changed(key)) && (!query || `${key} ${RUNS.map((run) => settingText(run.settings[key])).join(" ")}`.toLowerCase().includes(query)));
    count.textContent = `${shown.length} of ${keys.length} settings`;
    body.replaceChildren(...shown.map(settingRow));
  }
  fill();
  box.append(el("div", { class: "tools" }, search, scope, count), el("div", { class: "card" }, settingTable("settings-table", body)));
}

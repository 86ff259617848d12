// The head of the report: what the run is, how it went, what bounds it, and what to change.
const LEVELS = { problem: ["!", "Problem"], notice: ["i", "Notice"], good: ["✓", "Good"] };

/** Text in which names of settings stand as code. */
function withSettings(text) {
  const known = /\b(?:run|model|data|rollout|reward|algorithm|learner|eval)\.[a-z_]+(?:\.[a-z_]+)*\b/g;
  const pieces = [];
  let end = 0;
  for (const match of text.matchAll(known)) {
    pieces.push(text.slice(end, match.index), el("code", { text: match[0] }));
    end = match.index + match[0].length;
  }
  return [...pieces, text.slice(end)];
}

function findingList(run) {
  if (!run.findings) return el("p", { class: "hint", text: "No findings were made: config.toml does not fit this version of Millrace." });
  const items = run.findings.map((finding) => el("li", { class: `finding ${finding.level}` },
    el("span", { class: "level", "aria-hidden": "true", text: LEVELS[finding.level][0] }),
    el("div", {}, el("h4", {}, el("span", { class: "vh", text: `${LEVELS[finding.level][1]}: ` }), finding.title),
      el("p", { text: finding.text }),
      finding.change ? el("p", { class: "change" }, el("span", { class: "arrow", "aria-label": "Change:", text: "→ " }), withSettings(finding.change)) : null)));
  return items.length ? el("ul", { class: "findings" }, items) : el("p", { class: "hint", text: "Nothing stands out in the recorded rows." });
}

function verdictBox(run) {
  if (!run.verdict) return null;
  return el("div", { class: "verdict" }, el("h3", { text: "What bounds this run" }), el("p", {}, withSettings(run.verdict)));
}

function tiles(run) {
  return el("ul", { class: "tiles" }, run.tiles.map((tile) => el("li", { class: "tile" },
    el("span", { class: "tile-label", text: tile.label }), el("span", { class: "tile-value", text: tile.value }),
    spark(run, tile.series), el("span", { class: "tile-note", text: tile.note }))));
}

function facts(run) {
  return el("dl", { class: "facts" }, run.facts.flatMap(([label, text]) => [el("dt", { text: label }), el("dd", { text, title: text })]));
}

function fates(run) {
  const names = ["trained", "filtered", "stale", "failed", "lost"];
  const counts = names.map((name) => { const v = series(run, `samples/${name}`)?.values; return v ? v[v.length - 1] || 0 : 0; });
  const total = counts.reduce((a, b) => a + b, 0);
  if (!total) return null;
  const fills = ["var(--c0)", "var(--quiet)", "var(--c4)", "var(--c1)", "var(--c3)"];
  const there = names.map((name, i) => [name, counts[i], fills[i]]).filter(([, count]) => count);
  const said = there.map(([name, count]) => `${fmt(count)} ${name} (${percent(count / total)})`).join(", ");
  return el("div", { class: "fates" }, el("h3", { text: "Where the completions went" }),
    el("div", { class: "stack", role: "img", "aria-label": said }, there.map(([, count, fill]) => el("span", { vars: { "--fill": fill, "flex-grow": String(count) } }))),
    el("ul", { class: "legend" }, there.map(([name, count, fill]) => el("li", {}, swatch(fill), el("span", { class: "name", text: name }), el("span", { class: "value", text: `${fmt(count)} · ${percent(count / total)}` })))));
}

function statePill(run) {
  return el("span", { class: `pill ${run.state.word.replace(" ", "-")}`, text: run.state.word });
}

function drawOverview() {
  const box = byId("overview");
  const title = many ? `${RUNS.length} runs` : RUNS[0].name;
  document.title = `${many ? RUNS.map((run) => run.name).join(", ") : title} — Millrace report`;
  box.append(el("div", { class: "head" }, el("h1", { id: "title", text: title }), many ? null : statePill(RUNS[0]),
    el("p", { class: "sub", text: many ? `Compared with ${RUNS[0].name}; the picker above chooses the run that overview, time and completions show.` : RUNS[0].state.text })));
  if (many) box.append(comparison());
  box.append(kept(el("div", { class: "shown" }), ["run"], () => {
    const run = shownRun();
    return [
      many ? el("h3", { class: "runhead" }, runName(app.run), statePill(run), el("span", { class: "sub", text: run.state.text })) : null,
      tiles(run),
      el("div", { class: "columns" },
        el("div", { class: "card" }, verdictBox(run), el("h3", { text: "Findings" }), findingList(run)),
        el("div", { class: "card" }, el("h3", { text: "The run" }), facts(run), fates(run))),
    ];
  }));
}

// The stored completions: a list to search, sort and filter, and beside it the chosen prompt with all its completions.
const SORTS = [["step", "step"], ["reward", "reward"], ["advantage", "advantage"], ["length", "length"]];
const PAGE = 150;
const viewer = { query: "", sort: "step", down: false, step: "", finish: "", mode: "logprob", chosen: null, limit: PAGE };

function entriesOf(run) {
  if (run.entries) return run.entries;
  const { groups, tokens } = run.samples, special = new Set(run.samples.specials);
  run.samples.special = special;
  run.entries = groups.flatMap((group) => group.completions.map((completion, i) => {
    const text = textOf(completion, { tokens, special });
    return { group, completion, i, text, low: `${text}\n${group.prompt}`.toLowerCase(), step: group.step, reward: completion.r, advantage: completion.a, length: completion.n };
  }));
  return run.entries;
}

function selected(run) {
  const found = entriesOf(run).filter((entry) => (!viewer.step || String(entry.step) === viewer.step) && (!viewer.finish || entry.completion.f === viewer.finish) && (!viewer.query || entry.low.includes(viewer.query)));
  const sign = viewer.down ? -1 : 1, key = viewer.sort;
  return found.sort((a, b) => (a[key] === null) - (b[key] === null) || sign * (a[key] - b[key]) || a.step - b.step || a.group.id - b.group.id || a.i - b.i);
}

function excerpt(text) {
  const at = viewer.query ? text.toLowerCase().indexOf(viewer.query) : -1;
  const from = at > 40 ? at - 30 : 0;
  return plainText((from ? "…" : "") + text.slice(from, from + 140).replaceAll("\n", " "), viewer.query);
}

const tail = (text) => { const line = text.trim().replaceAll("\n", " "); return line.length > 44 ? `…${line.slice(-44)}` : line; };
const signed = (value) => (value === null ? "–" : (value > 0 ? "+" : "") + fmt(value));

function row(entry, index) {
  const { completion } = entry;
  return el("li", { role: "option", id: `entry-${index}`, class: "entry", "aria-selected": String(entry === viewer.chosen), onclick: () => choose(entry) },
    el("span", { class: "entry-prompt", dir: "auto", text: tail(entry.group.prompt) }),
    el("span", { class: "entry-text", dir: "auto" }, excerpt(entry.text)),
    el("span", { class: "entry-facts" }, el("span", { text: `step ${entry.step}` }), el("span", { class: "r", text: `r ${fmt(entry.reward)}` }),
      el("span", { class: entry.advantage > 0 ? "a plus" : entry.advantage < 0 ? "a minus" : "a", text: `A ${signed(entry.advantage)}` }), el("span", { text: `${fmt(completion.n)} tokens` }),
      completion.f === "length" ? el("span", { class: "tag", text: "cut" }) : null));
}

function choose(entry) {
  viewer.chosen = entry;
  emit("chosen");
}

function listBox() {
  const list = el("ul", { class: "entries", id: "entries", role: "listbox", tabindex: "0", "aria-label": "Completions" });
  let found = [];
  function fill() {
    const run = shownRun();
    if (!run.samples) return;
    found = selected(run);
    if (!found.includes(viewer.chosen)) viewer.chosen = found[0] || null;
    const more = found.length > viewer.limit ? el("li", { class: "more", role: "presentation" }, el("button", { type: "button", text: `Show more of ${fmt(found.length)}`, onclick: () => { viewer.limit += 4 * PAGE; fill(); list.focus({ preventScroll: true }); } })) : null;
    list.replaceChildren(...found.slice(0, viewer.limit).map(row), ...(more ? [more] : []));
    byId("found").textContent = `${fmt(found.length)} of ${fmt(entriesOf(run).length)} completions`;
    emit("chosen");
  }
  function point() {
    const index = found.indexOf(viewer.chosen);
    list.querySelectorAll('[aria-selected="true"]').forEach((node) => node.setAttribute("aria-selected", "false"));
    const node = byId(`entry-${index}`);
    node?.setAttribute("aria-selected", "true");
    if (node) list.setAttribute("aria-activedescendant", node.id);
    else list.removeAttribute("aria-activedescendant");
    if (!node) return;
    if (node.offsetTop < list.scrollTop) list.scrollTop = node.offsetTop;
    else if (node.offsetTop + node.offsetHeight > list.scrollTop + list.clientHeight) list.scrollTop = node.offsetTop + node.offsetHeight - list.clientHeight;
  }
  function step(by) {
    const next = clamp(found.indexOf(viewer.chosen) + by, 0, found.length - 1);
    if (next >= viewer.limit) { viewer.limit = next + PAGE; fill(); }
    if (found[next]) choose(found[next]);
  }
  list.addEventListener("keydown", (event) => {
    const by = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -found.length, End: Math.min(found.length, viewer.limit) }[event.key];
    if (by !== undefined) { event.preventDefault(); step(by); }
    if (event.key === "Enter" && event.target === list) document.querySelector(".completion.current .text")?.focus();
  });
  on("completions", fill);
  on("chosen", point);
  viewer.step_by = step;
  return list;
}

function completionCard(entry, context) {
  const { completion } = entry, { run, group } = context;
  const scores = group.parts.length > 1 || (group.parts.length === 1 && completion.p[0] !== completion.r) ? group.parts.map((name, i) => el("span", { class: "part" }, el("span", { text: name }), el("b", { text: fmt(completion.p[i]) }))) : [];
  const label = `Completion ${entry.i + 1} of ${group.completions.length}`;
  const card = el("article", { class: entry === viewer.chosen ? "completion current" : "completion", "aria-label": label, onclick: () => entry !== viewer.chosen && !String(getSelection()) && choose(entry) },
    el("header", {}, el("span", { class: "no", text: `${entry.i + 1}` }), el("span", { class: "big", text: `r ${fmt(completion.r)}` }),
      el("span", { class: completion.a > 0 ? "a plus" : completion.a < 0 ? "a minus" : "a", text: completion.a === null ? "not trained" : `A ${signed(completion.a)}` }),
      el("span", { class: "hint", text: `${fmt(completion.n)} tokens` }), completion.f === "length" ? el("span", { class: "tag", text: "cut at the limit" }) : null),
    scores.length ? el("div", { class: "parts" }, scores) : null,
    tokenBody(completion, { ...context, label, tokens: run.samples.tokens, special: run.samples.special, query: viewer.query }),
    completion.x ? el("dl", { class: "extra" }, Object.entries(completion.x).flatMap(([name, value]) => [el("dt", { text: name }), el("dd", { text: value })])) : null);
  return card;
}

function groupView() {
  const run = shownRun(), chosen = viewer.chosen;
  if (!run.samples || !chosen) return el("p", { class: "empty", text: "No completion matches." });
  const { group } = chosen;
  const largest = Math.max(...group.completions.map((c) => Math.abs(c.a || 0))) || 1;
  const context = { run, group, mode: viewer.mode, largest, versions: versionsOf(group) };
  const mine = entriesOf(run).filter((entry) => entry.group === group);
  const rewards = group.completions.map((c) => c.r).filter((r) => r !== null);
  const mean = rewards.reduce((a, b) => a + b, 0) / Math.max(rewards.length, 1);
  return [
    el("div", { class: "prompt" }, el("h3", { text: `Prompt of group ${group.id}` }), el("span", { class: "hint", text: `trained at step ${group.step} · mean reward ${fmt(mean)} · ${group.completions.length} completions` }), el("div", { class: "text", dir: "auto", text: group.prompt })),
    mine[0].completion.k ? tokenLegend(viewer.mode, context) : el("p", { class: "hint", text: "Tokens are not shown: the tokenizer could not be loaded where the report was made." }),
    el("div", { class: "cards" }, mine.map((entry) => completionCard(entry, context))),
  ];
}

function drawCompletions() {
  const box = byId("completions");
  const again = () => { viewer.limit = PAGE; emit("completions"); };
  const search = el("input", { type: "search", id: "text-search", placeholder: "Search prompts and completions", "aria-label": "Search prompts and completions", "aria-controls": "entries", "aria-keyshortcuts": "/", autocomplete: "off", spellcheck: "false", oninput: () => { viewer.query = search.value.toLowerCase(); again(); } });
  const steps = el("select", { id: "step-filter", "aria-label": "Step", onchange: () => { viewer.step = steps.value; again(); } });
  const finish = el("select", { id: "finish-filter", "aria-label": "How it ended", onchange: () => { viewer.finish = finish.value; again(); } },
    [["", "ended any way"], ["stop", "ended by itself"], ["length", "cut at the limit"]].map(([value, text]) => el("option", { value, text })));
  const sort = el("select", { id: "sort", "aria-label": "Sort by", onchange: () => { viewer.sort = sort.value; again(); } }, SORTS.map(([value, text]) => el("option", { value, text: `by ${text}` })));
  const direction = el("button", { type: "button", id: "direction", class: "mini", text: "↑", "aria-label": "Sorted upwards; press to sort downwards", onclick: () => {
    viewer.down = !viewer.down;
    direction.textContent = viewer.down ? "↓" : "↑";
    direction.setAttribute("aria-label", viewer.down ? "Sorted downwards; press to sort upwards" : "Sorted upwards; press to sort downwards");
    again();
  } });
  viewer.modes = choice("Colour tokens by", MODES, viewer.mode, (mode) => { viewer.mode = mode; emit("chosen"); });
  const tools = el("div", { class: "tools" }, search, steps, finish, sort, direction, el("span", { class: "toolname", text: "Colour" }), viewer.modes, el("span", { class: "hint", id: "found", role: "status" }));
  const area = el("div", { class: "viewer" }, listBox(), kept(el("div", { class: "groupview", "aria-live": "off" }), ["chosen"], groupView));
  const none = el("p", { class: "empty", text: "No completions are stored: run.samples_every is 0, or no such step came yet." });
  box.append(tools, area, none);
  const show = () => {
    const run = shownRun(), there = Boolean(run.samples?.groups.length);
    tools.hidden = area.hidden = !there;
    none.hidden = there;
    if (!there) return;
    const found = [...new Set(run.samples.groups.map((group) => group.step))];
    steps.replaceChildren(el("option", { value: "", text: "all steps" }), ...found.map((step) => el("option", { value: step, text: `step ${step}` })));
    Object.assign(viewer, { step: "", chosen: null, limit: PAGE });
    emit("completions");
  };
  on("run", show);
  show();
}

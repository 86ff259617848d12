// Seconds by state, as bars of every process and as a table.
const IDLE = { start: ["#b4b3ac", "#565c64"], wait_for_prompts: ["#dddcd6", "#363c44"], wait_for_groups: ["#dddcd6", "#363c44"], wait_for_delivery: ["#c9c8c1", "#474d56"] };
const BUSY = {
  generate: "#2f7cc0", score: "#1f9a78", train: "#7b6fc4", evaluate: "#c79a1c", forward: "#e8954a", backward: "#c9601f", optimizer: "#93420f",
  reference: "#efc08f", old_logprobs: "#d8ab6a", plan: "#a78e70", pause: "#e0679f", receive: "#b0478e", gather: "#84469f", send: "#9d70bd",
  canary: "#e8a3c6", save: "#4d7f8c", load: "#76a3ad", lost: "#b3261e",
};
const SPARE = ["#5f8f3a", "#3f9fb5", "#9a5b5b", "#6d7f2f", "#6672a8"];
const order = ["generate", "score", "train", "reference", "old_logprobs", "forward", "backward", "optimizer", "plan", "canary", "gather", "send", "receive", "pause", "evaluate", "save", "load", "lost"];
const idleOrder = ["start", "wait_for_prompts", "wait_for_groups", "wait_for_delivery"];

function stateColour(state) {
  if (IDLE[state]) return IDLE[state][isDark() ? 1 : 0];
  return BUSY[state] || SPARE[[...state].reduce((sum, letter) => sum + letter.charCodeAt(0), 0) % SPARE.length];
}

const rank = (state) => (idleOrder.includes(state) ? 100 + idleOrder.indexOf(state) : order.includes(state) ? order.indexOf(state) : 50);
const inOrder = (states) => [...states].sort((a, b) => rank(a) - rank(b) || a.localeCompare(b));
const inkOn = (hex) => {
  const [r, g, b] = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16) / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000000" : "#ffffff";
};

const emphasis = { state: null };

function stateLegend(states) {
  return el("ul", { class: "legend states", "aria-label": "States; press one to bring it out" }, inOrder(states).map((state) => el("li", {},
    el("button", { type: "button", "aria-pressed": String(emphasis.state === state), onclick: () => { emphasis.state = emphasis.state === state ? null : state; emit("emphasis"); } },
      swatch(stateColour(state)), el("span", { class: "name", text: words(state) })))));
}

function bar(process, states) {
  const total = Object.values(states).reduce((a, b) => a + b, 0);
  const shares = inOrder(Object.keys(states)).map((state) => [state, states[state], states[state] / total]);
  const said = shares.filter(([, , share]) => share > 0.005).map(([state, value, share]) => `${words(state)} ${percent(share)}, ${seconds(value)}`).join("; ");
  const pieces = shares.map(([state, value, share]) => {
    const fill = stateColour(state);
    const lines = [`${process} · ${words(state)}`, `${seconds(value)}, ${percent(share)} of its time`];
    return el("span", { class: emphasis.state && emphasis.state !== state ? "piece dim" : "piece", "data-state": state, vars: { "--fill": fill, "--on": inkOn(fill), "flex-grow": String(value) },
      onpointermove: (event) => tip(lines, event.clientX, event.clientY), onpointerleave: () => tip(null) },
      share > 0.12 && (!emphasis.state || emphasis.state === state) ? el("span", { class: "piece-text", text: `${words(state)} ${percent(share)}` }) : null);
  });
  return el("div", { class: "barrow" }, el("span", { class: "lane", text: process }), el("div", { class: "stack tall", role: "img", tabindex: "0", "aria-label": `${process}: ${said}`, 
    onfocus: (event) => { const box = event.target.getBoundingClientRect(); if (event.target.matches(":focus-visible")) tip([process, ...shares.map(([state, value, share]) => `${words(state)} ${percent(share)}, ${seconds(value)}`)], box.left, box.bottom - 16); }, onblur: () => tip(null) }, pieces),
    el("span", { class: "wall", text: seconds(total) }));
}

function timeTable(times) {
  const states = inOrder(new Set(Object.values(times).flatMap((row) => Object.keys(row))));
  return el("details", {}, el("summary", { text: "The same as a table, in seconds" }), el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Seconds by process and state" },
    el("table", {}, el("thead", {}, el("tr", {}, el("th", { scope: "col", text: "Process" }), states.map((state) => el("th", { scope: "col", class: "num", text: words(state) })), el("th", { scope: "col", class: "num", text: "all" }))),
      el("tbody", {}, Object.entries(times).map(([process, row]) => el("tr", {}, el("th", { scope: "row", text: process }),
        states.map((state) => el("td", { class: "num", text: row[state] ? fmt(row[state]) : "" })),
        el("td", { class: "num", text: fmt(Object.values(row).reduce((a, b) => a + b, 0)) })))))));
}

function drawTime() {
  const box = byId("time");
  let source = "training";
  const area = el("div");
  const pick = choice("Seconds of", [["training", "the steps"], ["whole", "the whole process"]], source, (value) => { source = value; emit("emphasis"); });
  box.append(area);
  kept(area, ["run", "emphasis", "theme"], () => {
    const { training, whole } = shownRun().time;
    const both = Object.keys(training).length && Object.keys(whole).length;
    const times = (source === "whole" || !Object.keys(training).length) && Object.keys(whole).length ? whole : training;
    if (!Object.keys(times).length) return el("p", { class: "empty", text: "No times are recorded yet." });
    const states = new Set(Object.values(times).flatMap((row) => Object.keys(row)));
    const said = times === whole ? "From the start of each process to its end, as ledger/time.json has it (the run's last life)." : "Sum over the recorded steps, start-up left out.";
    return [
      el("div", { class: "tools" }, both ? [el("span", { class: "toolname", text: "Seconds of" }), pick] : null, el("span", { class: "hint", text: `Each bar is the wall clock of a process. ${said}` })),
      el("div", { class: "card" }, stateLegend(states), el("div", { class: "bars" }, Object.entries(times).map(([process, row]) => bar(process, row))), timeTable(times)),
    ];
  });
  drawTimeline(box);
}

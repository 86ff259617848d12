// One completion token by token, coloured by log-prob, advantage or policy version, with a reading of each token.
const MODES = [["logprob", "log-prob"], ["advantage", "advantage"], ["version", "version"], ["none", "plain"]];

function versionAt(spans, index) {
  for (let i = 0; i < spans.length; i += 3) if (index >= spans[i + 1] && index < spans[i + 2]) return spans[i];
  return null;
}

const originalIndex = (completion, i) => (completion.cut && i >= completion.cut[0] ? i + completion.cut[1] : i);
const versionsOf = (group) => [...new Set(group.completions.flatMap((c) => (c.v || []).filter((_, i) => i % 3 === 0)))].sort((a, b) => a - b);
const mixed = (name, share) => `color-mix(in srgb, var(${name}) ${Math.round(share)}%, transparent)`;

function tokenFill(mode, completion, i, context) {
  if (mode === "logprob") {
    const l = completion.l[i];
    return l === null ? null : l < 5 ? null : mixed("--heat", 55 * Math.min(1, Math.sqrt(l / 500)));
  }
  if (mode === "advantage") {
    if (!completion.a) return null;
    return mixed(completion.a > 0 ? "--plus" : "--minus", 12 + 40 * Math.min(1, Math.abs(completion.a) / context.largest));
  }
  if (mode === "version") {
    const place = context.versions.indexOf(versionAt(completion.v, originalIndex(completion, i)));
    return place < 0 ? null : mixed(`--v${place % 6}`, 42);
  }
  return null;
}

function tokenLines(completion, i, tokens, run) {
  const index = originalIndex(completion, i), logprob = completion.l[i], version = versionAt(completion.v, index);
  return [`“${visible(tokens[completion.k[i]])}” · token ${index + 1} of ${completion.n}`,
    logprob === null ? "no finite log-prob" : `log-prob ${fmt(-logprob / 100)} · probability ${percent(Math.exp(-logprob / 100))}`,
    version === null ? "version not recorded" : `sampled by policy version ${version}`,
    completion.a === null ? "left out of training: no advantage" : `advantage of the completion ${fmt(completion.a)}`];
}

const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "∅";
const textOf = (completion, { tokens, special }) => completion.t ?? completion.k.map((index) => (special.has(index) ? "" : tokens[index])).join("");

/** The completion's text; marked where it holds what is searched for. */
function plainText(text, query) {
  if (!query) return [text];
  const pieces = [], low = text.toLowerCase();
  let from = 0;
  for (let at = low.indexOf(query); at >= 0 && pieces.length < 400; at = low.indexOf(query, from)) {
    pieces.push(text.slice(from, at), el("mark", { text: text.slice(at, at + query.length) }));
    from = at + query.length;
  }
  return [...pieces, text.slice(from)];
}

function tokenBody(completion, context) {
  const { tokens, special, mode, query, label } = context;
  if (!completion.k || (mode === "none" && completion.t)) return el("div", { class: "text", dir: "auto" }, plainText(completion.t, query));
  const body = el("div", { class: "text tokens", tabindex: "0", role: "group", dir: "auto", "aria-label": `${label}, ${completion.n} tokens. Arrow keys read them one by one.` });
  const hits = query ? marked(completion, tokens, query) : null;
  const spans = completion.k.map((number, i) => {
    const piece = tokens[number];
    const span = el("span", { class: `tok${hits?.has(i) ? " hit" : ""}${special.has(number) ? " special" : ""}`, text: piece.includes("\n") ? piece.replaceAll("\n", "↵\n") : piece || "∅" });
    const fill = tokenFill(mode, completion, i, context);
    if (fill) span.style.backgroundColor = fill;
    return span;
  });
  if (completion.cut) spans.splice(completion.cut[0], 0, el("span", { class: "gap", text: ` […${fmt(completion.cut[1])} tokens left out…] ` }));
  body.append(...spans);
  const only = spans.filter((span) => span.classList.contains("tok"));
  let here = -1;
  body.addEventListener("pointerover", (event) => {
    const i = only.indexOf(event.target);
    if (i >= 0) tip(tokenLines(completion, i, tokens), event.clientX, event.clientY);
  });
  body.addEventListener("pointerleave", () => tip(null));
  body.addEventListener("blur", () => { only[here]?.classList.remove("here"); tip(null); });
  body.addEventListener("keydown", (event) => {
    const next = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: only.length - 1 }[event.key];
    if (event.key === "Escape") return tip(null);
    if (next === undefined || !only.length) return;
    event.preventDefault();
    event.stopPropagation();
    only[here]?.classList.remove("here");
    here = clamp(next, 0, only.length - 1);
    only[here].classList.add("here");
    only[here].scrollIntoView({ block: "nearest" });
    const box = only[here].getBoundingClientRect(), lines = tokenLines(completion, here, tokens);
    tip(lines, box.left, box.bottom - 10);
    announce(lines.join(", "));
  });
  return body;
}

/** Tokens that overlap a place where the text holds the query. */
function marked(completion, tokens, query) {
  const found = new Set(), starts = [];
  let text = "";
  for (const number of completion.k) { starts.push(text.length); text += tokens[number]; }
  const low = text.toLowerCase();
  for (let at = low.indexOf(query); at >= 0; at = low.indexOf(query, at + query.length)) {
    for (let i = 0; i < starts.length; i++) if (starts[i] < at + query.length && starts[i] + tokens[completion.k[i]].length > at) found.add(i);
  }
  return found;
}

function tokenLegend(mode, context) {
  const scale = (left, right, fills) => el("div", { class: "scale" }, el("span", { text: left }), fills.map((fill) => el("span", { class: "scale-box", vars: { "--fill": fill } })), el("span", { text: right }));
  if (mode === "logprob") return scale("log-prob 0", "−5 and below", [0.05, 0.4, 1, 2, 3.5, 5].map((l) => mixed("--heat", 55 * Math.sqrt(l / 5))));
  if (mode === "advantage") return scale(`advantage ${fmt(-context.largest)}`, fmt(context.largest), [1, 0.5, 0, -0.5, -1].map((a) => (a ? mixed(a > 0 ? "--minus" : "--plus", 12 + 40 * Math.abs(a)) : "transparent")));
  if (mode === "version") return el("ul", { class: "legend" }, context.versions.map((version, i) => el("li", {}, swatch(mixed(`--v${i % 6}`, 42)), el("span", { class: "name", text: `policy version ${version}` }))));
  return el("span");
}

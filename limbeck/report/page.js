// The page's only script: the theme switch and the answers. Text that a model wrote is only set as textContent.
"use strict";

const PAGE = 10;
const SATURATED_NATS = 4;
const LEVELS = 8;
const byId = (id) => document.getElementById(id);

const make = (tag, name, text) => {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== undefined) element.textContent = text;
  return element;
};

const option = (value, text) => {
  const element = make("option", "", text);
  element.value = value;
  return element;
};

const themeSwitch = () => {
  const root = document.documentElement;
  const button = byId("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const name = () => { button.textContent = dark() ? "Light theme" : "Dark theme"; };
  button.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; name(); });
  system.addEventListener("change", name);
  button.hidden = false;
  name();
};

// Fills an element with text, marking every match of the search.
const fill = (element, text, needle) => {
  const lower = text.toLowerCase();
  if (!needle || lower.length !== text.length) { element.append(text); return element; }
  let from = 0;
  for (let at = lower.indexOf(needle); at >= 0; at = lower.indexOf(needle, from)) {
    element.append(text.slice(from, at), make("mark", "", text.slice(at, at + needle.length)));
    from = at + needle.length;
  }
  element.append(text.slice(from));
  return element;
};

const level = (nats) => (nats > 0 ? Math.min(LEVELS, Math.ceil(LEVELS * Math.sqrt(nats / SATURATED_NATS))) : 0);
const quoted = (text) => `“${text.replaceAll("\n", "↵")}”`;
const listed = (choices) => choices.map(([text, share]) => quoted(text) + (share === null ? "" : ` ${(100 * share).toFixed(1)} %`)).join(", ");

// One text with coloured tokens. It is one tab stop; the arrow keys move between tokens.
const strip = (title, tokens) => {
  const box = make("div", "strip");
  const detail = make("p", "detail", "Point at a token, or use the arrow keys, to see its divergence and both models' top choices.");
  detail.setAttribute("role", "status");
  const list = make("div", "text tokens");
  list.setAttribute("role", "listbox");
  list.setAttribute("aria-orientation", "horizontal");
  list.setAttribute("aria-label", title);
  const spans = tokens.map(([text, nats], at) => {
    const span = make("span", `token n${level(nats)}`, text.replaceAll("\n", "↵\n"));
    span.setAttribute("role", "option");
    span.setAttribute("aria-selected", "false");
    span.tabIndex = at ? -1 : 0;
    return span;
  });
  list.append(...spans);
  let current = spans[0];
  const show = (span) => {
    const [text, nats, teacher, student] = tokens[spans.indexOf(span)];
    current.tabIndex = -1;
    current.setAttribute("aria-selected", "false");
    current = span;
    span.tabIndex = 0;
    span.setAttribute("aria-selected", "true");
    const first = `${quoted(text)}: ${nats === null ? "not finite" : `${nats.toFixed(2)} nats`}`;
    detail.replaceChildren(make("span", "first", first), make("span", "", `Teacher's choices: ${listed(teacher)}`), make("span", "", `Student's choices: ${listed(student)}`));
  };
  const pick = (event) => { if (event.target.classList.contains("token")) show(event.target); };
  list.addEventListener("mouseover", pick);
  list.addEventListener("focusin", pick);
  list.addEventListener("keydown", (event) => {
    const at = spans.indexOf(current);
    const places = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: spans.length - 1 };
    const next = spans[places[event.key]];
    if (!next) return;
    event.preventDefault();
    next.focus();
  });
  box.append(make("h4", "", title), list, detail);
  return box;
};

const lens = (item, open) => {
  const box = make("details", "lens");
  box.append(make("summary", "", "Token by token"));
  const build = () => {
    if (box.children.length > 1) return;
    if (item.lens.student?.length) box.append(strip("On the student's own text", item.lens.student));
    if (item.lens.teacher?.length) box.append(strip("On the teacher's text", item.lens.teacher));
  };
  box.addEventListener("toggle", build);
  if (open) { build(); box.open = true; }
  return box;
};

const answerBox = (label, [text, tokens, finished, passed, characters], needle) => {
  const box = make("div", "given");
  const head = make("h4", "", label);
  if (passed !== null) head.append(" ", make("span", `badge ${passed ? "passes" : "fails"}`, passed ? "passes" : "fails"));
  if (finished === false) head.append(" ", make("span", "cut", `cut off at ${tokens} tokens`));
  const body = fill(make("p", "text"), text, needle);
  body.dir = "auto";
  box.append(head, body);
  if (text.length < characters) box.append(make("p", "soft", `Shortened: ${characters.toLocaleString("en")} characters in all.`));
  return box;
};

const article = (item, data, needle, open) => {
  const box = make("article", "answer");
  const head = make("header", "");
  if (item.kind) head.append(make("span", "kind", item.kind), " ");
  head.append(make("span", "id", item.id), fill(make("h3", "prompt"), item.prompt, needle));
  const columns = make("div", "columns");
  item.answers.forEach((answer, at) => {
    if (answer && data.systems[at].shown) columns.append(answerBox(data.systems[at].label, answer, needle));
  });
  box.append(head, columns);
  if (item.lens.student?.length || item.lens.teacher?.length) box.append(lens(item, open));
  return box;
};

// value: [label, filter]; `own` is the answer of the selected system, `teachers` the teacher's.
const WHICH = {
  all: ["All answers", () => true],
  passes: ["Passes", (own) => own?.[3] === true],
  fails: ["Fails", (own) => own?.[3] === false],
  lost: ["Fails where the teacher passes", (own, teachers) => own?.[3] === false && teachers?.[3] === true],
  won: ["Passes where the teacher fails", (own, teachers) => own?.[3] === true && teachers?.[3] === false],
  differs: ["Text differs from the teacher's", (own, teachers) => own && teachers && own[0] !== teachers[0]],
  same: ["Same text as the teacher's", (own, teachers) => own && teachers && own[0] === teachers[0]],
  cut: ["Cut off", (own) => own?.[2] === false],
};

const answers = (data) => {
  const [find, kind, system, which, list, count, back, on] = ["find", "kind", "system", "which", "list", "count", "back", "on"].map(byId);
  const kinds = [...new Set(data.items.map((item) => item.kind))];
  let page = 0;

  const haystack = (item) => (item.searchable ??= [item.prompt, item.id, ...item.answers.map((answer) => answer?.[0] ?? "")].join("\n").toLowerCase());
  const draw = () => {
    const needle = find.value.trim().toLowerCase();
    const matchesFilter = WHICH[which.value][1];
    const matches = data.items.filter((item) =>
      (kind.value === "" || item.kind === kinds[Number(kind.value)]) &&
      matchesFilter(item.answers[Number(system.value)], item.answers[data.teacher]) &&
      (!needle || haystack(item).includes(needle)));
    page = Math.max(0, Math.min(page, Math.ceil(matches.length / PAGE) - 1));
    const from = page * PAGE;
    const here = matches.slice(from, from + PAGE);
    list.replaceChildren(...here.map((item, at) => article(item, data, needle, at === 0 && !needle)));
    const shown = (n) => n.toLocaleString("en");
    count.textContent = here.length ? `Prompts ${shown(from + 1)} to ${shown(from + here.length)} of ${shown(matches.length)}` : "No prompt matches.";
    back.disabled = page === 0;
    on.disabled = from + PAGE >= matches.length;
  };
  const again = () => { page = 0; draw(); };
  const turn = (by) => { page += by; draw(); byId("pager").scrollIntoView({ block: "start" }); };

  kind.append(option("", "All kinds"), ...kinds.map((name, at) => option(String(at), name || "(none)")));
  system.append(...data.systems.map(({ label }, at) => option(String(at), label)));
  system.value = String(data.subject);
  which.append(...Object.entries(WHICH).map(([value, [label]]) => option(value, label)));
  byId("columns").append(...data.systems.map((one) => {
    const label = make("label", "");
    const box = make("input", "");
    box.type = "checkbox";
    box.checked = one.shown;
    box.addEventListener("change", () => { one.shown = box.checked; draw(); });
    label.append(box, one.label);
    return label;
  }));
  let timer = 0;
  find.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(again, 120); });
  for (const control of [kind, system, which]) control.addEventListener("change", again);
  back.addEventListener("click", () => turn(-1));
  on.addEventListener("click", () => turn(1));
  byId("controls").hidden = byId("pager").hidden = false;
  draw();
};

themeSwitch();
if (byId("data")) answers(JSON.parse(byId("data").textContent));

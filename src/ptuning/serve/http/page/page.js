// The page on which a person asks prompts. Names, templates and answers are strangers' words: they get into the page as
// text nodes alone. The key stays in a variable.

const AGAIN = 3000; // milliseconds until a server that is away is looked for again
const SHOWN_BARS = 8;
const FILTER_FROM = 7; // prompts

const at = (id) => document.getElementById(id);
const state = {
  base: "", prompts: [], chosen: new Set(), values: {}, answers: new Map(), asked: "",
  key: "", hasKey: false, asJson: false, tab: "curl", busy: false, waiting: false,
};

// --- building blocks ---

function make(tag, options = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name === "class") made.className = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((one) => one !== null));
  return made;
}

function percent(probability) {
  if (probability > 0 && probability < 0.0005) return "< 0.1 %";
  if (probability < 1 && probability > 0.9995) return "> 99.9 %";
  const digits = probability < 0.1 || probability > 0.9 ? 1 : 0;
  return `${(100 * probability).toFixed(probability === 1 ? 0 : digits)} %`;
}

function plural(count, word) {
  return `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
}

function notice(text, { bad = true } = {}) {
  at("notice").textContent = text;
  at("notice").classList.toggle("bad", bad);
  at("notice").hidden = !text;
}

// --- the server ---

class Gone extends Error {}
class Refused extends Error {
  constructor(status, error, wait) {
    super(error.message || `the server answered with the status ${status}`);
    Object.assign(this, { status, code: error.code, wait });
  }
}

async function talk(path, body) {
  const headers = {};
  if (state.key) headers.Authorization = `Bearer ${state.key}`;
  if (body) headers["Content-Type"] = "application/json";
  const options = body ? { method: "POST", headers, body: JSON.stringify(body) } : { headers };
  let answer, found;
  try {
    answer = await fetch(path, options);
    found = await answer.json();
  } catch {
    throw new Gone("The server does not answer.");
  }
  if (answer.ok) return found;
  throw new Refused(answer.status, found.error || {}, Number(answer.headers.get("Retry-After")) || 1);
}

async function load() {
  try {
    const { data } = await talk("/v1/models");
    state.base = data.find((one) => one.parent === null)?.id || "";
    state.prompts = data.filter((one) => one.parent !== null);
  } catch (error) {
    trouble(error);
    return false;
  }
  const names = new Set(state.prompts.map((one) => one.id));
  const kept = [...state.chosen].filter((name) => names.has(name));
  const easy = state.prompts.filter((one) => one.answers !== "choices"); // those need no JSON
  state.chosen = new Set(kept.length ? kept : easy.slice(0, 2).map((one) => one.id));
  at("serving").textContent = `${plural(state.prompts.length, "prompt")} on ${state.base}`;
  at("key-form").hidden = true;
  notice("");
  drawList();
  drawAll();
  return true;
}

function trouble(error) {
  if (error instanceof Gone) {
    notice(`${error.message} This page looks for it every few seconds.`);
    lookAgain();
  } else if (error.status === 401) {
    state.hasKey = true;
    at("key-form").hidden = false;
    notice(state.key ? "The server does not know this key." : "");
    if (!state.prompts.length) at("serving").textContent = "";
    state.key = "";
    at("key").value = "";
    at("key").focus();
    drawRequest();
  } else if (error.status === 429) {
    countDown(Math.ceil(error.wait));
  } else if (error.code === "not_serving" || error.code === "not_alive") {
    notice(`${sentence(error.message)} This page looks again every few seconds.`, { bad: false });
    lookAgain();
  } else if (error instanceof Refused) {
    notice(sentence(error.message));
    if (error.status === 404) load();
  } else {
    throw error;
  }
}

function sentence(text) {
  const whole = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(whole) ? whole : `${whole}.`;
}

let looking = false;
async function lookAgain() {
  if (looking) return;
  looking = true;
  for (;;) {
    await new Promise((done) => setTimeout(done, AGAIN));
    try {
      await talk("/ready");
      break;
    } catch { /* not yet */ }
  }
  looking = false;
  load();
}

function countDown(seconds) {
  state.waiting = seconds > 0;
  drawButton();
  if (!state.waiting) {
    notice("The queue may have room again.", { bad: false });
    return;
  }
  const text = `The server has all that it can take. Ask again in ${plural(seconds, "second")}.`;
  if (at("notice").hidden || seconds % 5 === 0) notice(text, { bad: false });
  at("go-text").textContent = `Wait ${seconds} s`;
  setTimeout(() => countDown(seconds - 1), 1000);
}

// --- what is asked ---

const chosen = () => state.prompts.filter((one) => state.chosen.has(one.id));
const needsJson = () => chosen().some((one) => one.answers === "choices");
const isJson = () => needsJson() || state.asJson;
const columns = () => [...new Set(chosen().flatMap((one) => one.columns))];

function models() {
  const withManual = at("manual").checked;
  return chosen().flatMap((one) => (withManual && one.manual ? [one.id, one.manual.id] : [one.id]));
}

function record() {
  if (!isJson()) {
    return Object.fromEntries(columns().map((name) => [name, state.values[name] || ""]).filter(([, text]) => text));
  }
  const found = JSON.parse(at("json").value);
  if (found === null || typeof found !== "object" || Array.isArray(found)) throw new Error("a record is an object");
  return found;
}

function shownRecord() {
  try {
    return record();
  } catch {
    return {};
  }
}

async function ask(event) {
  event.preventDefault();
  if (state.busy || state.waiting) return;
  let row;
  try {
    row = record();
  } catch (error) {
    notice(`The record is not JSON as {"name": "text"}: ${error.message}.`);
    at("json").focus();
    return;
  }
  if (!chosen().length || !Object.keys(row).length) {
    notice(chosen().length ? "Type something into a field first." : "Choose a prompt first.", { bad: false });
    (chosen().length ? at("fields").querySelector("textarea") : at("list").querySelector("input"))?.focus();
    return;
  }
  notice("");
  const names = models();
  busy(true);
  try {
    const { predictions } = await talk("/v1/predict", { model: names, records: [row] });
    state.answers = new Map(names.map((name, place) => [name, predictions[place]]));
    state.asked = Object.entries(row).map(([name, value]) =>
      `${name}: ${typeof value === "string" ? value : JSON.stringify(value)}`).join(" · ");
    drawCards();
    say(names);
    const top = at("answers").getBoundingClientRect().top;
    if (top > window.innerHeight * 0.7) at("answers").scrollIntoView();
  } catch (error) {
    trouble(error);
  } finally {
    busy(false);
  }
}

function busy(is) {
  state.busy = is;
  at("cards").setAttribute("aria-busy", String(is));
  if (is) at("said").textContent = "Answering";
  drawButton();
}

function say(names) {
  at("said").textContent = names.map((name) => {
    const first = state.answers.get(name)[0];
    return first.error ? `${name}: an error` : `${name}: ${first.prediction || "nothing"}, ${percent(likelihood(first))}`;
  }).join(". ");
}

const likelihood = (one) => one.probabilities?.[one.prediction] ?? Math.exp(one.candidates[0].log_prob);

// --- drawing ---

function drawAll() {
  drawFields();
  drawCards();
  drawRequest();
  drawButton();
}

function drawButton() {
  at("go").setAttribute("aria-disabled", String(state.busy || state.waiting));
  if (!state.waiting) at("go-text").textContent = state.busy ? "Answering …" : "Answer";
}

function drawList() {
  const kinds = { labels: (one) => plural(one.labels.length, "label"), text: () => "writes its answer",
    choices: () => "chooses" };
  at("list").replaceChildren(...state.prompts.map((one) => {
    const box = make("input", { type: "checkbox", onchange: () => {
      if (box.checked) state.chosen.add(one.id); else state.chosen.delete(one.id);
      drawAll();
    } });
    box.checked = state.chosen.has(one.id);
    const slots = one.slots ? plural(one.slots, "slot") : "no slots";
    const about = make("small", {}, `${kinds[one.answers](one)}, ${slots}`);
    const picked = make("label", { class: "pick" }, box, make("b", {}, one.id), about);
    picked.dataset.name = one.id.toLowerCase();
    return picked;
  }));
  at("filter-box").hidden = state.prompts.length < FILTER_FROM;
  at("manual-box").hidden = !state.prompts.some((one) => one.manual);
  filter();
}

function filter() {
  const words = at("filter").value.trim().toLowerCase();
  let left = 0;
  for (const one of at("list").children) {
    one.hidden = !one.dataset.name.includes(words);
    left += !one.hidden;
  }
  const empty = state.prompts.length ? "No prompt has this in its name." : "No prompts are in service yet.";
  at("list-hint").textContent = left ? "" : empty;
  at("list-hint").hidden = left > 0;
}

function drawFields() {
  const many = chosen(), names = columns(), json = isJson();
  at("record").hidden = !many.length;
  at("as-json").checked = json;
  at("as-json").disabled = needsJson();
  at("json-why").hidden = !needsJson();
  if (json) {
    const begun = Object.fromEntries(names.map((name) => [name, state.values[name] || ""]));
    if (at("json")) {
      addColumns(at("json"), begun);
      return;
    }
    const typed = make("textarea", { id: "json", class: "json", spellcheck: "false", oninput: drawRequest });
    typed.value = JSON.stringify(begun, null, 2);
    at("fields").replaceChildren(
      make("div", { class: "input" }, make("label", { for: "json" }, "Record as JSON"), typed));
    return;
  }
  if (at("json")) {
    for (const name of names) {
      const value = recordOf(at("json"))?.[name];
      if (typeof value === "string") state.values[name] = value;
    }
  }
  const shown = [...at("fields").querySelectorAll("textarea")].map((one) => one.dataset.column);
  if (JSON.stringify(shown) === JSON.stringify(names) && many.length === Number(at("fields").dataset.many)) return;
  at("fields").dataset.many = many.length;
  at("fields").replaceChildren(...names.map((name, place) => {
    const typed = make("textarea", { id: `field-${place}`, rows: "1", enterkeyhint: "send", oninput: () => {
      state.values[name] = typed.value;
      drawRequest();
    }, onkeydown: (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      at("ask").requestSubmit();
    } });
    typed.dataset.column = name;
    typed.value = state.values[name] || "";
    const readers = many.filter((one) => one.columns.includes(name)).map((one) => one.id);
    const hint = many.length > 1 && readers.length < many.length ? make("span", {}, `for ${readers.join(", ")}`) : null;
    return make("div", { class: "input" }, make("label", { for: typed.id }, name, hint), typed);
  }));
}

function recordOf(typed) {
  try {
    return JSON.parse(typed.value);
  } catch {
    return null; // not yet
  }
}

// Another choice of prompts reads other columns; what is typed stays.
function addColumns(typed, begun) {
  const found = recordOf(typed);
  if (found === null) return;
  const filled = Object.entries(found).filter(([name, value]) => name in begun || value !== "");
  const merged = { ...begun, ...Object.fromEntries(filled) };
  if (Object.keys(merged).join("\n") !== Object.keys(found).join("\n")) typed.value = JSON.stringify(merged, null, 2);
}

function drawCards() {
  const many = chosen();
  at("legend").hidden = !many.some((one) => one.slots);
  if (!many.length) {
    const first = state.prompts.length ? "Nothing is chosen" : "Nothing to ask yet";
    const then = state.prompts.length ? "Choose one or more prompts to see their templates and to ask them."
      : "Prompts appear here as soon as the server has some.";
    at("cards").replaceChildren(make("div", { class: "empty" }, make("b", {}, first), then));
    return;
  }
  at("asked").textContent = state.answers.size ? `to ${state.asked}` : "";
  at("cards").classList.toggle("single", !at("manual").checked);
  at("cards").replaceChildren(...many.map((one) => {
    const sides = [side(one, one.id, one.slots ? "Learned prompt" : "Manual prompt", one.pieces)];
    if (one.manual && at("manual").checked) sides.push(side(one, one.manual.id, "Manual prompt", one.manual.pieces));
    return make("article", { class: "card", "aria-label": one.id }, make("h3", {}, one.id),
      make("div", { class: "sides" }, ...sides));
  }));
}

function side(one, name, title, pieces) {
  const found = state.answers.get(name);
  const kind = name === one.id && one.slots ? "side" : "side manual";
  const order = Object.entries(state.answers.get(one.id)?.[0]?.probabilities || {});
  order.sort((a, b) => b[1] - a[1]);
  const shown = found ? found.map((each) => answer(each, order.map(([label]) => label)))
    : [make("p", { class: "answer none" }, "Not asked yet")];
  return make("div", { class: kind }, make("h4", {}, title), template(pieces), make("div", {}, ...shown));
}

function template(pieces) {
  return make("p", { class: "template" }, ...pieces.map((piece) => {
    if (piece.kind === "text") return piece.text;
    if (piece.kind === "slots") {
      const words = piece.text ? piece.text.trim() : plural(piece.count, "slot");
      const space = piece.text ? [/^\s*/.exec(piece.text)[0], /\s*$/.exec(piece.text)[0]] : ["", ""];
      const chip = make("span", { class: "chip slots" }, make("span", { class: "unseen" }, "slots: "), words);
      return make("span", {}, space[0], chip, space[1]);
    }
    if (piece.kind === "field") return make("span", { class: "chip field" }, piece.name);
    return make("span", { class: "chip target" }, piece.kind === "target" ? "answer" : "decoder reads");
  }));
}

function answer(one, order) {
  if (one.error) return make("p", { class: "wrong" }, sentence(one.error.message));
  const text = !one.prediction ? make("p", { class: "answer none" }, "It wrote nothing")
    : make("p", { class: "answer" }, one.prediction);
  if (!one.probabilities) return make("ul", { class: "bars", role: "list" }, bar(text, likelihood(one), "written"));
  const labels = [...new Set([...order, ...Object.keys(one.probabilities)])].filter((name) => name in one.probabilities);
  const bars = labels.slice(0, SHOWN_BARS).map((label) =>
    bar(make("span", {}, label), one.probabilities[label], label === one.prediction ? "first" : ""));
  const rest = labels.length - bars.length;
  return make("div", {}, make("ul", { class: "bars", role: "list" }, ...bars),
    rest > 0 ? make("p", { class: "hint" }, `and ${rest} more`) : null);
}

function bar(shown, probability, kind) {
  const fill = make("div", { class: "fill" });
  fill.style.width = `${100 * probability}%`;
  return make("li", { class: kind }, shown, make("span", { class: "share" }, percent(probability)),
    make("div", { class: "track", "aria-hidden": "true" }, fill));
}

// --- the request, as others would write it ---

// A value as JSON, or with Python's words as Python; on lines of its own only the outermost.
function written(value, words, indent = "") {
  if (value === null || typeof value === "boolean") return words[String(value)];
  if (Array.isArray(value)) return `[${value.map((one) => written(one, words)).join(", ")}]`;
  if (typeof value !== "object") return JSON.stringify(value).replaceAll("\u2028", "\\u2028").replaceAll("\u2029", "\\u2029");
  const parts = Object.entries(value).map(([name, one]) => `${JSON.stringify(name)}: ${written(one, words)}`);
  return indent ? `{\n${parts.map((one) => `${indent}${one},\n`).join("")}}` : `{${parts.join(", ")}}`;
}

const JSON_WORDS = { true: "true", false: "false", null: "null" };
const PYTHON_WORDS = { true: "True", false: "False", null: "None" };

const spelled = {
  curl(names, row) {
    const [model, records] = [names, [row]].map((one) => written(one, JSON_WORDS).replaceAll("'", "'\\''"));
    const key = state.hasKey ? `  -H "Authorization: Bearer $PTUNING_KEY" \\\n` : "";
    return `curl ${location.origin}/v1/predict \\\n  -H 'Content-Type: application/json' \\\n${key}  -d '{"model": ${model},\n       "records": ${records}}'`;
  },
  python(names, row) {
    const asked = written({ model: names, records: [row] }, PYTHON_WORDS, "    ");
    const key = state.hasKey ? `, "Authorization": f"Bearer {os.environ['PTUNING_KEY']}"` : "";
    return `import json\n${state.hasKey ? "import os\n" : ""}import urllib.request\n
asked = ${asked}
request = urllib.request.Request(
    "${location.origin}/v1/predict",
    data=json.dumps(asked).encode(),
    headers={"Content-Type": "application/json"${key}},
)
with urllib.request.urlopen(request) as answer:
    predictions = json.load(answer)["predictions"]
for name, (first, *_) in zip(asked["model"], predictions):
    print(name, first.get("prediction"), first.get("probabilities"))`;
  },
  openai(names, row) {
    const key = state.hasKey ? `os.environ["PTUNING_KEY"]` : `"none"`;
    return `${state.hasKey ? "import os\n\n" : ""}from openai import OpenAI\n
client = OpenAI(base_url="${location.origin}/v1", api_key=${key})
fields = ${written(row, PYTHON_WORDS)}
for name in ${written(names, PYTHON_WORDS)}:
    answer = client.completions.create(model=name, prompt="", extra_body={"fields": fields})
    print(name, answer.choices[0].text)`;
  },
};

function drawRequest() {
  const names = models();
  at("request").hidden = !names.length;
  at("code").firstElementChild.textContent = spelled[state.tab](names, shownRecord());
  for (const tab of at("tabs").children) {
    const isOpen = tab.id === `tab-${state.tab}`;
    tab.setAttribute("aria-selected", String(isOpen));
    tab.tabIndex = isOpen ? 0 : -1;
  }
  at("code").setAttribute("aria-labelledby", `tab-${state.tab}`);
}

function turnTab(event) {
  const tabs = [...at("tabs").children], place = tabs.indexOf(document.activeElement);
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const ends = { Home: 0, End: tabs.length - 1 }[event.key];
  if (place < 0 || (step === undefined && ends === undefined)) return;
  event.preventDefault();
  const next = tabs[ends ?? (place + step + tabs.length) % tabs.length];
  next.focus();
  next.click();
}

async function copy() {
  const text = at("code").textContent;
  let done = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch { // an address that is not secure has no clipboard of this kind
    const typed = make("textarea", { class: "unseen", "aria-hidden": "true" });
    typed.value = text;
    document.body.append(typed);
    typed.select();
    done = document.execCommand("copy");
    typed.remove();
    at("copy").focus();
  }
  at("copy").textContent = done ? "Copied" : "Select and copy it";
  at("said").textContent = done ? "The request is copied" : "";
  setTimeout(() => { at("copy").textContent = "Copy"; }, 2000);
}

at("ask").addEventListener("submit", ask);
at("filter").addEventListener("input", filter);
at("filter").addEventListener("keydown", (event) => { if (event.key === "Enter") event.preventDefault(); });
at("manual").addEventListener("change", drawAll);
at("as-json").addEventListener("change", () => {
  state.asJson = at("as-json").checked;
  drawAll();
});
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  state.key = at("key").value.trim();
  if (state.key) load();
});
at("tabs").addEventListener("click", (event) => {
  const tab = event.target.closest("[role=tab]");
  if (!tab) return;
  state.tab = tab.id.slice("tab-".length);
  drawRequest();
});
at("tabs").addEventListener("keydown", turnTab);
at("copy").addEventListener("click", copy);

load();

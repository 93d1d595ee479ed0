"use strict";

// Everything that comes from the server is put in as text, never as HTML.

// Characters of what was said before that the server takes.
const MOST_SAID = 8000;
const ALL = ["closed book", "neither tuned", "LM-ft only", "both"];
const form = document.getElementById("form");
const question = document.getElementById("question");
const send = document.getElementById("send");
const follow = document.getElementById("follow");
const before = document.getElementById("said");
const status = document.getElementById("status");
const systems = document.getElementById("systems");
const legend = document.getElementById("legend");

function element(tag, name, ...children) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  made.append(...children.map((child) => (typeof child === "string" ? document.createTextNode(child) : child)));
  return made;
}

function spoken(answer) {
  return answer === "" ? element("span", "empty", "(nothing)") : element("span", "", answer);
}

function logp(value) {
  return `log p ${value.toFixed(2).replace("-", "\u2212")}`;
}

function bar(weight) {
  const fill = element("div", "");
  fill.style.width = `${100 * weight}%`;
  const rail = element("div", "bar", fill);
  rail.setAttribute("role", "meter");
  rail.setAttribute("aria-label", "weight");
  rail.setAttribute("aria-valuemin", "0");
  rail.setAttribute("aria-valuemax", "1");
  rail.setAttribute("aria-valuenow", weight.toFixed(3));
  return rail;
}

function passage(of) {
  const own = element("p", "own", spoken(of.answer), " ", element("span", "fine", logp(of.logprob)));
  if (of.overruled) own.append(" ", element("span", "fine overruled", "overruled"));
  return element(
    "li",
    "passage",
    element("div", "head", element("span", "title", of.title || of.id), element("span", "weight", of.weight.toFixed(3))),
    bar(of.weight),
    own,
    element("details", "", element("summary", "", "passage"), element("p", "text", of.text)),
  );
}

function system(name, of) {
  const card = element(
    "article",
    "system",
    element("h2", "", name),
    element("p", "answer", spoken(of.answer)),
    element("p", "fine", logp(of.logprob)),
  );
  card.dataset.system = name;
  if (of.passages.length) card.append(element("ol", "passages", ...of.passages.map(passage)));
  return card;
}

function say(text, wrong) {
  status.textContent = text;
  status.classList.toggle("wrong", Boolean(wrong));
}

// The conversation so far: {role, content} by turns.
let said = [];

function remembered(turns) {
  const size = turns.reduce((sum, turn) => sum + turn.content.length, 0);
  return size > MOST_SAID ? remembered(turns.slice(2)) : turns;
}

function show(turns) {
  before.replaceChildren(...turns.map((turn) => element("li", turn.role, turn.content || "(nothing)")));
  before.hidden = turns.length === 0;
}

async function asked(text, history) {
  const response = await fetch("/ask", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ question: text, history }),
  });
  const value = await response.json();
  if (!response.ok) throw new Error(value.error);
  return value;
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (send.disabled) return;
  send.disabled = follow.disabled = true;
  const history = event.submitter === follow ? said : [];
  say("Answering\u2026");
  try {
    const value = await asked(question.value, history);
    const last = Object.values(value.systems).at(-1);
    said = remembered([...history, { role: "user", content: value.question }, { role: "assistant", content: last.answer }]);
    show(history);
    follow.hidden = false;
    systems.replaceChildren(...Object.entries(value.systems).map(([name, of]) => system(name, of)));
    legend.hidden = false;
    const missing = ALL.filter((name) => !(name in value.systems));
    say(value.question + (missing.length ? ` (not in this workdir: ${missing.join(", ")})` : ""));
  } catch (error) {
    say(error instanceof TypeError || error instanceof SyntaxError ? "The server does not answer." : error.message, true);
  } finally {
    send.disabled = follow.disabled = false;
  }
});

// The dashboard: follows the server's feed, and hands what comes to the cards.

import { Chart } from "./chart.js";
import { Chat } from "./chat.js";
import { ask, events, Refused, storeKey } from "./events.js";
import { number, percent, seconds, show, words } from "./format.js";
import { BlockMap, showMemory, showTotals } from "./memory.js";
import { Waterfalls } from "./waterfalls.js";

const KEPT = 300; // samples
const SMOOTH = 5; // samples whose mean is the pace that is written
const RETRY_MS = [500, 1000, 2000, 5000];

const $ = (id) => document.getElementById(id);
let samples = [];
let facts = {};
let failures = 0;
let following = null; // an AbortController, while the feed is open

// A card with figures and a chart; `figures(sample, samples up to it)` gives what is written, by name.
class Card {
  constructor(id, series, label, figures, isFilled) {
    this.section = $(id);
    this.figures = figures;
    this.chart = new Chart(this.section.querySelector(".chart"), series, label, () => this.write(), isFilled);
  }

  update() {
    this.chart.update(samples);
    this.write();
  }

  write() {
    const shown = this.chart.hovered ?? samples.at(-1);
    if (!shown) return;
    const end = samples.indexOf(shown) + 1;
    for (const [name, value] of Object.entries(this.figures(shown, samples.slice(Math.max(0, end - SMOOTH), end)))) {
      show(this.section.querySelector(`[data-value=${name}]`), value);
    }
  }
}

function latencyCard(id, key) {
  const part = (i) => (sample) => sample[key]?.[i] ?? null;
  const series = [
    { name: "s0", value: part(0) },
    { name: "s2", value: part(1) },
    { name: "s1", value: part(2) },
  ];
  const figures = (sample) =>
    Object.fromEntries(["p50", "p95", "p99"].map((name, i) => [name, sample[key] ? seconds(sample[key][i]) : "–"]));
  return new Card(id, series, (value) => words(seconds(value)), figures, false);
}

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const cards = [
  new Card(
    "throughput",
    [{ name: "s0", value: (sample) => sample.generation_tokens_per_s }],
    number,
    (_, last) => ({
      generated: number(Math.round(mean(last.map((each) => each.generation_tokens_per_s)))),
      prompt: number(Math.round(mean(last.map((each) => each.prompt_tokens_per_s)))),
    }),
    true,
  ),
  new Card(
    "requests",
    [
      { name: "s0", value: (sample) => sample.num_running },
      { name: "s1", value: (sample) => sample.num_waiting },
    ],
    number,
    (sample) => ({
      running: number(sample.num_running),
      waiting: number(sample.num_waiting),
      queue: sample.queue_s ? seconds(sample.queue_s) : "none",
    }),
    true,
  ),
  latencyCard("ttft", "ttft_s"),
  latencyCard("itl", "itl_s"),
  new Card(
    "kv",
    [
      { name: "s0", value: (sample) => sample.kv_usage },
      { name: "s2", value: (sample) => sample.prefix_hits },
    ],
    (value) => percent(value).join(" "),
    (sample) => ({
      usage: percent(sample.kv_usage),
      hits: sample.prefix_hits === null ? "–" : percent(sample.prefix_hits),
    }),
    true,
  ),
];
const blockMap = new BlockMap($("kv"));
const waterfalls = new Waterfalls($("slowest"));
new Chat($("chat"), (error) => error.status === 401 && needKey(error));
// The admin's listener has this page and no model.
ask("v1/models").catch((error) => ($("chat").hidden = error.status === 404));

const handlers = {
  history(history) {
    samples = history;
    for (const card of cards) card.update();
  },
  sample(sample) {
    samples.push(sample);
    samples.splice(0, samples.length - KEPT);
    for (const card of cards) card.update();
  },
  state(state) {
    facts = state.facts;
    $("model").textContent = state.model;
    document.title = `${state.model} · vcli`;
    const stages = { loading: state.stage, dead: `the engine is dead: ${state.stage}` };
    setStatus(state.status, stages[state.status] ?? [state.status, state.stage].filter(Boolean).join(": "));
    $("facts").textContent = describe(facts);
    blockMap.update(state.kv, state.blocks, facts);
    showMemory($("memory"), state);
    showTotals($("memory"), state.totals);
    waterfalls.update(state.slowest);
  },
};

function describe({ version, device, dtype, max_num_seqs, max_model_len, started }) {
  const parts = [`vcli ${version}`];
  if (device) {
    parts.push(`${device}, ${dtype}`, `${number(max_num_seqs)} requests at once`, `${number(max_model_len)} tokens each at most`);
  }
  const now = samples.at(-1)?.time ?? started; // by the server's clock
  return [...parts, `up ${words(seconds(Math.round(now - started)))}`].join(" · ");
}

function setStatus(status, words) {
  $("status").className = `pill ${status}`;
  $("status").textContent = words;
  document.body.classList.toggle("stale", status === "lost");
}

// Without a key there is nothing to be seen, with one that is no admin's only the chat.
function setAccess(access) {
  document.body.dataset.access = access;
  $("key").hidden = access === "all";
}

function needKey(error) {
  if (!(error instanceof Refused) || ![401, 403].includes(error.status)) return false;
  const isUnknown = error.status === 401;
  setAccess(isUnknown ? "none" : "chat");
  $("key-words").textContent = isUnknown
    ? "This server asks for an API key. It is kept in this tab alone."
    : "This key may use the model. What the server does is shown to admins.";
  setStatus("lost", isUnknown ? "a key is needed" : "not an admin's key");
  return true;
}

async function follow() {
  following?.abort();
  following = new AbortController();
  const { signal } = following;
  try {
    const response = await ask("dashboard/events", { signal });
    setAccess("all");
    for await (const event of events(response)) {
      failures = 0;
      handlers[event.name]?.(JSON.parse(event.data));
    }
    setStatus("lost", "the server has ended");
  } catch (error) {
    if (signal.aborted) return;
    if (needKey(error)) return; // until there is one
    setStatus("lost", error instanceof Refused ? error.message : "no connection");
  }
  setTimeout(() => signal.aborted || follow(), RETRY_MS[Math.min(failures++, RETRY_MS.length - 1)]);
}

$("key").addEventListener("submit", (event) => {
  event.preventDefault();
  storeKey($("key-input").value.trim());
  $("key-input").value = "";
  follow();
});

// Nobody looks at a hidden page: the server need not feed it. What it missed comes with the history.
document.addEventListener("visibilitychange", () => (document.hidden ? following?.abort() : follow()));
if (!document.hidden) follow();

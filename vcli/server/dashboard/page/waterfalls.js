// The slowest requests: a bar each for what it waited for; a click tells the rest.

import { create, listFacts, number, percent, seconds, words } from "./format.js";

const PHASES = ["queue", "prefill", "decode"];
const OUTCOMES = { stop: "came to its end", length: "reached its length", abort: "its client left", error: "failed" };

export class Waterfalls {
  constructor(section) {
    this.list = section.querySelector("ol");
    this.hint = section.querySelector(".hint");
    this.held = section.querySelector(".held");
    this.rows = new Map();
  }

  // The list holds still while somebody reads it: the pointer is over it, or a request is open.
  get isRead() {
    return this.list.matches(":hover") || this.list.querySelector("[aria-expanded=true]") !== null;
  }

  update(requests) {
    const isHeld = this.isRead && this.rows.size > 0;
    this.held.hidden = !isHeld;
    this.hint.hidden = requests.length > 0 || this.rows.size > 0;
    const byKey = new Map(requests.map((request) => [`${request.id} ${request.arrived.toFixed(1)}`, request]));
    if (!isHeld) this.arrange(byKey);
    const shown = [...this.rows].map(([key, row]) => (row.request = byKey.get(key) ?? row.request));
    const longest = Math.max(...shown.map((request) => request.total_s), 1e-9);
    for (const row of this.rows.values()) row.draw(longest);
  }

  arrange(byKey) {
    for (const [key, row] of this.rows) {
      if (!byKey.has(key)) {
        row.item.remove();
        this.rows.delete(key);
      }
    }
    [...byKey].forEach(([key, request], place) => {
      if (!this.rows.has(key)) this.rows.set(key, new Row(request));
      const { item } = this.rows.get(key);
      if (this.list.children[place] !== item) this.list.insertBefore(item, this.list.children[place] ?? null);
    });
  }
}

class Row {
  constructor(request) {
    this.request = request;
    this.item = create("li");
    this.button = create("button");
    this.button.type = "button";
    this.button.setAttribute("aria-expanded", "false");
    this.name = create("span", "name");
    this.track = create("span", "track");
    this.bars = PHASES.map((phase) => this.track.appendChild(create("i", phase)));
    this.total = create("span", "total");
    this.button.append(this.name, this.track, this.total);
    this.detail = create("div", "detail");
    this.detail.hidden = true;
    this.times = this.detail.appendChild(create("ul", "facts"));
    this.sizes = this.detail.appendChild(create("ul", "facts"));
    this.item.append(this.button, this.detail);
    this.button.addEventListener("click", () => {
      this.detail.hidden = !this.detail.hidden;
      this.button.setAttribute("aria-expanded", String(!this.detail.hidden));
      this.describe();
    });
  }

  draw(longest) {
    const { request } = this;
    const sizes = `${number(request.num_prompt_tokens)} → ${number(request.num_output_tokens)}`;
    this.name.replaceChildren(sizes, create("span", "unit", " tokens"));
    this.name.title = request.id;
    this.track.classList.toggle("open", isOpen(request));
    PHASES.forEach((phase, i) => {
      this.bars[i].style.width = `${(100 * request[`${phase}_s`]) / longest}%`;
    });
    this.total.textContent = words(seconds(request.total_s));
    if (!this.detail.hidden) this.describe();
  }

  describe() {
    const { request } = this;
    const { total_s, num_output_tokens: outputs, num_prompt_tokens: prompt, num_cached_tokens: cached } = request;
    listFacts(
      this.times,
      PHASES.map((phase) => {
        const spent = request[`${phase}_s`];
        return [phaseName(phase, request), `${words(seconds(spent))} · ${percent(spent / total_s).join("")}`, phase];
      }).concat([["arrived", new Date(request.arrived * 1000).toLocaleTimeString(), ""]]),
    );
    listFacts(this.sizes, [
      ["prompt", `${number(prompt)} tokens, ${number(cached)} of them cached`, ""],
      ["answer", `${number(outputs)} tokens`, ""],
      ["pace", outputs > 1 && request.decode_s ? `${number((outputs - 1) / request.decode_s)} tokens/s` : "–", ""],
      [isOpen(request) ? "under way" : OUTCOMES[request.outcome] ?? request.outcome, request.id.slice(0, 28), ""],
    ]);
  }
}

function isOpen(request) {
  return request.outcome === "running" || request.outcome === "waiting";
}

function phaseName(phase, request) {
  return phase === "queue" && request.outcome === "waiting" ? "queue and prefill, so far" : phase;
}

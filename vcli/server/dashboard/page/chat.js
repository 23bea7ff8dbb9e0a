// A conversation with the model, by the API that every client uses.

import { ask, events } from "./events.js";
import { create, number, seconds, words } from "./format.js";

const MAX_TOKENS = 1024;

export class Chat {
  // onRefused: called with what the server did not answer, so that it can ask for a key.
  constructor(section, onRefused) {
    this.log = section.querySelector(".log");
    this.hint = this.log.querySelector(".hint");
    this.form = section.querySelector("form");
    this.input = section.querySelector("textarea");
    this.button = section.querySelector("button[type=submit]");
    this.onRefused = onRefused;
    this.messages = [];
    this.running = null; // an AbortController, while an answer comes
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.running) this.running.abort();
      else this.send(this.input.value.trim());
    });
    this.input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      if (!this.running) this.form.requestSubmit();
    });
    section.querySelector("[name=clear]").addEventListener("click", () => this.clear());
  }

  clear() {
    this.running?.abort();
    this.messages = [];
    this.log.replaceChildren(this.hint);
  }

  async send(text) {
    if (!text) return;
    this.hint.remove();
    this.input.value = "";
    this.add("asked", text);
    this.running = new AbortController();
    this.button.textContent = "Stop";
    const messages = [...this.messages, { role: "user", content: text }];
    const pending = this.add("soft", "waits for the first token …");
    const answer = { text: "", tokens: 0, begun: 0, sent: performance.now(), element: null, pending };
    try {
      await this.stream(messages, answer, this.running.signal);
    } catch (error) {
      if (error.name !== "AbortError") {
        this.add("failed", error.message);
        this.onRefused(error);
      }
    }
    pending.remove();
    if (answer.text) {
      this.messages = [...messages, { role: "assistant", content: answer.text }];
      this.add("soft", this.pace(answer));
    } else if (!this.input.value) {
      this.input.value = text; // to be sent again
    }
    this.running = null;
    this.button.textContent = "Send";
  }

  async stream(messages, answer, signal) {
    const body = { messages, stream: true, max_tokens: MAX_TOKENS, stream_options: { include_usage: true } };
    const headers = { "Content-Type": "application/json" };
    const options = { method: "POST", headers, body: JSON.stringify(body), signal };
    for await (const event of events(await ask("v1/chat/completions", options))) {
      if (event.data === "[DONE]") return;
      const data = JSON.parse(event.data);
      if (data.error) throw new Error(data.error.message);
      answer.tokens = data.usage?.completion_tokens ?? answer.tokens;
      const delta = data.choices?.[0]?.delta;
      if (delta) this.take(delta, answer);
    }
  }

  take(delta, answer) {
    const thought = delta.reasoning_content ?? delta.reasoning;
    if (!thought && !delta.content) return;
    answer.begun ||= performance.now();
    answer.pending.remove();
    const kind = thought ? "thought" : "answer";
    if (answer.element?.className !== kind) answer.element = this.add(kind, "");
    answer.element.append(thought || delta.content);
    answer.text += delta.content ?? "";
    this.follow();
  }

  pace(answer) {
    const first = (answer.begun - answer.sent) / 1000;
    const rest = (performance.now() - answer.begun) / 1000;
    const pace = answer.tokens > 1 ? ` · ${number(answer.tokens)} tokens · ${number((answer.tokens - 1) / rest)} a second` : "";
    return `first token after ${words(seconds(first))}${pace}`;
  }

  add(className, text) {
    const element = this.log.appendChild(create("p", className, text));
    this.follow(true);
    return element;
  }

  // Stay at the end, unless the reader has scrolled up.
  follow(isForced = false) {
    const { log } = this;
    if (isForced || log.scrollHeight - log.scrollTop - log.clientHeight < 60) log.scrollTop = log.scrollHeight;
  }
}

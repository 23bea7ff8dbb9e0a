// The KV cache block by block, and the memory around it.

import { bytes, create, listFacts, number, percent, show, words } from "./format.js";

const STATES = ["free", "cached", "used", "shared"]; // as the engine numbers them
const NAMES = { kv_cache: "KV cache", cuda_graphs: "CUDA graphs", resident: "engine, in memory" };
const NUM_COLORS = 4; // of the kinds of memory

export class BlockMap {
  constructor(section) {
    this.section = section;
    this.canvas = section.querySelector("canvas");
    this.blocks = new Uint8Array();
    new ResizeObserver(() => this.draw()).observe(this.canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  // blocks: a byte for each block, in base64
  update(kv, blocks, facts) {
    this.blocks = Uint8Array.from(atob(blocks), (letter) => letter.charCodeAt(0));
    const value = (name) => this.section.querySelector(`[data-value=${name}]`);
    show(value("waste"), percent(kv.waste));
    show(value("room"), facts.num_blocks ? number(facts.num_blocks * facts.block_size) : "–");
    const label = `${number(kv.num_blocks_used)} of ${number(kv.num_blocks)} KV blocks are in use`;
    this.canvas.setAttribute("aria-label", label);
    this.draw();
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    const { blocks } = this;
    const ratio = devicePixelRatio || 1;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    if (!width || !blocks.length) return;
    const colors = getComputedStyle(document.documentElement);
    const palette = STATES.map((state) => colors.getPropertyValue(`--${state}`));
    const context = this.canvas.getContext("2d");
    const columns = Math.ceil(Math.sqrt((blocks.length * width) / height));
    const rows = Math.ceil(blocks.length / columns);
    const size = Math.min(this.canvas.width / columns, this.canvas.height / rows);
    const gap = size > 4 ? Math.max(1, Math.round(size / 8)) : size > 2.5 ? 1 : 0;
    const across = this.canvas.width / columns;
    for (let i = 0; i < blocks.length; i++) {
      context.fillStyle = palette[blocks[i]];
      const [left, top] = [Math.round((i % columns) * across), Math.round(Math.floor(i / columns) * size)];
      const right = Math.round(((i % columns) + 1) * across);
      context.fillRect(left, top, right - left - gap, Math.round((Math.floor(i / columns) + 1) * size) - top - gap);
    }
  }
}

// A device's memory is made of its kinds; what processes have in a CPU's is not.
export function showMemory(section, { memory, fragmentation, kv }) {
  const kinds = Object.entries(memory);
  const isWhole = "free" in memory;
  const total = kinds.reduce((sum, [, size]) => sum + size, 0);
  const color = (kind, i) => (kind === "free" ? "free" : `part-${i % NUM_COLORS}`);
  section.querySelector("h2").textContent = isWhole ? "GPU memory" : "Memory";
  const bar = section.querySelector(".bar");
  bar.hidden = !isWhole;
  bar.setAttribute("aria-label", kinds.map(([kind, size]) => `${kind} ${words(bytes(size))}`).join(", "));
  bar.replaceChildren(
    ...kinds.map(([kind, size], i) => {
      const part = create("i", color(kind, i));
      part.style.width = `${(100 * size) / total}%`;
      return part;
    }),
  );
  const facts = kinds.map(([kind, size], i) => [NAMES[kind] ?? kind, words(bytes(size)), isWhole ? color(kind, i) : ""]);
  if (fragmentation !== null) facts.push(["fragmentation", percent(fragmentation).join(" "), ""]);
  if (kv.host_blocks) {
    facts.push(["KV blocks on the host", `${number(kv.host_blocks_used)} of ${number(kv.host_blocks)}`, ""]);
  }
  listFacts(section.querySelector(".parts"), facts);
}

export function showTotals(section, totals) {
  listFacts(section.querySelector(".totals"), [
    ["engine restarts", number(totals.restarts), ""],
    ["preemptions", number(totals.num_preemptions), ""],
    ["requests refused", number(totals.rejections), ""],
    ["tokens generated", number(totals.generation_tokens), ""],
    ["prompt tokens", number(totals.prompt_tokens), ""],
  ]);
}

// Lines over the last five minutes. The newest sample is at the right edge; where nothing was measured there is a gap.

const SPAN_S = 300;
const BOTTOM = 18; // for the words under the axis
const TOP = 6;
const NAMESPACE = "http://www.w3.org/2000/svg";

export class Chart {
  // series: [{name of its colour, function from a sample to a value or null}]; label: of a value on the axis;
  // onHover: called with the sample under the pointer, or with null when it has left.
  constructor(place, series, label, onHover, isFilled = false) {
    Object.assign(this, { place, series, label, onHover, isFilled, samples: [], hovered: null });
    const title = place.parentElement.querySelector("h2").textContent;
    this.svg = place.appendChild(node("svg", { role: "img", "aria-label": `${title}, the last five minutes` }));
    new ResizeObserver(() => this.draw()).observe(place);
    place.addEventListener("pointermove", (event) => this.hover(event.offsetX));
    place.addEventListener("pointerdown", (event) => this.hover(event.offsetX));
    place.addEventListener("pointerleave", () => this.hover(null));
  }

  update(samples) {
    this.samples = samples;
    this.draw();
  }

  hover(x) {
    const { samples } = this;
    if (x === null || !samples.length) {
      this.hovered = null;
    } else {
      const time = samples.at(-1).time - SPAN_S * (1 - x / this.place.clientWidth);
      const distance = (sample) => Math.abs(sample.time - time);
      this.hovered = samples.reduce((best, sample) => (distance(sample) < distance(best) ? sample : best));
    }
    this.onHover(this.hovered);
    this.draw();
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.place;
    if (!width) return;
    const { samples, series } = this;
    const most = samples.reduce((top, sample) => Math.max(top, ...series.map((each) => each.value(sample) ?? 0)), 0);
    const step = niceStep(most / 3);
    const top = Math.max(step * Math.ceil(most / step), step);
    const bottom = height - BOTTOM;
    const last = samples.at(-1)?.time ?? 0;
    const x = (sample) => width * (1 - (last - sample.time) / SPAN_S);
    const y = (value) => bottom - ((bottom - TOP) * value) / top;

    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.replaceChildren();
    for (let value = 0; value <= (most ? top * 1.001 : 0); value += step) {
      const level = Math.round(y(value)) + 0.5;
      this.svg.append(node("line", { class: "grid", x1: 0, x2: width, y1: level, y2: level }));
      if (value > 0) this.svg.append(node("text", { x: 0, y: level + 12 }, this.label(value)));
    }
    this.svg.append(node("text", { x: 0, y: height - 3 }, "5 min ago"));
    this.svg.append(node("text", { x: width, y: height - 3, "text-anchor": "end" }, "now"));
    const inside = samples.filter((sample) => sample.time > last - SPAN_S);
    for (const each of [...series].reverse()) {
      const runs = unbroken(inside, each.value).map((run) => run.map((sample) => [x(sample), y(each.value(sample))]));
      if (this.isFilled && each === series[0]) {
        const areas = runs.map((run) => `${path(run)}V${bottom}H${run[0][0].toFixed(1)}Z`);
        this.svg.append(node("path", { class: "area", d: areas.join("") }));
      }
      this.svg.append(node("path", { class: `curve ${each.name}`, d: runs.map(path).join("") }));
    }
    if (this.hovered) {
      const at = x(this.hovered);
      this.svg.append(node("line", { class: "cursor", x1: at, x2: at, y1: TOP, y2: bottom }));
      const anchor = at < width / 2 ? "start" : "end";
      const words = new Date(this.hovered.time * 1000).toLocaleTimeString();
      this.svg.append(node("text", { x: at + (at < width / 2 ? 5 : -5), y: bottom - 5, "text-anchor": anchor }, words));
    }
  }
}

// The parts of the samples in which each has a value.
function unbroken(samples, value) {
  const runs = [];
  let run = null;
  for (const sample of samples) {
    if (value(sample) === null) run = null;
    else if (run) run.push(sample);
    else runs.push((run = [sample]));
  }
  return runs;
}

function path(points) {
  return points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("") + (points.length > 1 ? "" : "h.1");
}

// 1, 2 or 5 times a power of ten, at least as large as the value.
function niceStep(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 2, 5, 10].find((factor) => factor * power >= value * 0.999);
}

function node(tag, attributes, text) {
  const element = document.createElementNS(NAMESPACE, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

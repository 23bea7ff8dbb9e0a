// Numbers as people read them: three digits that mean something, and a unit.

export function number(value) {
  if (value >= 1e9) return `${digits(value / 1e9)} G`;
  if (value >= 1e6) return `${digits(value / 1e6)} M`;
  return value >= 100 || Number.isInteger(value) ? Math.round(value).toLocaleString("en") : digits(value);
}

export function percent(share) {
  return [share > 0 && share < 0.1 ? (100 * share).toFixed(1) : Math.round(100 * share).toString(), "%"];
}

export function seconds(value) {
  if (!value) return ["0", "s"];
  if (value < 1e-3) return [Math.round(value * 1e6).toString(), "µs"];
  if (value < 1) return [digits(value * 1e3), "ms"];
  if (value < 120) return [digits(value), "s"];
  if (value < 7200) return [Math.round(value / 60).toString(), "min"];
  return value < 172800 ? [Math.round(value / 3600).toString(), "h"] : [Math.round(value / 86400).toString(), "days"];
}

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = value < 1 ? 0 : Math.min(Math.floor(Math.log2(value) / 10), units.length - 1);
  return [digits(value / 1024 ** power), units[power]];
}

export function words(pair) {
  return pair.join(" ");
}

// Write a figure, given as text or as [number, unit].
export function show(element, value) {
  const [text, unit] = Array.isArray(value) ? value : [value, ""];
  element.textContent = text;
  if (unit) element.append(create("small", "", unit));
}

export function create(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

// A list of facts: [name, value, class of its dot or ""].
export function listFacts(list, facts) {
  list.replaceChildren(
    ...facts.map(([name, value, dot]) => {
      const label = create("span", "", name);
      if (dot) label.prepend(create("i", `dot ${dot}`));
      const item = create("li");
      item.append(label, create("b", "", value));
      return item;
    }),
  );
}

function digits(value) {
  return value >= 100 ? Math.round(value).toString() : value.toPrecision(3).replace(/\.?0+$/, "");
}

"use strict";
// What the drawings share: the numbers of the page, elements, scales, and who is shown and picked.
const data = JSON.parse(document.getElementById("data").textContent);

const make = (namespace) => (name, attributes, ...children) => {
  const element = document.createElementNS(namespace, name);
  for (const [key, value] of Object.entries(attributes || {}))
    if (typeof value === "function") element.addEventListener(key, value);
    else if (value !== false && value != null) element.setAttribute(key, value === true ? "" : value);
  element.append(...children.filter((child) => child != null));
  return element;
};
const inline = document.createElement("template");
inline.innerHTML = "<svg></svg>";
const html = make(document.documentElement.namespaceURI), svg = make(inline.content.firstChild.namespaceURI);

const percent = (share) => (share == null ? "-" : (100 * share).toFixed(1));
const short = (text, length) => (text.length > length ? text.slice(0, length - 1) + "…" : text);
const decimals = (value) => (value == null ? "-" : String(+value.toPrecision(4)));
const series = (place) => `--kind: var(--series-${place % 8})`;
const choices = (names) => names.map((name, place) => html("option", { value: place }, name));

// A scale from values to pixels; logarithmic where asked. `ticks` are round numbers within it.
const scale = (low, high, start, end, isLog) => {
  const on = isLog ? Math.log10 : (value) => value;
  const spread = on(high) - on(low) || 1;
  const place = (value) => start + ((on(value) - on(low)) / spread) * (end - start);
  return { place, ticks: isLog ? powers(low, high) : steps(low, high) };
};
const steps = (low, high) => {
  const rough = (high - low || 1) / 4, size = 10 ** Math.floor(Math.log10(rough));
  const step = size * [1, 2, 5, 10].find((one) => one * size >= rough);
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, n) => +((first + n) * step).toPrecision(10));
};
const powers = (low, high) => {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1)
    for (const one of [1, 2, 5]) if (one * 10 ** power >= low * 0.999 && one * 10 ** power <= high * 1.001) found.push(+(one * 10 ** power).toPrecision(3));
  return found.length > 6 ? found.filter((one) => String(one).replace(/[0.]/g, "").startsWith("1")) : found;
};

// Draw into `box` now, and again whenever its width changes; `paint` gets the width and gives an element.
const drawn = (box, paint) => {
  let width = 0;
  const again = () => { box.replaceChildren(paint(Math.max(width, 280))); };
  new ResizeObserver(([entry]) => {
    const now = Math.floor(entry.contentRect.width);
    if (now && now !== width) { width = now; again(); }
  }).observe(box);
  width = Math.floor(box.clientWidth);
  again();
  return again;
};

// Models that pass the filter and the brushes, and models picked to be laid over one another.
const page = {
  brushed: null,  // a set of models, or null where nothing is brushed
  picked: new Set(),
  listeners: {},
  on(name, listener) { (this.listeners[name] ||= []).push(listener); },
  tell(name, value) { for (const listener of this.listeners[name] || []) listener(value); },
};

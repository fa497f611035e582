"use strict";
// What trainings logged over their steps.
{
  const box = document.getElementById("curves"), metric = document.getElementById("curves-metric"), log = document.getElementById("curves-log");
  const legend = document.getElementById("curves-legend"), told = document.getElementById("curves-told");
  const TITLES = { loss: "loss", ce: "cross-entropy of the dialogues", fusion: "cross-entropy of the fused distributions", grad_norm: "norm of the gradient", lr: "learning rate" };
  const HEIGHT = 300, LEFT = 58, RIGHT = 14, TOP = 12, BOTTOM = 34;
  const { lines } = data.curves;
  let only = null, marks = [];

  const point = (number) => marks.forEach(({ group, line }) => group.classList.toggle("faded", number !== null && line !== number));
  const paint = (width) => {
    const name = metric.value, found = lines.map((line, number) => ({ line, number, values: line.metrics[name] })).filter(({ values }) => values);
    const isLog = log.checked && found.every(({ values }) => values.every((value) => value === null || value > 0));
    const all = found.flatMap(({ values }) => values).filter((value) => value !== null), last = Math.max(...found.map(({ line }) => line.steps[line.steps.length - 1]));
    const low = Math.min(...all), high = Math.max(...all);
    const x = scale(0, last, LEFT, width - RIGHT), y = scale(isLog ? low : Math.min(0, low), high, HEIGHT - BOTTOM, TOP, isLog);
    const picture = svg("svg", { width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": `${TITLES[name] || name} over steps of ${found.length} trainings` });
    for (const value of y.ticks) picture.append(svg("line", { class: "ring", x1: LEFT, x2: width - RIGHT, y1: y.place(value), y2: y.place(value) }), svg("text", { class: "tick", x: LEFT - 6, y: y.place(value) + 4, "text-anchor": "end" }, decimals(value)));
    for (const value of x.ticks) picture.append(svg("text", { class: "tick", x: x.place(value), y: HEIGHT - BOTTOM + 16, "text-anchor": "middle" }, value));
    picture.append(svg("text", { class: "tick", x: width - RIGHT, y: HEIGHT - 4, "text-anchor": "end" }, "optimiser steps"));
    marks = found.map(({ line, number, values }) => {
      const known = line.steps.map((step, place) => [step, values[place]]).filter(([, value]) => value !== null);
      const path = known.map(([step, value], place) => `${place ? "L" : "M"}${x.place(step).toFixed(1)} ${y.place(value).toFixed(1)}`).join("");
      const group = svg("g", { class: "curve", style: series(number) }, svg("path", { d: path }, svg("title", {}, line.name)));
      picture.append(group);
      return { group, line: number, name: line.name, known };
    });
    const cursor = svg("circle", { class: "cursor", r: 4, visibility: "hidden" });
    picture.append(cursor);
    picture.onpointermove = (event) => {
      const frame = picture.getBoundingClientRect(), [px, py] = [event.clientX - frame.left, event.clientY - frame.top];
      let best = null;
      for (const mark of marks) for (const [step, value] of mark.known) {
        const away = Math.hypot(x.place(step) - px, y.place(value) - py);
        if (!best || away < best.away) best = { away, mark, step, value };
      }
      if (!best || best.away > 60) return picture.onpointerleave();
      cursor.setAttribute("cx", x.place(best.step));
      cursor.setAttribute("cy", y.place(best.value));
      cursor.setAttribute("visibility", "visible");
      told.textContent = `${best.mark.name}, step ${best.step}: ${decimals(best.value)}`;
      point(best.mark.line);
    };
    picture.onpointerleave = () => { cursor.setAttribute("visibility", "hidden"); told.textContent = ""; point(only); };
    point(only);
    return picture;
  };
  const names = [...new Set(lines.flatMap((line) => Object.keys(line.metrics)))];
  metric.append(...names.map((name) => html("option", { value: name }, TITLES[name] || name)));
  const again = drawn(box, paint);
  metric.onchange = log.onchange = again;
  legend.append(...lines.map((line, number) => {
    const button = html("button", { type: "button", "aria-pressed": "false", style: series(number), mouseenter: () => point(number), mouseleave: () => point(only), focus: () => point(number), blur: () => point(only) }, html("span", { class: "swatch" }), line.name);
    button.onclick = () => {
      only = only === number ? null : number;
      for (const other of legend.querySelectorAll("button")) other.setAttribute("aria-pressed", String(other === button && only !== null));
      point(only);
    };
    return html("li", {}, button);
  }));
}

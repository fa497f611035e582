"use strict";
// Parallel coordinates: an axis per hyper-parameter that varies and one for the score, a line per model.
{
  const MOST_AXES = 8, MOST_LINES = 400, TOP = 46, BOTTOM = 22, HEIGHT = 330, SNAP = 7;
  const box = document.getElementById("parallel");
  const models = data.contest.slice(0, MOST_LINES);
  const told = (value) => (value == null ? null : typeof value === "object" ? JSON.stringify(value) : value);
  const score = (model) => (data.models[model].scores[data.average] || [null])[0];
  const varying = data.settings.filter(({ values }) => new Set(models.map((model) => JSON.stringify(told(values[model])))).size > 1);
  const axes = [
    ...varying.slice(0, MOST_AXES).map(({ name, values }) => ({ name, value: (model) => told(values[model]) })),
    { name: `${data.average}, %`, value: (model) => (score(model) == null ? null : 100 * score(model)) },
  ];
  const brushes = new Map();  // axis -> [top, bottom] in pixels

  for (const axis of axes) {
    const found = [...new Set(models.map(axis.value).filter((value) => value !== null))];
    axis.lacks = models.some((model) => axis.value(model) === null);
    const end = HEIGHT - BOTTOM - (axis.lacks ? 30 : 0);
    if (found.length && found.every((value) => typeof value === "number")) {
      const low = Math.min(...found), high = Math.max(...found);
      const isLog = low > 0 && high / low >= 50;
      const { place, ticks } = scale(low, high, end, TOP, isLog);
      axis.place = (value) => (value === null ? HEIGHT - BOTTOM : low === high ? (TOP + end) / 2 : place(value));
      const spots = found.map(axis.place).sort((a, b) => a - b);
      axis.ticks = found.length <= 12 && spots.every((y, n) => !n || y - spots[n - 1] > 12) ? found : ticks;
      axis.label = decimals;
      axis.note = isLog ? "log" : "";
    } else {
      const order = found.map(String).sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
      const gap = (end - TOP) / Math.max(1, order.length - 1);
      axis.place = (value) => (value === null ? HEIGHT - BOTTOM : order.length === 1 ? (TOP + end) / 2 : TOP + gap * order.indexOf(String(value)));
      axis.ticks = order.length <= 24 ? order : order.filter((_, n) => n % Math.ceil(order.length / 24) === 0);
      axis.label = (text) => short(text, 16);
      axis.note = "";
    }
  }

  const passes = (model) => [...brushes].every(([axis, [top, bottom]]) => {
    const y = axis.place(axis.value(model));
    return y >= top - SNAP && y <= bottom + SNAP;
  });
  const scores = models.map(score).filter((value) => value !== null);
  const worst = Math.min(...scores), best = Math.max(...scores);
  const strength = (model) => (score(model) === null ? 0 : best === worst ? 100 : Math.round((100 * (score(model) - worst)) / (best - worst)));
  const lines = new Map(), marks = new Map();
  let shown = null;
  const clear = document.getElementById("clear"), note = document.getElementById("brushed");

  const update = () => {
    for (const [axis, mark] of marks) {
      const range = brushes.get(axis);
      mark.setAttribute("visibility", range ? "visible" : "hidden");
      if (range) { mark.setAttribute("y", range[0] - SNAP); mark.setAttribute("height", range[1] - range[0] + 2 * SNAP); }
    }
    const within = models.filter(passes);
    for (const [model, line] of lines) line.classList.toggle("away", !passes(model) || (shown !== null && !shown.has(model)));
    clear.hidden = !brushes.size;
    note.textContent = brushes.size ? `${within.length} of ${models.length} lines; the table shows these alone.` : "";
  };
  const brush = (axis, range) => {
    if (range) brushes.set(axis, range); else brushes.delete(axis);
    page.brushed = brushes.size ? new Set(models.filter(passes)) : null;
    update();
    page.tell("brushed");
  };
  const point = (model) => {
    for (const [other, line] of lines) line.classList.toggle("pointed", other === model);
    if (lines.has(model)) lines.get(model).parentNode.append(lines.get(model));
    document.getElementById("pointed").textContent = model === null || !lines.has(model) ? "" : `${data.models[model].label}: ${percent(score(model))}`;
  };

  const within = (y) => Math.max(TOP, Math.min(HEIGHT - BOTTOM, y));
  const drag = (axis, event) => {
    const area = event.currentTarget, top = area.ownerSVGElement.getBoundingClientRect().top;
    const start = within(event.clientY - top);
    let range = null;
    area.setPointerCapture(event.pointerId);
    area.onpointermove = (moved) => {
      const y = within(moved.clientY - top);
      range = Math.abs(y - start) < 4 ? null : [Math.min(start, y), Math.max(start, y)];
      brush(axis, range);
    };
    area.onpointerup = () => { area.onpointermove = area.onpointerup = null; if (!range) brush(axis, null); };
  };
  const type = (axis, event) => {
    const middle = (TOP + HEIGHT - BOTTOM) / 2, [top, bottom] = brushes.get(axis) || [TOP, middle];
    const by = (HEIGHT - TOP - BOTTOM) / 12, way = { ArrowUp: -by, ArrowDown: by }[event.key];
    if (event.key === "Escape") brush(axis, null);
    else if (event.key === "Enter" || event.key === " ") brush(axis, [TOP, middle]);
    else if (way && event.shiftKey) brush(axis, [top, Math.max(top, within(bottom + way))]);
    else if (way) brush(axis, [within(top + way), within(bottom + way)]);
    else return;
    event.preventDefault();
  };

  const paint = (width) => {
    const longest = Math.max(0, ...axes[0].ticks.map((value) => axes[0].label(value).length));
    const left = Math.min(150, 24 + 6.6 * longest), right = 50, wide = Math.max(width, axes.length * 104);
    const across = (number) => left + ((wide - left - right) * number) / Math.max(1, axes.length - 1);
    const picture = svg("svg", { width: wide, height: HEIGHT, viewBox: `0 0 ${wide} ${HEIGHT}`, role: "group", "aria-label": "parallel coordinates of the hyper-parameters that vary and the average score" });
    const all = svg("g", { class: models.length > 60 ? "lines many" : "lines" });
    lines.clear();
    marks.clear();
    for (const model of [...models].reverse()) {
      const path = axes.map((axis, number) => `${number ? "L" : "M"}${across(number).toFixed(1)} ${axis.place(axis.value(model)).toFixed(1)}`).join("");
      const line = svg("path", { d: path, style: `--strength: ${strength(model)}%`, mouseenter: () => point(model), mouseleave: () => point(null) }, svg("title", {}, data.models[model].label));
      lines.set(model, line);
      all.append(line);
    }
    picture.append(all);
    axes.forEach((axis, number) => {
      const x = across(number), isLast = number === axes.length - 1;
      const beside = { x: x + (isLast ? 8 : -8), "text-anchor": isLast ? "start" : "end" };
      const mark = svg("rect", { class: "brush", x: x - 9, width: 18, visibility: "hidden" });
      const hint = `${axis.name}: drag to keep a range; or Enter, arrows to move, Shift and arrows to widen, Escape to clear`;
      marks.set(axis, mark);
      picture.append(
        svg("text", { class: "axis-name", x, y: 18, "text-anchor": isLast ? "end" : "middle", dx: isLast ? 44 : 0 }, short(axis.name, Math.max(10, Math.floor(wide / axes.length / 7.5))), svg("title", {}, axis.name)),
        svg("text", { class: "tick", x, y: 32, "text-anchor": "middle" }, axis.note),
        svg("line", { class: "axis", x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM }),
        ...axis.ticks.map((value) => svg("text", { class: "tick", ...beside, y: axis.place(value) + 4 }, axis.label(value), svg("title", {}, String(value)))),
        ...(axis.lacks ? [svg("text", { class: "tick", ...beside, y: HEIGHT - BOTTOM + 4 }, "none")] : []),
        mark,
        svg("rect", { class: "grip", x: x - 14, width: 28, y: TOP - SNAP, height: HEIGHT - TOP - BOTTOM + 2 * SNAP, tabindex: 0, role: "button", "aria-label": hint, pointerdown: (event) => drag(axis, event), keydown: (event) => type(axis, event) }, svg("title", {}, hint)),
      );
    });
    update();
    return picture;
  };

  drawn(box, paint);
  clear.onclick = () => { brushes.clear(); brush(axes[0], null); };
  page.on("shown", (now) => { shown = now; update(); });
  page.on("pointed", point);
  const left = [
    varying.length > MOST_AXES ? `${varying.length - MOST_AXES} more settings vary; they are in the table.` : "",
    data.contest.length > MOST_LINES ? `The ${MOST_LINES} best of ${data.contest.length} are drawn.` : "",
  ];
  document.getElementById("parallel-note").textContent = left.filter(Boolean).join(" ");
}

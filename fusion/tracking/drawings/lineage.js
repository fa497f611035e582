"use strict";
// What one model was made from, left to right: dialogues and models, distributions, targets, the merge.
{
  const box = document.getElementById("lineage"), chosen = document.getElementById("lineage-run");
  const COLUMN = { dialogues: 0, pivot: 0, source: 0, distributions: 1, target: 2, sft: 2, merged: 3 };
  const TITLES = ["read", "teachers' distributions", "stage 1", "stage 2"], HIGH = 40, GAP = 14, TOP = 26;
  const { pieces, runs } = data.lineage;

  const layout = (edges) => {
    const found = [...new Set(edges.flat())], used = [...new Set(found.map((one) => COLUMN[pieces[one].stage]))].sort();
    const columns = used.map((column) => found.filter((one) => COLUMN[pieces[one].stage] === column).sort((a, b) => a - b));
    const most = Math.max(...columns.map((column) => column.length)), height = TOP + most * (HIGH + GAP);
    const spots = new Map();
    columns.forEach((column, number) => column.forEach((one, row) =>
      spots.set(one, { number, y: TOP + ((height - TOP) * (row + 0.5)) / column.length - HIGH / 2 })));
    return { used, spots, height };
  };
  const paint = (width) => {
    const { name, edges } = runs[Number(chosen.value)], { used, spots, height } = layout(edges);
    const between = 52, wide = Math.max(width, used.length * 150), across = (wide - between * (used.length - 1)) / used.length;
    const left = (number) => number * (across + between);
    const picture = svg("svg", { width: wide, height, viewBox: `0 0 ${wide} ${height}`, role: "img", "aria-label": `lineage of ${name}` });
    used.forEach((column, number) => picture.append(svg("text", { class: "tick", x: left(number) + 2, y: 14 }, TITLES[column])));
    for (const [from, to] of edges) {
      const a = spots.get(from), b = spots.get(to), x1 = left(a.number) + across, x2 = left(b.number), bend = Math.max(20, (x2 - x1) / 2);
      picture.append(svg("path", { class: `edge ${pieces[from].stage}`, d: `M${x1} ${a.y + HIGH / 2}C${x1 + bend} ${a.y + HIGH / 2} ${x2 - bend} ${b.y + HIGH / 2} ${x2} ${b.y + HIGH / 2}`, "data-from": from, "data-to": to }));
    }
    for (const [one, { number, y }] of spots) {
      const piece = pieces[one], room = Math.floor(across / 7.4);
      const kin = () => new Set(edges.filter((edge) => edge.includes(one)).flat().concat(one));
      const point = (is) => { const near = kin(); for (const other of picture.querySelectorAll(".node")) other.classList.toggle("faded", is && !near.has(Number(other.dataset.piece))); for (const edge of picture.querySelectorAll(".edge")) edge.classList.toggle("faded", is && edge.dataset.from !== String(one) && edge.dataset.to !== String(one)); };
      picture.append(svg("g", { class: `node ${piece.stage}`, tabindex: 0, "data-piece": one, mouseenter: () => point(true), mouseleave: () => point(false), focus: () => point(true), blur: () => point(false) },
        svg("title", {}, `${piece.stage} ${piece.name}\n${piece.content}`),
        svg("rect", { x: left(number) + 0.5, y: y + 0.5, width: across - 1, height: HIGH - 1, rx: 5 }),
        svg("text", { x: left(number) + 12, y: y + 17 }, short(piece.name, room - 2)),
        svg("text", { class: "tick", x: left(number) + 12, y: y + 32 }, short(/^[0-9a-f]{12,}$/.test(piece.content) ? piece.content.slice(0, 12) : "…" + piece.content.slice(-(room - 4)), room))));
    }
    return picture;
  };
  chosen.append(...choices(runs.map((run) => run.name)));
  const again = drawn(box, paint);
  chosen.onchange = again;
}

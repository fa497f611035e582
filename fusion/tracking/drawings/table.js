"use strict";
// The table of scores: filter over all columns, chosen columns, pages, models picked for the radar.
{
  const MOST_PICKED = 5;
  const table = document.getElementById("scores"), rows = [...table.tBodies[0].rows];
  const place = (row) => Number(row.dataset.model);
  const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase().replace(/\s+/g, " ")]));
  const filter = document.getElementById("filter"), count = document.getElementById("shown");
  const pages = document.getElementById("pages"), size = pages.querySelector("select");
  const [back, on] = pages.querySelectorAll("button");
  let first = 0;

  const passing = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    return [...table.tBodies[0].rows].filter((row) =>
      (!page.brushed || page.brushed.has(place(row))) && words.every((word) => texts.get(row).includes(word)));
  };
  const show = () => {
    const found = passing(), length = Number(size.value) || found.length;
    first = Math.max(0, Math.min(first, Math.floor((found.length - 1) / length) * length || 0));
    const shown = new Set(found.slice(first, first + length));
    for (const row of rows) row.hidden = !shown.has(row);
    const there = new Set([...shown].map(place));
    for (const other of document.querySelectorAll("[data-of-model]")) other.hidden = !there.has(Number(other.dataset.ofModel));
    const last = first + shown.size;
    count.textContent = !found.length ? `none of ${rows.length} models`
      : shown.size === rows.length ? `${rows.length} models`
      : `${first + 1}–${last} of ${found.length}` + (found.length < rows.length ? ` (${rows.length} models)` : "");
    back.disabled = first === 0;
    on.disabled = last >= found.length;
    page.tell("shown", new Set(found.map(place)));
  };
  const turn = (by) => { first += by * (Number(size.value) || 0); show(); };

  filter.oninput = () => { first = 0; show(); };
  size.onchange = () => { first = 0; show(); };
  back.onclick = () => turn(-1);
  on.onclick = () => turn(1);
  pages.hidden = rows.length <= 25;
  table.addEventListener("sorted", () => { first = 0; show(); });
  page.on("brushed", () => { first = 0; show(); });

  // Columns: a sheet of rules hides the others, so that no cell need be touched.
  const rules = document.head.appendChild(document.createElement("style"));
  const chooser = document.querySelector("#columns div");
  const headings = [...table.tHead.rows[0].cells].filter((heading) => heading.dataset.column);
  const boxes = headings.map((heading) => html("input", { type: "checkbox", change: () => hide(), checked: !heading.dataset.away }));
  const hide = () => {
    const away = headings.filter((_, number) => !boxes[number].checked).map((heading) => heading.cellIndex + 1);
    rules.textContent = away.map((number) => `#scores tr > :nth-child(${number}) { display: none; }`).join("\n");
  };
  chooser.append(...headings.map((heading, number) => html("label", {}, boxes[number], " " + heading.dataset.column)));
  hide();

  // Picked models.
  const picks = new Map(rows.map((row) => [place(row), row.querySelector(".pick input")]));
  const pick = () => {
    page.picked = new Set([...picks].filter(([, box]) => box.checked).map(([model]) => model));
    for (const box of picks.values()) box.disabled = !box.checked && page.picked.size >= MOST_PICKED;
    page.tell("picked");
  };
  const preset = [...data.contest.slice(0, 2), ...["target", "sft", "pivot"].map((kind) => {
    const own = data.models.map((model, number) => [model, number]).filter(([model]) => model.kind === kind);
    const average = ([model]) => (model.scores[data.average] || [-1])[0];
    return own.sort((a, b) => average(b) - average(a)).map(([, number]) => number)[0];
  })].filter((number) => number !== undefined);
  for (const box of picks.values()) box.onchange = pick;
  for (const model of new Set(preset.slice(0, MOST_PICKED))) picks.get(model).checked = true;
  for (const row of rows) {
    row.onmouseenter = () => page.tell("pointed", place(row));
    row.onmouseleave = () => page.tell("pointed", null);
  }
  page.on("ready", () => { pick(); show(); });
}

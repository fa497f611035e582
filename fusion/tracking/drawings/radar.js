"use strict";
// A radar of the picked models over the skills.
{
  const box = document.getElementById("radar"), legend = document.getElementById("radar-legend");
  const SIZE = 380, RADIUS = 140;
  const at = (number, share) => {
    const angle = (2 * Math.PI * number) / data.skills.length - Math.PI / 2;
    return [SIZE / 2 + RADIUS * share * Math.cos(angle), SIZE / 2 + RADIUS * share * Math.sin(angle)];
  };
  const path = (shares) => shares.map((share, number) => `${number ? "L" : "M"}${at(number, share).map((one) => one.toFixed(1)).join(" ")}`).join("") + "Z";
  const anchor = (x) => (Math.abs(x - SIZE / 2) < 8 ? "middle" : x > SIZE / 2 ? "start" : "end");

  const paint = () => {
    const picture = svg("svg", { viewBox: `0 20 ${SIZE} ${SIZE - 40}`, role: "img", "aria-label": "percent right by skill of the picked models" });
    for (const ring of [0.25, 0.5, 0.75, 1]) {
      picture.append(svg("path", { class: "ring", d: path(data.skills.map(() => ring)) }));
      picture.append(svg("text", { class: "tick", x: SIZE / 2 + 4, y: SIZE / 2 - RADIUS * ring + 11 }, 100 * ring));
    }
    data.skills.forEach((skill, number) => {
      const [x, y] = at(number, 1), [far, low] = at(number, 1.09);
      picture.append(svg("line", { class: "ring", x1: SIZE / 2, y1: SIZE / 2, x2: x, y2: y }));
      picture.append(svg("text", { class: "axis-name", x: far, y: low + 4, "text-anchor": anchor(far) }, short(skill, 13), svg("title", {}, skill)));
    });
    [...page.picked].forEach((model, place) => {
      const means = data.skills.map((skill) => (data.models[model].scores[skill] || [0])[0]);
      const group = svg("g", { class: "model", style: series(place) }, svg("path", { d: path(means) }));
      means.forEach((mean, number) => {
        const [cx, cy] = at(number, mean), score = data.models[model].scores[data.skills[number]];
        const range = score && score.length > 1 ? `, 95% ${percent(score[1])} to ${percent(score[2])}` : "";
        group.append(svg("circle", { cx, cy, r: 3 }, svg("title", {}, `${data.models[model].label}, ${data.skills[number]}: ${score ? percent(mean) : "not measured"}${range}`)));
      });
      picture.append(group);
    });
    return picture;
  };
  page.on("picked", () => {
    box.replaceChildren(paint());
    const names = [...page.picked].map((model, place) => html("li", { style: series(place) }, html("span", { class: "swatch" }), `${data.models[model].label} `, html("small", {}, data.models[model].kind)));
    legend.replaceChildren(...(names.length ? names : [html("li", {}, "Tick up to five models in the table.")]));
  });
}

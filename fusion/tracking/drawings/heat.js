"use strict";
// Coefficients of one merge: a row per layer, a column per target.
{
  const box = document.getElementById("heat"), chosen = document.getElementById("heat-run"), from = document.getElementById("heat-from");
  const name = (layer) => layer.replace(/\.weight$/, "").split(".").slice(-2).join(".");
  const paint = (width) => {
    const { targets, layers, values } = data.heats.merges[Number(chosen.value)];
    const all = values.flat(), mean = all.reduce((sum, value) => sum + value, 0) / all.length;
    const centre = from.value === "mean" ? mean : 0;
    const most = Math.max(...all.map((value) => Math.abs(value - centre))) || 1;
    const left = Math.min(150, width * 0.36), top = 24, high = layers.length > 40 ? 13 : 20, wide = (width - left) / targets.length;
    const picture = svg("svg", { width, height: top + high * layers.length, viewBox: `0 0 ${width} ${top + high * layers.length}`, role: "img", "aria-label": `coefficients of ${data.heats.merges[Number(chosen.value)].name} by layer and target` });
    targets.forEach((target, column) => picture.append(svg("text", { class: "axis-name", x: left + wide * (column + 0.5), y: 15, "text-anchor": "middle" }, short(target, Math.max(4, Math.floor(wide / 8))), svg("title", {}, target))));
    layers.forEach((layer, row) => {
      picture.append(svg("text", { class: "tick", x: left - 6, y: top + high * (row + 0.5) + 4, "text-anchor": "end" }, short(name(layer), Math.floor((left - 6) / 7)), svg("title", {}, layer)));
      targets.forEach((target, column) => {
        const value = values[row][column], away = value - centre;
        const x = left + wide * column, y = top + high * row;
        picture.append(svg("rect", { class: away >= 0 ? "cell" : "cell below", x: x + 0.5, y: y + 0.5, width: Math.max(1, wide - 1), height: high - 1, style: `--strength: ${Math.round((65 * Math.abs(away)) / most)}%` }, svg("title", {}, `${layer}, ${target}: ${value}`)));
        if (wide > 40) picture.append(svg("text", { class: "value", x: x + wide / 2, y: y + high / 2 + 4, "text-anchor": "middle" }, value.toFixed(3)));
      });
    });
    return picture;
  };
  chosen.append(...choices(data.heats.merges.map((merge) => merge.name)));
  const again = drawn(box, paint);
  chosen.onchange = from.onchange = again;
}

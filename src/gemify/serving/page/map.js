// Points with labels in the plane, drawn for the width at hand.

import { shape } from "./element.js";

const LINE = 18; // px between labels
const LETTER = 7.7; // px, about
const EDGE = 14;

export function drawMap(svg, texts, places) {
  const width = Math.max(240, Math.floor(svg.parentElement.clientWidth));
  const height = Math.max(260, Math.min(480, Math.round(width * 0.66)), texts.length * LINE + 2 * EDGE);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("height", String(height));
  const points = onto(places, width, height);
  const labels = points.map(([x, y], i) => {
    const left = x > width / 2;
    const room = Math.floor(((left ? x : width - x) - 2 * EDGE) / LETTER);
    const letters = [...`${i + 1} ${texts[i]}`];
    const cut = letters.length > room ? `${letters.slice(0, room - 1).join("").trimEnd()}…` : letters.join("");
    return { i, x, y, cut, left };
  });
  spread(labels, height);
  svg.replaceChildren(
    ...labels.filter((label) => Math.abs(label.y - points[label.i][1]) > 3).map((label) => leader(label, points[label.i])),
    ...labels.map(written),
    ...points.map(([x, y], i) => shape("circle", { cx: x, cy: y, r: 5 }, shape("title", {}, texts[i]))),
  );
}

/** Places as pixels; one scale for both axes, so that distances stay true. */
function onto(places, width, height) {
  const range = (axis) => {
    const values = places.map((place) => place[axis]);
    return [Math.min(...values), Math.max(...values)];
  };
  const [[left, right], [bottom, top]] = [range(0), range(1)];
  const scale = Math.min((width - 2 * EDGE) / (right - left || 1), (height - 2 * EDGE - LINE) / (top - bottom || 1));
  return places.map(([x, y]) => [
    Math.round(width / 2 + (x - (left + right) / 2) * scale),
    Math.round(height / 2 - (y - (bottom + top) / 2) * scale),
  ]);
}

/** Move labels up or down until none covers another. */
function spread(labels, height) {
  labels.sort((a, b) => a.y - b.y);
  labels.forEach((label, i) => {
    if (i) label.y = Math.max(label.y, labels[i - 1].y + LINE);
  });
  let floor = height - EDGE / 2;
  for (const label of labels.toReversed()) {
    label.y = Math.min(label.y, floor);
    floor = label.y - LINE;
  }
}

function leader(label, [x, y]) {
  return shape("line", { class: "leader", x1: x, y1: y, x2: label.left ? x - 9 : x + 9, y2: label.y });
}

function written(label) {
  const x = label.left ? label.x - 11 : label.x + 11;
  return shape("text", { x, y: label.y + 4, "text-anchor": label.left ? "end" : "start" }, label.cut);
}

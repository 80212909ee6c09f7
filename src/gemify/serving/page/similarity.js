// How alike texts are: a table of cosines with colours, and a map.

import { post } from "./api.js";
import { byId, element, onSubmit, sendsByKey } from "./element.js";
import { drawMap } from "./map.js";
import { cosines, plane } from "./vectors.js";

const MOST = 60;
const DARK_INK_UP_TO = { light: 0.85, dark: 0.57 }; // shares of the strong colour at which black and white read alike

let drawn = null;

export function startSimilarity() {
  sendsByKey(byId("texts"));
  onSubmit(byId("similarity-form"), byId("similarity-error"), compare);
  new ResizeObserver(() => drawn && drawMap(byId("map"), drawn.texts, drawn.places)).observe(byId("compared"));
}

async function compare() {
  const texts = byId("texts").value.split("\n").map((line) => line.trim()).filter(Boolean);
  if (texts.length < 2) throw new Error("two texts are needed to compare: write one a line");
  if (texts.length > MOST) throw new Error(`${texts.length} texts are too many to look at: give at most ${MOST}`);
  const status = byId("similarity-status");
  status.textContent = "embedding …";
  try {
    const reply = await post("v1/embeddings", { model: "", input: texts, encoding_format: "float" });
    const vectors = reply.data.toSorted((a, b) => a.index - b.index).map((row) => row.embedding);
    const matrix = cosines(vectors);
    const { places, share } = plane(vectors);
    drawn = { texts, places };
    byId("compared").hidden = false;
    drawTable(texts, matrix);
    drawMap(byId("map"), texts, places);
    byId("map-note").textContent = `Near means alike; the two directions show ${Math.round(share * 100)} % of the differences.`;
    status.textContent = closest(texts, matrix);
  } catch (error) {
    drawn = null;
    byId("compared").hidden = true;
    status.textContent = "";
    throw error;
  }
}

function* pairs(matrix) {
  for (let i = 0; i < matrix.length; i++) for (let j = 0; j < i; j++) yield [matrix[i][j], j, i];
}

function closest(texts, matrix) {
  const [value, i, j] = [...pairs(matrix)].reduce((best, pair) => (pair[0] > best[0] ? pair : best));
  return `Most alike (${value.toFixed(2)}): ${i + 1} “${texts[i]}” and ${j + 1} “${texts[j]}”`;
}

function drawTable(texts, matrix) {
  const values = [...pairs(matrix)].map(([value]) => value);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const heatOf = (value) => (high > low ? (value - low) / (high - low) : 1);
  const head = element("tr", {}, element("td"));
  texts.forEach((text, i) => head.append(element("th", { scope: "col", title: text }, String(i + 1))));
  const rows = texts.map((text, i) => {
    const row = element("tr", {}, element("th", { scope: "row", title: text }, element("span", { class: "name" }, `${i + 1} ${text}`)));
    matrix[i].forEach((value, j) => row.append(i === j ? itself() : cell(value, heatOf(value))));
    return row;
  });
  byId("heat").replaceChildren(
    element("caption", { class: "hidden" }, "Cosine similarity of each text with each other one"),
    element("thead", {}, head),
    element("tbody", {}, ...rows),
  );
  byId("heat-legend").replaceChildren(
    `least alike ${low.toFixed(2)} `,
    element("span", { class: "ramp", "aria-hidden": "true" }),
    ` most alike ${high.toFixed(2)}`,
  );
}

function itself() {
  return element("td", { class: "itself" }, element("span", { class: "hidden" }, "itself"));
}

function cell(value, heat) {
  const made = element("td", { class: "heat" }, value.toFixed(2));
  made.style.setProperty("--heat", `${(heat * 100).toFixed(1)}%`);
  if (heat > DARK_INK_UP_TO.light) made.classList.add("flip-light");
  if (heat > DARK_INK_UP_TO.dark) made.classList.add("flip-dark");
  return made;
}

// A map of the index: a point a passage, coloured by file. Found passages are lit; a pointer or the arrow keys read one.

import { get } from "./api.js";
import { byId, element, say } from "./element.js";
import { passageCard, shortName } from "./passage.js";
import { storeQuery } from "./stores.js";

const WIDE = "(min-width: 72rem)"; // where the map stands beside what was found, as in page.css
const COLOURS = 8; // files that have one, as in page.css
const EDGE = 18; // px
const REACH = 14; // px from a pointer to a point
const PAUSE = 60; // ms that a pointer rests before a passage is asked for

let drawn = null; // { ids, points, files, file_indices, at: id -> number, places: [[x, y]], cells }
let asked = false;
let lit = []; // ids of found passages, best first
let current = -1;
let only = -1; // the file that is shown alone
let timer = 0;
const passages = new Map();

export function startStoreMap() {
  const [canvas, folder] = [byId("store-map"), byId("store-map-folder")];
  folder.open = matchMedia(WIDE).matches;
  new ResizeObserver(fit).observe(canvas.parentElement);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  canvas.addEventListener("pointermove", (event) => point(nearest(event.offsetX, event.offsetY)));
  canvas.addEventListener("click", (event) => point(nearest(event.offsetX, event.offsetY)));
  canvas.addEventListener("keydown", move);
}

export function offerStoreMap(available) {
  byId("store-map-folder").hidden = !available;
}

/** Draw another store. */
export function changeStoreMap() {
  [drawn, asked, lit, current] = [null, false, [], -1];
  passages.clear();
  byId("store-map-passage").replaceChildren();
  fit();
}

/** Light the passages that a search found. */
export function light(found) {
  lit = found.map(({ id }) => id);
  found.forEach((passage) => passages.set(passage.id, passage));
  if (drawn && drawn.num_passages === drawn.ids.length && lit.some((id) => !drawn.at.has(id))) load(); // the store has changed
  else draw();
}

function fit() {
  if (!byId("store-map").parentElement.clientWidth) return; // folded, or in another tab
  if (!asked) load();
  else draw();
}

async function load() {
  asked = true;
  const note = byId("store-map-note");
  note.textContent = "drawing …";
  say(byId("store-map-error"), "");
  try {
    const query = storeQuery();
    const got = await get(`v1/stores/map${query}`);
    if (query !== storeQuery()) return; // another store was chosen meanwhile
    drawn = got;
    drawn.at = new Map(drawn.ids.map((id, i) => [id, i]));
    current = only = -1;
    listFiles();
    const share = Math.round(drawn.explained_variance * 100);
    const some = drawn.ids.length < drawn.num_passages ? `${count(drawn.ids.length)} of ${count(drawn.num_passages)}` : count(drawn.ids.length);
    note.textContent = `${some} passages. Near means alike; the two directions show ${share} % of the differences.`;
    draw();
  } catch (error) {
    asked = false; // the next change of size asks again
    note.textContent = "";
    say(byId("store-map-error"), error.message);
  }
}

const count = (value) => value.toLocaleString("en");

/** A button a file: it shows that one alone. */
function listFiles() {
  const sizes = new Array(drawn.files.length).fill(0);
  drawn.file_indices.forEach((file) => sizes[file]++);
  const buttons = drawn.files.slice(0, COLOURS).map((file, i) => {
    const button = element("button", { type: "button", class: "small", "aria-pressed": "false", title: file });
    button.append(element("span", { class: `swatch file-${i + 1}`, "aria-hidden": "true" }), ` ${shortName(file)} (${count(sizes[i])})`);
    button.addEventListener("click", () => {
      only = only === i ? -1 : i;
      buttons.forEach((other, j) => other.setAttribute("aria-pressed", String(j === only)));
      draw();
    });
    return button;
  });
  const more = drawn.files.length - COLOURS;
  const rest = more > 0 ? [element("li", { class: "muted" }, `and ${count(more)} more ${more === 1 ? "file" : "files"}, in grey`)] : [];
  byId("store-map-files").replaceChildren(...buttons.map((button) => element("li", {}, button)), ...rest);
}

function draw() {
  const canvas = byId("store-map");
  const width = canvas.parentElement.clientWidth;
  if (!drawn || !width) return;
  const height = Math.round(Math.min(560, Math.max(260, width * 0.8)));
  const scale = window.devicePixelRatio || 1;
  canvas.style.height = `${height}px`;
  canvas.width = width * scale;
  canvas.height = height * scale;
  place(width, height);
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  const style = getComputedStyle(canvas);
  const colour = (name) => style.getPropertyValue(name).trim();
  const colours = Array.from({ length: COLOURS }, (_, i) => colour(`--file-${i + 1}`));
  const radius = drawn.ids.length > 4000 ? 1.6 : drawn.ids.length > 800 ? 2.4 : 3.5;
  context.globalAlpha = lit.length ? 0.45 : 0.8;
  drawn.places.forEach(([x, y], i) => {
    const file = drawn.file_indices[i];
    if (only >= 0 && file !== only) return;
    context.fillStyle = colours[file] ?? colour("--control");
    disc(context, x, y, radius);
  });
  context.globalAlpha = 1;
  lightUp(context, colours, colour);
  if (current >= 0) ring(context, ...drawn.places[current], colour("--ink"));
}

/** Found passages as larger points with their numbers, the best on top. */
function lightUp(context, colours, colour) {
  context.font = `600 13px ${getComputedStyle(document.body).fontFamily}`;
  for (let i = lit.length - 1; i >= 0; i--) {
    const at = drawn.at.get(lit[i]);
    if (at === undefined) continue; // a large store's map has some of its passages
    const [x, y] = drawn.places[at];
    context.fillStyle = colours[drawn.file_indices[at]] ?? colour("--control");
    disc(context, x, y, 6);
    ring(context, x, y, colour("--ink"));
    context.lineWidth = 4;
    context.strokeStyle = colour("--surface");
    context.strokeText(String(i + 1), x + 10, y + 4);
    context.fillStyle = colour("--ink");
    context.fillText(String(i + 1), x + 10, y + 4);
  }
}

function disc(context, x, y, radius) {
  context.beginPath();
  context.arc(x, y, radius, 0, 2 * Math.PI);
  context.fill();
}

function ring(context, x, y, colour) {
  context.beginPath();
  context.arc(x, y, 7.5, 0, 2 * Math.PI);
  context.lineWidth = 2;
  context.strokeStyle = colour;
  context.stroke();
}

/** Points as pixels, one scale for both axes, and the cells in which a pointer looks for them. */
function place(width, height) {
  const range = (axis) => drawn.points.reduce(([low, high], p) => [Math.min(low, p[axis]), Math.max(high, p[axis])], [Infinity, -Infinity]);
  const [[left, right], [bottom, top]] = [range(0), range(1)];
  const scale = Math.min((width - 2 * EDGE) / (right - left || 1), (height - 2 * EDGE) / (top - bottom || 1));
  drawn.places = drawn.points.map(([x, y]) => [width / 2 + (x - (left + right) / 2) * scale, height / 2 - (y - (bottom + top) / 2) * scale]);
  drawn.cells = new Map();
  drawn.places.forEach((at, i) => {
    const key = cell(...at);
    if (!drawn.cells.has(key)) drawn.cells.set(key, []);
    drawn.cells.get(key).push(i);
  });
}

const cell = (x, y) => `${Math.floor(x / REACH)},${Math.floor(y / REACH)}`;

/** The number of the passage nearest to a place, or -1: a lit one before others. */
function nearest(x, y) {
  if (!drawn) return -1;
  let [best, least] = [-1, REACH];
  for (const dx of [-REACH, 0, REACH]) {
    for (const dy of [-REACH, 0, REACH]) {
      for (const i of drawn.cells.get(cell(x + dx, y + dy)) ?? []) {
        if (only >= 0 && drawn.file_indices[i] !== only) continue;
        const far = Math.hypot(drawn.places[i][0] - x, drawn.places[i][1] - y) - (lit.includes(drawn.ids[i]) ? 4 : 0);
        if (far < least) [best, least] = [i, far];
      }
    }
  }
  return best;
}

/** By an arrow key to the nearest passage that way; by Home to the best one that was found. */
function move(event) {
  const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (!drawn?.ids.length || (!way && event.key !== "Home")) return;
  event.preventDefault();
  const home = Math.max(0, drawn.at.get(lit.find((id) => drawn.at.has(id))) ?? 0);
  point(current < 0 || !way ? home : beyond(current, way), 0);
}

function beyond(from, [dx, dy]) {
  const [x, y] = drawn.places[from];
  let [best, least] = [from, Infinity];
  drawn.places.forEach(([px, py], i) => {
    if (only >= 0 && drawn.file_indices[i] !== only) return;
    const along = (px - x) * dx + (py - y) * dy;
    const aside = Math.abs((px - x) * dy) + Math.abs((py - y) * dx);
    if (along > 0 && aside <= along && along + 2 * aside < least) [best, least] = [i, along + 2 * aside];
  });
  return best;
}

/** Show a passage beside the map; a pointer between two points leaves the last one. */
function point(i, pause = PAUSE) {
  byId("store-map").style.cursor = i < 0 ? "" : "pointer";
  if (i < 0 || i === current) return;
  current = i;
  draw();
  clearTimeout(timer);
  timer = setTimeout(() => read(drawn.ids[i]), pause);
}

async function read(id) {
  try {
    if (!passages.has(id)) passages.set(id, { ...(await get(`v1/passages/${encodeURIComponent(id)}${storeQuery()}`)).data[0], score: null });
    if (drawn.ids[current] !== id) return; // the pointer has gone on
    say(byId("store-map-error"), "");
    const number = lit.indexOf(id) + 1;
    byId("store-map-passage").replaceChildren(passageCard(passages.get(id), number || null, true));
  } catch (error) {
    say(byId("store-map-error"), error.message);
  }
}

// Live throughput of both jobs, from the server's counters once a second.

import { get } from "./api.js";
import { byId, shape } from "./element.js";

const EVERY = 1000; // ms
const AFTER_FAILURE = 5000;
const KEPT = 60;
const SPARK = { width: 96, height: 22 };

const history = { writing: [], embedding: [] };
let last = null;
let timer = 0;
let paused = false;

/** Begin to ask; `heard` is handed what the server says of itself. */
export function startLoad(heard) {
  const button = byId("load-pause");
  button.addEventListener("click", () => {
    paused = !paused;
    button.setAttribute("aria-pressed", String(paused));
    button.textContent = paused ? "Go on" : "Pause";
    poll(heard);
  });
  document.addEventListener("visibilitychange", () => poll(heard));
  poll(heard);
}

/** Ask now, and again in a second unless the page is hidden, paused or refused. */
export async function poll(heard) {
  clearTimeout(timer);
  if (paused || document.hidden) {
    last = null;
    return;
  }
  try {
    const stats = await get("v1/stats");
    heard(stats);
    show(stats);
    again(heard, EVERY);
  } catch (error) {
    last = null;
    blank();
    if (error.status !== 401) again(heard, AFTER_FAILURE);
  }
}

function again(heard, wait) {
  clearTimeout(timer);
  timer = setTimeout(() => poll(heard), wait);
}

function show(stats) {
  const now = { at: performance.now(), ...stats };
  byId("load-running").textContent = count(stats.num_running_seqs);
  byId("load-waiting").textContent = count(stats.num_waiting_seqs + stats.num_waiting_texts);
  if (last) {
    const rate = (name) => Math.max(0, ((now[name] - last[name]) / (now.at - last.at)) * 1000); // 0 where it started anew
    byId("load-writing").textContent = count(rate("generation_tokens"));
    byId("load-embedding").textContent = count(rate("embedded_tokens"));
    byId("load-texts").textContent = count(rate("embedded_texts"));
    keep("writing", rate("generation_tokens"));
    keep("embedding", rate("embedded_tokens"));
  }
  last = now;
}

const count = (value) => Math.round(value).toLocaleString("en");

function blank() {
  for (const id of ["writing", "embedding", "texts", "running", "waiting"]) byId(`load-${id}`).textContent = "–";
}

function keep(name, value) {
  const values = history[name];
  values.push(value);
  if (values.length > KEPT) values.shift();
  const most = Math.max(1, ...values);
  const points = values.map((v, i) => {
    const x = ((i + KEPT - values.length) / (KEPT - 1)) * SPARK.width;
    return `${x.toFixed(1)},${(SPARK.height - 1 - (v / most) * (SPARK.height - 2)).toFixed(1)}`;
  });
  const svg = byId(`spark-${name}`);
  svg.setAttribute("viewBox", `0 0 ${SPARK.width} ${SPARK.height}`);
  svg.replaceChildren(shape("polyline", { points: points.join(" ") }));
}

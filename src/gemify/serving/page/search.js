// The search box over the server's index.

import { post } from "./api.js";
import { byId, onSubmit } from "./element.js";
import { passageCard } from "./passage.js";
import { light } from "./store_map.js";
import { chosenStore, storeField } from "./stores.js";

export function startSearch() {
  onSubmit(byId("search-form"), byId("search-error"), search);
}

/** Say so where the server has no index. */
export function offerSearch(available, passages) {
  byId("search-none").hidden = available;
  byId("search-form").hidden = !available;
  if (passages && !byId("found").children.length && !byId("search-status").textContent) {
    byId("search-status").textContent = `${passages.toLocaleString("en")} passages in the index`;
  }
}

/** Forget what was found in another store. */
export function clearSearch() {
  byId("found").replaceChildren();
  byId("search-status").textContent = "";
}

async function search() {
  const form = byId("search-form");
  const status = byId("search-status");
  const store = chosenStore();
  status.textContent = "searching …";
  try {
    const started = performance.now();
    const body = { query: byId("query").value, k: byId("search-count").valueAsNumber, mode: form.elements.mode.value, ...storeField() };
    const { data } = await post("v1/search", body);
    if (store !== chosenStore()) return;
    byId("found").replaceChildren(...data.map((passage, i) => passageCard(passage, i + 1)));
    light(data);
    const took = Math.round(performance.now() - started);
    status.textContent = data.length ? `${data.length} ${data.length === 1 ? "passage" : "passages"} in ${took} ms` : "nothing found";
  } catch (error) {
    byId("found").replaceChildren();
    light([]);
    status.textContent = "";
    throw error;
  }
}

// The stores of the server, and the one that is chosen: in the search, in the chat and on the map it is the same.

import { element } from "./element.js";

let names = [];
let chosen = "";
const selects = () => [...document.querySelectorAll("select.store")];

/** Call `listener` when another store is chosen. */
export function startStores(listener) {
  for (const select of selects()) {
    select.addEventListener("change", () => {
      choose(select.value);
      listener();
    });
  }
}

/** Offer a choice where there are several. */
export function offerStores(given = []) {
  if (names.join() === given.join()) return; // names have no commas
  names = given;
  for (const select of selects()) {
    select.replaceChildren(...names.map((name) => element("option", {}, name)));
    select.parentElement.hidden = names.length < 2;
  }
  choose(names.includes(chosen) ? chosen : names[0]);
}

function choose(name = "") {
  chosen = name;
  for (const select of selects()) select.value = name;
}

/** The name of the chosen store; empty where the server has none. */
export const chosenStore = () => chosen;

/** The field of a request that names the store, where there are several. */
export const storeField = () => (names.length > 1 ? { store: chosen } : {});

/** The same for a path. */
export const storeQuery = () => (names.length > 1 ? `?store=${encodeURIComponent(chosen)}` : "");

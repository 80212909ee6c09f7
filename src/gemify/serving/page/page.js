// The page of `gemify serve`: each part in a file of its own, over the server's public routes.

import { onRefused, useKey } from "./api.js";
import { offerChat, offerSources, startChat } from "./chat.js";
import { byId } from "./element.js";
import { poll, startLoad } from "./load.js";
import { startRecovery } from "./recovery.js";
import { clearSearch, offerSearch, startSearch } from "./search.js";
import { startSimilarity } from "./similarity.js";
import { changeStoreMap, offerStoreMap, startStoreMap } from "./store_map.js";
import { offerStores, startStores } from "./stores.js";
import { startTabs } from "./tabs.js";
import { offerUpload, startUpload } from "./upload.js";

startTabs();
startChat();
startSearch();
startStoreMap();
startStores(() => {
  clearSearch();
  changeStoreMap();
});
startUpload(changeStoreMap);
startSimilarity();
startRecovery();
startKey();
startLoad(heard);

function heard(stats) {
  offerChat(stats.has_chat);
  offerSources(stats.has_index);
  offerSearch(stats.has_index, stats.passages);
  offerStores(stats.stores);
  offerUpload(stats.can_upload);
  offerStoreMap(stats.has_store);
  byId("model").textContent = stats.model;
}

function startKey() {
  const form = byId("key-form");
  onRefused(() => {
    if (!form.hidden) return;
    form.hidden = false;
    if (document.activeElement === document.body) byId("key").focus();
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    useKey(byId("key").value.trim());
    byId("key").value = "";
    form.hidden = true;
    poll(heard); // a wrong one brings the form back
  });
}

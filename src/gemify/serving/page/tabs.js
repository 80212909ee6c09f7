// Tabs by the keyboard's rules: arrows, Home and End move; the address remembers which one is open.

import { byId } from "./element.js";

export function startTabs() {
  const tabs = [...document.querySelectorAll("[role=tab]")];
  const open = (tab, focus) => {
    for (const other of tabs) {
      const chosen = other === tab;
      other.setAttribute("aria-selected", String(chosen));
      other.tabIndex = chosen ? 0 : -1;
      byId(other.getAttribute("aria-controls")).hidden = !chosen;
    }
    if (focus) tab.focus();
    history.replaceState(null, "", `#${nameOf(tab)}`);
  };
  tabs.forEach((tab, at) => {
    tab.addEventListener("click", () => open(tab, false));
    tab.addEventListener("keydown", (event) => {
      const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: -1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      open(tabs.at(to % tabs.length), true);
    });
  });
  const follow = () => {
    const tab = tabs.find((t) => `#${nameOf(t)}` === location.hash);
    if (tab) open(tab, false);
  };
  window.addEventListener("hashchange", follow);
  follow();
}

const nameOf = (tab) => tab.id.replace("tab-", "");

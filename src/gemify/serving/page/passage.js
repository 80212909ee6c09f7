// A passage of the index, as a card: where it stands, how well it fits, its text (long ones cut until asked for).

import { element } from "./element.js";

const LONG = { characters: 320, lines: 5 };
const LONG_BESIDE = { characters: 120, lines: 3 };

/** The end of a path, which tells files apart. */
export const shortName = (path) => path.split(/[\\/]/).slice(-2).join("/");

/** A card; one that stands beside an answer shows less at first. The number may be null. */
export function passageCard(passage, number, beside = false) {
  const long = beside ? LONG_BESIDE : LONG;
  const file = shortName(passage.file); // the whole path is in the title
  const name = passage.heading || passage.title || file || passage.id;
  const where = [file, passage.place, score(passage)].filter(Boolean).join(" · ");
  const text = element("p", { class: "passage-text" }, passage.text);
  const card = element(
    "li",
    { class: "card passage", tabindex: "-1" },
    element("h3", {}, ...(number ? [element("span", { class: "number" }, `[${number}]`), " "] : []), name),
    element("p", { class: "muted where", title: passage.file }, where),
    text,
  );
  if (passage.text.length > long.characters || passage.text.split("\n").length > long.lines) {
    text.classList.add("cut");
    card.append(more(text));
  }
  return card;
}

function score(passage) {
  return typeof passage.score === "number" ? `score ${passage.score.toFixed(3)}` : "";
}

function more(text) {
  const button = element("button", { type: "button", class: "small", "aria-expanded": "false" }, "Show all");
  button.addEventListener("click", () => {
    const cut = text.classList.toggle("cut");
    button.setAttribute("aria-expanded", String(!cut));
    button.textContent = cut ? "Show all" : "Show less";
  });
  return button;
}

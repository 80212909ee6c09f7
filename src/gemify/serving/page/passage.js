// A passage of the index, as a card: where it stands, how well it fits, its text (long ones cut until asked for).

import { element } from "./element.js";

const LONG = { characters: 320, lines: 5 };
const LONG_BESIDE = { characters: 120, lines: 3 };

/** A card; one that stands beside an answer shows less at first. */
export function passageCard(passage, number, beside = false) {
  const long = beside ? LONG_BESIDE : LONG;
  const file = passage.file.split(/[\\/]/).slice(-2).join("/"); // the whole path is in the title
  const name = passage.heading || passage.title || file || passage.id;
  const where = [file, passage.place, score(passage)].filter(Boolean).join(" · ");
  const text = element("p", { class: "passage-text" }, passage.text);
  const card = element(
    "li",
    { class: "card passage", tabindex: "-1" },
    element("h3", {}, element("span", { class: "number" }, `[${number}]`), ` ${name}`),
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

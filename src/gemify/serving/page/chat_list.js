// The list of kept chats: open, rename, delete, begin a new one.

import { deleteChat, listChats, renameChat } from "./chats.js";
import { byId, element } from "./element.js";

const WIDE = "(min-width: 56rem)"; // where the list stands beside the conversation, as in page.css
const DAY = new Intl.DateTimeFormat("en", { day: "numeric", month: "short", year: "numeric" });

let actions = null;
let openId = null;

/** Begin with `open(id)` and `begin()`, which show a chat and a new one. */
export function startChatList(given) {
  actions = given;
  byId("new-chat").addEventListener("click", given.begin);
  const wide = matchMedia(WIDE);
  const unfold = () => (byId("chats-folder").open = wide.matches);
  wide.addEventListener("change", unfold);
  unfold();
}

/** Show all chats, the open one with what can be done to it, and return their number. */
export function showChatList(id) {
  openId = id;
  const chats = listChats();
  byId("chats-aside").classList.toggle("empty", !chats.length);
  byId("chats-count").textContent = chats.length ? `(${chats.length})` : "";
  const renaming = byId("chats").contains(document.activeElement) && document.activeElement.matches("input");
  if (!renaming) byId("chats").replaceChildren(...chats.map(entry));
  return chats.length;
}

function entry({ id, title, updated }) {
  const current = id === openId;
  const button = element("button", { type: "button", class: "chat-title", title: `${title}, ${DAY.format(updated)}` }, title || "untitled");
  button.addEventListener("click", () => actions.open(id));
  const item = element("li", {}, button);
  if (!current) return item;
  button.setAttribute("aria-current", "true");
  const rename = element("button", { type: "button", class: "small" }, "Rename");
  rename.addEventListener("click", () => edit(item, button, id, title));
  item.append(element("div", { class: "row" }, rename, deleting(id, title)));
  return item;
}

/** A button that deletes when it is pressed twice. */
function deleting(id, title) {
  const button = element("button", { type: "button", class: "small" }, "Delete");
  const calm = () => (button.textContent = "Delete");
  button.addEventListener("blur", calm);
  button.addEventListener("click", () => {
    if (button.textContent === "Delete") {
      button.textContent = "Really delete?";
      byId("chats-status").textContent = "Press again to delete.";
      return;
    }
    deleteChat(id);
    actions.begin();
    byId("chats-status").textContent = `Deleted: ${title}`;
  });
  return button;
}

function edit(item, button, id, title) {
  const field = element("input", { "aria-label": "Name of the chat", maxlength: "80" });
  field.value = title;
  let ended = false;
  const end = (kept) => {
    if (ended) return;
    ended = true;
    if (kept) renameChat(id, field.value);
    const focused = document.activeElement === field;
    field.remove();
    showChatList(openId);
    if (focused) byId("chats").querySelector("[aria-current]")?.focus();
  };
  field.addEventListener("keydown", (event) => {
    if (event.isComposing || !["Enter", "Escape"].includes(event.key)) return;
    event.preventDefault(); // Enter would press the button that gets the focus next
    end(event.key === "Enter");
  });
  field.addEventListener("blur", () => end(true));
  button.replaceWith(field);
  field.focus();
  field.select();
}

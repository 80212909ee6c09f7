// Conversations: questions, answers as they are written, and the chats that this browser keeps.

import { stream } from "./api.js";
import { startChatList, showChatList } from "./chat_list.js";
import { onOtherTab, readChat, saveChat } from "./chats.js";
import { byId, onSubmit, say, sendsByKey } from "./element.js";
import { Exchange } from "./exchange.js";
import { storeField } from "./stores.js";

const OPEN = "gemify-open-chat"; // of this tab
const TITLE = 60; // characters of the first question
const NO_RESULT = "This page shows calls, and runs no tools.";

let chat = blank();
let running = null;

function blank() {
  return { id: null, title: "", revision: 0, turns: [] };
}

export function startChat() {
  sendsByKey(byId("message"));
  onSubmit(byId("chat-form"), byId("chat-error"), takeTurn);
  byId("stop").addEventListener("click", () => running?.abort());
  byId("panel-chat").addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
  startChatList({ open, begin });
  onOtherTab((id) => {
    if (!running && id === chat.id && readChat(id)) open(id, false); // gone on with there
    else showChatList(chat.id); // a chat that was deleted there stays open here
  });
  window.addEventListener("pagehide", () => running?.keep());
  open(remembered(), false);
}

/** Say so where the model has no chat template. */
export function offerChat(available) {
  byId("chat-none").hidden = available;
  byId("chat").hidden = !available;
}

/** Offer sources where the server has an index. */
export function offerSources(available) {
  byId("grounded-label").hidden = !available;
  byId("sources-label").hidden = !available;
}

async function takeTurn() {
  const field = byId("message");
  const question = field.value.trim();
  if (!question) return;
  const body = request(question);
  const exchange = new Exchange(question);
  byId("announcer").replaceChildren();
  byId("transcript").append(exchange.root);
  exchange.root.scrollIntoView({ block: "start" });
  running = new AbortController();
  running.keep = () => exchange.isAnswered && keep(exchange);
  switchTo(true);
  field.value = "";
  try {
    for await (const event of stream("v1/chat/completions", body, running.signal)) exchange.take(event);
    exchange.finish();
  } catch (error) {
    exchange.finish(error.name === "AbortError" ? "stopped" : "broken off");
    if (!exchange.isAnswered) field.value ||= question; // nothing came: ask again
    throw error;
  } finally {
    running.keep();
    running = null;
    switchTo(false);
  }
}

/** Keep the conversation with its last exchange, which may not be finished yet. */
function keep(exchange) {
  const turns = chat.turns.filter((turn) => turn.exchange !== exchange).concat(Object.assign(exchange.toTurn(), { exchange }));
  const title = chat.title || [...turns[0].question].slice(0, TITLE).join("");
  const kept = saveChat({ ...chat, title, turns: turns.map(({ exchange: _, ...turn }) => turn) });
  chat = { ...(kept ?? { ...chat, title }), turns };
  byId("chats-note").textContent = kept ? "Kept in this browser only." : "This chat is not kept: the browser's storage is full or off.";
  remember(kept?.id);
}

function request(question) {
  const body = {
    model: "",
    messages: [...chat.turns.flatMap(messagesOf), { role: "user", content: question }],
    max_tokens: number("max-tokens"),
    temperature: number("temperature"),
    stream_options: { include_usage: true },
  };
  const tools = byId("tools").value.trim();
  if (tools) body.tools = parsed(tools);
  const grounded = byId("grounded").checked && !byId("grounded-label").hidden;
  return grounded ? { ...body, gemify: { search: { k: number("sources"), mode: "hybrid", ...storeField() } } } : body;
}

/** A turn as the server is asked with it: without its thoughts; calls have a result, as they must. */
function messagesOf({ question, answer, calls }) {
  const user = { role: "user", content: question };
  if (!calls.length) return [user, { role: "assistant", content: answer }];
  const tool_calls = calls.map(({ id, name, arguments: given }) => ({ id, type: "function", function: { name, arguments: given } }));
  return [
    user,
    { role: "assistant", content: answer || null, tool_calls },
    ...calls.map(({ id }) => ({ role: "tool", tool_call_id: id, content: NO_RESULT })),
  ];
}

function parsed(tools) {
  try {
    return JSON.parse(tools);
  } catch (error) {
    throw new Error(`the tools are not JSON: ${error.message}`, { cause: error });
  }
}

const number = (id) => byId(id).valueAsNumber;

function switchTo(busy) {
  if (!busy && document.activeElement === byId("stop")) byId("message").focus();
  byId("stop").hidden = !busy;
  byId("chats-aside").inert = busy;
  byId("new-chat").disabled = busy || chat.turns.length === 0;
  byId("chat-hint").hidden = busy || byId("transcript").children.length > 0;
  byId("chats-aside").hidden = showChatList(chat.id) + chat.turns.length === 0;
}

/** Show a kept chat; a new one if there is none of this id. */
function open(id, focus = true) {
  const stored = id ? readChat(id) : null;
  chat = stored ?? blank();
  byId("transcript").replaceChildren(...chat.turns.map((turn) => Exchange.of(turn).root));
  byId("announcer").replaceChildren();
  say(byId("chat-error"), "");
  switchTo(false);
  remember(chat.id);
  if (!focus) return;
  byId("transcript").lastElementChild?.scrollIntoView({ block: "start" });
  byId("message").focus();
}

const begin = () => open(null);

function remember(id) {
  try {
    if (id) sessionStorage.setItem(OPEN, id);
    else sessionStorage.removeItem(OPEN);
  } catch {
    // Storage may be forbidden: then the next visit begins a new chat.
  }
}

function remembered() {
  try {
    return sessionStorage.getItem(OPEN);
  } catch {
    return null;
  }
}

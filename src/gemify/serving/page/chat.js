// Conversations: questions, answers as they are written, and the sources beside them.

import { stream } from "./api.js";
import { byId, element, onSubmit, say, sendsByKey } from "./element.js";
import { passageCard } from "./passage.js";

const WIDE = "(min-width: 56rem)"; // where sources stand beside the answer, as in page.css
const messages = [];
let running = null;

export function startChat() {
  sendsByKey(byId("message"));
  onSubmit(byId("chat-form"), byId("chat-error"), takeTurn);
  byId("stop").addEventListener("click", () => running?.abort());
  byId("panel-chat").addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
  byId("forget").addEventListener("click", forget);
}

/** Say so where the model has no chat template. */
export function offerChat(available) {
  byId("chat-none").hidden = available;
  byId("chat-form").hidden = !available;
  if (!available) byId("chat-hint").hidden = true;
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
  const exchange = new Exchange(question);
  running = new AbortController();
  switchTo(true);
  field.value = "";
  messages.push({ role: "user", content: question });
  try {
    for await (const event of stream("v1/chat/completions", request(), running.signal)) exchange.take(event);
    exchange.finish();
  } catch (error) {
    exchange.finish(error.name === "AbortError" ? "stopped" : "broken off");
    if (!exchange.text) field.value ||= question; // nothing came: ask again
    throw error;
  } finally {
    running = null;
    if (exchange.text) messages.push({ role: "assistant", content: exchange.text });
    else messages.pop();
    switchTo(false);
  }
}

function request() {
  const body = {
    model: "",
    messages,
    max_tokens: number("max-tokens"),
    temperature: number("temperature"),
    stream_options: { include_usage: true },
  };
  const grounded = byId("grounded").checked && !byId("grounded-label").hidden;
  return grounded ? { ...body, gemify: { search: { k: number("sources"), mode: "hybrid" } } } : body;
}

const number = (id) => byId(id).valueAsNumber;

function switchTo(busy) {
  if (!busy && document.activeElement === byId("stop")) byId("message").focus();
  byId("stop").hidden = !busy;
  byId("forget").disabled = busy || messages.length === 0;
  byId("chat-hint").hidden = true;
}

function forget() {
  messages.length = 0;
  byId("transcript").replaceChildren();
  byId("announcer").replaceChildren();
  byId("chat-hint").hidden = false;
  byId("forget").disabled = true;
  say(byId("chat-error"), "");
  byId("message").focus();
}

/** One question and its answer in the transcript. */
class Exchange {
  constructor(question) {
    this.text = "";
    this.usage = null;
    this.reason = null;
    this.unspoken = "";
    this.started = performance.now();
    this.said = element("p", { class: "said" });
    this.facts = element("p", { class: "muted facts" }, "writing …");
    this.cards = element("ol", { class: "passages" });
    this.summary = element("summary", {}, "Sources");
    this.sources = element("aside", { class: "sources", "aria-label": "Sources", hidden: "" });
    this.folder = element("details", {}, this.summary, this.cards);
    this.folder.open = matchMedia(WIDE).matches;
    this.sources.append(this.folder);
    this.root = element(
      "article",
      { class: "exchange" },
      element("div", { class: "question" }, element("h3", { class: "who" }, "You"), element("p", { class: "said" }, question)),
      element("div", { class: "answer" }, element("h3", { class: "who" }, "Model"), this.said, this.facts),
      this.sources,
    );
    byId("announcer").replaceChildren();
    byId("transcript").append(this.root);
    this.root.scrollIntoView({ block: "start" });
  }

  take(event) {
    const followed = this.facts.getBoundingClientRect().top < window.innerHeight; // unless the reader has scrolled away
    if (event.gemify?.sources) this.show(event.gemify.sources);
    if (event.usage) this.usage = event.usage;
    const choice = event.choices?.[0];
    if (choice?.finish_reason) this.reason = choice.finish_reason;
    if (choice?.delta?.content) this.add(choice.delta.content);
    if (followed) this.facts.scrollIntoView({ block: "nearest" });
  }

  show(passages) {
    this.sources.hidden = false;
    if (passages.length) this.cards.replaceChildren(...passages.map((passage, i) => passageCard(passage, i + 1, true)));
    else this.cards.replaceWith(element("p", { class: "muted" }, "Nothing in the index fits."));
    this.summary.textContent = `Sources (${passages.length})`;
  }

  add(text) {
    this.text += text;
    this.said.append(text);
    this.unspoken += text;
    const end = this.unspoken.search(/[.!?:]\s+\S*$|\n\S*$/); // whole sentences, so that speech is not chopped
    if (end >= 0) this.speak(end + 1);
  }

  speak(end) {
    const sentence = this.unspoken.slice(0, end).trim();
    this.unspoken = this.unspoken.slice(end);
    if (sentence) byId("announcer").append(element("p", {}, sentence));
  }

  finish(why = "") {
    this.speak(this.unspoken.length);
    const seconds = ((performance.now() - this.started) / 1000).toFixed(1);
    const ended = why || (this.reason === "length" ? "cut at the most tokens" : "");
    const tokens = this.usage ? `${this.usage.completion_tokens} tokens` : "";
    this.facts.textContent = [tokens, `${seconds} s`, ended].filter(Boolean).join(" · ");
    this.cite();
  }

  /** Turn each [2] of the answer into a button that goes to source 2. */
  cite() {
    if (!this.cards.children.length) return;
    const parts = this.text.split(/\[(\d{1,2})\]/).map((part, i) => {
      const card = i % 2 ? this.cards.children[Number(part) - 1] : null;
      if (!card) return i % 2 ? `[${part}]` : part;
      const button = element("button", { type: "button", class: "citation", "aria-label": `Source ${part}` }, `[${part}]`);
      button.addEventListener("click", () => {
        this.folder.open = true;
        card.focus();
      });
      return button;
    });
    this.said.replaceChildren(...parts);
  }
}

// One question and its answer in the transcript: thoughts, text, calls of tools, sources, and what it took.

import { byId, element } from "./element.js";
import { MarkdownView, plainText } from "./markdown.js";
import { passageCard } from "./passage.js";

const WIDE = "(min-width: 72rem)"; // where sources stand beside the answer, as in page.css

export class Exchange {
  constructor(question) {
    Object.assign(this, { question, answer: "", thoughts: "", calls: [], passages: null, usage: null, reason: null, unspoken: "" });
    this.started = performance.now();
    this.said = element("div", { class: "said" });
    this.view = new MarkdownView(this.said, { cite: (number) => this.citation(number), around: (change) => this.follow(change) });
    this.said.addEventListener("click", (event) => event.target.matches(".citation") && this.showSource(Number(event.target.value)));
    this.thinking = new Thoughts();
    this.called = element("div", { class: "calls" });
    this.facts = element("p", { class: "muted facts" }, "writing …");
    this.cards = element("ol", { class: "passages" });
    this.summary = element("summary", {}, "Sources");
    this.folder = element("details", {}, this.summary, this.cards);
    this.folder.open = matchMedia(WIDE).matches;
    this.sources = element("aside", { class: "sources", "aria-label": "Sources", hidden: "" }, this.folder);
    this.root = element(
      "article",
      { class: "exchange" },
      element("div", { class: "question" }, element("h3", { class: "who" }, "You"), element("p", { class: "said" }, question)),
      element("div", { class: "answer" }, element("h3", { class: "who" }, "Model"), this.thinking.root, this.said, this.called, this.facts),
      this.sources,
    );
  }

  /** An earlier one, as `toTurn` gave it. */
  static of(turn) {
    const made = new Exchange(turn.question);
    made.think(turn.thoughts);
    made.thinking.end("Thoughts");
    made.answer = turn.answer;
    made.call(turn.calls.map(({ id, name, arguments: given }, index) => ({ index, id, function: { name, arguments: given } })));
    if (turn.sources) made.show(turn.sources);
    made.view.append(turn.answer);
    made.view.finish();
    made.facts.textContent = turn.facts;
    return made;
  }

  toTurn() {
    const { question, answer, thoughts, calls, passages } = this;
    return { question, answer, thoughts, calls, sources: passages, facts: this.facts.textContent };
  }

  /** Whether anything was answered. */
  get isAnswered() {
    return Boolean(this.answer || this.calls.length);
  }

  /** Take an event of a streamed answer. */
  take(event) {
    if (event.gemify?.sources) this.show(event.gemify.sources);
    if (event.usage) this.usage = event.usage;
    const choice = event.choices?.[0];
    if (choice?.finish_reason) this.reason = choice.finish_reason;
    const { reasoning_content: thought, content, tool_calls: calls } = choice?.delta ?? {};
    if (thought) this.follow(() => this.think(thought));
    if (content || calls?.length) this.thinking.end();
    if (content) this.add(content);
    if (calls?.length) this.follow(() => this.call(calls));
  }

  /** Make a change and stay at the end of the answer, unless the reader has scrolled away. */
  follow(change) {
    const followed = this.root.isConnected && this.facts.getBoundingClientRect().top < window.innerHeight;
    change();
    if (followed) this.facts.scrollIntoView({ block: "nearest" });
  }

  think(text) {
    this.thoughts += text;
    this.thinking.add(text);
  }

  add(text) {
    this.answer += text;
    this.view.append(text);
    this.unspoken += text;
    const end = this.unspoken.search(/[.!?:]\s+\S*$|\n\S*$/); // whole sentences, so that speech is not chopped
    if (end >= 0) this.speak(end + 1);
  }

  /** Show calls of tools, whose arguments may come in pieces. */
  call(calls) {
    for (const { index, id, function: part } of calls) {
      this.calls[index] ??= { id: id ?? "", name: "", arguments: "" };
      this.calls[index].name += part?.name ?? "";
      this.calls[index].arguments += part?.arguments ?? "";
    }
    this.called.replaceChildren(...this.calls.filter(Boolean).map(callCard));
  }

  show(passages) {
    this.passages = passages.map(({ id, text, title, file, place, heading, score }) => ({ id, text, title, file, place, heading, score }));
    this.sources.hidden = false;
    if (passages.length) this.cards.replaceChildren(...passages.map((passage, i) => passageCard(passage, i + 1, true)));
    else this.cards.replaceWith(element("p", { class: "muted" }, "Nothing in the index fits."));
    this.summary.textContent = `Sources (${passages.length})`;
  }

  speak(end) {
    const sentence = plainText(this.unspoken.slice(0, end)).trim();
    this.unspoken = this.unspoken.slice(end);
    if (sentence) byId("announcer").append(element("p", {}, sentence));
  }

  finish(why = "") {
    this.view.finish();
    this.thinking.end();
    this.speak(this.unspoken.length);
    this.calls = this.calls.filter(Boolean);
    for (const { name } of this.calls) byId("announcer").append(element("p", {}, `asks for ${name}`));
    const seconds = ((performance.now() - this.started) / 1000).toFixed(1);
    const ended = why || { length: "cut at the most tokens", tool_calls: "asks for a tool" }[this.reason];
    const tokens = this.usage ? `${this.usage.completion_tokens} tokens` : "";
    this.facts.textContent = [tokens, `${seconds} s`, ended].filter(Boolean).join(" · ");
  }

  /** A button for the `[2]` of an answer that has a second source. */
  citation(number) {
    if (!this.passages?.[number - 1]) return null;
    return element("button", { type: "button", class: "citation", "aria-label": `Source ${number}`, value: String(number) }, `[${number}]`);
  }

  showSource(number) {
    this.folder.open = true;
    this.cards.children[number - 1].focus();
  }
}

/** What a model thought before it answered: open while it thinks, then folded, unless the reader has had a hand in it. */
class Thoughts {
  constructor() {
    this.summary = element("summary", {}, "Thinking …");
    this.text = element("p", { class: "thought" });
    this.root = element("details", { class: "thoughts", hidden: "" }, this.summary, this.text);
    this.summary.addEventListener("click", () => (this.touched = true));
  }

  add(text) {
    if (!text) return;
    this.begun ??= performance.now();
    if (this.root.hidden) this.root.open = true;
    this.root.hidden = false;
    this.text.append(text);
  }

  end(name = `Thought for ${((performance.now() - this.begun) / 1000).toFixed(1)} s`) {
    if (this.root.hidden || this.ended) return;
    this.ended = true;
    this.summary.textContent = name;
    if (!this.touched) this.root.open = false;
  }
}

function callCard({ name, arguments: given }) {
  return element(
    "figure",
    { class: "card call" },
    element("figcaption", {}, "Calls ", element("code", {}, name)),
    element("pre", { tabindex: "0", role: "region", "aria-label": `Arguments of ${name}` }, element("code", {}, indented(given))),
  );
}

function indented(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json; // not yet whole, or never
  }
}

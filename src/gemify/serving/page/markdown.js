// Markdown as elements, whole or while it is being written. What a model writes is hostile: HTML stays text, links have
// safe schemes, nesting has a limit, and the time is linear in the length.
//
// CommonMark with tables and strikethrough, but no HTML, indented code, underlined headings, entities, references or
// pictures (an image is a link). Line breaks stay line breaks, as in a chat.

import { inlines } from "./markdown_inline.js";
import { element } from "./element.js";

const DEEPEST = 12; // lists and quotes inside each other; what is deeper is a paragraph
const FENCE = /^([ \t]*)(`{3,}(?=[^`]*$)|~{3,})(.*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+|$)/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}>[ \t]?/;
const ITEM = /^([ \t]*)([-*+]|\d{1,9}[.)])(?: {1,4}(?! )| (?= {4})|\t|$)/;
const TAB = 4; // columns
const HIGHEST = 4; // of a heading in an answer, which stands under the page's own

/** The elements of a text, one a block; `cite(number)` gives the element of a `[2]`, or null. */
export const renderMarkdown = (source, cite = null) => blocksOf(linesOf(source)).map((block) => drawn(block, { cite }));

/** A text as it is read: without its Markdown. */
export function plainText(source) {
  const root = element("div", {}, ...renderMarkdown(source));
  root.querySelectorAll(".code-head").forEach((head) => head.remove());
  return [...root.children].map((block) => block.textContent).join("\n");
}

/** A text that grows: elements of finished blocks are left alone, those of the last one change where they differ. */
export class MarkdownView {
  #rest = ""; // from the beginning of the last block on
  #finished = 0; // elements before it
  #frame = 0;
  #drawnAt = 0;
  #cost = 0;

  /** `around(change)` makes each change of the elements, for callers that must see what is before and after it. */
  constructor(root, { cite = null, around = (change) => change() } = {}) {
    Object.assign(this, { root, cite, around });
    root.classList.add("markdown");
    root.addEventListener("click", copyCode);
  }

  append(text) {
    this.#rest += text.replaceAll("\r", "");
    this.#frame ||= requestAnimationFrame(() => this.#whenDue());
  }

  /** Draw what there is, as if no more came. */
  finish() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    this.draw(false);
  }

  #whenDue() {
    const wait = 9 * this.#cost - (performance.now() - this.#drawnAt); // drawing takes a tenth of the time at most
    this.#frame = wait > 0 ? requestAnimationFrame(() => this.#whenDue()) : 0;
    if (!this.#frame) this.draw(true);
  }

  draw(growing) {
    const begun = performance.now();
    const blocks = blocksOf(linesOf(this.#rest));
    const nodes = blocks.map((block, i) => drawn(block, { cite: this.cite, growing: growing && i === blocks.length - 1 }));
    this.around(() => adopt(this.root, nodes, this.#finished));
    const whole = this.#rest.slice(0, this.#rest.lastIndexOf("\n") + 1);
    const last = blocksOf(linesOf(whole)).at(-1); // more lines can change this one, none before it
    if (last?.from > 0) {
      this.#finished += blocks.filter((block) => block.from < last.from).length;
      this.#rest = this.#rest.split("\n").slice(last.from).join("\n");
    }
    this.#drawnAt = performance.now();
    this.#cost = this.#drawnAt - begun;
  }
}

/** Make a node's children from `first` on like `wanted`, keeping those that are: focus and selection stay. */
function adopt(parent, wanted, first = 0) {
  const known = [...parent.childNodes].slice(first);
  wanted.forEach((node, i) => {
    const old = known[i];
    if (!old) parent.append(node);
    else if (old.nodeType === Node.TEXT_NODE && node.nodeType === Node.TEXT_NODE) {
      if (old.data !== node.data) old.data = node.data;
    } else if (old.cloneNode().isEqualNode(node.cloneNode())) {
      if (!old.matches?.("button")) adopt(old, [...node.childNodes]); // a button says what it has done
    } else old.replaceWith(node);
  });
  known.slice(wanted.length).forEach((node) => node.remove());
}

const linesOf = (source) => source.replaceAll("\r", "").split("\n");

// Blocks: each is `{ kind, from, ... }`, where `from` is the number of its first line

function blocksOf(lines, depth = 0) {
  const found = [];
  for (let at = 0; at < lines.length; ) {
    if (!lines[at].trim()) {
      at++;
      continue;
    }
    const block = read(lines, at, depth);
    found.push({ ...block, from: at });
    at = block.end;
  }
  return found;
}

function read(lines, at, depth) {
  for (const reader of READERS) {
    const block = reader(lines, at, depth);
    if (block) return block;
  }
  return paragraph(lines, at, depth);
}

function fence(lines, at) {
  const opened = FENCE.exec(lines[at]);
  if (!opened) return null;
  const [, indent, marks, info] = opened;
  const closes = (line) => /^[ \t]*(`+|~+)[ \t]*$/.exec(line)?.[1].startsWith(marks);
  let end = at + 1;
  while (end < lines.length && !closes(lines[end])) end++;
  const code = lines.slice(at + 1, end).map((line) => outdent(line, columns(indent)));
  const closed = end < lines.length;
  if (!closed && code.at(-1) === "") code.pop(); // the text's last line end
  return { kind: "code", language: info.trim().split(/\s/)[0].slice(0, 40), code: code.join("\n"), end: closed ? end + 1 : end };
}

function heading(lines, at) {
  const opened = HEADING.exec(lines[at]);
  if (!opened) return null;
  const text = lines[at].slice(opened[0].length).trim();
  return { kind: "heading", level: opened[1].length, text: withoutClosing(text), end: at + 1 };
}

/** A heading's text without the `##` that may end it. */
function withoutClosing(text) {
  let end = text.length;
  while (text[end - 1] === "#") end--;
  return end === 0 || (end < text.length && /[ \t]/.test(text[end - 1])) ? text.slice(0, end).trimEnd() : text;
}

const rule = (lines, at) => (RULE.test(lines[at]) ? { kind: "rule", end: at + 1 } : null);

function quote(lines, at, depth) {
  if (depth >= DEEPEST || !QUOTE.test(lines[at])) return null;
  let end = at + 1;
  while (end < lines.length && QUOTE.test(lines[end])) end++;
  const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return { kind: "quote", blocks: blocksOf(inner, depth + 1), end };
}

function list(lines, at, depth) {
  const first = itemAt(lines[at]);
  if (depth >= DEEPEST || !first) return null;
  const items = [];
  let [end, loose] = [at, false];
  for (let item = first; item && item.sign === first.sign; item = end < lines.length ? itemAt(lines[end]) : null) {
    if (items.length && RULE.test(lines[end])) break;
    const [inner, next] = itemLines(lines, end, item);
    items.push(blocksOf(inner, depth + 1));
    const gap = inner.findIndex((line, i) => i && !line.trim()); // between its blocks, or before the next item
    const ends = next < lines.length && itemAt(lines[next])?.sign === first.sign ? inner.length : 1 + inner.findLastIndex((line) => line.trim());
    loose ||= gap > 0 && gap < ends;
    end = next;
  }
  return { kind: "list", start: first.number, items, loose, end };
}

/** The marker that a line begins with: its sign, the columns before it, and those up to the text. */
function itemAt(line) {
  const found = ITEM.exec(line);
  if (!found) return null;
  const [all, space, marker] = found;
  const indent = columns(space);
  const gap = all.length - space.length - marker.length;
  const number = /\d/.test(marker) ? parseInt(marker, 10) : null;
  return { indent, sign: marker.at(-1), number, length: all.length, width: indent + marker.length + Math.max(1, gap) };
}

/** The lines of an item, without its marker and indent, and the number of the line behind them. */
function itemLines(lines, at, item) {
  const inner = [lines[at].slice(item.length)];
  let fenced = FENCE.test(inner[0]);
  let end = at + 1;
  for (; end < lines.length; end++) {
    const [line, last] = [lines[end], inner.at(-1)];
    const indent = columns(line);
    const nested = indent > item.indent + 1 && itemAt(line); // also where it stands less far in than the text
    const continues = last.trim() && !fenced && !FENCE.test(last) && !itemAt(line) && !begins(line); // a paragraph's next line
    if (line.trim() && indent < item.width && !nested && !continues) break;
    inner.push(outdent(line, item.width));
    if (FENCE.test(inner.at(-1))) fenced = !fenced;
  }
  return [inner, end];
}

/** The columns of the space that a line begins with. */
function columns(line) {
  let found = 0;
  for (const character of line) {
    if (character === " ") found++;
    else if (character === "\t") found += TAB - (found % TAB);
    else break;
  }
  return found;
}

/** A line without the first columns of its space. */
function outdent(line, width) {
  let [at, column] = [0, 0];
  while (column < width && (line[at] === " " || line[at] === "\t")) column += line[at++] === " " ? 1 : TAB - (column % TAB);
  return " ".repeat(Math.max(0, column - width)) + line.slice(at);
}

function table(lines, at) {
  const [head, rule] = [lines[at], lines[at + 1]];
  if (!head.includes("|") || !rule || !/^ {0,3}[|:-]/.test(rule) || !rule.includes("-")) return null;
  const signs = cells(rule);
  const names = cells(head);
  if (names.length !== signs.length || !signs.every((sign) => /^:?-+:?$/.test(sign))) return null;
  const align = signs.map((sign) => (sign.endsWith(":") ? (sign.startsWith(":") ? "center" : "right") : ""));
  let end = at + 2;
  while (end < lines.length && lines[end].trim() && !begins(lines[end])) end++;
  const rows = lines.slice(at + 2, end).map((line) => cells(line).slice(0, names.length));
  return { kind: "table", names, align, rows, end };
}

/** A row's cells; a bar behind a backslash is text. */
function cells(line) {
  const row = line.trim().replace(/^\|/, "");
  const found = [""];
  for (let at = 0; at < row.length; at++) {
    if (row[at] === "\\" && row[at + 1] === "|") found[found.length - 1] += row[++at];
    else if (row[at] === "|") found.push("");
    else found[found.length - 1] += row[at];
  }
  if (found.length > 1 && !found.at(-1).trim()) found.pop();
  return found.map((cell) => cell.trim());
}

function paragraph(lines, at, depth) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !(depth < DEEPEST && begins(lines[end])) && !table(lines, end)) end++;
  return { kind: "paragraph", text: lines.slice(at, end).join("\n").trim(), end };
}

const READERS = [fence, heading, rule, quote, list, table];

/** Whether a line ends the paragraph before it. An item does if it has a text, and the number 1 if it has one. */
function begins(line) {
  const found = itemAt(line);
  if (found && line.slice(found.length).trim()) return found.number === null || found.number === 1;
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line);
}

// Elements. What is `growing` is still being written: its last run of text may end in half a mark

function drawn(block, options) {
  return DRAWERS[block.kind](block, options);
}

const DRAWERS = {
  paragraph: ({ text }, options) => element("p", {}, ...inlines(text, options)),
  heading: ({ level, text }, options) => element(`h${Math.min(6, level + HIGHEST - 1)}`, {}, ...inlines(text, options)),
  rule: () => element("hr"),
  quote: ({ blocks }, options) => element("blockquote", {}, ...drawnAll(blocks, options)),
  code: ({ language, code }) =>
    element(
      "div",
      { class: "code" },
      element("div", { class: "code-head" }, element("span", {}, language), element("button", { type: "button", class: "small copy" }, "Copy")),
      element("pre", { tabindex: "0", "aria-label": language ? `Code in ${language}` : "Code", role: "region" }, element("code", {}, code)),
    ),
  list: ({ start, items, loose }, options) => {
    const made = element(start === null ? "ul" : "ol", start === null || start === 1 ? {} : { start: String(start) });
    if (loose) made.className = "loose";
    made.append(...items.map((blocks, i) => element("li", {}, ...drawnAll(blocks, grown(options, i, items)))));
    return made;
  },
  table: ({ names, align, rows }, options) => {
    const cell = (tag, text, i, more) => element(tag, align[i] ? { ...more, class: align[i] } : more, ...inlines(text, options));
    const head = element("tr", {}, ...names.map((name, i) => cell("th", name, i, { scope: "col" })));
    const body = rows.map((row) => element("tr", {}, ...row.map((text, i) => cell("td", text, i, {}))));
    const made = element("table", {}, element("thead", {}, head), element("tbody", {}, ...body));
    return element("div", { class: "scroll", role: "region", "aria-label": "Table", tabindex: "0" }, made);
  },
};

const drawnAll = (blocks, options) => blocks.map((block, i) => drawn(block, grown(options, i, blocks)));

const grown = (options, i, all) => ({ ...options, growing: options.growing && i === all.length - 1 });

// The copy button of code

async function copyCode(event) {
  const button = event.target.closest?.("button.copy");
  if (!button) return;
  const code = button.closest(".code").querySelector("code");
  button.textContent = (await copied(code)) ? "Copied" : "Select it, then Ctrl+C";
  setTimeout(() => (button.textContent = "Copy"), 2000);
}

async function copied(code) {
  try {
    await navigator.clipboard.writeText(code.textContent); // missing where the address is not https or this machine's
    return true;
  } catch {
    getSelection().selectAllChildren(code);
    return document.execCommand("copy");
  }
}

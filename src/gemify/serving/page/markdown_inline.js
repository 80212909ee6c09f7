// The marks inside a line of Markdown: code, emphasis, links. CommonMark's algorithm, in one pass over the text.

import { element } from "./element.js";

const LONGEST = 2000; // characters of an address
const DEEPEST = 12; // elements inside each other; deeper marks are left out
const SCHEMES = ["http:", "https:", "mailto:"];
const MARKS = /[\\`*_~[\]!<h]/g; // where something may begin
const TARGET = /\(\s{0,9}(?:<([^<>\n]{0,2000})>)?/y;
const TITLE = /(?:\s{1,9}(?:"[^"\n]{0,300}"|'[^'\n]{0,300}'))?\s{0,9}\)/y;
const BARE = /https?:\/\/[^\s<>"`|\\]{1,2000}/y;
const ANGLE = /<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/y;
const CITATION = /\[(\d{1,2})\](?![([])/y;
const PUNCTUATION = /[\p{P}\p{S}]/u;
const TAGS = { "*": ["em", "strong"], _: ["em", "strong"], "~": ["del", "del"] };

/** The nodes of a text; with `growing` its end may be half a mark, which is then closed or left out. */
export function inlines(text, { cite = null, growing = false } = {}) {
  const source = growing ? text.replace(/(?:[*_~`]{1,3}|!?\[|\]\([^\s()]{0,2000})$/, (end) => (end.startsWith("](") ? "]" : "")) : text;
  return built(new Scanner(source, cite, growing).run());
}

/** Cuts a text into tokens: strings, nodes, `{ open }` and `{ close }` of elements, runs of marks. */
class Scanner {
  constructor(source, cite, growing) {
    Object.assign(this, { source, cite, growing, at: 0, tokens: [], brackets: [], runs: [] });
    this.ticks = ticksByLength(source);
  }

  run() {
    while (this.at < this.source.length) {
      MARKS.lastIndex = this.at;
      const next = MARKS.exec(this.source)?.index ?? this.source.length;
      if (next > this.at) this.push(this.source.slice(this.at, next));
      this.at = next;
      if (next < this.source.length) this.mark(this.source[next]);
    }
    pair(this.runs, 0, this.growing ? this.tokens : null);
    return this.tokens;
  }

  push(...tokens) {
    this.tokens.push(...tokens);
  }

  mark(sign) {
    if (sign === "\\") this.escape();
    else if (sign === "`") this.code();
    else if (sign in TAGS) this.emphasis(sign);
    else if (sign === "[" || sign === "!") this.bracket(sign);
    else if (sign === "]") this.link();
    else this.address();
  }

  literal(length) {
    this.push(this.source.slice(this.at, this.at + length));
    this.at += length;
  }

  escape() {
    const next = this.source[this.at + 1] ?? "";
    if (/[!-/:-@[-`{-~\n]/.test(next)) this.at++;
    this.literal(1);
  }

  code() {
    const length = runLength(this.source, this.at);
    const ticks = this.ticks.get(length) ?? { places: [], next: 0 }; // none where an escape took the first one
    while (ticks.places[ticks.next] <= this.at) ticks.next++;
    const open = this.at + length;
    const end = ticks.places[ticks.next] ?? (this.growing ? this.source.length : -1);
    if (end < 0) return this.literal(length);
    let inside = this.source.slice(open, end).replaceAll("\n", " ");
    if (inside.trim() && inside.startsWith(" ") && inside.endsWith(" ")) inside = inside.slice(1, -1);
    this.push(element("code", {}, inside));
    this.at = end + length;
  }

  emphasis(sign) {
    const length = runLength(this.source, this.at);
    const [before, after] = [characterBefore(this.source, this.at), characterAt(this.source, this.at + length)];
    const run = { sign, count: length, length, opens: [], closes: [], ...flanks(sign, before, after) };
    if (sign === "~" && length !== 2) return this.literal(length);
    this.push(run);
    this.runs.push(run);
    this.at += length;
  }

  bracket(sign) {
    const picture = sign === "!";
    if (picture && this.source[this.at + 1] !== "[") return this.literal(1);
    const cited = picture ? null : this.citation();
    if (cited) return;
    this.brackets.push({ token: this.tokens.length, at: this.at, picture, runs: this.runs.length });
    this.literal(picture ? 2 : 1);
  }

  citation() {
    const found = this.cite && matchAt(CITATION, this.source, this.at);
    const node = found && this.cite(Number(found[1]));
    if (!node) return false;
    this.push(node);
    this.at += found[0].length;
    return true;
  }

  link() {
    const opened = this.brackets.pop();
    const target = opened && this.target(this.at + 1);
    if (!target) return this.literal(1);
    pair(this.runs, opened.runs);
    this.runs.length = opened.runs;
    this.tokens[opened.token] = { open: "a", href: target.href };
    this.push({ close: true });
    this.at = target.end;
    if (!opened.picture) this.brackets.length = 0; // no link inside a link
  }

  /** The `(address "title")` behind a link's text if the address is safe. */
  target(at) {
    const opened = matchAt(TARGET, this.source, at);
    if (!opened) return null;
    let end = at + opened[0].length;
    const begin = end;
    for (let depth = 0; opened[1] === undefined && end - begin < LONGEST; end++) {
      const sign = this.source[end] ?? " ";
      if (/[\s<>]/.test(sign) || (sign === ")" && depth === 0)) break;
      depth += { "(": 1, ")": -1 }[sign] ?? 0; // round brackets of an address are in pairs
      if (depth > DEEPEST) return null;
    }
    const href = safeAddress(opened[1] ?? this.source.slice(begin, end));
    const closed = href && matchAt(TITLE, this.source, end);
    return closed && { href, end: end + closed[0].length };
  }

  address() {
    const bare = this.source[this.at] === "h";
    const found = bare && /\w/.test(this.source[this.at - 1] ?? "") ? null : matchAt(bare ? BARE : ANGLE, this.source, this.at);
    const text = found && (bare ? withoutEnd(found[0]) : found[1]);
    const href = text && safeAddress(text);
    if (!href) return this.literal(1);
    this.push({ open: "a", href }, text.replace(/^mailto:/, ""), { close: true });
    this.at += bare ? text.length : found[0].length;
  }
}

/** The address as the browser reads it if its scheme is safe. Addresses on this server are not links either. */
function safeAddress(text) {
  try {
    const url = new URL(text);
    return SCHEMES.includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

/** A bare address without the sentence's signs behind it, and without a bracket that it does not open. */
function withoutEnd(text) {
  let opened = text.split("(").length - text.split(")").length;
  let end = text.length;
  for (; end > 0; end--) {
    if (text[end - 1] === ")" && opened < 0) opened++;
    else if (!/[.,;:!?'*_~\]]/.test(text[end - 1])) break;
  }
  return text.slice(0, end);
}

/** Where runs of backticks begin, by their length, and the number of the next one that is still ahead. */
function ticksByLength(source) {
  const found = new Map();
  for (const { 0: run, index } of source.matchAll(/`+/g)) {
    if (!found.has(run.length)) found.set(run.length, { places: [], next: 0 });
    found.get(run.length).places.push(index);
  }
  return found;
}

function matchAt(pattern, source, at) {
  pattern.lastIndex = at;
  return pattern.exec(source);
}

function runLength(source, at) {
  let end = at + 1;
  while (source[end] === source[at]) end++;
  return end - at;
}

const characterAt = (source, at) => (at < source.length ? String.fromCodePoint(source.codePointAt(at)) : "\n");

function characterBefore(source, at) {
  if (at === 0) return "\n";
  const low = source.charCodeAt(at - 1) >> 10 === 0x37 && at > 1; // the second half of a character
  return low ? source.slice(at - 2, at) : source[at - 1];
}

/** Whether a run of marks may open or close emphasis, by the characters around it. */
function flanks(sign, before, after) {
  const [spaceBefore, spaceAfter] = [/\s/.test(before), /\s/.test(after)];
  const [signBefore, signAfter] = [PUNCTUATION.test(before), PUNCTUATION.test(after)];
  const left = !spaceAfter && (!signAfter || spaceBefore || signBefore);
  const right = !spaceBefore && (!signBefore || spaceAfter || signAfter);
  if (sign !== "_") return { canOpen: left, canClose: right };
  return { canOpen: left && (!right || signBefore), canClose: right && (!left || signAfter) };
}

/** Pair the runs from `bottom` on: each closing mark with the nearest opening one; what is left stays text. */
function pair(runs, bottom, growingTokens = null) {
  const openers = []; // runs that wait, innermost last
  const floors = new Map(); // by the kind of closer: the openers below this one do not fit
  for (const run of runs.slice(bottom)) {
    const kind = `${run.sign}${run.canOpen}${run.length % 3}`;
    while (run.canClose && run.count) {
      let i = openers.length - 1;
      const floor = Math.min(floors.get(kind) ?? 0, openers.length);
      while (i >= floor && !fits(openers[i], run)) i--;
      if (i < floor) {
        floors.set(kind, openers.length);
        break;
      }
      join(openers[i], run);
      openers.length = openers[i].count ? i + 1 : i;
      for (const [key, seen] of floors) floors.set(key, Math.min(seen, openers.length));
    }
    if (run.canOpen && run.count) openers.push(run);
  }
  for (const opener of growingTokens ? openers : []) {
    for (; opener.count; opener.count -= Math.min(2, opener.count)) {
      opener.opens.push({ open: TAGS[opener.sign][Math.min(2, opener.count) - 1] });
      growingTokens.push({ close: true });
    }
  }
}

function join(opener, closer) {
  const size = Math.min(2, opener.count, closer.count);
  opener.opens.push({ open: TAGS[opener.sign][size - 1] });
  closer.closes.push({ close: true });
  opener.count -= size;
  closer.count -= size;
}

/** CommonMark's rule of three: of runs that both open and close, lengths that add up to a multiple of 3 do not fit. */
function fits(opener, closer) {
  if (opener.sign !== closer.sign) return false;
  if (opener.sign === "~") return opener.count === closer.count;
  if (!opener.canClose && !closer.canOpen) return true;
  return (opener.length + closer.length) % 3 !== 0 || (opener.length % 3 === 0 && closer.length % 3 === 0);
}

function built(tokens) {
  const root = document.createDocumentFragment();
  const open = [{ node: root, linked: false }];
  let text = "";
  const put = (token) => {
    if (typeof token === "string") {
      text += token;
      return;
    }
    if (text) open.at(-1).node.append(text);
    text = "";
    if (token.open) open.push(entered(token, open));
    else if (token.close) open.pop();
    else open.at(-1).node.append(token);
  };
  for (const token of tokens) {
    if (!token.sign) put(token);
    else [...token.closes, token.sign.repeat(token.count), ...token.opens.reverse()].forEach(put);
  }
  put({ close: true });
  return [...root.childNodes];
}

/** A new element inside the last open one, or that one again: where it is deep enough, or a link inside a link. */
function entered({ open: tag, href }, open) {
  const { node, linked } = open.at(-1);
  if (open.length > DEEPEST || (href && linked)) return { node, linked };
  const made = element(tag, href ? { href, title: href, target: "_blank", rel: "noopener noreferrer nofollow" } : {});
  node.append(made);
  return { node: made, linked: linked || tag === "a" };
}

// Chats kept in this browser, and nowhere else: each under a key of its own, so that tabs do not overwrite each other's.
//
// A chat is `{ id, title, updated, revision, turns }`. What is stored may be anything: what is no chat is passed over.

const PREFIX = "gemify-chat-";
const LAST_DATE = 8.64e15; // ms; a Date is none beyond it
const MOST = { chats: 200, characters: 4_000_000, ofChat: 1_000_000, ofTitle: 80 };

/** All chats without their turns, newest first. */
export function listChats() {
  const found = keys().map(read).filter(Boolean);
  return found.map(({ id, title, updated }) => ({ id, title, updated })).sort((a, b) => b.updated - a.updated);
}

export const readChat = (id) => read(PREFIX + id);

/**
 * Keep a chat and return it as it is kept: with an id, and its number of revisions. Where another tab has gone on with
 * it in the meantime, this one becomes a chat of its own. Returns null if the browser keeps nothing (more).
 */
export function saveChat(chat) {
  const stored = chat.id ? readChat(chat.id) : null;
  const other = stored && stored.revision !== chat.revision;
  const made = {
    id: !chat.id || other ? newId() : chat.id,
    title: clipped(other ? `${chat.title} (copy)` : (stored?.title ?? chat.title)),
    updated: Date.now(),
    revision: other ? 1 : chat.revision + 1,
    turns: chat.turns,
  };
  return store(made) ? made : null;
}

export function renameChat(id, title) {
  const chat = readChat(id);
  if (chat && title.trim()) store({ ...chat, title: clipped(title) });
}

export function deleteChat(id) {
  try {
    localStorage.removeItem(PREFIX + id);
  } catch {
    // Storage may be forbidden: then there is no chat either.
  }
}

/** Call `listener(id)` when another tab has changed a chat. */
export function onOtherTab(listener) {
  window.addEventListener("storage", ({ key }) => {
    if (key === null || key.startsWith(PREFIX)) listener(key?.slice(PREFIX.length));
  });
}

const clipped = (title) => [...title.replace(/\s+/g, " ").trim()].slice(0, MOST.ofTitle).join("");

const newId = () => Array.from(crypto.getRandomValues(new Uint32Array(4)), (n) => n.toString(36)).join("");

function keys() {
  try {
    return Object.keys(localStorage).filter((key) => key.startsWith(PREFIX));
  } catch {
    return [];
  }
}

function read(key) {
  try {
    const { title, updated, revision, turns } = JSON.parse(localStorage.getItem(key));
    const sound = typeof title === "string" && Math.abs(updated) < LAST_DATE && Number.isInteger(revision) && Array.isArray(turns);
    return sound && turns.every(isTurn) ? { id: key.slice(PREFIX.length), title, updated, revision, turns } : null;
  } catch {
    return null;
  }
}

const isText = (value) => typeof value === "string";

function isTurn(turn) {
  if (![turn.question, turn.answer, turn.thoughts, turn.facts].every(isText)) return false;
  if (!turn.calls.every((call) => [call.id, call.name, call.arguments].every(isText))) return false;
  return turn.sources === null || turn.sources.every((source) => [source.id, source.text, source.file].every(isText));
}

/** Write a chat, and make room for it: its sources go first if it is long, then the oldest other chats. */
function store({ id, ...chat }) {
  const key = PREFIX + id;
  let text = JSON.stringify(chat);
  if (text.length > MOST.ofChat) text = JSON.stringify({ ...chat, turns: chat.turns.map((turn) => ({ ...turn, sources: null })) });
  if (text.length > MOST.ofChat) return false;
  const others = keys().filter((other) => other !== key).map((other) => ({ key: other, ...weighed(other) }));
  others.sort((a, b) => b.updated - a.updated);
  let size = others.reduce((sum, other) => sum + other.size, text.length);
  const removed = [];
  for (;;) {
    try {
      if (others.length < MOST.chats && size <= MOST.characters) {
        localStorage.setItem(key, text);
        return true;
      }
    } catch {
      // No room, or no storage at all.
    }
    const oldest = others.pop();
    if (oldest === undefined) return putBack(removed);
    size -= oldest.size;
    removed.push([oldest.key, localStorage.getItem(oldest.key)]);
    localStorage.removeItem(oldest.key);
  }
}

/** Undo removals that made no room: another page of this address may hold it. */
function putBack(removed) {
  try {
    for (const [key, text] of removed) localStorage.setItem(key, text);
  } catch {
    // Full again, by another tab.
  }
  return false;
}

/** What a key holds: how long it is, and how old. What is no chat is the oldest. */
const weighed = (key) => ({ size: localStorage.getItem(key)?.length ?? 0, updated: read(key)?.updated ?? -LAST_DATE });

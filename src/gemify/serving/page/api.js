// The server's public routes: one way to ask, one way to fail (an Error with one line), one way to stream.

const KEY = "gemify-api-key";

let key = stored();
let model = "";
const refusals = new EventTarget();

/** Call `listener` whenever the server wants a key that this tab does not have. */
export const onRefused = (listener) => refusals.addEventListener("refused", listener);

export function useKey(value) {
  key = value;
  try {
    sessionStorage.setItem(KEY, value);
  } catch {
    // Storage may be forbidden: the key then lasts until the page is left.
  }
}

function stored() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

/** The name of the model that is served. */
export async function modelName() {
  model ||= (await get("v1/models")).data[0]?.id ?? "";
  return model;
}

export const get = async (path) => (await ask(path, {})).json();

export async function post(path, body, signal) {
  return (await send(path, body, signal)).json();
}

export const postForm = async (path, form) => (await ask(path, { method: "POST", body: form })).json();

/** The events of a streamed answer, each as an object, up to the [DONE] that must end it. */
export async function* stream(path, body, signal) {
  const reply = await send(path, { ...body, stream: true }, signal);
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new Error("the answer broke off: the server closed the connection");
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new Error(oneLine(event.error.message ?? "the server failed"));
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function send(path, body, signal) {
  const named = "model" in body ? { ...body, model: await modelName() } : body;
  return ask(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(named),
    signal,
  });
}

async function ask(path, options) {
  const headers = key ? { ...options.headers, Authorization: `Bearer ${key}` } : options.headers;
  let reply;
  try {
    reply = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server does not answer: is it running?", { cause: error });
  }
  if (reply.ok) return reply;
  if (reply.status === 401) refusals.dispatchEvent(new Event("refused"));
  const error = new Error(await reason(reply));
  error.status = reply.status;
  throw error;
}

async function reason(reply) {
  try {
    return oneLine((await reply.json()).error.message);
  } catch {
    return `the server answered ${reply.status} ${reply.statusText}`.trim();
  }
}

const oneLine = (text) => String(text).replace(/\s+/g, " ").trim();

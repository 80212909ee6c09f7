// What a text's special token remembers of it.

import { post } from "./api.js";
import { byId, element, onSubmit, sendsByKey } from "./element.js";
import { compare, words } from "./words.js";

const MOST_WORDS = 2000; // compared, each with each
const MOST_TOKENS = 512;

export function startRecovery() {
  sendsByKey(byId("original"));
  onSubmit(byId("recovery-form"), byId("recovery-error"), recover);
}

async function recover() {
  const status = byId("recovery-status");
  const input = byId("original").value.trim();
  status.textContent = "remembering …";
  byId("recovered").hidden = true;
  try {
    const length = words(input).length;
    if (length > MOST_WORDS) throw new Error(`the text is too long to compare: give at most ${MOST_WORDS} words`);
    const max_tokens = Math.min(MOST_TOKENS, 2 * length + 4); // room for all of it, and an end for a model that repeats itself
    const { output } = await post("v1/recover", { input, max_tokens });
    const { before, after, shared } = compare(input, output.trim());
    mark(byId("given"), before, "del", "lost: ");
    mark(byId("remembered"), after, "ins", "new: ");
    byId("recovered").hidden = false;
    status.textContent = after.length ? `${shared} of ${before.length} words and signs came back, ${after.length - shared} are new` : "nothing came back";
  } catch (error) {
    status.textContent = "";
    throw error;
  }
}

/** Write words, those not shared in runs of `tag`: struck out or underlined, named for those who listen. */
function mark(target, found, tag, spoken) {
  const parts = [];
  let run = null;
  for (const { space, word, shared } of found) {
    if (shared) {
      run = null;
      parts.push(space + word);
    } else if (run) {
      run.append(space + word);
    } else {
      run = element(tag, {}, element("span", { class: "hidden" }, spoken), word);
      parts.push(space, run);
    }
  }
  target.replaceChildren(...parts);
}

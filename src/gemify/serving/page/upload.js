// Files for the chosen store: they go one after the other, and each is found as soon as the server has it.

import { postForm } from "./api.js";
import { byId, onSubmit } from "./element.js";
import { chosenStore } from "./stores.js";

/** Call `listener` when the store has changed. */
export function startUpload(listener) {
  onSubmit(byId("upload-form"), byId("upload-error"), () => upload([...byId("upload-files").files]).finally(listener));
}

/** Offer it where this key may upload. */
export function offerUpload(available) {
  byId("upload-form").hidden = !available;
}

async function upload(files) {
  const [status, bar] = [byId("upload-status"), byId("upload-progress")];
  const path = `v1/stores/${encodeURIComponent(chosenStore())}/files`;
  let passages = 0;
  let skipped = 0;
  bar.max = files.length;
  bar.hidden = false;
  try {
    for (const [done, file] of files.entries()) {
      bar.value = done;
      status.textContent = `${done + 1} of ${files.length}: ${file.name} is read and embedded …`;
      const form = new FormData();
      form.append("file", file);
      const added = await postForm(path, form).catch((error) => {
        throw new Error(`${file.name}: ${error.message}`, { cause: error });
      });
      passages += added.num_passages;
      skipped += added.skipped.length;
    }
    const left = skipped ? `; ${skipped} parts could not be read` : "";
    status.textContent = `${files.length === 1 ? files[0].name : `${files.length} files`}: ${passages} passages in the index${left}`;
    byId("upload-files").value = "";
  } catch (error) {
    status.textContent = "";
    throw error;
  } finally {
    bar.hidden = true;
  }
}

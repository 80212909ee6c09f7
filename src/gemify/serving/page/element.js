// Elements of the document, made without any HTML text: what users and models write only ever becomes text.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

export function element(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

export function shape(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(made, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  for (const child of children) made.append(child);  // a spread of very many ends the stack
  return made;
}

/** Show one line, or hide the element where there is none. */
export function say(target, line) {
  target.textContent = line;
  target.hidden = !line;
}

/** Let Ctrl+Enter (or Cmd+Enter) in a field send its form. */
export function sendsByKey(field) {
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.isComposing) {
      event.preventDefault();
      field.form.requestSubmit();
    }
  });
}

/** Run a form's task while its button is off; the task's error becomes the form's one line. */
export function onSubmit(form, errorLine, task) {
  const button = form.querySelector("button[type=submit]");
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (button.getAttribute("aria-disabled") === "true") return;
    button.setAttribute("aria-disabled", "true"); // not `disabled`: that would take the keyboard's focus away
    say(errorLine, "");
    try {
      await task();
    } catch (error) {
      if (error.name !== "AbortError") say(errorLine, error.message);
    } finally {
      button.removeAttribute("aria-disabled");
    }
  });
}

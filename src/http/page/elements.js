// The document: elements are made, found and changed here. What says the same stays untouched, so that focus, selection
// and scroll positions stay, too, and a screen reader speaks only of what is new.
//
// Everything from elsewhere goes in as text, never as markup: names, keys and values were chosen by somebody else.

export const at = (id) => document.getElementById(id);

/// Writes only what is new.
export function say(id, text) {
  const node = typeof id === "string" ? at(id) : id;
  if (node.textContent !== text) node.textContent = text;
}

export function element(tag, text, attributes = {}) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.textContent = text ?? "";
  return node;
}

/// Replaces the children if they say something else.
export function list(id, nodes) {
  const parent = at(id);
  const same = parent.children.length === nodes.length && nodes.every((node, i) => node.isEqualNode(parent.children[i]));
  if (!same) parent.replaceChildren(...nodes);
}

/// Keeps what is chosen.
export function options(select, values, texts) {
  if (select.options.length === values.length && values.every((value, i) => select.options[i].value === value)) return;
  const chosen = select.value;
  select.replaceChildren(...values.map((value, i) => element("option", texts[i], { value })));
  if (values.includes(chosen)) select.value = chosen;
}

const LONGEST = 200;

/// Writes a text of any length. What is too long is cut, with a button that shows all of it; once pressed, it stays
/// pressed, whatever the text becomes.
export function sayLong(id, text, longest = LONGEST) {
  const node = typeof id === "string" ? at(id) : id;
  if (node.whole === text) return;
  node.whole = text;
  const button = node.querySelector(":scope > button.more");
  // A little more is not worth a button.
  if (text.length <= longest * 1.25) {
    node.textContent = text;
  } else if (button) {
    say(node.firstElementChild, button.ariaExpanded === "true" ? text : `${text.slice(0, longest)}…`);
  } else {
    node.replaceChildren(element("span", `${text.slice(0, longest)}…`), " ", expander(node, longest));
  }
}

function expander(node, longest) {
  const button = element("button", "show all", { type: "button", class: "more", "aria-expanded": "false" });
  button.addEventListener("click", () => {
    const isOpen = button.ariaExpanded !== "true";
    button.ariaExpanded = isOpen;
    say(button, isOpen ? "show less" : "show all");
    say(node.firstElementChild, isOpen ? node.whole : `${node.whole.slice(0, longest)}…`);
  });
  return button;
}

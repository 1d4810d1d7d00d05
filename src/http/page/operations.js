// What a person may ask of the daemon: with the token, after a question where it hurts, and with the result beside the
// button. The button keeps the focus.

import { at, element, options, say, sayLong } from "./elements.js";
import { clock, count, found, millis, several } from "./words.js";

// ---------------------------------------------------------------------------------------------- the token

/// Kept for this tab alone, and gone with it. Where the browser keeps nothing: until the page is closed.
const KEPT = "prefetchd-token";
let token = "";

/// From the address's fragment, as `prefetchd page` prints it. It does not stay in the address bar, to be copied or read over
/// somebody's shoulder; the browser's history may keep it.
function takeToken() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given === null) return;
  keepToken(given);
  window.history.replaceState(null, "", location.pathname + location.search);
}

function keptToken() {
  try {
    return sessionStorage.getItem(KEPT) ?? "";
  } catch {
    return "";
  }
}

function keepToken(given) {
  token = given;
  at("read-only").hidden = hasToken();
  try {
    sessionStorage.setItem(KEPT, token);
  } catch {
    // It is good until the page is closed.
  }
}

/// Without it everything is shown, and nothing done.
export const hasToken = () => token !== "";

// ---------------------------------------------------------------------------------------------- asking

/// The answer, or an error with what the daemon says. Whoever clicked something is asked for the token where it is
/// missing or wrong; what the page asks for by itself is not worth a question.
export async function ask(path, body = {}, { byItself = false } = {}) {
  const headers = { "Content-Type": "application/json" };
  if (token) headers.Authorization = `Bearer ${token}`;
  let response;
  try {
    response = await fetch(path, { method: "POST", headers, body: JSON.stringify(body) });
  } catch {
    throw new Error("the daemon does not answer");
  }
  const answer = await response.json().catch(() => ({}));
  if (response.status === 401) {
    keepToken("");
    if (byItself) throw new Error(answer.message);
    const text = "Operations need the admin token: that of http.admin_token_file, else of the file that the daemon's log names. `prefetchd page` prints this page's address with it. It is kept for this tab alone.";
    const given = await confirm({ title: "Token", text, ask: "Token", secret: true, yes: "Go on" });
    if (given === null) throw new Error(answer.message);
    keepToken(given.trim());
    return ask(path, body);
  }
  if (!response.ok) throw new Error(answer.message ?? `it answered ${response.status}`);
  return answer;
}

let answering = null;

/// What was typed, or `""` where nothing is asked for; `null` where the person thought better of it.
export function confirm({ title, text, ask: label, expect, secret, yes }) {
  answering?.(null);
  const [dialog, input] = [at("dialog"), at("dialog-input")];
  say("dialog-title", title);
  say("dialog-text", text);
  say("dialog-label", label ?? "");
  say("dialog-yes", yes);
  at("dialog-ask").hidden = !label;
  input.type = secret ? "password" : "text";
  input.value = "";
  const judge = () => (at("dialog-yes").disabled = expect !== undefined && input.value !== expect);
  input.oninput = judge;
  judge();
  dialog.showModal();
  if (!label) at("dialog-no").focus();
  return new Promise((resolve) => {
    answering = (answer) => {
      answering = null;
      dialog.close();
      resolve(answer);
    };
  });
}

at("dialog-form").addEventListener("submit", (event) => {
  event.preventDefault();
  answering?.(at("dialog-input").value);
});
at("dialog-no").addEventListener("click", () => answering?.(null));
at("dialog").addEventListener("cancel", (event) => {
  event.preventDefault();
  answering?.(null);
});

// ---------------------------------------------------------------------------------------------- doing

export const isBusy = (button) => button.ariaBusy === "true";

/// Does this once at a time for each button. It is not disabled meanwhile, which would take the focus from it.
export async function busy(button, act) {
  if (isBusy(button) || button.ariaDisabled === "true") return;
  button.ariaBusy = button.ariaDisabled = true;
  try {
    await act();
  } finally {
    button.ariaBusy = button.ariaDisabled = null;
  }
}

/// The place for results nearest to a button.
const resultOf = (button) => button.closest(".operation").querySelector("output");

function showResult(place, text, isFailed) {
  const result = element("span", "", { class: isFailed ? "failed" : "done" });
  sayLong(result, text);
  place.replaceChildren(element("time", clock(Date.now()), { class: "quiet" }), " ", result);
}

/// Does this once at a time, and shows beside the button how long it has taken, and what came of it.
export async function perform(button, what, act) {
  await busy(button, async () => {
    const place = resultOf(button);
    const began = performance.now();
    // For the eye alone: a screen reader is told the end.
    const waiting = element("span", `${what} …`, { class: "quiet", "aria-hidden": "true" });
    place.replaceChildren(waiting);
    const timer = setInterval(() => say(waiting, `${what} … ${Math.floor((performance.now() - began) / 1000)} s`), 1000);
    try {
      showResult(place, `${what}: ${await act()}`, false);
    } catch (error) {
      showResult(place, `${what}: ${error.message}`, true);
    } finally {
      clearInterval(timer);
    }
  });
}

export const operate = (name, body, told, button) =>
  perform(button, body.table ? `${name} ${body.table}` : name, async () => told(await ask(`/v1/admin/${name}`, body)));

export const told = {
  refetch: (done) => `${count(done.loaded)} rows loaded in ${millis(done.elapsed_ms)}: ${count(done.repaired)} repaired, ${several(done.removed, "orphan")} removed`,
  verify: (done) => `${count(done.rows)} rows, ${count(done.keys)} keys: ${found(done)}`,
  deleted: (done) => `${several(done.deleted, "key")} removed from the cache`,
};

export async function clear(table, button) {
  const text = `Every key of ${table} is removed from the cache. Readers get 503 until you refetch: nothing heals this by itself before the next verify.`;
  const confirmed = await confirm({ title: `Clear ${table}?`, text, ask: `Type the table's name, ${table}`, expect: table, yes: "Clear" });
  if (confirmed !== null) await operate("clear", { table, confirm: confirmed }, told.deleted, button);
}

export function showOperations(status) {
  const names = status.tables.map((table) => table.name);
  options(at("which"), ["", ...names], ["all", ...names]);
  for (const select of document.querySelectorAll("select.which-one")) options(select, names, names);
  const [shown, other] = status.paused ? ["resume", "pause"] : ["pause", "resume"];
  const hadFocus = document.activeElement === at(other);
  at(shown).hidden = false;
  at(other).hidden = true;
  if (hadFocus) at(shown).focus();
}

const chosen = () => (at("which").value ? { table: at("which").value } : {});
const on = (id, act) => at(id).addEventListener("click", (event) => act(event.currentTarget));
const form = (id, act) =>
  at(id).addEventListener("submit", (event) => {
    event.preventDefault();
    act(event.submitter ?? event.currentTarget.querySelector("button"));
  });

on("verify", (button) => operate("verify", chosen(), told.verify, button));
on("repair", (button) => operate("verify", { ...chosen(), repair: true }, told.verify, button));
on("refetch", (button) => operate("refetch", chosen(), told.refetch, button));
on("resume", (button) => operate("resume", {}, () => "goes on", button));
on("pause", async (button) => {
  const text = "Nothing is applied until you resume or restart the daemon. Readers see old rows, and Postgres keeps the WAL for the slot.";
  const sure = await confirm({ title: "Pause?", text, yes: "Pause" });
  if (sure !== null) await operate("pause", {}, () => "nothing more is applied, changes wait in Postgres", button);
});
form("invalidate", async (button) => {
  const table = at("invalidate-table").value;
  const keys = at("invalidate-keys").value.split(/\s+/).filter(Boolean);
  const text = `${keys.join(", ")} of ${table}: removed from the cache. Readers get 503 for them until you refetch.`;
  const sure = keys.length ? await confirm({ title: "Invalidate?", text, yes: "Invalidate" }) : null;
  if (sure !== null) await operate("invalidate", { table, keys }, told.deleted, button);
});
form("clear", (button) => clear(at("clear-table").value, button));
form("skip", async (button) => {
  const lsn = at("skip-lsn").value.trim();
  const text = `What the transaction at ${lsn} changed is never sent. Every table is loaded again, so nothing of it is missing in the cache.`;
  const sure = await confirm({ title: "Skip?", text, yes: "Skip" });
  if (sure !== null) await operate("skip", { lsn }, () => "the stream goes on behind it, every table is loaded again", button);
});

keepToken(keptToken());
takeToken();
// Pasted into a tab that shows the page already.
window.addEventListener("hashchange", takeToken);

// What whoever looks must know first: the daemon's own verdict, what to do, and the button that does it. If the daemon
// is silent, this says so, because whatever it said before is old.

import { at, element, list, say, sayLong } from "./elements.js";
import { operate, told } from "./operations.js";
import { several, states } from "./words.js";

/// The daemon's levels, with their mark in the tab's title.
const MARKS = { good: "✓", warning: "!", bad: "✗" };
/// More tables than these are counted, not listed.
const TABLES_NAMED = 3;

let status = null;

// ---------------------------------------------------------------------------------------------- the sentence

function judge(level, text, advice) {
  const [sentence, rest] = sentences(text);
  at("verdict").className = `verdict ${level}`;
  say("sentence", sentence);
  sayLong("rest", rest);
  sayLong("advice", advice);
  speak(sentence);
}

/// The first sentence, and all others.
function sentences(text) {
  const end = /[.!?]\s+(?=[A-Z])/.exec(text);
  return end ? [text.slice(0, end.index + 1), text.slice(end.index + end[0].length)] : [text, ""];
}

let spoken = "";

/// For screen readers: a sentence in which only a number has changed is not said again.
function speak(sentence) {
  const words = sentence.replace(/[\d.,]+/g, "");
  if (words === spoken) return;
  spoken = words;
  say("spoken", sentence);
}

export function showVerdict(now) {
  status = now;
  const { level, text, remedy, action } = status.verdict;
  judge(MARKS[level] ? level : "bad", text, remedy);
  const database = status.source.database ? ` ${status.source.database}` : "";
  document.title = level === "good" ? `✓ prefetchd${database}` : `${MARKS[level] ?? "✗"} ${trouble()} – prefetchd${database}`;
  list("reasons", reasons().filter((reason) => !isSaid(reason, `${text} ${remedy}`)).map((reason) => element("li", reason)));
  offer(action ?? null);
  showRunning();
}

/// What is wrong, in a word or two.
function trouble() {
  const has = (state) => status.tables.some((table) => table.state === state);
  if (status.paused) return "paused";
  if (has("blocked")) return "blocked";
  if (status.state !== "streaming" && status.state !== "standby") return status.state.replace("_", " ");
  if (has("incomplete")) return "rows missing";
  if (status.tables.some((table) => table.drift > 0)) return "drift";
  if (status.dead_letters > 0) return "dead letters";
  return status.ready ? "warning" : "not ready";
}

/// Whether the verdict has all parts of a reason.
function isSaid(reason, verdict) {
  const parts = reason.replace(/^the stream does not run: \w+, waiting for /, "").split(": ");
  return parts.every((part) => verdict.toLowerCase().includes(part.toLowerCase()));
}

/// Why it is not ready. Each table has a reason of its own: many are counted.
function reasons() {
  const unready = status.tables.filter((table) => !table.loaded);
  if (unready.length <= TABLES_NAMED) return status.not_ready_because;
  return [...status.not_ready_because.filter((reason) => !/^table \S+ is /.test(reason)), `${several(unready.length, "table")} are not ready: ${states(unready)}`];
}

/// What the daemon cannot say itself.
export function showSilence({ ms, isFirst }) {
  const since = ms < 1000 ? "" : ` for ${Math.round(ms / 1000)} s`;
  const old = isFirst ? "nothing is known yet" : "what follows is old";
  judge("silent", `No answer from the daemon${since}: ${old}.`, "See whether it runs: prefetchd status, its log, and ps. A process in state T is frozen (kill -CONT), one that hangs needs a restart. This page goes on trying.");
  if (status) sayLong("rest", `Before that, it said: ${status.verdict.text}`);
  const database = status?.source.database ? ` ${status.source.database}` : "";
  document.title = `● no answer – prefetchd${database}`;
  list("reasons", []);
  at("act").hidden = true;
  at("running").hidden = true;
}

// ---------------------------------------------------------------------------------------------- the remedy's button

/// What the button says, what it asks for, and which tables it is about.
const ACTIONS = {
  resume: { label: "Resume", name: "resume", told: () => "goes on" },
  repair: { label: "Verify and repair", name: "verify", body: { repair: true }, told: told.verify, of: (table) => table.drift > 0 },
  refetch: { label: "Refetch", name: "refetch", told: told.refetch, of: (table) => table.state === "incomplete" },
};

function offer(action) {
  const known = ACTIONS[action];
  const button = at("act");
  // Whoever has just pressed it stays here.
  if (!known && document.activeElement === button) at("verdict").focus();
  button.hidden = !known;
  if (!known) return;
  const tables = known.of ? status.tables.filter(known.of) : [];
  const [table] = tables.length === 1 ? tables : [];
  say(button, !known.of ? known.label : `${known.label} ${table ? table.name : "all tables"}`);
  button.onclick = () => operate(known.name, { ...known.body, ...(table ? { table: table.name } : {}) }, known.told, button);
}

// ---------------------------------------------------------------------------------------------- what is under way

function showRunning() {
  const loading = status.paused ? [] : status.tables.filter((table) => table.loading);
  at("running").hidden = !status.operation && loading.length === 0;
  const sum = (of) => loading.reduce((n, table) => n + table.loading[of], 0);
  // The estimate may be too low.
  const [rows, estimated] = [sum("rows"), Math.max(sum("rows"), sum("estimated"))];
  const what = loading.length === 1 ? loading[0].name : several(loading.length, "table");
  const done = `${rows.toLocaleString("en")} of about ${several(estimated, "row")} of ${what}`;
  const running = status.operation ? `A ${status.operation} is under way` : "Reading from Postgres";
  say("running-text", `${running}${loading.length ? `: ${done}` : ""}. It runs on in the daemon if this page is closed.`);
  const bar = at("running-bar");
  if (estimated > 0) [bar.max, bar.value] = [estimated, rows];
  else bar.removeAttribute("value");
}

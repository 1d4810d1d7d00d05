// Figures and times as people read them. What is not known is a dash, never a zero.

const isKnown = (n) => n !== null && n !== undefined;

export const count = (n) => (isKnown(n) ? n.toLocaleString("en") : "–");

export const several = (n, what) => `${count(n)} ${what}${n === 1 ? "" : "s"}`;

export function millis(ms) {
  if (!isKnown(ms)) return "–";
  if (ms >= 10000) return `${(ms / 1000).toFixed(1)} s`;
  return ms >= 100 ? `${ms.toFixed(0)} ms` : `${ms.toFixed(1)} ms`;
}

export const seconds = (s) => (isKnown(s) ? `${s < 10 ? s.toFixed(1) : s.toFixed(0)} s` : "–");

export const percent = (part, whole) => (whole > 0 ? `${((part * 100) / whole).toFixed(1)} %` : "–");

export function bytes(n) {
  if (!isKnown(n)) return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (n >= 1000 && unit < units.length - 1) {
    n /= 1000;
    unit += 1;
  }
  return `${unit === 0 ? n : n.toFixed(1)} ${units[unit]}`;
}

export function ago(time) {
  if (!time) return "–";
  const seconds = Math.max(0, (Date.now() - Date.parse(time)) / 1000);
  if (seconds < 60) return "just now";
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  if (seconds < 172800) return `${Math.round(seconds / 3600)} h ago`;
  return `${Math.round(seconds / 86400)} days ago`;
}

export function uptime(seconds) {
  if (seconds < 120) return `${Math.floor(seconds)} s`;
  if (seconds < 7200) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.floor(seconds / 3600)} h`;
  return `${Math.floor(seconds / 86400)} days`;
}

/// The time of day where the browser is; of another day, with the date.
export function clock(time) {
  const date = new Date(time);
  const text = date.toLocaleTimeString("en-GB");
  if (date.toDateString() === new Date().toDateString()) return text;
  return `${date.toLocaleDateString("en-GB", { day: "numeric", month: "short" })} ${text}`;
}

/// How that differs from UTC, in which the daemon's log is written.
export function zone() {
  const minutes = -new Date().getTimezoneOffset();
  if (minutes === 0) return "UTC";
  const two = (n) => String(Math.floor(n)).padStart(2, "0");
  return `UTC${minutes < 0 ? "−" : "+"}${two(Math.abs(minutes) / 60)}:${two(Math.abs(minutes) % 60)}`;
}

/// The states of a table, the worst first; `null` while it is not known.
export const STATES = ["blocked", "healing", "incomplete", "loading", null, "loaded"];

/// How many tables are in which state.
export function states(tables) {
  const counts = STATES.map((state) => [tables.filter((table) => table.state === state).length, state ?? "not known"]);
  return counts.filter(([n]) => n > 0).map(([n, state]) => `${count(n)} ${state}`).join(", ");
}

/// What a comparison with Postgres came to.
export function found({ missing, stale, orphaned, lookups = 0, repaired }) {
  if (missing + stale + orphaned + lookups === 0) return "no drift";
  const members = lookups > 0 ? `, ${count(lookups)} members of lookups` : "";
  return `${count(missing)} missing, ${count(stale)} stale, ${count(orphaned)} orphaned${members}, ${count(repaired)} repaired`;
}

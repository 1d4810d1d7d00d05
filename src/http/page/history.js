// What the daemon remembers: a figure for each of the last 900 seconds, and what happened with its cause. The large
// figures and the plots below them are made of the same numbers.

import { at, element, say, sayLong } from "./elements.js";
import { SPAN_SECONDS, plot } from "./plots.js";
import { on } from "./stream.js";
import { bytes, clock, count, millis, percent, seconds, several, zone } from "./words.js";

const EVENTS_KEPT = 200;
const SERIES = ["changes", "lag_p50_ms", "lag_p99_ms", "lag_max_ms", "lag_seconds", "lag_bytes", "reads", "errors"];
const SPANS = { last_minute: [60, "minute"], last_15_minutes: [900, "15 minutes"] };

// ---------------------------------------------------------------------------------------------- figures

/// `null` with a daemon that tells none.
let history = null;

const perSecond = (n) => `${count(n)}/s`;
const inSeconds = (s) => (s === 0 ? "0" : `${s} s`);
const inMillis = (ms) => (ms >= 1000 ? inSeconds(ms / 1000) : ms === 0 ? "0" : `${ms} ms`);

/// Each plot with the series that it draws.
const plots = [
  [["lag_p50_ms", "lag_p99_ms", "lag_max_ms"], plot(at("plot-lag"), { title: "Commit to cache", names: ["p50", "p99", "max"], least: 10, tick: inMillis, shown: millis })],
  [["lag_seconds"], plot(at("plot-behind"), { title: "Behind Postgres", names: ["lag"], least: 1, tick: inSeconds, shown: seconds })],
  [["changes"], plot(at("plot-rate"), { title: "Changes a second", names: ["changes"], least: 2, tick: perSecond, shown: perSecond })],
  [["reads", "errors"], plot(at("plot-reads"), { title: "HTTP reads a second", names: ["reads", "errors"], least: 2, tick: perSecond, shown: perSecond })],
];

/// Puts a second where it belongs. Seconds that nobody told of are not known; one that is told again replaces what came
/// after it, since a clock was set back.
function append(second) {
  let place = second.at - history.from;
  if (place < 0 || place >= 2 * SPAN_SECONDS) {
    history.from = second.at;
    place = 0;
  }
  for (const name of SERIES) {
    const values = history.seconds[name];
    values.length = Math.min(values.length, place);
    while (values.length < place) values.push(null);
    values.push(second[name] ?? null);
    values.splice(0, values.length - SPAN_SECONDS);
  }
  history.from = second.at + 1 - history.seconds.changes.length;
  for (const span of Object.keys(SPANS)) history[span] = second[span] ?? history[span];
}

function draw() {
  // Nobody looks.
  if (document.hidden || !history || history.seconds.changes.length === 0) return;
  for (const [names, drawn] of plots) drawn(history.from, names.map((name) => history.seconds[name]));
  figures();
}

/// The highest value of the chosen span, `null` where none is known.
function most(name, length) {
  const known = history.seconds[name].slice(-length).filter((value) => value !== null);
  return known.length ? Math.max(...known) : null;
}

function figures() {
  const chosen = document.querySelector("input[name=span]:checked").value;
  const [length, name] = SPANS[chosen];
  const span = history[chosen];
  const covered = span.seconds < length ? `in the last ${span.seconds} s, since the start` : `in the last ${name}`;
  const { p50, p99, max } = span.sync_lag_ms;
  say("p50", millis(p50));
  say("p99", span.changes ? `p50; p99 ${millis(p99)}, max ${millis(max)}, of ${several(span.changes, "change")} ${covered}` : `no change ${covered}`);
  showLag(history.seconds.lag_seconds.at(-1), history.seconds.lag_bytes.at(-1));
  say("lag-most", `now; at most ${seconds(most("lag_seconds", length))} and ${bytes(most("lag_bytes", length))} ${covered}`);
  const rate = span.seconds ? span.changes / span.seconds : 0;
  say("rate", rate.toFixed(rate < 10 ? 1 : 0));
  say("changes-in", `${several(span.changes, "change")} ${covered}`);
  say("hit-rate", percent(span.hits, span.hits + span.misses));
  const outcome = `${count(span.hits)} hits, ${count(span.misses)} misses, ${several(span.errors, "error")}`;
  say("reads-in", span.reads ? `of ${several(span.reads, "HTTP read")} ${covered}: ${outcome}` : `no HTTP read ${covered}`);
}

function showLag(lag, wal) {
  say("lag", seconds(lag));
  say("lag-bytes", `${bytes(wal)} of WAL behind Postgres`);
}

/// What is true since the start.
on("status", (status) => {
  say("applied-total", `${count(status.sync_events_applied)} since the start`);
  say("hits", `since the start: ${count(status.hits)} hits, ${count(status.misses)} misses`);
  if (history) return;
  showLag(status.lag.seconds, status.lag.bytes);
  for (const id of ["p99", "lag-most", "changes-in", "reads-in"]) say(id, "this daemon tells no history");
});

on("history", (told) => {
  history = told;
  draw();
  showEvents(told.events.toReversed());
});
on("second", (second) => {
  if (!history) return;
  append(second);
  draw();
});
document.addEventListener("visibilitychange", draw);
for (const choice of document.querySelectorAll("input[name=span]")) choice.addEventListener("change", draw);

// ---------------------------------------------------------------------------------------------- events

const LEVELS = { good: "ok", warning: "warning", bad: "error" };

function eventItem({ time, level, table, text }) {
  const item = element("li", "", { class: `event ${level}`, "data-event": `${time} ${text}` });
  const what = element("span", "", { class: "what" });
  sayLong(what, table && !text.includes(table) ? `${table}: ${text}` : text);
  item.append(element("time", clock(time), { datetime: time, title: time }), element("span", LEVELS[level] ?? level, { class: "level" }), what);
  return item;
}

function showEvents(newestFirst) {
  const nodes = newestFirst.slice(0, EVENTS_KEPT).map(eventItem);
  const shown = [...at("events").children];
  // After a new connection nothing may be new.
  if (nodes.length !== shown.length || nodes.some((node, i) => node.dataset.event !== shown[i].dataset.event)) at("events").replaceChildren(...nodes);
  countEvents();
}

on("happened", (event) => {
  const item = eventItem(event);
  item.classList.add("fresh");
  at("events").prepend(item);
  while (at("events").children.length > EVENTS_KEPT) at("events").lastElementChild.remove();
  countEvents();
});

function countEvents() {
  const all = [...at("events").children];
  const trouble = all.filter((item) => !item.classList.contains("good")).length;
  at("events").classList.toggle("only-trouble", at("only-trouble").checked);
  const isEmpty = at("only-trouble").checked ? trouble === 0 : all.length === 0;
  at("events").hidden = isEmpty;
  at("no-events").hidden = !isEmpty;
  say("no-events", all.length === 0 ? "None is known." : `No warning and no error among ${several(all.length, "event")}.`);
  say("events-count", all.length ? `${several(all.length, "event")}, ${count(trouble)} of them warnings or errors; times are ${zone()}` : "");
}
at("only-trouble").addEventListener("change", countEvents);

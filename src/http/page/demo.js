// The demo's part of the page: rows to change, a cache to read from, and what breaks it.

import { at, element, list, options, say, sayLong } from "./elements.js";
import { ask, busy, clear, hasToken, operate, perform, told } from "./operations.js";
import { on } from "./stream.js";
import { count, millis, percent } from "./words.js";

const TABLE = "categories";
const READS = 500;
const READS_AT_ONCE = 5;

// ---------------------------------------------------------------------------------------------- both sides

/// Returns a function that does this, once at a time: what is wanted meanwhile is done once more.
function oneAtATime(act) {
  let isBusy = false;
  let againWanted = false;
  return async () => {
    againWanted = true;
    if (isBusy) return;
    isBusy = true;
    try {
      while (againWanted) {
        againWanted = false;
        await act();
      }
    } catch {
      // The daemon is away: that stands above.
    } finally {
      isBusy = false;
    }
  };
}

const lookAtBoth = oneAtATime(async () => {
  const state = await ask("/demo/state", {}, { byItself: true });
  showSides(state);
  at("lists").hidden = false;
});

async function look() {
  if (hasToken()) return lookAtBoth();
  say("unreadable", "Read-only: open the address that prefetchd demo printed to see the rows and change them.");
}

function showSides(state) {
  say("psql", state.psql);
  say("reshard", state.reshard ?? "");
  say("unreadable", state.unreadable ?? "");
  showButtons(state);
  if (state.rows) showRows(state);
}

/// By id: the row as it is shown, and what it was made of.
const shown = new Map();

/// A row that says the same stays the same, and with it the button that somebody has just pressed.
function rowOf(told) {
  const made = JSON.stringify(told);
  if (shown.get(told.id)?.made !== made) shown.set(told.id, { made, row: makeRow(told) });
  return shown.get(told.id).row;
}

function makeRow({ id, postgres, cache, note, place }) {
  const row = element("tr", "", { "data-id": id });
  const cached = note === "missing from the cache" ? element("td", note, { class: "note" }) : side(cache, note);
  if (place) cached.append(element("div", place, { class: "quiet" }));
  row.append(element("th", id, { scope: "row" }), side(postgres), cached);
  const actions = element("td");
  for (const name of ["Read", "Invalidate", "Delete"]) {
    if (name === "Delete" && postgres === null) continue;
    actions.append(element("button", name, { type: "button", "data-act": name.toLowerCase(), "aria-label": `${name} ${id}` }));
  }
  row.append(actions);
  return row;
}

function showRows(state) {
  const rows = state.rows.map(rowOf);
  // Whoever has a button in focus keeps it.
  const focused = document.activeElement?.dataset.act;
  const focusedRow = document.activeElement?.closest("tr")?.dataset.id;
  list("rows", rows);
  if (focused && !document.activeElement?.dataset.act) {
    [...at("rows").children].find((row) => row.dataset.id === focusedRow)?.querySelector(`[data-act="${focused}"]`)?.focus();
  }
  const ids = state.rows.filter((row) => row.postgres !== null).map((row) => row.id);
  options(at("update-id"), ids, ids);
  options(at("known"), ids, ids);
  options(at("parent"), ids, ids);
}

// ---------------------------------------------------------------------------------------------- lists

// They count as reads, so nothing is listed before somebody asks.
let isListed = false;

/// The rows without a parent, and those with the chosen one, each list of one moment.
const showChildren = oneAtATime(async () => {
  for (const [place, parent] of [["children-none", ""], ["children-of", at("parent").value]]) {
    list(place, await children(parent));
  }
});

async function children(parent) {
  let instead = "none, and that is certain";
  try {
    const response = await fetch(`/v1/lookups/${TABLE}/by_parent/${encodeURIComponent(parent)}`);
    const answer = await response.json();
    if (!response.ok) instead = answer.message;
    else if (answer.rows.length) return answer.rows.map(({ id, name }) => element("li", `${name} (${id})`));
  } catch {
    instead = "the daemon does not answer";
  }
  return [element("li", instead, { class: "absent" })];
}

at("list").addEventListener("click", () => {
  isListed = true;
  showChildren();
});
at("parent").addEventListener("change", () => isListed && showChildren());

function showButtons(state) {
  const given = state.redis === "given";
  const kind = state.redis === "cluster" ? "cluster" : "one";
  for (const part of document.querySelectorAll("[data-redis]")) part.hidden = part.dataset.redis !== kind;
  for (const button of document.querySelectorAll("button.redis")) {
    button.disabled = given;
    if (given) button.title = "The Redis was given, and is not the demo's to break.";
  }
  at("break-two-tables").disabled = !state.promotions;
}

function side(name, note) {
  if (name === null) return element("td", "–", { class: "absent" });
  const cell = element("td", name);
  if (note) cell.append(element("div", note, { class: "note" }));
  return cell;
}

at("rows").addEventListener("click", async (event) => {
  const button = event.target.closest("button");
  const id = button?.closest("tr").dataset.id;
  if (!id) return;
  if (button.dataset.act === "read") {
    at("read-id").value = id;
    await read(id);
  } else if (button.dataset.act === "invalidate") {
    await operate("invalidate", { table: TABLE, keys: [id] }, told.deleted, button);
  } else {
    await write("delete", { id }, button);
  }
  await look();
});

// ---------------------------------------------------------------------------------------------- rows

async function write(action, body, button) {
  await perform(button, `${action} ${body.id}`, async () => {
    const done = await ask(`/demo/${action}`, body);
    return `in the cache ${millis(done.applied_ms)} after the commit`;
  });
  await look();
}

function submitted(id, act) {
  at(id).addEventListener("submit", (event) => {
    event.preventDefault();
    act(event.submitter ?? event.currentTarget.querySelector("button"));
  });
}

submitted("update", (button) => write("update", { id: at("update-id").value, field: at("update-field").value, value: at("update-value").value }, button));
submitted("add", (button) => write("add", { id: at("add-id").value, name: at("add-name").value, display_order: at("add-order").value }, button));
submitted("read", (button) => busy(button, () => read(at("read-id").value)));
at("prefetch").addEventListener("click", (event) => operate("refetch", { table: TABLE }, told.refetch, event.currentTarget).then(look));
at("clear-all").addEventListener("click", (event) => clear(TABLE, event.currentTarget).then(look));

// ---------------------------------------------------------------------------------------------- reads

const url = (id) => `/v1/tables/${TABLE}/${encodeURIComponent(id)}`;

/// How long Redis took, as the answer says.
const redisMs = (response) => {
  const given = /redis;dur=([0-9.]+)/.exec(response.headers.get("Server-Timing") ?? "");
  return given ? Number(given[1]) : null;
};

function head(node, fields) {
  at("answer-head").replaceChildren(node);
  list(
    "answer-fields",
    fields.map(([name, value]) => {
      const line = element("div");
      const shown = element("dd");
      sayLong(shown, value);
      line.append(element("dt", name), shown);
      return line;
    }),
  );
}

async function read(id) {
  try {
    const response = await fetch(url(id));
    const answer = await response.json();
    const line = element("span");
    const kind = response.ok ? "hit" : response.status === 404 ? "miss" : "error";
    line.append(element("span", response.ok ? "hit" : response.status === 404 ? "miss" : answer.error, { class: `badge ${kind}` }));
    if (response.ok) {
      const ttl = Number(response.headers.get("Prefetchd-TTL-Ms")) / 1000;
      line.append(`Redis ${redisMs(response)} ms, TTL left ${count(Math.round(ttl))} s, as of ${response.headers.get("Prefetchd-LSN")}`);
    } else if (response.status === 404 && redisMs(response) !== null) {
      line.append(`Redis ${redisMs(response)} ms: ${answer.message}, and that is certain. Postgres was not asked.`);
    } else {
      line.append(answer.message);
    }
    head(line, response.ok ? Object.entries(answer) : []);
  } catch {
    head(element("span", "the daemon does not answer", { class: "failed" }), []);
  }
}

at("read-many").addEventListener("click", (event) =>
  busy(event.currentTarget, async () => {
    const id = at("read-id").value;
    const before = status?.primary_reads;
    const began = performance.now();
    let [left, hits, redis] = [READS, 0, 0];
    const worker = async () => {
      while (left > 0) {
        left -= 1;
        const response = await fetch(url(id));
        await response.text();
        hits += response.ok ? 1 : 0;
        redis += redisMs(response) ?? 0;
        // One that is missing is missing 500 times: once is enough to see.
        if (!response.ok) left = 0;
      }
    };
    try {
      await Promise.all(Array.from({ length: READS_AT_ONCE }, worker));
      const took = performance.now() - began;
      const seen = await (await fetch("/v1/status")).json();
      const primary = seen.primary_reads === before ? `still ${count(before)}` : `${count(before)} before, ${count(seen.primary_reads)} now, by a load`;
      head(element("span", `${count(hits)} hits in ${millis(took)}, Redis ${(redis / Math.max(hits, 1)).toFixed(2)} ms each. Reads of the primary: ${primary}.`), []);
    } catch {
      head(element("span", "the daemon does not answer", { class: "failed" }), []);
    }
  }),
);

// ---------------------------------------------------------------------------------------------- counters

let status = null;
let baseline = null;

const counted = (s) => ({
  hits: s.hits,
  misses: s.misses,
  prefetched: s.prefetched,
  applied: s.sync_events_applied,
  lags: s.sync_lag_ms.count,
  primary: s.primary_reads,
});

function showCounters() {
  const now = counted(status);
  // A daemon that was restarted counts from zero.
  if (baseline && now.hits < baseline.hits) baseline = null;
  const since = (name) => now[name] - (baseline?.[name] ?? 0);
  const [hits, misses] = [since("hits"), since("misses")];
  say("count-hits", count(hits));
  say("count-misses", count(misses));
  say("count-rate", percent(hits, hits + misses));
  say("count-prefetched", count(since("prefetched")));
  say("count-applied", count(since("applied")));
  say("count-lag", baseline && since("lags") === 0 ? "–" : millis(status.sync_lag_ms.avg));
  say("count-primary", count(since("primary")));
}

at("reset").addEventListener("click", () => {
  if (!status) return;
  baseline = counted(status);
  say("since", `since ${new Date().toLocaleTimeString("en-GB")}; the daemon's own counters go on`);
  showCounters();
});

// ---------------------------------------------------------------------------------------------- breaking it

const outcome = {
  flushall: (done) => `healed after ${millis(done.healed_ms)}`,
  "restart-redis": (done) => `healed after ${millis(done.healed_ms)}`,
  "fail-over": (done) => `port ${done.new_port} took over from ${done.old_port}; healed after ${millis(done.healed_ms)}`,
  ghost: (done) => `${done.key} is there, and belongs to no row: prefetch again removes it`,
  "kill-replication": (done) => `streaming again, and nothing lost, after ${millis(done.healed_ms)}`,
  burst: (done) => `${count(done.updates)} commits in ${millis(done.written_ms)}, the last in the cache ${millis(done.applied_ms)} later`,
  "two-tables": (done) => `both in the cache ${millis(done.applied_ms)} after the commit; ${count(done.looks)} looks, ${count(done.half)} saw half of it`,
};

for (const [action, text] of Object.entries(outcome)) {
  const button = at(`break-${action}`);
  button.addEventListener("click", () => perform(button, button.textContent, async () => text(await ask(`/demo/${action}`))).then(look));
}

at("own-writes").addEventListener("click", (event) =>
  perform(event.currentTarget, "writes and reads", async () => {
    const { writes, off, on } = await ask("/demo/read-your-writes");
    say("stale-off", `${off.stale} of ${writes}`);
    say("stale-on", `${on.stale} of ${writes}`);
    say("time-off", millis(off.read_ms));
    say("time-on", millis(on.read_ms));
    return "done";
  }),
);

on("status", (now) => {
  status = now;
  showCounters();
  look();
});
on("change", (change) => {
  if (change.table !== TABLE) return;
  look();
  if (isListed) showChildren();
});

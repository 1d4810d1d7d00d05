// The status page. It shows what the event stream brings, says how old that is, and asks for the operations.
//
// Everything from elsewhere goes in as text, never as markup: names, keys and values were chosen by somebody else.

const SPAN_SECONDS = 300;
const SHORTEST_SPAN_SECONDS = 60;
const CHANGES_SHOWN = 50;
/// The daemon says its status once a second: silence for longer is a broken stream, whatever the browser believes.
const SILENCE_MS = 3500;
const RETRY_MS = 2000;

export const at = (id) => document.getElementById(id);

/// Writes only what is new: a screen reader speaks of nothing else, and a selection stays.
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

export const count = (n) => (n === null || n === undefined ? "–" : n.toLocaleString("en"));
export const millis = (ms) =>
  ms === null || ms === undefined ? "–" : ms >= 10000 ? `${(ms / 1000).toFixed(1)} s` : ms >= 100 ? `${ms.toFixed(0)} ms` : `${ms.toFixed(1)} ms`;
const percent = (hits, misses) => (hits + misses > 0 ? `${((hits * 100) / (hits + misses)).toFixed(1)} %` : "–");

function bytes(n) {
  if (n === null || n === undefined) return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (n >= 1000 && unit < units.length - 1) {
    n /= 1000;
    unit += 1;
  }
  return `${unit === 0 ? n : n.toFixed(1)} ${units[unit]}`;
}

function ago(time) {
  if (!time) return "–";
  const seconds = Math.max(0, (Date.now() - Date.parse(time)) / 1000);
  if (seconds < 60) return "just now";
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  if (seconds < 172800) return `${Math.round(seconds / 3600)} h ago`;
  return `${Math.round(seconds / 86400)} days ago`;
}

// ---------------------------------------------------------------------------------------------- how it is

/// The daemon's own verdict, and the class that shows it.
const KINDS = { good: "good", warning: "busy", bad: "bad" };

let history = [];
/// Lags of the changes that came since the last status.
let lags = [];
let last = null;
const openedAt = performance.now();
let heardAt = null;
const watchers = { status: [], change: [] };

/// For the demo's part: called with every status, or with every change.
export const onStatus = (call) => {
  watchers.status.push(call);
  if (last) call(last);
};
export const onChange = (call) => watchers.change.push(call);

/// What the person who looks is to know first; the tab says it as well.
function judge(kind, sentence, advice) {
  at("verdict").className = `verdict ${kind}`;
  say("sentence", sentence);
  say("advice", advice);
  const mark = { good: "", busy: "… ", bad: "✗ " }[kind];
  document.title = `${mark}prefetchd ${last?.source.database ?? ""}`.trim();
}

function show(status) {
  const now = performance.now() / 1000;
  const before = history.at(-1);
  const applied = status.sync_events_applied;
  // A daemon that was restarted counts from zero.
  const rate = before && applied >= before.applied && now > before.at ? (applied - before.applied) / (now - before.at) : 0;
  history.push({ at: now, applied, rate, lags, p50: percentile(50, lags), p99: percentile(99, lags), bytes: status.lag.bytes });
  lags = [];
  history = history.filter((point) => point.at > now - SPAN_SECONDS);

  judge(KINDS[status.verdict.level] ?? "bad", status.verdict.text, status.verdict.remedy);
  const reasons = status.not_ready_because.filter((reason) => !status.verdict.text.includes(reason));
  list("reasons", reasons.map((reason) => element("li", reason)));

  say("version", status.version);
  say("source", `${status.source.database ?? "?"} · slot ${status.source.slot ?? "?"} · up ${uptime(status.uptime_seconds)}`);
  say("lag", status.lag.seconds === null ? "–" : `${status.lag.seconds.toFixed(1)} s`);
  say("lag-bytes", `${bytes(status.lag.bytes)} behind Postgres`);
  // Of the changes that the plot shows.
  const shown = history.flatMap((point) => point.lags);
  say("p50", millis(percentile(50, shown)));
  say("p99", shown.length ? `p50; p99 ${millis(percentile(99, shown))}, ${count(shown.length)} changes in ${span()}` : `no change in ${span()}`);
  say("rate", rate.toFixed(rate < 10 ? 1 : 0));
  say("applied-total", `${count(applied)} in all`);
  say("hit-rate", status.hit_rate_pct === null ? "–" : `${status.hit_rate_pct.toFixed(1)} %`);
  say("hits", `${count(status.hits)} hits, ${count(status.misses)} misses`);
  say("primary-reads", count(status.primary_reads));
  say("slot", bytes(status.slot.retained_bytes));
  const limit = status.slot.limit_bytes;
  at("slot-meter").hidden = !limit;
  if (limit) at("slot-meter").value = status.slot.retained_bytes / limit;
  say("slot-limit", limit ? `of ${bytes(limit)}` : "without limit");
  say("dead", count(status.dead_letters));
  say("dead-where", status.dead_letters ? `XRANGE prefetchd:{${status.source.slot}}:dead - +` : "");
  for (const point of ["server", "received", "applied", "confirmed"]) say(`lsn-${point}`, status.lsn[point] ?? "–");
  const load = status.last_load;
  say("last-load", load ? `Last load: ${count(load.rows)} rows in ${millis(load.elapsed_ms)} at ${load.lsn}, ${load.reason}.` : "");
  const check = status.last_verify;
  say(
    "last-verify",
    !check ? "Never verified." : check.rows === null ? `Last verify: ${ago(check.at)}.` : `Last verify: ${ago(check.at)}, ${count(check.rows)} rows, ${found(check)}.`,
  );
  showNodes(status.nodes);
  showTables(status);
  at("pause").hidden = status.paused;
  at("resume").hidden = !status.paused;
  plots();
}

/// How long the plots reach back.
function span() {
  const seconds = Math.max(SHORTEST_SPAN_SECONDS, history.at(-1).at - history[0].at);
  return `the last ${seconds < 120 ? `${Math.round(seconds)} s` : `${Math.round(seconds / 60)} min`}`;
}

/// `null` where nothing changed. The smallest that so many of a hundred do not exceed.
function percentile(percent, lags) {
  const sorted = lags.toSorted((a, b) => a - b);
  return sorted[Math.ceil((sorted.length * percent) / 100) - 1] ?? null;
}

function found({ missing, stale, orphaned, lookups = 0, repaired }) {
  if (missing + stale + orphaned + lookups === 0) return "no drift";
  const members = lookups > 0 ? `, ${count(lookups)} members of lookups` : "";
  return `${count(missing)} missing, ${count(stale)} stale, ${count(orphaned)} orphaned${members}, ${count(repaired)} repaired`;
}

function uptime(seconds) {
  if (seconds < 120) return `${Math.floor(seconds)} s`;
  if (seconds < 7200) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.floor(seconds / 3600)} h`;
  return `${Math.floor(seconds / 86400)} days`;
}

/// When a verify last ended, and what it left.
function checked(table) {
  const at = table.checked_at ?? table.verified_at;
  if (!at) return "never";
  return table.drift ? `${ago(at)}: ${count(table.drift)} differ` : ago(at);
}

/// Replaces the children where they say something else.
export function list(id, nodes) {
  const parent = at(id);
  const same = parent.children.length === nodes.length && nodes.every((node, i) => node.isEqualNode(parent.children[i]));
  if (!same) parent.replaceChildren(...nodes);
}

/// A row of a table, which is a card on a narrow screen: a heading, and cells of a label, a text and perhaps a class.
function tableRow(name, cells, attributes = {}) {
  const row = element("tr");
  row.append(
    element("th", name, { scope: "row", ...attributes }),
    ...cells.map(([label, text, kind]) => element("td", text, { "data-label": label, ...(kind ? { class: kind } : {}) })),
  );
  return row;
}

function nodeState(node) {
  if (node.trouble) return [node.trouble, "note trouble"];
  if (node.up === false) return ["down", "note"];
  if (node.healing) return [`healing ${count(node.healing)} of ${count(node.lanes)}`, "note"];
  return [node.up ? "up" : "not asked yet"];
}

function memory(node) {
  const most = node.max_memory_bytes === 0 ? ", no limit" : node.max_memory_bytes ? ` of ${bytes(node.max_memory_bytes)}` : "";
  const evicted = node.evicted_keys ? `, ${count(node.evicted_keys)} keys evicted` : "";
  return `${bytes(node.used_memory_bytes)}${most}${evicted}`;
}

function showNodes(nodes) {
  at("nodes-section").hidden = nodes.length === 0;
  const rows = nodes.map((node) =>
    tableRow(node.node, [
      ["State", ...nodeState(node)],
      ["Hash slots", count(node.hash_slots), "number"],
      ["With rows", count(node.lanes), "number"],
      ["Position", node.lsn ?? "–"],
      ["Behind", bytes(node.behind_bytes), "number"],
      ["Memory", memory(node)],
      ["Answered", node.answered_seconds_ago === null ? "–" : `${node.answered_seconds_ago.toFixed(0)} s ago`],
    ]),
  );
  list("nodes", rows);
}

function showTables(status) {
  const rows = status.tables.map((table) => {
    const loading = table.loading ? `${table.state} ${count(table.loading.rows)} of ${count(table.loading.estimated)}` : (table.state ?? "not known");
    const cells = [
      ["State", loading],
      ["Rows", count(table.rows), "number"],
      ["Hits", count(table.hits), "number"],
      ["Misses", count(table.misses), "number"],
      ["Hit rate", percent(table.hits, table.misses), "number"],
      ["Changes", count(table.upserts + table.deletes + table.truncates), "number"],
      ["Last load", ago(table.compared_at)],
      ["Last verify", checked(table)],
    ];
    return tableRow(table.name, cells, { title: table.table });
  });
  list("tables", rows);
  const names = status.tables.map((table) => table.name);
  options(at("which"), ["", ...names], ["all", ...names]);
  for (const select of document.querySelectorAll("select.which-one")) options(select, names, names);
}

/// Keeps what is chosen.
export function options(select, values, texts) {
  if (select.options.length === values.length && values.every((value, i) => select.options[i].value === value)) return;
  const chosen = select.value;
  select.replaceChildren(...values.map((value, i) => element("option", texts[i], { value })));
  if (values.includes(chosen)) select.value = chosen;
}

// ---------------------------------------------------------------------------------------------- the plots

function plots() {
  say("span", `T${span().slice(1)}.`);
  plot("plot-lag", [["p50", (p) => p.p50], ["p99", (p) => p.p99]], millis, "Milliseconds from commit to cache, of each second's changes");
  plot("plot-bytes", [["bytes", (p) => p.bytes]], bytes, "Bytes behind Postgres");
  plot("plot-rate", [["rate", (p) => p.rate]], (n) => n.toFixed(0), "Changes a second");
}

function plot(id, lines, shown, label) {
  const svg = at(id);
  const values = history.flatMap((point) => lines.map(([, of]) => of(point))).filter((value) => value !== null);
  const top = Math.max(...values, 0);
  const scale = top > 0 ? top : 1;
  const end = history.at(-1).at;
  const span = Math.max(SHORTEST_SPAN_SECONDS, end - history[0].at);
  svg.replaceChildren(
    ...lines.map(([name, of]) => {
      let path = "";
      let drawing = false;
      for (const point of history) {
        const value = of(point);
        if (value === null) {
          drawing = false;
          continue;
        }
        const x = 300 - ((end - point.at) * 300) / span;
        const y = 78 - (value * 74) / scale;
        // One that stands alone is a dot.
        path += drawing ? `L${x.toFixed(1)} ${y.toFixed(1)}` : `M${x.toFixed(1)} ${y.toFixed(1)}h0.01`;
        drawing = true;
      }
      const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
      line.setAttribute("class", name);
      line.setAttribute("d", path);
      return line;
    }),
  );
  const text = values.length ? `highest ${shown(top)}` : "none yet";
  say(`${id}-top`, text);
  svg.setAttribute("aria-label", `${label}, over the last minutes: ${text}`);
}

// ---------------------------------------------------------------------------------------------- changes

function showChange(node) {
  at("no-changes").hidden = true;
  at("changes").prepend(node);
  while (at("changes").children.length > CHANGES_SHOWN) at("changes").lastElementChild.remove();
}

function changed(change) {
  const item = element("li", "", { class: "fresh" });
  const time = change.time ? new Date(change.time).toLocaleTimeString("en-GB") : "–";
  item.append(element("span", time, { class: "quiet" }), element("span", change.op, { class: change.op }), element("span", change.key || change.table), element("span", millis(change.lag_ms), { class: "quiet" }));
  showChange(item);
}

// ---------------------------------------------------------------------------------------------- the stream

function listen() {
  const stream = new EventSource("/v1/events");
  stream.addEventListener("status", (event) => {
    last = JSON.parse(event.data);
    heardAt = performance.now();
    show(last);
    age();
    watchers.status.forEach((call) => call(last));
  });
  stream.addEventListener("change", (event) => {
    const change = JSON.parse(event.data);
    lags.push(change.lag_ms);
    changed(change);
    watchers.change.forEach((call) => call(change));
  });
  stream.addEventListener("more", (event) => showChange(element("li", `… and ${count(JSON.parse(event.data).more)} more`)));
  stream.addEventListener("error", () => {
    broken = true;
    age();
    // The browser tries again by itself, but not where it was refused.
    if (stream.readyState === EventSource.CLOSED) setTimeout(listen, RETRY_MS);
  });
  stream.addEventListener("open", () => {
    broken = false;
  });
}

let broken = false;

/// What the daemon cannot say itself: that it says nothing. Whatever it said before is old.
function lost(silent) {
  const since = silent < 1000 ? "" : ` for ${Math.round(silent / 1000)} s`;
  const old = heardAt === null ? "" : "; the figures below are of the time before";
  const advice = `See that the daemon runs: prefetchd status, or its log. How it is now is not known${old}.`;
  judge("bad", `The daemon has not answered${since}.`, advice);
  list("reasons", []);
}

/// How far what is shown can be believed.
function age() {
  const silent = performance.now() - (heardAt ?? openedAt);
  const isLost = broken || silent > SILENCE_MS;
  document.body.classList.toggle("stale", isLost);
  if (isLost) lost(silent);
  at("link").className = `link ${isLost ? "lost" : heardAt === null ? "" : "live"}`;
  if (!isLost) say("link", heardAt === null ? "connecting …" : "live");
  else if (heardAt === null) say("link", "The daemon does not answer; trying again …");
  else say("link", `Connection lost, data from ${Math.round(silent / 1000)} s ago; trying again …`);
}

// ---------------------------------------------------------------------------------------------- asking for something

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

function result(text, failed) {
  const time = new Date().toLocaleTimeString("en-GB");
  at("results").prepend(element("li", `${time}  ${text}`, failed ? { class: "failed" } : {}));
  while (at("results").children.length > 10) at("results").lastElementChild.remove();
}

/// One at a time for each button: it is disabled until the answer is there.
export async function busy(button, act) {
  button.disabled = true;
  button.setAttribute("aria-busy", "true");
  try {
    return await act();
  } finally {
    button.removeAttribute("aria-busy");
    button.disabled = false;
  }
}

/// Asks, and shows what came of it.
export async function operate(name, body, told, button) {
  await busy(button, async () => {
    const what = body.table ? `${name} ${body.table}` : name;
    try {
      result(`${what}: ${told(await ask(`/v1/admin/${name}`, body))}`);
    } catch (error) {
      result(`${what}: ${error.message}`, true);
    }
  });
}

export const told = {
  refetch: (done) => `${count(done.loaded)} rows loaded in ${millis(done.elapsed_ms)}: ${count(done.repaired)} repaired, ${count(done.removed)} orphans removed`,
  verify: (done) => `${count(done.rows)} rows, ${count(done.keys)} keys: ${found(done)}`,
  deleted: (done) => `${count(done.deleted)} keys removed from the cache`,
};

export async function clear(table, button) {
  const text = `Every key of ${table} is removed from the cache. Readers get 503 until you refetch: nothing heals this by itself before the next verify.`;
  const confirmed = await confirm({ title: `Clear ${table}?`, text, ask: `Type the table's name, ${table}`, expect: table, yes: "Clear" });
  if (confirmed !== null) await operate("clear", { table, confirm: confirmed }, told.deleted, button);
}

function wire() {
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
}

wire();
keepToken(keptToken());
takeToken();
// Pasted into a tab that shows the page already.
window.addEventListener("hashchange", takeToken);
listen();
setInterval(age, 500);

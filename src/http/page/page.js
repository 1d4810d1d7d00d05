// The status page: passes on what the event stream brings, and says when it brings nothing.

import { at, element, say, sayLong } from "./elements.js";
import "./history.js";
import { showOperations } from "./operations.js";
import { hasBegun, listen, on, revive, silence } from "./stream.js";
import { showNodes, showTables } from "./tables.js";
import { showSilence, showVerdict } from "./verdict.js";
import { ago, bytes, clock, count, found, millis, uptime } from "./words.js";

const CHANGES_SHOWN = 50;

function show(status) {
  showVerdict(status);
  say("version", status.version);
  say("source", `${status.source.database ?? "?"} · slot ${status.source.slot ?? "?"} · ${location.host} · up ${uptime(status.uptime_seconds)}`);
  say("primary-reads", count(status.primary_reads));
  showSlot(status.slot);
  say("dead", count(status.dead_letters));
  sayLong("dead-where", status.dead_letters ? `XRANGE prefetchd:{${status.source.slot}}:dead - +` : "rows that Redis cannot hold");
  for (const point of ["server", "received", "applied", "confirmed"]) say(`lsn-${point}`, status.lsn[point] ?? "–");
  const load = status.last_load;
  say("last-load", load ? `Last load: ${count(load.rows)} rows in ${millis(load.elapsed_ms)} at ${load.lsn}, ${load.reason}.` : "");
  say("last-verify", verified(status.last_verify));
  showNodes(status.nodes);
  showTables(status);
  showOperations(status);
}

function showSlot({ retained_bytes: kept, limit_bytes: limit }) {
  say("slot", bytes(kept));
  at("slot-meter").hidden = !limit;
  if (limit) at("slot-meter").value = kept / limit;
  say("slot-limit", limit ? `of ${bytes(limit)}` : "without limit");
}

function verified(check) {
  if (!check) return "Never verified.";
  return check.rows === null ? `Last verify: ${ago(check.at)}.` : `Last verify: ${ago(check.at)}, ${count(check.rows)} rows, ${found(check)}.`;
}

// ---------------------------------------------------------------------------------------------- changes

function showChange(node) {
  at("no-changes").hidden = true;
  at("changes").hidden = false;
  at("changes").prepend(node);
  while (at("changes").children.length > CHANGES_SHOWN) at("changes").lastElementChild.remove();
}

function changed(change) {
  const item = element("li", "", { class: "fresh" });
  const key = element("span");
  sayLong(key, change.key || change.table);
  item.append(
    element("span", change.time ? clock(change.time) : "–", { class: "quiet" }),
    element("span", change.op, { class: change.op }),
    key,
    element("span", millis(change.lag_ms), { class: "quiet" }),
  );
  showChange(item);
}

// ---------------------------------------------------------------------------------------------- how old it is

function age() {
  const silent = silence();
  document.body.classList.toggle("stale", silent !== null);
  at("link").className = `link ${silent ? "lost" : hasBegun() ? "live" : ""}`;
  if (silent) {
    showSilence(silent);
    const since = `no answer for ${Math.round(silent.ms / 1000)} s`;
    say("link", silent.isFirst ? `${since}, trying again` : `${since}, all of this is old`);
    revive();
  } else {
    say("link", hasBegun() ? "live" : "connecting …");
  }
}

on("status", (status) => {
  show(status);
  age();
});
on("change", changed);
on("more", ({ more }) => showChange(element("li", `… and ${count(more)} more`)));
listen();
setInterval(age, 500);

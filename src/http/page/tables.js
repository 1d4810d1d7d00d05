// The tables, in any number: those in trouble first, or by a column, and only those that are looked for. A cell is
// written when it says something else; a row is moved only where its order is another, and not under somebody's hands.

import { at, element, list, say, sayLong } from "./elements.js";
import { STATES, ago, bytes, count, percent, several, states } from "./words.js";

/// Heading, text, and what it is sorted by: numbers begin with the largest.
const COLUMNS = [
  ["Table", (t) => t.name, (t) => t.name],
  ["State", state, trouble],
  ["Rows", (t) => count(t.rows), (t) => t.rows ?? -1],
  ["HTTP hits", (t) => count(t.hits), (t) => t.hits],
  ["HTTP misses", (t) => count(t.misses), (t) => t.misses],
  ["HTTP hit rate", (t) => percent(t.hits, t.hits + t.misses), (t) => (t.hits + t.misses ? t.hits / (t.hits + t.misses) : -1)],
  ["Changes", (t) => count(changes(t)), changes],
  ["Last load", (t) => ago(t.compared_at), (t) => Date.parse(t.compared_at ?? 0)],
  ["Last verify", checked, (t) => Date.parse(t.checked_at ?? t.verified_at ?? 0)],
];
const NAME = 0;
const STATE = 1;
const FIRST_TIME = 7;
/// Those go up on the first click, others down.
const ASCENDING = [NAME, STATE];

function changes(table) {
  return table.upserts + table.deletes + table.truncates;
}

/// The worst is the least.
function trouble(table) {
  if (table.state === "loaded" && (table.drift > 0 || table.dead_letters > 0 || table.not_compared)) return STATES.length - 1.5;
  const place = STATES.indexOf(table.state);
  return place < 0 ? 0 : place;
}

const isWell = (table) => trouble(table) === STATES.length - 1;

/// When a verify last ended, and what it left.
function checked(table) {
  const time = table.checked_at ?? table.verified_at;
  if (!time) return "never";
  return table.drift ? `${ago(time)}: ${count(table.drift)} differ` : ago(time);
}

function state(table) {
  const words = [table.state ?? "not known"];
  if (table.loading) words.push(` ${count(table.loading.rows)} of ${count(table.loading.estimated)}`);
  if (table.because) words.push(`: ${table.because}`);
  if (table.remedy) words.push(`. To do: ${table.remedy}`);
  if (table.drift > 0) words.push(`, ${several(table.drift, "key")} differ${table.drift === 1 ? "s" : ""}`);
  if (table.dead_letters > 0) words.push(`, ${several(table.dead_letters, "dead letter")}`);
  if (table.not_compared) words.push(`, not compared: ${table.not_compared}`);
  return words.join("");
}

// ---------------------------------------------------------------------------------------------- order

let tables = [];
let sort = { column: STATE, factor: 1 };
/// By name: the table's row, and its cells.
const rows = new Map();

function order() {
  const key = COLUMNS[sort.column][2];
  const compared = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
  return tables.toSorted((a, b) => sort.factor * compared(key(a), key(b)) || compared(a.name, b.name));
}

/// The order in which the rows are shown; new figures alone do not change it while somebody reads.
function arrange(isWanted) {
  const place = at("tables-scroll");
  const isRead = place.scrollTop > 0 || place.matches(":hover, :focus-within");
  if (isRead && !isWanted && sort.column !== STATE) return;
  const focused = document.activeElement;
  let next = at("tables").firstElementChild;
  for (const { name } of order()) {
    const { row } = rows.get(name);
    if (row === next) next = next.nextElementSibling;
    else at("tables").insertBefore(row, next);
  }
  // A row that is moved loses it.
  if (focused !== document.activeElement && at("tables").contains(focused)) focused.focus({ preventScroll: true });
}

function sortBy(column) {
  sort = { column, factor: column === sort.column ? -sort.factor : ASCENDING.includes(column) ? 1 : -1 };
  showSort();
  at("tables-scroll").scrollTop = 0;
  arrange(true);
}

function showSort() {
  headings.forEach((heading, i) => {
    if (i === sort.column) heading.ariaSort = sort.factor > 0 ? "ascending" : "descending";
    else heading.removeAttribute("aria-sort");
  });
  at("sort").value = sort.column;
}

const headings = COLUMNS.map(([text], i) => {
  const heading = element("th", "", { scope: "col", role: "columnheader" });
  const button = element("button", text, { type: "button", class: "sort" });
  button.addEventListener("click", () => sortBy(i));
  if (i > STATE && i < FIRST_TIME) heading.className = "number";
  heading.append(button);
  return heading;
});
at("headings").append(...headings);
// Where there is no room for headings.
at("sort").append(...COLUMNS.map(([text], i) => element("option", i === STATE ? "State, the worst first" : text, { value: i })));
at("sort").addEventListener("change", () => {
  sort.column = -1;
  sortBy(Number(at("sort").value));
});
showSort();

// ---------------------------------------------------------------------------------------------- rows

function makeRow(name) {
  const row = element("tr", "", { role: "row" });
  const cells = COLUMNS.map(([label], i) => {
    const kind = i > STATE && i < FIRST_TIME ? "number" : "";
    return i === NAME
      ? element("th", name, { scope: "row", role: "rowheader" })
      : element("td", "", { role: "cell", "data-label": label, ...(kind ? { class: kind } : {}) });
  });
  row.append(...cells);
  rows.set(name, { row, cells });
  return rows.get(name);
}

export function showTables(status) {
  const isOther = tables.length !== status.tables.length || tables.some((table, i) => table.name !== status.tables[i].name);
  tables = status.tables;
  if (isOther) forget();
  for (const table of tables) {
    const { row, cells } = rows.get(table.name) ?? makeRow(table.name);
    if (cells[NAME].title !== table.table) cells[NAME].title = table.table;
    COLUMNS.forEach(([, text], i) => (i === STATE ? sayLong(cells[i], text(table)) : say(cells[i], text(table))));
    row.classList.toggle("trouble", !isWell(table));
    row.classList.toggle("blocked", table.state === "blocked");
  }
  arrange(isOther);
  filter();
}

function forget() {
  const names = new Set(tables.map((table) => table.name));
  for (const [name, { row }] of rows) {
    if (names.has(name)) continue;
    row.remove();
    rows.delete(name);
  }
}

/// Shows the rows whose name or state contains what was typed.
function filter() {
  const wanted = at("filter").value.trim().toLowerCase();
  let shown = 0;
  for (const table of tables) {
    const isShown = [table.name, table.table, state(table)].some((text) => text.toLowerCase().includes(wanted));
    const { row } = rows.get(table.name);
    if (row.hidden === isShown) row.hidden = !isShown;
    shown += isShown;
  }
  say("tables-count", `${several(tables.length, "table")}: ${states(tables)}.`);
  say("filtered", wanted ? `${count(shown)} shown` : "");
}
at("filter").addEventListener("input", () => {
  at("tables-scroll").scrollTop = 0;
  filter();
});

// ---------------------------------------------------------------------------------------------- nodes of a cluster

/// A row, which is a card on a narrow screen: a heading, and cells of a label, a text and perhaps a class.
function nodeRow(name, cells) {
  const row = element("tr", "", { role: "row" });
  row.append(
    element("th", name, { scope: "row", role: "rowheader" }),
    ...cells.map(([label, text, kind]) => element("td", text, { role: "cell", "data-label": label, ...(kind ? { class: kind } : {}) })),
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

export function showNodes(nodes) {
  at("nodes-section").hidden = nodes.length === 0;
  const made = nodes.map((node) =>
    nodeRow(node.node, [
      ["State", ...nodeState(node)],
      ["Hash slots", count(node.hash_slots), "number"],
      ["With rows", count(node.lanes), "number"],
      ["Position", node.lsn ?? "–"],
      ["Behind", bytes(node.behind_bytes), "number"],
      ["Memory", memory(node)],
      ["Answered", node.answered_seconds_ago === null ? "–" : `${node.answered_seconds_ago.toFixed(0)} s ago`],
    ]),
  );
  list("nodes", made);
}

// Draws what happened in each second of the last 15 minutes. Where something is not known, the line has a gap.

export const SPAN_SECONDS = 900;
const TICK_SECONDS = 300;
/// A label nearer to an edge than this, in percent, would be cut.
const EDGE = 5;
const SVG = "http://www.w3.org/2000/svg";

function part(tag, attributes, parent) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  parent.append(node);
  return node;
}

function span(kind, parent) {
  const node = document.createElement("span");
  node.className = kind;
  parent.append(node);
  return node;
}

/// Makes a plot in this element. `names` are the classes of its lines; `least` is the least that the axis shows; `tick`
/// and `shown` write a value at the axis, and in the summary. Returns what draws it.
export function plot(place, { title, names, least, tick, shown }) {
  const values = span("values", place);
  const marks = [1, 0.5, 0].map(() => span("", values));
  const svg = part("svg", { role: "img", "aria-label": `${title}: nothing is known`, viewBox: `0 0 ${SPAN_SECONDS} 100`, preserveAspectRatio: "none" }, place);
  part("path", { class: "grid", d: `M0 0H${SPAN_SECONDS}M0 50H${SPAN_SECONDS}` }, svg);
  const ticks = part("path", { class: "grid" }, svg);
  // The first one lies above the others.
  const lines = names.toReversed().map((name) => part("path", { class: `line ${name}` }, svg)).reverse();
  const times = span("times", place);
  // The summary says the same.
  values.ariaHidden = times.ariaHidden = true;

  /// `from` is the time of the first value, in seconds; each series belongs to a name.
  return (from, series) => {
    const start = from + series[0].length - SPAN_SECONDS;
    const top = roundUp(Math.max(least, ...series.flat()));
    [top, top / 2, 0].forEach((value, i) => write(marks[i], tick(value)));
    lines.forEach((line, i) => line.setAttribute("d", path(series[i], from - start, top)));
    showTimes(times, ticks, start);
    const summary = names.map((name, i) => `${name} ${highest(series[i], from, shown)}`).join("; ");
    svg.setAttribute("aria-label", `${title}, ${minute(start)} to ${minute(start + SPAN_SECONDS)}: ${summary}`);
  };
}

function write(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/// The least of 1, 2, 4, 10, 20, 40 … that is not less: its half is round as well.
function roundUp(value) {
  const unit = 10 ** Math.floor(Math.log10(value));
  return unit * [1, 2, 4, 10].find((factor) => factor * unit >= value);
}

function path(values, offset, top) {
  let text = "";
  let drawing = false;
  values.forEach((value, i) => {
    if (value === null) {
      drawing = false;
      return;
    }
    // In the middle of a level stretch.
    if (drawing && value === values[i - 1] && value === values[i + 1]) return;
    const place = `${offset + i} ${(100 - (value * 100) / top).toFixed(1)}`;
    // One that stands alone is a dot.
    text += drawing ? `L${place}` : `M${place}h0.01`;
    drawing = true;
  });
  return text;
}

const minute = (second) => new Date(second * 1000).toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" });

function showTimes(times, grid, start) {
  const first = Math.ceil(start / TICK_SECONDS) * TICK_SECONDS;
  let lines = "";
  for (let i = 0; i < SPAN_SECONDS / TICK_SECONDS; i++) {
    const at = first + i * TICK_SECONDS;
    const label = times.children[i] ?? span("", times);
    const percent = ((at - start) * 100) / SPAN_SECONDS;
    write(label, minute(at));
    label.style.left = `${percent.toFixed(2)}%`;
    label.hidden = percent < EDGE || percent > 100 - EDGE;
    lines += `M${at - start} 0V100`;
  }
  grid.setAttribute("d", lines);
}

function highest(values, from, shown) {
  const known = values.filter((value) => value !== null);
  if (known.length === 0) return "none";
  const most = Math.max(...known);
  if (most === 0) return `always ${shown(0)}`;
  return `highest ${shown(most)} at ${new Date((from + values.indexOf(most)) * 1000).toLocaleTimeString("en-GB")}`;
}

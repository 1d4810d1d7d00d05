// The daemon's event stream, and how long it has been silent: silence is what the daemon cannot report itself.

const RETRY_MS = 2000;
/// The daemon reports its status once a second. A longer silence is a broken stream, whatever the browser believes.
const SILENCE_MS = 3500;
/// A connection that has been silent for so long is given up for a new one: its other end may be gone.
const HOPELESS_MS = 15000;

const calls = new Map();
const newest = new Map();
const openedAt = performance.now();
let heardAt = null;
let triedAt = openedAt;
let isBroken = false;
let stream = null;

/// Calls this with what each event of this name says, and at once with the newest status if there is one.
export function on(event, call) {
  if (!calls.has(event)) {
    calls.set(event, []);
    if (stream) subscribe(event);
  }
  calls.get(event).push(call);
  if (event === "status" && newest.has(event)) call(newest.get(event));
}

/// Returns `null` unless the daemon is silent: else for how long, and whether it has ever said anything.
export function silence() {
  const ms = performance.now() - (heardAt ?? openedAt);
  return isBroken || ms > SILENCE_MS ? { ms, isFirst: heardAt === null } : null;
}

export const hasBegun = () => heardAt !== null;

function subscribe(event) {
  stream.addEventListener(event, ({ data }) => {
    const told = JSON.parse(data);
    newest.set(event, told);
    if (event === "status") heardAt = performance.now();
    calls.get(event).forEach((call) => call(told));
  });
}

export function listen() {
  triedAt = performance.now();
  stream = new EventSource("/v1/events");
  const ours = stream;
  for (const event of calls.keys()) subscribe(event);
  stream.addEventListener("open", () => (isBroken = false));
  stream.addEventListener("error", () => {
    isBroken = true;
    // The browser tries again by itself, but not where it was refused.
    if (ours.readyState === EventSource.CLOSED) setTimeout(() => ours === stream && listen(), RETRY_MS);
  });
}

/// Gives up a connection that says nothing. To be called now and then.
export function revive() {
  if (performance.now() - Math.max(heardAt ?? openedAt, triedAt) < HOPELESS_MS) return;
  stream.close();
  listen();
}

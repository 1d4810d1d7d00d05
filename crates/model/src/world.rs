//! One schedule: two daemons, a Postgres, a cluster, what may happen to them, and in which order.

use crate::cluster::{Call, Cluster, Mark, NODES, RECORD, Reply, Write};
use crate::observer::Observer;
use crate::postgres::{LANES, Postgres, TABLES};
use crate::rng::Rng;
use crate::rules::Rules;
use crate::session::Session;

const DAEMONS: usize = 2;
/// Steps with commits and faults, and steps after the last of them in which everything must become whole.
const STEPS: usize = 2500;
const SETTLE: usize = 20_000;
/// Kinds of faults.
const KINDS: usize = 12;
/// Of this many steps, this many with faults.
const BURST: (usize, usize) = (800, 150);

/// The state that everything acts on.
pub struct Env {
    pub rng: Rng,
    pub rules: Rules,
    pub pg: Postgres,
    pub cluster: Cluster,
    pub observer: Observer,
    /// Writes in flight. Those of a session that has ended may still arrive.
    pub late: Vec<Call>,
    /// The shape of each table in the catalog.
    pub shape: [u32; TABLES],
    ids: u32,
    trace: bool,
    pub step: usize,
    /// Of all that has happened: the same seed must yield the same digest.
    digest: u64,
}

pub struct World {
    env: Env,
    sessions: [Option<Session>; DAEMONS],
    /// The marks that a daemon has read so far for its takeover, in order.
    reading: [Vec<Option<Mark>>; DAEMONS],
    /// Per thousand steps.
    fault_rate: usize,
    commit_rate: usize,
    /// The kinds of faults in this schedule: a few kinds together reach states that all of them seldom reach.
    kinds: usize,
    /// Faults come in bursts, with time in between in which everything may become whole.
    bursts: bool,
    faults: usize,
}

pub struct Outcome {
    pub digest: u64,
    pub faults: usize,
    pub settled_after: usize,
    pub violation: Option<String>,
}

impl Env {
    pub fn id(&mut self) -> u32 {
        self.ids += 1;
        self.ids
    }

    pub fn say(&self, text: impl FnOnce() -> String) {
        if self.trace {
            println!("{:>5} {}", self.step, text());
        }
    }

    fn note(&mut self, what: u64) {
        self.digest = (self.digest ^ what).wrapping_mul(0x0100_0000_01b3);
    }

    pub fn serve(&mut self, call: &Call) -> Reply {
        let reply = self.cluster.serve(call, self.rules.on(crate::rules::Rule::Cas));
        self.say(|| match &call.write {
            Write::Lane(mark, ops) => {
                format!("daemon {} lane {}: {mark:?} {ops:?} -> {reply:?}", call.daemon, call.place)
            }
            Write::Record(record) => format!("daemon {} record: {record:?} -> {reply:?}", call.daemon),
        });
        let nonce = match &call.write {
            Write::Lane(mark, _) => mark.nonce,
            Write::Record(record) => record.nonce,
        };
        self.note((nonce as u64) << 8 | (call.place as u64) << 4 | (reply == Reply::Done) as u64);
        if let (Reply::Done, Write::Record(record)) = (reply, &call.write) {
            self.observer.recorded(record);
        }
        self.check();
        reply
    }

    fn check(&mut self) {
        self.cluster.settle();
        let Env { observer, cluster, pg, .. } = self;
        observer.check(cluster, pg);
    }
}

impl World {
    fn new(seed: u64, rules: Rules, trace: bool) -> Self {
        let mut rng = Rng::new(seed);
        let cluster = Cluster::new(&mut rng);
        let mut pg = Postgres::default();
        (0..rng.below(6)).for_each(|_| {
            pg.commit(&mut rng);
        });
        pg.invisible.clear();
        (pg.confirmed, pg.durable) = (pg.end(), pg.end());
        let mut env = Env {
            rng,
            rules,
            observer: Observer::new(pg.confirmed),
            pg,
            cluster,
            late: Vec::new(),
            shape: [1; TABLES],
            ids: 0,
            trace,
            step: 0,
            digest: 0,
        };
        let (fault_rate, commit_rate) = ([1, 2, 4, 8][env.rng.below(4)], [2, 10, 20, 40][env.rng.below(4)]);
        let (bursts, kinds) = (env.rng.one_in(2), 1 + env.rng.below((1 << KINDS) - 1));
        World {
            env,
            sessions: [const { None }; DAEMONS],
            reading: Default::default(),
            fault_rate,
            commit_rate,
            bursts,
            kinds,
            faults: 0,
        }
    }

    fn fault(&mut self) {
        let env = &mut self.env;
        let rng = &mut env.rng;
        let kinds = (0..KINDS).filter(|kind| self.kinds & (1 << kind) != 0).collect::<Vec<_>>();
        let text = match kinds[rng.below(kinds.len())] {
            0 | 1 => {
                let (node, emptied) = (rng.below(NODES), rng.one_in(3));
                let places = env.cluster.places_of(node);
                let text = env.cluster.lose(rng, node, emptied);
                env.observer.lost(places, env.cluster.tainted | (places & env.cluster.without_mark()));
                Some(text)
            }
            2 | 3 => {
                let text = env.cluster.start_migration(rng);
                env.observer.lost(0, env.cluster.tainted);
                text
            }
            4 => env.cluster.move_slot(rng),
            5 => {
                env.pg.restart(rng);
                self.sessions = [const { None }; DAEMONS];
                Some(format!("Postgres restarted, confirmed {}", env.pg.confirmed))
            }
            6 | 7 => {
                env.pg.durable = env.pg.confirmed;
                None
            }
            8 => {
                let daemon = rng.below(DAEMONS);
                self.sessions[daemon].take().map(|_| format!("daemon {daemon} is killed"))
            }
            9 if !env.late.is_empty() => {
                let call = env.late.swap_remove(rng.below(env.late.len()));
                end_session(&mut self.sessions, &call);
                Some(format!("a connection of daemon {} is cut", call.daemon))
            }
            10 => env.pg.owner.take().map(|daemon| format!("daemon {daemon} loses the slot, and does not know")),
            11 if rng.one_in(2) => {
                let table = rng.below(TABLES);
                env.shape[table] += 1;
                Some(format!("table {table} has another shape"))
            }
            _ => None,
        };
        if let Some(text) = text {
            self.faults += 1;
            env.say(|| text);
        }
        env.check();
    }

    fn step(&mut self, calm: bool) {
        self.env.step += 1;
        let env = &mut self.env;
        let fault_rate = match (self.bursts, env.step % BURST.0 < BURST.1) {
            (true, false) => 0,
            (true, true) => 4 * self.fault_rate,
            (false, _) => self.fault_rate,
        };
        match env.rng.below(1000) {
            n if !calm && n < fault_rate => self.fault(),
            32..74 if !calm && env.rng.below(40) < self.commit_rate => {
                let text = env.pg.commit(&mut env.rng);
                env.say(|| text);
            }
            74..104 => {
                if let Some(entry) = env.pg.invisible.first().copied() {
                    env.pg.invisible.remove(&entry);
                }
            }
            104..144 => {
                let lane = env.rng.below(LANES);
                if let Some(text) = env.cluster.migrate(&mut env.rng, lane) {
                    env.say(|| text);
                    env.check();
                }
            }
            144..424 if !env.late.is_empty() => {
                let call = env.late.swap_remove(env.rng.below(env.late.len()));
                let reply = env.serve(&call);
                if let Some(session) = &mut self.sessions[call.daemon]
                    && session.id == call.session
                {
                    session.answer(env, &call, reply);
                }
            }
            _ => {
                let daemon = env.rng.below(DAEMONS);
                self.act(daemon, calm);
            }
        }
        for session in &mut self.sessions {
            if session.as_ref().is_some_and(|session| session.ended) {
                *session = None;
            }
        }
    }

    /// Performs a step of a daemon.
    fn act(&mut self, daemon: usize, calm: bool) {
        let env = &mut self.env;
        let owns = env.pg.owner == Some(daemon);
        let Some(session) = &mut self.sessions[daemon] else {
            let takes_over = env.rng.one_in(if calm { 3000 } else { 1000 });
            if owns || env.pg.owner.is_none() || takes_over {
                env.pg.owner = Some(daemon);
                let marks = &mut self.reading[daemon];
                if marks.len() < LANES && !env.rng.one_in(2) {
                    marks.push(env.cluster.lane(marks.len()).mark);
                } else if let Ok(marks) = <[Option<Mark>; LANES]>::try_from(std::mem::take(marks)) {
                    self.sessions[daemon] = Session::begin(env, daemon, marks);
                }
            }
            return;
        };
        // It was frozen while another daemon took over: it continues for a while.
        if !owns && env.rng.one_in(4) {
            self.sessions[daemon] = None;
            return;
        }
        let lane = env.rng.below(LANES);
        match env.rng.below(9) {
            0 | 1 if owns => session.deliver(env),
            2 | 3 => session.write(env, lane),
            4 | 5 => {
                let lanes = (0..LANES).filter(|lane| session.needs[*lane].is_some()).collect::<Vec<_>>();
                if !lanes.is_empty() {
                    let lane = lanes[env.rng.below(lanes.len())];
                    session.load(env, lane);
                }
            }
            6 => session.sweep(env, lane),
            7 if env.rng.one_in(2) => session.look_at_catalog(env),
            7 => session.write_record(env),
            8 if owns => {
                session.confirm(env);
                let Env { observer, cluster, pg, .. } = env;
                observer.confirmed(cluster, pg);
            }
            _ => {}
        }
    }

    fn is_whole(&self) -> bool {
        let Env { pg, cluster, shape, observer, .. } = &self.env;
        let Some(session) = pg.owner.and_then(|daemon| self.sessions[daemon].as_ref()) else { return false };
        let busy = session.needs.iter().any(Option::is_some) || session.out[RECORD].is_some();
        !busy && session.at.0 == pg.end() && observer.is_whole(cluster, pg, shape)
    }

    fn run(&mut self) -> Result<usize, String> {
        for _ in 0..STEPS {
            self.step(false);
            self.env.observer.verdict()?;
        }
        for step in 0..SETTLE {
            self.step(true);
            self.env.observer.verdict()?;
            if step % 16 == 0 && self.is_whole() {
                return Ok(step);
            }
        }
        let lanes = (0..LANES).map(|lane| format!("\n  lane {lane}: {:?}", self.env.cluster.lane(lane)));
        let state = self.env.pg.state(crate::postgres::Position(self.env.pg.end(), 0));
        Err(format!("not whole after {SETTLE} quiet steps: {}\n  rows: {state:?}", lanes.collect::<String>()))
    }
}

fn end_session(sessions: &mut [Option<Session>; DAEMONS], call: &Call) {
    if sessions[call.daemon].as_ref().is_some_and(|session| session.id == call.session) {
        sessions[call.daemon] = None;
    }
}

pub fn run(seed: u64, rules: Rules, trace: bool) -> Outcome {
    let mut world = World::new(seed, rules, trace);
    let result = world.run();
    let steps = world.env.step;
    let (settled_after, violation) = match result {
        Ok(steps) => (steps, None),
        Err(violation) => (0, Some(format!("step {steps}: {violation}"))),
    };
    Outcome { digest: world.env.digest, faults: world.faults, settled_after, violation }
}

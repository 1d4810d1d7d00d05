//! What concerns the whole table or the whole process: one transaction that changes every row, a Redis that has lost
//! everything, and the start.

use super::figures::{Sorted, rates, seconds};
use super::http::Http;
use super::processes::{Usage, Watch};
use super::world::{Daemon, Outcome, Way, World};
use super::{Sizes, number, say};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Between the commits beside a heal.
const COMMIT_EVERY: Duration = Duration::from_millis(10);
/// Of the table of the `start` part.
const TINY: u64 = 1_000;
/// How often a start is repeated in a round: it is short.
const STARTS: usize = 5;

/// One transaction that changes so many rows.
pub fn transaction(world: &World, sizes: &Sizes) -> Outcome<()> {
    let rows = sizes.transaction;
    println!("\n### One transaction that updates {rows} rows\n");
    let (mut commits, mut ours, mut alone, mut usages) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for round in 1..=sizes.rounds {
        world.sql("VACUUM items; CHECKPOINT")?;
        let mut receiver = world.receiver(Way::Unix, "/dev/null")?;
        let mut writer = world.commits()?;
        world.wait_until_sent(&mut writer)?;
        commits.push(writer.update_rows(rows)?);
        let committed = Instant::now();
        world.wait_until_sent(&mut writer)?;
        alone.push(committed.elapsed());
        receiver.kill()?;
        receiver.wait()?;
        world.drop_slot("yardstick")?;

        world.sql("VACUUM items; CHECKPOINT")?;
        world.forget_slot_and_checkpoint()?;
        let (watch, daemon) = streaming(world)?;
        let expected = world.mark()? + 1;
        commits.push(world.commits()?.update_rows(rows)?);
        let committed = Instant::now();
        world.wait_for_mark_of(expected)?;
        ours.push(committed.elapsed());
        usages.push(watch.end());
        world.row_is_current(rows)?;
        daemon.stop()?;
        let (a, b) = (ours[round - 1], alone[round - 1]);
        say(&format!("transaction, round {round}: {a:.2?} beside {b:.2?}"));
    }
    println!("| from | until | time | rows/s |\n|---|---|---|---|");
    for (span, times) in [
        ("BEGIN | COMMIT's answer", &commits),
        ("COMMIT's answer | prefetchd: the last row is visible in Redis", &ours),
        ("COMMIT's answer | pg_recvlogical: everything is sent, to /dev/null", &alone),
    ] {
        println!("| {span} | {} | {} |", seconds(times), rates(rows, times));
    }
    println!("\n{}", Usage::table("transaction", &usages));
    Ok(())
}

/// Returns a daemon that streams and has loaded nothing, so that its peak is that of what follows.
fn streaming(world: &World) -> Outcome<(Watch, Daemon)> {
    let loading = world.daemon(Way::Unix)?;
    world.wait_for_load()?;
    world.wait_until_idle()?;
    loading.stop()?;
    let watch = Watch::begin(world.pids());
    let daemon = world.daemon(Way::Unix)?;
    watch.daemon_is(daemon.pid);
    world.wait_until_idle()?;
    Ok((watch, daemon))
}

/// Redis loses everything while the daemon follows a hundred commits a second.
pub fn heal(world: &World, sizes: &Sizes) -> Outcome<()> {
    println!("\n### FLUSHALL while the daemon streams, {} rows\n", sizes.rows);
    let (mut full, mut ready, mut usages) = (Vec::new(), Vec::new(), Vec::new());
    for round in 1..=sizes.rounds {
        let (watch, daemon) = streaming(world)?;
        let mut http = Http::connect(daemon.http)?;
        world.wait_for("readiness", || Ok(http.is_ready()?))?;
        let (is_full, is_ready) = while_writing(world, || {
            let flushed = Instant::now();
            world.flush()?;
            world.wait_for("the rows", || Ok(world.is_full().is_ok()))?;
            let is_full = flushed.elapsed();
            world.wait_for("readiness", || Ok(http.is_ready()?))?;
            Ok((is_full, flushed.elapsed()))
        })?;
        usages.push(watch.end());
        daemon.stop()?;
        say(&format!("heal, round {round}: all rows after {is_full:.2?}, ready after {is_ready:.2?}"));
        full.push(is_full);
        ready.push(is_ready);
    }
    println!("| from | until | time | rows/s |\n|---|---|---|---|");
    println!("| FLUSHALL | all rows are in Redis | {} | {} |", seconds(&full), rates(sizes.rows, &full));
    println!("| FLUSHALL | all rows, and /readyz says 200 | {} | {} |", seconds(&ready), rates(sizes.rows, &ready));
    println!("\n{}", Usage::table("heal", &usages));
    Ok(())
}

/// Commits one row at a time meanwhile.
fn while_writing<T>(world: &World, measure: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
    let (mut writer, stop) = (world.commits()?, AtomicBool::new(false));
    thread::scope(|scope| {
        let writing = scope.spawn(|| {
            for n in 0.. {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                writer.set_stock(1 + n % 1_000, n).map_err(|error| error.to_string())?;
                thread::sleep(COMMIT_EVERY);
            }
            Ok::<_, String>(())
        });
        let measured = measure();
        stop.store(true, Ordering::Relaxed);
        writing.join().map_err(|_| "the writer panicked")??;
        measured
    })
}

/// From the start of the process to the loaded state of a tiny table, and to the first change after a resumption.
pub fn start() -> Outcome<()> {
    let rounds = usize::try_from(number("ROUNDS", 3)?)?.max(1);
    let world = World::new(TINY)?;
    println!("\n### From the start of the process, a table of {TINY} rows\n");
    let (mut first, mut resumed, mut ready) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds * STARTS {
        world.flush()?;
        world.drop_slot("prefetchd")?;
        let started = Instant::now();
        let daemon = world.daemon(Way::Unix)?;
        world.wait_for_load()?;
        first.push(started.elapsed());
        world.is_full()?;
        world.wait_until_idle()?;
        daemon.stop()?;

        world.wait_until_inactive("prefetchd")?;
        let expected = world.change_mark()?;
        let started = Instant::now();
        let daemon = world.daemon(Way::Unix)?;
        world.wait_for_mark_of(expected)?;
        resumed.push(started.elapsed());
        world.wait_for("readiness", || {
            // It listens a moment after its start.
            Ok(Http::connect(daemon.http).and_then(|mut http| http.is_ready()).unwrap_or(false))
        })?;
        ready.push(started.elapsed());
        daemon.stop()?;
    }
    println!("| from | until | p50 | shortest | longest |\n|---|---|---|---|---|");
    for (span, times) in [
        ("first start | the table is loaded", first),
        ("resumption | the change that waited is in Redis", resumed),
        ("resumption | that, and /readyz says 200", ready),
    ] {
        let times = Sorted::new(times);
        println!("| {span} | {:.0} ms | {:.0} ms | {:.0} ms |", times.ms(0.5), times.ms(0.0), times.ms(1.0));
    }
    Ok(())
}

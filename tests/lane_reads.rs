//! Reads over HTTP from a cluster with rows in all hash slots: what several rows show together, and what a reader has been
//! shown before.

use crate::harness::{Answer, Cluster, Daemon, Postgres, Settings};
use prefetchd::lanes::Lane;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Rows with the same remainder are only ever written together, and always have the same value.
const GROUPS: u64 = 100;
const ROWS: u64 = 2_000;

struct Groups {
    postgres: Postgres,
    cluster: Cluster,
    settings: Settings,
}

fn lane(id: u64) -> Lane {
    Lane::of(format!("row:{id}").as_bytes())
}

fn ids(group: u64) -> impl Iterator<Item = u64> {
    (1..=ROWS).filter(move |id| id % GROUPS == group)
}

impl Groups {
    async fn on(cluster: Cluster) -> Self {
        let postgres = Postgres::shared();
        let create = format!(
            "CREATE TABLE grouped (id int PRIMARY KEY, v bigint NOT NULL);
             INSERT INTO grouped SELECT id, 0 FROM generate_series(1, {ROWS}) id;
             GRANT SELECT ON grouped TO prefetchd; ALTER PUBLICATION prefetchd ADD TABLE grouped"
        );
        postgres.execute(&create).await;
        let tables = "[[tables]]\nname = \"grouped\"\ntable = \"public.grouped\"\nkey = \"row:{id}\"\n";
        let settings = Settings::on_cluster(&postgres, &cluster).tables(tables);
        for group in 0..GROUPS {
            assert!(ids(group).map(lane).collect::<BTreeSet<_>>().len() > 10, "they lie in several hash slots");
        }
        Self { postgres, cluster, settings }
    }

    async fn daemon(&self) -> Daemon {
        let daemon = Daemon::with(&self.settings).await;
        daemon.ready().await;
        daemon
    }

    /// Writes one group again and again until it is to stop.
    async fn write(&self, group: u64, stop: &AtomicBool) {
        let client = self.postgres.client().await;
        let mut value = 0;
        while !stop.load(Ordering::Relaxed) {
            value += 1;
            let update = format!("UPDATE grouped SET v = {value} WHERE id % {GROUPS} = {group}");
            client.batch_execute(&update).await.unwrap();
        }
    }
}

/// Reads rows of these groups in one request.
async fn read(daemon: &Daemon, groups: &[u64]) -> Answer {
    let keys: Vec<String> = groups.iter().flat_map(|group| ids(*group)).map(|id| format!("key={id}")).collect();
    daemon.get(&format!("/v1/tables/grouped?{}", keys.join("&"))).await
}

/// What a reader that trusts the answers has seen.
#[derive(Default)]
struct Tally {
    of_one_moment: AtomicU64,
    of_several: AtomicU64,
    /// Among the latter: those that did show a part of a transaction.
    torn: AtomicU64,
}

impl Tally {
    /// Asserts that an answer without the header shows no group with two values.
    fn takes(&self, groups: &[u64], answer: &Answer) {
        assert_eq!(answer.status, 200, "{answer:?}");
        let rows = &answer.json()["rows"];
        let values = |group: &u64| ids(*group).map(|id| rows[id.to_string()]["v"].to_string()).collect::<BTreeSet<_>>();
        let is_whole = groups.iter().all(|group| values(group).len() == 1);
        let count = |counter: &AtomicU64| _ = counter.fetch_add(1, Ordering::Relaxed);
        match answer.header("Prefetchd-Consistent") {
            None => {
                assert!(is_whole, "a part of a transaction: {answer:?}");
                count(&self.of_one_moment);
            }
            Some(header) => {
                assert_eq!(header, "false");
                count(&self.of_several);
                if !is_whole {
                    count(&self.torn);
                }
            }
        }
    }

    /// Returns how many answers were of one moment, and how many of several.
    fn counted(&self) -> (u64, u64) {
        let [one, several, torn] =
            [&self.of_one_moment, &self.of_several, &self.torn].map(|n| n.load(Ordering::Relaxed));
        println!("{one} answers of one moment, {several} of several, {torn} of them with a part of a transaction");
        (one, several)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_rows_show_whole_transactions_or_the_answer_says_that_they_may_not() {
    let scene = Groups::on(Cluster::start().await).await;
    let daemon = scene.daemon().await;
    let (stop, tally) = (AtomicBool::new(false), Tally::default());
    let watch = async |groups: &[u64]| {
        while !stop.load(Ordering::Relaxed) {
            tally.takes(groups, &read(&daemon, groups).await);
        }
    };
    let ends = async {
        tokio::time::sleep(Duration::from_secs(8)).await;
        stop.store(true, Ordering::Relaxed);
    };
    let write = |group| scene.write(group, &stop);
    tokio::join!(write(0), write(1), write(2), write(3), watch(&[0]), watch(&[1, 2, 3]), ends);
    let (one, several) = tally.counted();
    assert!(one > 50 && one > several, "{one} of one moment, {several} of several");

    // With nobody writing, every answer is of one moment, and has what was written last.
    let lsn = scene.postgres.position().await;
    daemon.applied(lsn).await;
    let answer = read(&daemon, &[0, 1, 2, 3]).await;
    assert_eq!((answer.status, answer.header("Prefetchd-Consistent")), (200, None), "{answer:?}");
    tally.takes(&[0, 1, 2, 3], &answer);
    assert_eq!(daemon.stop().await, Some(0));
}

/// What the replica lacks was not confirmed, unless the test is very slow, so it is sent again and nothing is loaded. Until it
/// is there, nobody is shown what was before it, whether or not somebody has seen it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_shown_is_not_taken_back_by_a_replica_that_lagged() {
    let mut scene = Groups::on(Cluster::with_replicas().await).await;
    let daemon = scene.daemon().await;
    daemon.allow_warnings();
    let mut here = Vec::new();
    for id in 1..=ROWS {
        let is_other = here.iter().all(|other| lane(*other) != lane(id));
        if is_other && scene.cluster.master_of(lane(id)).await == 1 {
            here.push(id);
        }
        if here.len() == 2 {
            break;
        }
    }
    let [shown, written] = here[..] else { panic!("rows on each master") };
    scene.cluster.lags(3 + 1, 1).await;
    // Takes some time to be sent again, before the change of the rows. As no other hash slots are written, none of it is
    // confirmed yet.
    for _ in 0..10 {
        let others = format!("id < {ROWS} / 2 AND id NOT IN ({shown}, {written})");
        scene.postgres.execute(&format!("UPDATE grouped SET v = v + 1 WHERE {others}")).await;
    }
    let lsn = scene.postgres.execute(&format!("UPDATE grouped SET v = 77 WHERE id IN ({shown}, {written})")).await;
    daemon.applied(lsn).await;
    let [shown, written] = [shown, written].map(|id| format!("/v1/tables/grouped/{id}"));
    let answer = daemon.get(&shown).await;
    assert_eq!((answer.status, answer.json()["v"].as_str()), (200, Some("77")), "{answer:?}");
    scene.cluster.kill(1);
    let mut refused = 0;
    let watch = async {
        let began = Instant::now();
        loop {
            let mut is_there = true;
            for target in [&shown, &written] {
                let answer = daemon.get(target).await;
                is_there &= answer.status == 200;
                match answer.status {
                    200 => assert_eq!(answer.json()["v"], "77", "{answer:?}\n{}", daemon.log_text()),
                    503 => refused += u64::from(answer.refusal().1 == "healing"),
                    _ => panic!("{answer:?}"),
                }
            }
            if is_there && daemon.get("/readyz").await.status == 200 {
                return;
            }
            assert!(began.elapsed() < Duration::from_secs(60), "{}", daemon.log_text());
        }
    };
    let failover = async {
        scene.cluster.take_over(3 + 1).await;
    };
    tokio::join!(failover, watch);
    println!("refused {refused} times");
    assert!(refused > 0, "it was not seen to have gone back");
    assert_eq!(daemon.stop().await, Some(0));
}

//! What the page says in each state of the daemon, with the remedy's button; what it remembers; and many tables.

use crate::harness::browser::Browser;
use crate::harness::{Daemon, Postgres, Redis, Settings, eventually, psql};
use serde_json::{Value, json};

async fn open(browser: &Browser, daemon: &Daemon) {
    browser.open(format!("http://{}/#token={}", daemon.address(), daemon.token())).await;
}

/// Waits until the tab's title is this, with the database's name after it.
async fn title(browser: &Browser, postgres: &Postgres, title: &str) {
    let wanted = format!("{title} {}", postgres.database());
    let what = format!("the title is {wanted:?}");
    eventually(&what, async || browser.run("return document.title").await, |title| *title == wanted).await;
}

/// Presses the remedy's button by the keyboard, and returns what is said beside it.
async fn press(browser: &Browser, label: &str, outcome: &str) {
    browser.shows("#act", label).await;
    browser.click("#act").await;
    browser.shows("#act-said", outcome).await;
    browser.shows("#sentence", "All is well").await;
    // The button is gone; whoever uses the keyboard is still here.
    let focused = async || browser.run("return document.activeElement.id").await;
    eventually("the verdict has the focus", focused, |id| id == "verdict").await;
}

#[tokio::test]
async fn a_blocked_table_is_the_first_sentence_and_the_first_row() {
    let Some(browser) = Browser::start().await else { return };
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.ready().await;
    daemon.allow_warning("table cannot be followed until this is mended");
    open(&browser, &daemon).await;
    title(&browser, &postgres, "✓ prefetchd").await;
    browser.is_accessible("all is well").await;
    postgres.execute("ALTER TABLE categories RENAME TO elsewhere").await;
    let sentence = browser.shows("#sentence", "Table categories is blocked: table public.categories is called ").await;
    assert!(sentence.ends_with('.'), "{sentence}");
    browser.shows("#advice", "ALTER TABLE").await;
    browser.shows("#tables tr.blocked", "categories").await;
    browser.shows("#tables tr.blocked", "To do: write table = ").await;
    title(&browser, &postgres, "✗ blocked – prefetchd").await;
    assert_eq!(browser.run("return document.querySelector('#act').checkVisibility()").await, false);
    browser.is_accessible("a blocked table").await;
    psql(&postgres.url("postgres"), "ALTER TABLE elsewhere RENAME TO categories");
    browser.shows("#sentence", "All is well").await;
    title(&browser, &postgres, "✓ prefetchd").await;
    browser.console_is_empty().await;
}

#[tokio::test]
async fn drift_is_repaired_by_the_verdict_s_button() {
    let Some(browser) = Browser::start().await else { return };
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.allow_warning("verify");
    daemon.allow_warning("of categories: ");
    daemon.ready().await;
    open(&browser, &daemon).await;
    redis.command::<i32>(&["DEL", "cache:category:cat-003"]).await;
    browser.click("#verify").await;
    browser.shows("#operation-said", "1 missing").await;
    browser.shows("#sentence", "A verify of categories found drift, not repaired: 1 missing.").await;
    browser.shows("#tables tr.trouble", "1 key differs").await;
    title(&browser, &postgres, "! drift – prefetchd").await;
    browser.is_accessible("drift").await;
    press(&browser, "Verify and repair categories", "verify categories: 5 rows, 4 keys: 1 missing").await;
    browser.console_is_empty().await;
}

#[tokio::test]
async fn a_pause_is_ended_by_the_verdict_s_button() {
    let Some(browser) = Browser::start().await else { return };
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.ready().await;
    open(&browser, &daemon).await;
    daemon.operate("pause", &json!({})).await;
    browser.shows("#sentence", "Paused: nothing is applied").await;
    title(&browser, &postgres, "! paused – prefetchd").await;
    browser.is_accessible("paused").await;
    press(&browser, "Resume", "goes on").await;
    title(&browser, &postgres, "✓ prefetchd").await;
    browser.console_is_empty().await;
}

#[tokio::test]
async fn a_pause_during_which_redis_lost_everything_says_both() {
    let Some(browser) = Browser::start().await else { return };
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.allow_warnings();
    daemon.ready().await;
    open(&browser, &daemon).await;
    daemon.operate("pause", &json!({})).await;
    redis.flush().await;
    browser.shows("#rest", "Meanwhile Redis has lost what it had of categories").await;
    browser.shows("#sentence", "Paused").await;
    title(&browser, &postgres, "✗ paused – prefetchd").await;
    browser.is_accessible("paused, and Redis lost everything").await;
    press(&browser, "Resume", "goes on").await;
    browser.console_is_empty().await;
}

#[tokio::test]
async fn removed_keys_are_fetched_by_the_verdict_s_button() {
    let Some(browser) = Browser::start().await else { return };
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.allow_warning("of categories: ");
    daemon.ready().await;
    open(&browser, &daemon).await;
    daemon.operate("invalidate", &json!({"table": "categories", "keys": ["cat-001"]})).await;
    browser.shows("#sentence", "Keys of categories were removed").await;
    title(&browser, &postgres, "✗ rows missing – prefetchd").await;
    press(&browser, "Refetch categories", "refetch categories: 5 rows loaded").await;
    browser.console_is_empty().await;
}

#[tokio::test]
async fn a_load_shows_how_far_it_is() {
    let Some(browser) = Browser::start().await else { return };
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let both = "
        [[tables]]\nname = 'categories'\ntable = 'public.categories'\nkey = 'cache:category:{id}'
        [[tables]]\nname = 'items'\ntable = 'public.items'\nkey = 'item:{id}'";
    let settings = Settings::new(&postgres, &redis);
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    let address = daemon.address().to_string();
    browser.open(&address).await;
    daemon.stop().await;
    postgres
        .execute(
            "CREATE TABLE items (id int PRIMARY KEY, name text);
             INSERT INTO items SELECT n, 'item ' || n FROM generate_series(1, 20000) n;
             GRANT SELECT ON items TO prefetchd; ALTER PUBLICATION prefetchd ADD TABLE items",
        )
        .await;
    // Its rows cannot be read yet.
    let client = postgres.client().await;
    client.batch_execute("BEGIN; LOCK TABLE items").await.unwrap();
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).tables(both).text("http.listen", &address)).await;
    daemon.allow_warnings();
    browser.shows("#sentence", "Loading items").await;
    browser.shows("#tables tr.trouble", "loading").await;
    title(&browser, &postgres, "! loading – prefetchd").await;
    browser.is_accessible("loading").await;
    client.batch_execute("ROLLBACK").await.unwrap();
    browser.shows("#sentence", "All is well").await;
    title(&browser, &postgres, "✓ prefetchd").await;
    browser.console().await;
    drop(daemon);
}

/// What happened before the page was opened is there when it is opened.
#[tokio::test]
async fn the_page_remembers_what_it_has_not_seen() {
    let Some(browser) = Browser::start().await else { return };
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.allow_warnings();
    daemon.ready().await;
    for n in 0..30 {
        let lsn = postgres.execute(&format!("UPDATE categories SET name = 'n {n}' WHERE id = 'cat-001'")).await;
        daemon.applied(lsn).await;
    }
    redis.flush().await;
    let remembered = async || daemon.get("/v1/history").await.json();
    let of_heal =
        |history: &Value| history["events"].as_array().unwrap().iter().rfind(|e| e["kind"] == "healed").cloned();
    let is_all = |history: &Value| history["last_minute"]["changes"].as_u64() >= Some(30) && of_heal(history).is_some();
    let healed = of_heal(&eventually("all is remembered", remembered, is_all).await).unwrap();
    daemon.ready().await;

    open(&browser, &daemon).await;
    browser.shows("#events", healed["text"].as_str().unwrap()).await;
    browser.shows("#changes-in", " changes in the last ").await;
    assert_ne!(browser.text("#p50").await.unwrap(), "–");
    assert_eq!(browser.text("#changes li").await, None, "the stream itself tells no change of before");
    let drawn = "return ['lag', 'behind', 'rate', 'reads'].map((name) => document.querySelector(`#plot-${name} .line`).getAttribute('d').length > 0)";
    assert_eq!(browser.run(drawn).await, json!([true, true, true, true]));
    let summary = browser.run("return document.querySelector('#plot-rate svg').ariaLabel").await;
    assert!(summary.as_str().unwrap().contains("changes highest "), "{summary}");
    let ticks = browser.text("#plot-lag .values").await.unwrap();
    assert!(ticks.ends_with("ms0") || ticks.ends_with("s0"), "{ticks}");

    // One that happens now comes first, and warnings can be picked out.
    assert_eq!(daemon.operate("refetch", &json!({})).await.status, 200);
    let first = async || browser.text("#events li .what").await;
    eventually("the newest comes first", first, |first| first.as_deref() != healed["text"].as_str()).await;
    browser.click("#only-trouble").await;
    let shown = "return [...document.querySelectorAll('#events li')].filter((item) => item.checkVisibility()).map((item) => item.querySelector('.level').textContent)";
    let shown = browser.run(shown).await;
    assert!(shown.as_array().unwrap().iter().all(|level| level == "warning" || level == "error"), "{shown}");
    browser.console_is_empty().await;
}

/// The daemon's own status, its table three hundred times.
const MANY: &str = r#"
    const parse = JSON.parse;
    let second = 0;
    JSON.parse = (text) => {
        const told = parse(text);
        if (!Array.isArray(told?.tables)) return told;
        second += 1;
        const [table] = told.tables;
        told.tables = Array.from({length: 300}, (_, i) => ({...table, name: `table_${String(i).padStart(3, "0")}`, hits: i * second, misses: 300 - i}));
        Object.assign(told.tables[211], {state: "blocked", loaded: false, because: "it was dropped", remedy: "create it again"});
        for (const i of [7, 8, 9, 10]) Object.assign(told.tables[i], {state: "loading", loaded: false, loading: {rows: second, estimated: 1000}});
        told.not_ready_because = [211, 7, 8, 9, 10].map((i) => `table ${told.tables[i].name} is ${told.tables[i].state}`);
        return told;
    };
"#;

#[tokio::test]
async fn three_hundred_tables_can_be_found_sorted_and_read_in_peace() {
    let Some(browser) = Browser::start().await else { return };
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.ready().await;
    browser.devtools("Page.addScriptToEvaluateOnNewDocument", json!({"source": MANY})).await;
    open(&browser, &daemon).await;
    browser.shows("#tables-count", "300 tables: 1 blocked, 4 loading, 295 loaded.").await;
    browser.shows("#reasons", "5 tables are not ready: 1 blocked, 4 loading").await;
    browser.shows("#running-text", " of about 4,000 rows of 4 tables").await;
    let names = async || {
        let visible = "return [...document.querySelectorAll('#tables tr:not([hidden]) th')].slice(0, 6).map((th) => th.textContent)";
        browser.run(visible).await
    };
    assert_eq!(names().await, json!(["table_211", "table_007", "table_008", "table_009", "table_010", "table_000"]));
    let filter = async |text: &str| {
        let typed = format!(
            "const filter = document.querySelector('#filter'); filter.value = '{text}'; filter.dispatchEvent(new Event('input'))"
        );
        browser.run(&typed).await;
    };
    // The others have the same rows.
    filter("table_00").await;
    browser.is_accessible("three hundred tables").await;
    filter("").await;

    // Figures change every second, and nothing moves while somebody reads.
    browser
        .run("document.querySelectorAll('.sort')[3].click(); document.querySelector('#tables-scroll').scrollTop = 500")
        .await;
    let hits = async || browser.text("#tables tr td[data-label='HTTP hits']").await;
    assert_eq!(names().await, json!(["table_299", "table_298", "table_297", "table_296", "table_295", "table_294"]));
    let before = hits().await;
    eventually("figures change", hits, |now| *now != before).await;
    assert_eq!(browser.run("return document.querySelector('#tables-scroll').scrollTop").await, 500);

    for (typed, shown) in [("table_21", "10 shown"), ("block", "1 shown"), ("nothing", "0 shown")] {
        browser.write("#filter", typed).await;
        browser.shows("#filtered", shown).await;
        let before = hits().await;
        eventually("figures change", hits, |now| *now != before).await;
        let now = browser
            .run("const filter = document.querySelector('#filter'); return [filter.value, document.activeElement.id]")
            .await;
        assert_eq!(now, json!([typed, "filter"]));
    }
    // Where there is no room for headings.
    filter("").await;
    browser
        .run("const sort = document.querySelector('#sort'); sort.value = 0; sort.dispatchEvent(new Event('change'))")
        .await;
    assert_eq!(names().await, json!(["table_000", "table_001", "table_002", "table_003", "table_004", "table_005"]));
    browser.console_is_empty().await;
}

#[tokio::test]
async fn a_daemon_that_remembers_nothing_is_shown_as_well() {
    let Some(browser) = Browser::start().await else { return };
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.ready().await;
    // An older one sends neither history nor events, and its verdict names no action.
    let older = json!({"source": "
        const listen = EventTarget.prototype.addEventListener;
        EventSource.prototype.addEventListener = function (name, call) {
            if (!['history', 'second', 'happened'].includes(name)) listen.call(this, name, call);
        };
        const parse = JSON.parse;
        JSON.parse = (text) => { const told = parse(text); delete told?.verdict?.action; return told; };"});
    browser.devtools("Page.addScriptToEvaluateOnNewDocument", older).await;
    open(&browser, &daemon).await;
    browser.shows("#sentence", "All is well").await;
    browser.shows("#p99", "this daemon tells no history").await;
    browser.shows("#lag", "0.0 s").await;
    browser.is_accessible("no history").await;
    browser.console_is_empty().await;
}

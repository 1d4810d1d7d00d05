//! The status page in a real browser: what it shows, what its buttons do, and that it never interprets text as markup.

use crate::demo::{Demo, Printed, paste};
use crate::harness::browser::Browser;
use crate::harness::{Daemon, Feature, Postgres, Redis, Settings, eventually, post, psql, request, run_program};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

const FIRST: &str = r#"#rows tr[data-id="cat-001"]"#;

fn row(id: &str) -> String {
    format!(r#"#rows tr[data-id="{id}"]"#)
}

fn act(id: &str, what: &str) -> String {
    format!(r#"{} [data-act="{what}"]"#, row(id))
}

/// Everything except the browser's own messages about responses other than 200.
async fn said_by_the_page(browser: &Browser) -> Vec<Value> {
    let of_an_answer = |entry: &Value| {
        entry["source"] == "network"
            && entry["message"].as_str().unwrap().contains("the server responded with a status of")
    };
    let mut console = browser.console().await;
    console.retain(|entry| !of_an_answer(entry));
    console
}

#[tokio::test]
async fn a_change_shows_up_without_a_reload_and_text_stays_text() {
    let Some(browser) = Browser::start().await else { return };
    let mut demo = Demo::start(&[]);
    let Printed { url, update, .. } = demo.ready();
    browser.open(url).await;
    browser.run("window.opened = true").await;
    browser.shows("#sentence", "All is well").await;
    browser.shows(FIRST, "Beverages").await;
    browser.shows("#psql", update.trim()).await;
    browser.shows("#tables", "categories").await;
    browser.shows("#slot-limit", "of 1.1 GB").await;
    browser.shows("#lsn-applied", "0/").await;

    browser.click("#list").await;
    browser.shows("#children-none", "Beverages (cat-001)Bakery (cat-002)").await;
    browser.choose("#parent", "cat-001").await;
    browser.shows("#children-of", "Coffee, tea (cat-005)").await;
    paste(&update.replace("name = 'Hot drinks' WHERE id = 'cat-001'", "parent_id = 'cat-001' WHERE id = 'cat-002'"));
    browser.shows("#children-of", "Bakery (cat-002)Coffee, tea (cat-005)").await;
    browser.shows("#children-none", "Beverages (cat-001)Produce (cat-003)").await;
    paste(&update.replace("name = 'Hot drinks' WHERE id = 'cat-001'", "parent_id = NULL WHERE id = 'cat-002'"));

    paste(&update);
    browser.shows(FIRST, "Hot drinks").await;
    browser.shows("#changes li", "cache:category:cat-001").await;
    browser.shows("#tables td[data-label=Changes]", "3").await;
    assert_eq!(
        browser.run("return document.querySelector('#plot-rate .line').getAttribute('d').length > 0").await,
        true
    );

    let evil = r#"<img src=x onerror="window.evil=1"><script>window.evil=1</script>"#;
    paste(&update.replace("Hot drinks", &evil.replace('"', r#"\""#)));
    browser.shows(&format!("{FIRST} td"), evil).await;
    let id = "<img src=x onerror=window.evil=1>";
    paste(&update.replace(
        "UPDATE categories SET name = 'Hot drinks' WHERE id = 'cat-001'",
        &format!("INSERT INTO categories VALUES ('{id}', '{id}', 1, true, NULL)"),
    ));
    browser.shows("#changes li", id).await;
    browser.click(&act("cat-001", "read")).await;
    browser.shows("#answer-fields", evil).await;
    browser.write("#read-id", id).await;
    browser.click("#read button:not([type])").await;
    browser.shows("#answer-fields", id).await;
    assert_eq!(
        browser.run("return [window.evil, document.querySelectorAll('img, #rows script').length]").await,
        json!([null, 0])
    );
    assert_eq!(browser.run("return window.opened").await, true, "the page was loaded again");
    browser.console_is_empty().await;
}

#[tokio::test]
async fn rows_are_read_changed_and_lost_as_the_buttons_say() {
    let Some(browser) = Browser::start().await else { return };
    let mut demo = Demo::start(&[]);
    let Printed { url, .. } = demo.ready();
    browser.open(url).await;

    browser.click(&act("cat-001", "read")).await;
    browser.shows("#answer-head .badge", "hit").await;
    let head = browser.shows("#answer-head", "TTL left 86,").await;
    assert!(head.contains("Redis ") && head.contains(" ms"), "{head}");
    let fields = browser.text("#answer-fields").await.unwrap();
    assert_eq!(fields, "idcat-001nameBeveragesdisplay_order1featuredtrueparent_id");
    let before = browser.text("#primary-reads").await.unwrap();
    browser.click("#read-many").await;
    browser.shows("#answer-head", "500 hits in ").await;
    browser.shows("#answer-head", &format!("Reads of the primary: still {before}.")).await;
    browser.shows("#count-hits", "501").await;
    browser.shows("#count-rate", "100.0 %").await;
    browser.click("#reset").await;
    browser.shows("#count-hits", "0").await;
    browser.shows("#hits", "501 hits").await;

    browser.choose("#update-field", "display_order").await;
    browser.write("#update-value", "77").await;
    browser.click("#update button").await;
    browser.shows("#write-said", "update cat-001: in the cache").await;
    browser.click(&act("cat-001", "read")).await;
    browser.shows("#answer-fields", "display_order77").await;

    browser.click("#add button").await;
    browser.shows(&row("cat-006"), "Seasonal").await;
    browser.click("#add button").await;
    browser.shows("#write-said .failed", "duplicate key").await;
    browser.click(&act("cat-001", "delete")).await;
    browser.shows("#rows-said .failed", "foreign key").await;
    browser.click(&act("cat-006", "delete")).await;
    browser.is_gone(&row("cat-006")).await;
    browser.write("#read-id", "cat-006").await;
    browser.click("#read button:not([type])").await;
    browser.shows("#answer-head .badge", "miss").await;
    browser.shows("#count-misses", "1").await;

    // A failure for practice.
    browser.click(&act("cat-002", "invalidate")).await;
    browser.shows(&row("cat-002"), "missing from the cache").await;
    browser.shows("#sentence", "Keys of categories were removed").await;
    browser.click(&act("cat-002", "read")).await;
    browser.shows("#answer-head .badge", "incomplete").await;
    browser.click("#prefetch").await;
    browser.shows("#rows-said", "5 rows loaded").await;
    browser.shows("#sentence", "All is well").await;
    browser.shows(&row("cat-002"), "BakeryBakery").await;
    browser.click("#clear-all").await;
    browser.write("#dialog-input", "categorie").await;
    assert!(!browser.is_enabled("#dialog-yes").await, "half a name is enough");
    browser.write("#dialog-input", "categories").await;
    browser.click("#dialog-yes").await;
    browser.shows("#rows-said", "clear categories: 5 keys removed").await;
    browser.shows(&row("cat-005"), "missing from the cache").await;
    browser.click("#prefetch").await;
    browser.shows("#rows-said", "5 repaired").await;
    browser.click("#break-ghost").await;
    browser.shows(&row("cat-ghost"), "orphaned in the cache").await;
    browser.click("#prefetch").await;
    browser.shows("#rows-said", "1 orphan removed").await;
    browser.is_gone(&row("cat-ghost")).await;
    assert_eq!(said_by_the_page(&browser).await, [Value::Null; 0]);
}

#[tokio::test]
async fn what_breaks_is_seen_to_heal() {
    let Some(browser) = Browser::start().await else { return };
    let mut demo = Demo::start(&[]);
    let Printed { url, address, authorization, .. } = demo.ready();
    browser.open(url).await;
    for (what, outcome) in [
        ("flushall", "healed after"),
        ("restart-redis", "healed after"),
        ("kill-replication", "streaming again, and nothing lost"),
        ("burst", "10,000 commits in"),
        ("two-tables", "0 saw half of it"),
    ] {
        browser.click(&format!("#break-{what}")).await;
        browser.shows(&format!("#break-{what}-said"), outcome).await;
        // Visible at once.
        let all = request(address, "GET", "/v1/tables/categories?key=cat-001&key=cat-005&key=nobody").await.unwrap();
        assert_eq!(all.status, 200, "after {what}: {all:?}");
        let status = request(address, "GET", "/v1/status").await.unwrap().json();
        let upserts = |table: usize| status["tables"][table]["upserts"].as_u64().unwrap();
        assert!(status["ready"] == true && status["waiting_for"].is_null(), "after {what}: {status}");
        match what {
            "burst" => assert!(upserts(0) >= 10_000, "{status}"),
            "two-tables" => assert_eq!((upserts(0), upserts(1)), (10_001, 1)),
            _ => assert_eq!(upserts(0), 0, "after {what}"),
        }
    }
    browser.click("#own-writes").await;
    browser.shows("#stale-on", "0 of 50").await;
    browser.shows("#stale-off", " of 50").await;
    browser.shows("#sentence", "All is well").await;
    let status =
        post(address, "/demo/state", &["Content-Type: application/json", &authorization], "{}").await.unwrap().json();
    assert!(status["rows"].as_array().unwrap().iter().all(|row| row["note"] == ""), "{status}");
    assert_eq!(said_by_the_page(&browser).await, [Value::Null; 0]);
}

#[tokio::test]
async fn a_cluster_that_breaks_is_seen_to_heal() {
    if Redis::lacks(Feature::AnnouncedHostname).await {
        return;
    }
    let Some(browser) = Browser::start().await else { return };
    let mut demo = Demo::start(&["--cluster"]);
    let Printed { url, address, .. } = demo.ready();
    browser.open(url).await;
    browser.shows(FIRST, "slot 10558, port ").await;
    browser.shows("#reshard", "redis-cli --cluster reshard").await;
    assert_eq!(browser.run("return document.querySelector('#break-restart-redis').checkVisibility()").await, false);
    browser.click("#break-flushall").await;
    browser.shows("#break-flushall-said", "healed after").await;
    // Its drift is not mended by the failover, and does not hide its end.
    browser.click("#break-ghost").await;
    browser.shows(&row("cat-ghost"), "orphaned in the cache").await;
    let before = browser.text(FIRST).await;
    browser.click("#break-fail-over").await;
    browser.shows("#break-fail-over-said", "took over").await;
    browser.shows("#sentence", "All is well").await;
    eventually("another node has it", async || browser.text(FIRST).await, |text| *text != before).await;
    // The replica may have lacked a little, which is being sent again.
    let prefetch = async || {
        browser.click("#prefetch").await;
        browser.text("#rows-said").await
    };
    let is_done = |said: &Option<String>| said.as_ref().is_some_and(|said| said.contains("5 rows loaded"));
    eventually("it is prefetched again", prefetch, is_done).await;
    browser.is_gone(&row("cat-ghost")).await;
    browser.click("#break-two-tables").await;
    browser.shows("#break-two-tables-said", "both in the cache").await;
    let all = request(address, "GET", "/v1/tables/categories?key=cat-001&key=cat-005&key=nobody").await.unwrap();
    assert_eq!(all.status, 200, "{all:?}");
    assert_eq!(said_by_the_page(&browser).await, [Value::Null; 0]);
}

#[tokio::test]
async fn a_server_that_was_given_is_not_broken() {
    let Some(browser) = Browser::start().await else { return };
    let redis = Redis::start();
    // Everybody can read the command line.
    let user = ["given", "on", ">given", "~cache:*", "~prefetchd:*", "+@all", "-@admin", "-@dangerous", "+info"];
    redis.command::<()>(&[&["ACL", "SETUSER"], &user[..]].concat()).await;
    let mut demo = Demo::start(&["--redis-url", &redis.bare_url().replace("://", "://given:given@")]);
    let Printed { url, address, authorization, .. } = demo.ready();
    browser.open(url).await;
    browser.shows(FIRST, "Beverages").await;
    for button in ["flushall", "restart-redis", "ghost"] {
        assert!(!browser.is_enabled(&format!("#break-{button}")).await, "{button}");
        let answer =
            post(address, &format!("/demo/{button}"), &["Content-Type: application/json", &authorization], "{}")
                .await
                .unwrap();
        assert_eq!(answer.refusal(), (409, "given_server".to_owned()));
    }
    // Five rows, and their lists.
    assert_eq!(redis.keys("cache:*").await.len(), 8);
    browser.click("#break-kill-replication").await;
    browser.shows("#break-kill-replication-said", "streaming again").await;
}

#[tokio::test]
async fn operations_ask_before_they_hurt_and_say_what_they_did() {
    let Some(browser) = Browser::start().await else { return };
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.ready().await;
    browser.open(format!("http://{}/#token={}", daemon.address(), daemon.token())).await;
    browser.is_gone("#demo").await;
    assert_eq!(daemon.get("/page/demo.js").await.status, 404);
    browser.click("#verify").await;
    browser.shows("#operation-said", "5 rows, 5 keys: no drift").await;
    browser.shows("#last-verify", "Last verify: just now").await;
    redis.command::<i32>(&["DEL", "cache:category:cat-003"]).await;
    daemon.allow_warning("of categories: 5 rows");
    browser.click("#repair").await;
    browser.shows("#operation-said", "1 missing, 0 stale, 0 orphaned, 1 repaired").await;

    browser.click("#pause").await;
    browser.click("#dialog-no").await;
    browser.shows("#sentence", "All is well").await;
    browser.click("#pause").await;
    browser.click("#dialog-yes").await;
    browser.shows("#sentence", "Paused").await;
    browser.click("#refetch").await;
    browser.shows("#operation-said .failed", "paused").await;
    browser.click("#resume").await;
    browser.shows("#sentence", "All is well").await;

    browser.click("summary").await;
    browser.write("#invalidate-keys", "cat-001 cat-002").await;
    browser.click("#invalidate button").await;
    browser.click("#dialog-yes").await;
    browser.shows("#invalidate-said", "invalidate categories: 2 keys removed").await;
    browser.shows("#reasons", "categories is incomplete").await;
    browser.choose("#which", "categories").await;
    browser.click("#refetch").await;
    browser.shows("#operation-said", "5 rows loaded").await;
    browser.shows("#sentence", "All is well").await;
    browser.write("#skip-lsn", "0/1A").await;
    browser.click("#skip button").await;
    browser.click("#dialog-yes").await;
    browser.shows("#skip-said .failed", "skip: ").await;
    assert_eq!(said_by_the_page(&browser).await, [Value::Null; 0]);
}

#[tokio::test]
async fn a_stream_that_breaks_is_shown_and_comes_back() {
    let Some(browser) = Browser::start().await else { return };
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.ready().await;
    browser.open(daemon.address()).await;
    browser.console_is_empty().await;
    // The first figures come a second after the start.
    browser.shows("#lag", "0.0 s").await;
    // Nothing is closed: the daemon only falls silent.
    daemon.signal(Signal::SIGSTOP);
    browser.shows("#link", "no answer for 5 s, all of this is old").await;
    let sentence = browser.shows("#sentence", "No answer from the daemon for ").await;
    assert!(sentence.ends_with(" s: what follows is old."), "{sentence}");
    browser.shows("#rest", "Before that, it said: All is well").await;
    let seen = "return [document.title, document.querySelector('#verdict').className, document.querySelector('#lag').textContent]";
    let database = postgres.database();
    let (title, lag) = (format!("● no answer – prefetchd {database}"), json!("0.0 s"));
    assert_eq!(browser.run(seen).await, json!([title, "verdict silent", lag]));
    browser.is_accessible("a silent daemon").await;
    daemon.signal(Signal::SIGCONT);
    browser.shows("#link", "live").await;
    browser.shows("#sentence", "All is well").await;
    assert_eq!(browser.run("return document.title").await, format!("✓ prefetchd {database}"));
    browser.console_is_empty().await;

    let address = daemon.address();
    daemon.stop().await;
    browser.shows("#link", "all of this is old").await;
    let settings = Settings::new(&postgres, &redis).text("http.listen", &address.to_string());
    let daemon = Daemon::with(&settings).await;
    browser.shows("#link", "live").await;
    psql(&postgres.url("postgres"), "UPDATE categories SET name = 'Again' WHERE id = 'cat-001'");
    browser.shows("#changes li", "cat-001").await;
    drop(daemon);
}

#[tokio::test]
async fn a_stream_that_never_begins_is_shown() {
    let Some(browser) = Browser::start().await else { return };
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.ready().await;
    // As with a daemon that hangs after the page has loaded: neither an event nor an error.
    let silent = json!({"source": "window.EventSource = class { addEventListener() {} close() {} };"});
    browser.devtools("Page.addScriptToEvaluateOnNewDocument", silent).await;
    browser.goes_to(daemon.address()).await;
    browser.shows("#link", "s, trying again").await;
    let sentence = browser.shows("#sentence", "No answer from the daemon for ").await;
    assert!(sentence.ends_with(" s: nothing is known yet."), "{sentence}");
    assert_eq!(browser.run("return document.querySelector('#verdict').className").await, "verdict silent");
}

#[tokio::test]
async fn a_token_is_asked_for_where_one_is_needed() {
    let Some(browser) = Browser::start().await else { return };
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let token = redis.dir().join("token");
    std::fs::write(&token, "open-sesame-open-sesame").unwrap();
    std::fs::set_permissions(&token, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let settings = Settings::new(&postgres, &redis).text("http.admin_token_file", token.to_str().unwrap());
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    browser.open(daemon.address()).await;
    daemon.allow_warning("wrong admin token");
    browser.click("#refetch").await;
    browser.write("#dialog-input", "wrong").await;
    browser.click("#dialog-yes").await;
    eventually(
        "it asks again",
        async || browser.run("return document.querySelector('#dialog-input').value").await,
        |v| v == "",
    )
    .await;
    browser.write("#dialog-input", "open-sesame-open-sesame").await;
    browser.click("#dialog-yes").await;
    browser.shows("#operation-said", "5 rows loaded").await;
    browser.click("#verify").await;
    browser.shows("#operation-said", "no drift").await;
}

#[tokio::test]
async fn the_token_comes_out_of_the_address_and_stays_with_the_tab() {
    let Some(browser) = Browser::start().await else { return };
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let settings = Settings::new(&postgres, &redis);
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    let url = format!("http://{}", daemon.address());
    // Without it, the page shows everything and requests nothing.
    browser.open(&url).await;
    browser.shows("#sentence", "All is well").await;
    assert_eq!(browser.run("return document.querySelector('#read-only').hidden").await, false);
    browser.console_is_empty().await;

    let ran = run_program(&settings, &["page", "--url", &url]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let printed = ran.stdout.trim();
    assert_eq!(printed, format!("{url}/#token={}", daemon.token()));
    // The same page, so only the fragment changes and the browser does not load it again.
    browser.goes_to(printed).await;
    let address =
        eventually("it is taken", async || browser.run("return location.href").await, |v| *v == format!("{url}/"));
    address.await;
    assert_eq!(browser.run("return document.querySelector('#read-only').hidden").await, true);
    browser.click("#verify").await;
    browser.shows("#operation-said", "no drift").await;
    browser.run("location.reload()").await;
    browser.click("#verify").await;
    browser.shows("#operation-said", "no drift").await;
    let kept = browser.run("return [localStorage.length, document.cookie, sessionStorage.length]").await;
    assert_eq!(kept, json!([0, "", 1]));
    browser.console_is_empty().await;

    // Another daemon at the same address has another token.
    let address = daemon.address().to_string();
    daemon.stop().await;
    let daemon = Daemon::with(&settings.text("http.listen", &address)).await;
    daemon.ready().await;
    daemon.allow_warning("wrong admin token");
    browser.shows("#link", "live").await;
    browser.click("#verify").await;
    browser.write("#dialog-input", &daemon.token()).await;
    browser.click("#dialog-yes").await;
    browser.shows("#operation-said", "no drift").await;
}

#[tokio::test]
async fn a_demo_without_its_token_is_read_only() {
    let Some(browser) = Browser::start().await else { return };
    let mut demo = Demo::start(&[]);
    let Printed { address, .. } = demo.ready();
    browser.open(address).await;
    browser.shows("#sentence", "All is well").await;
    browser.shows("#unreadable", "open the address that prefetchd demo printed").await;
    assert_eq!(browser.run("return document.querySelector('#dialog').open").await, false);
    browser.click("#read button:not([type])").await;
    browser.shows("#answer-head .badge", "hit").await;
    browser.console_is_empty().await;
}

/// Pictures for the README: `cargo test --test integration -- --ignored pictures`.
#[tokio::test]
#[ignore = "makes pictures, in $PICTURES"]
async fn pictures() {
    let Some(browser) = Browser::start().await else { return };
    let dir = std::path::PathBuf::from(std::env::var_os("PICTURES").expect("where to put them"));
    let mut demo = Demo::start(&[]);
    let Printed { url, update, .. } = demo.ready();
    browser.open(url).await;
    browser.click("#break-two-tables").await;
    browser.shows("#break-two-tables-said", "looks").await;
    browser.click("#break-flushall").await;
    browser.shows("#break-flushall-said", "healed").await;
    for _ in 0..12 {
        browser.click("#own-writes").await;
        browser.shows("#own-writes-said", "done").await;
    }
    browser.click("#verify").await;
    browser.shows("#operation-said", "no drift").await;
    browser.click("#break-ghost").await;
    browser.shows(&row("cat-ghost"), "orphaned").await;
    paste(&update);
    browser.click(&act("cat-001", "read")).await;
    browser.shows("#answer-fields", "Hot drinks").await;
    for (name, width) in [("desktop", 1280_u64), ("phone", 390)] {
        for scheme in ["light", "dark"] {
            let features = json!([{"name": "prefers-color-scheme", "value": scheme}]);
            browser.devtools("Emulation.setEmulatedMedia", json!({"features": features})).await;
            let metrics =
                |height: u64| json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500});
            browser.devtools("Emulation.setDeviceMetricsOverride", metrics(900)).await;
            let size = browser
                .run("return [document.documentElement.scrollHeight, document.documentElement.scrollWidth]")
                .await;
            assert!(size[1].as_u64() <= Some(width), "the page is wider than the screen: {size}");
            browser.devtools("Emulation.setDeviceMetricsOverride", metrics(size[0].as_u64().unwrap())).await;
            let top =
                json!({"x": 0, "y": 0, "width": width, "height": if width < 500 { 844 } else { 1040 }, "scale": 1});
            for (part, parameters) in [("", json!({})), ("-top", json!({"clip": top}))] {
                let shot = browser.devtools("Page.captureScreenshot", parameters).await;
                let file = dir.join(format!("{name}-{scheme}{part}.png.base64"));
                std::fs::write(file, shot["data"].as_str().unwrap()).unwrap();
            }
        }
    }
}

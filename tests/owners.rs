//! The owner of a table, a type or a schema cannot run code as the role that replicates, which could read the changes
//! of every other table.

use crate::harness::{Daemon, Postgres, Redis, Settings, eventually, run_program};
use bytes::Bytes;
use prefetchd::change::Nonce;
use prefetchd::loader::range::{Range, Sizes, ranges};
use prefetchd::schema::QualifiedName;
use prefetchd::source::connect;
use prefetchd::source::snapshot::{self, Part, ReadRange, ReadRows, Wanted};
use prefetchd::source::target::PostgresTarget;
use serde_json::json;
use std::collections::HashMap;

/// The owner of what is followed, and a role that follows it. `code` creates a slot if it ever runs as that role, and
/// leaves a `search_path` in which functions with the server's names are the owner's.
struct Mallory<'a> {
    postgres: &'a Postgres,
    /// Has REPLICATION.
    role: String,
}

impl<'a> Mallory<'a> {
    async fn moves_in(postgres: &'a Postgres) -> Self {
        let (db, role) = (postgres.database(), format!("role_{}", postgres.database()));
        let made = format!(
            "CREATE ROLE {role} LOGIN REPLICATION; CREATE ROLE mallory_{db} LOGIN;
             CREATE SCHEMA shop AUTHORIZATION mallory_{db}; GRANT ALL ON SCHEMA public TO mallory_{db};
             GRANT USAGE ON SCHEMA shop TO {role}; CREATE EXTENSION citext SCHEMA public;
             SET ROLE mallory_{db};
             CREATE FUNCTION shop.code(what text) RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS $$
             BEGIN
                 IF current_user = '{role}' THEN
                     PERFORM set_config('search_path', 'shop, pg_catalog', false);
                     PERFORM pg_create_physical_replication_slot('{db}_ran_' || what);
                 END IF;
                 RETURN true;
             EXCEPTION WHEN duplicate_object THEN RETURN true;
             END $$;
             CREATE FUNCTION shop.pg_current_snapshot() RETURNS pg_snapshot LANGUAGE plpgsql AS
                 $$ BEGIN PERFORM shop.code('snapshot'); RETURN pg_catalog.pg_current_snapshot(); END $$;
             CREATE FUNCTION shop.pg_logical_emit_message(boolean, text, bytea) RETURNS pg_lsn LANGUAGE plpgsql AS
                 $$ BEGIN PERFORM shop.code('message'); RETURN pg_catalog.pg_logical_emit_message($1, $2, $3); END $$;
             RESET ROLE"
        );
        postgres.execute(&made).await;
        Self { postgres, role }
    }

    async fn does(&self, sql: &str) {
        self.postgres.execute(&format!("SET ROLE mallory_{}; {sql}", self.postgres.database())).await;
    }

    /// Returns what was run.
    async fn ran(&self) -> Option<String> {
        let sql = "SELECT string_agg(slot_name, ' ') FROM pg_replication_slots WHERE slot_name LIKE current_database() || '_ran_%'";
        self.postgres.value(sql).await
    }

    async fn publishes(&self, tables: &str) {
        self.postgres.execute(&format!("GRANT SELECT ON {tables} TO {}", self.role)).await;
        self.postgres.execute(&format!("CREATE PUBLICATION shop FOR TABLE {tables}")).await;
    }

    fn settings(&self, redis: &Redis, tables: &str) -> Settings {
        Settings::new(self.postgres, redis)
            .text("postgres.url", &self.postgres.url(&self.role))
            .text("postgres.publication", "shop")
            .tables(tables)
    }
}

/// Slots outlive their database.
async fn end(mallory: Mallory<'_>) {
    assert_eq!(mallory.ran().await, None);
}

const GOODS: &str = "
    [[tables]]\nname = 'goods'\ntable = 'shop.goods'\nkey = \"goods:{code}:{size}:{label}\"
    [[tables]]\nname = 'boxes'\ntable = 'shop.boxes'\nkey = \"box:{codes}\"
    [[tables]]\nname = 'spans'\ntable = 'shop.spans'\nkey = \"span:{span}\"";

/// Domains with checks, enums with casts, operators that match better, in keys and elsewhere.
const MADE: &str = "
    CREATE DOMAIN shop.num AS text CHECK (shop.code('domain'));
    CREATE DOMAIN shop.inner_label AS public.citext CHECK (shop.code('domain'));
    CREATE DOMAIN shop.label AS shop.inner_label CHECK (shop.code('domain'));
    CREATE TYPE shop.size AS ENUM ('small', 'large');
    CREATE FUNCTION shop.cast_out(shop.size) RETURNS text LANGUAGE plpgsql AS
        $$ BEGIN PERFORM shop.code('cast_out'); RETURN 'small'; END $$;
    CREATE FUNCTION shop.cast_in(text) RETURNS shop.size LANGUAGE plpgsql AS
        $$ BEGIN PERFORM shop.code('cast_in'); RETURN 'small'; END $$;
    CREATE CAST (shop.size AS text) WITH FUNCTION shop.cast_out;
    CREATE CAST (text AS shop.size) WITH FUNCTION shop.cast_in AS IMPLICIT;
    CREATE FUNCTION public.same(shop.label, public.citext) RETURNS boolean LANGUAGE plpgsql AS
        $$ BEGIN RETURN shop.code('operator'); END $$;
    CREATE OPERATOR public.= (FUNCTION = public.same, LEFTARG = shop.label, RIGHTARG = public.citext);
    CREATE TYPE shop.range AS RANGE (subtype = shop.size);
    CREATE TYPE shop.parts AS (a shop.num, b shop.size);
    CREATE TABLE shop.goods (code shop.num, size shop.size, label shop.label, parts shop.parts, codes shop.num[], big text,
                             PRIMARY KEY (code, size, label));
    ALTER TABLE shop.goods ALTER big SET STORAGE EXTERNAL;
    CREATE TABLE shop.boxes (codes shop.num[] PRIMARY KEY, v text);
    CREATE TABLE shop.spans (span shop.range PRIMARY KEY, v text);
    INSERT INTO shop.goods SELECT n, 'large', 'L' || n, ('(' || n || ',small)')::shop.parts, ARRAY[n::text], repeat('x', 9000)
      FROM generate_series(1, 50) n;
    INSERT INTO shop.boxes SELECT ARRAY[n::text, 'it''s'], 'v' FROM generate_series(1, 50) n;
    INSERT INTO shop.spans VALUES ('[small,small]', 'v'), ('[small,large]', 'v')";

#[tokio::test]
async fn no_command_runs_what_types_and_operators_bring() {
    let (postgres, redis) = (Postgres::shared(), Redis::with(&["--maxmemory", "500mb"]));
    let mallory = Mallory::moves_in(&postgres).await;
    mallory.does(MADE).await;
    mallory.publishes("shop.goods, shop.boxes, shop.spans").await;
    let settings = mallory.settings(&redis, GOODS);
    let checked = run_program(&settings, &["check"]).await;
    assert_eq!((checked.code, mallory.ran().await), (Some(0), None), "{checked:?}");

    let daemon = Daemon::with(&settings).await;
    daemon.allow_warning("verify with repair of");
    daemon.ready().await;
    assert_eq!(redis.keys("*:*").await.iter().filter(|key| !key.starts_with("prefetchd:")).count(), 102);
    // Keys of all kinds: some that no row has, and some that no row can have.
    let orphans =
        ["goods:7:large:nobody", "goods:7:huge:L7", "box:{none}", "box:{none", "span:[large,large]", "span:huge"];
    for orphan in orphans {
        redis.command::<()>(&["HSET", orphan, "v", "v"]).await;
    }
    let changes = "UPDATE shop.goods SET codes = '{}' WHERE code = '7'; UPDATE shop.boxes SET v = 'w';
                   UPDATE shop.spans SET v = 'w'; DELETE FROM shop.boxes WHERE 'x' = ANY (codes)";
    redis.command::<()>(&["DEL", "goods:7:large:L7"]).await;
    daemon.applied(postgres.execute(changes).await).await;
    let hash =
        eventually("it is read again", async || redis.hash("goods:7:large:L7").await, |row| row.len() == 6).await;
    assert_eq!((&*hash["parts"], &*hash["codes"], hash["big"].len()), ("(7,small)", "{}", 9000));
    for table in ["goods", "boxes", "spans"] {
        let verify = daemon.operate("verify", &json!({"table": table, "repair": true})).await.json();
        assert_eq!(
            (&verify["orphaned"], &verify["missing"], &verify["stale"]),
            (&json!(2), &json!(0), &json!(0)),
            "{verify}"
        );
        let refetch = daemon.operate("refetch", &json!({"table": table})).await;
        assert_eq!(refetch.status, 200, "{refetch:?}");
        let again = daemon.operate("verify", &json!({"table": table, "repair": true})).await.json();
        assert_eq!(
            (&again["orphaned"], &again["missing"], &again["stale"]),
            (&json!(0), &json!(0), &json!(0)),
            "{again}"
        );
    }
    daemon.operate("invalidate", &json!({"table": "boxes", "keys": ["{1,it's}"]})).await;
    assert_eq!(daemon.stop().await, Some(0));
    let torn = run_program(&settings, &["teardown", "--keys"]).await;
    assert_eq!(torn.code, Some(0), "{torn:?}");
    end(mallory).await;
}

/// Read in key order.
#[tokio::test]
async fn a_role_with_some_columns_runs_nothing_either() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let mallory = Mallory::moves_in(&postgres).await;
    mallory.does(MADE).await;
    mallory.does(&format!("GRANT SELECT (code, size, label, codes) ON shop.goods TO {}", mallory.role)).await;
    postgres.execute("CREATE PUBLICATION shop FOR TABLE shop.goods").await;
    mallory.does("INSERT INTO shop.goods SELECT n, 'small', 'L' || n FROM generate_series(1, 3000) n").await;
    let tables = "[[tables]]\nname = 'goods'\ntable = 'shop.goods'\nkey = \"goods:{code}:{size}:{label}\"
                  columns = ['code', 'size', 'label', 'codes']";
    let daemon = Daemon::with(&mallory.settings(&redis, tables)).await;
    daemon.ready().await;
    assert_eq!(redis.keys("goods:*").await.len(), 3050);
    assert_eq!(daemon.stop().await, Some(0));
    end(mallory).await;
}

const ITEMS: &str = "[[tables]]\nname = 'items'\ntable = 'shop.items'\nkey = \"item:{id}\"";

/// The planner calls IMMUTABLE functions of constants before anything is read.
#[tokio::test]
async fn a_table_whose_planning_would_run_code_is_not_read() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let mallory = Mallory::moves_in(&postgres).await;
    let table = "CREATE TABLE shop.items (id int, v text, PRIMARY KEY (id)) PARTITION BY RANGE (id);
                 CREATE TABLE shop.part PARTITION OF shop.items DEFAULT;
                 INSERT INTO shop.items SELECT n, 'v' FROM generate_series(1, 100) n";
    mallory.does(table).await;
    postgres.execute(&format!("GRANT SELECT ON shop.items, shop.part TO {}", mallory.role)).await;
    postgres.execute("CREATE PUBLICATION shop FOR TABLE shop.items WITH (publish_via_partition_root = true)").await;
    // The planner does not read it unless told to.
    mallory.does("ALTER TABLE shop.items ADD CHECK (shop.code('constraint') OR v = '')").await;
    let database = postgres.database();
    postgres.execute(&format!("ALTER DATABASE {database} SET constraint_exclusion = on")).await;
    let settings = mallory.settings(&redis, ITEMS);
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    for (holder, gone) in [
        ("CREATE INDEX code ON shop.part ((shop.code('index') OR v = ''))", "DROP INDEX shop.code"),
        ("CREATE INDEX code ON shop.part (v) WHERE shop.code('predicate') OR v = ''", "DROP INDEX shop.code"),
        (
            "CREATE STATISTICS shop.code ON (shop.code('statistics') OR v = ''), v FROM shop.part",
            "DROP STATISTICS shop.code",
        ),
    ] {
        mallory.does(holder).await;
        let refetch = daemon.operate("refetch", &json!({"table": "items"})).await;
        assert_ne!(refetch.status, 200, "{holder}: {refetch:?}");
        let verify = daemon.operate("verify", &json!({"table": "items"})).await;
        assert_ne!(verify.status, 200, "{holder}: {verify:?}");
        let checked = run_program(&settings, &["check"]).await;
        assert_eq!(checked.code, Some(78), "{holder}: {checked:?}");
        assert!(
            checked.stdout.contains("uses shop.code(text)") && checked.stdout.contains("postgres.reader_url"),
            "{checked:?}"
        );
        assert_eq!(mallory.ran().await, None, "{holder}");
        mallory.does(gone).await;
        daemon.ready().await;
    }
    daemon.allow_warnings();
    assert_eq!(daemon.stop().await, Some(0));
    // The owner of the table gains nothing from a superuser's function.
    postgres.execute("CREATE FUNCTION shop.kind(text) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT lower($1)'").await;
    mallory.does("CREATE INDEX kind ON shop.part (shop.kind(v)) WHERE v IS NOT NULL").await;
    let checked = run_program(&settings, &["check"]).await;
    assert_eq!(checked.code, Some(0), "{checked:?}");
    end(mallory).await;
}

/// At startup and later: the owner of one table cannot prevent other tables from being followed.
#[tokio::test]
async fn a_table_that_would_run_code_keeps_no_other_from_starting() {
    let (postgres, redis) = (Postgres::shared(), Redis::with(&["--maxmemory", "500mb"]));
    let mallory = Mallory::moves_in(&postgres).await;
    let table = "CREATE TABLE shop.items (id int PRIMARY KEY, v text); INSERT INTO shop.items VALUES (1, 'v');
                 CREATE TABLE shop.other (id int PRIMARY KEY, v text); INSERT INTO shop.other VALUES (1, 'v');
                 CREATE INDEX code ON shop.items ((shop.code('index') OR v = ''))";
    mallory.does(table).await;
    mallory.publishes("shop.items, shop.other").await;
    let other = "[[tables]]\nname = 'other'\ntable = 'shop.other'\nkey = \"other:{id}\"";
    let settings = mallory.settings(&redis, &format!("{ITEMS}\n{other}"));
    let table = |status: &serde_json::Value, name: &str| {
        let mut tables = status["tables"].as_array().unwrap().iter();
        tables.find(|table| table["name"] == name).unwrap().clone()
    };
    let blocks = async |daemon: &Daemon| {
        daemon.allow_warnings();
        let is_so =
            |s: &serde_json::Value| table(s, "items")["state"] == "blocked" && table(s, "other")["state"] == "loaded";
        let status = daemon.status_when("the one is blocked, the other loaded", is_so).await;
        let because = table(&status, "items")["because"].as_str().unwrap_or_default().to_owned();
        assert!(because.contains("uses shop.code(text)"), "{status}");
    };
    let daemon = Daemon::with(&settings).await;
    blocks(&daemon).await;
    daemon.applied(postgres.execute("UPDATE shop.other SET v = 'w'").await).await;
    assert_eq!(redis.hash("other:1").await["v"], "w");
    mallory.does("DROP INDEX shop.code").await;
    daemon.ready().await;
    assert_eq!(daemon.stop().await, Some(0));
    // Also over a restart.
    mallory.does("CREATE INDEX code ON shop.items ((shop.code('index') OR v = ''))").await;
    let daemon = Daemon::with(&settings).await;
    blocks(&daemon).await;
    mallory.does("DROP INDEX shop.code").await;
    daemon.ready().await;
    assert_eq!(redis.hash("item:1").await["v"], "v");
    assert_eq!(daemon.stop().await, Some(0));
    end(mallory).await;
}

#[tokio::test]
async fn a_view_in_the_place_of_a_table_is_not_read() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let mallory = Mallory::moves_in(&postgres).await;
    mallory.does("CREATE TABLE shop.items (id int PRIMARY KEY, v text); INSERT INTO shop.items VALUES (1, 'v')").await;
    mallory.publishes("shop.items").await;
    let daemon = Daemon::with(&mallory.settings(&redis, ITEMS)).await;
    daemon.ready().await;
    let view = format!(
        "ALTER TABLE shop.items RENAME TO other;
         CREATE VIEW shop.items AS SELECT id, v FROM shop.other WHERE shop.code('view') AND shop.code('view_' || id);
         GRANT SELECT ON shop.items TO {}",
        mallory.role
    );
    mallory.does(&view).await;
    for operation in ["verify", "refetch"] {
        let answer = daemon.operate(operation, &json!({"table": "items"})).await;
        assert_ne!(answer.status, 200, "{operation}: {answer:?}");
    }
    daemon.status_when("blocked", |status| status["tables"][0]["state"] == "blocked").await;
    daemon.allow_warnings();
    assert_eq!(daemon.stop().await, Some(0));
    end(mallory).await;
}

/// Between a check of the catalog and a read, and in a session that something has changed.
#[tokio::test]
async fn what_comes_after_the_look_is_not_run_either() {
    let postgres = Postgres::shared();
    let mallory = Mallory::moves_in(&postgres).await;
    mallory.does("CREATE TABLE shop.items (id int PRIMARY KEY, v text); INSERT INTO shop.items VALUES (1, 'v')").await;
    mallory.publishes("shop.items").await;
    let target = PostgresTarget::parse(&postgres.url(&mallory.role), &HashMap::new()).unwrap();
    let client = connect::connect(&target, "owners").await.unwrap();
    client.batch_execute("SET search_path = shop, pg_catalog").await.unwrap();
    let name = QualifiedName { schema: "shop".to_owned(), table: "items".to_owned() };
    let table = snapshot::describe(&client, &name, "shop", &[], Sizes::Measured).await.unwrap().unwrap();
    snapshot::sample(&client, "none").await.unwrap();
    snapshot::emit_marks(&client, &[Nonce([0; 16])]).await.unwrap();
    snapshot::read_range(&client, Part { table: &table, range: &Range::leaf(0) }, 1_000, |_| {}).await.unwrap();
    assert_eq!(mallory.ran().await, None);
    let view = format!(
        "DROP INDEX shop.code; ALTER TABLE shop.items RENAME TO other;
         CREATE VIEW shop.items AS SELECT id, v FROM shop.other WHERE shop.code('view') AND shop.code('view_' || id);
         GRANT SELECT ON shop.items TO {}",
        mallory.role
    );
    for change in ["CREATE INDEX code ON shop.items ((shop.code('index') OR v = ''))", &view] {
        mallory.does(change).await;
        let range = snapshot::read_range(&client, Part { table: &table, range: &Range::leaf(0) }, 1_000, |_| {})
            .await
            .unwrap_err();
        let (key, keys) = (["id".to_owned()], [vec![Bytes::from_static(b"1")]]);
        let key = snapshot::read_keys(&client, &table, &key, &keys, Wanted::WholeRows, |_| {}).await.unwrap_err();
        for error in [range, key] {
            assert!(error.is_about_the_table(), "{change}: {error}");
        }
        assert_eq!(mallory.ran().await, None, "{change}");
    }
}

/// One role replicates but reads no table, the other reads but may not replicate.
struct TwoRoles<'a> {
    mallory: Mallory<'a>,
    reader: String,
}

impl TwoRoles<'_> {
    async fn of(postgres: &Postgres) -> TwoRoles<'_> {
        let mallory = Mallory::moves_in(postgres).await;
        mallory.does("CREATE TABLE shop.items (id int PRIMARY KEY, v text, big text)").await;
        mallory.does("INSERT INTO shop.items SELECT n, 'v', repeat('x', 9000) FROM generate_series(1, 100) n").await;
        let reader = format!("reader_{}", postgres.database());
        let made = format!(
            "CREATE ROLE {reader} LOGIN; GRANT USAGE ON SCHEMA shop TO {reader}; GRANT SELECT ON shop.items TO {reader};
             CREATE PUBLICATION shop FOR TABLE shop.items"
        );
        postgres.execute(&made).await;
        TwoRoles { mallory, reader }
    }

    fn settings(&self, redis: &Redis) -> Settings {
        let reader = self.mallory.postgres.url(&self.reader);
        self.mallory.settings(redis, ITEMS).env("PREFETCHD__POSTGRES__READER_URL", &reader)
    }
}

#[tokio::test]
async fn two_roles_share_the_work() {
    let (postgres, redis) = (Postgres::shared(), Redis::with(&["--maxmemory", "500mb"]));
    let roles = TwoRoles::of(&postgres).await;
    let TwoRoles { mallory, reader } = &roles;
    // It may be planned, because little could be gained from it.
    mallory.does("CREATE INDEX code ON shop.items ((shop.code('index') OR v = ''))").await;
    let settings = roles.settings(&redis);
    let checked = run_program(&settings, &["check", "--all"]).await;
    assert_eq!(checked.code, Some(0), "{checked:?}");
    assert!(checked.stdout.contains(&format!("role {reader} may read, but not replicate")), "{checked:?}");

    let daemon = Daemon::with(&settings).await;
    daemon.allow_warning("verify with repair of");
    daemon.ready().await;
    let sessions = format!(
        "SELECT string_agg(DISTINCT usename || ' ' || backend_type, ', ') FROM pg_stat_activity
          WHERE application_name = 'prefetchd_{}'",
        postgres.slot()
    );
    let expected = format!("{reader} client backend, {} walsender", mallory.role);
    eventually("each has its own", async || postgres.value(&sessions).await, |s| s.as_ref() == Some(&expected)).await;
    redis.command::<()>(&["DEL", "item:7"]).await;
    let changes = "UPDATE shop.items SET v = 'w' WHERE id = 7; DELETE FROM shop.items WHERE id = 8;
                   INSERT INTO shop.items VALUES (101, 'n')";
    daemon.applied(postgres.execute(changes).await).await;
    eventually("it is read again", async || redis.hash("item:7").await, |row| row.len() == 3).await;
    redis.command::<()>(&["HSET", "item:999", "v", "v"]).await;
    let verify = daemon.operate("verify", &json!({"table": "items", "repair": true})).await.json();
    assert_eq!(
        (&verify["rows"], &verify["orphaned"], &verify["missing"]),
        (&json!(100), &json!(1), &json!(0)),
        "{verify}"
    );
    let refetch = daemon.operate("refetch", &json!({"table": "items"})).await;
    assert_eq!(refetch.json()["loaded"], 100, "{refetch:?}");
    // A second daemon takes over.
    let second = Daemon::with(&settings).await;
    second.status_when("a standby", |status| status["state"] == "standby").await;
    assert_eq!(daemon.stop().await, Some(0));
    second.status_when("streaming", |status| status["state"] == "streaming").await;
    assert_eq!(second.stop().await, Some(0));

    let torn = run_program(&settings, &["teardown", "--keys"]).await;
    assert_eq!(torn.code, Some(0), "{torn:?}");
    assert!(torn.stdout.contains(&format!("slot {}: dropped", postgres.slot())), "{torn:?}");
    assert_eq!(mallory.ran().await, None);
}

#[tokio::test]
async fn each_role_is_asked_for_what_it_needs() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let roles = TwoRoles::of(&postgres).await;
    let settings = roles.settings(&redis);
    let (reader, role) = (&roles.reader, &roles.mallory.role);
    for (change, back, code, said) in [
        (
            format!("REVOKE SELECT ON shop.items FROM {reader}"),
            format!("GRANT SELECT ON shop.items TO {reader}"),
            78,
            format!("GRANT SELECT ON shop.items TO {reader};"),
        ),
        (
            format!("ALTER ROLE {role} NOREPLICATION"),
            format!("ALTER ROLE {role} REPLICATION"),
            78,
            format!("ALTER ROLE {role} REPLICATION;"),
        ),
        (
            format!("ALTER ROLE {reader} REPLICATION"),
            format!("ALTER ROLE {reader} NOREPLICATION"),
            0,
            format!("ALTER ROLE {reader} NOREPLICATION;"),
        ),
    ] {
        postgres.execute(&change).await;
        let checked = run_program(&settings, &["check"]).await;
        assert_eq!(checked.code, Some(code), "{change}: {checked:?}");
        assert!(checked.stdout.contains(&said), "{change}: {checked:?}");
        postgres.execute(&back).await;
    }
}

#[tokio::test]
async fn a_reader_of_another_database_or_system_is_refused() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let roles = TwoRoles::of(&postgres).await;
    let (beside, elsewhere) = (postgres.another_database(), Postgres::own(&[]));
    for (url, what) in [(beside.url(&roles.reader), "database"), (elsewhere.url("prefetchd"), "system")] {
        let settings = roles.mallory.settings(&redis, ITEMS).text("postgres.reader_url", &url);
        for command in ["check", "run"] {
            let ran = run_program(&settings, &[command]).await;
            assert_eq!(ran.code, Some(78), "{ran:?}");
            assert!(ran.said().contains(&format!("postgres.reader_url leads to {what}")), "{ran:?}");
        }
    }
    assert_eq!(redis.keys("*").await, [""; 0], "nothing was made");
}

/// What planning calls besides a table's own expressions: the partition keys of its parents, the subtype difference of
/// a range.
#[tokio::test]
async fn ancestors_and_ranges_run_nothing() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let mallory = Mallory::moves_in(&postgres).await;
    let tables = "CREATE TABLE shop.whole (id int, v text) PARTITION BY LIST ((shop.code('ancestor') AND v = 'v'));
                  CREATE TABLE shop.items PARTITION OF shop.whole FOR VALUES IN (true) PARTITION BY RANGE (id);
                  CREATE TABLE shop.part PARTITION OF shop.items DEFAULT;
                  ALTER TABLE shop.items ADD PRIMARY KEY (id);
                  INSERT INTO shop.whole SELECT n, 'v' FROM generate_series(1, 100) n;
                  CREATE FUNCTION shop.gap(float8, float8) RETURNS float8 LANGUAGE plpgsql IMMUTABLE AS
                      $$ BEGIN PERFORM shop.code('difference'); RETURN $1 - $2; END $$;
                  CREATE TYPE shop.range AS RANGE (subtype = float8, subtype_diff = shop.gap);
                  CREATE TABLE shop.spans (span shop.range PRIMARY KEY, v text, hidden text);
                  INSERT INTO shop.spans SELECT shop.range(n, n + 1), 'v' FROM generate_series(1, 3000) n;
                  ANALYZE shop.spans";
    mallory.does(tables).await;
    postgres.execute(&format!("GRANT SELECT ON shop.items, shop.part TO {}", mallory.role)).await;
    mallory.does(&format!("GRANT SELECT (span, v) ON shop.spans TO {}", mallory.role)).await;
    postgres
        .execute("CREATE PUBLICATION shop FOR TABLE shop.items, shop.spans WITH (publish_via_partition_root = true)")
        .await;
    let checked = run_program(&mallory.settings(&redis, ITEMS), &["check"]).await;
    assert_eq!(checked.code, Some(78), "{checked:?}");
    assert!(checked.stdout.contains("uses shop.code(text)"), "{checked:?}");
    let spans = "[[tables]]\nname = 'spans'\ntable = 'shop.spans'\nkey = \"span:{span}\"\ncolumns = ['span', 'v']";
    let daemon = Daemon::with(&mallory.settings(&redis, spans)).await;
    daemon.allow_warnings();
    daemon.status_when("blocked", |status| status["tables"][0]["state"] == "blocked").await;
    postgres.execute(&format!("GRANT SELECT ON shop.spans TO {}", mallory.role)).await;
    daemon.ready().await;
    assert_eq!(daemon.stop().await, Some(0));
    end(mallory).await;
}

/// Casts are chosen for the types of a moment ago.
#[tokio::test]
async fn a_column_that_gets_another_type_is_not_cast() {
    let postgres = Postgres::shared();
    let mallory = Mallory::moves_in(&postgres).await;
    let table =
        "CREATE TABLE shop.items (id text PRIMARY KEY, v text, hidden text); INSERT INTO shop.items VALUES ('1', 'v');
                 CREATE TYPE shop.trap AS (id text);
                 CREATE FUNCTION shop.sprung(shop.trap) RETURNS text LANGUAGE plpgsql AS
                     $$ BEGIN PERFORM shop.code('cast'); RETURN $1.id; END $$;
                 CREATE CAST (shop.trap AS text) WITH FUNCTION shop.sprung";
    mallory.does(table).await;
    mallory.does(&format!("GRANT SELECT (id, v) ON shop.items TO {}", mallory.role)).await;
    postgres.execute("CREATE PUBLICATION shop FOR TABLE shop.items").await;
    let target = PostgresTarget::parse(&postgres.url(&mallory.role), &HashMap::new()).unwrap();
    let client = connect::connect(&target, "owners").await.unwrap();
    let name = QualifiedName { schema: "shop".to_owned(), table: "items".to_owned() };
    let chosen = ["id".to_owned(), "v".to_owned()];
    let table = snapshot::describe(&client, &name, "shop", &chosen, Sizes::Measured).await.unwrap().unwrap();
    let mut range = ranges(&table.extent(), 1).remove(0);
    range.at_most_rows = std::num::NonZeroU64::new(1);
    let read = snapshot::read_range(&client, Part { table: &table, range: &range }, 1_000, |_| {}).await.unwrap();
    let ReadRange::Rows(ReadRows { rest: Some(rest), .. }) = read else { panic!("there is more: {read:?}") };
    mallory.does("ALTER TABLE shop.items ALTER id TYPE shop.trap USING ROW(id)::shop.trap").await;
    let range = snapshot::read_range(&client, Part { table: &table, range: &rest }, 1_000, |_| {}).await.unwrap_err();
    let (key, keys) = (["id".to_owned()], [vec![Bytes::from_static(b"1")]]);
    let key = snapshot::read_keys(&client, &table, &key, &keys, Wanted::WholeRows, |_| {}).await.unwrap_err();
    for error in [range, key] {
        assert!(error.is_about_the_table(), "{error}");
    }
    end(mallory).await;
}

use super::schema::tests::accepts;
use super::*;

const TABLE: &str = "[[tables]]\nname = \"c\"\ntable = \"c\"\nkey = \"c:{id}\"\n";

fn env(variables: &[(&str, &str)]) -> HashMap<String, String> {
    variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn parse(text: &str, variables: &[(&str, &str)]) -> Result<Config, ConfigError> {
    Config::parse(text, "f.toml", &env(variables))
}

/// Parses these settings, with a table.
fn with(text: &str) -> Result<Config, ConfigError> {
    parse(&format!("{text}\n{TABLE}"), &[])
}

fn table(more: &str) -> Result<Config, ConfigError> {
    parse(&format!("{TABLE}{more}"), &[])
}

#[track_caller]
fn refused(result: Result<Config, ConfigError>, parts: &[&str]) {
    let error = result.expect_err("refused").to_string();
    for part in parts {
        assert!(error.contains(part), "{part:?} is missing: {error}");
    }
}

#[test]
fn a_token_that_can_be_guessed_is_refused_and_a_secret_that_others_can_read_draws_a_warning() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let text = format!("[http]\nadmin_token_file = {:?}", file.path());
    std::fs::write(&file, "fifteen-letters\n").unwrap();
    refused(with(&text), &["http.admin_token_file", "15 characters", "openssl"]);
    assert!(!with(&text).unwrap_err().to_string().contains("fifteen"));
    std::fs::write(&file, "sixteen-letters!\n").unwrap();
    for (mode, warnings) in [(0o600, 0), (0o644, 1)] {
        std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
        let config = with(&text).unwrap();
        assert_eq!(config.warnings.len(), warnings, "{:?}", config.warnings);
    }
}

#[test]
fn a_file_with_a_password_that_others_can_read_draws_a_warning() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let name = file.path().to_str().unwrap();
    let (with, without) = ("postgres://me:secret@h/d", "postgres://me@h/d");
    for (text, variables, mode, warned) in [
        (format!("[postgres]\nurl = '{with}'"), &[][..], 0o600, false),
        (format!("[postgres]\nurl = '{with}'"), &[], 0o644, true),
        (format!("[postgres]\nurl = '{without}'"), &[], 0o644, false),
        (format!("[postgres]\nurl = '{without}'"), &[("PREFETCHD__POSTGRES__URL", with)], 0o644, false),
        (format!("[postgres]\nreader_url = '{with}'"), &[], 0o644, true),
        ("[redis]\nurl = 'redis://:secret@h'".to_owned(), &[], 0o604, true),
        (String::new(), &[], 0o644, false),
    ] {
        std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
        let config = Config::parse(&format!("{text}\n{TABLE}"), name, &env(variables)).unwrap();
        let named = config.warnings.iter().any(|w| w.text.contains("configuration file") && w.text.contains("chmod"));
        assert_eq!(named, warned, "{text} {mode:o}: {:?}", config.warnings);
        assert!(!format!("{:?}", config.warnings).contains("secret"));
    }
}

#[test]
fn the_commented_file_holds_every_key_with_its_default() {
    let text = include_str!("../../config/prefetchd.toml");
    let values = config::File::from_str(text, FileFormat::Toml).collect().expect("TOML");
    for (key, kind, default) in SETTINGS {
        let (section, name) = key.split_once('.').expect("a section");
        let written = values[section].clone().into_table().expect("a table").remove(name);
        let written = written.unwrap_or_else(|| panic!("{key} is missing"));
        let written = match kind {
            Kind::Command => {
                let words = written.into_array().expect("a list").into_iter().map(|word| word.to_string());
                serde_json::to_string(&words.collect::<Vec<_>>()).expect("JSON")
            }
            Kind::Names => written.into_array().expect("a list").into_iter().map(|name| name.to_string()).collect(),
            _ => written.into_string().expect("a scalar"),
        };
        assert_eq!(&written, default, "{key}, a {kind:?}");
    }
    let entry = values["tables"].clone().into_array().expect("a list").remove(0).into_table().expect("a table");
    for key in TABLE_KEYS {
        assert!(entry.contains_key(key), "{key} of [[tables]]");
    }
    let config = Config::parse(text, "config/prefetchd.toml", &HashMap::new()).expect("it holds");
    assert_eq!(config.tables.len(), 1);
    assert_eq!(config.tables[0].table.to_string(), "public.categories");
    assert_eq!(config.tables[0].key.to_string(), "cache:category:{id}");
    assert_eq!((config.tables[0].null, config.tables[0].ttl_ms), (NullRule::Empty, 86_400_000));
    assert_eq!(config.tables[0].format, Format::Hash);
}

#[test]
fn lookups_are_read_and_shown_again() {
    let text = format!(
        "{TABLE}\n[[tables.lookups]]\nname = \"by_tag\"\nkey = \"a-by:{{{{x}}}}:{{tags[]}}:{{id}}\"\n\
         [[tables.lookups]]\nname = \"all\"\nkey = \"a-all\"\norder = \"place\"\n"
    );
    let config = Config::parse(&text, "f", &HashMap::new()).expect("lookups");
    let [by_tag, all] = &config.tables[0].lookups[..] else { panic!("{:?}", config.tables[0].lookups) };
    assert_eq!((by_tag.key.literal.as_str(), by_tag.order.as_deref()), ("a-by:{x}:", None));
    let columns: Vec<_> = by_tag.key.columns.iter().map(|column| (column.name.as_str(), column.each_element)).collect();
    assert_eq!(columns, [("tags", true), ("id", false)]);
    assert_eq!((all.key.to_string().as_str(), all.order.as_deref()), ("a-all", Some("place")));
    let again = Config::parse(&config.to_toml(), "f", &HashMap::new()).expect("as it was shown");
    assert_eq!(again.tables, config.tables);
    assert!(config.lookup_prefixes() == ["a-by:{x}:", "a-all"] && !config.one_slot());
}

#[test]
fn a_change_stream_lies_beside_all_other_keys() {
    let with = |key: &str, more: &str| with(&format!("[changes]\nstream = \"{key}\"\n{more}"));
    let config = with("changes", "max_len = 5").expect("a key of its own");
    assert_eq!(config.changes, Some(ChangeStream::at("changes", 5)));
    refused(with("prefetchd:changes", ""), &["changes.stream in f.toml", "belongs to prefetchd itself"]);
    refused(with("c:changes", ""), &["changes.stream in f.toml", "\"c:\" of table \"c\"", "begin the same way"]);
    refused(with("c", ""), &["changes.stream in f.toml", "begin the same way"]);
    refused(with("changes", "max_len = 0"), &["changes.max_len in f.toml", "above 0"]);
    let most = parse(TABLE, &[("PREFETCHD__CHANGES__MAX_LEN", "9223372036854775808")]);
    refused(most, &["PREFETCHD__CHANGES__MAX_LEN", "more than Redis can count"]);
    let lookup = format!("{TABLE}\n[[tables.lookups]]\nname = \"all\"\nkey = \"changes-all\"\n");
    refused(parse(&format!("[changes]\nstream = \"changes\"\n{lookup}"), &[]), &["changes.stream", "changes-all"]);
}

#[test]
fn documents_of_redisjson_have_no_lookups() {
    let lookup = "[[tables.lookups]]\nname = \"all\"\nkey = \"all\"\n";
    let with = |format: &str| parse(&format!("{TABLE}\nformat = \"{format}\"\n{lookup}"), &[]);
    refused(with("redisjson"), &["lookups of table \"c\"", "\"redisjson\"", "RediSearch"]);
    assert_eq!(with("json").expect("rows in JSON have them").tables[0].format, Format::Json);
    let cluster = [("PREFETCHD__REDIS__URL", "redis+cluster://127.0.0.1:1")];
    let documents = parse(&format!("{TABLE}\nformat = \"redisjson\"\n"), &cluster);
    refused(documents, &["table \"c\" in f.toml", "RedisJSON", "one hash slot", "format = \"json\""]);
}

#[test]
fn a_lookup_that_alone_takes_keys_out_of_one_hash_slot_is_warned_of() {
    let table = "[[tables]]\nname = \"c\"\ntable = \"c\"\nkey = \"{{prefetchd}}:c:{id}\"\n";
    let warned = |lookup: &str, url: &str| {
        let lookup = format!("[[tables.lookups]]\nname = \"all\"\nkey = \"{lookup}\"\n");
        let config = parse(&format!("{table}{lookup}"), &[("PREFETCHD__REDIS__URL", url)]).expect("it is accepted");
        config
            .warnings
            .iter()
            .any(|warning| warning.text.contains("all rows lie in one hash slot") && warning.text.contains("\"all\""))
    };
    let (cluster, one) = ("redis+cluster://127.0.0.1:1", "redis://127.0.0.1:1");
    assert!(warned("all", cluster));
    assert!(!warned("{{prefetchd}}:all", cluster) && !warned("all", one));
}

#[test]
fn what_is_not_given_has_its_default() {
    let config = with("").expect("a table is enough");
    assert_eq!(config.postgres.target.describe(), "127.0.0.1:5432/shop");
    assert_eq!((config.postgres.slot.as_str(), config.postgres.publication.as_str()), ("prefetchd", "prefetchd"));
    assert_eq!((config.postgres.create, config.postgres.failover), (Create::WhereMissing, false));
    assert_eq!(config.redis.target.to_string(), "127.0.0.1:6379/0");
    assert_eq!(config.cache.max_staleness, Duration::from_secs(30));
    assert_eq!((config.cache.max_atomic_changes, config.cache.max_atomic_bytes), (10_000, 64_000_000));
    assert_eq!(config.cache.verify_every, Some(Duration::from_secs(86_400)));
    assert_eq!(config.http.listen.to_string(), "127.0.0.1:8787");
    assert_eq!((config.http.admin_token, config.http.page), (None, true));
    assert!(config.http.hosts.is_empty());
    assert_eq!((config.log.level.as_str(), config.log.format), ("info", LogFormat::Text));
}

#[test]
fn names_are_a_list_in_the_file_and_stand_between_commas_in_a_variable() {
    let text = format!("[http]\nhosts = [\"Cache.Example.\", \"[fd00::7]\"]\n{TABLE}");
    let config = parse(&text, &[]).expect("good");
    assert_eq!(config.http.hosts, ["cache.example", "fd00::7"]);
    assert!(config.to_toml().contains("hosts = [\"Cache.Example.\", \"[fd00::7]\"]"), "{}", config.to_toml());
    let config = parse(&text, &[("PREFETCHD__HTTP__HOSTS", "a.example, b.example")]).expect("good");
    assert_eq!(config.http.hosts, ["a.example", "b.example"]);
}

#[test]
fn the_environment_holds_over_the_file_and_is_taken_as_it_is() {
    let text = format!("[postgres]\nslot = \"a\"\ncreate = true\n{TABLE}");
    let config = parse(
        &text,
        &[
            ("PREFETCHD__POSTGRES__SLOT", "00123"),
            ("PREFETCHD__POSTGRES__CREATE", "false"),
            ("PREFETCHD__REDIS__URL", "redis://:00123@r:1/2"),
            ("PREFETCHD__CACHE__MAX_ATOMIC_CHANGES", "7"),
            ("PREFETCHD__CACHE__MAX_ATOMIC_BYTES", "1MiB"),
            ("PREFETCHD__CACHE__TTL", "90s"),
            ("PREFETCHD__CACHE__VERIFY_EVERY", "0s"),
            ("prefetchd__http__page", "false"),
            ("PREFETCHD_OTHER", "x"),
            ("PREFETCHDX__REDIS__URL", "x"),
        ],
    )
    .expect("good variables");
    assert_eq!((config.postgres.slot.as_str(), config.postgres.create), ("00123", Create::Never));
    assert_eq!(redis_password(&config.redis.target).as_deref(), Some("00123"));
    assert_eq!((config.cache.max_atomic_changes, config.cache.max_atomic_bytes), (7, 1_048_576));
    assert_eq!((config.tables[0].ttl_ms, config.cache.verify_every, config.http.page), (90_000, None, false));
}

#[test]
fn unknown_keys_are_named_with_the_nearest_valid_one() {
    for (text, parts) in [
        ("[postgres]\nurll = \"x\"", ["postgres.urll in f.toml", "did you mean postgres.url?"]),
        ("[postgre]\nurl = \"x\"", ["postgre.url in f.toml", "postgres.url?"]),
        ("[cache]\ndurability = \"memory\"", ["cache.durability", "redis.durability?"]),
        ("[cache]\nmax_stalenes = \"1s\"", ["cache.max_stalenes ", "cache.max_staleness?"]),
        ("[redis.url]\nhost = \"x\"", ["redis.url in f.toml", "write a string"]),
        ("[redis.pool]\nsize = 5", ["redis.pool in f.toml", "did you mean"]),
        ("redis = \"x\"", ["redis in f.toml", "write [redis]"]),
        ("ttl = \"1s\"", ["ttl in f.toml", "cache.ttl?"]),
        ("[nonsense]", ["nonsense in f.toml", "did you mean"]),
    ] {
        refused(with(text), &parts);
        assert!(!accepts(&format!("{text}\n{TABLE}")), "the schema accepts {text}");
    }
    refused(table("colums = []"), &["colums of table \"c\" in f.toml", "did you mean columns?"]);
    assert!(!accepts(&format!("{TABLE}colums = []")));
    for (variable, parts) in [
        ("PREFETCHD__REDIS__URLL", ["PREFETCHD__REDIS__URLL", "PREFETCHD__REDIS__URL?"]),
        ("PREFETCHD__REDIS", ["PREFETCHD__REDIS:", "did you mean"]),
        ("PREFETCHD__REDIS__URL__X", ["PREFETCHD__REDIS__URL__X:", "PREFETCHD__REDIS__URL?"]),
        ("PREFETCHD__", ["PREFETCHD__:", "did you mean"]),
        ("PREFETCHD__TABLES__0__NAME", ["PREFETCHD__TABLES__0__NAME:", "[[tables]]"]),
        ("PREFETCHD__TABLES", ["PREFETCHD__TABLES:", "[[tables]]"]),
    ] {
        refused(parse(TABLE, &[(variable, "secret")]), &parts);
    }
}

#[test]
fn values_that_cannot_be_are_refused_with_their_place() {
    // What a schema cannot tell, or only with patterns that nobody could read.
    let beyond_the_schema = [
        "mysql://h",
        "sslmode=on",
        "ca.pem",
        "/does/not/exist",
        "0s",
        "999ms",
        "11y",
        "99999",
        "level",
        "cache.example",
        "token",
    ];
    for (text, parts) in [
        ("[postgres]\nurl = \"mysql://h\"", ["postgres.url in f.toml", "postgres://"]),
        ("[postgres]\nurl = \"postgres://u@h/d?sslmode=on\"", ["postgres.url", "verify-full"]),
        (
            "[postgres]\nurl = \"postgres://u@h/d?sslrootcert=/nonexistent/ca.pem\"",
            ["postgres.url", "/nonexistent/ca.pem"],
        ),
        ("[postgres]\nslot = \"My-Slot\"", ["postgres.slot", "a-z"]),
        ("[postgres]\nslot = \"\"", ["postgres.slot", "a-z"]),
        ("[postgres]\nslot = 5", ["postgres.slot", "in quotes"]),
        ("[postgres]\npublication = \"\"", ["postgres.publication", "1 to 63"]),
        ("[postgres]\ncreate = \"yes\"", ["postgres.create", "true or false"]),
        ("[postgres]\ncreate = 1", ["postgres.create", "true or false"]),
        (
            "[redis]\nurl = \"rediss://h?cacert=/does/not/exist\"",
            ["redis.url in f.toml:", "/does/not/exist cannot be read"],
        ),
        ("[redis]\nurl = \"http://h\"", ["redis.url in f.toml: must begin", "redis://"]),
        ("[redis]\ndurability = \"replicas:0\"", ["redis.durability", "not a choice"]),
        ("[redis]\ndurability = \"disk\"", ["redis.durability", "not a choice"]),
        ("[redis]\npacked = \"no\"", ["redis.packed", "not a choice"]),
        ("[cache]\nttl = \"0s\"", ["cache.ttl", "too short"]),
        ("[cache]\nttl = \"999ms\"", ["cache.ttl", "too short"]),
        ("[cache]\nttl = \"11y\"", ["cache.ttl", "too long"]),
        ("[cache]\nttl = \"-1s\"", ["cache.ttl", "24h"]),
        ("[cache]\nttl = 30", ["cache.ttl", "24h"]),
        ("[cache]\nttl = \"30\"", ["cache.ttl", "\"30s\""]),
        ("[cache]\nttl = \"\"", ["cache.ttl", "24h"]),
        ("[cache]\nnull = \"nil\"", ["cache.null", "\"empty\" or \"omit\""]),
        ("[cache]\nmax_staleness = \"0s\"", ["cache.max_staleness", "30s"]),
        ("[cache]\nmax_atomic_changes = 0", ["cache.max_atomic_changes", "whole number"]),
        ("[cache]\nmax_atomic_changes = -1", ["cache.max_atomic_changes", "whole number"]),
        ("[cache]\nmax_atomic_bytes = \"lots\"", ["cache.max_atomic_bytes", "64MB"]),
        ("[cache]\nmax_atomic_bytes = 0", ["cache.max_atomic_bytes", "64MB"]),
        ("[http]\nlisten = \"8787\"", ["http.listen", "127.0.0.1:8787"]),
        ("[http]\nlisten = \"127.0.0.1:99999\"", ["http.listen", "127.0.0.1:8787"]),
        ("[http]\npage = \"maybe\"", ["http.page", "true or false"]),
        ("[log]\nlevel = \"inof\"", ["log.level", "info"]),
        ("[log]\nlevel = \"a=b=c\"", ["log.level", "info"]),
        ("[log]\nformat = \"xml\"", ["log.format", "\"text\" or \"json\""]),
        ("[http]\nhosts = \"cache.example\"", ["http.hosts", "list"]),
        ("[http]\nhosts = [\"http://cache.example\"]", ["http.hosts", "without http://"]),
        ("[http]\nhosts = [\"cache.example:80\"]", ["http.hosts", "cache.example:80"]),
        ("[http]\nadmin_token_file = \"/nonexistent/token\"", ["http.admin_token_file", "/nonexistent/token"]),
    ] {
        refused(with(text), &parts);
        let accepted = accepts(&format!("{text}\n{TABLE}"));
        assert!(!accepted || beyond_the_schema.iter().any(|part| text.contains(part)), "the schema accepts {text}");
    }
    refused(parse(TABLE, &[("PREFETCHD__CACHE__TTL", "")]), &["PREFETCHD__CACHE__TTL:", "24h"]);
}

#[test]
fn good_values_are_taken() {
    for text in [
        "[cache]\nttl = \"1s\"",
        "[cache]\nttl = \"1h 30m\"",
        "[cache]\nmax_atomic_bytes = 1000",
        "[http]\nlisten = \"localhost:0\"",
        "[http]\nlisten = \"[::]:80\"",
        "[log]\nlevel = \"WARN\"",
        "[log]\nlevel = \"warn,prefetchd::sink=debug\"",
        "[redis]\nurl = \"unix:///run/redis.sock\"",
        "[postgres]\nurl = \"host=/tmp user=u dbname=d\"",
    ] {
        with(text).unwrap_or_else(|error| panic!("{text}: {error}"));
        assert!(accepts(&format!("{text}\n{TABLE}")), "the schema rejects {text}");
    }
}

#[test]
fn tables_are_named_as_in_sql() {
    for (text, schema, table) in [
        ("orders", "public", "orders"),
        ("shop.orders", "shop", "orders"),
        ("Shop.Orders", "shop", "orders"),
        ("shop.\"Order Lines\"", "shop", "Order Lines"),
        ("\"a.b\".\"c\"\"d\"", "a.b", "c\"d"),
        ("\"Orders\"", "public", "Orders"),
    ] {
        let name = qualified_name(text).unwrap_or_else(|| panic!("{text}"));
        assert_eq!((name.schema.as_str(), name.table.as_str()), (schema, table), "{text}");
    }
    for text in ["", ".", "a.", ".a", "a.b.c", "\"a", "a\"b", "a b", "\"\"", "a.\"b\"c", "a. b", "\"a\\u0000\".b.c"] {
        assert_eq!(qualified_name(text), None, "{text}");
    }
}

#[test]
fn tables_that_cannot_be_are_refused() {
    let second = |name: &str, table: &str, key: &str| {
        parse(&format!("{TABLE}[[tables]]\nname = \"{name}\"\ntable = \"{table}\"\nkey = \"{key}\"\n"), &[])
    };
    assert_eq!(second("d", "d", "d:{id}").expect("two tables").tables[1].id, TableId(1));
    refused(second("c", "d", "d:{id}"), &["[[tables]] number 2", "two tables have the name \"c\""]);
    refused(second("d", "public.c", "d:{id}"), &["table of table \"d\"", "already table \"c\""]);
    refused(second("d", "d", "c:d:{id}"), &["key of table \"d\"", "begins another"]);
    refused(second("d", "d", "prefetchd:{id}"), &["key of table \"d\"", "belongs to prefetchd"]);
    refused(second("d", "d", "{id}"), &["key of table \"d\"", "no literal"]);
    for name in ["", "a b", "a/b", ".", "..", "é", "-a", "a?"] {
        refused(second(name, "d", "d:{id}"), &["cannot be used in a URL"]);
    }
    refused(second("d", "a.b.c", "d:{id}"), &["table of table \"d\"", "schema.table"]);
    for (more, part) in [
        ("columns = [\"name\"]", "leaves out \"id\""),
        ("columns = [\"id\", \"id\"]", "twice"),
        ("columns = \"id\"", "not a list"),
        ("columns = [5]", "names only"),
        ("rename = { a = \"x\", b = \"x\" }", "both become field \"x\""),
        ("columns = [\"id\", \"a\"]\nrename = { id = \"a\" }", "both become field \"a\""),
        ("columns = [\"id\"]\nrename = { a = \"x\" }", "not among the columns"),
        ("rename = [\"a\"]", "not a table"),
        ("rename = { a = 5 }", "not a string"),
        ("ttl = \"0s\"", "too short"),
        ("ttl = 5", "in quotes"),
        ("format = \"JSON\"", "\"JSON\" is not a choice: write \"hash\", \"json\" or \"redisjson\""),
        ("format = true", "in quotes"),
        ("key = \"x\"", "not valid TOML"),
    ] {
        refused(table(more), &[part]);
    }
    refused(parse("[[tables]]\nname = \"c\"\nkey = \"c:{id}\"", &[]), &["table of table \"c\"", "missing"]);
    refused(parse("", &[]), &["f.toml: it names no table", "[[tables]]"]);
    refused(parse("tables = []", &[]), &["names no table"]);
    refused(parse("tables = 5", &[]), &["write [[tables]]"]);
    refused(parse("tables = [5]", &[]), &["write [[tables]]"]);
    refused(parse("[tables]\nname = \"c\"", &[]), &["write [[tables]]"]);
}

#[test]
fn columns_may_swap_names_and_hold_any_character() {
    let text = "columns = [\"id\", \"a.b\", \"C\"]\nrename = { \"a.b\" = \"C\", C = \"a.b\" }\nttl = \"2s\"";
    let config = table(text).expect("a swap");
    let rename = [("C".to_owned(), "a.b".to_owned()), ("a.b".to_owned(), "C".to_owned())];
    assert_eq!((config.tables[0].rename.as_slice(), config.tables[0].ttl_ms), (&rename[..], 2_000));
}

fn file(content: &[u8]) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(&file, content).expect("written");
    file
}

fn password(config: &Config) -> Option<String> {
    config.postgres.target.password.to_hide()
}

fn redis_password(target: &RedisTarget) -> Option<String> {
    target.password.to_hide()
}

#[test]
fn passwords_come_from_file_then_url_then_variable() {
    let secret = file(b"00123\n");
    let path = secret.path().display().to_string();
    let url = ("PREFETCHD__POSTGRES__URL", "postgres://u:url@h/d");
    let of_file = ("PREFETCHD__POSTGRES__PASSWORD_FILE", path.as_str());
    let variable = ("PGPASSWORD", "variable");
    for (variables, wanted) in [
        (&[url, of_file, variable][..], Some("00123")),
        (&[url, variable], Some("url")),
        (&[variable], Some("variable")),
        (&[], None),
    ] {
        let config = parse(TABLE, variables).expect("good");
        assert_eq!(password(&config).as_deref(), wanted);
    }
    let redis = [("PREFETCHD__REDIS__URL", "redis://u:url@h"), ("PREFETCHD__REDIS__PASSWORD_FILE", &path)];
    let target = parse(TABLE, &redis).expect("good").redis.target;
    assert_eq!((target.user.as_deref(), redis_password(&target).as_deref()), (Some("u"), Some("00123")));
}

#[test]
fn a_password_command_is_a_list_of_words_that_are_taken_as_they_are() {
    let words = r#"["sh", "-c", "printf %s \"$0\" | tr a b; ", "a, b", ""]"#;
    let shown = r#"password_command = ["sh", "-c", "printf %s \"$0\" | tr a b; ", "a, b", ""]"#;
    let in_file = with(&format!("[postgres]\npassword_command = {words}")).expect("good");
    let in_variable = parse(TABLE, &[("PREFETCHD__POSTGRES__PASSWORD_COMMAND", words)]).expect("good");
    for config in [&in_file, &in_variable] {
        assert!(config.to_toml().contains(shown), "{}", config.to_toml());
        let again = parse(&config.to_toml(), &[]).expect("what it printed");
        assert!(again.postgres.target.password == config.postgres.target.password);
        assert_eq!(format!("{:?}", config.postgres.target.password), "printed by sh");
    }
    let redis = with(
        "[redis]\nurl = \"redis+sentinel://u@h/m\"\npassword_command = [\"/bin/echo\", \"one\"]\n\
                      sentinel_password_command = [\"/bin/echo\", \"two\"]",
    );
    let target = redis.expect("good").redis.target;
    let Address::Sentinel(sentinels) = &target.address else { panic!("no sentinels") };
    assert_eq!(format!("{:?} {:?}", target.password, sentinels.password), "printed by /bin/echo printed by /bin/echo");
    assert!(target.password != sentinels.password);
    // As for a file, the variables of psql stand behind it.
    let variables = [("PREFETCHD__POSTGRES__PASSWORD_COMMAND", words), ("PGPASSWORD", "variable")];
    assert_eq!(password(&parse(TABLE, &variables).expect("good")), None);
    for none in ["", "[]"] {
        let config = parse(TABLE, &[("PREFETCHD__REDIS__PASSWORD_COMMAND", none)]).expect("good");
        assert!(config.redis.target.password == Password::None);
    }
}

#[test]
fn a_password_command_that_cannot_be_run_or_stands_beside_a_password_is_refused() {
    let secret = file(b"hunter2");
    let path = secret.path().display();
    for (text, parts) in [
        (
            "[postgres]\npassword_command = \"sh\"",
            &["postgres.password_command in f.toml", "not a list", "[\"/usr/"][..],
        ),
        ("[postgres]\npassword_command = [1]", &["strings only"]),
        ("[postgres]\npassword_command = [\"\", \"x\"]", &["no name"]),
        ("[postgres]\npassword_command = [\"sh\", \"\\u0000\"]", &["NUL"]),
        ("[postgres]\npassword_command = [\"no-such-program\"]", &["no-such-program", "PATH", "install it"]),
        (
            "[redis]\npassword_command = [\"/no/such\"]",
            &["redis.password_command in f.toml", "/no/such", "No such file"],
        ),
        ("[redis]\npassword_command = [\"/etc\"]", &["not a file"]),
        (&format!("[redis]\npassword_command = [\"{path}\"]"), &["not executable"]),
        (
            &format!("[postgres]\npassword_command = [\"sh\"]\npassword_file = \"{path}\""),
            &["postgres.password_command", "in postgres.password_file, too", "remove one"],
        ),
        (
            "[postgres]\npassword_command = [\"sh\"]\nurl = \"postgres://u:hunter2@h/d\"",
            &["postgres.password_command", "in postgres.url, too", "remove one"],
        ),
        (
            "[redis]\npassword_command = [\"sh\"]\nurl = \"redis://:hunter2@h\"",
            &["redis.password_command", "in redis.url, too", "remove one"],
        ),
        ("[redis]\nsentinel_password_command = [\"sh\"]", &["redis.sentinel_password_command", "no Sentinels"]),
        (
            "[redis]\nsentinel_password_command = [\"sh\"]\nurl = \"redis+sentinel://h/m?sentinel_password=hunter2\"",
            &["redis.sentinel_password_command", "sentinel_password, too", "remove one"],
        ),
    ] {
        refused(with(text), parts);
        assert!(!with(text).unwrap_err().to_string().contains("hunter2"), "{text}");
    }
    let variable = ("PREFETCHD__REDIS__PASSWORD_COMMAND", "print-token --user x");
    refused(parse(TABLE, &[variable]), &["PREFETCHD__REDIS__PASSWORD_COMMAND", "not a list", "[\"/usr/"]);
}

#[test]
fn a_load_rate_is_a_size_a_second() {
    let rate = |text: &str| with(&format!("[cache]\nload_rate = {text}"));
    let read = |text: &str| rate(text).expect("good").cache.load_rate.map(NonZeroU64::get);
    assert_eq!(
        [read("\"20MB\""), read("\"64KiB\""), read("10000"), read("\"\"")],
        [Some(20_000_000), Some(65_536), Some(10_000), None]
    );
    for text in ["0", "\"0\"", "\"9kB\"", "\"20MB/s\"", "\"fast\"", "\"-1MB\"", "-1", "true"] {
        refused(rate(text), &["cache.load_rate in f.toml"]);
    }
    refused(rate("\"0\""), &["10kB", "\"\" for no limit"]);
    refused(rate("\"20MB/s\""), &["not a size", "20MB"]);
}

#[test]
fn the_reader_has_a_password_of_its_own() {
    let secret = file(b"of the url alone");
    let path = secret.path().display().to_string();
    let variables = [
        ("PREFETCHD__POSTGRES__READER_URL", "postgres://r:secret@h:7/d"),
        ("PREFETCHD__POSTGRES__PASSWORD_FILE", path.as_str()),
    ];
    let config = parse(TABLE, &variables).expect("good");
    let reader = config.postgres.reader.as_ref().expect("a reader");
    assert_eq!((reader.describe().as_str(), reader.user.as_str()), ("h:7/d", "r"));
    assert!(reader.password == Password::Literal("secret".to_owned()));
    assert_eq!(password(&config).as_deref(), Some("of the url alone"));
    assert!(config.to_toml().contains("reader_url = \"postgres://r:***@h:7/d\""), "{}", config.to_toml());
    assert!(parse(TABLE, &[]).expect("good").postgres.reader.is_none());
    let bad = [("PREFETCHD__POSTGRES__READER_URL", "postgres://r@h/d?sslmode=on")];
    refused(parse(TABLE, &bad), &["PREFETCHD__POSTGRES__READER_URL", "verify-full"]);
}

#[test]
fn what_the_url_leaves_out_comes_from_the_variables_of_psql() {
    let url = ("PREFETCHD__POSTGRES__URL", "postgres:///shop");
    let variables = [url, ("PGHOST", "h"), ("PGPORT", "7"), ("PGUSER", "me"), ("PGPASSWORD", "pw")];
    let target = parse(TABLE, &variables).expect("good").postgres.target;
    assert_eq!((target.describe().as_str(), target.user.as_str()), ("h:7/shop", "me"));
    assert!(target.password == Password::Literal("pw".to_owned()));
    refused(parse(TABLE, &[url, ("PGSSLMODE", "on")]), &["PREFETCHD__POSTGRES__URL: PGSSLMODE=on", "verify-full"]);
}

#[test]
fn a_secret_loses_its_newline_and_nothing_else() {
    for (content, wanted) in [(&b"a b \n"[..], "a b "), (b"x\r\n", "x"), (b"x\n\n", "x\n"), (b"x", "x")] {
        let file = file(content);
        let variables = [("PREFETCHD__REDIS__PASSWORD_FILE", &*file.path().display().to_string())];
        let config = parse(TABLE, &variables).expect("good");
        assert_eq!(redis_password(&config.redis.target).as_deref(), Some(wanted));
    }
    for content in [&b""[..], b"\n", b"hunter2\xff", b"hunter2\0"] {
        let file = file(content);
        let path = file.path().display().to_string();
        for key in ["POSTGRES__PASSWORD_FILE", "REDIS__PASSWORD_FILE", "HTTP__ADMIN_TOKEN_FILE"] {
            let variable = format!("PREFETCHD__{key}");
            let error = parse(TABLE, &[(&variable, &path)]).expect_err("refused").to_string();
            assert!(error.starts_with(&variable) && error.contains(&path) && !error.contains("hunter2"), "{error}");
        }
    }
    let blanks = file(b"hunter2 hunter2");
    let path = blanks.path().display().to_string();
    let error = parse(TABLE, &[("PREFETCHD__HTTP__ADMIN_TOKEN_FILE", &path)]).expect_err("refused").to_string();
    assert!(error.contains("header") && !error.contains("hunter2"), "{error}");
}

#[test]
fn no_secret_is_shown() {
    let token = file(b"hunter2-hunter2-hunter2");
    let variables = [
        ("PREFETCHD__POSTGRES__URL", "postgres://u:hunter2@h/d?password=hunter2"),
        ("PREFETCHD__REDIS__URL", "redis://u:hunter2@h"),
        ("PREFETCHD__HTTP__ADMIN_TOKEN_FILE", &*token.path().display().to_string()),
    ];
    let config = parse(TABLE, &variables).expect("good");
    assert_eq!(password(&config).as_deref(), Some("hunter2"));
    let shown = format!("{config:?}\n{}", config.to_toml());
    assert!(!shown.contains("hunter2"), "{shown}");
    assert!(shown.contains("postgres://u:***@h/d?password=***") && shown.contains("redis://u:***@h"), "{shown}");
    for text in [
        "[postgres]\nurl = postgres://u:hunter2@h/d",
        "[postgres]\nurl = \"postgres://u:hunter2@h/d",
        "[postgres]\nurl = \"postgres://u:hunter2@h/d\" x",
        "[postgres]\npostgres://u:hunter2@h/d",
        "[postgres]\nurl = \"\\hunter2\"",
        "[postgres]\nurl = 'a'\nurl = 'hunter2'",
        "[postgres]\nurl = { a = \"hunter2\" }",
        "[postgres]\nurl = [\"hunter2\"]",
        "[postgres]\nurl = \"mysql://u:hunter2@h\"",
        "[postgres]\nurl = \"host=h password=hunter2 hunter2\"",
        "[redis]\nurl = \"redis://u:hunter2@h:port\"",
        "[redis]\nurl = \"redis://u:hunter2\"",
    ] {
        let error = with(text).expect_err(text);
        assert!(!format!("{error} {error:?}").contains("hunter2"), "{text}: {error}");
    }
    refused(with("[postgres]\nurl = "), &["f.toml: it is not valid TOML at line 2"]);
}

#[test]
fn the_effective_settings_can_be_read_again() {
    let more = "columns = [\"id\", \"a\"]\nrename = { a = \"b \\\"c\\\"\" }\nttl = \"90s\"\nformat = \"json\"";
    let text = format!(
        "[postgres]\nslot = \"s\"\ncreate = false\n[cache]\nmax_atomic_bytes = 5000\n\
         [[tables]]\nname = \"d\"\ntable = 'x.\"Y z\"'\nkey = \"d:{{id}}:{{a}}\"\n{more}\n{TABLE}"
    );
    let config = parse(&text, &[("PREFETCHD__CACHE__TTL", "2h")]).expect("good");
    let again = parse(&config.to_toml(), &[]).expect("what it printed");
    assert_eq!(format!("{again:?}"), format!("{config:?}"));
    assert_eq!(again.tables, config.tables);
    assert!(config.to_toml().contains("slot = \"s\"\n") && config.to_toml().contains("ttl = \"2h\""));
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let error = Config::load(Some(Path::new("/nonexistent/p.toml"))).expect_err("no file").to_string();
    assert!(error.contains("/nonexistent/p.toml") && error.contains("--config"), "{error}");
    let error = no_file().to_string();
    assert!(DEFAULT_PATHS.iter().all(|path| error.contains(path)) && error.contains("[[tables]]"), "{error}");
}

//! The code of every problem that a person can meet: a short name that stays the same when messages are reworded, to
//! search for, to alert on, and to look up.
//!
//! A code stands for one cause that a person handles in one way, however many errors have it. Each has a section in
//! docs/errors.md, which `prefetchd explain` prints; a test holds that none is missing there. Those with an underscore,
//! or of one word, are what HTTP answers in `error`.

use crate::plan::key::TemplateError;
use crate::plan::mapping::MappingError;

/// docs/errors.md: a section for each code.
const SECTIONS: &str = include_str!("../docs/errors.md");

macro_rules! codes {
    ($($code:ident = $text:literal,)*) => {
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Code {
            $($code,)*
        }

        impl Code {
            pub const ALL: &[Code] = &[$(Code::$code,)*];

            pub fn as_str(self) -> &'static str {
                match self {
                    $(Code::$code => $text,)*
                }
            }
        }
    };
}

codes! {
    // The configuration.
    ConfigMissing = "config-missing",
    ConfigUnreadable = "config-unreadable",
    ConfigSyntax = "config-syntax",
    ConfigUnknownKey = "config-unknown-key",
    ConfigValue = "config-value",
    ConfigConflict = "config-conflict",
    ConfigTables = "config-tables",
    ConnectionUrl = "connection-url",
    KeyTemplate = "key-template",
    KeyPrefix = "key-prefix",
    HashSlots = "hash-slots",
    TlsFiles = "tls-files",
    SecretUnavailable = "secret-unavailable",
    SecretExposed = "secret-exposed",
    // Commands.
    AdminToken = "admin-token",
    CannotWrite = "cannot-write",
    DaemonUnreachable = "daemon-unreachable",
    DemoServers = "demo-servers",
    FileExists = "file-exists",
    InitTables = "init-tables",
    NotPrefetchd = "not-prefetchd",
    PageDisabled = "page-disabled",
    UrlNeeded = "url-needed",
    // The daemon itself.
    DaemonHangs = "daemon-hangs",
    Drift = "drift",
    HttpExposed = "http-exposed",
    Internal = "internal",
    ListenAddress = "listen-address",
    ListenerUnclear = "listener-unclear",
    NotDrained = "not-drained",
    NotReady = "not-ready",
    RunsAsRoot = "runs-as-root",
    StoodStill = "stood-still",
    ClocksDiffer = "clocks-differ",
    // Postgres: reaching it.
    PostgresUnreachable = "postgres-unreachable",
    PostgresConnectionLost = "postgres-connection-lost",
    PostgresLogin = "postgres-login",
    PostgresDatabase = "postgres-database",
    PostgresTls = "postgres-tls",
    PostgresPooler = "postgres-pooler",
    PostgresConnections = "postgres-connections",
    PostgresLocked = "postgres-locked",
    PostgresRights = "postgres-rights",
    PostgresError = "postgres-error",
    PostgresProtocol = "postgres-protocol",
    PostgresSocket = "postgres-socket",
    PostgresSuperuser = "postgres-superuser",
    ReaderReplicates = "reader-replicates",
    ReaderServer = "reader-server",
    TlsUnverified = "tls-unverified",
    // Postgres: the server.
    PostgresVersion = "postgres-version",
    PostgresStandby = "postgres-standby",
    PostgresRestarted = "postgres-restarted",
    OtherPostgres = "other-postgres",
    WalLevel = "wal-level",
    WalSenders = "wal-senders",
    WalUnlimited = "wal-unlimited",
    WalLimitLow = "wal-limit-low",
    WalMarks = "wal-marks",
    SynchronousStandby = "synchronous-standby",
    SqlAscii = "sql-ascii",
    // Postgres: slot and stream.
    FailoverSlots = "failover-slots",
    SlotMissing = "slot-missing",
    SlotLost = "slot-lost",
    SlotInUse = "slot-in-use",
    SlotUnsuitable = "slot-unsuitable",
    SlotTooOld = "slot-too-old",
    SlotWaits = "slot-waits",
    SlotNearLimit = "slot-near-limit",
    SlotsExhausted = "slots-exhausted",
    StreamStuck = "stream-stuck",
    // Postgres: publication and tables.
    PublicationMissing = "publication-missing",
    PublicationOperations = "publication-operations",
    PublicationPartitions = "publication-partitions",
    TableMissing = "table-missing",
    TableUnpublished = "table-unpublished",
    TableUnreadable = "table-unreadable",
    TableRowSecurity = "table-row-security",
    TableKind = "table-kind",
    TablePartition = "table-partition",
    TableChanged = "table-changed",
    TableIdentity = "table-identity",
    TableHeirs = "table-heirs",
    TableOwnersCode = "table-owners-code",
    ColumnMissing = "column-missing",
    ColumnGenerated = "column-generated",
    ColumnType = "column-type",
    // Redis.
    RedisUnreachable = "redis-unreachable",
    RedisTls = "redis-tls",
    RedisPlaintext = "redis-plaintext",
    RedisLogin = "redis-login",
    RedisDatabase = "redis-database",
    RedisSentinel = "redis-sentinel",
    RedisReplica = "redis-replica",
    RedisBusy = "redis-busy",
    RedisReadOnly = "redis-read-only",
    RedisFull = "redis-full",
    RedisTooSmall = "redis-too-small",
    RedisEvicts = "redis-evicts",
    RedisAcl = "redis-acl",
    RedisCommands = "redis-commands",
    RedisReduced = "redis-reduced",
    RedisVersion = "redis-version",
    RedisDurability = "redis-durability",
    RedisLimits = "redis-limits",
    RedisError = "redis-error",
    RedisProtocol = "redis-protocol",
    RedisClusterUrl = "redis-cluster-url",
    RedisClusterDown = "redis-cluster-down",
    RedisClusterChanging = "redis-cluster-changing",
    RedisMastersDiffer = "redis-masters-differ",
    RedisNoReplica = "redis-no-replica",
    // What lies in Redis.
    CheckpointChanged = "checkpoint-changed",
    CheckpointUnreadable = "checkpoint-unreadable",
    EarlierConfiguration = "earlier-configuration",
    RedisKeyType = "redis-key-type",
    PrefixInUse = "prefix-in-use",
    LoadsAgain = "loads-again",
    // What HTTP answers, in `error`.
    AdminDisabled = "admin_disabled",
    BadRequest = "bad_request",
    Blocked = "blocked",
    BodyTooLarge = "body_too_large",
    Busy = "busy",
    DeadLetter = "dead_letter",
    ForeignHost = "foreign_host",
    ForeignOrigin = "foreign_origin",
    GivenServer = "given_server",
    Healing = "healing",
    Incomplete = "incomplete",
    Interrupted = "interrupted",
    InvalidConfiguration = "invalid_configuration",
    Lagging = "lagging",
    Loading = "loading",
    MethodNotAllowed = "method_not_allowed",
    NotCompared = "not_compared",
    NotFound = "not_found",
    NothingToSkip = "nothing_to_skip",
    Overloaded = "overloaded",
    Paused = "paused",
    RedisUnavailable = "redis_unavailable",
    Refused = "refused",
    RequestTimeout = "request_timeout",
    Stale = "stale",
    Stopping = "stopping",
    TooLarge = "too_large",
    TooManyStreams = "too_many_streams",
    Unauthorized = "unauthorized",
    Unavailable = "unavailable",
    UnknownLookup = "unknown_lookup",
    UnknownRoute = "unknown_route",
    UnknownTable = "unknown_table",
    UnsupportedMediaType = "unsupported_media_type",
}

impl Code {
    pub fn of(text: &str) -> Option<Code> {
        Code::ALL.iter().copied().find(|code| code.as_str() == text)
    }

    /// Returns the code that was probably meant.
    pub fn nearest(text: &str) -> Code {
        let all = Code::ALL.iter().copied();
        all.min_by_key(|code| strsim::damerau_levenshtein(text, code.as_str())).expect("there are codes")
    }

    /// Returns its section of docs/errors.md, with the heading.
    pub fn section(self) -> Option<&'static str> {
        let heading = format!("## {}\n", self.as_str());
        let begin = SECTIONS.match_indices(&heading).find(|(at, _)| SECTIONS[..*at].ends_with('\n'))?.0;
        let rest = &SECTIONS[begin..];
        let end = rest.find("\n## ").map_or(rest.len(), |end| end + 1);
        Some(&rest[..end])
    }

    /// The core knows no codes.
    pub fn of_mapping(error: &MappingError) -> Code {
        match error {
            MappingError::NoColumn { .. }
            | MappingError::KeyLeftOut { .. }
            | MappingError::LookupLeftOut { .. }
            | MappingError::Twice { .. }
            | MappingError::OneField { .. } => Code::ColumnMissing,
            MappingError::Generated { .. } => Code::ColumnGenerated,
            MappingError::NoScore(_)
            | MappingError::NoArray(_)
            | MappingError::OtherDelimiter(_)
            | MappingError::OwnCast { .. }
            | MappingError::TypeTooLarge { .. } => Code::ColumnType,
            MappingError::IdentityNothing { .. }
            | MappingError::NoIdentity { .. }
            | MappingError::OtherIdentity { .. } => Code::TableIdentity,
        }
    }

    pub fn of_template(error: &TemplateError) -> Code {
        match error {
            TemplateError::Reserved(_) => Code::KeyPrefix,
            TemplateError::NoColumn(_)
            | TemplateError::NoLiteral(_)
            | TemplateError::NoColon(_)
            | TemplateError::Malformed(_)
            | TemplateError::Twice { .. }
            | TemplateError::Empty(_)
            | TemplateError::TwoArrays(_) => Code::KeyTemplate,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_code_has_its_section_and_every_section_its_code() {
        let sections: Vec<&str> = SECTIONS.lines().filter_map(|line| line.strip_prefix("## ")).collect();
        let codes: BTreeSet<&str> = Code::ALL.iter().map(|code| code.as_str()).collect();
        assert_eq!(codes.len(), Code::ALL.len(), "two codes have one name");
        assert!(sections.is_sorted(), "{sections:?}");
        assert_eq!(sections, codes.into_iter().collect::<Vec<_>>());
        for code in Code::ALL {
            let (name, section) = (code.as_str(), code.section().unwrap_or_default());
            assert!(section.starts_with(&format!("## {name}\n\n*")), "{name}: where does it appear? {section}");
            for part in ["\n**Cause.** ", "\n**Remedy.** "] {
                assert_eq!(section.matches(part).count(), 1, "{name}: {part}");
            }
            assert_eq!(section.matches("\n## ").count(), 0, "{section}");
            assert_eq!(SECTIONS.matches(&format!("[{name}](#{name})")).count().min(1), 1, "{name} is not in the index");
        }
    }

    #[test]
    fn links_lead_to_sections() {
        for (at, _) in SECTIONS.match_indices("](#") {
            let target = SECTIONS[at + 3..].split(')').next().unwrap_or_default();
            assert!(Code::of(target).is_some(), "{target}");
        }
    }

    #[test]
    fn a_misspelled_code_leads_to_the_right_one() {
        for (text, meant) in [("wal_level", Code::WalLevel), ("redis-evict", Code::RedisEvicts), ("", Code::Busy)] {
            assert_eq!((Code::of(text), Code::nearest(text)), (None, meant), "{text}");
        }
        for code in Code::ALL {
            assert_eq!(Code::of(code.as_str()), Some(*code));
        }
    }
}

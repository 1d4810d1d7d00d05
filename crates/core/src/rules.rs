//! The rules that the promises hang on, one by one.
//!
//! In the daemon each of them holds, and asking costs nothing. The simulation can switch one off for a thread, and must then
//! find a schedule that breaks a promise: a rule that no schedule misses is not needed, or not tested. `scripts/ablate`
//! does that with all of them.

macro_rules! rules {
    ($($(#[$doc:meta])* $rule:ident),+ $(,)?) => {
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Rule {
            $($(#[$doc])* $rule),+
        }

        impl Rule {
            pub const ALL: &[Rule] = &[$(Rule::$rule),+];
        }
    };
}

rules! {
    /// Nothing is confirmed that Redis has not acknowledged.
    ConfirmOnlyApplied,
    /// Nothing is confirmed that this session has not delivered again.
    ConfirmOnlyDelivered,
    /// No transaction is confirmed before ordinary snapshots see it.
    ConfirmOnlyVisible,
    /// A key touched by a transaction that a chunk does not see is left to the stream.
    LeaveKeysToStream,
    /// A chunk must see what was delivered without being applied.
    ReadAgainBelowBase,
    /// A chunk must see what touched its table as a whole.
    ReadAgainAfterTruncate,
    /// What a read under way may not see stays recorded.
    RecordForOpenReads,
    /// A checkpoint below what is confirmed is one of an earlier time.
    NoticeRedisWentBack,
    /// A checkpoint beyond the server's position, or its timeline's end, is one of another history.
    NoticePostgresWentBack,
    /// The last transaction that was applied must be redelivered.
    ExpectLastTransaction,
    /// So must one of which a part was applied.
    ExpectPartialTransaction,
    /// A transaction where nothing had been is one of another history.
    ExpectNothingNew,
    /// A load that was interrupted begins anew.
    LoadInterrupted,
    /// So does a table of which rows had to be read again.
    LoadIncomplete,
    /// So does one whose rows may have expired, now or later.
    LoadExpired,
    /// So does one that the catalog shows changed, now or later.
    LoadChangedCatalog,
    /// A load whose rows were moved meanwhile begins again.
    LoadAgainRewritten,
    /// At the end of a load keys without a row are removed, unless there were none before it.
    RemoveOrphans,
    /// After a loss only what commits from now on is applied.
    ApplyOnlyAboveBase,
    /// A new slot gets its name when ordinary snapshots see what it leaves out.
    NameSlotWhenVisible,
    /// Rows that waited to be read again are as old as they were.
    KeepAsOf,
    /// The checkpoint is watched, whatever a connection does.
    WatchCheckpoint,
}

#[cfg(not(any(test, feature = "sim")))]
#[inline]
pub(crate) const fn holds(_: Rule) -> bool {
    true
}

#[cfg(any(test, feature = "sim"))]
pub(crate) fn holds(rule: Rule) -> bool {
    OFF.get() != Some(rule)
}

/// For this thread.
#[cfg(any(test, feature = "sim"))]
pub fn switch_off(rule: Option<Rule>) {
    OFF.set(rule);
}

#[cfg(any(test, feature = "sim"))]
thread_local! {
    static OFF: std::cell::Cell<Option<Rule>> = const { std::cell::Cell::new(None) };
}

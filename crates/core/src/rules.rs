//! The rules that the guarantees depend on, one by one.
//!
//! In the daemon all of them hold, and checking costs nothing. The simulation can switch one off for a thread, and must
//! then find a schedule that violates a guarantee: a rule that no schedule misses is not needed, or not tested.
//! `scripts/ablate` tries all of them.

macro_rules! rules {
    ($($name:ident { $($(#[$doc:meta])* $rule:ident),+ $(,)? })+) => {
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Rule {
            $($($(#[$doc])* $rule),+),+
        }

        impl Rule {
            $(pub const $name: &[Rule] = &[$(Rule::$rule),+];)+
        }
    };
}

rules! {
    OF_ONE {
        /// Nothing is confirmed that Redis has not acknowledged.
        ConfirmOnlyApplied,
        /// Nothing is confirmed that has not been delivered to this session.
        ConfirmOnlyDelivered,
        /// No transaction is confirmed before ordinary snapshots see it.
        ConfirmOnlyVisible,
        /// A key touched by a transaction that a chunk does not see is left to the stream.
        LeaveKeysToStream,
        /// A chunk must see every transaction that was delivered but not applied.
        ReadAgainBelowBase,
        /// A chunk must see every TRUNCATE of its table.
        ReadAgainAfterTruncate,
        /// Transactions that a read in progress may not see stay recorded.
        RecordForOpenReads,
        /// A checkpoint below the confirmed position is out of date: Redis was rewound.
        NoticeRedisWentBack,
        /// A checkpoint beyond the server's position, or beyond the end of its timeline, belongs to another history.
        NoticePostgresWentBack,
        /// The last transaction that was applied must be redelivered.
        ExpectLastTransaction,
        /// A transaction that was applied in part must be redelivered.
        ExpectPartialTransaction,
        /// A transaction that truncates, and of which Redis has already removed some keys, must be redelivered.
        ExpectTruncate,
        /// A redelivered transaction that was not there before belongs to another history.
        ExpectNothingNew,
        /// An interrupted load is started again.
        LoadInterrupted,
        /// A table is loaded again if some of its rows were still waiting to be read again.
        LoadIncomplete,
        /// A table whose rows may have expired is loaded, at startup and later.
        LoadExpired,
        /// A table that has changed according to the catalog is loaded, at startup and later.
        LoadChangedCatalog,
        /// A load starts over if rows of its table were moved in the meantime.
        LoadAgainRewritten,
        /// At the end of a load, keys without a row are removed, unless the table had no keys when the load began.
        RemoveOrphans,
        /// After a loss, only transactions that commit from then on are applied.
        ApplyOnlyAboveBase,
        /// A new slot gets its name only once ordinary snapshots see the commits that it leaves out.
        NameSlotWhenVisible,
        /// Rows that wait to be read again stay as old as they were, even across a restart.
        KeepAsOf,
        /// An entry tells the types of columns only while all rows have these columns.
        TypesOfAllRows,
        /// Members of lookups are added and removed in the batch that writes or removes their row.
        MembersWithRows,
        /// While a table is loaded, rows that are written get all their memberships, not only those that are new.
        AddMembersAgain,
        /// At the end of a load, members are compared with their rows.
        SweepMembers,
        /// What a batch adds to a list is kept apart from whatever else lies at its key.
        AskTypesOfLists,
        /// The checkpoint is always watched.
        WatchCheckpoint,
    }
    OF_CLUSTER {
        /// A lane, or the record, is written only if its mark is the expected one.
        CompareMarks,
        /// A lane that is ahead of a batch is left out.
        LeaveOutLanesAhead,
        /// Rows that a lane has because it is ahead live as long as those that are written.
        RenewLanesAhead,
        /// Nothing is confirmed that a lane has not acknowledged.
        ConfirmWhatLanesHave,
        /// A lane is announced before its first write.
        AnnounceLanes,
        /// The record says what is worse than before, before any lane is written.
        BadNewsFirst,
        /// Every lane is stamped before the record says what is better.
        StampBeforeGoodNews,
        /// A lane below the confirmed position was rewound.
        NoticeLaneWentBack,
        /// A lane without the stamp of the record was rewound.
        NoticeLaneNotWhole,
        /// A record without the news that a mark knows of was rewound.
        NoticeRecordLacksNews,
        /// The last transaction of which a lane has anything must be redelivered.
        ExpectWhatLanesHave,
        /// A transaction that was not there before, and that lanes are beyond, belongs to another history.
        ExpectNothingNewInLanes,
        /// Chunks of loads wait until no lane is ahead.
        LoadWhenLanesAreEven,
        /// What has moved to another node is read again there.
        ReadMovedAgain,
        /// What is announced has been written before.
        AnnounceLast,
        /// What an earlier session has announced is not announced again.
        AnnounceOnce,
        /// A row that had to be read again is not announced once more by the next session.
        AnnounceRereadOnce,
        /// Rows in a lane that is ahead of a batch, and their memberships, are left as they are.
        LeaveListsOfLanesAhead,
        /// Lists that were being written when a session ended are compared with their rows.
        DoubtLists,
        /// Lists in hash slots that are read again are compared with the rows of all others.
        SweepReadAgain,
        /// A reader does not show a lane that stands before where it stood.
        RememberLanes,
    }
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

/// Applies to the current thread only.
#[cfg(any(test, feature = "sim"))]
pub fn switch_off(rule: Option<Rule>) {
    OFF.set(rule);
}

#[cfg(any(test, feature = "sim"))]
thread_local! {
    static OFF: std::cell::Cell<Option<Rule>> = const { std::cell::Cell::new(None) };
}

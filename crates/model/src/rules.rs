//! The rules of the protocol. `--ablate` switches off one at a time: some schedule must then break a promise.

macro_rules! rules {
    ($($rule:ident: $says:literal,)+) => {
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Rule {
            $(#[doc = $says] $rule),+
        }

        impl Rule {
            pub const ALL: &[Rule] = &[$(Rule::$rule),+];

            /// What holds while the rule is on.
            pub fn says(self) -> &'static str {
                match self {
                    $(Rule::$rule => $says),+
                }
            }
        }
    };
}

rules! {
    Cas: "a write is refused unless the lane's mark is the expected one",
    Skip: "changes at or before a lane's mark are not applied to it again",
    Confirm: "confirmed passes neither the oldest acknowledged mark nor the record's `through`",
    ConfirmVisible: "confirmed does not pass a transaction that a snapshot does not see yet",
    Lost: "a mark below the floor, or a missing mark of a listed lane, is a loss",
    Flag: "a lost lane's own mark says so before anything else is written to it",
    FlagsFirst: "lookups are written once every lost lane has its flag",
    Window: "a load leaves alone what the stream has touched and its snapshot does not see",
    Visibility: "what a snapshot sees is judged by visibility, not by position in the WAL",
    Pending: "a partial update is merged into a known row only; else the row is read again",
    List: "a lane is listed in the record before its first write",
    Look: "a lane without a mark is looked at before it is taken for an empty one",
    Record: "a record that is missing, or below the floor, loads every table",
    Through: "the record's position is what all lanes hold, not what was delivered",
    Floor: "every mark and the record carry the confirmed position; the greatest of them is the floor",
    BadNewsFirst: "a table's new shape is in the record before a lane acts on it",
    GoodNewsLast: "`loaded` is written after all lanes have acted",
    Whole: "each mark says which load its lane holds, not the record alone",
    Epoch: "a takeover raises the epoch in the record before it writes to a lane",
    NewEpoch: "an epoch is a position in the WAL, so that none comes twice, whatever Redis loses",
    Within: "the mark says how much of a split transaction its lane holds",
    ReadBack: "lookups: the old values are read from the row in Redis",
    Was: "lookups: a lane keeps values that it has overwritten until they are below the floor",
    Sweep: "lookups: members are compared with their rows at the end of a load",
    SweepLater: "lookups: the sweep judges no member by a row whose slot is moving",
    Swept: "lookups: each mark says for which load its lookups have been compared",
    Moved: "a lane found on another node than the one its mark names is compared as a whole",
}

/// Which rules are on in a run.
#[derive(Debug, Clone, Copy, Default)]
pub struct Rules {
    off: Option<Rule>,
}

impl Rules {
    pub fn without(rule: Option<Rule>) -> Self {
        Rules { off: rule }
    }

    pub fn off(self) -> Option<Rule> {
        self.off
    }

    pub fn on(self, rule: Rule) -> bool {
        self.off != Some(rule)
    }
}

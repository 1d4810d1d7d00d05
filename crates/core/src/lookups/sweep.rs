//! Compares the members of a table's lists with its rows. Both lie in Redis and have one writer, so neither Postgres nor a
//! watermark is needed.
//!
//! Lists are scanned for members that their rows do not give, and rows for members that lists lack. What a step finds must be
//! written before anything else is: it is exact only then.

use super::changes::Changes;
use super::questions::{Answers, Held, Page, Questions};
use super::{ListKind, Lookups, Memberships, Score, Values};
use crate::command::Key;
use crate::format::Format;
use crate::plan::key::Area;
use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::sync::Arc;

/// The lists and rows of a step are this many times fewer where rows are documents, which are read as a whole.
const DOCUMENTS_ARE: usize = 8;
/// Lists that are read in one step. A list that Redis keeps as a listpack comes whole, with up to 512 members.
const LISTS_A_STEP: usize = 16;
/// Rows that are read in one step.
const ROWS_A_STEP: usize = 1_000;
/// How many keys one scan returns, about.
pub const KEYS_A_SCAN: usize = 1_000;
/// Differences that are remembered, because SCAN may return a key or a member twice.
const MOST_COUNTED: usize = 100_000;

/// What is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// Whatever writes a row meanwhile adds all its memberships, so only members that are too many are looked for.
    Lists,
    ListsAndRows,
}

#[derive(Debug)]
pub struct Sweep {
    lookups: Arc<Lookups>,
    /// What is still to be scanned.
    areas: VecDeque<Scanned>,
    scanning: Option<(Scanned, u64)>,
    /// Lists whose members are to be read, each from a cursor on.
    lists: VecDeque<(Key, u64)>,
    rows: VecDeque<Key>,
    step: Step,
    counted: HashSet<(Key, Bytes)>,
    found: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scanned {
    /// The lookup at this place.
    Lists(usize),
    Rows,
}

/// What has been read in this step.
#[derive(Debug)]
enum Step {
    Nothing,
    /// The lists that were asked for their members.
    Members(Vec<Key>),
    /// Their members, and keys that hold something else.
    RowsOfMembers {
        members: Vec<(Key, Bytes, Option<Score>)>,
        rows: Vec<Key>,
        other_type: BTreeSet<Key>,
    },
    Rows(Vec<Key>),
    /// The memberships that rows should have.
    MembersOfRows(Vec<(Key, Bytes, Option<Score>)>),
}

/// What a sweep needs in order to continue.
#[derive(Debug)]
pub enum Next {
    /// The keys under a prefix, from this cursor on.
    Scan(Bytes, u64),
    Ask(Questions),
    End,
}

/// What follows from answers.
#[derive(Debug)]
pub enum Then {
    Ask(Questions),
    /// Must be written next. At these keys something lies that is no list.
    Write(Changes, BTreeSet<Key>),
}

impl Sweep {
    pub fn new(lookups: Arc<Lookups>, extent: Extent) -> Self {
        let lists = (0..lookups.count()).map(Scanned::Lists);
        let rows = Some(Scanned::Rows).filter(|_| extent == Extent::ListsAndRows);
        Sweep {
            areas: lists.chain(rows).collect(),
            lookups,
            scanning: None,
            lists: VecDeque::new(),
            rows: VecDeque::new(),
            step: Step::Nothing,
            counted: HashSet::new(),
            found: 0,
        }
    }

    /// How many members differed: missing, too many, or with another score.
    pub fn found(&self) -> u64 {
        self.found
    }

    /// Returns what the next step begins with.
    pub fn begin_step(&mut self) -> Next {
        if !self.lists.is_empty() {
            let lists: Vec<(Key, u64)> = self.lists.drain(..self.lists.len().min(self.at_most(LISTS_A_STEP))).collect();
            let ask = |(list, cursor): &(Key, u64)| (list.clone(), self.kind(list), *cursor);
            let questions = Questions::Members(lists.iter().map(ask).collect());
            self.step = Step::Members(lists.into_iter().map(|(list, _)| list).collect());
            return Next::Ask(questions);
        }
        if !self.rows.is_empty() {
            let rows: Vec<Key> = self.rows.drain(..self.rows.len().min(self.at_most(ROWS_A_STEP))).collect();
            let questions = self.about(&rows);
            self.step = Step::Rows(rows);
            return Next::Ask(questions);
        }
        loop {
            if let Some((area, cursor)) = self.scanning {
                let prefix = match area {
                    Scanned::Lists(lookup) => Bytes::copy_from_slice(self.lookups.area(lookup).prefix().as_bytes()),
                    Scanned::Rows => self.lookups.row(b"").0,
                };
                return Next::Scan(prefix, cursor);
            }
            match self.areas.pop_front() {
                None => return Next::End,
                Some(Scanned::Lists(lookup)) if matches!(self.lookups.area(lookup), Area::One(_)) => {
                    let list = self.lookups.area(lookup).prefix().to_owned();
                    self.lists.push_back((Key(list.into()), 0));
                    return self.begin_step();
                }
                Some(area) => self.scanning = Some((area, 0)),
            }
        }
    }

    /// Takes the answer to [`Next::Scan`].
    pub fn scanned(&mut self, keys: Vec<Key>, next: u64) {
        let (area, _) = self.scanning.take().expect("keys were asked for");
        self.scanning = Some((area, next)).filter(|_| next != 0);
        let keys: BTreeSet<Key> = keys.into_iter().collect();
        match area {
            Scanned::Lists(_) => self.lists.extend(keys.into_iter().map(|key| (key, 0))),
            Scanned::Rows => self.rows.extend(keys),
        }
    }

    /// Takes the answer to [`Next::Ask`] or [`Then::Ask`].
    ///
    /// # Panics
    /// If it is the answer to something else.
    pub fn answered(&mut self, answers: Answers) -> Then {
        match (std::mem::replace(&mut self.step, Step::Nothing), answers) {
            (Step::Members(lists), Answers::Members(pages)) => self.members(lists, pages),
            (Step::RowsOfMembers { members, rows, other_type }, Answers::Rows(values)) => {
                self.judge_members(members, &rows, values, other_type)
            }
            (Step::Rows(rows), Answers::Rows(values)) => self.memberships(&rows, values),
            (Step::MembersOfRows(members), Answers::Held(held)) => self.judge_rows(members, held),
            (step, answers) => panic!("not the answer to {step:?}: {answers:?}"),
        }
    }

    fn at_most(&self, of_hashes: usize) -> usize {
        match self.lookups.fields().format {
            Format::Hash => of_hashes,
            Format::Json | Format::RedisJson => of_hashes / DOCUMENTS_ARE,
        }
    }

    fn kind(&self, list: &Key) -> ListKind {
        self.lookups.kind_at(list).expect("it was found under the prefix of a lookup")
    }

    fn about(&self, rows: &[Key]) -> Questions {
        Questions::Rows(rows.iter().map(|row| (row.clone(), self.lookups.fields().clone())).collect())
    }

    fn members(&mut self, lists: Vec<Key>, pages: Vec<Page>) -> Then {
        let (mut members, mut other_type) = (Vec::new(), BTreeSet::new());
        for (list, page) in lists.into_iter().zip(pages) {
            match page {
                Page::OtherType => _ = other_type.insert(list),
                Page::Members(some, next) => {
                    if next != 0 {
                        self.lists.push_front((list.clone(), next));
                    }
                    members.extend(some.into_iter().map(|(member, score)| (list.clone(), member, score)));
                }
            }
        }
        let rows: BTreeSet<Key> = members.iter().map(|(_, member, _)| self.lookups.row(member)).collect();
        let rows: Vec<Key> = rows.into_iter().collect();
        let questions = self.about(&rows);
        self.step = Step::RowsOfMembers { members, rows, other_type };
        match rows_of(&self.step).is_empty() {
            true => self.answered(Answers::Rows(Vec::new())),
            false => Then::Ask(questions),
        }
    }

    fn judge_members(
        &mut self,
        members: Vec<(Key, Bytes, Option<Score>)>,
        rows: &[Key],
        values: Vec<Vec<Option<Bytes>>>,
        other_type: BTreeSet<Key>,
    ) -> Then {
        let lookups = self.lookups.clone();
        let given = |(row, values): (&Key, Vec<Option<Bytes>>)| {
            (row.clone(), Values::read(values).map_or(Memberships::new(), |values| lookups.memberships(row, &values)))
        };
        let given: BTreeMap<Key, Memberships> = rows.iter().zip(values).map(given).collect();
        let mut changes = Changes::default();
        for (list, member, score) in members {
            match given[&lookups.row(&member)].get(&list) {
                Some(right) if *right == score => continue,
                Some(right) => changes.joins(&lookups, list.clone(), member.clone(), *right),
                None => changes.leaves(&lookups, list.clone(), member.clone()),
            }
            self.counts(list, member);
        }
        for list in &other_type {
            self.counts(list.clone(), Bytes::new());
        }
        Then::Write(changes, other_type)
    }

    fn memberships(&mut self, rows: &[Key], values: Vec<Vec<Option<Bytes>>>) -> Then {
        let mut members = Vec::new();
        for (row, values) in rows.iter().zip(values) {
            if let Some(values) = Values::read(values) {
                let lists = self.lookups.memberships(row, &values);
                members.extend(lists.into_iter().map(|(list, score)| (list, self.lookups.member(row), score)));
            }
        }
        if members.is_empty() {
            return Then::Write(Changes::default(), BTreeSet::new());
        }
        let ask = |(list, member, _): &(Key, Bytes, Option<Score>)| (list.clone(), self.kind(list), member.clone());
        let questions = Questions::Held(members.iter().map(ask).collect());
        self.step = Step::MembersOfRows(members);
        Then::Ask(questions)
    }

    fn judge_rows(&mut self, members: Vec<(Key, Bytes, Option<Score>)>, held: Vec<Held>) -> Then {
        let (lookups, mut changes, mut other_type) = (self.lookups.clone(), Changes::default(), BTreeSet::new());
        for ((list, member, score), held) in members.into_iter().zip(held) {
            match held {
                Held::Yes(found) if found == score => continue,
                Held::Yes(_) | Held::No => {}
                Held::OtherType => _ = other_type.insert(list.clone()),
            }
            self.counts(list.clone(), member.clone());
            changes.joins(&lookups, list, member, score);
        }
        Then::Write(changes, other_type)
    }

    fn counts(&mut self, list: Key, member: Bytes) {
        if self.counted.len() >= MOST_COUNTED || self.counted.insert((list, member)) {
            self.found += 1;
        }
    }
}

fn rows_of(step: &Step) -> &[Key] {
    match step {
        Step::RowsOfMembers { rows, .. } => rows,
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::spec;
    use super::*;
    use crate::command::Command;
    use crate::schema::NullRule;

    fn key(text: &str) -> Key {
        Key(Bytes::copy_from_slice(text.as_bytes()))
    }

    /// A list at its key: members with the texts of their scores. `None` is something else that lies there.
    type ListAt<'a> = (&'a str, Option<&'a [(&'a str, Option<&'a str>)]>);

    /// A few rows, and lists at their keys; `None` is a list of another kind.
    struct Small {
        rows: BTreeMap<Key, Vec<Option<Bytes>>>,
        lists: BTreeMap<Key, Option<BTreeMap<Bytes, Option<Score>>>>,
    }

    impl Small {
        fn new(rows: &[[&str; 3]], lists: &[ListAt<'_>]) -> Self {
            let bytes = |text: &str| Bytes::copy_from_slice(text.as_bytes());
            let row = |cells: &[&str; 3]| {
                (key(&format!("t:{}", cells[0])), cells.iter().map(|cell| Some(bytes(cell))).collect())
            };
            let member = |(member, score): &(&str, Option<&str>)| {
                (bytes(member), score.map(|score| Score::of(score.as_bytes())))
            };
            let list =
                |(list, members): &ListAt<'_>| (key(list), members.map(|members| members.iter().map(member).collect()));
            Small { rows: rows.iter().map(row).collect(), lists: lists.iter().map(list).collect() }
        }

        fn answer(&self, questions: &Questions) -> Answers {
            match questions {
                Questions::Rows(rows) => Answers::Rows(
                    rows.iter()
                        .map(|(row, f)| self.rows.get(row).cloned().unwrap_or(vec![None; f.names.len()]))
                        .collect(),
                ),
                Questions::Members(lists) => Answers::Members(
                    lists
                        .iter()
                        .map(|(list, ..)| match self.lists.get(list) {
                            Some(None) => Page::OtherType,
                            Some(Some(members)) => {
                                Page::Members(members.iter().map(|(m, s)| (m.clone(), *s)).collect(), 0)
                            }
                            None => Page::Members(Vec::new(), 0),
                        })
                        .collect(),
                ),
                Questions::Held(members) => Answers::Held(
                    members
                        .iter()
                        .map(|(list, _, member)| match self.lists.get(list) {
                            Some(None) => Held::OtherType,
                            Some(Some(members)) => members.get(member).map_or(Held::No, |score| Held::Yes(*score)),
                            None => Held::No,
                        })
                        .collect(),
                ),
                Questions::Lists(_) => panic!("a sweep does not ask for the types of lists"),
            }
        }

        fn write(&mut self, commands: Vec<Command>) {
            for command in commands {
                match command {
                    Command::Delete { key } => _ = self.lists.remove(&key),
                    Command::Join { key, members, .. } => {
                        let list = self.lists.entry(key).or_insert_with(|| Some(BTreeMap::new()));
                        list.as_mut().expect("a list").extend(members);
                    }
                    Command::Leave { key, members, .. } => {
                        let list = self.lists.get_mut(&key).and_then(Option::as_mut).expect("a list");
                        members.iter().for_each(|member| _ = list.remove(member));
                        if list.is_empty() {
                            self.lists.remove(&key);
                        }
                    }
                    other => panic!("{other:?}"),
                }
            }
        }

        fn swept(&mut self, mut sweep: Sweep) -> u64 {
            loop {
                let mut questions = match sweep.begin_step() {
                    Next::End => return sweep.found(),
                    Next::Ask(questions) => questions,
                    Next::Scan(prefix, _) => {
                        let keys = self.rows.keys().chain(self.lists.keys());
                        // Some keys are returned twice.
                        let keys =
                            keys.filter(|key| key.0.starts_with(&prefix)).flat_map(|key| [key.clone(), key.clone()]);
                        sweep.scanned(keys.collect(), 0);
                        continue;
                    }
                };
                loop {
                    match sweep.answered(self.answer(&questions)) {
                        Then::Ask(more) => questions = more,
                        Then::Write(changes, other_type) => {
                            self.write(changes.into_commands(&other_type));
                            break;
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn members_become_those_that_the_rows_give() {
        let of = Lookups::of(&spec("t:{id}", NullRule::Empty, &[("p:{parent_id}", Some("place")), ("all", None)]));
        let of = of.expect("lookups");
        let rows = [["1", "a", "7"], ["2", "a", "8"], ["3", "b", "9"]];
        let right: [ListAt<'_>; 3] = [
            ("all", Some(&[("1", None), ("2", None), ("3", None)])),
            ("p:a", Some(&[("1", Some("7")), ("2", Some("8"))])),
            ("p:b", Some(&[("3", Some("9"))])),
        ];
        let mut small = Small::new(&rows, &right);
        assert_eq!(small.swept(Sweep::new(of.clone(), Extent::ListsAndRows)), 0);
        let mut small = Small::new(
            &rows,
            &[
                ("all", None),
                ("p:a", Some(&[("1", Some("6")), ("4", Some("7")), ("3", Some("9"))])),
                ("p:c", Some(&[("1", Some("7"))])),
                ("p:d:e", None),
            ],
        );
        let lists_alone = small.swept(Sweep::new(of.clone(), Extent::Lists));
        // `all` and `p:d:e` are no lists; `1` had another score; `4`, `3` and the other `1` were too many.
        assert_eq!(lists_alone, 6);
        assert_eq!(small.lists, Small::new(&[], &[("p:a", Some(&[("1", Some("7"))]))]).lists);
        assert_eq!(small.swept(Sweep::new(of.clone(), Extent::ListsAndRows)), 5);
        assert_eq!(small.lists, Small::new(&[], &right).lists);
        assert_eq!(small.swept(Sweep::new(of, Extent::ListsAndRows)), 0);
    }
}

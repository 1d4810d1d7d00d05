//! Parts of a table: how a table is cut into chunks, and what is left of a chunk that was not read completely.

use std::fmt;
use std::num::NonZeroU64;
use std::str::FromStr;

/// Rows of the first chunk by key. The next ones have as many as fit into its bytes.
const ROWS_AT_FIRST: u64 = 1_000;

/// A row's position in its table. It is valid as long as this version of the row is visible to any snapshot, unless the
/// table is rewritten.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tid {
    pub block: u32,
    pub offset: u16,
}

/// Where a range begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TidBound {
    /// At the first row of this page.
    Page(u32),
    /// After this row.
    Behind(Tid),
}

/// A part of a table: one chunk of a load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Range {
    /// Its index among the table's leaves.
    pub leaf: usize,
    pub span: Span,
    /// An upper bound for the number of rows: how many fit into the byte limit in the previous read. This is an
    /// estimate that saves the server from preparing rows that would be discarded.
    pub at_most_rows: Option<NonZeroU64>,
}

/// Where a range begins and ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Span {
    /// By row position. `to` is the first page that it does not include; `None` means up to the end of the table at
    /// that time.
    Places { from: TidBound, to: Option<u32> },
    /// By the columns that identify a row, in the order of their index; used if only columns may be read. `None` means
    /// unbounded.
    Keys { after: Option<KeyBound>, through: Option<KeyBound> },
}

/// A value for each column that identifies a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyBound(pub Vec<String>);

/// What holds a table's rows (the table itself, or its partitions at the lowest level) and how it can be cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Extent {
    /// By position: the number of pages of each leaf.
    Pages(Vec<u32>),
    /// By key: the number of leaves, without any information on where to cut them.
    Leaves(usize),
}

/// How the size of a table was determined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sizes {
    /// Measured, unless another session has the table locked.
    Measured,
    /// As of the last VACUUM or ANALYZE.
    Remembered,
}

impl Range {
    /// A whole leaf, page by page.
    pub fn leaf(leaf: usize) -> Self {
        Range { leaf, span: Span::Places { from: TidBound::Page(0), to: None }, at_most_rows: None }
    }

    /// Its number of pages when the table was looked up; `None` if unknown.
    pub fn pages(&self, extent: &Extent) -> Option<u32> {
        match (&self.span, extent) {
            (Span::Places { from: TidBound::Page(from), to }, Extent::Pages(leaves)) => {
                Some(to.unwrap_or(leaves[self.leaf]).saturating_sub(*from))
            }
            (Span::Places { .. } | Span::Keys { .. }, _) => None,
        }
    }

    /// Excludes what `rest` covers, if possible, so that reading this range again does not return those rows a second
    /// time.
    pub fn without(&mut self, rest: &Range) {
        if let (Span::Keys { through, .. }, Span::Keys { after, .. }) = (&mut self.span, &rest.span) {
            *through = after.clone();
        }
    }
}

/// Cuts a table into chunks of `pages_a_chunk` pages. The last one of each leaf has no end, because the table may grow.
/// If it is read by key, each chunk leaves the next one as its rest.
pub fn ranges(extent: &Extent, pages_a_chunk: u32) -> Vec<Range> {
    match extent {
        Extent::Leaves(leaves) => (0..*leaves).map(by_key).collect(),
        Extent::Pages(leaves) => {
            let cut = |(leaf, pages): (usize, &u32)| by_place(leaf, *pages, pages_a_chunk.max(1));
            leaves.iter().enumerate().flat_map(cut).collect()
        }
    }
}

fn by_key(leaf: usize) -> Range {
    let span = Span::Keys { after: None, through: None };
    Range { leaf, span, at_most_rows: NonZeroU64::new(ROWS_AT_FIRST) }
}

fn by_place(leaf: usize, pages: u32, step: u32) -> Vec<Range> {
    let mut out = Vec::new();
    let mut from: u32 = 0;
    loop {
        let to = from.checked_add(step).filter(|to| *to < pages);
        out.push(Range { leaf, span: Span::Places { from: TidBound::Page(from), to }, at_most_rows: None });
        match to {
            Some(to) => from = to,
            None => return out,
        }
    }
}

impl fmt::Display for Tid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "({},{})", self.block, self.offset)
    }
}

impl FromStr for Tid {
    type Err = ();

    fn from_str(s: &str) -> Result<Self, ()> {
        let inner = s.strip_prefix('(').and_then(|s| s.strip_suffix(')')).ok_or(())?;
        let (block, offset) = inner.split_once(',').ok_or(())?;
        Ok(Tid { block: block.parse().map_err(|_| ())?, offset: offset.parse().map_err(|_| ())? })
    }
}

//! Parts of a table: how one is cut into chunks, and what is left of a chunk of which not all was read.

use std::fmt;
use std::num::NonZeroU64;
use std::str::FromStr;

/// Rows of a first chunk by key; the next ones have as many as fit into its bytes.
const ROWS_AT_FIRST: u64 = 1_000;

/// A row's place in its table: it stays for as long as this version of the row is visible to anybody, unless the table is
/// written anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tid {
    pub block: u32,
    pub offset: u16,
}

/// Where a range begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TidBound {
    /// With the first row of this page.
    Page(u32),
    /// With the row after this one.
    Behind(Tid),
}

/// A part of a table: one chunk of a load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Range {
    /// Its place among the table's leaves.
    pub leaf: usize,
    pub span: Span,
    /// No more rows than these: what fitted into the byte limit of the read before. A guess that saves the server
    /// from preparing what is then thrown away.
    pub at_most_rows: Option<NonZeroU64>,
}

/// Where a range begins and ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Span {
    /// By the rows' places. `to`: the page that it ends before; `None` = wherever the table ends by then.
    Places { from: TidBound, to: Option<u32> },
    /// By the columns that identify a row, in the order of their index: where only columns may be read. `None` = without a
    /// bound.
    Keys { after: Option<KeyBound>, through: Option<KeyBound> },
}

/// A value for each of the columns that identify a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyBound(pub Vec<String>);

/// What holds a table's rows (the table itself, or its partitions at the lowest level) and how it can be cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Extent {
    /// By place: each leaf has so many pages.
    Pages(Vec<u32>),
    /// By key: so many leaves, and nothing tells where to cut them.
    Leaves(usize),
}

/// How large a table is said to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sizes {
    /// As it is now, unless somebody has the table locked.
    Measured,
    /// As of its last VACUUM or ANALYZE.
    Remembered,
}

impl Range {
    /// The whole of a leaf, page by page.
    pub fn leaf(leaf: usize) -> Self {
        Range { leaf, span: Span::Places { from: TidBound::Page(0), to: None }, at_most_rows: None }
    }

    /// How many pages it had when the table was looked up. `None` where that is not known.
    pub fn pages(&self, extent: &Extent) -> Option<u32> {
        match (&self.span, extent) {
            (Span::Places { from: TidBound::Page(from), to }, Extent::Pages(leaves)) => {
                Some(to.unwrap_or(leaves[self.leaf]).saturating_sub(*from))
            }
            (Span::Places { .. } | Span::Keys { .. }, _) => None,
        }
    }

    /// Leaves out what `rest` covers, where that can be told: read again, it must not bring the rest once more.
    pub fn without(&mut self, rest: &Range) {
        if let (Span::Keys { through, .. }, Span::Keys { after, .. }) = (&mut self.span, &rest.span) {
            *through = after.clone();
        }
    }
}

/// Cuts a table into chunks of `pages_a_chunk` pages. The last one of each leaf has no end: the table may grow. Where it is
/// read by key, each chunk leaves the next one as its rest.
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

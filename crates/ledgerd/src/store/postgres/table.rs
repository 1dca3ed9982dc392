//! Tables as a batch writes them: one statement, whatever the number of rows, which travel as one array of a composite type;
//! those of several tables, where none has to see what another does, go to the server as one.
//!
//! An array for each column would be the plain way, and costs twice as much: the server keeps each of them apart, row by row,
//! until it has put them together. What is written for every task travels as wide as its columns, or each value would be turned
//! into another type. Invariants: the text of a statement depends on nothing but the tables that it writes, so its plan is made
//! once; a type of a migration has the columns that are here, in their order (a test compares them).

use super::failed;
use crate::store::bind::{Cell, Sink};
use ledger_core::store::StoreError;
use sqlx::encode::{Encode, IsNull};
use sqlx::error::BoxDynError;
use sqlx::postgres::{
    PgArgumentBuffer, PgArguments, PgBindIterExt as _, PgConnection, PgRow, PgTypeInfo, Postgres,
};
use sqlx::query::Query;
use sqlx::types::Type;
use sqlx::{Arguments as _, AssertSqlSafe};

/// What a column's values travel as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Int2,
    Int4,
    Int,
    Real,
    Text,
    Bytes,
}

use Kind::{Bytes, Int, Int2, Int4, Real, Text};

impl Kind {
    /// The number of its type, which is the same in every database (`pg_type.dat` of PostgreSQL).
    const fn number(self) -> u32 {
        match self {
            Int2 => 21,
            Int4 => 23,
            Int => 20,
            Real => 701,
            Text => 25,
            Bytes => 17,
        }
    }

    #[cfg(test)]
    pub(super) const fn name(self) -> &'static str {
        match self {
            Int2 => "smallint",
            Int4 => "integer",
            Int => "bigint",
            Real => "double precision",
            Text => "text",
            Bytes => "bytea",
        }
    }
}

/// How rows of one shape are written.
pub(super) struct Table {
    /// The type of a row.
    pub(super) row: &'static str,
    /// Before the rows, which are called `new` and have the columns' names.
    head: &'static str,
    pub(super) columns: &'static [(&'static str, Kind)],
    tail: &'static str,
}

impl Table {
    pub(super) const fn new(
        row: &'static str,
        head: &'static str,
        columns: &'static [(&'static str, Kind)],
        tail: &'static str,
    ) -> Self {
        Self { row, head, columns, tail }
    }

    /// Its statement, whose rows are parameter `at`.
    pub(super) fn text(&self, at: usize) -> String {
        let rows = format!("unnest(${at}::{}[]) AS new", self.row);
        if self.head.starts_with("DELETE ") {
            return format!("{} USING {rows} {}", self.head, self.tail);
        }
        if self.head.starts_with("UPDATE ") {
            return format!("{} FROM {rows} {}", self.head, self.tail);
        }
        let names: Vec<_> = self.columns.iter().map(|(name, _)| format!("\"{name}\"")).collect();
        let names = names.join(", ");
        format!("{} ({names}) SELECT {names} FROM {rows} {}", self.head, self.tail)
    }
}

/// The end of what says which rows of `tasks AS t` it wrote.
pub(super) const NAMES_TASKS: &str = "RETURNING t.id";

/// Rows on their way, in the binary form of a composite: the number of fields, and of each its type, its length and itself.
pub(super) struct Rows {
    table: &'static Table,
    bytes: Vec<u8>,
    /// Where each row ends.
    ends: Vec<usize>,
    /// The column that is next.
    at: usize,
}

/// Bytes by which a row may be larger than the first.
const ROOM: usize = 16;
/// Bytes of an array before its elements: its own length, dimensions, flags, type, and those of the one dimension.
const ARRAY_HEAD: usize = 24;
/// Rows that room is made for at once.
const MOST_AHEAD: usize = 4_096;

impl Rows {
    pub(super) const fn of(table: &'static Table) -> Self {
        Self { table, bytes: Vec::new(), ends: Vec::new(), at: 0 }
    }

    fn field(&mut self, value: Option<&[u8]>) {
        let length = value.map_or(-1, |value| i32::try_from(value.len()).unwrap_or(i32::MAX));
        self.bytes.extend_from_slice(&length.to_be_bytes());
        self.bytes.extend_from_slice(value.unwrap_or_default());
    }
}

impl Sink for Rows {
    fn add<'v>(&mut self, value: impl Into<Cell<'v>>) {
        let columns = self.table.columns;
        if self.at == 0 {
            let fields = u32::try_from(columns.len()).unwrap_or(u32::MAX);
            self.bytes.extend_from_slice(&fields.to_be_bytes());
        }
        let kind = columns[self.at].1;
        self.bytes.extend_from_slice(&kind.number().to_be_bytes());
        match (kind, value.into()) {
            (Int2, Cell::Int(value)) => match i16::try_from(value) {
                Ok(value) => self.field(Some(&value.to_be_bytes())),
                // Too large, as the server will say.
                Err(_) => self.field(Some(&value.to_be_bytes())),
            },
            (Int4, Cell::Int(value)) => match i32::try_from(value) {
                Ok(value) => self.field(Some(&value.to_be_bytes())),
                Err(_) => self.field(Some(&value.to_be_bytes())),
            },
            (Int, Cell::Int(value)) => self.field(Some(&value.to_be_bytes())),
            (Real, Cell::Real(value)) => self.field(Some(&value.to_be_bytes())),
            (Text, Cell::Text(value)) => self.field(Some(value.as_bytes())),
            (Bytes, Cell::Bytes(value)) => self.field(Some(value)),
            _ => self.field(None),
        }
        self.at += 1;
        if self.at == columns.len() {
            self.at = 0;
            self.ends.push(self.bytes.len());
        }
    }
}

impl Type<Postgres> for Rows {
    fn type_info() -> PgTypeInfo {
        // Each says of itself what it is.
        PgTypeInfo::with_name("record[]")
    }
}

impl Encode<'_, Postgres> for Rows {
    fn encode_by_ref(&self, buf: &mut PgArgumentBuffer) -> Result<IsNull, BoxDynError> {
        // Each with its length.
        buf.reserve(self.bytes.len() + 4 * self.ends.len());
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        let row =
            |(start, end): (usize, &usize)| Row { of: self.table.row, fields: &self.bytes[start..*end] };
        starts.zip(&self.ends).map(row).bind_iter().encode(buf)
    }

    fn produces(&self) -> Option<PgTypeInfo> {
        Some(PgTypeInfo::array_of(self.table.row))
    }
}

/// One of them.
struct Row<'r> {
    of: &'static str,
    fields: &'r [u8],
}

impl Type<Postgres> for Row<'_> {
    fn type_info() -> PgTypeInfo {
        PgTypeInfo::with_name("record")
    }
}

impl Encode<'_, Postgres> for Row<'_> {
    fn encode_by_ref(&self, buf: &mut PgArgumentBuffer) -> Result<IsNull, BoxDynError> {
        buf.extend_from_slice(self.fields);
        Ok(IsNull::No)
    }

    fn produces(&self) -> Option<PgTypeInfo> {
        Some(PgTypeInfo::with_name(self.of))
    }
}

/// Rows of one table. Made before anything is awaited, for a future that holds an iterator over many types is not known to
/// be safe to move between threads.
pub(super) fn rows<T>(
    table: &'static Table,
    rows: impl IntoIterator<Item = T>,
    mut bind: impl FnMut(&mut Rows, T),
) -> Option<Rows> {
    let mut rows = rows.into_iter();
    let first = rows.next()?;
    let mut written = Rows::of(table);
    bind(&mut written, first);
    // The others are about as large.
    let (least, most) = rows.size_hint();
    written.bytes.reserve((written.bytes.len() + ROOM) * most.unwrap_or(least).min(MOST_AHEAD));
    rows.for_each(|row| bind(&mut written, row));
    Some(written)
}

/// Rows of several tables that are written by one statement: what one of them does is not seen by another, and in which order
/// they do it is the server's choice. A statement of its own for each would cost the daemon and the server a turn each.
#[derive(Default)]
pub(super) struct Together {
    parts: Vec<Rows>,
}

impl Together {
    pub(super) fn add(&mut self, rows: Option<Rows>) {
        self.parts.extend(rows);
    }

    /// Their statement: the last is the main one. Where that names tasks, they come as one list: a row for each would cost the
    /// server and us a message.
    pub(super) fn text(tables: &[&Table]) -> String {
        let Some((last, before)) = tables.split_last() else { return String::new() };
        if last.tail.ends_with(NAMES_TASKS) {
            let mut parts = Self::parts(before);
            parts.push(format!("written AS ({})", last.text(tables.len())));
            return format!("WITH {} SELECT array_agg(id) FROM written", parts.join(", "));
        }
        Self::with(before) + &last.text(tables.len())
    }

    /// The same before a statement of its own: `last`, whose first parameter has the number that it is given.
    pub(super) fn text_before(tables: &[&Table], last: fn(usize) -> String) -> String {
        Self::with(tables) + &last(tables.len() + 1)
    }

    fn parts(tables: &[&Table]) -> Vec<String> {
        let part = |(at, table): (usize, &&Table)| format!("part{at} AS ({})", table.text(at + 1));
        tables.iter().enumerate().map(part).collect()
    }

    fn with(tables: &[&Table]) -> String {
        let parts = Self::parts(tables);
        if parts.is_empty() { String::new() } else { format!("WITH {} ", parts.join(", ")) }
    }

    fn tables(&self) -> Vec<&'static Table> {
        self.parts.iter().map(|rows| rows.table).collect()
    }

    /// Writes them all; what the statement of the last returns.
    pub(super) async fn write(self, conn: &mut PgConnection) -> Result<Vec<PgRow>, StoreError> {
        if self.parts.is_empty() {
            return Ok(Vec::new());
        }
        // Of texts that are here, and numbers.
        let text = AssertSqlSafe(Self::text(&self.tables()));
        let query = sqlx::query_with(text, self.arguments()?);
        query.fetch_all(conn).await.map_err(|error| failed(&error))
    }

    /// In one piece of memory, which does not have to grow.
    fn arguments(self) -> Result<PgArguments, StoreError> {
        let mut arguments = PgArguments::default();
        let size = |rows: &Rows| rows.bytes.len() + 4 * rows.ends.len() + ARRAY_HEAD;
        arguments.reserve(self.parts.len(), self.parts.iter().map(size).sum());
        for rows in self.parts {
            arguments.add(rows).map_err(|error| failed(&sqlx::Error::Encode(error)))?;
        }
        Ok(arguments)
    }

    /// Writes them all together with a statement of its own, whose parameters are numbers; what that returns.
    pub(super) async fn write_before(
        self,
        conn: &mut PgConnection,
        last: fn(usize) -> String,
        numbers: [Option<i64>; 4],
    ) -> Result<Option<PgRow>, StoreError> {
        let text = AssertSqlSafe(Self::text_before(&self.tables(), last));
        let query = numbers.into_iter().fold(sqlx::query_with(text, self.arguments()?), Query::bind);
        query.fetch_optional(conn).await.map_err(|error| failed(&error))
    }
}

/// Writes rows of one table; what the statement returns.
pub(super) async fn put(conn: &mut PgConnection, rows: Option<Rows>) -> Result<Vec<PgRow>, StoreError> {
    Together { parts: rows.into_iter().collect() }.write(conn).await
}

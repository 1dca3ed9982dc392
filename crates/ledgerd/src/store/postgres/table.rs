//! Rows of many tables, each table written with one statement or one COPY.
//!
//! Decides nothing, and knows no table. Invariant: what a table takes has the types of its columns, in their order.

use super::failed;
use crate::store::bind::{Cell, Sink};
use ledger_core::store::StoreError;
use sqlx::Postgres;
use sqlx::postgres::{PgArguments, PgConnection};
use sqlx::query::Query;
use std::sync::OnceLock;

/// Rows from which on they are copied: COPY is one exchange more, and half the work for each row.
const WORTH_COPYING: usize = 32;

/// The type of a column.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Small,
    Int,
    Long,
    Real,
    Text,
    Bytes,
}

use Kind::{Bytes, Int, Long, Real, Small, Text};

impl Kind {
    const fn array(self) -> &'static str {
        match self {
            Small | Int | Long => "bigint[]",
            Real => "float8[]",
            Text => "text[]",
            Bytes => "bytea[]",
        }
    }
}

/// How rows of one shape are written.
pub(super) struct Table {
    /// Before the rows, which are called `new` and have the columns' names.
    head: &'static str,
    columns: &'static [(&'static str, Kind)],
    tail: &'static str,
    text: OnceLock<String>,
}

impl Table {
    pub(super) const fn new(
        head: &'static str,
        columns: &'static [(&'static str, Kind)],
        tail: &'static str,
    ) -> Self {
        Self { head, columns, tail, text: OnceLock::new() }
    }

    /// How new rows are copied into it.
    fn copy(&self) -> String {
        let table = self.head.strip_prefix("INSERT INTO ").unwrap_or(self.head);
        let names: Vec<_> = self.columns.iter().map(|(name, _)| format!("\"{name}\"")).collect();
        format!("COPY {table} ({}) FROM STDIN (FORMAT BINARY)", names.join(", "))
    }

    /// Its statement.
    pub(super) fn text(&'static self) -> &'static str {
        self.text.get_or_init(|| {
            let names: Vec<_> = self.columns.iter().map(|(name, _)| format!("\"{name}\"")).collect();
            let arrays: Vec<_> = self
                .columns
                .iter()
                .enumerate()
                .map(|(at, (_, kind))| format!("${}::{}", at + 1, kind.array()))
                .collect();
            let (names, arrays) = (names.join(", "), arrays.join(", "));
            let rows = format!("unnest({arrays}) AS new ({names})");
            match self.head.strip_prefix("INSERT INTO ") {
                Some(_) => format!("{} ({names}) SELECT {names} FROM {rows} {}", self.head, self.tail),
                None => format!("{} FROM {rows} {}", self.head, self.tail),
            }
        })
    }
}

/// New rows in the format of COPY, which takes half of what a statement takes for a row.
/// <https://www.postgresql.org/docs/current/sql-copy.html>, binary format.
pub(super) struct Copied {
    columns: &'static [(&'static str, Kind)],
    bytes: Vec<u8>,
    at: usize,
}

impl Copied {
    fn of(table: &Table) -> Self {
        let mut bytes = b"PGCOPY\n\xff\r\n\0".to_vec();
        // No flags, no more header.
        bytes.extend([0; 8]);
        Self { columns: table.columns, bytes, at: 0 }
    }

    fn field(&mut self, value: &[u8]) {
        // A value is never so long: a message has 4 MiB at most.
        self.bytes.extend(i32::try_from(value.len()).unwrap_or(i32::MAX).to_be_bytes());
        self.bytes.extend(value);
    }
}

impl Sink for Copied {
    fn add<'v>(&mut self, value: impl Into<Cell<'v>>) {
        if self.at == 0 {
            self.bytes.extend((self.columns.len() as i16).to_be_bytes());
        }
        let (_, kind) = self.columns[self.at];
        self.at = (self.at + 1) % self.columns.len();
        match (kind, value.into()) {
            // What does not fit is refused by a CHECK or read as it is: no count of ours comes near.
            (Small, Cell::Int(value)) => {
                self.field(&i16::try_from(value).unwrap_or(i16::MAX).to_be_bytes());
            }
            (Int, Cell::Int(value)) => self.field(&i32::try_from(value).unwrap_or(i32::MAX).to_be_bytes()),
            (_, Cell::Int(value)) => self.field(&value.to_be_bytes()),
            (_, Cell::Real(value)) => self.field(&value.to_be_bytes()),
            (_, Cell::Text(value)) => self.field(value.as_bytes()),
            (_, Cell::Bytes(value)) => self.field(value),
            (_, Cell::Null) => self.bytes.extend((-1_i32).to_be_bytes()),
        }
    }
}

/// Rows on their way, a column at a time.
pub(super) struct Rows {
    columns: Vec<Column>,
    at: usize,
}

enum Column {
    Int(Vec<Option<i64>>),
    Real(Vec<Option<f64>>),
    Text(Vec<Option<String>>),
    Bytes(Vec<Option<Vec<u8>>>),
}

impl Rows {
    pub(super) fn of(table: &Table) -> Self {
        let column = |(_, kind): &(&str, Kind)| match kind {
            Small | Int | Long => Column::Int(Vec::new()),
            Real => Column::Real(Vec::new()),
            Text => Column::Text(Vec::new()),
            Bytes => Column::Bytes(Vec::new()),
        };
        Self { columns: table.columns.iter().map(column).collect(), at: 0 }
    }

    pub(super) fn bind(
        self,
        mut query: Query<'_, Postgres, PgArguments>,
    ) -> Query<'_, Postgres, PgArguments> {
        for column in self.columns {
            query = match column {
                Column::Int(values) => query.bind(values),
                Column::Real(values) => query.bind(values),
                Column::Text(values) => query.bind(values),
                Column::Bytes(values) => query.bind(values),
            };
        }
        query
    }
}

impl Sink for Rows {
    fn add<'v>(&mut self, value: impl Into<Cell<'v>>) {
        let at = self.at;
        self.at = (at + 1) % self.columns.len();
        match (&mut self.columns[at], value.into()) {
            (Column::Int(values), Cell::Int(value)) => values.push(Some(value)),
            (Column::Real(values), Cell::Real(value)) => values.push(Some(value)),
            (Column::Text(values), Cell::Text(value)) => values.push(Some(value.into_owned())),
            (Column::Bytes(values), Cell::Bytes(value)) => values.push(Some(value.to_vec())),
            (Column::Int(values), _) => values.push(None),
            (Column::Real(values), _) => values.push(None),
            (Column::Text(values), _) => values.push(None),
            (Column::Bytes(values), _) => values.push(None),
        }
    }
}

/// Rows of one table. Made before anything is awaited, for a future that holds an iterator over many types is not known to
/// be safe to move between threads.
pub(super) fn rows<T>(
    table: &'static Table,
    rows: impl IntoIterator<Item = T>,
    mut bind: impl FnMut(&mut Rows, T),
) -> Option<(&'static Table, Rows)> {
    let mut rows = rows.into_iter().peekable();
    rows.peek()?;
    let mut columns = Rows::of(table);
    rows.for_each(|row| bind(&mut columns, row));
    Some((table, columns))
}

/// Writes them with one statement.
pub(super) async fn put(
    conn: &mut PgConnection,
    rows: Option<(&'static Table, Rows)>,
) -> Result<(), StoreError> {
    let Some((table, columns)) = rows else { return Ok(()) };
    let query = columns.bind(sqlx::query(table.text()));
    query.execute(conn).await.map(drop).map_err(|error| failed(&error))
}

/// New rows of a table where nothing can be in their way: copied, when there are many.
pub(super) enum New {
    Few(Rows),
    Many(Copied),
}

impl Sink for New {
    fn add<'v>(&mut self, value: impl Into<Cell<'v>>) {
        match self {
            Self::Few(rows) => rows.add(value),
            Self::Many(rows) => rows.add(value),
        }
    }
}

pub(super) fn new_rows<T>(
    table: &'static Table,
    rows: impl IntoIterator<Item = T>,
    mut bind: impl FnMut(&mut New, T),
) -> Option<(&'static Table, New)> {
    let rows: Vec<T> = rows.into_iter().collect();
    let mut new = match rows.len() {
        0 => return None,
        1..WORTH_COPYING => New::Few(Rows::of(table)),
        _ => New::Many(Copied::of(table)),
    };
    rows.into_iter().for_each(|row| bind(&mut new, row));
    Some((table, new))
}

/// Writes them.
pub(super) async fn put_new(
    conn: &mut PgConnection,
    rows: Option<(&'static Table, New)>,
) -> Result<(), StoreError> {
    let (table, mut bytes) = match rows {
        None => return Ok(()),
        Some((table, New::Few(rows))) => return put(conn, Some((table, rows))).await,
        Some((table, New::Many(rows))) => (table, rows.bytes),
    };
    bytes.extend((-1_i16).to_be_bytes());
    let mut copy = conn.copy_in_raw(&table.copy()).await.map_err(|error| failed(&error))?;
    copy.send(bytes).await.map_err(|error| failed(&error))?;
    copy.finish().await.map(drop).map_err(|error| failed(&error))
}

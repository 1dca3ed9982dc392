//! Tables as a batch writes them: one statement, whatever the number of rows, whose columns travel as arrays.
//!
//! Invariant: every statement has a fixed text, so its plan is made once.

use super::failed;
use crate::store::bind::{Cell, Sink};
use ledger_core::store::StoreError;
use sqlx::Postgres;
use sqlx::postgres::{PgArguments, PgConnection, PgRow};
use sqlx::query::Query;
use std::sync::OnceLock;

/// What a column's values travel as.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Int,
    Real,
    Text,
    Bytes,
}

use Kind::{Bytes, Int, Real, Text};

impl Kind {
    const fn array(self) -> &'static str {
        match self {
            Int => "bigint[]",
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
            Int => Column::Int(Vec::new()),
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

/// As [`put`]; what the statement returns.
pub(super) async fn put_and_read(
    conn: &mut PgConnection,
    rows: Option<(&'static Table, Rows)>,
) -> Result<Vec<PgRow>, StoreError> {
    let Some((table, columns)) = rows else { return Ok(Vec::new()) };
    let query = columns.bind(sqlx::query(table.text()));
    query.fetch_all(conn).await.map_err(|error| failed(&error))
}

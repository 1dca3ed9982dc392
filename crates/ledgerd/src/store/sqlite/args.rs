//! The parameters of a prepared statement.

use crate::store::bind::{Cell, Sink};
use rusqlite::Statement;
use rusqlite::types::{ToSqlOutput, ValueRef};

/// Parameters that are bound one after the other; the statement is run again and again.
///
/// A parameter keeps its value from run to run, and most are the same or NULL in row after row: those are not bound again.
pub(super) struct Args<'s, 'c> {
    statement: &'s mut Statement<'c>,
    bound: usize,
    /// What each parameter has, as far as that is cheap to compare. None: NULL, as all are at first.
    has: Vec<Option<Had>>,
    /// The first that could not be bound.
    error: Option<rusqlite::Error>,
}

#[derive(Clone, Copy, PartialEq)]
enum Had {
    Integer(i64),
    /// Text, bytes or a fraction.
    Other,
}

impl<'s, 'c> Args<'s, 'c> {
    pub(super) fn of(statement: &'s mut Statement<'c>) -> Self {
        // A statement that was used before comes back without values.
        let has = vec![None; statement.parameter_count()];
        Self { statement, bound: 0, has, error: None }
    }

    /// Runs the statement with what was bound, and begins anew with its first parameter.
    pub(super) fn run(&mut self) -> rusqlite::Result<()> {
        self.bound = 0;
        match self.error.take() {
            Some(error) => Err(error),
            None => self.statement.raw_execute().map(drop),
        }
    }
}

impl Sink for Args<'_, '_> {
    fn add<'v>(&mut self, value: impl Into<Cell<'v>>) {
        self.bound += 1;
        let value = value.into();
        let (now, value) = match &value {
            Cell::Null => (None, ValueRef::Null),
            Cell::Int(number) => (Some(Had::Integer(*number)), ValueRef::Integer(*number)),
            Cell::Real(number) => (Some(Had::Other), ValueRef::Real(*number)),
            Cell::Text(text) => (Some(Had::Other), ValueRef::Text(text.as_bytes())),
            Cell::Bytes(bytes) => (Some(Had::Other), ValueRef::Blob(bytes)),
        };
        match self.has.get_mut(self.bound - 1) {
            Some(had) if *had == now && now != Some(Had::Other) => return,
            Some(had) => *had = now,
            None => {}
        }
        if let Err(error) = self.statement.raw_bind_parameter(self.bound, ToSqlOutput::Borrowed(value)) {
            self.error.get_or_insert(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rusqlite::Connection;
    use rusqlite::types::Value;

    #[test]
    fn a_parameter_that_is_not_bound_again_has_the_value_it_had() {
        let conn = Connection::open_in_memory().expect("it opens");
        conn.execute_batch("CREATE TABLE rows (a, b)").expect("a table");
        let rows = [
            (Value::Null, Value::Integer(0)),
            (Value::Integer(0), Value::Integer(0)),
            (Value::Text("x".into()), Value::Integer(0)),
            (Value::Text("y".into()), Value::Null),
            (Value::Integer(0), Value::Null),
            (Value::Null, Value::Blob(vec![1])),
            (Value::Null, Value::Blob(vec![2])),
        ];
        for _ in 0..2 {
            // The second time from the cache, where nothing is left of the last row.
            let mut statement = conn.prepare_cached("INSERT INTO rows VALUES (?, ?)").expect("a statement");
            let mut args = Args::of(&mut statement);
            for (a, b) in &rows {
                for value in [a, b] {
                    args.add(match value {
                        Value::Null => Cell::Null,
                        Value::Integer(number) => Cell::Int(*number),
                        Value::Real(number) => Cell::Real(*number),
                        Value::Text(text) => Cell::Text(text.into()),
                        Value::Blob(bytes) => Cell::Bytes(bytes),
                    });
                }
                args.run().expect("a row");
            }
        }
        let mut found = conn.prepare("SELECT a, b FROM rows ORDER BY rowid").expect("a statement");
        let found = found.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).expect("rows");
        let found: Vec<(Value, Value)> = found.collect::<Result<_, _>>().expect("rows");
        assert_eq!(found, [rows.clone(), rows].concat());
    }
}

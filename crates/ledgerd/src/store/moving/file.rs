//! The file that a ledger travels in: lines of JSON, written and read in one pass, a row at a time.
//!
//! The first line says what it is, then each table of `tables` has a line with its columns and a line for each row, and the
//! last line has the number of rows and the SHA-256 of the rows' lines for each table. Invariants: a row has one form, so
//! that equal ledgers are equal files; a file is sound when its last line says so and nothing follows.

use super::MoveError;
use super::tables::{Kind, Table};
use crate::store::bind::Cell;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::io::{BufRead, Read as _, Write};

/// The format that is written, and the newest that is read.
pub const FORMAT: u64 = 1;
/// Bytes of a line. The longest row has a payload or an answer of a few MiB in base64.
const LONGEST_LINE: u64 = 64 << 20;

/// What a file or a store has of a table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Total {
    /// The table's name.
    pub table: &'static str,
    /// How many rows.
    pub rows: u64,
    /// SHA-256 of their lines in the file, line ends included, in hexadecimal digits.
    pub sha256: String,
}

/// The first line.
#[derive(Serialize, Deserialize)]
struct Header {
    ledgerd: String,
    format: u64,
}

/// The line before the rows of a table.
#[derive(Serialize)]
struct Head {
    table: &'static str,
    columns: Vec<&'static str>,
}

/// The last line.
#[derive(Serialize)]
struct End<'a> {
    end: &'a [Total],
}

/// Counts the rows of a table, and digests them.
#[derive(Default)]
struct Tally {
    rows: u64,
    digest: Sha256,
}

impl Tally {
    fn add(&mut self, line: &[u8]) {
        self.rows += 1;
        self.digest.update(line);
    }

    fn total(self, table: &Table) -> Total {
        let digest = self.digest.finalize();
        let sha256 = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        Total { table: table.name, rows: self.rows, sha256 }
    }
}

/// Writes a file, table by table.
pub(in crate::store) struct Writer<W> {
    out: W,
    line: Vec<u8>,
    tally: Tally,
    totals: Vec<Total>,
}

impl<W: Write> Writer<W> {
    pub(in crate::store) fn begin(out: W) -> Result<Self, MoveError> {
        let mut writer = Self { out, line: Vec::new(), tally: Tally::default(), totals: Vec::new() };
        writer.out.write_all(&header())?;
        Ok(writer)
    }

    pub(in crate::store) fn table(&mut self, table: &Table) -> Result<(), MoveError> {
        Ok(self.out.write_all(&head(table))?)
    }

    /// Writes a row, whose columns `cell` tells by their place.
    pub(in crate::store) fn row<'r>(
        &mut self,
        table: &Table,
        cell: impl Fn(usize, Kind) -> Result<Cell<'r>, MoveError>,
    ) -> Result<(), MoveError> {
        self.line.clear();
        for (at, (_, kind)) in table.columns.iter().enumerate() {
            self.line.push(if at == 0 { b'[' } else { b',' });
            put(&mut self.line, *kind, cell(at, *kind)?)?;
        }
        self.line.extend_from_slice(b"]\n");
        self.tally.add(&self.line);
        Ok(self.out.write_all(&self.line)?)
    }

    /// The table has no more rows.
    pub(in crate::store) fn done(&mut self, table: &Table) {
        self.totals.push(std::mem::take(&mut self.tally).total(table));
    }

    /// Writes the last line; what was written.
    pub(in crate::store) fn end(mut self) -> Result<Vec<Total>, MoveError> {
        self.out.write_all(&json_line(&End { end: &self.totals }))?;
        self.out.flush()?;
        Ok(self.totals)
    }
}

/// A value of a row in a file.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::store) enum Value {
    Null,
    Int(i64),
    Real(f64),
    Text(String),
    Bytes(Vec<u8>),
}

/// Reads a file, table by table.
pub(in crate::store) struct Reader<R> {
    from: R,
    /// The line that is looked at.
    line: Vec<u8>,
    /// Its number, from 1.
    number: u64,
    tally: Tally,
    totals: Vec<Total>,
}

impl<R: BufRead> Reader<R> {
    /// Reads the first line.
    pub(in crate::store) fn begin(from: R) -> Result<Self, MoveError> {
        let mut reader =
            Self { from, line: Vec::new(), number: 0, tally: Tally::default(), totals: Vec::new() };
        reader.advance()?;
        let said: Header = serde_json::from_slice(&reader.line)
            .ok()
            .filter(|said: &Header| said.ledgerd == "ledger")
            .ok_or_else(|| MoveError::Damaged("this is no file of ledgerd export".to_owned()))?;
        if said.format > FORMAT {
            return Err(MoveError::NewerFile { found: said.format });
        }
        if reader.line != header() {
            return Err(reader.damaged("is not as ledgerd writes it"));
        }
        reader.advance()?;
        Ok(reader)
    }

    /// Reads the line before the rows of a table.
    pub(in crate::store) fn table(&mut self, table: &Table) -> Result<(), MoveError> {
        if self.line != head(table) {
            return Err(self.damaged(&format!("should begin the table {}", table.name)));
        }
        self.advance()
    }

    /// The next row of a table; none: it has no more.
    pub(in crate::store) fn row(&mut self, table: &Table) -> Result<Option<Vec<Value>>, MoveError> {
        if !self.line.starts_with(b"[") {
            self.totals.push(std::mem::take(&mut self.tally).total(table));
            return Ok(None);
        }
        self.tally.add(&self.line);
        let row = row_of(table, &self.line).map_err(|what| self.damaged(&what))?;
        self.advance()?;
        Ok(Some(row))
    }

    /// Reads the last line; what the file has, which is what it says it has.
    pub(in crate::store) fn end(mut self) -> Result<Vec<Total>, MoveError> {
        #[derive(Deserialize)]
        struct Said {
            end: Vec<SaidTotal>,
        }
        #[derive(Deserialize)]
        struct SaidTotal {
            table: String,
            rows: u64,
            sha256: String,
        }
        let said: Said =
            serde_json::from_slice(&self.line).map_err(|_| self.damaged("should end the file"))?;
        for (said, found) in said.end.iter().zip(&self.totals) {
            if said.table != found.table || said.rows != found.rows || said.sha256 != found.sha256 {
                return Err(MoveError::Damaged(format!(
                    "the file was altered: it says {} rows of {} with digest {}, and has {} with {}",
                    said.rows, said.table, said.sha256, found.rows, found.sha256
                )));
            }
        }
        if self.line != json_line(&End { end: &self.totals }) {
            return Err(self.damaged("is not as ledgerd writes it"));
        }
        self.line.clear();
        match self.from.fill_buf()? {
            [] => Ok(self.totals),
            _ => Err(MoveError::Damaged("the file goes on after its end".to_owned())),
        }
    }

    /// Reads the next line.
    fn advance(&mut self) -> Result<(), MoveError> {
        self.line.clear();
        self.number += 1;
        let read = (&mut self.from).take(LONGEST_LINE).read_until(b'\n', &mut self.line)?;
        if self.line.ends_with(b"\n") {
            return Ok(());
        }
        Err(if read as u64 == LONGEST_LINE {
            self.damaged("is too long")
        } else {
            MoveError::Damaged(format!("the file is cut short: it ends in line {}", self.number))
        })
    }

    fn damaged(&self, what: &str) -> MoveError {
        MoveError::Damaged(format!("the file was altered: line {} {what}", self.number))
    }
}

fn header() -> Vec<u8> {
    json_line(&Header { ledgerd: "ledger".to_owned(), format: FORMAT })
}

fn head(table: &Table) -> Vec<u8> {
    json_line(&Head { table: table.name, columns: table.columns.iter().map(|(name, _)| *name).collect() })
}

fn json_line(value: &impl Serialize) -> Vec<u8> {
    let mut line = serde_json::to_vec(value).expect("plain structs with text keys always serialize");
    line.push(b'\n');
    line
}

/// Writes a value in its one form. Floats are the shortest text that reads back as the same number.
fn put(line: &mut Vec<u8>, kind: Kind, cell: Cell<'_>) -> Result<(), MoveError> {
    match (kind, cell) {
        (Kind::Rare, Cell::Null) => line.push(b'0'),
        (_, Cell::Null) => line.extend_from_slice(b"null"),
        (Kind::Int | Kind::Rare | Kind::Session, Cell::Int(value)) => write!(line, "{value}")?,
        (Kind::Real, Cell::Real(value)) => write!(line, "\"{value:?}\"")?,
        (Kind::Text, Cell::Text(value)) => {
            serde_json::to_writer(line, &*value).map_err(std::io::Error::from)?;
        }
        (Kind::Bytes, Cell::Bytes(value)) => {
            line.push(b'"');
            line.extend_from_slice(BASE64.encode(value).as_bytes());
            line.push(b'"');
        }
        _ => {
            return Err(
                ledger_core::store::StoreError::Corrupt("a column has another type".to_owned()).into()
            );
        }
    }
    Ok(())
}

/// The values of a row's line; what is wrong with it.
fn row_of(table: &Table, line: &[u8]) -> Result<Vec<Value>, String> {
    let values: Vec<serde_json::Value> =
        serde_json::from_slice(line).map_err(|error| format!("is no row: {error}"))?;
    if values.len() != table.columns.len() {
        return Err(format!(
            "has {} values, and {} has {} columns",
            values.len(),
            table.name,
            table.columns.len()
        ));
    }
    let columns = values.into_iter().zip(table.columns);
    columns
        .map(|(value, (name, kind))| value_of(value, *kind).ok_or_else(|| format!("has no such {name}")))
        .collect()
}

fn value_of(value: serde_json::Value, kind: Kind) -> Option<Value> {
    use serde_json::Value as Json;
    match (kind, value) {
        (Kind::Rare, Json::Null) => None,
        (_, Json::Null) => Some(Value::Null),
        (Kind::Int | Kind::Rare | Kind::Session, Json::Number(number)) => number.as_i64().map(Value::Int),
        (Kind::Real, Json::String(text)) => text.parse().ok().map(Value::Real),
        (Kind::Text, Json::String(text)) => Some(Value::Text(text)),
        (Kind::Bytes, Json::String(text)) => BASE64.decode(text).ok().map(Value::Bytes),
        _ => None,
    }
}

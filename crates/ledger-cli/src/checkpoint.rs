//! The file through which a program and its successor share a checkpoint.
//!
//! It lies in a folder of the attempt's own, which goes when the attempt ends. The program finds there what the attempt
//! before it left, and replaces it (best by a rename) whenever it has got further.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use bytes::Bytes;
use rustix::fs::OFlags;
use tempfile::TempDir;

/// The ledger's limit.
const LIMIT: u64 = 256 * 1024;
/// The file's name when the user gave none.
const NAME: &str = "checkpoint";

/// The file of one attempt.
#[derive(Debug)]
pub(crate) struct CheckpointFile {
    path: PathBuf,
    seen: Option<(u64, SystemTime)>,
    /// Whether the program may write; else the file is there only to be read.
    shared: bool,
    _folder: TempDir,
}

impl CheckpointFile {
    /// Prepares the file; none when there is nothing to read and no `name` to write to.
    ///
    /// # Errors
    /// When the folder or the file cannot be made.
    pub(crate) fn prepare(name: Option<&str>, earlier: Option<&[u8]>) -> io::Result<Option<Self>> {
        if name.is_none() && earlier.is_none() {
            return Ok(None);
        }
        // Created for the owner alone: a checkpoint may hold what the payload held.
        let folder = tempfile::Builder::new().prefix("ledgerd-").tempdir()?;
        let path = folder.path().join(name.unwrap_or(NAME));
        let mut file = Self { path, seen: None, shared: name.is_some(), _folder: folder };
        if let Some(earlier) = earlier {
            std::fs::write(&file.path, earlier)?;
            file.seen = std::fs::metadata(&file.path).ok().as_ref().and_then(mark);
        }
        Ok(Some(file))
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// What the program wrote since the last call; none when nothing new is there.
    ///
    /// # Errors
    /// A sentence when what is there cannot be a checkpoint; told once per change.
    pub(crate) fn news(&mut self) -> Result<Option<Bytes>, String> {
        if !self.shared {
            return Ok(None);
        }
        // NONBLOCK: a pipe in the file's place must not hold the worker.
        let flags = i32::try_from(OFlags::NONBLOCK.bits()).expect("flags fit");
        let Ok(file) = OpenOptions::new().read(true).custom_flags(flags).open(&self.path) else {
            return Ok(None);
        };
        let Some(found) = file.metadata().ok().as_ref().and_then(mark) else { return Ok(None) };
        if self.seen == Some(found) {
            return Ok(None);
        }
        self.seen = Some(found);
        let bytes = read(file).map_err(|error| format!("cannot read the checkpoint: {error}"))?;
        if bytes.len() as u64 > LIMIT {
            return Err(format!("the checkpoint is over its limit of {LIMIT} bytes and was not kept"));
        }
        Ok(Some(bytes.into()))
    }
}

fn read(file: File) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(LIMIT + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn mark(data: &Metadata) -> Option<(u64, SystemTime)> {
    data.is_file().then_some((data.len(), data.modified().ok()?))
}

/// A name that stays in the folder.
pub(crate) fn parse_name(name: &str) -> Result<String, String> {
    if name.is_empty() || name.contains('/') || name == "." || name == ".." {
        return Err(format!(
            "`{name}` is no file name; the folder is made for each attempt, so give a bare name"
        ));
    }
    Ok(name.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_name_and_checkpoint_there_is_no_file() {
        assert!(CheckpointFile::prepare(None, None).expect("prepared").is_none());
    }

    #[test]
    fn the_next_attempt_finds_what_was_left() {
        let mut file =
            CheckpointFile::prepare(Some("ck.json"), Some(b"one")).expect("prepared").expect("a file");
        assert!(file.path().ends_with("ck.json"));
        assert_eq!(std::fs::read(file.path()).expect("there"), b"one");
        assert_eq!(file.news(), Ok(None), "what it was given is no news");
        std::fs::write(file.path(), b"two!").expect("written");
        assert_eq!(file.news(), Ok(Some("two!".into())));
        assert_eq!(file.news(), Ok(None));
        std::fs::write(file.path(), vec![0; LIMIT as usize + 1]).expect("written");
        assert!(file.news().expect_err("too large").contains("over its limit"));
        let path = file.path().to_owned();
        drop(file);
        assert!(!path.exists(), "the folder goes with the attempt");
    }

    #[test]
    fn a_file_without_a_name_is_only_read() {
        let mut file = CheckpointFile::prepare(None, Some(b"one")).expect("prepared").expect("a file");
        std::fs::write(file.path(), b"changed").expect("written");
        assert_eq!(file.news(), Ok(None));
    }

    #[test]
    fn names_stay_in_the_folder() {
        assert!(parse_name("ck.json").is_ok());
        for name in ["", "../x", "/etc/passwd", "..", "a/b"] {
            assert!(parse_name(name).is_err(), "{name}");
        }
    }
}

//! The input of the demo: the text files under a folder, copied, so that an editor beside it changes nothing.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// What no person wrote.
const SKIPPED: [&str; 3] = [".git", "target", "node_modules"];
const LARGEST: u64 = 1 << 20;
/// A file with a zero byte so early is not text; git looks as far.
const LOOK_BYTES: u64 = 8_000;

/// One text file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Source {
    /// Relative to the folder, as people know it.
    pub(super) name: String,
    /// Where its copy is.
    pub(super) copy: PathBuf,
}

/// What was found.
#[derive(Debug)]
pub(super) struct Sources {
    pub(super) files: Vec<Source>,
    pub(super) bytes: u64,
    /// How many there were before `most` was applied.
    pub(super) found: usize,
}

/// Copies at most `most` text files under `folder` to `to`. When there are more, they are taken at equal distances, so
/// that each part of the tree is there.
///
/// # Errors
/// When the folder or one of the files cannot be read.
pub(super) fn copy(folder: &Path, to: &Path, most: usize) -> io::Result<Sources> {
    let mut names = Vec::new();
    collect(folder, Path::new(""), &mut names)?;
    names.sort();
    let found = names.len();
    let taken = found.min(most);
    let mut sources = Sources { files: Vec::with_capacity(taken), bytes: 0, found };
    for index in 0..taken {
        let name = &names[index * found / taken];
        let copy = to.join(name);
        if let Some(parent) = copy.parent() {
            fs::create_dir_all(parent)?;
        }
        sources.bytes += fs::copy(folder.join(name), &copy)?;
        sources.files.push(Source { name: name.clone(), copy });
    }
    Ok(sources)
}

fn collect(folder: &Path, under: &Path, names: &mut Vec<String>) -> io::Result<()> {
    for entry in fs::read_dir(folder.join(under))? {
        let entry = entry?;
        // Names that are not text cannot be in a JSON payload.
        let Ok(name) = entry.file_name().into_string() else { continue };
        let kind = entry.file_type()?;
        let path = under.join(&name);
        if kind.is_dir() && !SKIPPED.contains(&name.as_str()) {
            collect(folder, &path, names)?;
        } else if kind.is_file() && is_text(&folder.join(&path)) {
            names.extend(path.to_str().map(str::to_owned));
        }
    }
    Ok(())
}

/// A file that cannot be read is left out as well: the demo is no test of permissions.
fn is_text(file: &Path) -> bool {
    let head = || {
        let file = File::open(file)?;
        if file.metadata()?.len() > LARGEST {
            return Ok(false);
        }
        let mut head = Vec::new();
        file.take(LOOK_BYTES).read_to_end(&mut head)?;
        Ok::<_, io::Error>(!head.contains(&0))
    };
    head().unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(sources: &Sources) -> Vec<&str> {
        sources.files.iter().map(|source| source.name.as_str()).collect()
    }

    #[test]
    fn text_files_are_found_and_the_rest_is_left_out() {
        let (from, to) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
        let write = |name: &str, bytes: &[u8]| {
            let file = from.path().join(name);
            fs::create_dir_all(file.parent().expect("a parent")).expect("made");
            fs::write(file, bytes).expect("written");
        };
        write("b.txt", b"two\n");
        write("a/deep/x.rs", b"fn x() {}\n");
        write("empty", b"");
        write("image", b"\x89PNG\0");
        write("large.txt", &vec![b'x'; (1 << 20) + 1]);
        write(".git/config", b"x");
        write("a/target/x", b"x");
        write("node_modules/y/z.js", b"x");
        std::os::unix::fs::symlink("b.txt", from.path().join("link")).expect("linked");
        let sources = copy(from.path(), to.path(), 100).expect("copied");
        assert_eq!(names(&sources), ["a/deep/x.rs", "b.txt", "empty"]);
        assert_eq!((sources.bytes, sources.found), (14, 3));
        assert_eq!(fs::read(&sources.files[0].copy).expect("a copy"), b"fn x() {}\n");
    }

    #[test]
    fn of_too_many_files_some_of_each_part_are_taken() {
        let (from, to) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
        for name in 'a'..='j' {
            fs::write(from.path().join(name.to_string()), "x").expect("written");
        }
        let sources = copy(from.path(), to.path(), 4).expect("copied");
        assert_eq!(names(&sources), ["a", "c", "f", "h"]);
        assert_eq!(sources.found, 10);
        assert!(copy(Path::new("/nowhere/at/all"), to.path(), 4).is_err());
    }
}

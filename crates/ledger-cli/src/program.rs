//! Finding a program before the first task does.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, access};

/// The file that `program` names, as execvp(3) would find it in `path`; the error is a sentence for people.
pub(crate) fn find(program: &str, path: Option<&OsStr>) -> Result<PathBuf, String> {
    if program.contains('/') {
        return runnable(Path::new(program)).map_err(|why| format!("cannot run {program}: {why}"));
    }
    let mut blocked = None;
    for folder in std::env::split_paths(path.unwrap_or_else(|| OsStr::new("/usr/bin:/bin"))) {
        let file = folder.join(program);
        match runnable(&file) {
            Ok(file) => return Ok(file),
            Err(why) if file.is_file() => blocked = Some(format!("cannot run {}: {why}", file.display())),
            Err(_) => {}
        }
    }
    Err(blocked
        .unwrap_or_else(|| format!("cannot find the program {program}; give its path, or put it in PATH")))
}

fn runnable(file: &Path) -> Result<PathBuf, &'static str> {
    match std::fs::metadata(file) {
        Err(_) => Err("there is no such file"),
        Ok(data) if !data.is_file() => Err("it is not a file"),
        Ok(_) if access(file, Access::EXEC_OK).is_err() => Err("it is not executable; chmod +x makes it so"),
        Ok(_) => Ok(file.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_as_a_shell_finds_them() {
        assert_eq!(find("sh", Some(OsStr::new("/nowhere:/bin"))), Ok(PathBuf::from("/bin/sh")));
        assert_eq!(find("/bin/sh", None), Ok(PathBuf::from("/bin/sh")));
    }

    #[test]
    fn what_cannot_run_is_told_before_any_task() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("prog");
        std::fs::write(&file, "#!/bin/sh\n").expect("written");
        let sentence = find("prog", Some(folder.path().as_os_str())).expect_err("no permission");
        assert!(sentence.ends_with("it is not executable; chmod +x makes it so"), "{sentence}");
        let sentence = find("no-such-program", None).expect_err("missing");
        assert!(sentence.starts_with("cannot find the program no-such-program;"), "{sentence}");
        assert!(find("/nowhere/prog", None).expect_err("missing").contains("no such file"));
        assert!(find("/bin", None).is_err() && find("/tmp/", None).is_err());
    }
}

//! The table of specified behaviours names tests that exist.

use std::path::{Path, PathBuf};

fn rust_files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() && !path.ends_with("target") {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn every_specified_behaviour_has_its_test() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for folder in ["tests", "crates", "sdk"] {
        rust_files(&root.join(folder), &mut files);
    }
    let sources: String = files.iter().filter_map(|path| std::fs::read_to_string(path).ok()).collect();
    let table =
        std::fs::read_to_string(root.join("docs/reference/behaviours.md")).expect("the table is there");
    let rows: Vec<_> = table.lines().filter(|line| line.starts_with("| ") && line.contains('`')).collect();
    assert_eq!(rows.len(), 48);
    for row in rows {
        let name = row.split('`').nth(1).unwrap_or_default();
        assert!(sources.contains(&format!("fn {name}(")), "{row}");
    }
}

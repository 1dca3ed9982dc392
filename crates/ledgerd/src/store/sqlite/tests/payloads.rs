//! Payloads in files of their own: written once, found again, and gone with their tasks.

use super::{number, raw, store_of};
use crate::store::moving::{backup_sqlite, export_sqlite, import_sqlite, restore_sqlite};
use crate::store::rig::{AGENT, Folder, Kind, New, Rig, payload};
use crate::store::sqlite::payloads::{FOLDER, Folder as Files, Growing};
use crate::store::sqlite::sweep::hold;
use crate::store::sqlite::{OpenError, Options, open};
use ledger_core::TaskId;
use ledger_core::store::{Changed, Changes, Reader as _, StoreError};
use sqlx::Executor;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

const LARGE: usize = 50_000;
const PLACES: &str = "SELECT COUNT(*) FROM payload_places";
/// What the rows of tasks have of their payloads.
const IN_ROWS: &str = "SELECT SUM(LENGTH(payload)) FROM task_specs";

/// Enqueues `n` tasks with large payloads and commits them.
async fn large(rig: &mut Rig, n: usize) -> Vec<TaskId> {
    let ids = rig.enqueue_all((0..n).map(|_| New { bytes: LARGE, ..New::of("a") })).await;
    rig.commit().await;
    ids
}

async fn remove(rig: &mut Rig, ids: &[TaskId]) {
    for id in ids {
        rig.complete(*id).await;
    }
    rig.commit().await;
    for id in ids {
        assert!(rig.get(*id).await.is_some());
    }
    rig.write(Changes { removed: ids.to_vec(), ..Changes::default() }).await;
    rig.commit().await;
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder.join(FOLDER)) else { return Vec::new() };
    let mut files: Vec<_> = entries.map(|entry| entry.expect("it is listed").path()).collect();
    files.sort();
    files
}

/// Looks at payloads in both ways of reading, as far as they are not in memory.
async fn are_whole(rig: &Rig, ids: &[TaskId]) {
    let reader = rig.reader().expect("this is SQLite");
    let wanted: Vec<_> = ids.iter().map(|id| (*id, false)).collect();
    let given = reader.for_workers(&wanted).await.expect("it reads");
    for (id, (data, _)) in ids.iter().zip(given) {
        assert!(data.payload == payload(*id, LARGE), "{id}");
        let view = reader.task(*id, true).await.expect("it reads").expect("it exists");
        assert!(view.data.payload == payload(*id, LARGE) && view.payload_bytes == LARGE as u64, "{id}");
    }
    let view = reader.task(ids[0], false).await.expect("it reads").expect("it exists");
    assert_eq!((view.data.payload.len(), view.payload_bytes), (0, LARGE as u64));
}

#[tokio::test]
async fn large_payloads_of_a_large_batch_are_in_a_file() {
    let mut rig = Rig::sqlite().await;
    // A flush of its own would not be worth it.
    let few = large(&mut rig, 2).await;
    assert!(files(rig.folder()).is_empty());
    assert_eq!(number(rig.folder(), PLACES).await, 0);
    let small = rig.enqueue(New::of("a")).await;
    let many = large(&mut rig, 20).await;
    assert_eq!(number(rig.folder(), PLACES).await, 20);
    let in_rows = 2 * LARGE + payload(small, 0).len();
    assert_eq!(number(rig.folder(), IN_ROWS).await, in_rows as i64);
    let [file] = &files(rig.folder())[..] else { panic!("one file") };
    let folder = rig.folder().join(FOLDER);
    let modes = [file, &folder].map(|path| path.metadata().expect("it exists").permissions().mode() & 0o777);
    assert_eq!(modes, [0o640, 0o750]);
    let sizes = rig.reader().expect("this is SQLite").sizes().await.expect("it reads");
    assert!(sizes.bytes >= 20 * LARGE as u64, "{sizes:?}");

    // What was in memory is gone.
    let mut rig = rig.reopen().await;
    are_whole(&rig, &[few, many].concat()).await;
    rig.reader().expect("this is SQLite").check().await.expect("it is sound");
    // Another run of the daemon, another file.
    let more = large(&mut rig, 6).await;
    assert_eq!(files(rig.folder()).len(), 2);
    let rig = rig.reopen().await;
    are_whole(&rig, &more).await;
}

#[tokio::test]
async fn what_a_failed_batch_wrote_is_written_over() {
    let mut rig = Rig::sqlite().await;
    rig.enqueue(New { key: "k", ..New::of("a") }).await;
    let before = large(&mut rig, 10).await;
    let [file] = &files(rig.folder())[..] else { panic!("one file") };
    let length = || file.metadata().expect("it exists").len();
    let kept = length();
    rig.enqueue_all((0..10).map(|_| New { bytes: LARGE, ..New::of("a") })).await;
    rig.enqueue(New { key: "k", ..New::of("a") }).await;
    let error = rig.store().commit().await.expect_err("the key is taken");
    assert!(matches!(error, StoreError::Statement(_)), "{error}");
    rig.recover().await;
    assert_eq!(length(), kept.next_multiple_of(4_096), "its end is cut off");
    let after = large(&mut rig, 10).await;
    assert_eq!(files(rig.folder()).len(), 1);
    let rig = rig.reopen().await;
    are_whole(&rig, &[before, after].concat()).await;
}

#[tokio::test]
async fn the_room_of_tasks_that_left_comes_back() {
    let mut rig = Rig::sqlite().await;
    let ids = large(&mut rig, 100).await;
    let [file] = &files(rig.folder())[..] else { panic!("one file") };
    let (file, room) = (file.clone(), |file: &Path| file.metadata().expect("it exists").blocks() * 512);
    let full = room(&file);
    let (stay, leave): (Vec<_>, Vec<_>) = ids.iter().partition(|id| id.0.is_multiple_of(10));
    remove(&mut rig, &leave).await;
    // It may still grow, so it is left alone.
    store_of(&mut rig).sweeper.now();
    assert_eq!(room(&file), full);

    // Somebody reads rows of before.
    let mut rig = rig.reopen().await;
    let held = hold(rig.folder()).expect("it can be locked");
    store_of(&mut rig).sweeper.now();
    assert_eq!(room(&file), full);
    drop(held);
    store_of(&mut rig).sweeper.now();
    assert!(room(&file) < full / 5, "{} of {full}", room(&file));
    are_whole(&rig, &stay).await;

    remove(&mut rig, &stay).await;
    store_of(&mut rig).sweeper.now();
    assert!(files(rig.folder()).is_empty());
    assert_eq!(number(rig.folder(), PLACES).await, 0);
}

/// A sweep comes by itself.
#[tokio::test]
async fn a_file_goes_that_nobody_needs() {
    let mut rig = Rig::sqlite().await;
    let ids = large(&mut rig, 6).await;
    remove(&mut rig, &ids).await;
    let mut rig = rig.reopen().await;
    rig.get(TaskId(1)).await;
    let Kind::Sqlite { store, folder, reader } = rig.kind else { panic!("this is SQLite") };
    reader.close().await.expect("it closes");
    store.expect("it is there").close().await.expect("it closes");
    assert!(files(&folder.0).is_empty());
}

#[tokio::test]
async fn another_payload_takes_the_place_of_the_one_in_the_file() {
    let mut rig = Rig::sqlite().await;
    let ids = large(&mut rig, 6).await;
    let task = rig.get(ids[0]).await.expect("it exists");
    let (expected, was) = (task.version, Some(task.state));
    let changed = Changed { task: task.into(), expected, was };
    let respecified = vec![(ids[0], AGENT, Some("another".into()))];
    rig.write(Changes { tasks: vec![changed], respecified, ..Changes::default() }).await;
    rig.commit().await;
    assert_eq!(number(rig.folder(), PLACES).await, 5);
    let rig = rig.reopen().await;
    let view = rig.reader().expect("this is SQLite").task(ids[0], true).await.expect("it reads");
    let view = view.expect("it exists");
    assert_eq!((&view.data.payload[..], view.payload_bytes), (&b"another"[..], 7));
    are_whole(&rig, &ids[1..]).await;
}

#[tokio::test]
async fn damage_is_found() {
    let mut rig = Rig::sqlite().await;
    let ids = large(&mut rig, 6).await;
    let rig = rig.reopen().await;
    let [file] = &files(rig.folder())[..] else { panic!("one file") };
    let whole = fs::read(file).expect("it is read");
    let reader = rig.reader().expect("this is SQLite");
    let byte = |at: u64, value: u8| {
        let file = OpenOptions::new().write(true).open(file).expect("it opens");
        file.write_all_at(&[value], at).expect("it writes");
    };
    byte(7, b'?');
    let error = reader.task(ids[0], true).await.expect_err("it is another payload");
    assert!(matches!(&error, StoreError::Corrupt(what) if what.contains("00000001")), "{error}");
    let error = reader.for_workers(&[(ids[0], false)]).await.expect_err("it is another payload");
    assert!(matches!(error, StoreError::Corrupt(_)), "{error}");
    let error = export_sqlite(rig.folder(), std::io::sink()).await.expect_err("it cannot be moved");
    assert_eq!(error.exit_code(), 65, "{error}");
    let error = backup_sqlite(rig.folder(), &rig.folder().join("backup")).await.expect_err("nor backed up");
    assert_eq!(error.exit_code(), 65, "{error}");
    assert!(!rig.folder().join("backup").exists());
    are_whole(&rig, &ids[1..]).await;
    byte(7, whole[7]);
    are_whole(&rig, &ids).await;

    OpenOptions::new().write(true).open(file).and_then(|file| file.set_len(3 << 10)).expect("it is cut");
    let error = reader.check().await.expect_err("it is too short");
    assert!(matches!(&error, StoreError::Corrupt(what) if what.contains("3072 bytes of")), "{error}");
    fs::remove_file(file).expect("it goes");
    let error = reader.check().await.expect_err("it is not there");
    assert!(matches!(&error, StoreError::Corrupt(what) if what.contains("is missing")), "{error}");
    assert_eq!(
        reader.task(ids[0], false).await.expect("that much is there").map(|view| view.task.id),
        Some(ids[0])
    );
    // Somebody who forgot the folder: its numbers are not given again.
    fs::remove_dir(rig.folder().join(FOLDER)).expect("it goes");
    let mut rig = rig.reopen().await;
    large(&mut rig, 6).await;
    let [file] = &files(rig.folder())[..] else { panic!("one file") };
    assert!(file.ends_with("00000002"), "{}", file.display());
    fs::write(file.with_file_name("00000001"), whole).expect("it is found again");
    are_whole(&rig, &ids).await;
}

#[tokio::test]
async fn a_backup_and_an_export_have_them() {
    let mut rig = Rig::sqlite().await;
    let ids = large(&mut rig, 20).await;
    let (backup, other) = (Folder::new(), Folder::new());
    let file = backup.0.join("ledger.db");
    let taken = backup_sqlite(rig.folder(), &file).await.expect("it is taken");
    let mut exported = Vec::new();
    let told = export_sqlite(rig.folder(), &mut exported).await.expect("it is written");
    assert_eq!(taken.totals, told);
    assert_eq!(import_sqlite(&other.0, &exported[..]).await.expect("it is read"), told);
    for folder in [&backup, &other] {
        assert!(files(&folder.0).is_empty(), "one file has all");
        assert_eq!(number(&folder.0, PLACES).await, 0);
        assert_eq!(number(&folder.0, IN_ROWS).await, 20 * LARGE as i64);
    }
    assert_eq!(export_sqlite(&other.0, std::io::sink()).await.expect("it is written"), told);
    let mut conn = raw(&backup.0).await;
    conn.execute("PRAGMA integrity_check").await.expect("it is sound");
    are_whole(&rig.reopen().await, &ids).await;
}

#[tokio::test]
async fn payloads_of_another_ledger_are_left_alone() {
    let mut rig = Rig::sqlite().await;
    let ids = large(&mut rig, 6).await;
    let other = Folder::new();
    let backup = other.0.join("backup.db");
    backup_sqlite(rig.folder(), &backup).await.expect("it is taken");
    let mut exported = Vec::new();
    export_sqlite(rig.folder(), &mut exported).await.expect("it is written");
    let Kind::Sqlite { store, folder, reader } = rig.kind else { panic!("this is SQLite") };
    reader.close().await.expect("it closes");
    store.expect("it is there").close().await.expect("it closes");
    let (database, elsewhere) = (folder.0.join("ledger.db"), other.0.join("ledger.db"));
    fs::rename(&database, &elsewhere).expect("it is moved");

    let refused = open(&folder.0, Options::default()).await.expect_err("a new ledger would sweep them");
    assert!(matches!(refused, OpenError::Parted(_)), "{refused}");
    let refused = restore_sqlite(&backup, &folder.0).await.expect_err("so would this one");
    assert_eq!((refused.exit_code(), database.exists()), (78, false), "{refused}");
    let refused = import_sqlite(&folder.0, &exported[..]).await.expect_err("and this one");
    assert_eq!((refused.exit_code(), database.exists()), (78, false), "{refused}");

    fs::rename(&elsewhere, &database).expect("it is put back");
    let (store, reader) = open(&folder.0, Options::default()).await.expect("they are together");
    let mut rig = Rig::of(Kind::Sqlite { store: Some(Box::new(store)), folder, reader }).await;
    store_of(&mut rig).sweeper.now();
    are_whole(&rig, &ids).await;
}

#[tokio::test]
async fn no_link_is_followed() {
    let (folder, elsewhere) = (Folder::new(), Folder::new());
    std::os::unix::fs::symlink(&elsewhere.0, folder.0.join(FOLDER)).expect("links can be made");
    let refused = open(&folder.0, Options::default()).await.expect_err("a link is refused");
    assert!(matches!(refused, OpenError::NotAFolder(_)), "{refused}");
}

#[test]
fn a_file_is_followed_by_another_between_batches() {
    let folder = Folder::new();
    let files = Files::of(&folder.0);
    let mut growing = Growing::new(files.clone(), 7, true);
    growing.most = 10_000;
    let closed_below = growing.closed_below();
    let mut put = |batches: usize| {
        let bytes = vec![7; 6_000];
        let mut places = Vec::new();
        for _ in 0..batches {
            places.extend(growing.put([&bytes[..]].into_iter()).expect("it is written"));
        }
        growing.sync().expect("it is on the disk");
        growing.keep();
        places
            .into_iter()
            .map(|place| {
                (place.file, place.at, files.clone().reading().read(place).expect("it is whole").len())
            })
            .collect::<Vec<_>>()
    };
    assert_eq!(put(3), [(7, 0, 6_000), (7, 6_000, 6_000), (7, 12_000, 6_000)]);
    assert_eq!(closed_below.load(Ordering::Relaxed), 7);
    assert_eq!(put(1), [(8, 0, 6_000)]);
    assert_eq!(closed_below.load(Ordering::Relaxed), 8);
    assert_eq!(put(1), [(8, 8_192, 6_000)]);
    assert_eq!(put(1), [(9, 0, 6_000)]);
    assert_eq!(growing.left(), [7, 8].into());
    assert_eq!(growing.left(), [].into());
}

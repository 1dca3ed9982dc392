//! A power cut loses nothing that was acknowledged.
//!
//! A kill leaves the page cache; a power cut does not. So the daemon runs with a library that records its writes and syncs,
//! and at many points of the recording the files are made that a disk could have then, and given to a fresh daemon.

mod recording;

use crate::support::worker::{Stream, complete, hello, lease, outcome};
use crate::support::*;
use ledgerd_client::v1::{self, TaskState};
use recording::{Dice, Image, NAMES, Recording};
use std::ffi::OsString;
use std::path::Path;
use std::sync::{Arc, Mutex};

/// Power cuts, and those of the run without syncs.
const CUTS: usize = 200;
const CUTS_WITHOUT_SYNCS: usize = 20;
/// Enough that the log is moved into the file more than once.
const TASKS: usize = 2_500;
const CALL: usize = 10;
/// Payloads of a call's tasks, in turn: those of the last one are so large that they are in a file of their own.
const PAYLOADS: [usize; 4] = [8 << 10, 6 << 10, 4 << 10, 40 << 10];
/// Payload of the tasks that come with a pause after each call, how many a call has, and how many calls there may be.
const PAUSED: usize = 1 << 10;
const PAUSED_CALL: usize = 1_000;
const PAUSES: usize = 50;
/// Promises that are looked at after a cut: the newest, and as many others.
const LOOKED_AT: usize = 20;

/// Something that a reply said, and how much was recorded when it had come.
#[derive(Clone, Debug)]
struct Promise {
    recorded: u64,
    task: String,
    done: bool,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_survives_a_power_cut() {
    if postgres::is_store() {
        return; // The writes are the server's.
    }
    let run = Run::recorded(&[]).await;
    let (database, log) = (run.recording.counts(0), run.recording.counts(1));
    let payloads = run.recording.counts(2);
    let restarts = run.recording.log_restarts();
    eprintln!(
        "{} promises; writes and syncs: {database:?} of the database, {log:?} of the log, which began anew {restarts} times, \
        {payloads:?} of payloads",
        run.promises.len()
    );
    assert!(database.1 > 1 && log.1 > 100 && restarts > 0, "the load moves the log into the file");
    assert!(payloads.0 > 100 && payloads.1 > 10, "there are payloads in a file of their own");
    assert!(run.recording.all() == run.left, "the recording has every write");
    let lost = run.cut(CUTS).await;
    assert!(lost.is_empty(), "{} of {CUTS} cuts lost something: {lost:#?}", lost.len());
    eprintln!("{CUTS} cuts, nothing is missing");
}

/// The same test can fail: with syncs left out, it does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_syncs_a_power_cut_loses_what_was_acknowledged() {
    if postgres::is_store() {
        return; // The writes are the server's.
    }
    let run = Run::recorded(&[("LEDGERD_TEST_SYNCHRONOUS", "OFF".into())]).await;
    assert_eq!((run.recording.counts(1).1, run.recording.counts(2).1), (0, 0), "nothing syncs the log");
    let lost = run.cut(CUTS_WITHOUT_SYNCS).await;
    eprintln!("without syncs {} of {CUTS_WITHOUT_SYNCS} cuts lost something", lost.len());
    assert!(!lost.is_empty());
}

/// A daemon's life: what it promised, wrote, and left when it was killed.
struct Run {
    promises: Vec<Promise>,
    recording: Recording,
    left: Image,
    folder: Arc<Folder>,
}

impl Run {
    async fn recorded(environment: &[(&str, OsString)]) -> Self {
        let folder = Folder::new();
        let (library, file) = (folder.path().join("writes.so"), folder.path().join("writes"));
        compile(&library);
        let mut all =
            vec![("LD_PRELOAD", library.into_os_string()), ("RECORD_WRITES_TO", file.clone().into())];
        all.extend(environment.iter().cloned());
        let mut daemon = Daemon::launch(Arc::clone(&folder), "127.0.0.1:0", &[], &all).expect("it starts");
        let promises = load(&daemon, &file).await;
        daemon.kill();
        let left = NAMES.map(|name| std::fs::read(daemon.data().join(name)).unwrap_or_default());
        Self { promises, recording: Recording::read(&file), left, folder }
    }

    /// Cuts the power so many times. What was missing, for each cut with a fault.
    async fn cut(self, cuts: usize) -> Vec<String> {
        let seed = self.recording.end() | 1;
        eprintln!("seed {seed}");
        let mut dice = Dice(seed);
        let mut lost = Vec::new();
        let ahead = self.recording.before_payloads_are_synced();
        for number in 0..cuts {
            // Some where rows must not be there yet, for what they name is not: at random that is hit by none.
            let cut = match ahead.len() {
                n if n > 0 && number % 8 == 0 => ahead[dice.below(n)],
                _ => dice.below(self.recording.end() as usize) as u64,
            };
            let image = self.recording.after_power_loss(cut, &mut dice);
            let kept: Vec<&Promise> = self.promises.iter().filter(|p| p.recorded <= cut).collect();
            let newest = kept.iter().rev().take(LOOKED_AT).copied();
            let others: Vec<_> =
                (0..LOOKED_AT.min(kept.len())).map(|_| kept[dice.below(kept.len())]).collect();
            let folder = self.folder.path().join(format!("cut-{number}"));
            if let Err(fault) = look(Folder::at(folder), &image, newest.chain(others)).await {
                lost.push(format!("cut {number} at {cut} of {}: {fault}", self.recording.end()));
            }
        }
        lost
    }
}

fn compile(library: &Path) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/power_loss/writes.c");
    let status = std::process::Command::new("cc")
        .args(["-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o"])
        .args([library, &source])
        .arg("-ldl")
        .status();
    assert!(status.is_ok_and(|status| status.success()), "a C compiler makes the library");
}

/// Enqueues and completes tasks; what was acknowledged when.
async fn load(daemon: &Daemon, file: &Path) -> Vec<Promise> {
    let promises = Arc::new(Mutex::new(Vec::new()));
    let promise = {
        let (promises, file) = (Arc::clone(&promises), file.to_owned());
        move |task: String, done: bool| {
            // Asked after the reply came, so everything that it stands on is recorded before.
            let recorded = file.metadata().expect("the recording is there").len();
            promises.lock().expect("nobody panics").push(Promise { recorded, task, done });
        }
    };
    let mut all = tokio::task::JoinSet::new();
    for _ in 0..2 {
        let (client, promised) = (daemon.client().await, promise.clone());
        all.spawn(async move {
            for bytes in PAYLOADS.into_iter().cycle().take(TASKS / CALL / 2) {
                let new = v1::NewTask { payload: vec![7; bytes].into(), ..task("a") };
                let request = v1::EnqueueTasksRequest { tasks: vec![new; CALL], ..Default::default() };
                let answer = client.tasks().enqueue_tasks(request).await.expect("it is stored").into_inner();
                answer.results.into_iter().for_each(|result| promised(result.task_id, false));
            }
        });
        let mut worker = Stream::open(daemon, hello(&format!("w{}", all.len()), "a", 50)).await;
        let promise = promise.clone();
        all.spawn(async move {
            // The other worker does the rest; at the end one of them may have too few.
            for _ in 0..TASKS / 5 {
                let lease = lease(&worker.assignment().await);
                worker.settle(vec![outcome(lease.clone(), complete(&lease.task_id))]).await;
                assert_eq!(worker.outcome_receipt().await.state(), TaskState::Done);
                promise(lease.task_id, true);
            }
        });
    }
    while let Some(one) = all.join_next().await {
        one.expect("no part of the load panics");
    }
    // Under load the log goes on and on. With a pause after each commit it begins anew, over what it had.
    let client = daemon.client().await;
    for _ in 0..PAUSES {
        let new = v1::NewTask { payload: vec![7; PAUSED].into(), ..task("large") };
        let request = v1::EnqueueTasksRequest { tasks: vec![new; PAUSED_CALL], ..Default::default() };
        let answer = client.tasks().enqueue_tasks(request).await.expect("it is stored").into_inner();
        answer.results.into_iter().for_each(|result| promise(result.task_id, false));
        if Recording::read(file).log_restarts() > 0 {
            break;
        }
    }
    drop(promise);
    Arc::try_unwrap(promises).expect("the load is over").into_inner().expect("nobody panics")
}

/// Whether a fresh daemon on these files has what was promised.
async fn look(
    folder: Arc<Folder>,
    image: &Image,
    promises: impl Iterator<Item = &Promise>,
) -> Result<(), String> {
    let data = folder.path().join("data");
    std::fs::create_dir_all(data.join("ledger.payloads")).expect("the folder is writable");
    for (name, content) in NAMES.iter().zip(image).filter(|(_, content)| !content.is_empty()) {
        std::fs::write(data.join(name), content).expect("the folder is writable");
    }
    let daemon = Daemon::launch(folder, "127.0.0.1:0", &[], &[])?;
    let client = daemon.client().await;
    // Whatever is there is whole, promised or not.
    let newest = v1::ListTasksRequest { page_size: LOOKED_AT as i32, ..Default::default() };
    for found in client
        .tasks()
        .list_tasks(newest)
        .await
        .map_err(|status| format!("the list: {status}"))?
        .into_inner()
        .tasks
    {
        is_whole(&client, &found.task_id).await?;
    }
    for Promise { task, done, .. } in promises {
        let found = is_whole(&client, task).await?;
        if *done && (found.state() != TaskState::Done || found.result != task.as_bytes()) {
            return Err(format!("task {task} was DONE and is {:?}", found.state()));
        }
        let rows = history(&client, task).await;
        let versions: Vec<u64> = rows.iter().map(|row| row.version).collect();
        let last = rows.last().map(|row| (row.to, row.version));
        if versions != (1..=rows.len() as u64).collect::<Vec<_>>()
            || last != Some((found.state, found.version))
        {
            return Err(format!("task {task} is {:?} with history {versions:?}", found.state()));
        }
    }
    Ok(())
}

/// A task with the payload that it was given.
async fn is_whole(client: &ledgerd_client::Client, task: &str) -> Result<v1::Task, String> {
    let request = v1::GetTaskRequest { task_id: task.to_owned(), include_data: true };
    let found = client.tasks().get_task(request).await.map_err(|status| format!("task {task}: {status}"))?;
    let found = found.into_inner().task.unwrap_or_default();
    if found.payload.len() as u64 != found.payload_bytes || found.payload.iter().any(|byte| *byte != 7) {
        return Err(format!("task {task} has another payload"));
    }
    Ok(found)
}

//! `task enqueue --from FILE`: many tasks from a file of JSON lines.
//!
//! A file with a bad line is refused whole, before anything is sent: half an import is harder to mend than none.
//! So it is read twice, and standard input is spooled to a temporary file meanwhile; memory holds a few batches,
//! whatever the file's size. With `--skip-bad` one pass does, and a pipe is imported as it flows.
//!
//! Reading and parsing happen on a thread of their own, so that the next batch is ready when an answer comes.

use std::fs::File;
use std::io::{self, BufRead, BufReader, IsTerminal, Read, Seek, Write};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use ledgerd_client::v1::{BatchMode, EnqueueResult, EnqueueTasksRequest, EnqueueTasksResponse, NewTask};
use prost::Message;
use tokio::sync::{mpsc, oneshot};

use crate::Global;
use crate::connect::connect;
use crate::failure::{Exit, Failure};
use crate::line::{Defaults, parse};
use crate::output::{Format, one_line, print, remark};
use crate::time::now;

/// Tasks in one call, the ledger's limit.
const BATCH_TASKS: usize = 1_000;
/// Bytes of one call: the message limit of 4 MiB, with room for framing and a last task of 1 MiB.
const BATCH_BYTES: usize = 3 * 1024 * 1024;
/// Longest line: a payload of 1 MiB whose every byte is written as an escape of six, with room for the rest.
const LINE_BYTES: u64 = 7 * 1024 * 1024;
/// Bad lines and refusals that are told one by one.
const TOLD: u64 = 20;

/// What to import.
#[derive(Debug)]
pub(crate) struct Import {
    pub(crate) path: String,
    pub(crate) agent: Option<String>,
    pub(crate) task_type: Option<String>,
    pub(crate) skip_bad: bool,
    pub(crate) request_id: String,
}

/// What came of it.
#[derive(Debug, Default, PartialEq, Eq)]
struct Counts {
    created: u64,
    existing: u64,
    refused: u64,
    skipped: u64,
}

impl Import {
    pub(crate) async fn run(self, global: &Global) -> Result<(), Failure> {
        let defaults = Defaults { agent: self.agent.clone(), task_type: self.task_type.clone(), now: now() };
        let (path, skip_bad) = (self.path.clone(), self.skip_bad);
        let checked = tokio::task::spawn_blocking({
            let defaults = defaults.clone();
            move || if skip_bad { open(&path).map(|source| (source, None)) } else { check(&path, &defaults) }
        });
        let (source, total) =
            checked.await.map_err(|error| Failure::new(Exit::Failure, error.to_string()))??;
        let client = connect(global).await?;
        let bar = progress(total);
        // Two batches wait at most: enough to keep the line busy, and some 10 MiB.
        let (send, mut batches) = mpsc::channel(2);
        // Not one of the runtime's threads: a pipe that nobody writes to would hold the whole program at its end.
        let (say, ended) = oneshot::channel();
        std::thread::spawn(move || say.send(read(source, &defaults, skip_bad, &send)));
        let mut counts = Counts::default();
        let mut number = 0_u64;
        while let Some(batch) = batches.recv().await {
            number += 1;
            let request = EnqueueTasksRequest {
                tasks: batch.tasks,
                mode: BatchMode::PerItem.into(),
                // The same file with the same id makes the same batches, so an import that broke off can be repeated.
                request_id: if self.request_id.is_empty() {
                    String::new()
                } else {
                    format!("{}/{number}", self.request_id)
                },
            };
            let response = match client.tasks().enqueue_tasks(request).await {
                Ok(response) => response.into_inner(),
                Err(status) => {
                    bar.finish_and_clear();
                    remark(&format!("stopped before line {}: {}", batch.lines[0], counts.sentence()));
                    return Err(status.into());
                }
            };
            counts.add(&batch.lines, &response, &bar);
            bar.inc(batch.lines.len() as u64);
        }
        bar.finish_and_clear();
        counts.skipped = ended.await.map_err(|error| Failure::new(Exit::Failure, error.to_string()))??;
        match global.output {
            Format::Table => print(&format!("{}\n", counts.sentence()))?,
            Format::Json => print(&counts.json())?,
        }
        counts.verdict()
    }
}

impl Counts {
    fn add(&mut self, lines: &[u64], response: &EnqueueTasksResponse, bar: &ProgressBar) {
        for (line, EnqueueResult { created, error, .. }) in lines.iter().zip(&response.results) {
            match error {
                None if *created => self.created += 1,
                None => self.existing += 1,
                Some(error) => {
                    self.refused += 1;
                    if self.refused <= TOLD {
                        let text = format!(
                            "line {line}: {} ({})",
                            one_line(&error.message),
                            one_line(&error.reason)
                        );
                        bar.suspend(|| remark(&text));
                    }
                }
            }
        }
    }

    fn sentence(&self) -> String {
        let mut text =
            format!("{} created, {} existing, {} refused", self.created, self.existing, self.refused);
        if self.skipped > 0 {
            text.push_str(&format!(", {} bad lines skipped", self.skipped));
        }
        text
    }

    fn json(&self) -> String {
        let Self { created, existing, refused, skipped } = self;
        let value = serde_json::json!({
            "created": created, "existing": existing, "refused": refused, "skipped": skipped,
        });
        format!("{value:#}\n")
    }

    fn verdict(&self) -> Result<(), Failure> {
        if self.refused == 0 {
            return Ok(());
        }
        Err(Failure::new(Exit::Failure, format!("{} tasks were refused", self.refused)))
    }
}

fn progress(total: Option<u64>) -> ProgressBar {
    let target = if std::io::stderr().is_terminal() {
        ProgressDrawTarget::stderr()
    } else {
        ProgressDrawTarget::hidden()
    };
    let bar = ProgressBar::with_draw_target(total, target);
    let template = if total.is_some() {
        "{bar:40} {human_pos}/{human_len} {per_sec}"
    } else {
        "{spinner} {human_pos} {per_sec}"
    };
    bar.set_style(ProgressStyle::with_template(template).expect("the template is valid"));
    bar
}

/// One call's worth of tasks, each with its line number.
#[derive(Debug, Default)]
struct Batch {
    lines: Vec<u64>,
    tasks: Vec<NewTask>,
    bytes: usize,
}

type Source = Box<dyn BufRead + Send>;

fn open(path: &str) -> Result<Source, Failure> {
    if path == "-" {
        return Ok(Box::new(BufReader::new(io::stdin())));
    }
    let file = File::open(path).map_err(|error| Failure::usage(format!("cannot read {path}: {error}")))?;
    Ok(Box::new(BufReader::with_capacity(256 * 1024, file)))
}

/// Reads everything once, refuses it when a line is bad, and gives it back from the start with its number of tasks.
fn check(path: &str, defaults: &Defaults) -> Result<(Source, Option<u64>), Failure> {
    let mut source = open(path)?;
    // A pipe cannot be read twice, whatever it is called.
    let is_file = path != "-" && std::fs::metadata(path).is_ok_and(|data| data.is_file());
    let mut spool = if is_file { None } else { Some(tempfile::tempfile()?) };
    let (mut tasks, mut bad) = (0, 0);
    let mut number = 0;
    let mut line = Vec::new();
    loop {
        let read = read_line(&mut source, &mut line)?;
        let Some(whole) = read else { break };
        number += 1;
        let task = if whole { parse_line(&line, defaults) } else { Some(Err(too_long())) };
        match task {
            None => {}
            Some(Ok(_)) => tasks += 1,
            Some(Err(reason)) => {
                bad += 1;
                tell_bad(bad, number, &reason);
            }
        }
        if let Some(spool) = &mut spool {
            spool.write_all(&line)?;
            spool.write_all(b"\n")?;
        }
    }
    if bad > 0 {
        let lines = if bad == 1 { "1 bad line".into() } else { format!("{bad} bad lines") };
        return Err(Failure::usage(format!(
            "{path} has {lines}, so nothing was sent; --skip-bad sends the others"
        )));
    }
    let source: Source = match spool {
        Some(mut spool) => {
            spool.rewind()?;
            Box::new(BufReader::new(spool))
        }
        None => open(path)?,
    };
    Ok((source, Some(tasks)))
}

/// Sends batches until the end of the source. Returns how many bad lines were left out.
fn read(
    mut source: Source,
    defaults: &Defaults,
    skip_bad: bool,
    send: &mpsc::Sender<Batch>,
) -> Result<u64, Failure> {
    let mut skipped = 0;
    let mut number = 0;
    let mut line = Vec::new();
    let mut batch = Batch::default();
    while let Some(whole) = read_line(&mut source, &mut line)? {
        number += 1;
        let task = if whole { parse_line(&line, defaults) } else { Some(Err(too_long())) };
        let task = match task {
            None => continue,
            Some(Ok(task)) => task,
            Some(Err(reason)) if skip_bad => {
                skipped += 1;
                tell_bad(skipped, number, &reason);
                continue;
            }
            Some(Err(reason)) => {
                let what = format!("line {number} changed while the file was read: {reason}");
                return Err(Failure::new(Exit::Failure, what));
            }
        };
        // Tag and length of the task in its request take at most 5 bytes.
        let size = task.encoded_len() + 5;
        if batch.tasks.len() == BATCH_TASKS || (!batch.tasks.is_empty() && batch.bytes + size > BATCH_BYTES) {
            // Nobody listens any more: the call failed, and that is told there.
            let Ok(()) = send.blocking_send(std::mem::take(&mut batch)) else { return Ok(skipped) };
        }
        batch.bytes += size;
        batch.lines.push(number);
        batch.tasks.push(task);
    }
    if !batch.tasks.is_empty() {
        let _ = send.blocking_send(batch);
    }
    Ok(skipped)
}

/// The next line without its end; false when it was cut for being too long, none at the end.
fn read_line(source: &mut Source, line: &mut Vec<u8>) -> io::Result<Option<bool>> {
    line.clear();
    if source.by_ref().take(LINE_BYTES).read_until(b'\n', line)? == 0 {
        return Ok(None);
    }
    if line.last() == Some(&b'\n') {
        line.pop();
        return Ok(Some(true));
    }
    if (line.len() as u64) < LINE_BYTES {
        return Ok(Some(true));
    }
    line.clear();
    source.skip_until(b'\n')?;
    Ok(Some(false))
}

/// Empty lines are no tasks and no errors.
fn parse_line(line: &[u8], defaults: &Defaults) -> Option<Result<NewTask, String>> {
    (!line.trim_ascii().is_empty()).then(|| parse(line, defaults))
}

fn too_long() -> String {
    format!("is longer than {LINE_BYTES} bytes")
}

fn tell_bad(count: u64, number: u64, reason: &str) {
    if count <= TOLD {
        remark(&format!("line {number}: {}", one_line(reason)));
    }
}

#[cfg(test)]
mod tests {
    use ledgerd_client::v1::ItemError;

    use super::*;

    fn defaults() -> Defaults {
        Defaults { agent: None, task_type: None, now: "2026-01-31T09:00:00Z".parse().expect("a time") }
    }

    fn file(text: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        file.write_all(text.as_bytes()).expect("written");
        file
    }

    fn batches(text: &str, skip_bad: bool) -> (Vec<Batch>, Result<u64, Failure>) {
        let source: Source = Box::new(io::Cursor::new(text.to_owned().into_bytes()));
        let (send, mut receive) = mpsc::channel(1_000);
        let result = read(source, &defaults(), skip_bad, &send);
        drop(send);
        (std::iter::from_fn(|| receive.blocking_recv()).collect(), result)
    }

    #[test]
    fn batches_hold_a_thousand_tasks_with_their_lines() {
        let text = "{\"agent\":\"a\",\"task_type\":\"t\"}\n\n".repeat(1_001);
        let (batches, skipped) = batches(&text, false);
        assert_eq!(skipped, Ok(0));
        assert_eq!(batches.iter().map(|batch| batch.tasks.len()).collect::<Vec<_>>(), [1_000, 1]);
        assert_eq!(batches[1].lines, [2_001]);
    }

    #[test]
    fn batches_stay_below_the_message_limit() {
        let payload = "x".repeat(1_000_000);
        let text = format!("{{\"agent\":\"a\",\"task_type\":\"t\",\"payload\":\"{payload}\"}}\n").repeat(7);
        let (batches, _) = batches(&text, false);
        assert_eq!(batches.iter().map(|batch| batch.tasks.len()).collect::<Vec<_>>(), [3, 3, 1]);
        for batch in batches {
            let request = EnqueueTasksRequest { tasks: batch.tasks, ..EnqueueTasksRequest::default() };
            assert!(request.encoded_len() <= BATCH_BYTES);
        }
    }

    #[test]
    fn bad_lines_are_left_out_only_when_asked() {
        let text = "{\"agent\":\"a\",\"task_type\":\"t\"}\nnope\n{\"agent\":\"a\",\"task_type\":\"t\"}";
        let (good, skipped) = batches(text, true);
        assert_eq!((good[0].lines.as_slice(), skipped), ([1, 3].as_slice(), Ok(1)));
        assert!(batches(text, false).1.is_err());
    }

    #[test]
    fn a_file_with_a_bad_line_is_refused_whole() {
        let bad = file("{\"agent\":\"a\",\"task_type\":\"t\"}\n{\"agent\":1}\n");
        let refused = check(bad.path().to_str().expect("a path"), &defaults()).err();
        let Some(Failure::Said(Exit::Usage, sentence)) = refused else { panic!("{refused:?}") };
        assert!(sentence.contains("has 1 bad line, so nothing was sent"), "{sentence}");
        let good = file("{\"agent\":\"a\",\"task_type\":\"t\"}\n\n");
        let (_, total) = check(good.path().to_str().expect("a path"), &defaults()).expect("good");
        assert_eq!(total, Some(1));
        assert!(check("/nowhere/at/all", &defaults()).is_err());
    }

    #[test]
    fn a_line_without_end_does_not_fill_the_memory() {
        let text =
            format!("{}\n{{\"agent\":\"a\",\"task_type\":\"t\"}}", "x".repeat(LINE_BYTES as usize + 9));
        let (good, skipped) = batches(&text, true);
        assert_eq!((good[0].lines.as_slice(), skipped), ([2].as_slice(), Ok(1)));
    }

    #[test]
    fn answers_are_counted_item_by_item() {
        let result = |created, error| EnqueueResult { task_id: String::new(), created, error };
        let refusal = ItemError { reason: "PAYLOAD_TOO_LARGE".into(), ..ItemError::default() };
        let response = EnqueueTasksResponse {
            results: vec![result(true, None), result(false, None), result(false, Some(refusal))],
        };
        let mut counts = Counts::default();
        counts.add(&[1, 2, 3], &response, &ProgressBar::hidden());
        assert_eq!(counts, Counts { created: 1, existing: 1, refused: 1, skipped: 0 });
        assert_eq!(counts.sentence(), "1 created, 1 existing, 1 refused");
        assert!(counts.verdict().is_err());
        assert_eq!(
            counts.json(),
            "{\n  \"created\": 1,\n  \"existing\": 1,\n  \"refused\": 1,\n  \"skipped\": 0\n}\n"
        );
    }
}

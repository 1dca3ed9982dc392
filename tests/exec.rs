//! Any program is a worker: `ledgerd worker exec` against the real daemon.

use crate::support::*;
use ledgerd_client::v1::{self, TaskState};
use std::ffi::OsString;
use std::process::{Child, Stdio};

/// A `worker exec` that ends with the test.
pub(crate) struct Worker(Child);

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn exec(daemon: &Daemon, program: &[&str]) -> Worker {
    exec_as(daemon, "exec", program)
}

fn exec_as(daemon: &Daemon, id: &str, program: &[&str]) -> Worker {
    exec_with(daemon, id, program, &[])
}

/// One with these variables besides.
pub(crate) fn exec_with(
    daemon: &Daemon,
    id: &str,
    program: &[&str],
    environment: &[(&str, OsString)],
) -> Worker {
    let child = command()
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .args([
            "--address",
            &daemon.address,
            "worker",
            "exec",
            "--agent",
            "a",
            "--worker-id",
            id,
            "--grace",
            "1s",
        ])
        .arg("--")
        .args(program)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the binary starts");
    Worker(child)
}

fn json(payload: &str) -> v1::NewTask {
    v1::NewTask { payload: payload.as_bytes().to_vec().into(), ..task("a") }
}

#[tokio::test]
async fn payload_is_standard_input_and_standard_output_the_result() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let _worker = exec(&daemon, &["tr", "a-z", "A-Z"]);
    let id = enqueue(&client, json("\"hello\"")).await;
    assert_eq!(&in_state(&client, &id, TaskState::Done).await.result[..], b"\"HELLO\"");
}

#[tokio::test]
async fn arguments_and_environment_carry_what_is_known_of_the_task() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let script = "printf '%s|%s|%s|%s' \"$1\" \"$LEDGERD_TASK_ID\" \"$LEDGERD_ATTEMPT\" \"$TRACEPARENT\"";
    let _worker = exec(&daemon, &["sh", "-c", script, "sh", "{{payload.prompt}}"]);
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let task = v1::NewTask { traceparent: trace.into(), ..json(r#"{"prompt":"a; b $(c)"}"#) };
    let id = enqueue(&client, task).await;
    let result = in_state(&client, &id, TaskState::Done).await.result;
    assert_eq!(String::from_utf8_lossy(&result), format!("a; b $(c)|{id}|1|{trace}"));
}

#[tokio::test]
async fn exit_codes_decide() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    configure(&client, "a", quick()).await;
    let _worker = exec(&daemon, &["sh", "-c", "echo why >&2; exit {{payload}}"]);
    let once = || Some(v1::TaskPolicy { max_retries: Some(1), ..v1::TaskPolicy::default() });
    let cases = [
        ("0", TaskState::Done, ""),
        ("78", TaskState::Failed, "PERMANENT"),
        ("75", TaskState::Failed, "RETRIES_EXHAUSTED"),
        ("3", TaskState::Failed, "RETRIES_EXHAUSTED"),
    ];
    for (code, state, reason) in cases {
        let id = enqueue(&client, v1::NewTask { policy: once(), ..json(code) }).await;
        let task = in_state(&client, &id, state).await;
        assert_eq!(task.reason, reason, "exit {code}");
        if state == TaskState::Failed {
            let error = task.last_error.expect("it failed");
            assert!(format!("{}{}", error.message, error.detail).contains("why"), "{error:?}");
        }
    }
}

#[tokio::test]
async fn a_worker_killed_with_sigkill_takes_its_programs_along_and_is_taken_over() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    configure(&client, "a", quick()).await;
    let marker = daemon.folder.path().join("pid");
    let script =
        format!("if [ -e {0} ]; then echo again; else echo $$ > {0}; exec sleep 600; fi", marker.display());
    let mut worker = exec(&daemon, &["sh", "-c", &script]);
    let id = enqueue(&client, json("1")).await;
    let pid = eventually("the program runs", async || {
        std::fs::read_to_string(&marker).ok().and_then(|text| text.trim().parse::<u32>().ok())
    })
    .await;
    eventually("its ack is recorded", async || (get(&client, &id).await.attempt == 1).then_some(())).await;
    worker.0.kill().expect("it is ours");
    let _ = worker.0.wait();
    eventually("the program is gone", async || {
        let status = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        (status.is_empty() || status.contains(") Z ")).then_some(())
    })
    .await;
    let _again = exec(&daemon, &["sh", "-c", &script]);
    let done = in_state(&client, &id, TaskState::Done).await;
    assert_eq!((done.losses, done.fence, &done.result[..]), (1, 2, &b"again\n"[..]));
}

#[tokio::test]
async fn a_cancel_ends_the_program() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let _worker = exec(&daemon, &["sleep", "600"]);
    let id = enqueue(&client, json("1")).await;
    eventually("it has started", async || (get(&client, &id).await.attempt == 1).then_some(())).await;
    let request = v1::CancelTaskRequest { task_id: id.clone(), ..Default::default() };
    client.tasks().cancel_task(request).await.expect("asked");
    assert_eq!(in_state(&client, &id, TaskState::Cancelled).await.reason, "USER");
}

#[tokio::test]
async fn a_program_that_is_not_there_is_said_at_the_start() {
    let daemon = Daemon::start();
    let output = command()
        .args(["--address", &daemon.address, "worker", "exec", "--agent", "a", "--", "no-such-program"])
        .output()
        .expect("the binary runs");
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("no-such-program"));
}

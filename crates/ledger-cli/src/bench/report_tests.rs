use clap::Parser;

use super::*;

#[derive(Debug, Parser)]
struct Line {
    #[command(flatten)]
    args: Args,
}

fn outcome(line: &str) -> Outcome {
    let args = Line::try_parse_from(line.split(' ')).expect("arguments").args;
    let mut produced = Produced { tasks: 2_000, ..Produced::default() };
    produced.calls.record(Duration::from_micros(120));
    let mut worked = Worked { frames: 40, ..Worked::default() };
    worked.starts.record(Duration::from_micros(250));
    Outcome {
        args,
        own: true,
        version: "0.1.0".into(),
        window: Duration::from_secs(2),
        total: Duration::from_millis(2_100),
        done: 2_000,
        done_in_time: 1_800,
        lost: 0,
        counted: 2_000,
        transitions: 6_000,
        commits: 10,
        spent: Spent { cpu: Some(Duration::from_millis(20)), written: None },
        memory: Some(61_440_000),
        client_cpu: Some(Duration::from_millis(6)),
        produced,
        worked,
        first_error: None,
    }
}

#[test]
fn the_object_has_stable_names() {
    let report = Report::new(outcome("bench --store postgres://u:secret@db/x"));
    let value: serde_json::Value = serde_json::from_str(&report.json()).expect("JSON");
    assert_eq!(value["lifecycles_per_s"], 900.0);
    assert_eq!(value["enqueues_per_s"], 1_000.0);
    assert_eq!(value["call_ms"]["p99_9"], 0.12);
    assert_eq!(value["enqueue_to_start_ms"]["p50"], 0.25);
    assert_eq!(value["server_cpu_us_per_lifecycle"], 10.0);
    assert_eq!(value["client_cpu_us_per_lifecycle"], 3.0);
    assert_eq!(value["server_memory_mb"], 61.4);
    assert_eq!(value["written_bytes_per_lifecycle"], serde_json::Value::Null);
    assert_eq!(value["fsyncs_per_lifecycle"], 0.005);
    assert_eq!(value["tasks"], 2_000);
    assert_eq!(value["drain_s"], 0.1);
    assert_eq!(value["verified"], true);
    assert_eq!(value["settings"]["backlog"], 8_000);
    assert_eq!(value["settings"]["store"], "postgres://***@db/x");
    assert!(value["machine"]["cores"].as_u64().is_some_and(|cores| cores > 0));
}

#[test]
fn people_get_the_same_figures() {
    let text = Report::new(outcome("bench --batch 1 --explicit-acks")).table();
    let text: Vec<String> =
        text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    for line in [
        "load 16 callers × 1 a call, no request ids",
        "workers 4 × 1000, explicit acks",
        "lifecycles/s 900",
        "call p50 0.12 p99 0.12 p99.9 0.12 ms",
        "daemon CPU 10 µs a lifecycle",
        "daemon memory 61.4 MB at the end",
        "written -",
        "tasks 2000 in 2s, drained in 100ms",
    ] {
        assert!(text.iter().any(|found| found == line), "{line}: {text:?}");
    }
}

#[test]
fn what_does_not_agree_is_not_verified() {
    assert_eq!(Report::new(outcome("bench")).fault(), None);
    let explicit = Report::new(outcome("bench --explicit-acks"));
    assert!(!explicit.verified, "each ack is a transition of its own");
    assert!(explicit.fault().is_some_and(|fault| fault.contains("6000 transitions of 8000 expected")));
    let broken = |edit: fn(&mut Outcome)| {
        let mut outcome = outcome("bench");
        edit(&mut outcome);
        Report::new(outcome).fault().expect("a fault")
    };
    assert!(broken(|seen| seen.done = 1_999).contains("1999 outcomes were receipted"));
    assert!(broken(|seen| seen.counted = 2_001).contains("counts 2001 done"));
    let told = broken(|seen| {
        seen.produced.errors = 1;
        seen.first_error = Some("enqueue: Internal: a bug".into());
    });
    assert!(told.ends_with("1 errors; first error: enqueue: Internal: a bug"), "{told}");
    broken(|seen| seen.lost = 1);
    broken(|seen| (seen.produced.tasks, seen.done, seen.counted, seen.transitions) = (0, 0, 0, 0));
}

#[test]
fn flags_have_bounds() {
    for line in
        ["b --callers 0", "b --batch 1001", "b --payload 7", "b --capacity 10001", "b --target h:1 --store x"]
    {
        assert!(Line::try_parse_from(line.split(' ')).is_err(), "{line}");
    }
    let args = Line::try_parse_from("b --backlog 5".split(' ')).expect("arguments").args;
    assert_eq!((args.duration.0, args.backlog, args.batch), (Duration::from_secs(10), Some(5), 100));
}

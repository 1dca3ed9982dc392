//! What tonic does by itself, set up as its documentation shows: the faults that this daemon's own accept loop, limits and drain
//! are for. Two of them stand beside their cures in `transport`: streams without a limit, and silent connections kept for ever.

use super::raw::*;
use crate::support::secure::Way;
use crate::support::sockets::Place;
use crate::support::*;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tonic::transport::Server;

both_ways!(a_drain_says_goaway_before_it_cuts);

/// A server of tonic alone.
pub(super) async fn bare() -> Place {
    serve(Server::builder()).await
}

async fn serve(mut server: Server) -> Place {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    let (_, health) = tonic_health::server::health_reporter();
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    tokio::spawn(server.add_service(health).serve_with_incoming(incoming));
    Place { address, tls: None }
}

/// Processor time that a process has used.
pub(super) fn cpu(pid: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it lives");
    // The name, in brackets, may have blanks in it. Times are the 14th and the 15th, in hundredths of a second.
    let (_, after) = stat.rsplit_once(')').expect("a name");
    let ticks: u64 = after.split_whitespace().skip(11).take(2).flat_map(str::parse::<u64>).sum();
    Duration::from_millis(ticks * 10)
}

/// Leaves a process so many more descriptors than it has open.
pub(super) fn leave_descriptors(pid: u32, more: usize) {
    let open = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("it lives").count();
    let limit = format!("--nofile={0}:{0}", open + more);
    let status = Command::new("prlimit").args(["--pid", &pid.to_string(), &limit]).status();
    assert!(status.is_ok_and(|status| status.success()), "prlimit works on our own child");
}

/// Says that [`a_process_of_tonic_alone`] is meant.
const AS_A_PROCESS: &str = "LEDGERD_TEST_TONIC_ALONE";
const LISTENS: &str = "tonic alone listens on ";

/// No test, but a program: descriptors belong to a process, and this one has other tests in it.
#[test]
fn a_process_of_tonic_alone() {
    if std::env::var_os(AS_A_PROCESS).is_none() {
        return;
    }
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let place = runtime.block_on(bare());
    println!("{LISTENS}{}", place.address);
    // Whoever started it holds the other end.
    let _ = std::io::stdin().read(&mut [0]);
}

struct Process(Child);

impl Process {
    fn start() -> (Self, String) {
        let mut command = Command::new(std::env::current_exe().expect("it runs"));
        command.args(["wire::alone::a_process_of_tonic_alone", "--exact", "--nocapture"]);
        command.env(AS_A_PROCESS, "1").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("it starts");
        let mut lines = BufReader::new(child.stdout.take().expect("it is piped")).lines();
        let address = lines
            .find_map(|line| Some(line.ok()?.split_once(LISTENS)?.1.to_owned()))
            .expect("it says where it listens");
        (Self(child), address)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn tonic_alone_spins_when_descriptors_run_out() {
    let (tonic, address) = Process::start();
    leave_descriptors(tonic.0.id(), 0);
    let before = cpu(tonic.0.id());
    let waits = TcpStream::connect(&address).await.expect("the queue takes it");
    // One connection that cannot be taken, and nothing else to do: it tries for ever, without a pause. What this daemon does is
    // in `transport::a_daemon_out_of_descriptors_waits_and_goes_on`.
    eventually("it burns a second of processor time", async || {
        (cpu(tonic.0.id()) - before >= Duration::from_secs(1)).then_some(())
    })
    .await;
    drop(waits);
}

/// Whether a connection is told that it ends.
async fn says_goaway(place: &Place) -> bool {
    let mut raw = Raw::open(place).await.expect("it listens");
    within("it ends", raw.next_of(GOAWAY)).await.is_ok()
}

#[tokio::test]
async fn tonic_alone_cuts_old_connections_without_a_word() {
    let age = Duration::from_millis(50);
    assert!(says_goaway(&serve(Server::builder().max_connection_age(age)).await).await, "as documented");
    // With a grace, which is documented to follow the GOAWAY, there is none: so the daemon sets neither.
    let server = Server::builder().max_connection_age(age).max_connection_age_grace(age);
    assert!(!says_goaway(&serve(server).await).await, "tonic has been mended: a grace may be set");
}

async fn a_drain_says_goaway_before_it_cuts(way: Way) {
    let mut daemon = way.start();
    let mut raw = Raw::open(&Place::of(&daemon)).await.expect("the daemon listens");
    raw.next_of(SETTINGS).await.expect("its settings");
    daemon.signal("TERM");
    let told = within("it is told", raw.next_of(GOAWAY)).await.expect("before the end");
    assert_eq!(told.error(), 0, "nobody did anything wrong");
    drop(raw);
    assert!(daemon.ended().await.success());
}

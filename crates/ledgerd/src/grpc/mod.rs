//! The wire: `ledger.v1` in, commands of the ledger out.
//!
//! Whether a caller may make a call is asked before, by a layer; see [`access`].
//!
//! Handlers check what came, pass a command on, await the answer and say it. They decide nothing, and a handler that is
//! dropped undoes nothing: the command is in the ledger's hands. Types of the wire do not leave this folder.

pub(crate) mod access;
mod admin;
mod convert;
mod counted;
mod defaults;
mod reasons;
mod scaler;
pub(crate) mod status;
mod task;
mod worker;

use crate::ledger::Handle;
pub(crate) use access::{Access, Method};
pub(crate) use defaults::agent_defaults;
use ledger_core::limits::MESSAGE_BYTES;
use tokio_util::sync::CancellationToken;
use tonic::codec::CompressionEncoding::{Gzip, Zstd};
use tonic::service::Routes;
use wire::admin_service_server::AdminServiceServer;
use wire::task_service_server::TaskServiceServer;
use wire::worker_service_server::WorkerServiceServer;

/// Generated from `proto/`, which is where its words are explained.
#[allow(missing_docs, unreachable_pub, clippy::all)]
mod wire {
    tonic::include_proto!("ledger.v1");
}

/// Descriptors of every file that is served, for reflection.
pub(crate) const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptor.bin"));

/// Full names of the services, as health and clients spell them.
pub(crate) const SERVICES: [&str; 3] =
    ["ledger.v1.TaskService", "ledger.v1.WorkerService", "ledger.v1.AdminService"];

/// Names of the unary methods of `ledger.v1`, `package.Service/Method`.
pub(crate) fn unary_methods() -> impl Iterator<Item = String> {
    use prost::Message;
    // Our build made them.
    let set = prost_types::FileDescriptorSet::decode(DESCRIPTORS).unwrap_or_default();
    let ours = set.file.into_iter().filter(|file| file.package() == "ledger.v1");
    ours.flat_map(|file| file.service).flat_map(|service| {
        let of = format!("ledger.v1.{}", service.name());
        let unary = service
            .method
            .into_iter()
            .filter(|method| !method.client_streaming() && !method.server_streaming());
        unary.map(move |method| format!("{of}/{}", method.name()))
    })
}

/// Calls that are no unary calls, or wait on purpose: bounded by their own rules, not by the deadline of a call.
pub(crate) const WORK: &str = "/ledger.v1.WorkerService/Work";
/// What stays open as long as its caller listens.
pub(crate) const STREAMS: [&str; 3] = [
    "/ledger.v1.TaskService/WatchTasks",
    "/externalscaler.ExternalScaler/StreamIsActive",
    "/externalscaler.ExternalScaler/StreamMetricSpec",
];
/// The long poll.
pub(crate) const WAIT_TASK: &str = "/ledger.v1.TaskService/WaitTask";

/// Time that the caller gives a call, when it said so; put there by the server.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TimeLeft(pub(crate) std::time::Duration);

/// The three services, and the one for autoscalers. Long polls and watches end when `drain` is cancelled.
///
/// Answers are compressed where the client offers it and they can be large; the worker stream never is: it lives by
/// latency, and its payloads are opaque. A message is bounded after decompression as well.
#[must_use]
pub(crate) fn routes(handle: &Handle, drain: &CancellationToken) -> Routes {
    let task = TaskServiceServer::new(task::Tasks::new(handle.clone(), drain.clone()))
        .max_decoding_message_size(MESSAGE_BYTES)
        .max_encoding_message_size(ANSWER_BYTES)
        .accept_compressed(Gzip)
        .accept_compressed(Zstd)
        .send_compressed(Gzip)
        .send_compressed(Zstd);
    let worker = WorkerServiceServer::new(worker::Workers::new(handle.clone()))
        .max_decoding_message_size(MESSAGE_BYTES)
        .max_encoding_message_size(ANSWER_BYTES)
        .accept_compressed(Gzip)
        .accept_compressed(Zstd);
    let admin = AdminServiceServer::new(admin::Admin::new(handle.clone()))
        .max_decoding_message_size(MESSAGE_BYTES)
        .max_encoding_message_size(ANSWER_BYTES)
        .accept_compressed(Gzip)
        .accept_compressed(Zstd)
        .send_compressed(Gzip)
        .send_compressed(Zstd);
    Routes::new(task).add_service(worker).add_service(admin).add_service(scaler::service(handle, drain))
}

/// Largest message we send: what every client takes unless told otherwise. Lists are cut before they reach it.
const ANSWER_BYTES: usize = MESSAGE_BYTES;

//! Assembles the server: services, limits, health, and how it all ends.
//!
//! The order of a drain: readiness says no, the ledger assigns nothing more and asks workers to move, no more connections
//! are taken, streams have the grace to end, and then whatever is left is left. A stream that never ends (a health watch)
//! holds nothing up: serving has a hard deadline.

mod authorize;
mod calls;
mod conduct;
mod gate;
mod guard;
mod health;
mod prompt;
mod tls;
mod weigh;

pub(crate) use health::Health;

use crate::grpc;
use crate::ledger::Handle;
use crate::room::Room;
use crate::telemetry::Telemetry;
use crate::trust::Trusted;
use authorize::AuthorizeLayer;
use calls::CallsLayer;
use gate::GateLayer;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use weigh::WeighLayer;

/// Streams of one connection: a worker needs one, a page a few, a gateway that serves many clients a thousand.
const STREAMS: u32 = 1_024;
/// Resets of streams not yet taken up, before the connection is closed: h2's own default, pinned.
const PENDING_RESETS: usize = 20;
/// Resets that a peer's errors make us send, before the connection is closed. tonic leaves it without a limit.
const LOCAL_RESETS: usize = 256;
/// Headers of one request. h2 alone would take 16 MiB.
const HEADER_BYTES: u32 = 16 << 10;
/// Small frames keep buffers small.
const FRAME_BYTES: u32 = 16 << 10;
/// Bytes on the way to us, of one stream and of one connection: 1 MiB fills 100 Mbit/s at 80 ms.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;
/// A half-open connection is gone after both.
const KEEPALIVE_EVERY: Duration = Duration::from_secs(20);
const KEEPALIVE_WITHIN: Duration = Duration::from_secs(10);

/// Serves until `stop` is cancelled and connections have ended. Long polls and watches end with `stop` too.
///
/// # Errors
/// What tonic could not set up.
pub(crate) async fn serve(
    listener: TcpListener,
    handle: &Handle,
    health: &Health,
    telemetry: &Arc<Telemetry>,
    trusted: Trusted,
    stop: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    tell_ceiling();
    let routes = grpc::routes(handle, &stop)
        .add_service(health.service(&stop))
        .add_service(reflection_v1())
        .add_service(reflection_v1alpha());
    Server::builder()
        .max_concurrent_streams(STREAMS)
        .http2_max_pending_accept_reset_streams(Some(PENDING_RESETS))
        .http2_max_local_error_reset_streams(Some(LOCAL_RESETS))
        .http2_max_header_list_size(HEADER_BYTES)
        .max_frame_size(FRAME_BYTES)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .http2_adaptive_window(Some(false))
        .http2_keepalive_interval(Some(KEEPALIVE_EVERY))
        .http2_keepalive_timeout(Some(KEEPALIVE_WITHIN))
        .accept_http1(false)
        .layer(CallsLayer::new(telemetry))
        .layer(GateLayer)
        .layer(AuthorizeLayer { trusted: trusted.clone() })
        // Behind it: who may not call takes no room.
        .layer(WeighLayer(Room::new()))
        .serve_with_incoming_shutdown(
            routes.prepare(),
            tls::incoming(listener, trusted),
            stop.cancelled_owned(),
        )
        .await
}

/// Says what connections may take of memory at most: what the operator's limit has to allow for, beside the ledger itself.
fn tell_ceiling() {
    let connections = crate::process::connection_limit() as u64;
    // Unread bytes are bounded for all streams together, headers for each.
    let each = u64::from(CONNECTION_WINDOW) + u64::from(STREAMS) * u64::from(HEADER_BYTES);
    tracing::info!(
        connections,
        streams_each = STREAMS,
        most_mib_each = each >> 20,
        most_mib = connections.saturating_mul(each) >> 20,
        messages_mib = Room::BYTES >> 20,
        "what connections may take of memory, were all of them hostile"
    );
}

/// The descriptors are made by our build, from files that it compiled.
const OURS: &str = "the build made these descriptors";

fn reflection_v1()
-> tonic_reflection::server::v1::ServerReflectionServer<impl tonic_reflection::server::v1::ServerReflection> {
    reflection().build_v1().expect(OURS)
}

/// For older tools, which know no other.
fn reflection_v1alpha() -> tonic_reflection::server::v1alpha::ServerReflectionServer<
    impl tonic_reflection::server::v1alpha::ServerReflection,
> {
    reflection().build_v1alpha().expect(OURS)
}

fn reflection() -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(grpc::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
}

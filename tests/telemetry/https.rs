//! OTLP over HTTPS, to a receiver that asks for a certificate.

use super::{Received, launch};
use crate::support::secure::{Authority, Files, put};
use crate::support::*;
use flate2::read::GzDecoder;
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use prost::Message;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use std::ffi::OsString;
use std::io::Read as _;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

fn acceptor(authority: &Authority) -> TlsAcceptor {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    let pem = authority.pem();
    roots.add(CertificateDer::from_pem_slice(pem.as_bytes()).expect("one")).expect("an authority");
    let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider));
    let leaf = authority.server();
    let cert = CertificateDer::from_pem_slice(leaf.cert.as_bytes()).expect("a certificate");
    let key = PrivateKeyDer::from_pem_slice(leaf.key.as_bytes()).expect("a key");
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("there are some")
        .with_client_cert_verifier(clients.build().expect("it has an authority"))
        .with_single_cert(vec![cert], key)
        .expect("they fit");
    TlsAcceptor::from(Arc::new(config))
}

/// A receiver that runs, and its address.
async fn start(authority: &Authority) -> (Received, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = format!("https://{}", listener.local_addr().expect("it is bound"));
    let (received, acceptor) = (Received::default(), acceptor(authority));
    let all = received.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (acceptor, all) = (acceptor.clone(), all.clone());
            tokio::spawn(async move {
                // Whoever shows no certificate gets no further.
                let Ok(stream) = acceptor.accept(stream).await else { return };
                serve(all, stream).await;
            });
        }
    });
    (received, address)
}

pub(super) async fn serve(all: Received, stream: impl AsyncRead + AsyncWrite + Unpin) {
    let service = service_fn(move |request| answer(all.clone(), request));
    let connection = hyper::server::conn::http1::Builder::new();
    let _ = connection.serve_connection(TokioIo::new(stream), service).await;
}

async fn answer(all: Received, request: Request<Incoming>) -> hyper::Result<Response<Full<Bytes>>> {
    let is_traces = request.uri().path() == "/v1/traces";
    let is_compressed = request.headers().contains_key("content-encoding");
    let mut body = request.into_body().collect().await?.to_bytes().to_vec();
    if is_compressed {
        let packed = std::mem::take(&mut body);
        GzDecoder::new(&*packed).read_to_end(&mut body).expect("it is whole");
    }
    if is_traces {
        all.take(ExportTraceServiceRequest::decode(&*body).expect("spans"));
    }
    Ok(Response::new(Full::default()))
}

fn exporting(endpoint: &str, files: &[(&'static str, String)]) -> Vec<(&'static str, OsString)> {
    let mut environment = vec![
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", format!("{endpoint}/v1/traces").into()),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf".into()),
        ("OTEL_BSP_SCHEDULE_DELAY", "20".into()),
    ];
    environment.extend(files.iter().map(|(name, path)| (*name, path.into())));
    environment
}

#[tokio::test]
async fn spans_leave_over_https_with_the_certificates_that_are_named() {
    let (authority, files) = (Authority::new(), Files::new(""));
    let (received, endpoint) = start(&authority).await;
    put(&files.path("ca.pem"), &authority.pem());
    files.put_pair("collector", &authority.client("urn:ledgerd:exporter"));
    let environment = exporting(
        &endpoint,
        &[
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", files.text("ca.pem")),
            ("OTEL_EXPORTER_OTLP_TRACES_CLIENT_CERTIFICATE", files.text("collector.pem")),
            ("OTEL_EXPORTER_OTLP_TRACES_CLIENT_KEY", files.text("collector.key")),
        ],
    );
    let daemon = launch(Arc::clone(&files.folder), "127.0.0.1:0", &[], &environment);
    enqueue(&daemon.client().await, task("a")).await;
    received.named("ledger.v1.TaskService/EnqueueTask", 1).await;
}

#[test]
fn certificates_that_cannot_be_used_end_the_start() {
    let files = Files::new("");
    put(&files.path("empty.pem"), "no certificate");
    let root = "OTEL_EXPORTER_OTLP_CERTIFICATE";
    let own = "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE";
    let key = "OTEL_EXPORTER_OTLP_CLIENT_KEY";
    let empty = || files.text("empty.pem");
    for protocol in ["http/protobuf", "grpc"] {
        for (given, said) in [
            (vec![(root, files.text("missing.pem"))], "cannot read"),
            (vec![(root, empty())], "no certificate"),
            (vec![(own, empty())], "both or neither"),
            (vec![(own, empty()), (key, empty())], "no certificate"),
        ] {
            let mut environment = exporting("https://127.0.0.1:9", &given);
            environment.push(("OTEL_EXPORTER_OTLP_PROTOCOL", protocol.into()));
            let fault = Daemon::launch(Folder::new(), "127.0.0.1:0", &[], &environment);
            let fault = fault.err().unwrap_or_else(|| panic!("it started: {given:?}"));
            assert!(fault.contains("OTEL_EXPORTER_OTLP_C") && fault.contains(said), "{fault}");
        }
    }
}

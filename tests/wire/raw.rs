//! HTTP/2 by hand: what no library would send.

use bytes::{BufMut, Bytes, BytesMut};
use std::io;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

pub(super) const DATA: u8 = 0;
pub(super) const HEADERS: u8 = 1;
pub(super) const PRIORITY: u8 = 2;
pub(super) const RST_STREAM: u8 = 3;
pub(super) const SETTINGS: u8 = 4;
pub(super) const PING: u8 = 6;
pub(super) const GOAWAY: u8 = 7;
pub(super) const WINDOW_UPDATE: u8 = 8;
pub(super) const CONTINUATION: u8 = 9;

pub(super) const ACK: u8 = 1;
pub(super) const END_STREAM: u8 = 1;
pub(super) const END_HEADERS: u8 = 4;

pub(super) const REFUSED_STREAM: u32 = 7;
pub(super) const ENHANCE_YOUR_CALM: u32 = 11;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A frame.
pub(super) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Bytes {
    let mut frame = BytesMut::new();
    frame.put_uint(payload.len() as u64, 3);
    frame.put_u8(kind);
    frame.put_u8(flags);
    frame.put_u32(stream);
    frame.put_slice(payload);
    frame.freeze()
}

/// The headers of a gRPC call, and `more` of them, without a table and without Huffman codes.
pub(super) fn block(path: &str, more: &[(&str, &str)]) -> Vec<u8> {
    // POST, http, and names of the static table: 4 is :path, 1 :authority, 31 content-type.
    let mut block = vec![0x83, 0x86, 0x04];
    text(&mut block, path);
    block.push(0x01);
    text(&mut block, "ledger");
    block.extend([0x0f, 31 - 15]);
    text(&mut block, "application/grpc");
    for (name, value) in [("te", "trailers")].iter().chain(more) {
        block.push(0x00);
        text(&mut block, name);
        text(&mut block, value);
    }
    block
}

/// A text of less than 127 bytes, or the length in more bytes.
pub(super) fn text(block: &mut Vec<u8>, text: &str) {
    let mut length = text.len();
    if length < 127 {
        block.push(length as u8);
    } else {
        block.push(127);
        length -= 127;
        while length >= 128 {
            block.push((length % 128 + 128) as u8);
            length /= 128;
        }
        block.push(length as u8);
    }
    block.extend_from_slice(text.as_bytes());
}

/// A call with this message that ends.
pub(super) fn call(stream: u32, path: &str, message: &[u8]) -> Bytes {
    call_with(stream, path, &[], message)
}

/// One with more headers.
pub(super) fn call_with(stream: u32, path: &str, more: &[(&str, &str)], message: &[u8]) -> Bytes {
    let mut bytes = BytesMut::new();
    bytes.put(frame(HEADERS, END_HEADERS, stream, &block(path, more)));
    let mut body = BytesMut::new();
    body.put_u8(0);
    body.put_u32(message.len() as u32);
    body.put_slice(message);
    bytes.put(frame(DATA, END_STREAM, stream, &body));
    bytes.freeze()
}

/// A frame that came.
#[derive(Debug)]
pub(super) struct Came {
    pub(super) kind: u8,
    pub(super) flags: u8,
    pub(super) stream: u32,
    pub(super) payload: Vec<u8>,
}

impl Came {
    /// The number in its last four or first four bytes: of RST_STREAM and GOAWAY an error.
    pub(super) fn error(&self) -> u32 {
        let at = if self.kind == GOAWAY { 4 } else { 0 };
        let bytes = self.payload.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        u32::from_be_bytes(bytes.unwrap_or_default())
    }
}

/// A connection.
pub(super) struct Raw<S = TcpStream>(pub(super) S);

impl Raw {
    /// Connects and says the preface, with settings that leave all as it is.
    pub(super) async fn open(address: &str) -> io::Result<Self> {
        Self::over(TcpStream::connect(address).await?).await
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Raw<S> {
    /// As [`Raw::open`], over what is a connection already.
    pub(super) async fn over(stream: S) -> io::Result<Self> {
        let mut raw = Self(stream);
        raw.send(PREFACE).await?;
        raw.send(&frame(SETTINGS, 0, 0, &[])).await?;
        Ok(raw)
    }

    pub(super) async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes).await
    }

    /// The next frame; an error or its end when the connection is over.
    pub(super) async fn next(&mut self) -> io::Result<Came> {
        let mut head = [0; 9];
        self.0.read_exact(&mut head).await?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let mut payload = vec![0; length];
        self.0.read_exact(&mut payload).await?;
        let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        Ok(Came { kind: head[3], flags: head[4], stream, payload })
    }

    /// The next frame of this kind.
    pub(super) async fn next_of(&mut self, kind: u8) -> io::Result<Came> {
        loop {
            let came = self.next().await?;
            if came.kind == kind {
                return Ok(came);
            }
        }
    }
}

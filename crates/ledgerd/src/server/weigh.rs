//! Weighs the messages of calls as they are read, so that all of them together have no more than [`Room`]; tells what they are
//! worth to the connection's conduct; and ends calls that say more than their one message.
//!
//! What is weighed is what came and not what a length prefix announces: nobody takes room with five bytes. Health takes no
//! room: probes without credentials ask it, and its messages are shorter than the buffer that every call has.

use super::authorize::{HEALTH, REFLECTION};
use super::conduct::Conduct;
use super::tls::Peer;
use crate::grpc::status::Refused;
use crate::grpc::{TimeLeft, WORK};
use crate::room::{BEGINNING, HELD, Held, NoRoom, Room, Weight};
use bytes::Bytes;
use http::{Request, Response};
use hyper::body::{Body as HttpBody, Frame};
use ledger_core::limits::MESSAGE_BYTES;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::task::coop::poll_proceed;
use tokio::time::{Sleep, sleep};
use tonic::Status;
use tonic::body::Body;
use tower::{Layer, Service};

/// More of a message that has begun comes within this time.
const MORE_WITHIN: Duration = Duration::from_secs(30);

/// The most that DEFLATE makes of a byte (zlib.net/zlib_tech.html). zstd knows no such number.
const GZIP_UNPACKS: usize = 1_032;

/// Puts a [`Weigh`] before a service.
#[derive(Clone, Debug)]
pub(super) struct WeighLayer(pub(super) Room);

impl<S> Layer<S> for WeighLayer {
    type Service = Weigh<S>;

    fn layer(&self, inner: S) -> Weigh<S> {
        Weigh { inner, room: self.0.clone() }
    }
}

/// Passes on what there is room for.
#[derive(Clone, Debug)]
pub(super) struct Weigh<S> {
    inner: S,
    room: Room,
}

impl<S> Service<Request<Body>> for Weigh<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let path = request.uri().path();
        // What has no deadline is a stream.
        let is_stream = request.extensions().get::<TimeLeft>().is_none();
        let held = (!path.starts_with(HEALTH)).then(|| Held::new(self.room.clone(), is_stream));
        let says = if path == WORK || path.starts_with(REFLECTION) { Says::Many } else { Says::One };
        let unpacks = match request.headers().get("grpc-encoding") {
            Some(packed) if packed == "gzip" => GZIP_UNPACKS,
            _ => usize::MAX,
        };
        let conduct = request.extensions().get::<Peer>().map(|peer| peer.conduct.clone());
        let (parts, body) = request.into_parts();
        let body = Body::new(Weighed {
            body,
            at: START,
            messages: 0,
            says,
            is_stream,
            unpacks,
            held: held.clone(),
            conduct,
            unfinished: None,
            waits: None,
        });
        let answer = self.inner.call(Request::from_parts(parts, body));
        match held {
            // It holds what is taken until there is an answer.
            Some(held) => Box::pin(HELD.scope(held, answer)),
            None => Box::pin(answer),
        }
    }
}

/// Where a body is: in a prefix, or in a message.
#[derive(Clone, Copy, Debug)]
enum At {
    Prefix { heard: usize, is_packed: bool, length: u32 },
    Message { came: usize, is_packed: bool, length: usize },
}

const PREFIX_BYTES: usize = 5;
const START: At = At::Prefix { heard: 0, is_packed: false, length: 0 };

impl At {
    /// Moves on by a piece of a body, which is a frame of HTTP/2, and weighs it; and how many messages are whole with it.
    /// One byte of what is packed may become so many.
    fn weigh(&mut self, mut piece: &[u8], unpacks: usize) -> (Weight, usize) {
        let (mut beginnings, mut rest, mut whole) = (0, 0, 0);
        while let Some((&first, others)) = piece.split_first() {
            match self {
                Self::Prefix { heard, is_packed, length } => {
                    if *heard == 0 {
                        *is_packed = first == 1;
                    } else {
                        *length = *length << 8 | u32::from(first);
                    }
                    *heard += 1;
                    piece = others;
                    if *heard == PREFIX_BYTES {
                        *self = Self::Message { came: 0, is_packed: *is_packed, length: *length as usize };
                    }
                }
                Self::Message { came, length, .. } => {
                    let (ours, others) = piece.split_at(piece.len().min(*length - *came));
                    let begins = ours.len().min(BEGINNING.saturating_sub(*came));
                    beginnings += begins;
                    rest += ours.len() - begins;
                    *came += ours.len();
                    piece = others;
                }
            }
            if let Self::Message { came, is_packed, length } = *self
                && came == length
            {
                if is_packed {
                    // Whole, so it is unpacked next, to as much as a message may be.
                    rest += length.saturating_mul(unpacks).min(MESSAGE_BYTES).saturating_sub(length);
                }
                *self = START;
                whole += 1;
            }
        }
        let bytes = |bytes| u32::try_from(bytes).unwrap_or(u32::MAX);
        (Weight { beginnings: bytes(beginnings), rest: bytes(rest) }, whole)
    }

    const fn is_start(self) -> bool {
        matches!(self, Self::Prefix { heard: 0, .. })
    }
}

type Waits = Pin<Box<dyn Future<Output = Result<(), NoRoom>> + Send>>;

/// How many messages a call has to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Says {
    One,
    Many,
}

/// A body that is weighed as it is read.
struct Weighed {
    body: Body,
    at: At,
    /// Those that are whole.
    messages: usize,
    says: Says,
    is_stream: bool,
    unpacks: usize,
    held: Option<Held>,
    conduct: Option<Conduct>,
    /// Of a stream that has begun a message and waits for the rest of it.
    unfinished: Option<Pin<Box<Sleep>>>,
    /// What was read and waits for room.
    waits: Option<(Frame<Bytes>, Waits)>,
}

impl Weighed {
    /// Calls have a deadline; a stream would keep the room of half a message as long as its connection lives.
    fn poll_patience<T>(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<T, Status>>> {
        if !self.is_stream || self.at.is_start() {
            return Poll::Pending;
        }
        let unfinished = self.unfinished.get_or_insert_with(|| Box::pin(sleep(MORE_WITHIN)));
        ready!(unfinished.as_mut().poll(cx));
        Poll::Ready(Some(Err(Refused::Unfinished.into())))
    }

    /// Whether there is more than the one message. tonic would wait for the end of the call and read, and decode, as many as came.
    const fn says_too_much(&self) -> bool {
        matches!(self.says, Says::One) && (self.messages > 1 || self.messages == 1 && !self.at.is_start())
    }
}

impl HttpBody for Weighed {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Some((_, waits)) = &mut self.waits {
            let room = ready!(waits.as_mut().poll(cx));
            if let (Err(NoRoom), Some(conduct)) = (&room, &self.conduct) {
                conduct.has_no_room();
            }
            let frame = self.waits.take().map(|(frame, _)| frame);
            return Poll::Ready(
                frame.map(|frame| room.map(|()| frame).map_err(|NoRoom| Refused::NoRoom.into())),
            );
        }
        // h2 counts nothing against a task's turn: whoever reads pieces of a byte each would read all that there are.
        let turn = ready!(poll_proceed(cx));
        if self.at.is_start()
            && let Some(held) = &self.held
        {
            held.asks_for_the_next();
        }
        let frame = match Pin::new(&mut self.body).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => frame,
            Poll::Ready(ended) => return Poll::Ready(ended),
            Poll::Pending => return self.poll_patience(cx),
        };
        turn.made_progress();
        self.unfinished = None;
        let Some(piece) = frame.data_ref() else { return Poll::Ready(Some(Ok(frame))) };
        let unpacks = self.unpacks;
        let (weight, whole) = self.at.weigh(piece, unpacks);
        self.messages = self.messages.saturating_add(whole);
        if self.says_too_much() {
            return Poll::Ready(Some(Err(Refused::TooManyMessages.into())));
        }
        if let Some(conduct) = &self.conduct {
            conduct.says_something(piece.len(), whole);
        }
        let Some(held) = self.held.clone().filter(|held| !held.take_now(weight)) else {
            return Poll::Ready(Some(Ok(frame)));
        };
        self.waits = Some((frame, Box::pin(held.take(weight))));
        self.poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.waits.is_none() && self.body.is_end_stream()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::{BodyExt as _, StreamBody};
    use tokio::time::timeout;
    use tokio_stream::StreamExt as _;

    fn message(packed: u8, length: usize) -> Vec<u8> {
        let mut message = vec![packed];
        message.extend((length as u32).to_be_bytes());
        message.resize(5 + length, 7);
        message
    }

    /// What is weighed of a body that comes in pieces of this length.
    fn weigh(body: &[u8], pieces: usize) -> (u32, u32, At) {
        let (mut at, mut beginnings, mut rest) = (START, 0, 0);
        for piece in body.chunks(pieces) {
            let (weight, _) = at.weigh(piece, usize::MAX);
            beginnings += weight.beginnings;
            rest += weight.rest;
        }
        (beginnings, rest, at)
    }

    #[test]
    fn bodies_weigh_the_same_however_they_are_cut() {
        let small = message(0, 100);
        let large = message(0, 20_000);
        let two = [&small[..], &large[..], &message(0, 0)[..]].concat();
        for pieces in [1, 3, 5, 16 << 10, 1 << 20] {
            let (beginnings, rest, at) = weigh(&two, pieces);
            assert_eq!((beginnings, rest), (100 + 8_192, 20_000 - 8_192), "{pieces}");
            assert!(at.is_start(), "{pieces}");
        }
    }

    #[test]
    fn a_prefix_weighs_nothing_and_what_is_packed_as_much_as_it_may_be() {
        let (beginnings, rest, at) = weigh(&message(0, 4 << 20)[..5], 5);
        assert_eq!((beginnings, rest), (0, 0));
        assert!(!at.is_start());
        let (beginnings, rest, _) = weigh(&message(1, 10), 2);
        assert_eq!((beginnings, rest), (10, (4 << 20) - 10));
        let (_, rest, _) = weigh(&message(1, 10)[..14], 2);
        assert_eq!(rest, 0, "it is not whole");
        let mut at = START;
        let weight = Weight { beginnings: 10, rest: 10 * 1_031 };
        assert_eq!(at.weigh(&message(1, 10), GZIP_UNPACKS), (weight, 1));
    }

    /// A body of these pieces, and then nothing.
    fn in_pieces(pieces: Vec<Vec<u8>>, is_stream: bool) -> Weighed {
        let pieces = pieces.into_iter().map(|piece| Ok::<_, Status>(Frame::data(Bytes::from(piece))));
        let pieces = tokio_stream::iter(pieces).chain(tokio_stream::pending());
        Weighed {
            body: Body::new(StreamBody::new(pieces)),
            at: START,
            messages: 0,
            says: if is_stream { Says::Many } else { Says::One },
            is_stream,
            unpacks: 1,
            held: Some(Held::new(Room::new(), is_stream)),
            conduct: Some(Conduct::new()),
            unfinished: None,
            waits: None,
        }
    }

    /// A body of this, and then nothing.
    fn unended(piece: Vec<u8>, is_stream: bool) -> Weighed {
        in_pieces(vec![piece], is_stream)
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_ends_with_the_first_byte_after_its_message_and_a_stream_goes_on() {
        let (one, nothing) = (message(0, 10), message(0, 0));
        let all_at_once = [&one[..], &nothing[..]].concat();
        for pieces in [vec![all_at_once], vec![one.clone(), vec![0]], vec![nothing.clone(), one.clone()]] {
            let mut call = in_pieces(pieces.clone(), false);
            let mut last = call.frame().await.expect("a piece");
            if pieces.len() > 1 {
                assert!(last.is_ok(), "one message is what there has to be");
                last = call.frame().await.expect("a piece");
            }
            assert_eq!(last.expect_err("it is too much").code(), tonic::Code::Internal);
            let mut stream = in_pieces(pieces.clone(), true);
            for _ in &pieces {
                assert!(stream.frame().await.is_some_and(|frame| frame.is_ok()));
            }
        }
        let mut call = in_pieces(vec![one, Vec::new()], false);
        for _ in 0..2 {
            assert!(call.frame().await.is_some_and(|frame| frame.is_ok()), "nothing is no more");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn half_a_message_is_not_kept_for_ever_and_a_quiet_stream_is() {
        let mut half = unended(message(0, 100)[..50].to_vec(), true);
        assert!(half.frame().await.is_some_and(|frame| frame.is_ok()));
        let error = half.frame().await.expect("an end").expect_err("it took too long");
        assert_eq!(error.code(), tonic::Code::DeadlineExceeded);
        let mut quiet = unended(message(0, 100), true);
        assert!(quiet.frame().await.is_some_and(|frame| frame.is_ok()));
        assert!(timeout(MORE_WITHIN * 10, quiet.frame()).await.is_err());
        let mut call = unended(message(0, 100)[..50].to_vec(), false);
        assert!(call.frame().await.is_some_and(|frame| frame.is_ok()));
        assert!(timeout(MORE_WITHIN * 10, call.frame()).await.is_err(), "it has a deadline of its own");
    }
}

//! Counts what a message holds before it is made.
//!
//! An empty task takes two bytes on the wire and some hundreds in memory, so that one message of 4 MiB was 1.5 GiB before
//! anything could say that it lists too much. This reads the tags alone, by the shapes that the build finds in `proto/`. It judges
//! nothing else: what is malformed is for the decoder to say. What the lists will take, they take of the room of their call.

use super::status::Refused;
use crate::room::{Held, NoRoom};
use prost::Message;
use prost::encoding::{WireType, decode_key, decode_varint};
use std::marker::PhantomData;
use tonic::Status;
use tonic::codec::{BufferSettings, Codec, DecodeBuf, Decoder};
use tonic_prost::{ProstCodec, ProstDecoder, ProstEncoder};

include!(concat!(env!("OUT_DIR"), "/shapes.rs"));

/// What the lists of one message may take in memory. A thousand tasks with 64 labels each take less.
const MOST: usize = 8 << 20;
/// No message of ours is nested so deep; the decoder itself ends at 100.
const DEPTH: u32 = 32;

/// A message that a method takes.
pub(super) trait Shaped {
    /// Its place in [`SHAPES`].
    const SHAPE: usize;
}

/// A field that is a message or a list.
struct Field {
    number: u32,
    of: Of,
    /// The place of its message in [`SHAPES`].
    inside: Option<usize>,
}

#[derive(Clone, Copy)]
enum Of {
    One,
    Messages,
    Entries,
    Values,
}

impl Of {
    /// What one takes in memory at most, without its texts, which are as long as on the wire; see the tests.
    const fn takes(self) -> usize {
        match self {
            Self::One => 0,
            Self::Messages => 512,
            Self::Entries => 96,
            Self::Values => 32,
        }
    }
}

/// What the lists in these bytes of a message take. Ends early at what is malformed, and beyond [`MOST`].
fn takes(shape: usize, mut bytes: &[u8], depth: u32) -> usize {
    let mut all = 0;
    while !bytes.is_empty() && all <= MOST {
        let Ok((number, wire_type)) = decode_key(&mut bytes) else { break };
        let skipped = match wire_type {
            WireType::Varint => {
                if decode_varint(&mut bytes).is_err() {
                    break;
                }
                continue;
            }
            WireType::ThirtyTwoBit => 4,
            WireType::SixtyFourBit => 8,
            // We have none. What is in one is read as if it were outside, so that nothing is hidden behind it.
            WireType::StartGroup | WireType::EndGroup => 0,
            WireType::LengthDelimited => match decode_varint(&mut bytes).map(usize::try_from) {
                Ok(Ok(length)) => length,
                _ => break,
            },
        };
        let Some((content, others)) = bytes.split_at_checked(skipped) else { break };
        bytes = others;
        if wire_type == WireType::LengthDelimited
            && let Some(field) = SHAPES[shape].iter().find(|field| field.number == number)
        {
            all += field.of.takes();
            if let Some(inside) = field.inside
                && depth > 0
            {
                all += takes(inside, content, depth - 1);
            }
        }
    }
    all
}

/// The codec of our services.
#[derive(Clone, Debug)]
pub(super) struct Counted<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for Counted<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> Codec for Counted<T, U>
where
    T: Message + Send + 'static,
    U: Message + Shaped + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = CountedDecoder<U>;

    fn encoder(&mut self) -> ProstEncoder<T> {
        ProstCodec::<T, U>::default().encoder()
    }

    fn decoder(&mut self) -> CountedDecoder<U> {
        CountedDecoder { inner: ProstDecoder::default(), held: Held::of_this_call() }
    }
}

/// Decodes what does not hold too much.
#[derive(Clone, Debug)]
pub(super) struct CountedDecoder<U> {
    inner: ProstDecoder<U>,
    held: Option<Held>,
}

impl<U: Message + Shaped + Default + Send + 'static> Decoder for CountedDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, bytes: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        use bytes::Buf as _;
        // A message lies in one piece.
        let takes = takes(U::SHAPE, bytes.chunk(), DEPTH);
        if takes > MOST {
            return Err(Refused::TooManyItems.into());
        }
        if let Some(held) = &self.held {
            held.grows(takes).map_err(|NoRoom| Refused::NoRoom)?;
        }
        self.inner.decode(bytes)
    }

    fn buffer_settings(&self) -> BufferSettings {
        self.inner.buffer_settings()
    }
}

#[cfg(test)]
mod tests {
    use super::super::wire;
    use super::*;
    use std::mem::size_of;
    use wire::work_request::Frame;

    fn takes_of<T: Message + Shaped>(message: &T) -> usize {
        takes(T::SHAPE, &message.encode_to_vec(), DEPTH)
    }

    #[test]
    fn what_a_list_takes_is_not_more_than_it_is_said_to() {
        let messages = [
            size_of::<wire::NewTask>(),
            size_of::<wire::Outcome>(),
            size_of::<wire::Held>(),
            size_of::<wire::Lease>(),
        ];
        for takes in messages {
            assert!(takes <= Of::Messages.takes(), "{takes}");
        }
        assert!(2 * size_of::<String>() <= Of::Entries.takes());
        assert!(size_of::<String>() <= Of::Values.takes());
    }

    #[test]
    fn lists_are_counted_however_deep_they_are() {
        let labels = |count: usize| (0..count).map(|n| (n.to_string(), String::new())).collect();
        let task = || wire::NewTask { labels: labels(3), ..Default::default() };
        let one = wire::EnqueueTaskRequest { task: Some(task()), ..Default::default() };
        assert_eq!(takes_of(&one), 3 * 96);
        let many = wire::EnqueueTasksRequest { tasks: vec![task(); 10], ..Default::default() };
        assert_eq!(takes_of(&many), 10 * (512 + 3 * 96));
        let completed = wire::Complete { follow_ups: vec![task(); 2], ..Default::default() };
        let outcome = wire::Outcome {
            outcome: Some(wire::outcome::Outcome::Complete(completed)),
            ..Default::default()
        };
        let frame = Frame::Outcomes(wire::Outcomes { items: vec![outcome; 4] });
        let frame = wire::WorkRequest { frame: Some(frame) };
        assert_eq!(takes_of(&frame), 4 * (512 + 2 * (512 + 3 * 96)));
        let ids = wire::DiscardDeadLettersRequest { task_ids: vec![String::new(); 5], ..Default::default() };
        assert_eq!(takes_of(&ids), 5 * 32);
    }

    #[test]
    fn the_fullest_batch_is_taken_and_the_emptiest_is_not() {
        let labels = |_| (0..64).map(|n| (format!("{n:063}"), "v".repeat(20))).collect();
        let tasks =
            |count: usize| (0..count).map(|n| wire::NewTask { labels: labels(n), ..Default::default() });
        let full = wire::EnqueueTasksRequest { tasks: tasks(1_000).collect(), ..Default::default() };
        assert!(takes_of(&full) <= MOST);
        assert!(takes(wire::EnqueueTasksRequest::SHAPE, &[0x0a, 0].repeat(2 << 20), DEPTH) > MOST);
        // Behind a group that nobody knows.
        let hidden = [&[0x7b][..], &[0x0a, 0].repeat(2 << 20), &[0x7c]].concat();
        assert!(takes(wire::EnqueueTasksRequest::SHAPE, &hidden, DEPTH) > MOST);
    }

    #[test]
    fn what_is_malformed_is_read_to_its_fault() {
        for bytes in [&[0xff; 11][..], &[0x0a, 0xff], &[0x0a, 5, 1], &[0x09, 1], &[0x0a], &[0x0f]] {
            assert!(takes(wire::EnqueueTasksRequest::SHAPE, bytes, DEPTH) <= 512, "{bytes:?}");
        }
    }
}

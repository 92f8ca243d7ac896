//! Talks netlink with the kernel: a blocking socket, batches of requests, their answers. What the requests mean
//! is the business of `netns`, `bridge::link` and `bridge::nft`.

use std::io;
use std::time::Duration;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::Socket as RawSocket;
use netlink_sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use rustix::net::RecvFlags;
use rustix::net::sockopt::{Timeout, set_socket_timeout};

use crate::error::Error;

/// The kernel answers within microseconds; behind a crowded rtnl lock it can take long, but not this long.
const DEADLINE: Duration = Duration::from_secs(20);
/// More answers than this to one request mean that something is badly wrong.
const MAX_ANSWERS: usize = 1 << 20;
const HEADER: usize = 16;
/// `NLM_F_ACK_TLVS`: the answer carries attributes, among them the kernel's own words.
const ACK_TLVS: u16 = 0x200;
const ACK_CAPPED: u16 = 0x100;
const ATTR_MESSAGE: u16 = 1;

/// A netlink socket of the network namespace in which it was opened, wherever its thread goes later.
pub(crate) struct Socket {
    inner: RawSocket,
    sequence: u32,
}

/// The kernel's no to one request.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) cause: io::Error,
    pub(crate) hint: String,
}

impl Refusal {
    pub(crate) fn is(&self, errno: i32) -> bool {
        self.cause.raw_os_error() == Some(errno)
    }

    pub(crate) fn to(self, act: impl Into<String>) -> Error {
        Error::Netlink { act: act.into(), cause: self.cause, hint: self.hint }
    }
}

impl From<io::Error> for Refusal {
    fn from(cause: io::Error) -> Refusal {
        Refusal { cause, hint: String::new() }
    }
}

impl Socket {
    /// For links, addresses and routes.
    pub(crate) fn route() -> io::Result<Socket> {
        Socket::open(NETLINK_ROUTE)
    }

    /// For nftables and connection tracking.
    pub(crate) fn netfilter() -> io::Result<Socket> {
        Socket::open(NETLINK_NETFILTER)
    }

    fn open(protocol: isize) -> io::Result<Socket> {
        let inner = RawSocket::new(protocol)?;
        // Without the request's echo answers stay small; with the extended acknowledgement they say why.
        inner.set_cap_ack(true)?;
        inner.set_ext_ack(true)?;
        set_socket_timeout(&inner, Timeout::Recv, Some(DEADLINE))?;
        Ok(Socket { inner, sequence: 0 })
    }

    /// Sends all requests in one go and returns one answer for each, in order. A refused request does not
    /// stop those behind it.
    pub(crate) fn requests(
        &mut self,
        requests: Vec<(RouteNetlinkMessage, u16)>,
    ) -> io::Result<Vec<Result<(), Refusal>>> {
        let first = self.sequence + 1;
        let count = requests.len();
        let mut bytes = Vec::with_capacity(256 * count);
        for (message, flags) in requests {
            self.append(&mut bytes, message, flags | NLM_F_REQUEST | NLM_F_ACK);
        }
        self.send(&bytes)?;
        self.answers(first, count)
    }

    /// One request, one answer.
    pub(crate) fn request(&mut self, message: RouteNetlinkMessage, flags: u16) -> Result<(), Refusal> {
        self.requests(vec![(message, flags)])?.pop().unwrap_or(Ok(()))
    }

    /// Asks for objects and returns them: one, or with `NLM_F_DUMP` all.
    pub(crate) fn get(
        &mut self,
        message: RouteNetlinkMessage,
        dump: bool,
    ) -> Result<Vec<RouteNetlinkMessage>, Refusal> {
        let mut bytes = Vec::new();
        let flags = if dump { NLM_F_DUMP } else { NLM_F_ACK };
        self.append(&mut bytes, message, flags | NLM_F_REQUEST);
        self.send(&bytes)?;
        let mut found = Vec::new();
        let mut buffer = vec![0; 64 << 10];
        while found.len() < MAX_ANSWERS {
            let length = self.receive(&mut buffer)?;
            for message in Messages(&buffer[..length]) {
                match message.kind {
                    NLMSG_DONE => return Ok(found),
                    NLMSG_ERROR => return message.answer().map(|()| found),
                    _ => {
                        // What the parser does not understand is some exotic link, and none of ours.
                        let parsed = NetlinkMessage::<RouteNetlinkMessage>::deserialize(message.all);
                        if let Ok(NetlinkPayload::InnerMessage(inner)) = parsed.map(|m| m.payload) {
                            found.push(inner);
                        }
                    }
                }
            }
        }
        Err(io::Error::from(io::ErrorKind::FileTooLarge).into())
    }

    /// Reserves numbers for so many requests and returns the first of them.
    pub(crate) fn number(&mut self, count: u32) -> u32 {
        let first = self.sequence.wrapping_add(1);
        self.sequence = self.sequence.wrapping_add(count);
        first
    }

    /// Sends requests numbered from `first` to `last`, of which the last asks for an acknowledgement. Returns the
    /// first refusal: for nftables all or nothing of a batch happens.
    pub(crate) fn batch(&mut self, bytes: &[u8], first: u32, last: u32) -> Result<(), Refusal> {
        self.send(bytes)?;
        let mut buffer = vec![0; 64 << 10];
        for _ in 0..MAX_ANSWERS {
            let length = self.receive(&mut buffer)?;
            for message in Messages(&buffer[..length]) {
                // Answers to an earlier batch may still be waiting behind its first refusal.
                let ours = message.sequence.wrapping_sub(first) <= last.wrapping_sub(first);
                if message.kind == NLMSG_ERROR && ours {
                    message.answer()?;
                    if message.sequence == last {
                        return Ok(());
                    }
                }
            }
        }
        Err(io::Error::from(io::ErrorKind::FileTooLarge).into())
    }

    fn append(&mut self, bytes: &mut Vec<u8>, message: RouteNetlinkMessage, flags: u16) {
        self.sequence += 1;
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        message.finalize();
        let start = bytes.len();
        bytes.resize(start + message.buffer_len().next_multiple_of(4), 0);
        message.serialize(&mut bytes[start..]);
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let sent = self.inner.send(bytes, 0)?;
        if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match rustix::net::recv(&self.inner, &mut *buffer, RecvFlags::empty()) {
                Ok((_, length)) => return Ok(length.min(buffer.len())),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn answers(&mut self, first: u32, count: usize) -> io::Result<Vec<Result<(), Refusal>>> {
        let mut answers: Vec<Option<Result<(), Refusal>>> = (0..count).map(|_| None).collect();
        let mut missing = count;
        let mut buffer = vec![0; 16 << 10];
        while missing > 0 {
            let length = self.receive(&mut buffer)?;
            for message in Messages(&buffer[..length]) {
                let slot = answers.get_mut(message.sequence.wrapping_sub(first) as usize);
                if let (NLMSG_ERROR, Some(slot @ None)) = (message.kind, slot) {
                    *slot = Some(message.answer());
                    missing -= 1;
                }
            }
        }
        Ok(answers.into_iter().flatten().collect())
    }
}

/// One message of the kernel, still in bytes.
struct Message<'a> {
    all: &'a [u8],
    kind: u16,
    flags: u16,
    sequence: u32,
}

impl Message<'_> {
    /// Reads an acknowledgement: error number, the head of the request, attributes.
    fn answer(&self) -> Result<(), Refusal> {
        let body = self.all.get(HEADER..).unwrap_or_default();
        let Some(number) = body.first_chunk::<4>().map(|b| i32::from_ne_bytes(*b)) else {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        };
        if number == 0 {
            return Ok(());
        }
        let echoed = if self.flags & ACK_CAPPED != 0 {
            HEADER
        } else {
            let length = body.get(4..8).and_then(|b| b.first_chunk::<4>());
            length.map_or(HEADER, |b| (u32::from_ne_bytes(*b) as usize).next_multiple_of(4))
        };
        let mut hint = String::new();
        if self.flags & ACK_TLVS != 0 {
            for (kind, value) in Attributes(body.get(4 + echoed..).unwrap_or_default()) {
                if kind == ATTR_MESSAGE {
                    hint = String::from_utf8_lossy(value).trim_end_matches('\0').to_owned();
                }
            }
        }
        Err(Refusal { cause: io::Error::from_raw_os_error(number.wrapping_neg()), hint })
    }
}

/// Walks over the messages in one datagram.
struct Messages<'a>(&'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = Message<'a>;

    fn next(&mut self) -> Option<Message<'a>> {
        let head = self.0.first_chunk::<HEADER>()?;
        let word = |at: usize| u32::from_ne_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let half = |at: usize| u16::from_ne_bytes([head[at], head[at + 1]]);
        let length = word(0) as usize;
        if length < HEADER || length > self.0.len() {
            return None;
        }
        let message = Message { all: &self.0[..length], kind: half(4), flags: half(6), sequence: word(8) };
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    }
}

/// Walks over the attributes in a message: kind without its flag bits, and value.
pub(crate) struct Attributes<'a>(pub(crate) &'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<(u16, &'a [u8])> {
        let head = self.0.first_chunk::<4>()?;
        let length = u16::from_ne_bytes([head[0], head[1]]) as usize;
        let kind = u16::from_ne_bytes([head[2], head[3]]) & 0x3fff;
        let value = self.0.get(4..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_bytes_from_the_kernel_can_panic_us(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            for message in Messages(&bytes) {
                let _ = message.answer();
            }
            prop_assert!(Attributes(&bytes).count() <= bytes.len() / 4);
        }
    }

    #[test]
    fn a_refusal_carries_the_kernels_own_words() {
        let mut bytes = Vec::new();
        let text = b"no such thing\0";
        let attribute = 4 + text.len();
        let length = HEADER + 4 + HEADER + attribute.next_multiple_of(4);
        bytes.extend((length as u32).to_ne_bytes());
        bytes.extend(NLMSG_ERROR.to_ne_bytes());
        bytes.extend((ACK_TLVS | ACK_CAPPED).to_ne_bytes());
        bytes.extend(7u32.to_ne_bytes());
        bytes.extend(0u32.to_ne_bytes());
        bytes.extend((-libc::ENODEV).to_ne_bytes());
        bytes.extend([0; HEADER]);
        bytes.extend((attribute as u16).to_ne_bytes());
        bytes.extend(ATTR_MESSAGE.to_ne_bytes());
        bytes.extend(text);
        bytes.resize(length, 0);
        let message = Messages(&bytes).next().unwrap();
        assert_eq!(message.sequence, 7);
        let refusal = message.answer().unwrap_err();
        assert!(refusal.is(libc::ENODEV));
        assert_eq!(refusal.hint, "no such thing");
    }
}

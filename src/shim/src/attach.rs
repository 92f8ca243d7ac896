//! Clients that look at a container while it runs: a copy of what it prints goes into their FIFOs. One that reads as
//! fast as clients do gets every byte, since the container is held to its pace; one that does not is disconnected
//! before the container has waited for it longer than a second, and neither the container nor its log notices.

use std::{os::fd::OwnedFd, time::Duration};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};

use crate::log::Stream;

/// Clients of one container at a time.
const MOST: usize = 64;
/// How far a client may fall behind before the container waits; the most that every user may ask of a pipe.
const BEHIND: usize = 1 << 20;
/// How long the container waits for a client, and how fast a client earns that time back: whoever takes less in a
/// second of waiting is lost sooner or later, so the container is never held below this.
const PATIENCE: Duration = Duration::from_secs(1);
const RATE: u32 = 8 << 20;

/// One client's FIFOs, opened for writing without waiting.
#[derive(Debug, Default)]
pub(crate) struct Client {
    stdout: Option<End>,
    stderr: Option<End>,
    /// How much longer it may be waited for.
    patience: Duration,
}

/// A FIFO, and what did not fit into it.
#[derive(Debug)]
struct End {
    fd: OwnedFd,
    rest: Vec<u8>,
}

impl Client {
    pub(crate) fn new(stdout: Option<OwnedFd>, stderr: Option<OwnedFd>) -> Client {
        let end = |fd| End { fd, rest: Vec::new() };
        Client { stdout: stdout.map(end), stderr: stderr.map(end), patience: PATIENCE }
    }

    /// Whether it wants any output.
    pub(crate) fn listens(&self) -> bool {
        self.stdout.is_some() || self.stderr.is_some()
    }

    fn end(&mut self, stream: Stream) -> Option<&mut End> {
        match stream {
            Stream::Stdout => self.stdout.as_mut(),
            Stream::Stderr => self.stderr.as_mut(),
        }
    }

    /// Whether nobody has the other end any more.
    fn left(&self) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        [&self.stdout, &self.stderr].into_iter().flatten().any(|end| {
            let mut fds = [PollFd::new(&end.fd, PollFlags::empty())];
            matches!(poll(&mut fds, Some(&now)), Ok(1..)) && fds[0].revents().contains(PollFlags::ERR)
        })
    }

    /// Takes a piece, or keeps what does not fit. False when it is lost: it left, or was behind before.
    fn take(&mut self, stream: Stream, bytes: &[u8]) -> bool {
        let Some(end) = self.end(stream) else { return true };
        if !end.rest.is_empty() {
            return false;
        }
        match put(&end.fd, bytes) {
            Some(count) => {
                end.rest.extend_from_slice(bytes.get(count..).unwrap_or_default());
                true
            }
            None => false,
        }
    }

    /// Tries again after some waiting. False when it is lost.
    fn retry(&mut self, stream: Stream, waited: Duration) -> bool {
        let Some(end) = self.end(stream).filter(|end| !end.rest.is_empty()) else { return true };
        let Some(count) = put(&end.fd, &end.rest) else { return false };
        end.rest.drain(..count);
        let earned = Duration::from_secs(1) * u32::try_from(count).unwrap_or(RATE) / RATE;
        self.patience = (self.patience + earned).min(PATIENCE);
        self.patience = self.patience.saturating_sub(waited);
        !self.patience.is_zero()
    }

    fn behind(&mut self, stream: Stream) -> bool {
        self.end(stream).is_some_and(|end| !end.rest.is_empty())
    }
}

/// The clients of one container.
#[derive(Debug, Default)]
pub(crate) struct Clients(Vec<Client>);

impl Clients {
    /// Adds one, unless there are too many.
    #[must_use]
    pub(crate) fn add(&mut self, client: Client) -> bool {
        self.0.retain(|client| !client.left());
        let room = self.0.len() < MOST;
        if room {
            for end in [&client.stdout, &client.stderr].into_iter().flatten() {
                // A smaller one works as well.
                let _ = rustix::pipe::fcntl_setpipe_size(&end.fd, BEHIND);
            }
            self.0.push(client);
        }
        room
    }

    /// Gives a piece of output to all of them. True when one is behind: before the next piece it wants to be waited
    /// for, or it is lost.
    pub(crate) fn write(&mut self, stream: Stream, bytes: &[u8]) -> bool {
        self.0.retain_mut(|client| client.take(stream, bytes));
        self.0.iter_mut().any(|client| client.behind(stream))
    }

    /// Gives those who are behind what they lack, after some waiting. True when it is not over.
    pub(crate) fn retry(&mut self, stream: Stream, waited: Duration) -> bool {
        self.0.retain_mut(|client| client.retry(stream, waited));
        self.0.iter_mut().any(|client| client.behind(stream))
    }
}

/// Writes what fits. None when nobody reads any more.
fn put(fd: &OwnedFd, bytes: &[u8]) -> Option<usize> {
    let mut done = 0;
    while let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) {
        match rustix::io::write(fd, rest) {
            Ok(count) => done += count,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => break,
            Err(_) => return None,
        }
    }
    Some(done)
}

#[cfg(test)]
mod tests {
    use rustix::pipe::{PipeFlags, pipe_with};

    use super::*;

    fn client() -> (OwnedFd, Client) {
        let (from, to) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
        (from, Client::new(Some(to), None))
    }

    fn read(from: &OwnedFd) -> usize {
        rustix::io::read(from, &mut vec![0; 2 * BEHIND][..]).unwrap()
    }

    #[test]
    fn every_client_gets_the_output_and_a_stuck_one_is_disconnected() {
        let (mut good, mut stuck) = (client(), client());
        let mut clients = Clients::default();
        assert!(clients.add(std::mem::take(&mut good.1)) && clients.add(std::mem::take(&mut stuck.1)));
        let (mut got, mut waits) = (0, 0);
        let piece = vec![0; 64 << 10];
        for _ in 0..4 * BEHIND / piece.len() {
            let mut behind = clients.write(Stream::Stdout, &piece);
            got += read(&good.0);
            while behind {
                waits += 1;
                behind = clients.retry(Stream::Stdout, PATIENCE / 10);
            }
        }
        assert_eq!((clients.0.len(), got, waits), (1, 4 * BEHIND, 10));
        clients.write(Stream::Stderr, b"not wanted");
        assert_eq!(clients.0.len(), 1);
    }

    #[test]
    fn a_client_that_reads_at_a_good_pace_is_waited_for_again_and_again() {
        let (from, reader) = client();
        let mut clients = Clients::default();
        assert!(clients.add(reader));
        let piece = vec![0; 2 * BEHIND];
        let mut got = 0;
        for _ in 0..20 {
            let mut behind = clients.write(Stream::Stdout, &piece);
            while behind {
                got += read(&from);
                behind = clients.retry(Stream::Stdout, PATIENCE / 10);
            }
        }
        assert_eq!(clients.0.len(), 1);
        got += read(&from);
        assert_eq!(got, 20 * piece.len());
    }

    #[test]
    fn one_that_takes_a_little_now_and_then_does_not_hold_the_container_up_for_long() {
        let (from, reader) = client();
        let mut clients = Clients::default();
        assert!(clients.add(reader));
        let mut behind = clients.write(Stream::Stdout, &vec![0; 4 * BEHIND]);
        let mut waits = 0;
        while behind {
            rustix::io::read(&from, &mut vec![0; 4096][..]).unwrap();
            waits += 1;
            behind = clients.retry(Stream::Stdout, PATIENCE / 10);
        }
        assert!(clients.0.is_empty() && waits <= 11, "{waits}");
    }

    #[test]
    fn those_who_left_make_room() {
        let mut clients = Clients::default();
        for _ in 0..3 * MOST {
            assert!(clients.add(client().1));
        }
        let all: Vec<_> = (0..MOST)
            .map(|_| {
                let (from, client) = client();
                assert!(clients.add(client));
                from
            })
            .collect();
        assert!(!clients.add(client().1));
        drop(all);
    }
}

//! Clients that look at a container while it runs: a copy of what it prints goes into their FIFOs. A client is
//! never waited for: one that falls behind by more than its FIFO holds is disconnected, and neither the container
//! nor its log notices.

use std::os::fd::OwnedFd;

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};

use crate::log::Stream;

/// Clients of one container at a time.
const MOST: usize = 64;
/// How far a client may fall behind; the most that every user may ask of a pipe.
const BEHIND: usize = 1 << 20;

/// One client's FIFOs, opened for writing without waiting.
#[derive(Debug, Default)]
pub(crate) struct Client {
    pub(crate) stdout: Option<OwnedFd>,
    pub(crate) stderr: Option<OwnedFd>,
}

impl Client {
    fn of(&self, stream: Stream) -> Option<&OwnedFd> {
        match stream {
            Stream::Stdout => self.stdout.as_ref(),
            Stream::Stderr => self.stderr.as_ref(),
        }
    }

    /// Whether nobody has the other end any more.
    fn left(&self) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        [&self.stdout, &self.stderr].into_iter().flatten().any(|fd| {
            let mut fds = [PollFd::new(fd, PollFlags::empty())];
            matches!(poll(&mut fds, Some(&now)), Ok(1..)) && fds[0].revents().contains(PollFlags::ERR)
        })
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
            for fd in [&client.stdout, &client.stderr].into_iter().flatten() {
                // A smaller one works as well.
                let _ = rustix::pipe::fcntl_setpipe_size(fd, BEHIND);
            }
            self.0.push(client);
        }
        room
    }

    /// Gives a piece of output to all of them.
    pub(crate) fn write(&mut self, stream: Stream, bytes: &[u8]) {
        self.0.retain(|client| client.of(stream).is_none_or(|fd| whole(fd, bytes)));
    }
}

fn whole(fd: &OwnedFd, mut bytes: &[u8]) -> bool {
    while !bytes.is_empty() {
        match rustix::io::write(fd, bytes) {
            Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(_) => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use rustix::pipe::{PipeFlags, pipe_with};

    use super::*;

    fn client() -> (OwnedFd, Client) {
        let (from, to) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
        (from, Client { stdout: Some(to), stderr: None })
    }

    #[test]
    fn every_client_gets_the_output_and_a_stuck_one_is_disconnected() {
        let (mut good, mut stuck) = (client(), client());
        let mut clients = Clients::default();
        assert!(clients.add(std::mem::take(&mut good.1)) && clients.add(std::mem::take(&mut stuck.1)));
        let mut got = 0;
        let mut buffer = vec![0; 64 << 10];
        for _ in 0..2 * BEHIND / buffer.len() {
            clients.write(Stream::Stdout, &buffer.clone());
            got += rustix::io::read(&good.0, &mut buffer[..]).unwrap();
        }
        assert_eq!((clients.0.len(), got), (1, 2 * BEHIND));
        clients.write(Stream::Stderr, b"not wanted");
        assert_eq!(clients.0.len(), 1);
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

//! Writes what a container prints into its CRI log file, one record per line:
//! `<time> <stdout|stderr> <P|F> <content>`. P marks a record that goes on in the next one of its stream: a
//! line longer than the limit, or the end of output without a newline. A carriage return before the newline
//! is dropped, as containerd does; every other byte is content.
//!
//! The file is written without waiting for whoever reads it, and only a regular file with one link is taken
//! (CVE-2025-0750). When it cannot be written the container runs on: what is lost is counted, and a marker
//! line says so as soon as there is room again.
//!
//! Memory: each stream holds the beginning of its unfinished line, at most one record. The large buffers
//! belong to the whole shim, since one thread uses them for one read at a time; they are given back after a
//! second of quiet.

use std::{
    cell::RefCell,
    fs::File,
    io::{self, Write},
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use rustix::{
    fs::{FileType, Mode, OFlags, ResolveFlags},
    io::Errno,
};
use tokio::{io::unix::AsyncFd, sync::watch, task::JoinHandle, time};

use crate::{
    attach::{Client, Clients},
    kernel, lock, record, stream,
};

/// Longest content of a record when nobody says otherwise.
const RECORD: usize = 16 * 1024;
/// Longest content of a record that can be asked for; it has to fit into the output buffer with its head.
const RECORD_MAX: usize = 64 * 1024;
/// One read, and one write. With records of 64 bytes a read of this size makes two writes.
const INPUT: usize = 64 * 1024;
const OUTPUT: usize = 128 * 1024;
/// A stream that has more to say lets the others speak after this many reads.
const TURN: usize = 8;
/// How much a container may print ahead of the shim before it has to wait.
const PIPE: usize = 256 * 1024;
/// Buffers that were not used for so long are given back.
const QUIET: Duration = Duration::from_secs(1);
/// How often a terminal that nobody has open is looked at again.
const HUNG_UP: Duration = Duration::from_millis(100);
/// How often a client that is behind is tried again.
const BREATH: Duration = Duration::from_millis(1);
/// Room for an unfinished line that is kept.
const KEEP: usize = 1024;
/// Bound for reading a pipe empty that somebody else still holds.
const LAST_READS: usize = 64;

/// Where a record comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    Stdout,
    Stderr,
}

/// Why a log file cannot be opened.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("open log directory {}: {cause}", .path.display())]
    Directory { path: PathBuf, cause: Errno },
    #[error("open log file {}: {cause}", .path.display())]
    Open { path: PathBuf, cause: Errno },
    #[error("log file {} is not a regular file with one link", .path.display())]
    NotPlain { path: PathBuf },
    #[error("make a pipe for output: {0}")]
    Pipe(Errno),
}

/// Where a container's log is, as its client says.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) directory: PathBuf,
    pub(crate) path: PathBuf,
}

/// What the streams of a container are told about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// A terminal that nobody has open may be opened again.
    Running,
    /// It will not.
    Exited,
    /// Take what is there and end.
    Over,
}

/// A container's log: the file, and the streams that are written to it.
pub(crate) struct Log {
    /// None: nothing is kept, clients that attach get the output all the same.
    place: Option<Place>,
    record: usize,
    sink: Arc<Mutex<Sink>>,
    clients: Arc<Mutex<Clients>>,
    streams: Vec<JoinHandle<()>>,
    phase: watch::Sender<Phase>,
}

impl Log {
    /// Opens the file. `record` is the longest content of a record, 0 for the usual one.
    pub(crate) fn open(place: Place, record: u32) -> Result<Log, Error> {
        Ok(Log::new(open(&place)?, Some(place), record))
    }

    /// For a container whose output nobody keeps.
    pub(crate) fn nowhere() -> Result<Log, Error> {
        let path = PathBuf::from("/dev/null");
        let file = rustix::fs::open(&path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
        let file = file.map_err(|cause| Error::Open { path, cause })?;
        Ok(Log::new(File::from(file), None, 0))
    }

    fn new(file: File, place: Option<Place>, record: u32) -> Log {
        let record = match usize::try_from(record).unwrap_or(RECORD_MAX) {
            0 => RECORD,
            wanted => wanted.min(RECORD_MAX),
        };
        let sink = Arc::new(Mutex::new(Sink::new(file)));
        Log {
            place,
            record,
            sink,
            clients: Arc::default(),
            streams: Vec::new(),
            phase: watch::Sender::new(Phase::Running),
        }
    }

    /// A pipe whose output is logged; returns the end for the container.
    pub(crate) fn pipe(&mut self, stream: Stream) -> Result<OwnedFd, Error> {
        let (ours, theirs) =
            rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(Error::Pipe)?;
        // Only the reading end: O_NONBLOCK belongs to the open file, and the container's must block.
        rustix::fs::fcntl_setfl(&ours, OFlags::NONBLOCK).map_err(Error::Pipe)?;
        // A smaller pipe works as well, so a host that has used up its allowance is no error.
        let _ = rustix::pipe::fcntl_setpipe_size(&ours, PIPE);
        self.follow(stream, ours).map_err(|_| Error::Pipe(Errno::NOMEM))?;
        Ok(theirs)
    }

    /// Logs what comes out of a non-blocking descriptor.
    pub(crate) fn follow(&mut self, stream: Stream, from: OwnedFd) -> io::Result<()> {
        let from = kernel::watch(from)?;
        let lines = Lines::new(stream, self.record);
        let pump = pump(from, lines, self.sink.clone(), self.clients.clone(), self.phase.subscribe());
        self.streams.push(tokio::spawn(pump));
        Ok(())
    }

    /// Closes the file and opens it by name again. Between two writes, so no record is torn and none is lost.
    /// When the new one cannot be opened the old one stays.
    pub(crate) fn reopen(&self) -> Result<(), Error> {
        if let Some(place) = &self.place {
            let file = open(place)?;
            lock(&self.sink).file = file;
        }
        Ok(())
    }

    /// From now on a client gets a copy of the output, until the container ends. False when there are too many.
    #[must_use]
    pub(crate) fn attach(&self, client: Client) -> bool {
        lock(&self.clients).add(client)
    }

    /// Takes the streams out, to be drained without holding a lock on the log.
    pub(crate) fn streams(&mut self) -> Streams {
        Streams {
            tasks: std::mem::take(&mut self.streams),
            clients: self.clients.clone(),
            phase: self.phase.clone(),
        }
    }
}

/// The streams of a container that has exited.
pub(crate) struct Streams {
    tasks: Vec<JoinHandle<()>>,
    clients: Arc<Mutex<Clients>>,
    phase: watch::Sender<Phase>,
}

impl Streams {
    /// Waits for the streams to end. Whoever still holds one after `bound` is not waited for: what is in the
    /// pipe by then is logged, and the stream is closed.
    pub(crate) async fn drain(self, bound: Duration) {
        let deadline = time::Instant::now() + bound;
        self.phase.send_replace(Phase::Exited);
        for mut task in self.tasks {
            if time::timeout_at(deadline, &mut task).await.is_err() {
                self.phase.send_replace(Phase::Over);
                // The last reads wait for nothing, so this is short.
                if time::timeout(QUIET, &mut task).await.is_err() {
                    task.abort();
                }
            }
        }
        // They see the end of output.
        *lock(&self.clients) = Clients::default();
    }
}

fn open(place: &Place) -> Result<File, Error> {
    let whole = place.directory.join(&place.path);
    let directory =
        rustix::fs::open(&place.directory, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|cause| Error::Directory { path: place.directory.clone(), cause })?;
    let flags = OFlags::WRONLY
        | OFlags::APPEND
        | OFlags::CREATE
        | OFlags::NOFOLLOW
        | OFlags::NONBLOCK
        | OFlags::NOCTTY
        | OFlags::CLOEXEC;
    let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let mode = Mode::from_raw_mode(0o640);
    let cause = |cause| Error::Open { path: whole.clone(), cause };
    let fd = rustix::io::retry_on_intr(|| rustix::fs::openat2(&directory, &place.path, flags, mode, beneath))
        .map_err(cause)?;
    let stat = rustix::fs::fstat(&fd).map_err(cause)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || stat.st_nlink != 1 {
        return Err(Error::NotPlain { path: whole });
    }
    if stat.st_size == 0 {
        // Our umask has taken the group's bit from a file that we made.
        rustix::fs::fchmod(&fd, mode).map_err(cause)?;
    }
    Ok(File::from(fd))
}

/// Copies a stream until its end.
async fn pump(
    mut from: AsyncFd<OwnedFd>,
    mut lines: Lines,
    sink: Arc<Mutex<Sink>>,
    clients: Arc<Mutex<Clients>>,
    mut phase: watch::Receiver<Phase>,
) {
    loop {
        if *phase.borrow_and_update() == Phase::Over {
            break;
        }
        let mut ready = tokio::select! {
            biased;
            changed = phase.changed() => match changed {
                Ok(()) => continue,
                // Nobody waits for the stream any more, and nobody will ever say so again.
                Err(_) => break,
            },
            ready = from.readable() => match ready {
                Ok(ready) => ready,
                Err(_) => break,
            },
        };
        match turn(&from, &mut lines, &sink, &clients, TURN) {
            // A terminal that was hung up and is open again.
            Turn::Dry if ready.ready().is_read_closed() => {
                drop(ready);
                match stream::rewatch(&from) {
                    Ok(anew) => from = anew,
                    Err(cause) => {
                        log::warn!("follow the output of a container: {cause}");
                        break;
                    }
                }
            }
            Turn::Dry => ready.clear_ready(),
            Turn::More => tokio::task::yield_now().await,
            Turn::Behind => {
                drop(ready);
                catch_up(&clients, lines.stream, &phase).await;
            }
            Turn::HungUp if *phase.borrow() == Phase::Running => {
                drop(ready);
                let _ = time::timeout(HUNG_UP, phase.changed()).await;
            }
            Turn::HungUp | Turn::Over => break,
        }
    }
    // What is in the pipe now; whoever keeps printing into it is not followed any further.
    // Clients that are behind are lost with the next piece.
    while matches!(turn(&from, &mut lines, &sink, &clients, LAST_READS), Turn::Behind) {}
    with_buffers(|buffers| buffers.end(&mut lines, &mut lock(&sink)));
}

/// Waits for clients that are behind; how long, they know.
async fn catch_up(clients: &Mutex<Clients>, stream: Stream, phase: &watch::Receiver<Phase>) {
    let mut asked = time::Instant::now();
    while *phase.borrow() != Phase::Over {
        time::sleep(BREATH).await;
        let waited = asked.elapsed();
        asked += waited;
        if !lock(clients).retry(stream, waited) {
            return;
        }
    }
}

enum Turn {
    /// Nothing there now.
    Dry,
    /// There may be more, but it is somebody else's turn.
    More,
    /// A client could not take all of the last piece.
    Behind,
    /// A terminal that nobody has open.
    HungUp,
    /// The stream has ended.
    Over,
}

fn turn(
    from: &AsyncFd<OwnedFd>,
    lines: &mut Lines,
    sink: &Mutex<Sink>,
    clients: &Mutex<Clients>,
    reads: usize,
) -> Turn {
    with_buffers(|buffers| {
        let mut sink = lock(sink);
        for _ in 0..reads {
            match rustix::io::read(from.get_ref(), &mut buffers.bytes[..INPUT]) {
                Ok(0) => return Turn::Over,
                Ok(count) => {
                    let piece = buffers.bytes.get(..count).unwrap_or_default();
                    let behind = lock(clients).write(lines.stream, piece);
                    buffers.write(count, lines, &mut sink);
                    if behind {
                        return Turn::Behind;
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Turn::Dry,
                Err(Errno::IO) => return Turn::HungUp,
                Err(cause) => {
                    log::warn!("read the output of a container: {cause}");
                    return Turn::Over;
                }
            }
        }
        Turn::More
    })
}

/// One stream's text, cut into records. The same bytes give the same records however they arrive.
struct Lines {
    stream: Stream,
    limit: usize,
    /// Beginning of the line whose end has not come. At most one byte longer than the limit, and then that
    /// byte is a carriage return of which nobody knows yet whether a newline follows.
    held: Vec<u8>,
}

impl Lines {
    fn new(stream: Stream, limit: usize) -> Lines {
        Lines { stream, limit, held: Vec::new() }
    }

    fn push(&mut self, mut input: &[u8], output: &mut Output) {
        while let Some(end) = memchr::memchr(b'\n', input) {
            let (line, rest) = (&input[..end], &input[end + 1..]);
            input = rest;
            if self.held.is_empty() && line.len() <= self.limit {
                output.record(Tag::Full, line.strip_suffix(b"\r").unwrap_or(line), b"");
            } else {
                self.finish(line, output);
            }
        }
        if !input.is_empty() {
            let rest = self.cut(input, false, output);
            self.held.extend_from_slice(rest);
        }
    }

    /// The end of a line that began earlier or is longer than a record.
    fn finish(&mut self, line: &[u8], output: &mut Output) {
        let line = match line.strip_suffix(b"\r") {
            Some(line) => line,
            None if line.is_empty() && self.held.last() == Some(&b'\r') => {
                self.held.pop();
                line
            }
            None => line,
        };
        let rest = self.cut(line, true, output);
        output.record(Tag::Full, &self.held, rest);
        self.forget();
    }

    /// The end of output: what is left is a record that goes on in no other.
    fn end(&mut self, output: &mut Output) {
        self.cut(b"", true, output);
        if !self.held.is_empty() {
            output.record(Tag::Partial, &self.held, b"");
            self.forget();
        }
    }

    /// Writes partial records as long as what is held and what follows are more than one record; returns
    /// what remains of the latter. `whole` says that the line ends there.
    fn cut<'a>(&mut self, mut more: &'a [u8], whole: bool, output: &mut Output) -> &'a [u8] {
        loop {
            let total = self.held.len() + more.len();
            let last = more.last().or(self.held.last());
            let undecided = !whole && total == self.limit + 1 && last == Some(&b'\r');
            if total <= self.limit || undecided {
                return more;
            }
            match self.limit.checked_sub(self.held.len()) {
                Some(missing) => {
                    output.record(Tag::Partial, &self.held, &more[..missing]);
                    more = &more[missing..];
                    self.held.clear();
                }
                None => {
                    output.record(Tag::Partial, &self.held[..self.limit], b"");
                    self.held.drain(..self.limit);
                }
            }
        }
    }

    fn forget(&mut self) {
        self.held.clear();
        self.held.shrink_to(KEEP);
    }
}

#[derive(Clone, Copy)]
enum Tag {
    Full,
    Partial,
}

/// Time, stream and tag, with the spaces after them.
const HEAD: usize = "2026-01-01T00:00:00.000000000Z stdout F ".len();

/// Records on their way to the file.
struct Output<'a> {
    bytes: &'a mut [u8],
    used: usize,
    head: [u8; HEAD],
    sink: &'a mut Sink,
}

impl Output<'_> {
    fn record(&mut self, tag: Tag, first: &[u8], second: &[u8]) {
        let size = HEAD + first.len() + second.len() + 1;
        if self.bytes.len() - self.used < size {
            self.flush();
        }
        self.head[HEAD - 2] = match tag {
            Tag::Full => b'F',
            Tag::Partial => b'P',
        };
        let to = &mut self.bytes[self.used..self.used + size];
        to[..HEAD].copy_from_slice(&self.head);
        to[HEAD..HEAD + first.len()].copy_from_slice(first);
        to[HEAD + first.len()..size - 1].copy_from_slice(second);
        to[size - 1] = b'\n';
        self.used += size;
    }

    fn flush(&mut self) {
        self.sink.write(&self.bytes[..self.used]);
        self.used = 0;
    }
}

/// Input in front, output behind it, one allocation: large enough that the allocator maps it apart and
/// gives it back.
struct Buffers {
    bytes: Box<[u8]>,
    used: bool,
}

impl Buffers {
    fn write(&mut self, count: usize, lines: &mut Lines, sink: &mut Sink) {
        self.with(lines, sink, |lines, input, output| lines.push(&input[..count], output));
    }

    fn end(&mut self, lines: &mut Lines, sink: &mut Sink) {
        self.with(lines, sink, |lines, _, output| lines.end(output));
    }

    fn with(&mut self, lines: &mut Lines, sink: &mut Sink, act: impl Fn(&mut Lines, &[u8], &mut Output)) {
        let (input, bytes) = self.bytes.split_at_mut(INPUT);
        let mut output = Output { bytes, used: 0, head: head(record::now(), lines.stream), sink };
        act(lines, input, &mut output);
        output.flush();
    }
}

thread_local! {
    static BUFFERS: RefCell<Option<Buffers>> = const { RefCell::new(None) };
}

fn with_buffers<T>(act: impl FnOnce(&mut Buffers) -> T) -> T {
    BUFFERS.with_borrow_mut(|buffers| {
        let buffers = buffers.get_or_insert_with(|| {
            tokio::spawn(give_back());
            Buffers { bytes: vec![0; INPUT + OUTPUT].into_boxed_slice(), used: true }
        });
        buffers.used = true;
        act(buffers)
    })
}

/// Drops the buffers once they were not used for a while.
async fn give_back() {
    loop {
        time::sleep(QUIET).await;
        let given = BUFFERS.with_borrow_mut(|buffers| {
            let used = buffers.as_mut().is_some_and(|buffers| std::mem::take(&mut buffers.used));
            if !used {
                *buffers = None;
            }
            !used
        });
        if given {
            return;
        }
    }
}

/// The file, and what could not be written to it.
struct Sink {
    file: File,
    lost: u64,
    why: Option<io::Error>,
    /// The file ends within a record.
    torn: bool,
}

impl Sink {
    fn new(file: File) -> Sink {
        Sink { file, lost: 0, why: None, torn: false }
    }

    /// Writes whole records, or counts them as lost. Nothing is kept for later: the buffer would grow for as
    /// long as the disk is full.
    fn write(&mut self, records: &[u8]) {
        if records.is_empty() {
            return;
        }
        if self.lost > 0 && !self.mark() {
            self.lost += records.len() as u64;
            return;
        }
        if let Err((written, why)) = write_all(&mut self.file, records) {
            let whole = memchr::memrchr(b'\n', &records[..written]).map_or(0, |end| end + 1);
            self.torn = !self.take_back(written - whole);
            self.lost += (records.len() - whole) as u64;
            log::warn!("write a container's log: {why}");
            self.why = Some(why);
        }
    }

    /// Says in the log how much is missing from it.
    fn mark(&mut self) -> bool {
        let why = self.why.as_ref().map(ToString::to_string).unwrap_or_default();
        let head = head(record::now(), Stream::Stderr);
        let mut line = if self.torn { b"\n".to_vec() } else { Vec::new() };
        line.extend_from_slice(&head);
        // Writing to a vector cannot fail.
        let _ = writeln!(line, "[crisp: {} bytes of this log were lost: {why}]", self.lost);
        match write_all(&mut self.file, &line) {
            Ok(()) => {
                (self.lost, self.why, self.torn) = (0, None, false);
                true
            }
            Err((written, _)) => {
                self.torn |= !self.take_back(written);
                false
            }
        }
    }

    /// Cuts the beginning of a record off the end of the file again.
    fn take_back(&mut self, count: usize) -> bool {
        count == 0
            || self
                .file
                .metadata()
                .is_ok_and(|found| self.file.set_len(found.len().saturating_sub(count as u64)).is_ok())
    }
}

/// On failure also says how much was written before.
fn write_all(file: &mut File, bytes: &[u8]) -> Result<(), (usize, io::Error)> {
    let mut done = 0;
    while done < bytes.len() {
        match file.write(&bytes[done..]) {
            Ok(0) => return Err((done, io::ErrorKind::WriteZero.into())),
            Ok(count) => done += count,
            Err(cause) if cause.kind() == io::ErrorKind::Interrupted => {}
            Err(cause) => return Err((done, cause)),
        }
    }
    Ok(())
}

/// `2026-11-23T18:36:41.123456789Z stdout F `.
fn head(now: i64, stream: Stream) -> [u8; HEAD] {
    let mut head = *b"0000-00-00T00:00:00.000000000Z stdout F ";
    let (seconds, nanos) = (now.div_euclid(1_000_000_000), now.rem_euclid(1_000_000_000));
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = date(days);
    for (at, digits, value) in [
        (0, 4, year),
        (5, 2, month),
        (8, 2, day),
        (11, 2, second / 3600),
        (14, 2, second / 60 % 60),
        (17, 2, second % 60),
        (20, 9, nanos),
    ] {
        let mut value = value;
        for digit in head[at..at + digits].iter_mut().rev() {
            *digit = b'0' + u8::try_from(value % 10).unwrap_or(0);
            value /= 10;
        }
    }
    if stream == Stream::Stderr {
        head[31..37].copy_from_slice(b"stderr");
    }
    head
}

/// Year, month and day of a day counted from 1970, in the proleptic Gregorian calendar. The year is taken to
/// begin in March, so that the leap day is its last.
fn date(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let of_era = days.rem_euclid(146_097);
    let year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (year + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{PermissionsExt, symlink},
    };

    use super::*;

    fn sink(dir: &tempfile::TempDir) -> Sink {
        Sink::new(File::options().create(true).append(true).open(dir.path().join("0.log")).unwrap())
    }

    /// Tag and content of each record that the chunks give.
    fn records(limit: usize, chunks: &[&[u8]]) -> Vec<(char, Vec<u8>)> {
        let dir = tempfile::tempdir().unwrap();
        let mut sink = sink(&dir);
        let mut bytes = vec![0; 4096];
        let mut output =
            Output { bytes: &mut bytes, used: 0, head: head(0, Stream::Stdout), sink: &mut sink };
        let mut lines = Lines::new(Stream::Stdout, limit);
        for chunk in chunks {
            lines.push(chunk, &mut output);
        }
        lines.end(&mut output);
        output.flush();
        let written = fs::read(dir.path().join("0.log")).unwrap();
        written
            .split_inclusive(|b| *b == b'\n')
            .map(|line| {
                let line = line.strip_suffix(b"\n").unwrap();
                assert_eq!(&line[..38], b"1970-01-01T00:00:00.000000000Z stdout ");
                (char::from(line[38]), line[40..].to_vec())
            })
            .collect()
    }

    fn text(limit: usize, chunks: &[&[u8]]) -> String {
        let mut text = String::new();
        for (tag, content) in records(limit, chunks) {
            text += &format!("{tag}({})", String::from_utf8_lossy(&content).escape_debug());
        }
        text
    }

    #[test]
    fn a_line_is_one_record() {
        assert_eq!(text(8, &[b"a\nbc\n\n"]), "F(a)F(bc)F()");
    }

    #[test]
    fn a_line_that_arrives_in_parts_is_one_record() {
        assert_eq!(text(8, &[b"a", b"b", b"c\nd", b"\n"]), "F(abc)F(d)");
    }

    #[test]
    fn a_long_line_is_cut_and_its_last_part_is_full() {
        assert_eq!(text(4, &[b"0123456789\n"]), "P(0123)P(4567)F(89)");
        assert_eq!(text(4, &[b"01234567\n"]), "P(0123)F(4567)");
        assert_eq!(text(4, &[b"0123\n"]), "F(0123)");
    }

    #[test]
    fn output_that_ends_without_a_newline_is_partial() {
        assert_eq!(text(4, &[b"ab"]), "P(ab)");
        assert_eq!(text(4, &[b"abcdef"]), "P(abcd)P(ef)");
        assert_eq!(text(4, &[b"abcd"]), "P(abcd)");
        assert_eq!(text(4, &[b"abcd\r"]), "P(abcd)P(\\r)");
    }

    #[test]
    fn a_carriage_return_counts_only_before_a_newline() {
        assert_eq!(text(8, &[b"a\r\nb\rc\n\r\n\r\r\n"]), "F(a)F(b\\rc)F()F(\\r)");
        assert_eq!(text(4, &[b"abcd\r\n"]), "F(abcd)");
        assert_eq!(text(4, &[b"abcd\r", b"\n"]), "F(abcd)");
        assert_eq!(text(4, &[b"abcd\rx\n"]), "P(abcd)F(\\rx)");
    }

    #[test]
    fn every_byte_survives() {
        let all: Vec<u8> = (0..=255).filter(|b| *b != b'\n').collect();
        assert_eq!(records(RECORD, &[&all, b"\n"]), [('F', all)]);
    }

    #[test]
    fn how_the_bytes_arrive_makes_no_difference() {
        // A small generator in place of a crate: the seeds are the cases.
        let mut state = 1u64;
        let mut random = |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % below
        };
        for _ in 0..300 {
            let input: Vec<u8> = (0..random(60)).map(|_| b"ab\r\n"[random(4)]).collect();
            let mut chunks = Vec::new();
            let mut rest = &input[..];
            while !rest.is_empty() {
                let (chunk, more) = rest.split_at(1 + random(rest.len()));
                chunks.push(chunk);
                rest = more;
            }
            assert_eq!(records(5, &chunks), records(5, &[&input]), "{input:?}");
        }
    }

    #[test]
    fn records_joined_again_are_the_lines() {
        let input = b"first\nsecond line that is long\n\nlast\n";
        let mut joined = Vec::new();
        for (tag, content) in records(5, &[input]) {
            joined.extend_from_slice(&content);
            if tag == 'F' {
                joined.push(b'\n');
            }
        }
        assert_eq!(joined, input);
    }

    #[test]
    fn the_time_is_written_with_nine_digits() {
        let at = |now| String::from_utf8(head(now, Stream::Stderr).to_vec()).unwrap();
        assert_eq!(at(0), "1970-01-01T00:00:00.000000000Z stderr F ");
        assert_eq!(at(951_782_400_000_000_001), "2000-02-29T00:00:00.000000001Z stderr F ");
        assert_eq!(at(1_795_459_001_120_000_000), "2026-11-23T18:36:41.120000000Z stderr F ");
        assert_eq!(at(4_107_542_399_999_999_999), "2100-02-28T23:59:59.999999999Z stderr F ");
        assert_eq!(at(4_107_542_400_000_000_000), "2100-03-01T00:00:00.000000000Z stderr F ");
    }

    #[test]
    fn only_a_regular_file_below_the_directory_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let at = |path: &str| open(&Place { directory: dir.path().to_owned(), path: path.into() });
        fs::create_dir(dir.path().join("sub")).unwrap();
        fs::write(dir.path().join("target"), b"").unwrap();
        symlink("target", dir.path().join("link")).unwrap();
        symlink("sub", dir.path().join("dir")).unwrap();
        fs::hard_link(dir.path().join("target"), dir.path().join("second")).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, dir.path().join("fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();
        for bad in ["../x", "/etc/x", "link", "dir/x", "target", "fifo", "sub", "none/x", ""] {
            assert!(at(bad).is_err(), "{bad}");
        }
        at("sub/0.log").unwrap();
        let mode = fs::metadata(dir.path().join("sub/0.log")).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o640);
    }

    #[test]
    fn what_is_lost_is_counted_and_said() {
        let dir = tempfile::tempdir().unwrap();
        let mut sink = sink(&dir);
        sink.write(b"one\n");
        let good = std::mem::replace(&mut sink.file, File::options().write(true).open("/dev/full").unwrap());
        sink.write(b"twotwo\n");
        sink.write(b"three\n");
        assert_eq!(sink.lost, 13);
        sink.file = good;
        sink.write(b"four\n");
        let written = fs::read_to_string(dir.path().join("0.log")).unwrap();
        let lines: Vec<_> = written.lines().collect();
        assert_eq!((lines[0], lines[2]), ("one", "four"));
        assert!(
            lines[1]
                .ends_with("[crisp: 13 bytes of this log were lost: No space left on device (os error 28)]")
        );
        assert_eq!(sink.lost, 0);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_stream_whose_log_is_gone_ends_in_place_of_spinning() {
        let (ours, theirs) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        rustix::fs::fcntl_setfl(&ours, OFlags::NONBLOCK).unwrap();
        let sink = Arc::new(Mutex::new(Sink::new(tempfile::tempfile().unwrap())));
        let phase = watch::Sender::new(Phase::Running).subscribe();
        let pump = pump(
            kernel::watch(ours).unwrap(),
            Lines::new(Stream::Stdout, RECORD),
            sink,
            Arc::default(),
            phase,
        );
        time::timeout(Duration::from_secs(10), pump).await.expect("the pump ends");
        drop(theirs);
    }
}

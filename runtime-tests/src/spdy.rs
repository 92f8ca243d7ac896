//! The thinnest client of streaming by SPDY/3.1, for the bench alone: beside it the runtime under measurement has most
//! of the processor. What it sends is right; of what it gets it checks only what the figures need.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use flate2::{Compress, Compression, FlushCompress};

const LIMIT: Duration = Duration::from_secs(60);
/// Payload of a frame that is sent.
const PIECE: usize = 64 << 10;
/// Types of control frames.
const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;

/// Pours so many bytes into the stdin of an exec, whose command says something when it has them all. Gives the seconds.
pub fn pour(url: &str, bytes: usize) -> Result<f64> {
    let mut connection = Connection::upgrade(url, "v4.channel.k8s.io")?;
    let mut open = |kind| connection.open(&[("streamtype", kind)]);
    let (error, stdin, stdout, _) = (open("error")?, open("stdin")?, open("stdout")?, open("stderr")?);
    let clock = Instant::now();
    let writer = connection.writer(stdin, bytes)?;
    let said = connection.read_to_end(stdout)?;
    let seconds = clock.elapsed().as_secs_f64();
    ensure!(said > 0, "the command said nothing");
    connection.read_to_end(error)?;
    writer.join().ok().context("the writer panicked")??;
    Ok(seconds)
}

/// Sends so many bytes through a forwarded port that echoes them, and reads them back. Gives the seconds.
pub fn echo(url: &str, port: &str, bytes: usize) -> Result<f64> {
    let mut connection = Connection::upgrade(url, "portforward.k8s.io")?;
    let (error, data) = connection.forward(port, "1")?;
    let clock = Instant::now();
    let writer = connection.writer(data, bytes)?;
    let came = connection.read_to_end(data)?;
    let seconds = clock.elapsed().as_secs_f64();
    ensure!(came >= bytes, "only {came} bytes came back");
    connection.read_to_end(error)?;
    writer.join().ok().context("the writer panicked")??;
    Ok(seconds)
}

/// Opens so many connections to a forwarded port, one after another, each to its end. Gives the seconds.
pub fn connect(url: &str, port: &str, count: usize) -> Result<f64> {
    let mut connection = Connection::upgrade(url, "portforward.k8s.io")?;
    let clock = Instant::now();
    for number in 0..count {
        let (error, data) = connection.forward(port, &number.to_string())?;
        connection.send(data, true, b"enough\n")?;
        ensure!(connection.read_to_end(data)? == b"hello\n".len(), "the port said something else");
        connection.read_to_end(error)?;
    }
    Ok(clock.elapsed().as_secs_f64())
}

struct Connection {
    from: BufReader<TcpStream>,
    to: TcpStream,
    deflate: Compress,
    next: u32,
    payload: Vec<u8>,
    /// Streams that ended while something else was waited for.
    finished: Vec<u32>,
}

/// What a frame says; its payload was read.
enum Frame {
    Reply(u32),
    Reset(u32),
    Data { stream: u32, fin: bool, length: usize },
    Other,
}

impl Connection {
    fn upgrade(url: &str, protocol: &str) -> Result<Connection> {
        let (host, path) =
            url.strip_prefix("http://").and_then(|rest| rest.split_once('/')).context("what URL is that?")?;
        let mut to = TcpStream::connect(host)?;
        to.set_nodelay(true)?;
        to.set_read_timeout(Some(LIMIT))?;
        to.set_write_timeout(Some(LIMIT))?;
        write!(
            to,
            "POST /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\
             X-Stream-Protocol-Version: {protocol}\r\nContent-Length: 0\r\n\r\n"
        )?;
        let mut from = BufReader::with_capacity(256 << 10, to.try_clone()?);
        let mut line = String::new();
        from.read_line(&mut line)?;
        ensure!(line.contains(" 101 "), "no upgrade: {line}");
        while line != "\r\n" {
            line.clear();
            ensure!(from.read_line(&mut line)? > 0, "the answer ends early");
        }
        let deflate = Compress::new(Compression::fast(), true);
        Ok(Connection { from, to, deflate, next: 1, payload: Vec::new(), finished: Vec::new() })
    }

    /// The streams of one forwarded connection: for errors, half-closed, and for data.
    fn forward(&mut self, port: &str, request: &str) -> Result<(u32, u32)> {
        let headers = |kind| [("streamtype", kind), ("port", port), ("requestid", request)];
        let error = self.open(&headers("error"))?;
        self.send(error, true, &[])?;
        Ok((error, self.open(&headers("data"))?))
    }

    /// Opens a stream and waits until it is accepted.
    fn open(&mut self, headers: &[(&str, &str)]) -> Result<u32> {
        let id = self.next;
        self.next += 2;
        let mut block = u32::try_from(headers.len())?.to_be_bytes().to_vec();
        for text in headers.iter().flat_map(|(name, value)| [name, value]) {
            block.extend_from_slice(&u32::try_from(text.len())?.to_be_bytes());
            block.extend_from_slice(text.as_bytes());
        }
        // One zlib stream for all blocks. It names no dictionary, which is allowed.
        let mut packed = Vec::with_capacity(block.len() + 64);
        self.deflate.compress_vec(&block, &mut packed, FlushCompress::Sync)?;
        let mut frame = [0x8003u16.to_be_bytes(), SYN_STREAM.to_be_bytes()].concat();
        frame.extend_from_slice(&u32::try_from(packed.len() + 10)?.to_be_bytes());
        frame.extend_from_slice(&id.to_be_bytes());
        frame.extend_from_slice(&[0; 6]);
        frame.extend_from_slice(&packed);
        self.to.write_all(&frame)?;
        loop {
            match self.frame()? {
                Frame::Reply(accepted) if accepted == id => return Ok(id),
                Frame::Reset(refused) if refused == id => bail!("stream {id} was refused"),
                Frame::Data { stream, fin: true, .. } | Frame::Reset(stream) => self.finished.push(stream),
                _ => {}
            }
        }
    }

    fn send(&mut self, stream: u32, fin: bool, payload: &[u8]) -> Result<()> {
        Ok(self.to.write_all(&data(stream, fin, payload)?)?)
    }

    /// A thread that sends so many bytes and half-closes.
    fn writer(&self, stream: u32, bytes: usize) -> Result<std::thread::JoinHandle<Result<()>>> {
        let mut to = self.to.try_clone()?;
        let frame = data(stream, false, &[b'x'; PIECE])?;
        let last = data(stream, true, &[])?;
        Ok(std::thread::spawn(move || {
            for _ in 0..bytes / PIECE {
                to.write_all(&frame)?;
            }
            Ok(to.write_all(&last)?)
        }))
    }

    /// Reads to the end of one stream, which for containerd is often a reset. Gives how many bytes came on it.
    fn read_to_end(&mut self, wanted: u32) -> Result<usize> {
        let mut came = 0;
        while !self.finished.contains(&wanted) {
            match self.frame()? {
                Frame::Data { stream, fin, length } => {
                    came += if stream == wanted { length } else { 0 };
                    if fin {
                        self.finished.push(stream);
                    }
                }
                Frame::Reset(stream) => self.finished.push(stream),
                _ => {}
            }
        }
        self.finished.retain(|stream| *stream != wanted);
        Ok(came)
    }

    fn frame(&mut self) -> Result<Frame> {
        let mut head = [0; 8];
        self.from.read_exact(&mut head)?;
        let [a, b, c, d, flags, length @ ..] = head;
        let length = length.into_iter().fold(0, |sum, byte| sum << 8 | usize::from(byte));
        self.payload.resize(length, 0);
        self.from.read_exact(&mut self.payload)?;
        if a & 0x80 == 0 {
            return Ok(Frame::Data { stream: u32::from_be_bytes([a, b, c, d]), fin: flags & 1 == 1, length });
        }
        let stream = self.payload.first_chunk().map(|id| u32::from_be_bytes(*id));
        Ok(match (u16::from_be_bytes([c, d]), stream) {
            (SYN_REPLY, Some(stream)) => Frame::Reply(stream),
            (RST_STREAM, Some(stream)) => Frame::Reset(stream),
            _ => Frame::Other,
        })
    }
}

/// A data frame.
fn data(stream: u32, fin: bool, payload: &[u8]) -> Result<Vec<u8>> {
    let length = u32::try_from(payload.len())? | u32::from(fin) << 24;
    Ok([&stream.to_be_bytes()[..], &length.to_be_bytes(), payload].concat())
}

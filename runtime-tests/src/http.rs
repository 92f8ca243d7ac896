//! The little HTTP/1.1 that tests speak on loopback: one request per connection, whole bodies, deadlines.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// A request to be sent.
#[derive(Debug)]
pub struct Request {
    head: String,
    body: Vec<u8>,
}

/// What came back.
#[derive(Debug)]
pub struct Reply {
    /// The status code.
    pub code: u16,
    headers: Vec<(String, String)>,
    /// The body, chunks joined.
    pub body: Vec<u8>,
}

const LIMIT: Duration = Duration::from_secs(60);

impl Request {
    /// A request without a body.
    pub fn new(method: &str, path: &str) -> Request {
        Request {
            head: format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"),
            body: Vec::new(),
        }
    }

    /// Adds a header.
    pub fn header(mut self, name: &str, value: &str) -> Request {
        self.head.push_str(&format!("{name}: {value}\r\n"));
        self
    }

    /// Sets the body.
    pub fn body(mut self, body: &[u8]) -> Request {
        self.body = body.to_vec();
        self
    }

    /// Sends it and reads the reply to its end.
    pub fn send(self, to: SocketAddr) -> Result<Reply> {
        let what = self.head.lines().next().unwrap_or_default().to_owned();
        self.exchange(to).with_context(|| format!("{what} at {to}"))
    }

    fn exchange(self, to: SocketAddr) -> Result<Reply> {
        let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(5))?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.set_write_timeout(Some(LIMIT))?;
        stream.write_all(format!("{}Content-Length: {}\r\n\r\n", self.head, self.body.len()).as_bytes())?;
        stream.write_all(&self.body)?;
        let head_only = self.head.starts_with("HEAD ");
        let mut all = Vec::new();
        // A server may reset after its reply when it did not read all of ours; what arrived counts.
        if let Err(error) = stream.read_to_end(&mut all)
            && all.is_empty()
        {
            return Err(error.into());
        }
        parse(&all, head_only)
    }
}

impl Reply {
    /// The value of a header, whatever the case of its name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.as_str())
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// An error unless the code is the one wanted.
    pub fn expect(&self, code: u16, what: &str) -> Result<()> {
        if self.code != code {
            bail!(
                "{what}: status {} instead of {code}: {}",
                self.code,
                self.text().chars().take(300).collect::<String>()
            );
        }
        Ok(())
    }
}

fn parse(all: &[u8], head_only: bool) -> Result<Reply> {
    let end = all.windows(4).position(|w| w == b"\r\n\r\n").context("reply without an end of headers")?;
    let head = String::from_utf8_lossy(&all[..end]);
    let mut lines = head.lines();
    let status = lines.next().unwrap_or_default();
    let code = status
        .split(' ')
        .nth(1)
        .and_then(|c| c.parse().ok())
        .with_context(|| format!("status line {status:?}"))?;
    let headers: Vec<(String, String)> = lines
        .filter_map(|l| l.split_once(':'))
        .map(|(n, v)| (n.trim().to_owned(), v.trim().to_owned()))
        .collect();
    let mut reply = Reply { code, headers, body: all[end + 4..].to_vec() };
    if head_only {
        reply.body.clear();
    } else if reply.header("transfer-encoding").is_some_and(|v| v.eq_ignore_ascii_case("chunked")) {
        reply.body = unchunk(&reply.body)?;
    } else if let Some(length) = reply.header("content-length").and_then(|v| v.parse::<usize>().ok())
        && reply.body.len() < length
    {
        bail!("body ends after {} of {length} bytes", reply.body.len());
    }
    Ok(reply)
}

fn unchunk(mut rest: &[u8]) -> Result<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let end = rest.windows(2).position(|w| w == b"\r\n").context("chunk without a size")?;
        let size = String::from_utf8_lossy(&rest[..end]);
        let size = usize::from_str_radix(size.split(';').next().unwrap_or_default().trim(), 16)?;
        if size == 0 {
            return Ok(body);
        }
        let from = end + 2;
        body.extend_from_slice(rest.get(from..from + size).context("chunk cut short")?);
        rest = rest.get(from + size + 2..).context("chunk without an end")?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_joined_and_a_short_body_is_an_error() {
        let reply = parse(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x\r\nde\r\n0\r\n\r\n",
            false,
        );
        assert_eq!(reply.unwrap().body, b"abcde");
        assert!(parse(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", false).is_err());
    }
}

//! The server as clients meet it: upgrades, refusals, exec and port-forward over SPDY, WebSocket and SPDY in
//! WebSocket. Go's own clients are tried against the whole runtime; here the bytes are made by hand.

#![allow(clippy::unwrap_used)] // A test: what goes wrong ends it.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::{BufMut, BytesMut};
use futures_util::{SinkExt, StreamExt};
use streaming::{
    Attach, Backend, Exec, Limits, Reader, Server, Streams, Wanted, Writer,
    spdy::{
        Headers,
        frame::{self, Frame},
        headers::{Deflater, Inflater},
    },
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_tungstenite::tungstenite::{Message, client::IntoClientRequest};

/// Answers with its input in capitals, and the number in its command as exit code.
struct Shout;

impl Backend for Shout {
    async fn exec(&self, request: Exec, mut streams: Streams) -> Result<i32, String> {
        if request.command[0] == "size" {
            let size = streams.resize.recv().await.ok_or("no size")?;
            let text = format!("{}x{}", size.width, size.height);
            streams
                .stdout
                .as_mut()
                .ok_or("no stdout")?
                .write_all(text.as_bytes())
                .await
                .map_err(|e| e.to_string())?;
            return Ok(0);
        }
        if let (Some(stdin), Some(stdout)) = (&mut streams.stdin, &mut streams.stdout) {
            let mut text = String::new();
            stdin.read_to_string(&mut text).await.map_err(|e| e.to_string())?;
            stdout.write_all(text.to_uppercase().as_bytes()).await.map_err(|e| e.to_string())?;
        }
        request.command[0].parse().map_err(|_| "no such command".into())
    }

    async fn attach(&self, _: Attach, mut streams: Streams) -> Result<(), String> {
        streams.stdout.as_mut().ok_or("no stdout")?.write_all(b"attached").await.map_err(|e| e.to_string())
    }

    async fn connect(&self, _: &str, port: u16) -> io::Result<(Reader, Writer)> {
        if port == 9 {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let (near, far) = tokio::io::duplex(1 << 16);
        tokio::spawn(async move {
            let (mut read, mut write) = tokio::io::split(far);
            let _ = tokio::io::copy(&mut read, &mut write).await;
            let _ = write.shutdown().await;
        });
        let (read, write) = tokio::io::split(near);
        Ok((Box::pin(read), Box::pin(write)))
    }
}

async fn server() -> Server<Shout> {
    limited(Limits::default()).await
}

async fn limited(limits: Limits) -> Server<Shout> {
    let address: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let (server, serving) = Server::bind(address, None, limits, Arc::new(Shout)).await.unwrap();
    tokio::spawn(serving);
    server
}

fn exec(command: &str, tty: bool) -> Exec {
    let streams = Wanted { tty, stdin: !tty, stdout: true, stderr: false };
    Exec { container: "c".into(), command: vec![command.into()], streams }
}

fn parts(url: &str) -> (&str, &str) {
    url.strip_prefix("http://").unwrap().split_at(url["http://".len()..].find('/').unwrap())
}

/// Sends a request's head and reads the answer's.
async fn request(url: &str, method: &str, headers: &str) -> (TcpStream, String) {
    let (host, path) = parts(url);
    let mut socket = TcpStream::connect(host).await.unwrap();
    let head = format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\n{headers}\r\n");
    socket.write_all(head.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        answer.push(socket.read_u8().await.unwrap());
    }
    (socket, String::from_utf8(answer).unwrap())
}

const SPDY: &str = "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\n";

struct Peer<Io> {
    io: Io,
    input: BytesMut,
    frames: frame::Reader,
    deflater: Deflater,
    inflater: Inflater,
}

impl<Io: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin> Peer<Io> {
    fn new(io: Io) -> Peer<Io> {
        Peer {
            io,
            input: BytesMut::new(),
            frames: frame::Reader::default(),
            deflater: Deflater::default(),
            inflater: Inflater::default(),
        }
    }

    async fn open(&mut self, id: u32, headers: Headers) {
        let mut out = BytesMut::new();
        frame::syn_stream(&mut out, id, false, &self.deflater.block(&headers).unwrap());
        self.io.write_all(&out).await.unwrap();
    }

    async fn data(&mut self, id: u32, fin: bool, bytes: &[u8]) {
        let mut out = BytesMut::new();
        frame::data_header(&mut out, id, fin, bytes.len());
        out.put_slice(bytes);
        self.io.write_all(&out).await.unwrap();
    }

    /// Everything until the goodbye, by stream.
    async fn rest(&mut self) -> Vec<(u32, Vec<u8>)> {
        let mut streams: Vec<(u32, Vec<u8>)> = Vec::new();
        loop {
            while let Some(frame) = self.frames.next(&mut self.input).unwrap() {
                match frame {
                    Frame::Data { id, payload, .. } => {
                        match streams.iter_mut().find(|(known, _)| *known == id) {
                            Some((_, bytes)) => bytes.extend_from_slice(&payload),
                            None => streams.push((id, payload.to_vec())),
                        }
                    }
                    Frame::SynReply { block, .. } => drop(self.inflater.headers(&block).unwrap()),
                    Frame::GoAway => return streams,
                    _ => {}
                }
            }
            assert!(self.io.read_buf(&mut self.input).await.unwrap() > 0, "goodbye before the end");
        }
    }
}

fn of(streams: &[(u32, Vec<u8>)], id: u32) -> String {
    let bytes = streams.iter().find(|(known, _)| *known == id).map(|(_, bytes)| bytes.clone());
    String::from_utf8(bytes.unwrap_or_default()).unwrap()
}

#[tokio::test]
async fn exec_over_spdy_by_get_and_post() {
    let server = server().await;
    for (method, version, word) in [
        ("POST", "v4.channel.k8s.io", r#""message":"3""#),
        ("GET", "v5.channel.k8s.io", r#""message":"3""#),
        ("POST", "channel.k8s.io", "exit status 3"),
    ] {
        let url = server.exec(exec("3", false)).unwrap();
        let offer = format!("{SPDY}X-Stream-Protocol-Version: x\r\nX-Stream-Protocol-Version: {version}\r\n");
        let (socket, answer) = request(&url, method, &offer).await;
        assert!(answer.starts_with("HTTP/1.1 101") && answer.contains(version), "{answer}");
        assert!(answer.to_lowercase().contains("connection: upgrade\r\n"), "{answer}");
        let mut peer = Peer::new(socket);
        for (id, kind) in [(1, "error"), (3, "stdin"), (5, "stdout")] {
            peer.open(id, Headers::from([("streamtype", kind)])).await;
        }
        peer.data(3, true, b"hello").await;
        let streams = peer.rest().await;
        assert_eq!(of(&streams, 5), "HELLO");
        assert!(of(&streams, 1).contains(word), "{}", of(&streams, 1));
    }
}

#[tokio::test]
async fn a_terminal_gets_its_size() {
    let server = server().await;
    let url = server.exec(exec("size", true)).unwrap();
    let (socket, _) =
        request(&url, "POST", &format!("{SPDY}X-Stream-Protocol-Version: v4.channel.k8s.io\r\n")).await;
    let mut peer = Peer::new(socket);
    for (id, kind) in [(1, "error"), (3, "stdout"), (5, "resize")] {
        peer.open(id, Headers::from([("streamtype", kind)])).await;
    }
    peer.data(5, false, br#"{"Width":80,"Height":24}"#).await;
    let streams = peer.rest().await;
    assert_eq!(of(&streams, 3), "80x24");
    assert!(of(&streams, 1).contains("Success"));
}

#[tokio::test]
async fn what_cannot_be_served_is_refused_in_http() {
    let server = server().await;
    let ask = |headers: &'static str| {
        let url = server.exec(exec("0", false)).unwrap();
        async move { request(&url, "POST", headers).await.1 }
    };
    for (headers, status) in [
        ("", "400"),
        ("Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\n", "400"),
        ("Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v9\r\n", "403"),
        ("Connection: Upgrade\r\nUpgrade: websocket\r\n", "400"),
    ] {
        let answer = ask(headers).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{headers:?}: {answer}");
    }
    let url = server.exec(exec("0", false)).unwrap();
    for wrong in
        [url.replace("/exec/", "/attach/"), format!("{url}x"), url.replace("/exec/", "/"), format!("{url}/x")]
    {
        assert!(request(&wrong, "GET", SPDY).await.1.starts_with("HTTP/1.1 404"), "{wrong}");
    }
    assert!(request(&url, "GET", SPDY).await.1.starts_with("HTTP/1.1 404"), "a wrong path used the token up");
}

#[tokio::test]
async fn a_client_that_comes_too_late_is_not_known() {
    let server = limited(Limits { token: Duration::ZERO, ..Limits::default() }).await;
    let url = server.exec(exec("0", false)).unwrap();
    assert!(request(&url, "POST", SPDY).await.1.starts_with("HTTP/1.1 404"));
}

const V4: &str =
    "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n";

#[tokio::test]
async fn a_client_that_does_not_open_its_streams_is_sent_away() {
    let server = limited(Limits { creation: Duration::from_millis(100), ..Limits::default() }).await;
    let (socket, _) = request(&server.exec(exec("0", false)).unwrap(), "POST", V4).await;
    let mut peer = Peer::new(socket);
    peer.open(1, Headers::from([("streamtype", "error")])).await;
    assert!(peer.rest().await.is_empty());
}

#[tokio::test]
async fn a_client_that_breaks_the_protocol_is_sent_away() {
    let server = server().await;
    let (mut socket, _) = request(&server.exec(exec("0", false)).unwrap(), "POST", V4).await;
    // A control frame of SPDY/2.
    socket.write_all(&[0x80, 2, 0, 1, 0, 0, 0, 4, 0, 0, 0, 1]).await.unwrap();
    let mut rest = Vec::new();
    // A reset is an end as well.
    let _ = socket.read_to_end(&mut rest).await;
    let mut socket = websocket(&server.exec(exec("0", false)).unwrap(), Some("base64.channel.k8s.io")).await;
    socket.send(Message::text("0!")).await.unwrap();
    while let Some(Ok(message)) = socket.next().await {
        assert!(!message.to_string().contains("Success"), "{message}");
    }
    let mut socket = websocket(&server.exec(exec("0", false)).unwrap(), Some("v5.channel.k8s.io")).await;
    // Channels that nobody asked for are passed over, and their ends as well.
    for message in [&b"\x09what"[..], b"\x01out", b"\xff\x07", b"\xff", b"\xff\x00"] {
        socket.send(Message::binary(message.to_vec())).await.unwrap();
    }
    let mut said = String::new();
    while let Some(Ok(message)) = socket.next().await {
        said += &message.to_string();
    }
    assert!(said.contains("Success"), "{said}");
}

#[tokio::test]
async fn clients_are_told_of_the_end() {
    let server = server().await;
    let mut spdy = Peer::new(request(&server.exec(exec("0", false)).unwrap(), "POST", V4).await.0);
    for (id, kind) in [(1, "error"), (3, "stdin"), (5, "stdout")] {
        spdy.open(id, Headers::from([("streamtype", kind)])).await;
    }
    // All three are accepted, so the command runs.
    let mut accepted = 0;
    while accepted < 3 {
        match spdy.frames.next(&mut spdy.input).unwrap() {
            Some(Frame::SynReply { .. }) => accepted += 1,
            Some(_) => {}
            None => drop(spdy.io.read_buf(&mut spdy.input).await.unwrap()),
        }
    }
    let mut web = websocket(&server.exec(exec("0", false)).unwrap(), Some("v5.channel.k8s.io")).await;
    web.next().await.unwrap().unwrap();
    let told = async {
        assert!(of(&spdy.rest().await, 1).contains("restarting"));
        drop(spdy);
        let mut said = String::new();
        while let Some(Ok(message)) = web.next().await {
            said += &message.to_string();
        }
        assert!(said.contains("restarting"), "{said}");
    };
    tokio::join!(server.end(), told);
}

async fn websocket(url: &str, protocol: Option<&str>) -> tokio_tungstenite::WebSocketStream<TcpStream> {
    let mut request = url.replace("http://", "ws://").into_client_request().unwrap();
    if let Some(protocol) = protocol {
        request.headers_mut().insert("sec-websocket-protocol", protocol.parse().unwrap());
    }
    let socket = TcpStream::connect(parts(url).0).await.unwrap();
    tokio_tungstenite::client_async(request, socket).await.unwrap().0
}

#[tokio::test]
async fn exec_over_websocket_with_the_close_signal() {
    let server = server().await;
    let url = server.exec(exec("3", false)).unwrap();
    let mut socket = websocket(&url, Some("v5.channel.k8s.io")).await;
    for message in [&b"\x00hel"[..], b"\x00lo", b"\xff\x00"] {
        socket.send(Message::binary(message.to_vec())).await.unwrap();
    }
    let mut channels = vec![Vec::new(); 5];
    let mut closed = None;
    while let Some(Ok(message)) = socket.next().await {
        match message {
            Message::Binary(bytes) => channels[usize::from(bytes[0])].extend_from_slice(&bytes[1..]),
            Message::Close(frame) => closed = frame,
            _ => {}
        }
    }
    assert_eq!(channels[1], b"HELLO");
    assert!(String::from_utf8_lossy(&channels[3]).contains("NonZeroExitCode"));
    assert_eq!(u16::from(closed.unwrap().code), 1000);
}

#[tokio::test]
async fn attach_over_base64_channels() {
    let server = server().await;
    let streams = Wanted { stdout: true, ..Wanted::default() };
    let url = server.attach(Attach { container: "c".into(), streams }).unwrap();
    let mut socket = websocket(&url, Some("v4.base64.channel.k8s.io")).await;
    let mut texts = Vec::new();
    while let Some(Ok(message)) = socket.next().await {
        if let Message::Text(text) = message {
            texts.push(text.to_string());
        }
    }
    assert!(texts.contains(&"1YXR0YWNoZWQ=".to_owned()), "{texts:?}");
}

async fn forward_both(mut peer: Peer<impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin>) {
    for (id, kind, port, request) in
        [(1, "error", "80", "0"), (3, "data", "80", "0"), (5, "error", "9", "1"), (7, "data", "9", "1")]
    {
        let headers = Headers::from([("streamtype", kind), ("port", port), ("requestid", request)]);
        peer.open(id, headers).await;
    }
    peer.data(3, true, b"ping").await;
    let (mut data, mut errors) = (Vec::new(), Vec::new());
    while data != b"ping" || errors.is_empty() {
        while let Some(frame) = peer.frames.next(&mut peer.input).unwrap() {
            match frame {
                Frame::Data { id: 3, payload, .. } => data.extend_from_slice(&payload),
                Frame::Data { id: 5, payload, .. } => errors.extend_from_slice(&payload),
                _ => {}
            }
        }
        assert!(data.len() < 5);
        if data != b"ping" || errors.is_empty() {
            assert!(peer.io.read_buf(&mut peer.input).await.unwrap() > 0);
        }
    }
    assert!(String::from_utf8_lossy(&errors).contains("refused"));
}

#[tokio::test]
async fn port_forward_over_spdy() {
    let server = server().await;
    let url = server.port_forward("pod".into(), vec![]).unwrap();
    let (socket, answer) =
        request(&url, "POST", &format!("{SPDY}X-Stream-Protocol-Version: portforward.k8s.io\r\n")).await;
    assert!(answer.starts_with("HTTP/1.1 101"), "{answer}");
    forward_both(Peer::new(socket)).await;
}

#[tokio::test]
async fn port_forward_over_spdy_in_websocket() {
    let server = server().await;
    let url = server.port_forward("pod".into(), vec![]).unwrap();
    let socket = websocket(&url, Some("SPDY/3.1+portforward.k8s.io")).await;
    // The client's end of the tunnel: bytes into messages and back.
    let (near, far) = tokio::io::duplex(1 << 16);
    tokio::spawn(async move {
        let (mut sink, mut source) = socket.split();
        let (mut read, mut write) = tokio::io::split(far);
        let up = async {
            let mut bytes = [0; 1000];
            while let Ok(length @ 1..) = read.read(&mut bytes).await {
                sink.send(Message::binary(bytes[..length].to_vec())).await.unwrap();
            }
        };
        let down = async {
            while let Some(Ok(message)) = source.next().await {
                write.write_all(&message.into_data()).await.unwrap();
            }
        };
        tokio::select! { () = up => {}, () = down => {} }
    });
    forward_both(Peer::new(near)).await;
}

#[tokio::test]
async fn port_forward_over_the_old_websocket_protocol() {
    let server = server().await;
    let url = server.port_forward("pod".into(), vec![]).unwrap();
    let mut socket = websocket(&format!("{url}?ports=80,9"), Some("v4.channel.k8s.io")).await;
    socket.send(Message::binary(b"\x00ping".to_vec())).await.unwrap();
    let mut channels = vec![Vec::new(); 4];
    while channels[0].len() < 6 || channels[3].len() < 3 {
        let Some(Ok(message)) = socket.next().await else { panic!("{channels:?}") };
        if let Message::Binary(bytes) = message {
            channels[usize::from(bytes[0])].extend_from_slice(&bytes[1..]);
        }
    }
    assert_eq!(channels[0], b"\x50\0ping");
    assert_eq!(channels[1], b"\x50\0");
    assert!(channels[3].starts_with(b"\x09\0forward"));
}

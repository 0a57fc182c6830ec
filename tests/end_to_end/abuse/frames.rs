//! HTTP/2 by hand, for what no client library would send: frames as bytes, and a connection that speaks them and says what
//! came back.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
};

/// What offenders come from: another address than honest clients, which the system takes for this machine's as well.
const FROM: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);

pub(super) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

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

const INITIAL_WINDOW_SIZE: u16 = 4;

/// A frame that came.
pub(super) struct Frame {
    pub(super) kind: u8,
    pub(super) flags: u8,
    pub(super) stream: u32,
    pub(super) payload: Vec<u8>,
}

/// The bytes of a frame.
pub(super) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a frame's length").to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// The header block of a request, every field as a literal.
pub(super) fn request(method: &str, path: &str, content_type: &str) -> Vec<u8> {
    let fields = [
        (":method", method),
        (":scheme", "http"),
        (":path", path),
        (":authority", "sida"),
        ("content-type", content_type),
        ("te", "trailers"),
    ];
    fields.into_iter().flat_map(|(name, value)| literal(name, value)).collect()
}

/// A field that is neither indexed nor compressed.
pub(super) fn literal(name: &str, value: &str) -> Vec<u8> {
    let string = |text: &str| [&[u8::try_from(text.len()).expect("short")], text.as_bytes()].concat();
    [vec![0], string(name), string(value)].concat()
}

/// A connection of an offender that has said nothing.
pub(super) async fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    // What is not read shall be the server's concern, not this system's buffers'.
    socket.set_recv_buffer_size(4 << 10)?;
    socket.bind((FROM, 0).into())?;
    let stream = socket.connect(to).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// A connection that has spoken HTTP/2's first bytes, and gives its peer so large a window for every stream.
pub(super) async fn greet(to: SocketAddr, window: u32) -> io::Result<TcpStream> {
    let mut stream = connect(to).await?;
    let setting = [&INITIAL_WINDOW_SIZE.to_be_bytes()[..], &window.to_be_bytes()].concat();
    stream.write_all(&[PREFACE, &frame(SETTINGS, 0, 0, &setting)].concat()).await?;
    Ok(stream)
}

/// The next frame.
pub(super) async fn next(stream: &mut (impl AsyncReadExt + Unpin)) -> io::Result<Frame> {
    let mut head = [0; 9];
    stream.read_exact(&mut head).await?;
    let [a, b, c, kind, flags, id @ ..] = head;
    let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
    stream.read_exact(&mut payload).await?;
    Ok(Frame { kind, flags, stream: u32::from_be_bytes(id), payload })
}

/// The first frame for which `is_end` says so. Until then pings are answered, as by a client that is alive.
pub(super) async fn until(stream: &mut TcpStream, is_end: impl Fn(&Frame) -> bool) -> io::Result<Frame> {
    loop {
        let frame = next(stream).await?;
        if is_end(&frame) {
            return Ok(frame);
        }
        if frame.kind == PING && frame.flags & ACK == 0 {
            stream.write_all(&self::frame(PING, ACK, 0, &frame.payload)).await?;
        }
    }
}

/// Whether a frame ends a stream: a reset, or a last answer.
pub(super) fn ends(stream: u32) -> impl Fn(&Frame) -> bool {
    move |frame| {
        frame.stream == stream && (frame.kind == RST_STREAM || frame.flags & END_STREAM != 0 && frame.kind <= HEADERS)
    }
}

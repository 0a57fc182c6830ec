//! What a client is told that speaks plain HTTP to a port of TLS: a sentence in HTTP, since it could make nothing of TLS's
//! own refusal.

use std::io;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// The answer.
const REFUSAL: &[u8] = b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\ncontent-length: 39\r\nconnection: close\r\n\r\nthis port speaks TLS: ask it by https:\n";
/// As much is read of what was sent before the connection is closed: closed over unread bytes it could lose the answer.
const READ_MAX: u64 = 64 << 10;

/// Refuses a client whose first byte is none of TLS but a letter, as methods begin. Whoever waits bounds the time.
pub(crate) async fn refuse(stream: &mut TcpStream) -> io::Result<()> {
    let mut first = [0];
    if stream.peek(&mut first).await? == 0 || !first[0].is_ascii_uppercase() {
        return Ok(());
    }
    stream.write_all(REFUSAL).await?;
    stream.shutdown().await?;
    tokio::io::copy(&mut stream.take(READ_MAX), &mut tokio::io::sink()).await?;
    Err(io::Error::new(io::ErrorKind::InvalidData, "plain HTTP was spoken to a port of TLS"))
}

//! What offenders do, one function each: it does harm until the server ends it, and says how that was. It never gives up by
//! itself.

use std::{io, net::SocketAddr, time::Duration};

use parking_lot::Mutex;
use prost::Message;
use sida_proto::v1::GenerateRequest;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time,
};

use super::{
    doors::Door,
    frames::{
        ACK, CONTINUATION, DATA, END_HEADERS, END_STREAM, Frame, GOAWAY, HEADERS, PING, PREFACE, PRIORITY, RST_STREAM,
        SETTINGS, WINDOW_UPDATE, connect, ends, frame, greet, literal, next, request, until,
    },
};

/// The pause between two bytes of a slow sender.
const SLOWLY: Duration = Duration::from_millis(100);
const GENERATE: &str = "/sida.v1.Inference/Generate";
const STREAM_INFER: &str = "/inference.GRPCInferenceService/ModelStreamInfer";
const DESCRIPTION: &[u8] = b"GET /openapi.json HTTP/1.1\r\nhost: sida\r\n\r\n";
const MIB: usize = 1 << 20;

/// How the server ended an offender.
pub(crate) type Ended = io::Result<&'static str>;

/// How a connection ended that a frame or an error is the last of.
fn ended(last: io::Result<Frame>) -> Ended {
    match last {
        Ok(frame) => Ok(match frame.kind {
            GOAWAY => "told to go away",
            RST_STREAM => "its call was reset",
            _ => "its call was answered",
        }),
        Err(error) => closed(&error),
    }
}

/// The end of a connection, if an error is no more than that.
pub(super) fn closed(error: &io::Error) -> Ended {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    match error.kind() {
        UnexpectedEof => Ok("closed"),
        BrokenPipe | ConnectionReset => Ok("reset"),
        kind => Err(io::Error::new(kind, error.to_string())),
    }
}

/// Reads until the server closes.
async fn read_to_end(stream: &mut TcpStream) -> Ended {
    match stream.read_to_end(&mut Vec::new()).await {
        Ok(_) => Ok("closed"),
        Err(error) => closed(&error),
    }
}

/// Head of a call, or request, that has a body.
fn opened(door: Door, stream: u32) -> Vec<u8> {
    let block = match door {
        Door::Grpc => request("POST", GENERATE, "application/grpc"),
        Door::Http => request("POST", "/v1/completions", "application/json"),
    };
    frame(HEADERS, END_HEADERS, stream, &block)
}

/// A message of gRPC behind its length.
fn message(bytes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(bytes.len()).expect("a short message").to_be_bytes();
    [&[0], &length[..], bytes].concat()
}

/// A request that costs little: what is looked at here is connections.
fn generate() -> Vec<u8> {
    let text = "sst2 sentence: a fine film .".to_owned();
    GenerateRequest { text, max_tokens: 2, ignore_eos: true, ..Default::default() }.encode_to_vec()
}

/// Speaks, answers pings, asks nothing, and does not go when it is told to.
pub(crate) async fn idle(to: SocketAddr, _: Door) -> Ended {
    let mut stream = greet(to, 65_535).await?;
    ended(until(&mut stream, |_| false).await)
}

/// Never speaks.
pub(super) async fn silent(to: SocketAddr, _: Door) -> Ended {
    read_to_end(&mut connect(to).await?).await
}

/// Speaks, and is then gone without a word: it does not even answer pings.
pub(super) async fn half_open(to: SocketAddr, _: Door) -> Ended {
    let mut stream = greet(to, 65_535).await?;
    match stream.read_to_end(&mut Vec::new()).await {
        Ok(_) => Ok("closed"),
        Err(error) => closed(&error),
    }
}

/// Is gone without a word while an answer comes.
pub(super) async fn half_open_in_a_call(to: SocketAddr, door: Door) -> Ended {
    let mut stream = greet(to, 0).await?;
    stream.write_all(&asked(door)).await?;
    read_to_end(&mut stream).await
}

/// A whole request, whose answer has more than a few bytes.
fn asked(door: Door) -> Vec<u8> {
    match door {
        Door::Grpc => [opened(door, 1), frame(DATA, END_STREAM, 1, &message(&generate()))].concat(),
        Door::Http => frame(HEADERS, END_HEADERS | END_STREAM, 1, &request("GET", "/openapi.json", "text/plain")),
    }
}

/// Asks, answers pings, and takes nothing of the answer.
pub(crate) async fn slow_reader(to: SocketAddr, door: Door) -> Ended {
    let mut stream = greet(to, 0).await?;
    stream.write_all(&asked(door)).await?;
    ended(until(&mut stream, ends(1)).await)
}

/// The same by HTTP/1.1, for more than any buffer holds. It reads at last, to see whether it was given up: then nothing
/// more comes than had been sent.
pub(super) async fn slow_reader_of_http1(to: SocketAddr, stall_timeout: Duration) -> Ended {
    let (mut reader, mut writer) = connect(to).await?.into_split();
    let asking = tokio::spawn(async move {
        // Ends by itself when the server takes no more, or closes.
        for _ in 0..20_000 {
            writer.write_all(DESCRIPTION).await?;
        }
        // The other half of the connection is kept open.
        Ok::<_, io::Error>(writer)
    });
    time::sleep(stall_timeout * 2).await;
    let read = reader.read_to_end(&mut Vec::new()).await;
    asking.abort();
    match read {
        Ok(_) => Ok("closed"),
        Err(error) => closed(&error),
    }
}

/// Sends its message a byte at a time.
pub(crate) async fn slow_sender(to: SocketAddr, door: Door) -> Ended {
    let mut stream = greet(to, 65_535).await?;
    stream.write_all(&[opened(door, 1), frame(DATA, 0, 1, b"\0\0\0\x10\0")].concat()).await?;
    let (mut reader, mut writer) = stream.split();
    let sending = async {
        loop {
            time::sleep(SLOWLY).await;
            if let Err(error) = writer.write_all(&frame(DATA, 0, 1, b"x")).await {
                return closed(&error);
            }
        }
    };
    let is_end = ends(1);
    let told = async {
        loop {
            match next(&mut reader).await {
                Ok(frame) if !is_end(&frame) => {}
                last => return ended(last),
            }
        }
    };
    tokio::select! {
        ended = sending => ended,
        ended = told => ended,
    }
}

/// Sends a head of HTTP/1.1 a byte at a time; where that is not spoken, the first bytes of HTTP/2.
pub(super) async fn slow_head(to: SocketAddr, door: Door) -> Ended {
    let head: Vec<u8> = match door {
        Door::Grpc => PREFACE.to_vec(),
        Door::Http => [&b"GET /health HTTP/1.1\r\nx: "[..], &[b'x'; 4096]].concat(),
    };
    bytewise(to, &[], &head).await
}

/// Sends a body of HTTP/1.1 a byte at a time.
pub(super) async fn slow_body_of_http1(to: SocketAddr) -> Ended {
    let head =
        b"POST /v1/completions HTTP/1.1\r\nhost: sida\r\ncontent-type: application/json\r\ncontent-length: 100000\r\n\r\n";
    bytewise(to, head, &[b' '; 4096]).await
}

async fn bytewise(to: SocketAddr, at_once: &[u8], slowly: &[u8]) -> Ended {
    let mut stream = connect(to).await?;
    stream.write_all(at_once).await?;
    let (mut reader, mut writer) = stream.split();
    let sending = async {
        for byte in slowly {
            time::sleep(SLOWLY).await;
            if let Err(error) = writer.write_all(&[*byte]).await {
                return closed(&error);
            }
        }
        std::future::pending().await
    };
    let told = async {
        let mut said = Vec::new();
        match reader.read_to_end(&mut said).await {
            Ok(_) if said.is_empty() => Ok("closed"),
            Ok(_) => Ok("answered and closed"),
            Err(error) => closed(&error),
        }
    };
    tokio::select! {
        ended = sending => ended,
        ended = told => ended,
    }
}

/// Opens calls and resets them, as fast as it can.
pub(crate) async fn rapid_resets(to: SocketAddr, door: Door) -> Ended {
    let stream = greet(to, 65_535).await?;
    let cancel = 8u32.to_be_bytes();
    flood(stream, |stream| [opened(door, stream), frame(RST_STREAM, 0, stream, &cancel)].concat(), 2).await
}

/// The same, once each call was seen: what HTTP/2 by itself counts is calls that nobody has seen yet.
pub(super) async fn resets_in_turns(to: SocketAddr, door: Door) -> Ended {
    let stream = greet(to, 65_535).await?;
    let cancel = 8u32.to_be_bytes();
    let turn = |stream: u32| {
        let before = if stream > 1 { frame(RST_STREAM, 0, stream - 2, &cancel) } else { Vec::new() };
        [before, opened(door, stream)].concat()
    };
    flood(stream, turn, 2).await
}

/// Begins the head of a request and goes on with it for ever.
pub(crate) async fn continuations(to: SocketAddr, _: Door) -> Ended {
    let mut stream = greet(to, 65_535).await?;
    stream.write_all(&frame(HEADERS, 0, 1, &request("POST", GENERATE, "application/grpc"))).await?;
    flood(stream, |_| frame(CONTINUATION, 0, 1, &literal("x", &"y".repeat(100))), 0).await
}

/// The same with nothing in it, so that no limit of bytes is met.
pub(super) async fn empty_continuations(to: SocketAddr, _: Door) -> Ended {
    let mut stream = greet(to, 65_535).await?;
    stream.write_all(&frame(HEADERS, 0, 1, &request("POST", GENERATE, "application/grpc"))).await?;
    flood(stream, |_| frame(CONTINUATION, 0, 1, b""), 0).await
}

/// Asks again and again whether the server is there.
pub(super) async fn pings(to: SocketAddr, _: Door) -> Ended {
    lively_flood(greet(to, 65_535).await?, |_| frame(PING, 0, 0, &[0; 8]), 0).await
}

/// Says again and again that it is there, which nobody asked.
pub(super) async fn pongs(to: SocketAddr, _: Door) -> Ended {
    lively_flood(greet(to, 65_535).await?, |_| frame(PING, ACK, 0, &[0; 8]), 0).await
}

/// Sets the same again and again.
pub(super) async fn settings(to: SocketAddr, _: Door) -> Ended {
    lively_flood(greet(to, 65_535).await?, |_| frame(SETTINGS, 0, 0, &[]), 0).await
}

/// Gives the server a byte more to send, again and again.
pub(super) async fn window_updates(to: SocketAddr, _: Door) -> Ended {
    lively_flood(greet(to, 65_535).await?, |_| frame(WINDOW_UPDATE, 0, 0, &1u32.to_be_bytes()), 0).await
}

/// Says which of its calls go before others, of which it has none.
pub(super) async fn priorities(to: SocketAddr, _: Door) -> Ended {
    lively_flood(greet(to, 65_535).await?, |stream| frame(PRIORITY, 0, stream, &[0, 0, 0, 0, 7]), 2).await
}

/// Goes on with a message by nothing.
pub(super) async fn empty_data(to: SocketAddr, door: Door) -> Ended {
    let mut stream = greet(to, 65_535).await?;
    stream.write_all(&opened(door, 1)).await?;
    lively_flood(stream, |_| frame(DATA, 0, 1, &[]), 0).await
}

/// Sends frames of a kind that nobody knows, which HTTP/2 has every server pass over.
pub(super) async fn unknown_frames(to: SocketAddr, _: Door) -> Ended {
    lively_flood(greet(to, 65_535).await?, |_| frame(0xf0, 0, 0, &[]), 0).await
}

/// Writes what `next` makes of a stream's number, which grows by `step`, until the server ends the connection.
async fn flood(stream: TcpStream, next_bytes: impl Fn(u32) -> Vec<u8>, step: u32) -> Ended {
    flooded(stream, next_bytes, step, false).await
}

/// The same by one that answers pings, as if it were alive and well: it is not ended for being gone.
async fn lively_flood(stream: TcpStream, next_bytes: impl Fn(u32) -> Vec<u8>, step: u32) -> Ended {
    flooded(stream, next_bytes, step, true).await
}

async fn flooded(mut stream: TcpStream, next_bytes: impl Fn(u32) -> Vec<u8>, step: u32, answers_pings: bool) -> Ended {
    const AT_ONCE: u32 = 64;
    let (mut reader, mut writer) = stream.split();
    let answers = Mutex::new(Vec::new());
    let writing = async {
        let mut number = 1;
        loop {
            let mut bytes = std::mem::take(&mut *answers.lock());
            bytes.extend((0..AT_ONCE).flat_map(|index| next_bytes(number + index * step)));
            if let Err(error) = writer.write_all(&bytes).await {
                return closed(&error);
            }
            number += AT_ONCE * step;
        }
    };
    let told = async {
        loop {
            match next(&mut reader).await {
                Ok(Frame { kind: PING, flags: 0, payload, .. }) if answers_pings => {
                    answers.lock().extend(frame(PING, ACK, 0, &payload));
                }
                Ok(frame) if frame.kind != GOAWAY => {}
                last => return ended(last),
            }
        }
    };
    tokio::select! {
        ended = writing => ended,
        ended = told => ended,
    }
}

/// Sends a message, or body, of 64 MiB.
pub(crate) async fn large(to: SocketAddr, door: Door) -> Ended {
    match door {
        Door::Grpc => {
            // As much of it as may be on its way before anybody has read any.
            const WINDOW: usize = 512 << 10;
            const FRAME: usize = 16 << 10;
            let mut stream = greet(to, 65_535).await?;
            let length = u32::try_from(64 * MIB - 1).expect("64 MiB").to_be_bytes();
            stream.write_all(&[opened(door, 1), frame(DATA, 0, 1, &[&[0], &length[..]].concat())].concat()).await?;
            for _ in 1..WINDOW / FRAME {
                stream.write_all(&frame(DATA, 0, 1, &[b'a'; FRAME])).await?;
            }
            ended(until(&mut stream, ends(1)).await)
        }
        Door::Http => {
            let mut stream = connect(to).await?;
            stream
                .write_all(
                    b"POST /v1/completions HTTP/1.1\r\nhost: sida\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n",
                )
                .await?;
            let chunk = [&b"100000\r\n"[..], &vec![b' '; MIB], b"\r\n"].concat();
            let (mut reader, mut writer) = stream.split();
            let sending = async {
                for _ in 0..64 {
                    if let Err(error) = writer.write_all(&chunk).await {
                        return closed(&error);
                    }
                }
                std::future::pending().await
            };
            tokio::select! {
                ended = sending => ended,
                read = reader.read_u8() => read.map_or_else(|error| closed(&error), |_| Ok("its call was answered")),
            }
        }
    }
}

/// Announces many large messages, so that room is made for them, and sends none.
pub(super) async fn announced(to: SocketAddr, door: Door) -> Ended {
    const CALLS: u32 = 64;
    let mut stream = greet(to, 65_535).await?;
    let length = u32::try_from(8 * MIB - 1).expect("8 MiB").to_be_bytes();
    let head = [&[0], &length[..]].concat();
    for call in 0..CALLS {
        let number = 2 * call + 1;
        stream.write_all(&[opened(door, number), frame(DATA, 0, number, &head)].concat()).await?;
    }
    for _ in 1..CALLS {
        let any = |frame: &Frame| ends(frame.stream)(frame) && frame.kind != RST_STREAM;
        until(&mut stream, any).await?;
    }
    Ok("its calls were answered")
}

/// Keeps a call open for ever: a stream to which it sends nothing, which is allowed.
pub(crate) async fn holds_a_call(to: SocketAddr, _: Door) -> Ended {
    let mut stream = greet(to, 65_535).await?;
    let block = request("POST", STREAM_INFER, "application/grpc");
    stream.write_all(&frame(HEADERS, END_HEADERS, 1, &block)).await?;
    ended(until(&mut stream, |_| false).await)
}

//! A TCP proxy that stands between two nodes and behaves as badly as a network can: late, slow, cut off without a
//! word, reset, or with a wrong byte. What it does is changed while it runs. Used by [`crate::sandbox`].
//!
//! It carries bytes in this process, not packets: a partition is a proxy that takes what is sent and passes nothing
//! on, while both ends see an open connection; when it heals, what was held back goes on, as TCP would send it
//! again.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

/// Bytes that are carried at a time.
const CHUNK_BYTES: usize = 16 << 10;

/// How the link is, until it is set otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Link {
    /// As a wire.
    #[default]
    Good,
    /// Everything comes this much later.
    Late(Duration),
    /// So many bytes per second in each direction.
    Slow(u64),
    /// Open, and nothing passes.
    Dead,
    /// Nobody listens: connections are reset as they come.
    Closed,
}

/// Which way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From who connected.
    There,
    /// To who connected.
    Back,
}

/// A proxy that runs until it is dropped.
pub struct FaultProxy {
    shared: Arc<Shared>,
    address: SocketAddr,
    accepting: JoinHandle<()>,
}

struct Shared {
    target: SocketAddr,
    link: watch::Sender<Link>,
    /// Ends the connections that stand now.
    standing: Mutex<CancellationToken>,
    /// One-time damage: to the next chunk there, and back.
    corrupt: [AtomicBool; 2],
    reset_within: [AtomicBool; 2],
    /// Bytes carried there and back.
    carried: AtomicU64,
}

impl FaultProxy {
    /// A good link to `target`, on a port that the system picks.
    pub async fn start(target: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind((target.ip(), 0)).await?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            target,
            link: watch::Sender::new(Link::Good),
            standing: Mutex::default(),
            corrupt: Default::default(),
            reset_within: Default::default(),
            carried: AtomicU64::new(0),
        });
        let accepting = tokio::spawn(accept(listener, shared.clone()));
        Ok(Self { shared, address, accepting })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How the link is from now on. Connections stay.
    pub fn set(&self, link: Link) {
        self.shared.link.send_replace(link);
    }

    /// Resets every connection that stands (RST).
    pub fn cut(&self) {
        std::mem::take(&mut *self.shared.standing.lock()).cancel();
    }

    /// Changes one bit of the next bytes that pass in a direction.
    pub fn corrupt_next(&self, direction: Direction) {
        self.shared.corrupt[direction as usize].store(true, Ordering::Relaxed);
    }

    /// Resets the connection in the middle of the next bytes that pass in a direction.
    pub fn reset_within_next(&self, direction: Direction) {
        self.shared.reset_within[direction as usize].store(true, Ordering::Relaxed);
    }

    /// Bytes carried so far, both ways.
    pub fn carried(&self) -> u64 {
        self.shared.carried.load(Ordering::Relaxed)
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        self.accepting.abort();
        self.cut();
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    loop {
        // A connection that ended before it was accepted is its maker's affair.
        let Ok((near, _)) = listener.accept().await else { continue };
        let (shared, end) = (shared.clone(), shared.standing.lock().clone());
        tokio::spawn(async move {
            // However it ends, both sides are dropped, which resets them: see `link`.
            let _ = end.run_until_cancelled(link(near, &shared)).await;
        });
    }
}

/// Carries bytes both ways until either side ends.
async fn link(near: TcpStream, shared: &Shared) -> io::Result<()> {
    // Dropping it resets the connection. An orderly end is passed on by `shutdown` before.
    near.set_zero_linger()?;
    near.set_nodelay(true)?;
    if *shared.link.borrow() == Link::Closed {
        return Ok(());
    }
    let far = TcpStream::connect(shared.target).await?;
    far.set_zero_linger()?;
    far.set_nodelay(true)?;
    let ((near_out, near_in), (far_out, far_in)) = (near.into_split(), far.into_split());
    let there = carry(near_out, Abrupt(Some(far_in)), shared, Direction::There);
    let back = carry(far_out, Abrupt(Some(near_in)), shared, Direction::Back);
    tokio::try_join!(there, back).map(drop)
}

/// The sending side of a connection, which says no farewell when it is dropped: then the connection is reset.
struct Abrupt(Option<OwnedWriteHalf>);

impl Drop for Abrupt {
    fn drop(&mut self) {
        if let Some(half) = self.0.take() {
            half.forget();
        }
    }
}

async fn carry(mut from: OwnedReadHalf, mut abrupt: Abrupt, shared: &Shared, direction: Direction) -> io::Result<()> {
    let mut link = shared.link.subscribe();
    let mut chunk = vec![0; CHUNK_BYTES];
    let Some(to) = &mut abrupt.0 else { return Ok(()) };
    loop {
        let count = from.read(&mut chunk).await?;
        // While it is dead, what was read waits here, and nothing more is read.
        let now = *link.wait_for(|link| *link != Link::Dead).await.map_err(io::Error::other)?;
        if count == 0 {
            return to.shutdown().await;
        }
        let bytes = &mut chunk[..count];
        if shared.corrupt[direction as usize].swap(false, Ordering::Relaxed) {
            bytes[count / 2] ^= 0x10;
        }
        if shared.reset_within[direction as usize].swap(false, Ordering::Relaxed) {
            to.write_all(&bytes[..count / 2]).await?;
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        shared.carried.fetch_add(count as u64, Ordering::Relaxed);
        match now {
            Link::Late(late) => tokio::time::sleep(late).await,
            Link::Slow(rate) => {
                tokio::time::sleep(Duration::from_secs_f64(count as f64 / rate as f64)).await;
            }
            Link::Closed => return Err(io::ErrorKind::ConnectionReset.into()),
            Link::Good | Link::Dead => {}
        }
        to.write_all(bytes).await?;
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::{Instant, timeout};

    use super::*;

    /// A server that sends back what it gets, and a proxy before it.
    async fn echo() -> FaultProxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let target = listener.local_addr().expect("an address");
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut from, mut to) = stream.split();
                    let _ = tokio::io::copy(&mut from, &mut to).await;
                });
            }
        });
        FaultProxy::start(target).await.expect("a proxy")
    }

    async fn there_and_back(stream: &mut TcpStream, bytes: &[u8]) -> io::Result<Vec<u8>> {
        stream.write_all(bytes).await?;
        let mut back = vec![0; bytes.len()];
        stream.read_exact(&mut back).await?;
        Ok(back)
    }

    /// A fault that a test asks for would not happen, and the test would prove nothing.
    #[tokio::test]
    async fn every_fault_happens() {
        let proxy = echo().await;
        let connect = || TcpStream::connect(proxy.address());
        let mut stream = connect().await.expect("a connection");
        assert_eq!(there_and_back(&mut stream, b"as it was").await.expect("carried"), b"as it was");

        proxy.set(Link::Late(Duration::from_millis(30)));
        let start = Instant::now();
        there_and_back(&mut stream, b"late").await.expect("carried");
        assert!(start.elapsed() >= Duration::from_millis(60));

        proxy.set(Link::Slow(1000));
        let start = Instant::now();
        there_and_back(&mut stream, &[7; 50]).await.expect("carried");
        assert!(start.elapsed() >= Duration::from_millis(100));

        proxy.set(Link::Dead);
        assert!(timeout(Duration::from_millis(100), there_and_back(&mut stream, b"held")).await.is_err());
        proxy.set(Link::Good);
        let mut held = [0; 4];
        stream.read_exact(&mut held).await.expect("it heals");
        assert_eq!(&held, b"held");

        for direction in [Direction::There, Direction::Back] {
            proxy.corrupt_next(direction);
            assert_ne!(there_and_back(&mut stream, b"wrong").await.expect("carried"), b"wrong");
            assert_eq!(there_and_back(&mut stream, b"right").await.expect("carried"), b"right");
        }

        proxy.cut();
        let error = there_and_back(&mut stream, b"gone").await.expect_err("reset");
        assert!(matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe), "{error}");
        for direction in [Direction::There, Direction::Back] {
            let mut stream = connect().await.expect("a connection");
            proxy.reset_within_next(direction);
            assert!(there_and_back(&mut stream, b"in the middle").await.is_err());
        }
        proxy.set(Link::Closed);
        let mut stream = connect().await.expect("a connection");
        assert!(there_and_back(&mut stream, b"nobody").await.is_err());
    }
}

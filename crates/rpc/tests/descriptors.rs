//! A process without a free file descriptor: in a file of its own, since the limit is one of the whole process.

mod echo;

use std::{
    fs::{self, File},
    process::Command,
    time::Duration,
};

use echo::{Running, count, unary};
use futures::StreamExt;
use sida_rpc::{ClientConfig, ServerConfig};
use tokio::{net::TcpStream, time};
use tonic::Request;

#[tokio::test]
async fn accepting_goes_on_when_descriptors_are_free_again() {
    // Broken: one moment without descriptors would end a node's service, or fill its log and a processor.
    let running = Running::start(ServerConfig::default(), |server| server).await;
    let channel = running.channel().await;
    // Its connection has a call, so that it does not have to make room.
    let mut numbers = count(&channel, Request::new(Vec::new())).await;
    let open = fs::read_dir("/proc/self/fd").unwrap().count();
    let limit = format!("--nofile={0}:{0}", open + 8);
    let pid = std::process::id().to_string();
    assert!(Command::new("prlimit").args(["--pid", &pid, &limit]).status().expect("util-linux").success());
    let mut files = Vec::new();
    while let Ok(file) = File::open("/dev/null") {
        files.push(file);
    }
    // One for the client's end; there is none for the server's.
    files.pop();
    let newcomer = TcpStream::connect(&running.address).await.expect("the kernel takes it");
    time::sleep(Duration::from_millis(300)).await;
    unary(&channel, Request::new(b"x".to_vec())).await.expect("who is connected is served on");
    numbers.next().await.unwrap().unwrap();
    drop((newcomer, files));
    let config = ClientConfig::default();
    let again = time::timeout(Duration::from_secs(5), sida_rpc::connect(&running.address, &config)).await;
    let answer = unary(&again.expect("accepted again").unwrap(), Request::new(b"y".to_vec())).await;
    assert_eq!(answer.unwrap().into_inner(), b"y");
}

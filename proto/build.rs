//! Compiles the protocol in pure Rust, so that a build needs no protoc.

use std::{env, fs, path::PathBuf};

use prost::Message;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=sida");
    println!("cargo:rerun-if-changed=inference");
    let names = ["inference", "hash_table", "predictor", "experts", "cluster", "placement"];
    let ours = names.iter().map(|name| format!("sida/v1/{name}.proto"));
    let files: Vec<String> = ours.chain(["inference/open_inference.proto".to_owned()]).collect();
    let descriptors = protox::compile(files, ["."])?;
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    Ok(())
}

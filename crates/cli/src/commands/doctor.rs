//! `sida doctor`: what this machine can run, and what is missing or damaged. Fails, as `sida ask` would, if that could not work
//! here. What of the model is looked at: [`model`].

mod model;

use std::{
    io::{self, Write},
    net::TcpListener,
    path::PathBuf,
    process::ExitCode,
    thread,
};

use clap::Args;
use serde_json::{Value, json};
use sida_telemetry::counted;

use crate::{EXIT_BAD_CONFIGURATION, byte_size, expert_picture::Style, machine_memory};

/// The ports that `sida up` listens on unless told otherwise.
const DEFAULT_PORTS: [(u16, &str); 2] = [(50051, "gRPC"), (9090, "metrics")];

/// Show what this machine can run, and what of it and of a model is missing or damaged
#[derive(Args)]
pub(crate) struct DoctorArguments {
    /// The model's directory [default: the switch-tiny-64 that comes with the source]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// How a finding is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// As it should be.
    Good,
    /// Worth knowing; things work.
    Note,
    /// Something will not work.
    Bad,
}

impl Verdict {
    /// The mark before a line, the colour of it, and the word for it in JSON.
    fn shown(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::Good => ("ok", "32", "good"),
            Self::Note => ("--", "33", "note"),
            Self::Bad => ("!!", "31", "bad"),
        }
    }
}

struct Finding {
    verdict: Verdict,
    what: &'static str,
    text: String,
}

/// Looks at everything and prints one line each.
pub(crate) fn run(arguments: DoctorArguments) -> anyhow::Result<ExitCode> {
    let mut findings = vec![processor(), memory()];
    findings.extend(gpus());
    findings.extend(model::findings(arguments.model.as_deref()));
    findings.extend(DEFAULT_PORTS.map(|(port, use_)| port_finding(port, use_)));
    if cfg!(not(feature = "etcd")) {
        findings.push(finding(
            Verdict::Note,
            "etcd",
            "support is not built in: clusters are described by --static FILE",
        ));
    }
    if arguments.json {
        writeln!(io::stdout(), "{}", as_json(&findings))?;
    } else {
        let style = Style::of_stdout();
        for finding in &findings {
            let (mark, sgr, _) = finding.verdict.shown();
            writeln!(io::stdout(), "{} {:<10} {}", style.paint(sgr, mark), finding.what, finding.text)?;
        }
    }
    let is_bad = findings.iter().any(|finding| finding.verdict == Verdict::Bad);
    // What is bad is the model, or where it was looked for.
    Ok(if is_bad { EXIT_BAD_CONFIGURATION.into() } else { ExitCode::SUCCESS })
}

/// `works` is what the exit code says.
fn as_json(findings: &[Finding]) -> Value {
    let one = |found: &Finding| json!({"verdict": found.verdict.shown().2, "what": found.what, "text": found.text});
    let works = findings.iter().all(|finding| finding.verdict != Verdict::Bad);
    json!({"works": works, "findings": findings.iter().map(one).collect::<Vec<_>>()})
}

fn finding(verdict: Verdict, what: &'static str, text: impl Into<String>) -> Finding {
    Finding { verdict, what, text: text.into() }
}

/// Cores, and the instructions that the kernels pick at run time.
fn processor() -> Finding {
    let cores = thread::available_parallelism().map_or(1, |cores| cores.get());
    let instructions = vector_instructions();
    let verdict = if instructions == PORTABLE { Verdict::Note } else { Verdict::Good };
    finding(verdict, "processor", format!("{}, {}, {instructions}", counted(cores, "core"), std::env::consts::ARCH))
}

const PORTABLE: &str = "portable kernels only: slower";

fn vector_instructions() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            return "AVX-512 kernels";
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            return "AVX2 kernels";
        }
    }
    PORTABLE
}

fn memory() -> Finding {
    match machine_memory::total_and_available() {
        Some((total, available)) => {
            let text = format!("{}, {} of it available", byte_size::shown(total), byte_size::shown(available));
            finding(Verdict::Good, "memory", text)
        }
        None => finding(Verdict::Note, "memory", "unknown: /proc/meminfo does not say"),
    }
}

/// What of GPUs this build and this machine can use.
#[cfg(feature = "cuda")]
fn gpus() -> Vec<Finding> {
    use sida_model::cuda::{CudaError, Gpu};

    let mut findings = Vec::new();
    loop {
        let ordinal = findings.len();
        findings.push(match Gpu::open(ordinal) {
            Ok(gpu) => {
                let found = gpu.description();
                let (major, minor) = found.capability;
                let memory = format!("{}, {} free", byte_size::shown(found.bytes), byte_size::shown(found.bytes_free));
                let text = format!("cuda:{ordinal}, {}: {memory}, compute capability {major}.{minor}", found.name);
                let (major, minor) = (found.driver / 1000, found.driver % 1000 / 10);
                finding(Verdict::Good, "GPU", format!("{text}, CUDA {major}.{minor}"))
            }
            Err(CudaError::NoDevice { .. }) if ordinal > 0 => return findings,
            Err(CudaError::NoDriver) => {
                return vec![finding(Verdict::Note, "GPU", "no NVIDIA driver: computing on the CPU")];
            }
            Err(error) => {
                findings.push(finding(Verdict::Note, "GPU", format!("{error}: computing on the CPU")));
                return findings;
            }
        });
    }
}

/// Whether there is a GPU with a driver. This build computes on the CPU whatever is found.
#[cfg(not(feature = "cuda"))]
fn gpus() -> Vec<Finding> {
    let driver = std::fs::read_to_string("/proc/driver/nvidia/version").ok();
    let version = driver.as_deref().and_then(|text| text.lines().next());
    let text = match version {
        Some(version) => format!("{}; this build has no GPU support (cargo feature cuda)", version.trim()),
        None => "no NVIDIA driver: computing on the CPU".to_owned(),
    };
    vec![finding(Verdict::Note, "GPU", text)]
}

fn port_finding(port: u16, use_: &'static str) -> Finding {
    match TcpListener::bind(("127.0.0.1", port)) {
        Ok(_) => finding(Verdict::Good, "port", format!("{port} ({use_}) is free")),
        Err(error) => finding(Verdict::Note, "port", format!("{port} ({use_}): {error}; choose another by a flag")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_said() {
        // Broken: `sida doctor` would call a machine healthy on which `sida ask` fails.
        let dir = tempfile::tempdir().unwrap();
        let findings = model::findings(Some(dir.path()));
        assert_eq!(findings[0].verdict, Verdict::Bad);
        let json = as_json(&findings);
        assert_eq!((&json["works"], &json["findings"][0]["verdict"]), (&json!(false), &json!("bad")));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        assert_eq!(port_finding(listener.local_addr().unwrap().port(), "gRPC").verdict, Verdict::Note);
    }
}
